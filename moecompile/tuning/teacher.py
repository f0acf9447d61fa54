"""The dense model as the teacher: the top of its distribution, its layers' outputs, and which experts it would choose.

One forward pass without gradients for each batch gives all three. Tensors that the converted model still shares in value
(embeddings, attention) are held once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..apply import moe_blocks
from ..distil import Distillation
from ..errors import InputError
from ..front import decided
from ..plans import MoEPlan, SitePlan
from ..targets import amplitudes, membership, overlaps
from .config import TuneConfig
from .loss import Head, top_log_probabilities
from .parallel import mean
from .student import Inside, attention_parameters, layer_path, norm_parameters, watch_layers


@dataclass
class Targets:
    """What the student is to learn from one batch.

    Attributes:
        ids, logp: (T, k) the teacher's likeliest words and their log-probabilities.
        layers: layer path -> (T, D) output.
        amplitudes: block path -> (T, N) sqrt(sum_{j in e} (h_j - mean_j)^2 |w_j|^2), how much each expert matters.
        front: what a router at the front learns: (T, N), how many of each expert's neurons are among the active half, or
            (T, L, N), how much each matters.
    """

    ids: Tensor
    logp: Tensor
    layers: Mapping[str, Tensor] = field(default_factory=dict)
    amplitudes: Mapping[str, Tensor] = field(default_factory=dict)
    front: Tensor | None = None


def head_of(model: nn.Module, dtype: torch.dtype) -> Head:
    """The head as a matrix of ``dtype``, cast once.

    Raises:
        InputError: the model has none.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Linear):
        raise InputError(f"{type(model).__name__} has no linear head; tuning needs a causal language model of transformers")
    settings = model.config.get_text_config()  # type: ignore[union-attr, operator]
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return Head(head.weight.detach().to(dtype), bias, getattr(settings, "final_logit_softcapping", None))


def hidden_states(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, L, D), what the head reads."""
    with decided(model, inputs):
        outputs = model.base_model(**inputs, use_cache=False)  # type: ignore[operator]
    return outputs.last_hidden_state  # type: ignore[no-any-return]


@torch.no_grad()
def check_head(model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Refuse a model whose logits are more than its head's product with the last hidden states.

    Raises:
        InputError: they are.
    """
    head = head_of(model, next(model.parameters()).dtype)
    short = {name: value[:1, :8] for name, value in inputs.items()}
    expected = model(**short, use_cache=False).logits.float()
    own = head.logits(hidden_states(model, short).flatten(0, 1)).view_as(expected)
    if not bool(expected.isfinite().all()):
        return  # the first step says so
    if not torch.allclose(own, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise InputError(f"the logits of {type(model).__name__} are not its head's product alone; it cannot be tuned")


def share_tensors(student: nn.Module, dense: nn.Module, config: TuneConfig | None = None, tuned: Collection[str] = ()) -> int:
    """Let the dense model's parameters use the student's memory wherever both are equal and ``config`` does not train them.

    The two models then stay tied: a later change of one is seen in the other.

    Args:
        student: the converted model.
        dense: the dense one.
        config: what is going to be trained.
        tuned: the stages that earlier runs have trained: those parameters may differ.

    Returns:
        Bytes that are no longer held twice.

    Raises:
        InputError: most of them differ, so the two do not belong together.
    """
    trained = {id(parameter) for block in moe_blocks(student).values() for parameter in block.parameters()}
    differ: set[int] = set()
    for stage, parameters in (("norms", norm_parameters), ("attention", attention_parameters)):
        if config is not None and stage in config.stages:
            trained |= {id(parameter) for _, parameter in parameters(student)}
        if stage in tuned:
            differ |= {id(parameter) for _, parameter in parameters(student)}
    own = {name: one for name, one in student.named_parameters(remove_duplicate=False) if id(one) not in trained}
    saved, seen, compared, done = 0, set(), {}, set()
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        twin = own.get(name)
        if twin is None or twin.shape != parameter.shape or id(parameter) in done:
            continue
        done.add(id(parameter))
        before = parameter.data_ptr()
        compared[before] = 0 if id(twin) in differ else parameter.numel()
        if twin.data_ptr() != before and not torch.equal(twin.to(parameter), parameter):
            continue
        if before not in seen and twin.data_ptr() != before and twin.dtype == parameter.dtype:
            saved += parameter.numel() * parameter.element_size()
        seen.add(before)
        if twin.dtype == parameter.dtype:
            parameter.data = twin.data
            seen.add(parameter.data_ptr())
            compared.setdefault(parameter.data_ptr(), 0)
    total = sum(compared.values())
    if total and sum(compared[pointer] for pointer in seen) * 2 <= total:
        raise InputError("the dense model is not the one that this model was converted from: most of their weights differ")
    return saved


class Teacher(nn.Module):
    """The dense model, watched.

    Args:
        dense: the dense model.
        plan: how the student was made from it.
        top: how many logits of each position are kept.
        layers: whether the layers' outputs are wanted.
        oracle: whether what the routers are to choose is wanted with each batch.
    """

    def __init__(self, dense: nn.Module, plan: MoEPlan, top: int, layers: bool, oracle: bool) -> None:
        super().__init__()
        self.dense = dense.requires_grad_(False)
        self.top = top
        self._inside = Inside()
        self._amplitudes: dict[str, Tensor] = {}
        self._front: list[Tensor] = []
        self._real: Tensor | None = None  # (T,) bool: what is not padding
        self._measuring = False  # hooks are deaf to what others ask of the dense model
        self._oracle = self._counting = oracle
        self._aligned = plan.pregate is not None and plan.pregate.groups == 1
        self._hooks: list[Any] = []
        paths = [site.site.placement.block for site in plan.sites if site.site.placement is not None]
        if layers:
            self._hooks += watch_layers(dense, list(dict.fromkeys(map(layer_path, paths))), self._inside)
        for site in plan.sites:
            if plan.pregate is not None:
                self._watch_for_front(site)
            elif oracle:
                self._watch_neurons(site)

    def _watch_down(self, site: SitePlan, measure: Callable[[nn.Module, tuple[Tensor, ...]], None]) -> None:
        name = site.site.down.weight.rpartition(".")[0]
        self._hooks.append(self.dense.get_submodule(name).register_forward_pre_hook(measure))

    def _watch_for_front(self, site: SitePlan) -> None:
        """What the router at the front was taught by: overlaps of aligned experts, amplitudes of those of a layer."""
        member = membership(site.choosable, site.site.intermediate_size)

        def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self._counting and self._measuring:
                h = inputs[0].reshape(-1, inputs[0].shape[-1])  # [T, F]
                if self._aligned:
                    self._front.append(overlaps(h, member.to(h.device), Distillation().active))
                else:
                    weight: Tensor = module.weight  # type: ignore[assignment]
                    down = weight.t() if site.site.down.transposed else weight  # [D, F]
                    self._front.append(amplitudes(h, down, member.to(h.device), self._mean(h.float())))

        self._watch_down(site, measure)

    def _watch_neurons(self, site: SitePlan) -> None:
        """Measure the experts' amplitudes where the down projection reads the hidden activations."""
        if site.site.placement is None or site.router == "none":
            return
        path = site.site.placement.block
        owner = torch.full((site.site.intermediate_size,), len(site.experts), dtype=torch.long)
        for number, neurons in enumerate(site.experts):
            owner[list(neurons)] = number

        def measure(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not self._measuring:
                return
            h = inputs[0].reshape(-1, inputs[0].shape[-1]).float()  # [T, F]
            weight: Tensor = module.weight  # type: ignore[assignment]
            size = weight.float().square().sum(1 if site.site.down.transposed else 0)  # [F]
            energy = (h - self._mean(h)).square_().mul_(size)
            sums = h.new_zeros(len(h), len(site.experts) + 1).index_add_(1, owner.to(h.device), energy)
            self._amplitudes[path] = sums[:, :-1].sqrt()

        self._watch_down(site, measure)

    def _mean(self, h: Tensor) -> Tensor:
        """(F,) mean of activations (T, F) over what is not padding, of all processes."""
        rows = h if self._real is None else h[self._real]
        return mean(rows.sum(0)) / mean(h.new_tensor(max(len(rows), 1)))

    @contextmanager
    def _watching(self, inputs: Mapping[str, Tensor]) -> Iterator[None]:
        self._real, self._measuring = real_tokens(inputs), True
        try:
            yield
        finally:
            self._real, self._measuring = None, False

    def close(self) -> None:
        """Leave the dense model as it was."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Tensor], dtype: torch.dtype, positions: slice = slice(None)) -> Targets:
        """The targets of a batch; the distribution only at some of the positions that are not padding."""
        self._amplitudes, self._front = {}, []
        with self._inside.collecting(), self._watching(inputs):
            hidden = hidden_states(self.dense, inputs)
        rows = unpadded(hidden, inputs)[positions]
        ids, logp = top_log_probabilities(rows, head_of(self.dense, dtype), self.top)
        layers = {path: value.flatten(0, -2) for path, value in self._inside.layers.items()}
        self._inside.clear()
        own, self._amplitudes = self._amplitudes, {}
        return Targets(ids, logp, layers, own, self._front_targets())

    @torch.no_grad()
    def front(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The targets of a router at the front alone, without the head."""
        self._front, self._counting = [], True
        with self._watching(inputs):
            hidden_states(self.dense, inputs)
        self._counting = self._oracle
        found = self._front_targets()
        assert found is not None
        return found

    def _front_targets(self) -> Tensor | None:
        parts, self._front = self._front, []
        if not parts:
            return None
        return torch.stack(parts).sum(0) if self._aligned else torch.stack(parts, dim=1)


def real_tokens(inputs: Mapping[str, Any]) -> Tensor | None:
    """(T,) bool, the tokens of a batch that are not padding; None where there is none."""
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool().flatten()


def unpadded(hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """(B, L, D) -> (T, D) without padding."""
    real = real_tokens(inputs)
    return hidden.flatten(0, -2) if real is None else hidden.flatten(0, -2)[real]
