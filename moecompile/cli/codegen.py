"""``moecompile codegen``: write Triton kernels and compile them ahead of time; no GPU is needed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..block import MoEFFN
from ..codegen import stored
from ..codegen.triton_backend import DTYPES, Unavailable, triton_module
from ..codegen.triton_compile import TARGETS, assembly, binary, compile_for, lint, resources
from ..codegen.triton_emit import emit
from ..codegen.triton_spec import DTYPES as DTYPE_NAMES
from ..codegen.triton_spec import WEIGHT_FORMATS, Target, TritonSpec
from ..errors import CompileError, InputError
from ..files import new_folder
from ..progress import Progress
from . import command
from .common import load_any, progress_of


def add(commands: Any) -> None:
    """The subcommand's options."""
    sub = command(
        commands,
        "codegen",
        "Write and compile Triton kernels ahead of time; no GPU is needed.",
        "moecompile codegen --shape 2048,768,128,8 --target cuda:90 hip:gfx942 --out kernels",
    )
    add_spec(sub)
    sub.add_argument(
        "--target",
        nargs="+",
        type=target,
        metavar="TARGET",
        help=f"kinds of device (default: those of {' '.join(map(str, TARGETS))} that have the weights' format)",
    )
    sub.add_argument("--backward", action="store_true", help="the kernels of the gradients too")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    sub.set_defaults(run=run)


def add_spec(sub: argparse.ArgumentParser) -> None:
    """The options that say what is computed."""
    sub.add_argument("model", nargs="?", metavar="MODEL", help="a converted folder, or a Mixture-of-Experts of transformers")
    sub.add_argument(
        "--shape", type=shape, metavar="D,I,N,K", help="hidden size, expert width, experts, chosen, without a model"
    )
    sub.add_argument("--activation", default="silu", metavar="A", help="with --shape: a name or expression (default: silu)")
    sub.add_argument("--plain", action="store_true", help="with --shape: experts without a gate projection")
    sub.add_argument(
        "--shared", type=int, default=0, metavar="S", help="with --shape: neurons that every token uses (default: 0)"
    )
    sub.add_argument("--dtype", choices=tuple(DTYPE_NAMES), help="default: the model's, or bfloat16")
    sub.add_argument("--weight-format", choices=WEIGHT_FORMATS, default="same", help="how weights are stored (default: same)")
    sub.add_argument(
        "--group-size", type=int, default=0, metavar="G", help="elements that share a scale (default: 0, a whole row)"
    )


def shape(text: str) -> tuple[int, int, int, int]:
    """D,I,N,K."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is not four positive numbers D,I,N,K")
    hidden, width, experts, chosen = (int(part) for part in parts)
    if chosen > experts:
        raise argparse.ArgumentTypeError(f"{chosen} experts are chosen of {experts}")
    return hidden, width, experts, chosen


def target(text: str) -> Target:
    """cuda:90 and the like."""
    try:
        return Target.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def specs_of(options: argparse.Namespace) -> list[TritonSpec]:
    """The different specs that the options name, for any target.

    Raises:
        InputError: neither a model nor a shape, or both; a dense model; a spec that no kernel has.
    """
    if (options.model is None) == (options.shape is None):
        raise InputError("give either MODEL or --shape D,I,N,K")
    try:
        if options.shape is not None:
            first = TritonSpec(*options.shape, not options.plain, options.activation, options.dtype or "bfloat16")
            specs = [replace(first, shared_width=options.shared)]
        else:
            if options.plain or options.shared or options.activation != "silu":
                raise InputError("--plain, --shared and --activation go with --shape; a model has its own")
            specs = _model_specs(options)
        form = {"weight_format": options.weight_format, "group_size": options.group_size}
        return list(dict.fromkeys(replace(spec, **form) for spec in specs))
    except ValueError as error:
        raise InputError(str(error)) from None


def _model_specs(options: argparse.Namespace) -> list[TritonSpec]:
    """A spec for each kind of block of a model."""
    from ..stock import _activation_or_warn, stock_experts, weights_of

    model, _ = load_any(options)
    specs = []
    for block in (module for module in model.modules() if isinstance(module, MoEFFN)):
        s, experts = block.spec, block.experts
        bias = s.input_bias
        specs.append(
            TritonSpec(
                s.hidden_size, s.expert_width, s.experts, block.top_k, s.gated, s.activation,
                _dtype(options, experts.down_proj), weighted=False, up_bias=bias,
                down_bias=s.expert_bias, shared_width=s.shared_width,
                shared_bias=bias and s.shared_width > 0, output_bias=s.bias,
            )
        )  # fmt: skip
    for module in stock_experts(model).values():
        up, down, up_bias, down_bias = weights_of(module)
        specs.append(
            TritonSpec(
                up.shape[2], down.shape[2], up.shape[0], _chosen(model, module), bool(module.has_gate),
                str(_activation_or_warn(module)),
                _dtype(options, down), up_bias=up_bias is not None, down_bias=down_bias is not None,
            )
        )  # fmt: skip
    if not specs:
        raise InputError(f"{options.model} has no experts; convert it first, or give --shape D,I,N,K")
    return specs


def _chosen(model: Any, experts: Any) -> int:
    """K of a stock model.

    Raises:
        InputError: its configuration does not say.
    """
    from ..stock import chosen

    found = chosen(model, experts)
    if found is None:
        raise InputError(f"the configuration of {type(model).__name__} does not say how many experts a token has; give --shape")
    return found


def _dtype(options: argparse.Namespace, tensor: torch.Tensor) -> str:
    if not options.dtype and tensor.dtype not in DTYPES:
        raise InputError(f"there are no Triton kernels for {tensor.dtype}; give --dtype")
    return options.dtype or DTYPES[tensor.dtype]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write sources, binaries and assembly, and what each kernel uses.

    Raises:
        CompileError: Triton is missing or refuses a kernel, or the lint has a reason against one.
    """
    progress = progress_of(options)
    specs, rows = specs_of(options), []
    try:
        triton_module()
        jobs = [replace(spec, target=where) for spec in specs for where in options.target or TARGETS]
        jobs = [job for job in jobs if _is_stored(job, asked=options.target is not None, progress=progress)]
        jobs = [job for spec in jobs for job in with_gradients(spec)] if options.backward else jobs
        with new_folder(options.out, overwrite=False) as folder:
            for spec in progress.over(jobs, "compiling"):
                rows += write(spec, folder)
            (folder / "kernels.json").write_text(json.dumps({"kernels": rows}, indent=1) + "\n", encoding="utf-8")
    except Unavailable as reason:
        raise CompileError(str(reason)) from None
    except ValueError as error:
        raise InputError(str(error)) from None
    return {"json": {"kernels": rows, "path": str(options.out)}, "text": _table(rows)}


def _is_stored(spec: TritonSpec, *, asked: bool, progress: Progress) -> bool:
    """Whether a target reads weights in a spec's format; where it was asked for and does not, an error says why."""
    reason = stored.refusal(spec.weight_format, spec.target, spec.hidden_size, spec.expert_width)
    if reason is not None and asked:
        raise InputError(reason)
    if reason is not None:
        progress.say(f"left out: {reason}")
    return reason is None


def with_gradients(spec: TritonSpec) -> list[TritonSpec]:
    """What computes a block and its gradients: those of shared neurons and output biases are torch's own."""
    plain: dict[str, Any] = {"shared_width": 0, "shared_bias": False, "output_bias": False, "weighted": True}
    backward = replace(spec, direction="backward", **plain)
    return [backward] if replace(spec, **plain) == spec else [spec, backward]


def write(spec: TritonSpec, folder: Path) -> list[dict[str, Any]]:
    """The source of a spec, its kernels' binaries and assembly.

    Returns:
        A row for each kernel: name, target, source, registers, spill_bytes, shared_bytes, mma, and its files.
    """
    source = f"{spec.name}.py"
    (folder / source).write_text(emit(spec), encoding="utf-8")
    (folder / spec.name).mkdir()
    rows, reasons = [], []
    for name, kernel in compile_for(spec).items():
        reasons += lint(name, kernel, spec)
        kind, data = binary(kernel)
        stem = f"{spec.name}/{name.replace('/', '_')}"
        text = "ptx" if kind == "cubin" else "amdgcn"
        (folder / f"{stem}.{kind}").write_bytes(data)
        (folder / f"{stem}.{text}").write_text(assembly(kernel), encoding="utf-8")
        files = {"source": source, "binary": f"{stem}.{kind}", "assembly": f"{stem}.{text}"}
        rows.append({"name": name, "target": str(spec.target), **files, **resources(kernel).to_dict()})
    if reasons:
        raise CompileError(f"the compiled kernels of {spec.name} must not be used: {'; '.join(reasons)}")
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """For people."""
    lines = [f"{'target':<12} {'kernel':<18} {'registers':>9} {'spills':>6} {'shared':>7}  tensor cores"]
    for row in rows:
        used = f"{row['registers']:>9} {row['spill_bytes']:>6} {row['shared_bytes']:>7}  {row['mma'] or '-'}"
        lines.append(f"{row['target']:<12} {row['name']:<18} {used}")
    return "\n".join(lines)
