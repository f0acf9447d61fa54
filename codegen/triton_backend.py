"""Expert FFNs as Triton kernels:  spec -> :func:`~.triton_emit.emit` -> source -> :func:`build` -> :class:`Kernel` -> launch.

    y_t = sum_k w_tk (W2_e act(...) + b2_e) + shared(x_t) + b,  e = ids_tk         (the whole formula: :mod:`moecompile.ops`)

:func:`moe_ffn` is what lowered graphs call: it makes the spec from the tensors. Nothing here waits for the device.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import write_bytes
from ..logs import log
from . import stored
from .triton_cache import Device, constants_for
from .triton_constants import Constants
from .triton_emit import emit
from .triton_expressions import Unavailable, activation_function
from .triton_spec import Target, TritonSpec

__all__ = [
    "Kernel",
    "Unavailable",
    "build",
    "device_target",
    "emit",
    "expert_ffn",
    "expert_ffn_backward",
    "kernel_of",
    "moe_ffn",
    "route",
    "spec_of",
    "triton_module",
    "unsupported",
]

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
MIN_TRITON = (3, 6)


@dataclass(frozen=True)
class Kernel:
    """A generated file, loaded.

    Attributes:
        spec: what it computes.
        source: its text.
        path: where the text lies, for readers, profilers and Triton, which reads it again.
        module: the module made of it.
    """

    spec: TritonSpec
    source: str
    path: Path
    module: ModuleType

    def dispatch(self, ids: Tensor, block: int | None = None) -> Any:
        """The routing of ids, for any number of layers with the same ids, N and element size.

        Args:
            ids: (T, K) integer.
            block: rows of a tile, a key of the module's ``TILES``; None takes the one that fits T*K.

        Returns:
            ``Routing`` (order, offsets, tile_expert, tile_row, block); None where this few pairs need none.
        """
        block = self.module.block_for(ids.numel()) if block is None else block
        return self.module.dispatch(ids, block) if block else None

    def cut(self, order: Tensor, offsets: Tensor) -> Any:
        """As :meth:`dispatch`, from pairs that are ordered already.

        Args:
            order: (T*K,) int64, positions in ids.flatten(), by expert.
            offsets: (N + 1,) int64, where each expert's begin.
        """
        if order.numel() and offsets.numel() != self.spec.experts + 1:
            raise ValueError(f"expert_ffn: {offsets.numel()} offsets for {self.spec.experts} experts")
        block = self.module.block_for(order.numel())
        return self.module.cut(order, offsets, block) if block else None

    def __call__(
        self, x: Tensor, ids: Tensor, weights: Tensor | None, up: Tensor, down: Tensor, *rest: Any, **more: Any
    ) -> Tensor:
        """(T, D) -> (T, D): the file's own ``expert_ffn``, whose docstring lists the operands.

        Raises:
            Unavailable: these tensors cannot be used: device, dtype, layout.
            ValueError: shapes that do not fit.
        """
        _check(x, up, down, equal=not self.spec.quantised)
        if DTYPES[x.dtype] != self.spec.dtype:
            raise Unavailable(f"this kernel was made for {self.spec.dtype}, x has {x.dtype}")
        return self.module.expert_ffn(x, ids, weights, up, down, *rest, **more)


def expert_ffn(
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """:func:`moecompile.ops.expert_ffn` by generated kernels: the same operands, no gradient; see :func:`moe_ffn`."""
    none = (None,) * 6
    return moe_ffn(x, ids, weights, order, offsets, up, down, up_bias, down_bias, *none, activation=activation, gated=gated)


def moe_ffn(
    x: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    shared_gate: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate_bias: Tensor | None,
    shared_up_bias: Tensor | None,
    bias: Tensor | None,
    *,
    activation: str,
    gated: bool,
    weight_format: str = "same",
) -> Tensor:
    """Routed and shared experts by generated kernels, in the same launches.

    Nothing waits for the device and all grids follow from shapes, so that it can be captured in a CUDA graph once it has run.

    Args:
        x: (T, D) float32, float16 or bfloat16.
        ids: (T, K) integer expert numbers.
        weights: (T, K) floating point; None means that every weight is 1 and costs nothing.
        order: (T*K,) int64, positions in ids.flatten() by expert, earlier ones first, where they are known; with
        offsets: (N + 1,) int64, where each expert's begin in it.
        up: (N, G*I, D) gate rows then up rows of each expert, contiguous, dtype of x.
        down: (N, D, I), contiguous, dtype of x.
        up_bias: (N, G*I) floating point or None; down_bias: (N, D) likewise.
        shared_gate, shared_up: (S, D), dtype of x, or None; shared_down: (D, S).
        shared_gate_bias, shared_up_bias: (S,) or None.
        bias: (D,), added to every row of y, or None.
        activation: a name or expression of :mod:`moecompile.activations`.
        gated: whether G is 2.
        weight_format: ``same``, or a name of :mod:`.stored`: up and down are packed once and read so; shared experts are not.

    Returns:
        (T, D), dtype of x. Sums are taken in float32, in an order that depends on the shapes and ids alone.

    Raises:
        Unavailable: no kernel for these tensors or this activation, or none on this machine.
        PlanError: ``activation`` is not an activation expression.
        ValueError: shapes that do not fit.
    """
    _check(x, up, down)
    shared = shared_up is not None and shared_down is not None
    spec = spec_of(
        x, ids.shape[-1], weights is not None, up, down, up_bias, down_bias, shared_gate, shared_up, shared_down,
        shared_gate_bias, shared_up_bias, bias, activation=activation, gated=gated, weight_format=weight_format,
    )  # fmt: skip
    more: dict[str, Any] = {"bias": bias}
    if weight_format != "same":
        try:
            up, more["up_scale"] = stored.packed(up, weight_format)
            down, more["down_scale"] = stored.packed(down, weight_format)
        except ValueError as error:
            raise Unavailable(str(error)) from None
    kernel = kernel_of(spec, x.device)
    routing = None if order is None or offsets is None else kernel.cut(order, offsets)
    more["routing"] = routing
    if shared:
        more["shared"] = kernel.module.Shared(shared_gate, shared_up, shared_down, shared_gate_bias, shared_up_bias)
    return kernel(x, ids, weights, up, down, up_bias, down_bias, **more)


def spec_of(
    x: Tensor,
    top_k: int,
    weighted: bool,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    shared_gate: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate_bias: Tensor | None,
    shared_up_bias: Tensor | None,
    bias: Tensor | None,
    *,
    activation: str,
    gated: bool,
    weight_format: str = "same",
) -> TritonSpec:
    """The spec of the kernel for operands of :func:`moe_ffn`, which are looked at for their shapes and types alone.

    Args:
        top_k: K.
        weighted: whether weights of the chosen are given.

    Raises:
        Unavailable: there is none.
    """
    target = device_target(x.device)
    shared = shared_up is not None and shared_down is not None
    if shared and any(v is not None and v.dtype != x.dtype for v in (shared_gate, shared_up, shared_down)):
        raise Unavailable(f"x is {x.dtype}, shared experts are not: the kernels multiply equal types")
    if shared and gated and (shared_gate is None or (shared_gate_bias is None) != (shared_up_bias is None)):
        raise Unavailable("shared experts need a gate where the others have one, and both biases or none")
    try:
        spec = TritonSpec(
            x.shape[-1],
            down.shape[-1],
            up.shape[0],
            top_k,
            gated,
            activation,
            DTYPES[x.dtype],
            *(("same", 0) if weight_format == "same" else stored.parsed(weight_format)),
            precision=_precision(x, target),
            weighted=weighted,
            up_bias=up_bias is not None,
            down_bias=down_bias is not None,
            shared_width=shared_up.shape[0] if shared and shared_up is not None else 0,
            shared_bias=shared and shared_up_bias is not None,
            output_bias=bias is not None,
            target=target,
        )
    except ValueError as error:
        raise Unavailable(str(error)) from None
    if spec.quantised and (reason := stored.refusal(spec.weight_format, target, spec.hidden_size, spec.expert_width)):
        raise Unavailable(reason)
    return spec


def kernel_of(spec: TritonSpec, device: torch.device) -> Kernel:
    """The kernel that runs for a spec on a device: with the launch constants that were measured there, if any were.

    Raises:
        Unavailable, PlanError: as :func:`build`.
    """
    return build(spec, _tuned(spec, device))


def expert_ffn_backward(
    grad: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """:func:`moecompile.ops.expert_ffn_backward` by generated kernels, bit for bit the same at every call.

    Returns:
        Six gradients, of x, weights, up, down, up_bias, down_bias; None for those not wanted or not there.

    Raises:
        Unavailable: no kernel for these tensors or this activation, or none on this machine.
        ValueError: shapes that do not fit.
    """
    _check(x, up, down)
    target = device_target(x.device)
    try:
        spec = TritonSpec(
            x.shape[-1],
            down.shape[-1],
            up.shape[0],
            ids.shape[-1],
            gated,
            activation,
            DTYPES[x.dtype],
            precision=_precision(x, target),
            up_bias=up_bias is not None,
            down_bias=down_bias is not None,
            direction="backward",
            target=target,
        )
    except ValueError as error:
        raise Unavailable(str(error)) from None
    module = build(spec).module
    return module.expert_ffn_backward(grad, x, ids, weights, up, down, up_bias, down_bias, tuple(needs))


def _precision(x: Tensor, target: Target) -> str:
    """Of float32 products, as torch's own are set."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and target.backend == "cuda" else "ieee"


def route(scores: Tensor, top_k: int, score: str, normalise: bool) -> tuple[Tensor, Tensor]:
    """The K largest of each row, of equal ones the lower number: :func:`moecompile.lowered.route_reference` behind its scores.

    Args:
        scores: (T, N) floating point, before softmax or sigmoid.
        score: ``none``, ``softmax`` or ``sigmoid``; normalise: divide the weights by their sum.

    Returns:
        ids (T, K) int64, weights (T, K) float32.

    Raises:
        Unavailable: no kernel here.
    """
    _check_device(scores)
    # The file of any shape with this N would do; the smallest is quick to write.
    spec = TritonSpec(16, 16, scores.shape[-1], top_k, False, "relu", target=device_target(scores.device))
    return build(spec).module.route(scores, top_k, score, normalise)


def unsupported(dtype: torch.dtype, activation: str) -> str | None:
    """Why there can be no kernel for this type and activation, as one line; None if there can.

    Raises:
        PlanError: ``activation`` is not an activation expression.
    """
    try:
        triton_module()
        _check_dtype(dtype)
        activation_function(activation)
    except Unavailable as reason:
        return str(reason)
    return None


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise Unavailable(f"there are no Triton kernels for {dtype}")


def _check(x: Tensor, up: Tensor, down: Tensor, equal: bool = True) -> None:
    triton_module()
    _check_dtype(x.dtype)
    if equal and not x.dtype == up.dtype == down.dtype:
        raise Unavailable(f"x is {x.dtype}, up {up.dtype}, down {down.dtype}: the kernels multiply equal types")
    if not up.is_contiguous() or not down.is_contiguous():
        raise Unavailable("up and down must be contiguous; a copy at every call would cost more than the kernel saves")
    _check_device(x)


def _check_device(x: Tensor) -> None:
    if triton_module().knobs.runtime.interpret:
        return
    if not x.is_cuda:
        raise Unavailable(f"x is on {x.device}; Triton kernels need a CUDA or HIP device (or TRITON_INTERPRET=1)")
    if torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        raise Unavailable("the Triton kernels need an NVIDIA device of compute capability 8.0 or later")


@functools.lru_cache(maxsize=256)
def _tuned(spec: TritonSpec, device: torch.device) -> Constants | None:
    """What ``moecompile autotune`` measured for a spec on a device, looked up once per process."""
    found = constants_for(spec, Device.of(device), cache_folder() / "tuning") if device.type == "cuda" else None
    log("autotune", f"{spec.name}: {'nothing measured here, reasoned launch constants' if found is None else found}")
    return found


@functools.cache
def device_target(device: torch.device) -> Target:
    """The kind of device that a kernel for tensors there is made for; CPU tensors (the interpreter's) count as cuda:90."""
    if device.type != "cuda":
        return Target("cuda", 90)
    if torch.version.hip is not None:
        return Target("hip", torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor)


def triton_module() -> Any:
    """The package, which is not required to be there.

    Raises:
        Unavailable: it is not, or is too old.
    """
    try:
        import triton
    except ImportError as error:
        raise Unavailable(f"triton is not installed ({error})") from None
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        raise Unavailable(f"triton {triton.__version__} is too old; the kernels need 3.6 or later")
    return triton


_building = threading.Lock()


def build(spec: TritonSpec, constants: Constants | None = None) -> Kernel:
    """The kernel of a spec; made once per process, its file kept in ``~/.cache/moecompile/kernels`` (``XDG_CACHE_HOME``).

    Nothing is compiled before the first launch; then Triton does it, and keeps the results in its own cache.

    Args:
        constants: launch constants; None takes the heuristic's.

    Raises:
        PlanError: as :func:`emit`.
        Unavailable: as :func:`emit`; or Triton is missing, or the file cannot be written.
    """
    triton_module()
    with _building:
        return _build(spec, constants)


@functools.lru_cache(maxsize=256)
def _build(spec: TritonSpec, constants: Constants | None) -> Kernel:
    source = emit(spec, constants)
    name = f"{spec.name}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
    path = cache_folder() / "kernels" / f"{name}.py"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != source.encode():
            write_bytes(path, source.encode())
    except (OSError, CheckpointError) as error:
        raise Unavailable(f"the generated kernel cannot be kept: {error}") from error
    return Kernel(spec, source, path, load(path))


def cache_folder() -> Path:
    """Where generated files and tuning results are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecompile"


def load(path: Path) -> ModuleType:
    """The module in a generated file."""
    module_spec = importlib.util.spec_from_file_location(f"moecompile.codegen.{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
