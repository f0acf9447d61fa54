"""In which order a :class:`.stream.Stream` runs a captured graph between its FFNs, and when it lets go of values."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import fx

from .match import Match
from .passes.nodes import overwritten, shared_base


@dataclass(frozen=True)
class Schedule:
    """What to run before each FFN.

    A graph that writes nowhere is run by need: a node runs in the segment that first reads it. Where operators write in place
    (``x += ffn(x)``; ``keys[..., :n] = a``, whose result nobody reads), values depend on the order, and every node that the
    outputs need, writes to their memory included, runs where it stands in the graph.

    Attributes:
        segments: the nodes to run before each FFN, in order, and behind the last one those before ``last``.
        dead_within: for a node the values that nobody needs once it has run.
        dead_behind: for an FFN the values that nobody needs behind it.
        writes: whether some operator writes in place.
        written_attributes: ``get_attr`` nodes whose tensors are written to: every run needs its own.
    """

    graph: fx.Graph
    matches: tuple[Match, ...]
    segments: list[list[fx.Node]]
    dead_within: dict[fx.Node, list[fx.Node]]
    dead_behind: list[list[fx.Node]]
    writes: bool
    written_attributes: tuple[fx.Node, ...]

    @classmethod
    def of(cls, graph: fx.Graph, matches: tuple[Match, ...], last: fx.Node | None) -> Schedule:
        """The schedule of a graph cut at its FFNs.

        Args:
            graph: the captured graph.
            matches: its FFNs in order.
            last: a node behind the last FFN that is wanted too.
        """
        order = {node: index for index, node in enumerate(graph.nodes)}
        reads = [[match.x, *match.residual] for match in matches]
        outputs = [match.out for match in matches]
        touched = [shared_base(each, outputs) for node in graph.nodes for each in overwritten(node)]
        goals = [*reads, *([[last]] if last is not None else [])]
        segments: list[list[fx.Node]] = []
        done: set[fx.Node] = set()
        if touched:
            wanted = [*graph.output_node().all_input_nodes, *(node for goal in goals for node in goal)]
            alive = sorted(_needed(graph, wanted, outputs, outputs), key=order.__getitem__)
            for number, goal in enumerate(goals):
                end = max([order[match.out] for match in matches[number : number + 1]] + [order[node] + 1 for node in goal])
                waiting = set(outputs[number:])  # for outputs that are not there yet
                segment: list[fx.Node] = []
                for node in (node for node in alive if order[node] < end and node not in done):
                    (segment.append if waiting.isdisjoint(node.all_input_nodes) else waiting.add)(node)
                segments.append(segment)
                done.update(segment)
            readers: Iterable[fx.Node] = [*alive, graph.output_node()]
        else:
            for goal in goals:
                needed = _needed(graph, goal, done | set(outputs))
                segments.append(sorted(needed, key=order.__getitem__))
                done |= needed
            readers = [node for segment in segments for node in segment]
        last_user: dict[fx.Node, fx.Node] = {}
        for node in readers:
            last_user[node] = node
            for source in node.all_input_nodes:
                if source.op != "get_attr":
                    last_user[source] = node
        place = {node: number for number, segment in enumerate(segments) for node in segment}
        read_last = {read: number for number, read_by in enumerate(reads) for read in read_by}  # by which FFN
        behind: list[list[fx.Node]] = [[] for _ in matches]
        for read, number in read_last.items():  # an FFN's reads outlive its segment
            if read not in last_user or place.get(last_user[read], len(segments)) <= number:
                behind[number].append(read)
        late = {node for values in behind for node in values}
        within: dict[fx.Node, list[fx.Node]] = {}
        for node, user in last_user.items():
            if node is not last and node not in late:
                within.setdefault(user, []).append(node)
        attributes = tuple(dict.fromkeys(node for node in touched if isinstance(node, fx.Node) and node.op == "get_attr"))
        return cls(graph, matches, segments, within, behind, bool(touched), attributes)

    def rest(self, position: int, values: Collection[fx.Node]) -> list[fx.Node]:
        """What is left to run, in order, for the graph's outputs behind FFN ``position``, with the FFNs behind it dense; those
        before it, too, whose values were let go (an encoder's, for the last FFN of a decoder).

        Args:
            position: the FFN whose output is known.
            values: the nodes whose values are known.
        """
        known, outputs = set(values), [match.out for match in self.matches]
        if self.writes:  # what has run must not run again, its value kept or not
            known.update(outputs[: position + 1], *self.segments[: position + 1])
        wanted = self.graph.output_node().all_input_nodes
        needed = _needed(self.graph, wanted, known, outputs if self.writes else None)
        return [node for node in self.graph.nodes if node in needed]


def _needed(
    graph: fx.Graph, wanted: Iterable[fx.Node], known: Collection[fx.Node], own: Collection[fx.Node] | None = None
) -> set[fx.Node]:
    """The operators that compute some nodes from known ones.

    Args:
        graph: the graph.
        wanted: what is to be computed.
        known: nodes whose values are there.
        own: where operators write in place: nodes with memory of their own. What writes to memory that is read is needed too.
    """
    writing = [] if own is None else [(node, {shared_base(each, own) for each in overwritten(node)}) for node in graph.nodes]
    found, bases, pending = set[fx.Node](), set[fx.Node](), list(wanted)
    while pending:
        while pending:
            node = pending.pop()
            bases.add(node if own is None else shared_base(node, own))
            if node not in found and node not in known and node.op == "call_function":
                found.add(node)
                pending += node.all_input_nodes
        pending = [node for node, touched in writing if node not in found and node not in known and touched & bases]
    return found
