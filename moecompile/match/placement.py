"""Where the MoE block goes in the live module: the modules whose every node belongs to the FFN."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from ..sites import Placement
from . import nodes as N


@dataclass(frozen=True)
class Placed:
    """A placement, or why there is none; and the dropout that the replaced module applies behind the FFN."""

    placement: Placement | None
    refusal: str = ""
    output_dropout: float = 0.0


class ModuleMap:
    """For each module path of a graph, the nodes made inside its forward."""

    def __init__(self, graph: fx.Graph) -> None:
        self.inside: dict[str, set[fx.Node]] = defaultdict(set)
        for node in graph.nodes:
            if node.op == "call_function":
                for path in N.module_paths(node):
                    self.inside[path].add(node)

    def tensor_nodes(self, path: str) -> set[fx.Node]:
        """The nodes inside a module that make tensors (size arithmetic and assertions left out)."""
        return {
            node
            for node in self.inside[path]
            if node.target not in N.ASSERTS
            and (N.value_of(node) is not None or isinstance(node.meta.get("val"), (list, tuple)))
        }


def common_module(paths: list[list[str]]) -> str:
    """The innermost module path that all the stacks share, '' for the root."""
    common = ""
    for entries in zip(*paths, strict=False):
        if len(set(entries)) != 1:
            break
        common = entries[0]
    return common


def _outer_inputs(inside: set[fx.Node]) -> set[fx.Node]:
    return {
        source
        for node in inside
        for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr" and N.value_of(source) is not None
    }


def place(modules: ModuleMap, gated: bool, x: set[fx.Node], before: set[fx.Node], down: set[fx.Node], out: fx.Node) -> Placed:
    """Find the placement of one FFN.

    Args:
        modules: the graph's module map.
        gated: whether the FFN is gated; then only a module that is the whole FFN can be replaced.
        x: the FFN's input, with the reshaped forms under which its projections read it.
        before: nodes of the FFN before the down projection.
        down: nodes of the down projection, views around it included.
        out: the node that is the FFN's output.
    """
    stacks = [N.module_paths(node) for node in (*before, *down) if N.as_linear(node)]
    whole = common_module(stacks)
    placed = _whole_module(modules, whole, x, before | down, out) if whole else Placed(None, "the FFN lies in the root module")
    if placed.placement is not None:
        return placed
    if gated:
        return Placed(
            None, f"gate and up projection meet in the forward of '{whole}', which does more than the FFN ({placed.refusal})"
        )
    return _leaves(modules, before, down)


def _whole_module(modules: ModuleMap, path: str, x: set[fx.Node], region: set[fx.Node], out: fx.Node) -> Placed:
    inside = modules.tensor_nodes(path)
    probability, last, tail = 0.0, out, set()
    while True:  # views and an inactive dropout may follow inside the module
        users = [user for user in last.users if user in inside and user.target not in N.ASSERTS]
        if len(users) != 1 or len(last.users) != 1 or not N.passes_on(users[0]):
            break
        last = users[0]
        tail.add(last)
        if last.target in N.DROPOUTS:
            probability = max(probability, N.dropout_probability(last)[0])
    extra = inside - region - tail - x
    if extra:
        return Placed(None, f"node {min(node.name for node in extra)} is no part of it")
    sources = {N.strip(node) for node in _outer_inputs(inside)}
    if sources != {N.strip(node) for node in x}:
        return Placed(None, "it reads more than the FFN's input")
    return Placed(Placement(path), output_dropout=probability)


def _leaves(modules: ModuleMap, before: set[fx.Node], down: set[fx.Node]) -> Placed:
    """Up projection and activation become identities, the down projection's module becomes the block."""
    bypass: set[str] = set()
    for node in sorted(before, key=lambda item: item.name):
        for path in N.module_paths(node):
            if modules.tensor_nodes(path) <= before:
                bypass.add(path)
                break
        else:
            if node.target in N.RESHAPES or not N.passes_on(node):
                owner = (N.module_paths(node) or ["the root module"])[-1]
                return Placed(None, f"node {node.name} is computed in the forward of '{owner}' itself")
    linear = next(node for node in down if N.as_linear(node))
    for path in N.module_paths(linear):
        if modules.tensor_nodes(path) <= down:
            return Placed(Placement(path, tuple(sorted(bypass))))
    owner = (N.module_paths(linear) or ["the root module"])[-1]
    return Placed(None, f"the down projection is computed in the forward of '{owner}' itself")
