"""Running a captured model FFN by FFN over calibration batches, without holding more than one cut of it.

A :class:`Stream` executes the graph up to the input of each FFN, for all batches, and waits for the FFN's output before it
goes on. Two streams over the same graph, one fed with dense outputs and one with the outputs of the converted FFNs, are what
a sequential recipe needs. Nothing behind the last FFN (the head) is computed, but for one node that may be asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .capture import Captured, normalise_inputs
from .errors import InputError
from .match import Match
from .match.nodes import attribute, passes_on
from .precision import multiplying
from .products import replacement
from .schedule import Schedule

_ROWS = 8192  # tokens at a time in :meth:`Stream.added`


class Stream:
    """The captured graph, run in segments between FFNs.

    Args:
        captured: the captured model.
        matches: its FFNs in order.
        batches: model inputs (each as for :func:`moecompile.capture.capture`).
        dtype: what the graph's products are computed in (:func:`.precision.multiplying`).
        last: a node behind the last FFN, for :meth:`behind`.

    Raises:
        InputError: a batch does not fit the graph's inputs.
    """

    def __init__(
        self,
        captured: Captured,
        matches: Sequence[Match],
        batches: Sequence[Any],
        dtype: torch.dtype = torch.float32,
        last: fx.Node | None = None,
    ) -> None:
        self.captured, self.matches, self.dtype, self._last = captured, tuple(matches), dtype, last
        self._schedule = Schedule.of(captured.graph_module.graph, self.matches, last)
        self._device = next((parameter.device for parameter in captured.module.parameters()), torch.device("cpu"))
        self._attributes: dict[fx.Node, Any] = {}
        self._position = 0
        self._inputs = [self._initial(batch) for batch in batches]
        self._states = [self._apart(state) for state in self._inputs]
        self._keep: list[Tensor | None] = [self._token_mask(batch) for batch in batches]

    def _initial(self, batch: Any) -> dict[fx.Node, Any]:
        graph_module = self.captured.graph_module
        args, kwargs = normalise_inputs(self.captured.module, batch)
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        if len(args) != len(self.captured.args) or set(kwargs) != set(self.captured.kwargs):
            names = ", ".join([*(f"positional {i}" for i in range(len(self.captured.args))), *self.captured.kwargs])
            raise InputError(f"a calibration batch does not have the inputs that were captured: {names}")
        flat = pytree.tree_leaves((args, {name: kwargs[name] for name in self.captured.kwargs}))
        if len(flat) != len(placeholders):
            raise InputError(f"a calibration batch has {len(flat)} inputs; the captured model takes {len(placeholders)}")
        own = {node: self._attribute(node).clone() for node in self._schedule.written_attributes}
        return {**dict(zip(placeholders, flat, strict=True)), **own}

    def _apart(self, state: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """The same values, which may be written to; views stay views."""
        return dict(zip(state, copy.deepcopy(list(state.values())), strict=True)) if self._schedule.writes else dict(state)

    @staticmethod
    def _token_mask(batch: Any) -> Tensor | None:
        """Real tokens of a padded batch (B, S); None where there is no padding."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return mask.bool() if isinstance(mask, Tensor) and not bool(mask.all()) else None

    def __iter__(self) -> Iterator[tuple[Match, list[Tensor]]]:
        """Each FFN with its input for every batch; call :meth:`feed` before taking the next one."""
        for number, match in enumerate(self.matches):
            yield match, self.inputs(number)

    @torch.no_grad()
    def inputs(self, number: int) -> list[Tensor]:
        """The input (..., D) of FFN ``number`` for every batch."""
        assert number == self._position, "the FFNs of a stream are visited in order"
        self._advance(number)
        return [state[self.matches[number].x] for state in self._states]

    @torch.no_grad()
    def behind(self) -> Tensor:
        """The values of ``last`` once every FFN was fed, (T, D), padding left out."""
        assert self._last is not None and self._position == len(self.matches), "a node behind the last FFN"
        self._advance(self._position)
        return self.tokens(self._position, [state[self._last] for state in self._states])

    def _advance(self, number: int) -> None:
        """Run the graph up to FFN ``number``, or from the last FFN on."""
        with multiplying(self.dtype, self._device):
            for state in self._states:
                for node in self._schedule.segments[number]:
                    self._run(node, state)
                    for dead in self._schedule.dead_within.get(node, ()):
                        state.pop(dead, None)

    def tokens(self, number: int, values: Sequence[Tensor]) -> Tensor:
        """The values of every batch as one (T, D) tensor, padding left out."""
        return torch.cat([self.rows(index, value) for index, value in enumerate(values)])

    def rows(self, index: int, value: Tensor) -> Tensor:
        """A value (..., D) of batch ``index`` as (T, D), padding left out."""
        mask = self._keep[index]
        if mask is not None and value.shape[:-1] in (mask.shape, mask.flatten().shape):  # OPT's FFNs read (B S, D)
            return value[mask.to(value.device).view(value.shape[:-1])]
        return value.reshape(-1, value.shape[-1])

    def residual(self, number: int) -> Tensor:
        """What the present FFN's output is added to, (T, D) float32, a copy; only where the match has a residual."""
        first, *others = self.matches[number].residual
        assert number == self._position
        found = self.tokens(number, [state[first] for state in self._states]).float().clone()
        for node in others:
            found += self.tokens(number, [state[node] for state in self._states])
        return found

    @torch.no_grad()
    def added(self, number: int, y: Tensor) -> Tensor:
        """What FFN ``number``'s outputs y (T, D) become before they are added to the residual, (T, D) float32."""
        match = self.matches[number]
        read = {source for node in match.between for source in node.all_input_nodes if source.op == "get_attr"}
        parameters = {node: self._attribute(node).float() for node in read}
        leading = [1] * (match.out.meta["val"].dim() - 2)
        parts = []
        for rows in y.split(_ROWS):
            state: dict[fx.Node, Any] = {**parameters, match.out: rows.view(*leading, *rows.shape)}
            for node in match.between:
                if passes_on(node):  # views and casts
                    state[node] = state[node.args[0]]  # type: ignore[index]
                else:
                    self._run(node, state)
            parts.append(state[match.between[-1]].reshape(rows.shape))
        return torch.cat(parts)

    def feed(self, ffn: Callable[[Tensor], Tensor], outputs: Tensor | None = None) -> None:
        """Give the present FFN's output for every batch, and move on.

        Args:
            ffn: computes it, (T, D) -> (T, D).
            outputs: what ``ffn`` would give for :meth:`tokens`, where it is known already; used unless padding was left out.
        """
        match, start = self.matches[self._position], 0
        known = outputs if all(mask is None for mask in self._keep) else None
        for state in self._states:
            x = state[match.x]
            rows = x.reshape(-1, x.shape[-1])
            with torch.no_grad():
                value = ffn(rows) if known is None else known[start : start + len(rows)].to(x.dtype)
                value = value.clone() if self._schedule.writes else value
            state[match.out] = value.reshape(x.shape)
            start += len(rows)
            for node in self._schedule.dead_behind[self._position]:
                state.pop(node, None)
        self._position += 1

    @torch.no_grad()
    def outputs(self, index: int, ffn_output: Tensor) -> list[Tensor]:
        """The model's outputs for batch ``index`` if the present FFN gave this and all behind it stayed dense.

        The stream itself stays where it is.

        Args:
            index: number of the batch.
            ffn_output: what the present FFN puts out, in the shape of its input.

        Returns:
            The tensors among the graph's outputs.
        """
        match = self.matches[self._position]
        values = self._apart({**self._inputs[index], **self._states[index], match.out: ffn_output})
        output = self.captured.graph_module.graph.output_node()
        order = self._schedule.rest(self._position, values)
        computed = set(order)
        last = {source: node for node in order for source in node.all_input_nodes if source in computed}
        kept = set(output.all_input_nodes)
        dead: dict[fx.Node, list[fx.Node]] = {}
        for source, user in last.items():
            if source not in kept:
                dead.setdefault(user, []).append(source)
        with multiplying(self.dtype, self._device):
            for node in order:
                self._run(node, values)
                for source in dead.get(node, ()):
                    del values[source]
        found = [values[node] if node in values else self._attribute(node) for node in output.all_input_nodes]
        return [value for value in found if isinstance(value, Tensor)]

    def _run(self, node: fx.Node, state: dict[fx.Node, Any]) -> None:
        def value(argument: fx.Node) -> Any:
            return state[argument] if argument in state else self._attribute(argument)

        assert node.op == "call_function" and callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        state[node] = replacement(node.target, self.dtype, self._device)(*args, **kwargs)

    def _attribute(self, node: fx.Node) -> Any:
        if node not in self._attributes:
            self._attributes[node] = attribute(self.captured.graph_module, node.target)
        return self._attributes[node]
