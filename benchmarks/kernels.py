"""The generated Triton kernels beside their peers and beside the floor, on one GPU; stages that can be repeated apart.

    python benchmarks/kernels.py [--stage limits correctness forward backward report] [--shapes Qwen3-30B-A3B ...]
    python benchmarks/kernels.py --dry        # tiny shapes in Triton's interpreter: does it run? Times mean nothing.

| system | what it is |
|---|---|
| ours | the generated kernels, tuned if ``moecompile autotune`` ran on this device |
| grouped_mm | torch: sort, two ``F.grouped_mm``, activation, sum |
| batched_mm | torch: the chosen experts' weights gathered, two ``bmm`` (few tokens alone) |
| hf_grouped_mm, hf_batched_mm | transformers' own experts implementations, in a Mixtral's experts |
| liger, vllm | ``LigerFusedMoEFunction``, ``fused_experts``, where they are installed |

Each row is a median with a cold L2 and random data; forward in a CUDA graph (eager where a peer cannot be captured), forward
with backward eager. ``floor`` is the larger of FLOPs and bytes of weights over what the ``limits`` stage measured. ``skewed``
routing draws expert e with a probability that falls as 1 / (e + 1). Every stage adds to ``kernels.json`` and ends by itself; a
stage that is repeated replaces its rows.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

if "--dry" in sys.argv[1:]:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from moecompile.codegen.triton_backend import build, device_target, moe_ffn, triton_module
from moecompile.codegen.triton_grid import SHAPES
from moecompile.codegen.triton_spec import Target, TritonSpec
from moecompile.codegen.triton_tuning import Limits, cold_microseconds, measured_limits, random_operands
from torch import Tensor
from torch.nn.functional import silu

from moecompile.files import read_json, write_bytes
from moecompile.ops import expert_ffn as reference

STAGES = ("limits", "correctness", "forward", "backward", "report")
TOKENS = (1, 8, 64, 512, 2048, 4096, 16384)
DRY_SHAPES = {"tiny": (32, 16, 4, 2)}
ROUTINGS = {"uniform": 0.0, "skewed": 1.0}
BATCHED_BYTES = 8 << 30  # above this much gathered weight batched_mm is left out
Run = Callable[..., Tensor]


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


# ---- systems: each takes x, ids, weights, up, down and gives y ----


def ours(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Generated kernels; with gradients, by the operator."""
    if x.requires_grad:
        return reference(x, ids, weights, up, down, None, None, "silu", True)
    none = (None,) * 8
    return moe_ffn(x, ids, weights, None, None, up, down, *none, activation="silu", gated=True)


def grouped_mm(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """torch's grouped products."""
    tokens, chosen = ids.shape
    ranked, order = torch.sort(ids.flatten(), stable=True)
    ends = torch.searchsorted(ranked, torch.arange(up.shape[0], device=x.device), right=True).to(torch.int32)
    gate, value = torch.nn.functional.grouped_mm(x[order // chosen], up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    out = torch.nn.functional.grouped_mm(silu(gate) * value, down.transpose(1, 2), offs=ends)
    out = out * weights.flatten()[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=x.device)
    return out[back].view(tokens, chosen, -1).sum(1)


def batched_mm(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The chosen experts' weights, gathered."""
    flat = ids.flatten()
    gate, value = torch.bmm(up[flat], x.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)).squeeze(-1).chunk(2, dim=-1)
    out = torch.bmm(down[flat], (silu(gate) * value).unsqueeze(-1)).squeeze(-1) * weights.flatten().unsqueeze(-1)
    return out.view(*ids.shape, -1).sum(1)


def transformers_experts(implementation: str) -> Run:
    """The experts of transformers' Mixtral, by one of its implementations.

    Raises:
        ImportError: this transformers has none.
    """
    from transformers import MixtralConfig
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    if implementation not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        raise ImportError(f"transformers has no experts implementation {implementation}")
    made: dict[tuple[int, int, int], torch.nn.Module] = {}

    def run(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        experts, hidden, width = down.shape
        if (experts, hidden, width) not in made:
            config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=experts)
            config._experts_implementation = implementation
            with torch.device("meta"):
                made[experts, hidden, width] = MixtralExperts(config)
        parameters = {"gate_up_proj": up, "down_proj": down}
        return torch.func.functional_call(made[experts, hidden, width], parameters, (x, ids, weights))

    return run


def systems() -> dict[str, Run]:
    """Name -> system, of those that are installed."""
    found: dict[str, Run] = {"ours": ours, "grouped_mm": grouped_mm, "batched_mm": batched_mm}
    for name in ("grouped_mm", "batched_mm"):
        try:
            found[f"hf_{name}"] = transformers_experts(name)
        except ImportError as reason:
            say(f"hf_{name} is left out: {reason}")
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        found["liger"] = lambda x, ids, weights, up, down: LigerFusedMoEFunction.apply(
            x, up, down, ids.to(torch.int32), weights
        )
    except ImportError as reason:
        say(f"liger is left out: {reason}")
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts

        found["vllm"] = lambda x, ids, weights, up, down: fused_experts(x, up, down, weights.float(), ids.to(torch.int32))
    except ImportError as reason:
        say(f"vllm is left out: {reason}")
    return found


# ---- measuring ----


def spec_of(shape: tuple[int, ...], target: Target, dtype: str) -> TritonSpec:
    """Gated, silu, with routing weights."""
    return TritonSpec(*shape, True, "silu", dtype, target=target)  # type: ignore[arg-type]


class Bench:
    """What all stages share.

    Args:
        options: the command line's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.dry = options, options.dry
        self.device = torch.device("cpu" if self.dry else "cuda")
        self.dtype = "float32" if self.dry else options.dtype
        self.shapes = DRY_SHAPES if self.dry else {name: SHAPES[name] for name in options.shapes}
        self.tokens = (1, 6) if self.dry else options.tokens
        self.path = options.output / ("kernels-dry.json" if self.dry else "kernels.json")
        self.record: dict[str, Any] = read_json(self.path) if self.path.exists() else {}
        self.systems = systems()

    def keep(self, stage: str, value: Any) -> None:
        """Add a stage's outcome to the file."""
        self.record |= {
            "device": "cpu, interpreted: times mean nothing" if self.dry else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton_module().__version__,
            "dtype": self.dtype,
            stage: {"date": str(date.today()), "value": value},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, (json.dumps(self.record, indent=1) + "\n").encode())

    def limits(self) -> Limits:
        """Of the device, as its stage measured them."""
        if "limits" not in self.record:
            self.stage_limits()
        return Limits(**self.record["limits"]["value"])

    def operands(self, spec: TritonSpec, tokens: int, routing: str) -> list[Tensor]:
        """x, ids, weights, up, down."""
        return [v for v in random_operands(spec, tokens, self.device, ROUTINGS[routing]) if v is not None]

    def fits(self, system: str, spec: TritonSpec, tokens: int) -> bool:
        """Whether a system is measured with so many tokens."""
        gathered = tokens * spec.top_k * 3 * spec.hidden_size * spec.expert_width * spec.element_bytes
        return "batched_mm" not in system or gathered <= BATCHED_BYTES

    def time(self, run: Callable[[], Any], graph: bool) -> tuple[float, bool]:
        """(microseconds, whether in a graph)."""
        if self.dry:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e6, False
        if graph:
            try:
                return cold_microseconds(run), True
            except RuntimeError as reason:
                say(f"not captured: {' '.join(str(reason).split())[:120]}")
                torch.cuda.synchronize()
        return cold_microseconds(run, graph=False), False

    # ---- stages ----

    def stage_limits(self) -> None:
        """What the device does at best."""
        found = Limits(1e9, 1e9) if self.dry else measured_limits(getattr(torch, self.dtype))
        self.keep("limits", {"flops_per_second": found.flops_per_second, "bytes_per_second": found.bytes_per_second})

    def stage_correctness(self) -> None:
        """Relative error against float64 over every regime, and whether runs give equal bits."""
        rows = []
        target = device_target(self.device)
        for name, shape in self.shapes.items():
            hidden, width, experts, chosen = shape
            # Float64 on the device needs room: experts of at most a fifth of the width.
            spec = spec_of((hidden, min(width, 1024), min(experts, 16), min(chosen, 16)), target, self.dtype)
            for tokens in (1, 6) if self.dry else (1, 8, 64, 512, 2048):
                x, ids, weights, up, down = self.operands(spec, tokens, "skewed")
                wide = [v.double() for v in (x, weights, up, down)]
                want = reference(wide[0], ids, wide[1], *wide[2:], None, None, "silu", True)
                first = ours(x, ids, weights, up, down)
                same = all(torch.equal(first, ours(x, ids, weights, up, down)) for _ in range(2 if self.dry else 20))
                error = float((first.double() - want).abs().max() / want.abs().max())
                row = {"shape": name, "tokens": tokens, "error": error, "same_bits": same, **self._gradients(spec, tokens)}
                rows.append(row | {"peers": self._peers((x, ids, weights, up, down), want)})
                say(f"{name} T={tokens}: relative error {error:.1e}, equal bits: {same}")
        self.keep("correctness", rows)
        most = {"bfloat16": 1e-2, "float16": 1e-3, "float32": 1e-5}[self.dtype]
        bad = [row for row in rows if not (row["error"] <= most and row["gradient_error"] <= 2 * most and row["same_bits"])]
        if bad:
            raise SystemExit(f"wrong results, nothing else is measured: {bad[0]}")

    def _peers(self, operands: tuple[Tensor, ...], want: Tensor) -> dict[str, float | str]:
        """What the other systems are off by; the reason of one that does not run. They must compute the same thing."""
        errors: dict[str, float | str] = {}
        for system, run in self.systems.items():
            if system != "ours":
                try:
                    errors[system] = float((run(*operands).double() - want).abs().max() / want.abs().max())
                except (RuntimeError, NotImplementedError, ValueError) as reason:
                    errors[system] = " ".join(str(reason).split())[:200]
        return errors

    def _gradients(self, spec: TritonSpec, tokens: int) -> dict[str, float]:
        """The largest relative error of the five operands' gradients."""
        from dataclasses import replace

        x, ids, weights, up, down = self.operands(spec, tokens, "skewed")
        grad = torch.randn(x.shape, device=x.device, dtype=x.dtype)
        module = build(replace(spec, direction="backward")).module
        got = module.expert_ffn_backward(grad, x, ids, weights, up, down)[:4]
        wide = [v.double().requires_grad_() for v in (x, weights, up, down)]
        # By autograd of plain operators, expert by expert: the operator's own backward may be what is tested.
        total = torch.zeros_like(wide[0])
        for expert in range(spec.experts):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            gate, value = (wide[0][token] @ wide[2][expert].T).chunk(2, dim=-1)
            out = (silu(gate) * value) @ wide[3][expert].T * wide[1][token, choice].unsqueeze(-1)
            total = total.index_add(0, token, out)
        want = torch.autograd.grad(total, wide, grad.double())
        errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)]
        return {"gradient_error": max(errors)}

    def stage_forward(self) -> None:
        """Inference."""
        self.keep("forward", self._rows(training=False))

    def stage_backward(self) -> None:
        """Forward and backward, gradients of x, weights, up and down."""
        self.keep("backward", self._rows(training=True))

    def _rows(self, training: bool) -> list[dict[str, Any]]:
        limits, target, rows = self.limits(), device_target(self.device), []
        for name, shape in self.shapes.items():
            spec = spec_of(shape, target, self.dtype)
            for routing in ROUTINGS:
                for tokens in self.tokens if not training else [t for t in self.tokens if self.dry or t >= 512]:
                    operands = self.operands(spec, tokens, routing)
                    used = operands[1].unique().numel()  # experts that were drawn
                    work = spec.costs.flops(tokens) * (3 if training else 1)
                    read = used * 3 * spec.hidden_size * spec.expert_width * spec.element_bytes * (3 if training else 1)
                    floor = 1e6 * max(work / limits.flops_per_second, read / limits.bytes_per_second)
                    for system, run in self.systems.items():
                        if self.fits(system, spec, tokens) and (system != "vllm" or not training):
                            row = self._row(system, run, operands, training)
                            row |= {"shape": name, "routing": routing, "tokens": tokens, "floor_microseconds": floor}
                            if "microseconds" in row:
                                row |= {
                                    "of_floor": floor / row["microseconds"],
                                    "flops_per_second": 1e6 * work / row["microseconds"],
                                }
                            rows.append(row)
                    here = [row for row in rows if (row["shape"], row["routing"], row["tokens"]) == (name, routing, tokens)]
                    say(f"{name} {routing} T={tokens}: {', '.join(map(_short, here))}")
        return rows

    def _row(self, system: str, run: Run, operands: list[Tensor], training: bool) -> dict[str, Any]:
        x, ids, *rest = operands
        if not training:
            call: Callable[[], Any] = lambda: run(*operands)  # noqa: E731
        else:
            leaves = [v.clone().requires_grad_() for v in (x, *rest)]
            grad = torch.randn_like(x)

            def call() -> Any:
                return torch.autograd.grad(run(leaves[0], ids, *leaves[1:]), leaves, grad)

        try:
            with torch.set_grad_enabled(training):
                taken, graph = self.time(call, graph=not training)
            return {"system": system, "microseconds": taken, "graph": graph}
        except (RuntimeError, NotImplementedError, ValueError) as reason:  # a peer that cannot do this
            if system == "ours":
                raise
            return {"system": system, "failed": " ".join(str(reason).split())[:200]}

    def stage_report(self) -> None:
        """The table, and plots of the share of the floor where matplotlib is installed."""
        text = table(self.record)
        write_bytes(self.path.with_suffix(".md"), text.encode())
        print(text)
        plot(self.record, self.path.with_suffix(".svg"))


def _short(row: dict[str, Any]) -> str:
    return f"{row['system']} {row['microseconds']:.0f} us" if "microseconds" in row else f"{row['system']} failed"


def table(record: dict[str, Any]) -> str:
    """Markdown: a line for each shape, routing and T, the systems side by side."""
    lines = [
        f"# Kernels: {record.get('device')}, {record.get('dtype')}, torch {record.get('torch')}, Triton {record.get('triton')}"
    ]
    for stage in ("forward", "backward"):
        if stage not in record:
            continue
        rows = record[stage]["value"]
        names = list(dict.fromkeys(row["system"] for row in rows))
        lines += ["", f"## {stage} ({record[stage]['date']}), microseconds; in brackets ours over the floor", ""]
        lines += [f"| shape | routing | T | floor | {' | '.join(names)} |", "|" + "---|" * (4 + len(names))]
        groups: dict[tuple[str, str, int], dict[str, Any]] = {}
        for row in rows:
            groups.setdefault((row["shape"], row["routing"], row["tokens"]), {})[row["system"]] = row
        wins = 0
        for (shape, routing, tokens), found in groups.items():
            cells = []
            for name in names:
                row = found.get(name, {})
                share = f" ({100 * row['of_floor']:.0f} %)" if name == "ours" and "of_floor" in row else ""
                cells.append(f"{row['microseconds']:.0f}{share}" if "microseconds" in row else "-")
            floor = next(iter(found.values()))["floor_microseconds"]
            lines.append(f"| {shape} | {routing} | {tokens} | {floor:.0f} | {' | '.join(cells)} |")
            times = {name: row["microseconds"] for name, row in found.items() if "microseconds" in row}
            wins += min(times, key=times.__getitem__) == "ours"
        lines += ["", f"Ours is fastest in {wins} of {len(groups)} rows."]
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any], path: Path) -> None:
    """Share of the floor against T, a panel for each shape, uniform routing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no plots: matplotlib is not installed")
        return
    rows = [row for row in record.get("forward", {}).get("value", []) if row["routing"] == "uniform" and "of_floor" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(4 * max(len(shapes), 1), 3.2), layout="constrained")
    for place, shape in enumerate(shapes):
        axes = figure.add_subplot(1, len(shapes), place + 1, title=shape, xlabel="tokens", ylabel="share of the floor")
        axes.set_xscale("log", base=2)
        for system in dict.fromkeys(row["system"] for row in rows):
            points = [(row["tokens"], row["of_floor"]) for row in rows if (row["shape"], row["system"]) == (shape, system)]
            axes.plot(*zip(*points, strict=True), label=system, marker=".")
        axes.legend()
    figure.savefig(path)


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter, on the CPU; times mean nothing")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        parser.error("there is no GPU; --dry shows that everything runs")
    if options.dry and options.output == parser.get_default("output"):
        parser.error("--dry needs --output FOLDER: its times mean nothing and do not belong among the results")
    torch.manual_seed(0)
    bench = Bench(options)
    for stage in options.stage:
        start = time.perf_counter()
        with torch.no_grad() if stage in ("forward", "limits") else torch.enable_grad():
            getattr(bench, f"stage_{stage}")()
        say(f"{stage}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
