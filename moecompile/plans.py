"""The plan: how each FFN becomes an MoE, as readable data that can be saved, inspected and applied again.

The structure (which neurons are shared, which expert each other one belongs to, how many are chosen, which router, which
compensation) is JSON. The numbers that a recipe fitted (router weights, idle means, a refitted down projection) are tensors
beside it; they are written in *neuron* order, so that they do not depend on how a block stores its experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .activations import Activation
from .block import BlockSpec
from .errors import PlanError
from .files import read_json, write_bytes, write_tensors
from .pregate import KIND, PreGateSpec
from .routers import ROUTERS
from .sites import FFNSite

FORMAT = 1
# The fitted tensors of a site, and their shapes by letter (F dense width, D hidden, N experts):
#   means (F,)      mean of each neuron over the tokens on which it is idle; 0 for shared ones
#   down (D, F)     the refitted down projection
#   bias (D,)       a constant to add to the output besides
#   router.*        parameters of the router, under its own names
# Those of the router at the front stand under pregate/*, that of the final norm under <parameter>/gain.
MEANS, DOWN, BIAS, ROUTER, GAIN = "means", "down", "bias", "router.", "gain"
NORM_FIT = "norm_fit"  # in a plan's config: what fitting the final norm gained, or why it is the dense model's


@dataclass(frozen=True)
class SitePlan:
    """How one FFN is split.

    Attributes:
        site: the FFN.
        shared: neurons that are always on.
        experts: the neurons of each routed expert.
        top_k: experts chosen per token.
        router: a kind of :data:`moecompile.routers.ROUTERS`, ``pregate``, or ``none``.
        fitted: names of the fitted tensors that belong to it, which say what compensation there is.
        keep_exact: keep the dense down projection beside a refitted one.
        metrics: what was measured while planning (``relative_error``, ``usage``, ...), for reports.
        overlap: a neuron may stand in several experts (never twice in one); then top_k is 0, 1 or all.
        spare: how many experts, the last ones, are never chosen: they hold the neurons that are in no other.
        router_rank: R of a ``spectral`` router.
    """

    site: FFNSite
    shared: tuple[int, ...]
    experts: tuple[tuple[int, ...], ...]
    top_k: int
    router: str = "none"
    fitted: tuple[str, ...] = ()
    keep_exact: bool = False
    metrics: Mapping[str, Any] = field(default_factory=dict)
    overlap: bool = False
    spare: int = 0
    router_rank: int = 0

    def validate(self) -> None:
        """Check that every neuron has exactly one place and that the numbers make sense.

        Raises:
            PlanError: with what is wrong.
        """
        width, name = self.site.intermediate_size, self.site.name
        routed = [neuron for expert in self.experts for neuron in expert]
        if self.overlap:
            if any(len(set(expert)) < len(expert) for expert in self.experts):
                raise PlanError(f"site {name}: a neuron stands twice in one expert")
            routed = list(dict.fromkeys(routed))
        placed = [*self.shared, *routed]
        if sorted(placed) != list(range(width)):
            lost = sorted(set(range(width)) - set(placed))
            why = f"neuron {lost[0]} has no place" if lost else "a neuron has two places or does not exist"
            raise PlanError(f"site {name}: the plan does not place each of {width} neurons once: {why}")
        if any(not expert for expert in self.experts):
            raise PlanError(f"site {name}: an expert has no neurons")
        if not 0 <= self.top_k <= len(self.experts):
            raise PlanError(f"site {name}: top_k is {self.top_k} and there are {len(self.experts)} experts")
        if not 0 <= self.spare <= len(self.experts):
            raise PlanError(f"site {name}: {self.spare} of {len(self.experts)} experts are to be spare")
        if self.router not in ("none", KIND, *ROUTERS):
            raise PlanError(f"site {name}: there is no router '{self.router}'; there are: none, {KIND}, {', '.join(ROUTERS)}")
        if self.router == "spectral" and not (self.router_rank > 0 and self.site.gated):
            raise PlanError(f"site {name}: a spectral router needs a rank of at least 1 and a gated FFN")
        if 0 < self.top_k < len(self.experts) and self.top_k > (1 if self.overlap else len(self.experts) - self.spare):
            raise PlanError(f"site {name}: top_k {self.top_k} cannot be had: experts overlap, or are spare")
        if self.router == "none" and 0 < self.top_k < len(self.experts):
            raise PlanError(
                f"site {name}: {self.top_k} of {len(self.experts)} experts are to be chosen, but there is no router"
            )

    @property
    def expert_width(self) -> int:
        """I: the neurons of the largest expert; smaller ones are padded with zero weights."""
        return max((len(expert) for expert in self.experts), default=0)

    @property
    def choosable(self) -> tuple[tuple[int, ...], ...]:
        """The experts that a router chooses among: all but the spare ones."""
        return self.experts[: len(self.experts) - self.spare]

    @property
    def active_neurons(self) -> float:
        """Neurons computed per token."""
        return self.active_at(self.top_k)

    def active_at(self, top_k: int) -> float:
        """Neurons computed per token with so many experts of mean size and the shared ones; each once where all are on."""
        if top_k == len(self.experts):
            return float(self.site.intermediate_size)
        chosen = self.choosable
        return len(self.shared) + (sum(map(len, chosen)) * top_k / len(chosen) if chosen else 0.0)

    def block_spec(self) -> BlockSpec:
        """The shape of this site's block."""
        site = self.site
        expert_bias = MEANS in self.fitted
        return BlockSpec(
            hidden_size=site.hidden_size,
            dense_width=site.intermediate_size,
            shared_width=len(self.shared),
            experts=len(self.experts),
            expert_width=self.expert_width,
            top_k=self.top_k,
            gated=site.gated,
            activation=site.activation,
            input_bias=site.up.bias is not None or (site.gate is not None and site.gate.bias is not None),
            bias=site.down.bias is not None or expert_bias or BIAS in self.fitted,
            expert_bias=expert_bias and bool(self.experts),
            router=self.router,
            keep_exact=self.keep_exact,
            dropout=site.output_dropout,
            overlap=self.overlap,
            spare=self.spare,
            router_rank=self.router_rank,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "site": self.site.to_dict(),
            "shared": list(self.shared),
            "experts": [list(expert) for expert in self.experts],
            "top_k": self.top_k,
            "router": self.router,
            "fitted": list(self.fitted),
            "keep_exact": self.keep_exact,
            "metrics": dict(self.metrics),
            **({"overlap": True} if self.overlap else {}),
            **({"spare": self.spare} if self.spare else {}),
            **({"router_rank": self.router_rank} if self.router_rank else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SitePlan:
        """The site's plan from :meth:`to_dict`, validated.

        Raises:
            PlanError: it is not readable, or contradicts itself.
        """
        try:
            plan = cls(
                site=FFNSite.from_dict(data["site"]),
                shared=tuple(int(n) for n in data["shared"]),
                experts=tuple(tuple(int(n) for n in expert) for expert in data["experts"]),
                top_k=int(data["top_k"]),
                router=str(data["router"]),
                fitted=tuple(str(name) for name in data.get("fitted", ())),
                keep_exact=bool(data.get("keep_exact", False)),
                metrics=dict(data.get("metrics", {})),
                overlap=bool(data.get("overlap", False)),
                spare=int(data.get("spare", 0)),
                router_rank=int(data.get("router_rank", 0)),
            )
            Activation(plan.site.activation)  # refuses a text that is none
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the plan is not readable ({type(error).__name__}: {error})") from error
        plan.validate()
        return plan


@dataclass(frozen=True)
class MoEPlan:
    """How a model becomes an MoE.

    Attributes:
        recipe: the recipe's name.
        config: the recipe's settings, for the record.
        sites: a plan per FFN, in the order of execution.
        tensors: fitted numbers, named ``<site name>/<tensor>``; those of the router at the front ``pregate/<parameter>``.
        pregate: the router at the front, where sites read their decision from it.
        final_norm: the parameter of the norm before the head where it was fitted anew; the dense model's own where empty.
    """

    recipe: str
    config: Mapping[str, Any]
    sites: tuple[SitePlan, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    pregate: PreGateSpec | None = None
    final_norm: str = ""

    def site_tensors(self, name: str) -> dict[str, Tensor]:
        """The fitted tensors of one site, by bare name."""
        prefix = f"{name}/"
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    @property
    def top_k(self) -> int:
        """Experts chosen per token: the layers' mean, rounded, where a recipe gave each layer its own number."""
        return round(sum(s.top_k for s in self.sites) / len(self.sites)) if self.sites else 0

    @property
    def active_fraction(self) -> float:
        """FFN neurons computed per token over all FFN neurons, weighted by their size (D)."""
        total = sum(s.site.intermediate_size * s.site.hidden_size for s in self.sites)
        return sum(s.active_neurons * s.site.hidden_size for s in self.sites) / total if total else 1.0

    @property
    def router(self) -> str:
        """``layerwise`` when any site chooses experts by a router of its own, ``pregate`` when the one at the front does,
        else ``none``."""
        if self.pregate is not None:
            return KIND
        return "layerwise" if any(s.router != "none" for s in self.sites) else "none"

    @property
    def exact(self) -> bool:
        """Whether all experts on is the dense model: no norm was refitted, no projection without the dense one beside it."""
        return not self.final_norm and all(site.keep_exact or DOWN not in site.fitted for site in self.sites)

    def with_exact(self, keep: bool) -> MoEPlan:
        """The plan with the dense down projection kept beside wherever the recipe changed it, and the dense final norm."""
        if not keep:
            return self
        sites = tuple(replace(s, keep_exact=s.keep_exact or bool(s.fitted)) for s in self.sites)
        plan = replace(self, sites=sites)
        return plan.with_dense_norm("all experts on is to be the dense model") if self.final_norm else plan

    def with_final_norm(self, name: str, values: Tensor, metrics: Mapping[str, float]) -> MoEPlan:
        """The plan with new values (D,) for the parameter ``name`` of the norm before the head, and what they gained."""
        config = {**self.config, NORM_FIT: {"parameter": name, **metrics}}
        return replace(self, config=config, tensors={**self.tensors, f"{name}/{GAIN}": values}, final_norm=name)

    def with_dense_norm(self, reason: str) -> MoEPlan:
        """The plan without such values, and why."""
        kept = {key: value for key, value in self.tensors.items() if key != f"{self.final_norm}/{GAIN}"}
        return replace(self, config={**self.config, NORM_FIT: {"dense": reason}}, tensors=kept, final_norm="")

    def with_front(self, spec: PreGateSpec, tensors: Mapping[str, Tensor]) -> MoEPlan:
        """The same split, every site reading its decision from a router at the front instead of its own.

        Args:
            spec: the router's shape.
            tensors: its parameters by bare name; empty for one that is not trained yet.
        """
        sites = tuple(
            replace(s, router=KIND, fitted=tuple(name for name in s.fitted if not name.startswith(ROUTER))) for s in self.sites
        )
        kept = {key: value for key, value in self.tensors.items() if not _of_router(key)}
        kept.update({f"{KIND}/{name}": value for name, value in tensors.items()})
        return replace(self, sites=sites, tensors=kept, pregate=spec)

    def router_only(self) -> MoEPlan:
        """The same split and routing without compensation."""
        sites = tuple(
            replace(s, fitted=tuple(name for name in s.fitted if name.startswith(ROUTER)), keep_exact=False) for s in self.sites
        )
        tensors = {key: value for key, value in self.tensors.items() if _of_router(key)}
        return replace(self, sites=sites, tensors=tensors, final_norm="")

    def without_tensors(self) -> MoEPlan:
        """The structure alone, as it is kept with a model whose weights already hold the fitted numbers."""
        return replace(self, tensors={})

    def split_only(self) -> MoEPlan:
        """The same split without any compensation or router numbers: with all experts on it must equal the dense model."""
        sites = tuple(replace(s, fitted=(), keep_exact=False) for s in self.sites)
        return replace(self, sites=sites, tensors={}, final_norm="")

    def validate(self) -> None:
        """Check every site, and the fitted tensors' shapes.

        Raises:
            PlanError: with what is wrong.
        """
        if not self.sites:
            raise PlanError("the plan has no sites")
        self._check_pregate()
        for plan in self.sites:
            plan.validate()
            width, hidden = plan.site.intermediate_size, plan.site.hidden_size
            shapes = {MEANS: (width,), DOWN: (hidden, width), BIAS: (hidden,)}
            tensors = self.site_tensors(plan.site.name)
            if set(plan.fitted) != set(tensors):
                name = min(set(plan.fitted) ^ set(tensors))
                raise PlanError(f"site {plan.site.name}: the fitted tensor '{name}' is named or given, but not both")
            for name, tensor in tensors.items():
                if name in shapes and tuple(tensor.shape) != shapes[name]:
                    raise PlanError(f"site {plan.site.name}: '{name}' is {tuple(tensor.shape)}, not {shapes[name]}")
                if not torch.isfinite(tensor).all():
                    raise PlanError(f"site {plan.site.name}: '{name}' holds NaN or infinity")
        if self.final_norm:
            gain = self.tensors.get(f"{self.final_norm}/{GAIN}")
            if gain is None:
                raise PlanError(f"the plan fits {self.final_norm} anew, and its values are not there")
            if gain.dim() != 1 or not torch.isfinite(gain).all():
                raise PlanError(f"the values of {self.final_norm} are not finite numbers, one for each feature")

    def _check_pregate(self) -> None:
        readers = [plan for plan in self.sites if plan.router == KIND]
        if self.pregate is None:
            if readers:
                raise PlanError(f"site {readers[0].site.name} reads a router at the front, and the plan has none")
            return
        if len(readers) != len(self.sites):
            raise PlanError("the plan has a router at the front, but not all sites read it")
        if self.pregate.groups not in (1, len(self.sites)):
            raise PlanError(f"the router at the front decides for {self.pregate.groups} layers; the plan has {len(self.sites)}")
        for plan in readers:
            if len(plan.choosable) != self.pregate.experts:
                raise PlanError(
                    f"site {plan.site.name}: {len(plan.choosable)} experts can be chosen, and the router at the "
                    f"front scores {self.pregate.experts}"
                )
        for name, tensor in self.site_tensors(KIND).items():
            if not torch.isfinite(tensor).all():
                raise PlanError(f"the router at the front: '{name}' holds NaN or infinity")

    def to_dict(self) -> dict[str, Any]:
        """The structure as JSON-ready data, without the fitted numbers."""
        return {
            "format": FORMAT,
            "recipe": self.recipe,
            "config": dict(self.config),
            **({"pregate": self.pregate.to_dict()} if self.pregate is not None else {}),
            **({"final_norm": self.final_norm} if self.final_norm else {}),
            "sites": [plan.to_dict() for plan in self.sites],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> MoEPlan:
        """The plan from :meth:`to_dict`.

        Raises:
            PlanError: another format or an unreadable record.
        """
        if data.get("format") != FORMAT:
            raise PlanError(f"the plan's format is {data.get('format')!r}; this version reads format {FORMAT}")
        try:
            sites = tuple(SitePlan.from_dict(item) for item in data["sites"])
            if not sites:
                raise PlanError("the plan has no sites")
            front = data.get("pregate")
            pregate = None if front is None else PreGateSpec.from_dict(front)
            norm = str(data.get("final_norm", ""))
            plan = cls(str(data["recipe"]), dict(data["config"]), sites, dict(tensors or {}), pregate, norm)
            plan._check_pregate()
            return plan
        except (KeyError, TypeError) as error:
            raise PlanError(f"the plan is not readable ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> None:
        """Write ``path`` (JSON) and, when there are fitted tensors, ``path`` with the suffix ``.safetensors`` beside it."""
        path = Path(path)
        if self.tensors:
            write_tensors(path.with_suffix(".safetensors"), dict(self.tensors))
        write_bytes(path, (dump_plan(self.to_dict()) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> MoEPlan:
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: it is not a plan, or its tensors are missing.
            InputError: the file is not there or is not JSON.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        plan = cls.from_dict(read_json(path))
        if plan.pregate is not None or plan.final_norm or any(site.fitted for site in plan.sites):
            beside = path.with_suffix(".safetensors")
            try:
                plan = replace(plan, tensors=load_file(beside))
            except (OSError, SafetensorError) as error:
                raise PlanError(f"the plan's tensors, {beside}, cannot be read: {error}") from error
        plan.validate()
        return plan


def _of_router(key: str) -> bool:
    return key.startswith(f"{KIND}/") or key.rpartition("/")[2].startswith(ROUTER)


def dump_plan(data: Any, indent: str = "") -> str:
    """JSON with each list of plain values on one line, so that a plan can be read and compared line by line."""
    inner = indent + " "
    if isinstance(data, Mapping) and data:
        items = [f"{inner}{json.dumps(str(key))}: {dump_plan(value, inner)}" for key, value in data.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(data, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in data):
        return "[\n" + ",\n".join(inner + dump_plan(item, inner) for item in data) + f"\n{indent}]"
    return json.dumps(data)
