"""Merge shared experts:  (W_d act(W_g x) * (W_u x) + moe_ffn(x)) + b  ->  moe_ffn(x, W_g, W_u, W_d, b)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..activations import Activation
from .base import PassResult, clone
from .match_experts import moe_nodes, operands_of, set_operands
from .nodes import argument, meaning, site_of, tensor_of, through_casts, through_reshapes, written


@dataclass(frozen=True)
class Shared:
    """A plain or gated FFN on the same tokens, as found in the graph."""

    gate: Any
    up: Any
    down: Any
    gate_bias: Any
    up_bias: Any
    down_bias: Any


class MergeShared:
    """The neurons that are always on join the routed ones in one operator: one kernel reads x once and writes y once."""

    name = "merge_shared"
    requires = frozenset({"moe_ffn"})
    ensures = frozenset({"merged"})

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """The graph with shared experts and output biases inside ``moe_ffn``; what cannot be merged is left, with a note."""
        if not moe_nodes(graph_module):
            return PassResult(graph_module, 0)
        result, merged, notes = clone(graph_module), 0, []
        changed = written(result.graph)
        for node in moe_nodes(result):
            while True:
                outcome = _absorb(result.graph, node, self.name, changed)
                if isinstance(outcome, str):
                    if outcome:
                        notes.append(f"{site_of(node)}: {outcome}")
                    break
                merged += 1
                changed = changed and written(result.graph)  # an addition in place may be gone
        result.recompile()
        return PassResult(result, merged, tuple(notes))


def _absorb(graph: Graph, node: Node, step: str, changed: frozenset[Node]) -> bool | str:
    """Take one addition behind the node into it: True, or why there is none ('' where there is no addition)."""
    tail = node
    while len(tail.users) == 1 and meaning(user := next(iter(tail.users))) == "reshape" and through_reshapes(user) is node:
        tail = user
    if len(tail.users) != 1:
        return ""
    add = next(iter(tail.users))
    if meaning(add) not in ("add", "iadd") or add.kwargs.get("alpha", 1) != 1 or len(add.args) != 2:
        return ""
    if meaning(add) == "iadd" and add.args[0] is not tail:
        return ""  # writes into the other operand
    other = add.args[1] if add.args[0] is tail else add.args[0]
    out, value = tensor_of(add), tensor_of(node)
    addend = tensor_of(other)
    if other is tail or addend is None or out is None or value is None or out.dtype != value.dtype:
        return ""
    operands = operands_of(node)
    if changed & {other, tail, node, through_reshapes(operands_of(node)["x"]), operands_of(node)["x"]}:
        return f"node {add.name}: what is added, or the tokens, are changed in place"
    if addend.dim() == 1:
        if addend.shape[0] != value.shape[-1]:
            return ""
        below = through_casts(other)
        if operands["bias"] is not None or not isinstance(below, Node) or below.op not in ("placeholder", "get_attr"):
            return ""
        set_operands(node, step, bias=below)
        _drop(graph, add, tail, other)
        return True
    found = find_shared(other, operands)
    if isinstance(found, str):
        return found
    if operands["shared_up"] is not None or (found.down_bias is not None and operands["bias"] is not None):
        return f"node {add.name}: a second shared expert or bias is added outside"
    set_operands(
        node, step, shared_gate=found.gate, shared_up=found.up, shared_down=found.down, shared_gate_bias=found.gate_bias,
        shared_up_bias=found.up_bias, bias=found.down_bias if found.down_bias is not None else operands["bias"],
    )  # fmt: skip
    _drop(graph, add, tail, other)
    return True


def find_shared(node: Any, operands: dict[str, Any]) -> Shared | str:
    """The FFN whose output a node is, if it reads the tokens that ``moe_ffn`` reads; '' where it is no FFN, else the reason."""
    down = through_reshapes(node)
    if meaning(down) != "linear" or len(down.users) > 1:
        return ""
    h = down.args[0]
    x = through_reshapes(operands["x"])
    gate = None
    if operands["gated"]:
        if meaning(h) != "mul":
            return ""
        sides = [(a, b) for a, b in (h.args[:2], h.args[1::-1]) if meaning(b) == "linear" and through_reshapes(b.args[0]) is x]
        roots = [(root, a, b) for a, b in sides if (root := _below_activation(a, x)) is not None and root is not b]
        if not roots:
            return ""
        gate, value, up = roots[0]
    else:
        root = _below_activation(h, x)
        if root is None:
            return ""
        value, up = h, root
    name = str(operands["activation"])
    if not _computes(value, gate if gate is not None else up, name):
        return f"node {down.name}: the shared expert's activation is not {name}"
    return Shared(
        None if gate is None else gate.args[1],
        up.args[1],
        down.args[1],
        None if gate is None else argument(gate, 2, "bias"),
        argument(up, 2, "bias"),
        argument(down, 2, "bias"),
    )


def _between(value: Any) -> tuple[list[Node], list[Node]]:
    """(nodes from the nearest linear layers up to ``value``, those linear layers)."""
    inner: list[Node] = []
    roots: list[Node] = []
    pending = [value]
    while pending and len(inner) < 64:
        node = pending.pop()
        if not isinstance(node, Node) or node in inner or node in roots:
            continue
        if meaning(node) == "linear":
            roots.append(node)
        elif node.op in ("call_function", "call_method"):
            inner.append(node)
            pending += node.all_input_nodes
        else:
            return [], []  # reads something else than one projection
    return inner, roots


def _below_activation(value: Any, x: Node) -> Node | None:
    """The projection of x that a value is a function of, or None."""
    _, roots = _between(value)
    return roots[0] if len(roots) == 1 and through_reshapes(roots[0].args[0]) is x else None


def _computes(value: Node, root: Node, activation: str) -> bool:
    """Whether the nodes between a projection and a value are a named activation: by numbers, on 2 x 129 points."""
    inner, _ = _between(value)
    points = torch.linspace(-9.0, 9.0, 258, dtype=torch.float64)
    points = points[torch.randperm(258, generator=torch.Generator().manual_seed(0))].view(2, 129)
    values: dict[Node, Any] = {root: points}
    order = {node: position for position, node in enumerate(value.graph.nodes)}
    try:
        for node in sorted(inner, key=order.__getitem__):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        ours = values[value]
        return bool(
            isinstance(ours, torch.Tensor)
            and ours.shape == points.shape
            and torch.allclose(ours.double(), Activation(activation)(points), rtol=1e-5, atol=1e-6)
        )
    except Exception:  # what these nodes compute cannot be tried on points, so it is not known
        return False


def _drop(graph: Graph, add: Node, tail: Node, other: Any) -> None:
    """``add`` becomes its own left part, and what only it read goes."""
    add.replace_all_uses_with(tail)
    graph.erase_node(add)
    _move_after_inputs(graph, tail)
    _erase_tree(graph, other)


def _move_after_inputs(graph: Graph, tail: Node) -> None:
    """New operands may stand behind the node in the graph; move it (and the reshapes behind it) after them."""
    chain = [tail]
    while meaning(chain[-1]) == "reshape":
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    node = chain[-1]
    order = {each: position for position, each in enumerate(graph.nodes)}
    last = max(node.all_input_nodes, key=order.__getitem__)
    if order[last] > order[node]:
        for each in reversed(chain):
            last.append(each)
            last = each


def _erase_tree(graph: Graph, node: Any) -> None:
    """Erase an FFN's nodes once nothing reads its output; they are pure, for they were matched by what they compute."""
    pending = [node]
    while pending:
        each = pending.pop()
        if isinstance(each, Node) and not each._erased and not each.users and each.op in ("call_function", "call_method"):
            sources = each.all_input_nodes
            graph.erase_node(each)
            pending += sources
