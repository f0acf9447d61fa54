"""What an FFN's output is added to, and what stands between: nothing, as a rule; a factor in Granite, a norm in Gemma 2."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from . import nodes as N

if TYPE_CHECKING:
    from . import Match

_ADDS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_MOST = 16  # operators of one step; a norm in its parts has eight


def with_residuals(found: list[Match]) -> list[Match]:
    """Matches with their residuals, where these depend neither on the FFN nor on one behind it."""
    behind = {match.out for match in found}
    kept = []
    for match in found:
        residual, between = _sums(match.out)
        pending, seen = list(residual), set[fx.Node]()
        while pending:
            source = pending.pop()
            if source not in seen:
                seen.add(source)
                pending += source.all_input_nodes
        kept.append(replace(match, residual=residual, between=between) if behind.isdisjoint(seen) else match)
        behind.discard(match.out)
    return kept


def _sums(out: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """(the other operands of the sums that follow, the operators before the first sum). GPT-NeoX adds attention's output first,
    then the stream that both read."""
    node, others = out, list[fx.Node]()
    between: list[fx.Node] = []
    while True:
        users = _users(node)
        if len(users) == 1 and N.passes_on(users[0]):
            node = users[0]
            between += [] if others else [node]
        elif len(users) == 1 and (term := _other_term(users[0], node)) is not None:
            node = users[0]
            others.append(term)
        elif not others and (step := _step(node)):
            node = step[-1]
            between += step
        else:
            break
    changed = not all(map(N.passes_on, between))
    return tuple(others), tuple(between) if others and changed else ()


def _users(node: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user.target not in N.ASSERTS]


def _other_term(add: fx.Node, node: fx.Node) -> fx.Node | None:
    """What a sum adds to a node; None where it is no sum of two such tensors."""
    if add.target not in _ADDS or add.kwargs.get("alpha", 1) != 1:
        return None
    terms = [source for source in add.args[:2] if source is not node]
    return terms[0] if len(terms) == 1 and isinstance(terms[0], fx.Node) and N.same_shape(terms[0], node) else None


def _step(node: fx.Node) -> list[fx.Node]:
    """The operators that make another tensor of a node's shape out of it and of parameters, token by token; all that is read of
    them is the last value. None if there are none."""
    made: list[fx.Node] = []
    inside, constant = {node}, dict[fx.Node, bool]()
    for user in _after(node):
        if inside.isdisjoint(user.all_input_nodes) or user.target in N.ASSERTS:
            continue
        beside = [each for each in user.all_input_nodes if each not in inside]
        if not _by_token(user) or not all(_is_constant(each, constant) and _for_any_token(each) for each in beside):
            return []
        inside.add(user)
        made.append(user)
        if N.same_shape(user, node) and all(inside.issuperset(_users(each)) for each in inside if each is not user):
            return [each for each, known in constant.items() if known and each.op != "get_attr"] + made
        if len(made) == _MOST:
            return []
    return []


def _by_token(node: fx.Node) -> bool:
    """Whether an operator computes each token for itself, wherever it stands, and writes nowhere."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    if N.passes_on(node) or torch.Tag.pointwise in node.target.tags:
        return True
    if node.target is torch.ops.aten.rms_norm.default:
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    return node.target is torch.ops.aten.mean.dim and node.args[1:3] == ([-1], True)


def _for_any_token(constant: fx.Node) -> bool:
    """Whether a constant has one number, or one for each channel."""
    value = N.value_of(constant)
    return value is not None and value.numel() in (1, value.shape[-1] if value.dim() else 1)


def _is_constant(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    """Whether a node is computed from parameters alone; ``known`` keeps the answers, inputs before what is made of them."""
    if node not in known:
        sources = node.all_input_nodes
        made = node.op == "call_function" and bool(sources) and all(_is_constant(each, known) for each in sources)
        known[node] = node.op == "get_attr" or made
    return known[node]


def _after(node: fx.Node) -> list[fx.Node]:
    """The nodes behind one in its graph, as many as a step may take and what stands between them."""
    found: list[fx.Node] = []
    place = node.next
    while place.op != "root" and len(found) < 4 * _MOST:
        found.append(place)
        place = place.next
    return found
