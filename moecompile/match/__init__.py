"""Matching: find the feed-forward networks of a captured graph by its dataflow, not by class names.

    plain   y = W_down act(W_up x + b_up) + b_down
    gated   y = W_down (act(W_gate x + b_gate) * (W_up x + b_up)) + b_down

The walk starts at every linear layer and goes back through pointwise operators to the projections. What looks like an FFN
(a nonlinearity, a product or a normalisation between linear layers, and no mixing of tokens) and cannot be split is
reported with the node that stood in the way. What does not look like one (attention, heads behind a residual) is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from ..activations import ATEN, canonical, is_linear
from ..capture import Captured
from ..sites import FFNSite, Projection, Skipped
from . import nodes as N
from .expression import Blocked, Expression, Leaf, Walk, factors_of, leaves_of, product_of, text_of
from .placement import ModuleMap, common_module, place
from .residual import with_residuals

__all__ = ["Match", "Matched", "match"]

_ADDITIVE = {"add", "sub"}
_ARITHMETIC = {"add", "sub", "mul", "div", "neg"}


@dataclass(frozen=True)
class Match:
    """One matched FFN: its record and its place in the graph.

    Attributes:
        site: the record.
        x: the node that the FFN reads.
        out: the node that is its output; the rewrite replaces its uses.
        region: the nodes between the two, which are dead after the rewrite.
        residual: the nodes that the output is added to, where they depend neither on it nor on an FFN behind it.
        between: the operators between the output and that sum, where they change it; they read parameters beside it.
    """

    site: FFNSite
    x: fx.Node
    out: fx.Node
    region: frozenset[fx.Node]
    residual: tuple[fx.Node, ...] = ()
    between: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Matched:
    """What a graph holds: FFNs in the order of execution, and candidates that cannot be split."""

    matches: tuple[Match, ...]
    skipped: tuple[Skipped, ...]

    @property
    def sites(self) -> tuple[FFNSite, ...]:
        """The records alone."""
        return tuple(m.site for m in self.matches)


def match(captured: Captured) -> Matched:
    """Find the FFNs of a captured model. Pure: neither graph nor module is changed."""
    graph_module = captured.graph_module
    frontier = _frontier(graph_module.graph)
    uses = _parameter_uses(captured)
    modules = ModuleMap(graph_module.graph)
    found: list[Match] = []
    skipped: list[Skipped] = []
    linears = [linear for node in graph_module.graph.nodes if (linear := N.as_linear(node)) is not None]
    inner = {node for linear in linears for node in linear.inner}
    for down in linears:
        state = frontier.get(down.x)
        if down.node in inner or state is None or not state.nonlinear or not state.linears:
            continue
        try:
            found.append(_read_site(captured, modules, uses, down))
        except Blocked as block:
            stacks = [N.module_paths(node) for node in (down.node, *state.linears)]
            name = common_module(stacks) or (N.module_paths(down.node) or [down.node.name])[-1]
            skipped.append(Skipped(name, block.node.name, block.reason))
    return Matched(_with_unique_names(with_residuals(found)), tuple(skipped))


# ---- which linear layers are candidates ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    linears: frozenset[fx.Node]
    nonlinear: bool


def _frontier(graph: fx.Graph) -> dict[fx.Node, _State | None]:
    """One pass forward: from which linear layers, through token-wise operators alone, each node is computed.

    None: from something else too (an embedding, attention, a residual sum), so that what follows is no FFN.
    """
    states: dict[fx.Node, _State | None] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            states[node] = _State(frozenset(), False)
        elif node.op == "call_function":
            linear = N.as_linear(node)
            states[node] = _State(frozenset({node}), False) if linear is not None else _join(node, states)
        else:
            states[node] = None
    return states


def _join(node: fx.Node, states: dict[fx.Node, _State | None]) -> _State | None:
    sources = [source for source in node.all_input_nodes if _is_tensor(source)]
    joined = [states.get(source) for source in sources]
    if not joined or any(state is None for state in joined):
        return None
    found: list[_State] = [state for state in joined if state is not None and state.linears]
    linears = frozenset().union(*(state.linears for state in found)) if found else frozenset()
    nonlinear = any(state.nonlinear for state in found)
    target = node.target
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    if target in ATEN or pointwise:
        primitive = ATEN.get(target, ("", 0))[0]
        if primitive in _ADDITIVE and len({state.linears for state in found}) > 1 and not _read_one_input(linears):
            return None  # a residual: branches that read different inputs are summed
        arithmetic = primitive in _ARITHMETIC and len(found) < 2
        return _State(linears, nonlinear or not arithmetic)
    if target in N.NORMS or target is torch.ops.aten.glu.default:
        return _State(linears, True)
    if target in N.DROPOUTS or target in N.RESHAPES or target in N.SQUEEZES or target in N.CASTS or target in N.PASS_ON:
        return _State(linears, nonlinear)
    if target in (torch.ops.aten.chunk.default, torch.ops.aten.split.Tensor, torch.ops.aten.split_with_sizes.default):
        return _State(linears, nonlinear)
    if N.as_rows(node) is not None or str(target).startswith("<built-in function getitem"):
        return _State(linears, nonlinear)
    if target in (torch.ops.aten.transpose.int, torch.ops.aten.permute.default, torch.ops.aten.t.default):
        return _State(linears, nonlinear)
    if len(found) == 1 and N.same_shape(node, sources[0]):
        return _State(linears, True)  # an operator that the walk will refuse, with its name
    return None


def _read_one_input(linears: frozenset[fx.Node]) -> bool:
    return len({N.strip(linear.x) for node in linears if (linear := N.as_linear(node)) is not None}) == 1


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


# ---- reading and validating one site ---------------------------------------------------------------------------------


def _parameter_uses(captured: Captured) -> dict[int, list[fx.Node]]:
    """For each parameter (by identity, so tied names count as one), the nodes that read it."""
    uses: dict[int, list[fx.Node]] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op == "get_attr":
            uses.setdefault(_identity(captured, node), []).extend(node.users)
    return uses


def _identity(captured: Captured, node: fx.Node) -> int:
    return id(N.attribute(captured.graph_module, node.target))


def _read_site(captured: Captured, modules: ModuleMap, uses: dict[int, list[fx.Node]], down: N.LinearNode) -> Match:
    walk = Walk(captured.graph_module)
    expression = walk.read(down.x)
    gate, up, activation = _split_product(expression, down)
    before = set(walk.region)
    own = {down.node, *down.inner}
    projections = [leaf for leaf in (gate, up) if leaf is not None]
    x = _common_input(projections, down)
    _check_users(before | set(down.inner), own)
    hidden = N.last_size(x)
    if hidden is None or hidden != down.out_features:
        raise Blocked(
            down.node, f"it maps {hidden} features to {down.out_features}; a feed-forward network returns to its own width"
        )
    _check_shapes(x, down)
    for linear in (*[leaf.linear for leaf in projections], down):
        _check_parameter(captured, uses, linear, before | own)
    kinds = {N.attribute(captured.graph_module, each.weight.target).dtype for each in (*(p.linear for p in projections), down)}
    if len(kinds) > 1:  # T5 in float16 keeps its down projection in float32
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise Blocked(down.node, f"its projections are of several types, {names}; load the model in one")
    forms = _reshaped_forms(x, projections)
    placed = place(modules, gate is not None, {x, *forms}, before, own | _views_of(down, before), down.node)
    site = FFNSite(
        name=common_module([N.module_paths(node) for node in (down.node, *(p.linear.node for p in projections))])
        or down.node.name,
        kind="plain" if gate is None else "gated",
        activation=activation,
        hidden_size=hidden,
        intermediate_size=_width(up),
        gate=None if gate is None else _projection(gate.linear, gate.rows),
        up=_projection(up.linear, up.rows),
        down=_projection(down, None),
        placement=placed.placement,
        refusal=placed.refusal,
        output_dropout=placed.output_dropout,
    )
    return Match(site, x, down.node, frozenset(before | set(down.inner)) - {x})


def _split_product(expression: Expression, down: N.LinearNode) -> tuple[Leaf | None, Leaf, str]:
    """(gate or None, up, activation's name): which leaf stands under the nonlinearity and which multiplies it."""
    leaves = leaves_of(expression)
    if len(leaves) == 1:
        activation = canonical(text_of(expression))
        if is_linear(activation):
            raise Blocked(down.node, "there is no nonlinearity between the projections")
        return None, leaves[0], activation.name
    if len(leaves) > 2:
        raise Blocked(down.node, f"{len(leaves)} projections meet in the intermediate; an FFN has one or two")
    groups: dict[Leaf, list[Expression]] = {leaf: [] for leaf in leaves}
    numbers: list[Expression] = []
    for factor in factors_of(expression):
        inside = leaves_of(factor)
        if len(inside) == 2:
            raise Blocked(down.node, "gate and up projection are combined otherwise than by a product")
        (groups[inside[0]] if inside else numbers).append(factor)
    plain = [leaf for leaf in leaves if groups[leaf] == [leaf]]
    if not plain:
        raise Blocked(down.node, "the intermediate is a product of two activations")
    up = plain[-1]
    gate = next(leaf for leaf in leaves if leaf is not up and leaf != up)
    if _width(gate) != _width(up):
        raise Blocked(down.node, f"gate and up projection have different widths, {_width(gate)} and {_width(up)}")
    return gate, up, canonical(text_of(product_of([*groups[gate], *numbers]))).name


def _width(leaf: Leaf) -> int:
    if leaf.rows is not None:
        return len(range(*leaf.rows))
    width = leaf.linear.out_features
    assert width is not None
    return width


def _projection(linear: N.LinearNode, rows: tuple[int, int, int] | None) -> Projection:
    bias = None if linear.bias is None else str(linear.bias.target)
    return Projection(str(linear.weight.target), bias, linear.transposed, rows)


def _common_input(projections: list[Leaf], down: N.LinearNode) -> fx.Node:
    inputs = {N.strip(leaf.linear.x) for leaf in projections}
    if len(inputs) != 1:
        raise Blocked(down.node, "gate and up projection read different inputs")
    return projections[-1].linear.x


def _reshaped_forms(x: fx.Node, projections: list[Leaf]) -> set[fx.Node]:
    """The input under every view that a projection reads it by (Conv1D flattens it first)."""
    forms: set[fx.Node] = set()
    for node in (x, *(leaf.linear.x for leaf in projections)):
        forms.add(N.strip(node, forms))
        forms.add(node)
    return forms


def _views_of(down: N.LinearNode, before: set[fx.Node]) -> set[fx.Node]:
    """Views directly around the down projection (its own input's, and those that follow it)."""
    views: set[fx.Node] = set()
    node = down.x
    while N.passes_on(node) and node in before:
        views.add(node)
        node = node.args[0]  # type: ignore[assignment]
    node = down.node
    while len(node.users) == 1 and (user := next(iter(node.users))).target in N.RESHAPES and N.passes_on(user):
        views.add(user)
        node = user
    return views


def _check_users(region: set[fx.Node], own: set[fx.Node]) -> None:
    for node in sorted(region, key=lambda item: item.name):
        for user in node.users:
            if user not in region and user not in own and user.target not in N.ASSERTS:
                what = "the model's output" if user.op == "output" else f"node {user.name}"
                raise Blocked(node, f"the intermediate {node.name} has a second user, {what}")


def _check_shapes(x: fx.Node, down: N.LinearNode) -> None:
    """The block maps (..., D) to (..., D): what it reads and what it replaces must agree in all but values."""
    value, result = N.value_of(x), N.value_of(down.node)
    if value is None or result is None or value.shape != result.shape:
        raise Blocked(down.node, "the tokens are rearranged between the up and the down projection")


def _check_parameter(captured: Captured, uses: dict[int, list[fx.Node]], linear: N.LinearNode, region: set[fx.Node]) -> None:
    for node in (linear.weight, linear.bias):
        if node is None:
            continue
        if node.op != "get_attr":
            raise Blocked(node, f"the weight of {linear.node.name} is computed by {node.name}, it is not a parameter")
        others = [user for user in uses[_identity(captured, node)] if user not in region and user.target not in N.ASSERTS]
        if others:
            raise Blocked(node, f"the weight '{node.target}' is shared: node {others[0].name} reads it too")


def _with_unique_names(found: list[Match]) -> tuple[Match, ...]:
    """Sites that share their innermost common module are named by their down projection instead."""
    names = [m.site.name for m in found]
    taken: dict[str, int] = {}
    unique = []
    for m in found:
        name = m.site.name if names.count(m.site.name) == 1 else m.site.down.weight.rpartition(".")[0] or m.site.down.weight
        taken[name] = taken.get(name, 0) + 1
        name = name if taken[name] == 1 else f"{name}#{taken[name]}"
        unique.append(replace(m, site=replace(m.site, name=name)))
    return tuple(unique)
