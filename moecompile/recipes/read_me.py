"""Read-ME: experts behind one pre-gating router that decides for all layers before the first one runs (arXiv 2410.19123).

``aligned`` (the paper): one expert per domain of text, overlapping, and the same expert in every layer. ``disjoint``: the finer
experts of `calibrated`, and a decision for each layer. In both, the router is distilled from the neurons that the dense model
activates (distil.py), and the down projections are refitted for what the router then chooses (`none` is the paper's).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..apply import build_block
from ..distil import Distillation, distil
from ..errors import InputError, MatchError, PlanError
from ..plans import BIAS, DOWN, MEANS, MoEPlan, SitePlan
from ..pregate import PreGateSpec, PreGatingRouter
from ..reading import TokenInput, embedder, ids_and_mask, token_input
from ..sites import DenseFFN
from ..stream import Stream
from ..targets import collect_targets, membership
from .base import Context, Recipe, check_counts, check_fraction, planner
from .calibrated import masked_outputs
from .domains import RANKINGS, domain_experts, survey_domains
from .drift import repaired
from .neurons import token_weights
from .refit import Mask, idle_means, in_chunks, refit_down
from .survey import BUDGETS, split_neurons

_DISJOINT = (48, 16, 16)
_DRIFT = 0.6  # as of `calibrated`


@dataclass(frozen=True)
class ReadMe(Recipe):
    """Settings of the recipe.

    Attributes:
        active_fraction: aligned: share of a layer's neurons that work for a domain, the shared ones included.
        disjoint: finer experts that do not overlap, and a decision for each layer.
        experts, shared, top_k: disjoint: N, S and K, equal slices of the dense width (default 48, 16, 16).
        ranking: aligned: which neurons are a domain's, by ``variance``, ``output`` or ``activation`` (the paper's;
            :func:`.domains.survey_domains`).
        budget: aligned: ``effect`` gives each layer its own number of working neurons, ``active_fraction`` on average, by what
            idle ones do to the model's output; ``even`` (the paper's) gives all the same.
        compensation: ``none`` (the paper's), ``means``, or ``refit``, for what idle neurons gave.
        sinks: aligned: neurons that attention sinks need belong to every domain.
        router_width, router_heads, router_mlp: the router's sizes.
        own_table: the router has an embedding table of its own (the paper's) and does not read the model's.
        router_target: what the router learns, ``overlap`` (the paper's) or, disjoint, ``amplitude`` (:mod:`moecompile.distil`);
            by default overlap for aligned ids, amplitude for a decision per layer.
        distillation: how the router is trained; its target and number of experts are the recipe's.
    """

    active_fraction: float | None = None
    disjoint: bool = False
    experts: int | None = None
    shared: int | None = None
    top_k: int | None = None
    ranking: str = "variance"
    budget: str = "effect"
    compensation: str = "refit"
    sinks: bool = True
    router_width: int = 512
    router_heads: int = 4
    router_mlp: int = 512
    own_table: bool = False
    router_target: str | None = None
    distillation: Distillation = field(default_factory=Distillation)

    @property
    def name(self) -> str:
        """``read-me``."""
        return "read-me"

    @property
    def counts(self) -> tuple[int, int, int]:
        """N, S, K of the disjoint variant."""
        given = (self.experts, self.shared, self.top_k)
        experts, shared, top_k = (own if value is None else value for value, own in zip(given, _DISJOINT, strict=True))
        return experts, shared, top_k

    @property
    def training(self) -> Distillation:
        """How the router is trained, with what it is to learn."""
        target = self.router_target or ("amplitude" if self.disjoint else "overlap")
        return replace(self.distillation, target=target, top_k=self.counts[2] if self.disjoint else 1)

    @property
    def fraction(self) -> float:
        """Active fraction of the aligned variant."""
        return 0.5 if self.active_fraction is None else self.active_fraction

    def check(self) -> None:
        """Refuse settings that make no sense."""
        if self.disjoint:
            if self.active_fraction is not None:
                raise PlanError("the disjoint variant takes --experts, --shared and --top-k, not --active-fraction")
            check_counts(*self.counts)
            if not 0 < self.counts[2] < self.counts[0]:
                raise PlanError(f"--top-k is {self.counts[2]}; a router must choose 1 to {self.counts[0] - 1} of the experts")
        else:
            if (self.experts, self.shared, self.top_k) != (None, None, None):
                raise PlanError(
                    "read-me makes one expert per --calibration file and chooses one: take --active-fraction, or --disjoint "
                    "with --experts, --shared and --top-k"
                )
            check_fraction(self.fraction)
        if self.ranking not in RANKINGS:
            raise PlanError(f"there is no ranking '{self.ranking}'; there are: {', '.join(RANKINGS)}")
        if self.budget not in BUDGETS:
            raise PlanError(f"there is no budget '{self.budget}'; there are: {', '.join(BUDGETS)}")
        if self.compensation not in ("none", "means", "refit"):
            raise PlanError(f"there is no compensation '{self.compensation}'; there are: none, means, refit")
        PreGateSpec(2, 1, width=self.router_width, heads=self.router_heads, mlp_width=self.router_mlp)
        self.training.check()
        if not self.disjoint and self.training.target == "amplitude":
            raise PlanError(
                "--router-target amplitude is for --disjoint: aligned experts are chosen by what layers have in common"
            )


@planner(ReadMe)
def plan_read_me(recipe: ReadMe, context: Context) -> MoEPlan:
    """Split every FFN on the dense model, distil the router, then compensate in order on the converted prefix."""
    reads = token_input(context.captured)
    if isinstance(reads, str):
        raise MatchError(f"read-me has a router that reads token ids before the first layer: {reads}")
    sites = _disjoint_sites(recipe, context) if recipe.disjoint else _aligned_sites(recipe, context)
    members = [membership(s.choosable, s.site.intermediate_size) for s in sites]
    router, learnt = _router(recipe, context, members, reads)
    tensors: dict[str, Tensor] = {}
    if recipe.compensation != "none":
        sites, tensors = _compensated(recipe, context, sites, members, router)
    config = {**recipe.settings(), "domains": list(context.domains), "router_training": learnt}
    plan = MoEPlan(recipe.name, config, tuple(sites), tensors)
    return plan.with_front(router.spec, {name: value.detach().cpu() for name, value in router.state_dict().items()})


def _aligned_sites(recipe: ReadMe, context: Context) -> list[SitePlan]:
    if len(context.domains) < 2:
        raise InputError(
            "read-me makes one expert per domain of text: give two or more files with --calibration "
            "(calibration={'name': batches, ...})"
        )
    found = survey_domains(context, recipe.ranking, recipe.fraction, recipe.sinks, recipe.budget)
    sites = []
    for match, one in zip(context.matches, found, strict=True):
        shared, experts, spare = domain_experts(one.strength, one.active, one.always)
        metrics = {"shared_neurons": len(shared), "private_neurons": len(experts[0]), **one.metrics}
        sites.append(
            SitePlan(
                match.site, tuple(shared), tuple(tuple(e) for e in experts), 1, metrics=metrics, router="pregate",
                overlap=True, spare=spare,
            )
        )  # fmt: skip
    return sites


@torch.no_grad()
def _disjoint_sites(recipe: ReadMe, context: Context) -> list[SitePlan]:
    """Shared neurons and clusters as of `calibrated`, on the dense stream."""
    experts, shared, top_k = recipe.counts
    stream = Stream(context.captured, context.matches, context.batches)
    generator = torch.Generator().manual_seed(context.seed)
    sites = []
    for number, (match, inputs) in enumerate(context.progress.over(stream, "grouping neurons", len(context.matches))):
        ffn = DenseFFN.read(match.site, context.captured.module)
        x = stream.tokens(number, inputs)
        hidden = ffn.hidden(x)
        y = ffn.output(hidden)
        split = split_neurons(ffn, x, hidden, y, experts, shared, top_k, generator)
        groups = tuple(tuple(group) for group in split.experts)
        sites.append(SitePlan(match.site, tuple(split.shared.tolist()), groups, top_k, router="pregate"))
        stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), y)  # type: ignore[misc]
    return sites


def _router(
    recipe: ReadMe, context: Context, members: list[Tensor], reads: TokenInput
) -> tuple[PreGatingRouter, dict[str, Any]]:
    """A distilled router, and what was measured on windows that it did not see."""
    model = context.captured.module
    table = model.get_parameter(reads.embedding)
    own = isinstance(model, PreTrainedModel)
    spec = PreGateSpec(
        experts=members[0].shape[1],
        input_width=int(table.shape[1]),
        groups=len(members) if recipe.disjoint else 1,
        vocabulary=int(table.shape[0]) if recipe.own_table else 0,
        width=recipe.router_width,
        heads=recipe.router_heads,
        mlp_width=recipe.router_mlp,
        argument="" if own else reads.argument,
        embedding="" if own else reads.embedding,
    )
    targets = collect_targets(
        context.captured, context.matches, context.batches, members, aligned=not recipe.disjoint,
        active=recipe.training.active, target=recipe.training.target, argument=reads.argument, progress=context.progress,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(context.seed)
        router = PreGatingRouter(spec).to(table.device)
        learnt = distil(
            router,
            embedder(model, spec),
            targets,
            recipe.training,
            seed=context.seed,
            progress=context.progress,
        )
    if "agreement" in learnt:
        context.progress.say(
            f"router: {learnt['agreement']:.1%} of held-out choices are the dense model's own "
            f"(a constant choice: {learnt['constant_agreement']:.1%})"
            + (
                f"; {learnt['energy']:.1%} of the energy, the best choice {learnt['oracle_energy']:.1%}"
                if "energy" in learnt
                else ""
            )
        )
    return router.eval(), learnt


@torch.no_grad()
def _choices(recipe: ReadMe, context: Context, router: PreGatingRouter, top_k: int) -> Tensor:
    """(T, K) or (T, L, K): what the router chooses on the calibration tokens, in order."""
    model = context.captured.module
    embed = embedder(model, router.spec)
    parts = [router(embed(ids_and_mask(model, batch, router.spec.argument)[0])) for batch in context.batches]
    return torch.cat(parts).topk(top_k, dim=-1).indices


@torch.no_grad()
def _compensated(
    recipe: ReadMe, context: Context, sites: list[SitePlan], members: list[Tensor], router: PreGatingRouter
) -> tuple[list[SitePlan], dict[str, Tensor]]:
    """Idle means, and a down projection refitted against the dense stream, layer by layer on the converted prefix."""
    chosen = _choices(recipe, context, router, sites[0].top_k)
    dense_stream, moe_stream = (Stream(context.captured, context.matches, context.batches) for _ in range(2))
    planned: list[SitePlan] = []
    tensors: dict[str, Tensor] = {}
    for number, match in enumerate(context.progress.over(context.matches, "compensating")):
        site, ffn = sites[number], DenseFFN.read(match.site, context.captured.module)
        x_dense = dense_stream.tokens(number, dense_stream.inputs(number)).float()
        x = moe_stream.tokens(number, moe_stream.inputs(number)).float()
        y = in_chunks(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), x_dense, match.site.hidden_size, ffn.up.dtype)  # type: ignore[misc]
        hidden = in_chunks(ffn.hidden, x, match.site.intermediate_size, ffn.up.dtype)
        target = repaired(dense_stream, moe_stream, number, y, _DRIFT)
        ids = chosen[:, number] if recipe.disjoint else chosen
        mask = _mask(ids, members[number].to(x.device), torch.tensor(site.shared, dtype=torch.long, device=x.device))
        weights = token_weights(torch.maximum(y.norm(dim=1), target.norm(dim=1)))
        down, bias = ffn.down.float(), None if ffn.down_bias is None else ffn.down_bias.float()
        fitted = {MEANS: idle_means(hidden, mask, weights)}
        if recipe.compensation == "refit":
            fitted[DOWN], fitted[BIAS] = refit_down(hidden, mask, fitted[MEANS], down, bias, target, weights)
        own, error = masked_outputs(hidden, mask, {DOWN: down, BIAS: torch.zeros_like(y[0]), **fitted}, bias, y, weights)
        metrics = {**site.metrics, "calibration_error": round(error, 6)}
        planned.append(replace(site, fitted=tuple(fitted), metrics=metrics))
        tensors.update({f"{match.site.name}/{name}": value.cpu() for name, value in fitted.items()})
        dense_stream.feed(lambda rows, ffn=ffn: ffn.output(ffn.hidden(rows)), y)  # type: ignore[misc]
        moe_stream.feed(build_block(planned[-1], fitted, ffn).eval(), own)
    return planned, tensors


def _mask(ids: Tensor, member: Tensor, shared: Tensor) -> Mask:
    """From (T, K) chosen experts and (F, N) membership to (tokens, F) float masks of active neurons, a chunk at a time."""
    always = torch.zeros(member.shape[0], device=member.device)
    always[shared] = 1.0

    def mask(start: int, stop: int) -> Tensor:
        on = torch.zeros(stop - start, member.shape[1], device=member.device).scatter_(1, ids[start:stop], 1.0)
        return (on @ member.t() + always).clamp_max(1.0)

    return mask
