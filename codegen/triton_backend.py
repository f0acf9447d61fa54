"""Expert FFNs as Triton kernels:  spec -> :func:`emit` -> source -> :func:`build` -> :class:`Kernel` -> launch.

    y_t = sum_k w_tk (W2_e act(...) + b2_e),  e = ids_tk          (:mod:`moecompile.ops` has the whole formula)

The source is a file that stands alone; its text comes from ``templates/expert_ffn_triton.py.jinja``, its activation from
:mod:`.triton_expressions`, its launch constants from the tables below. Forward only: the operator brings the gradient.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import threading
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
import torch
from torch import Tensor

from ..activations import Activation
from ..errors import CheckpointError
from ..files import write_bytes
from ..version import __version__
from .spec import ExpertKernelSpec
from .triton_expressions import Unavailable, activation_function

__all__ = ["Kernel", "Unavailable", "build", "compile_for", "emit", "expert_ffn", "unsupported"]

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MIN_TRITON = (3, 6)


@dataclass(frozen=True)
class Tiles:
    """Launch constants of the two grouped products, for tiles of ``block_m`` tokens of one expert.

    Attributes:
        block_n: columns of a product; a gated first product has block_n / 2 gates and as many ups.
        block_k: elements of a row that are multiplied at a time.
        group: tiles that go through all columns together.
        warps, stages: of a program.
    """

    block_m: int
    block_n: int
    block_k: int
    group: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Pairs:
    """Launch constants of the products of single tokens: rows and elements of a row that a program reads at a time."""

    block_n: int
    block_k: int
    warps: int


@dataclass(frozen=True)
class Constants:
    """All launch constants of one file, and why they are what they are."""

    tiles: tuple[Tiles, ...]
    hip_block_k: int
    pairs: Pairs
    sum_block: int
    why_tiles: tuple[str, ...]
    why_pairs: tuple[str, ...]


# Bytes per element -> launch constants. None of them is tuned.
CONSTANTS = {
    2: Constants(
        tiles=(Tiles(16, 128, 64, 8, 4, 4), Tiles(64, 128, 64, 8, 4, 4), Tiles(128, 128, 64, 8, 8, 3)),
        hip_block_k=32,
        pairs=Pairs(16, 256, 4),
        sum_block=1024,
        why_tiles=(
            "rows: the smallest tile that holds an expert's share if tokens spread evenly, so that weights are read once.",
            "128 x 128 x 64: 64 registers of sums per thread; with its stages 96 KB, which consumer cards have, too.",
            "16 rows is the least that tensor cores take; 64 the least for Hopper's and one warp group.",
            "groups of 8: 8 x 128 tokens of D = 4096 are 8 MB, a part of L2.",
        ),
        why_pairs=("16 x 256: four 16-byte loads in flight per thread; bandwidth is all that counts here.",),
    ),
    4: Constants(
        tiles=(Tiles(16, 64, 32, 8, 4, 3), Tiles(64, 64, 32, 8, 4, 3)),
        hip_block_k=32,
        pairs=Pairs(16, 128, 4),
        sum_block=512,
        why_tiles=(
            "rows: the smallest tile that holds an expert's share if tokens spread evenly, so that weights are read once.",
            "64 x 64 x 32: exact float32 has no tensor cores; few sums per thread, against spills (gfx1100 spills).",
        ),
        why_pairs=("16 x 128: four 16-byte loads in flight per thread; bandwidth is all that counts here.",),
    ),
}


def emit(spec: ExpertKernelSpec) -> str:
    """The source of a file that computes one expert FFN; it imports torch and triton alone and is the same on every machine.

    It defines ``expert_ffn(x, ids, weights, up, down, up_bias, down_bias, routing)``, ``block_for(pairs)`` and
    ``dispatch(ids, experts, block)``, which is ``rank`` and ``cut``. ``spec.top_k`` is only what it expects, every K will do.

    Raises:
        PlanError: ``spec.activation`` is not an activation expression.
        Unavailable: there is no such kernel: an activation without a Triton form, an element size other than 2 and 4 bytes,
            a dimension that is 0.
    """
    if spec.element_bytes not in CONSTANTS:
        raise Unavailable(f"there are Triton kernels for 2 and 4 bytes per element, not for {spec.element_bytes}")
    if min(spec.hidden_size, spec.expert_width, spec.experts) < 1:
        raise Unavailable("there is no Triton kernel for experts without neurons or inputs")
    constants = CONSTANTS[spec.element_bytes]
    return (
        _environment()
        .get_template("expert_ffn_triton.py.jinja")
        .render(
            spec=spec,
            gated=spec.gated,
            expression=ast.unparse(ast.parse(Activation(spec.activation).expression, mode="eval")),
            activation=activation_function(spec.activation),
            constants=constants,
            version=__version__,
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader(__name__.rpartition(".")[0], "templates"),
        autoescape=False,  # Python, not HTML; every text that enters is a number or unparsed code
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


@dataclass(frozen=True)
class Kernel:
    """A generated file, loaded.

    Attributes:
        spec: what it computes.
        source: its text.
        path: where the text lies, for readers, profilers and Triton, which reads it again.
        module: the module made of it.
    """

    spec: ExpertKernelSpec
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
        return self.module.dispatch(ids, self.spec.experts, block) if block else None

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
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor | None,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        routing: Any = None,
    ) -> Tensor:
        """(T, D) -> (T, D); see :func:`expert_ffn`.

        Raises:
            Unavailable: these tensors cannot be used: device, dtype, layout.
            ValueError: shapes that do not fit.
        """
        _check(x, up, down)
        if x.element_size() != self.spec.element_bytes:
            raise Unavailable(f"this kernel was made for {self.spec.element_bytes} bytes per element, x has {x.dtype}")
        return self.module.expert_ffn(x, ids, weights, up, down, up_bias, down_bias, routing)


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
    """:func:`moecompile.ops.expert_ffn` by generated kernels: the same operands, no gradient.

    Nothing waits for the device and all grids follow from shapes, so that it can be captured in a CUDA graph once it has run.

    Args:
        x: (T, D) float32, float16 or bfloat16.
        ids: (T, K) integer expert numbers.
        weights: (T, K) floating point; None means that every weight is 1 and costs nothing.
        up: (N, G*I, D) gate rows then up rows of each expert, contiguous, dtype of x.
        down: (N, D, I), contiguous, dtype of x.
        up_bias: (N, G*I) floating point or None.
        down_bias: (N, D) floating point or None.
        activation: a name or expression of :mod:`moecompile.activations`.
        gated: whether G is 2.
        order: (T*K,) int64, positions in ids.flatten() by expert, earlier ones first, where they are known; with
        offsets: (N + 1,) int64, where each expert's begin in it.

    Returns:
        (T, D), dtype of x. Sums are taken in float32, in an order that depends on the shapes and ids alone.

    Raises:
        Unavailable: no kernel for these tensors or this activation, or none on this machine.
        PlanError: ``activation`` is not an activation expression.
        ValueError: shapes that do not fit.
    """
    _check(x, up, down)
    spec = ExpertKernelSpec(x.shape[-1], down.shape[-1], up.shape[0], ids.shape[-1], gated, activation, x.element_size())
    kernel = build(spec)
    routing = None if order is None or offsets is None else kernel.cut(order, offsets)
    return kernel(x, ids, weights, up, down, up_bias, down_bias, routing)


def unsupported(dtype: torch.dtype, activation: str) -> str | None:
    """Why there can be no kernel for this type and activation, as one line; None if there can.

    Raises:
        PlanError: ``activation`` is not an activation expression.
    """
    try:
        _triton()
        _check_dtype(dtype)
        activation_function(activation)
    except Unavailable as reason:
        return str(reason)
    return None


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise Unavailable(f"there are no Triton kernels for {dtype}")


def _check(x: Tensor, up: Tensor, down: Tensor) -> None:
    triton = _triton()
    _check_dtype(x.dtype)
    if not x.dtype == up.dtype == down.dtype:
        raise Unavailable(f"x is {x.dtype}, up {up.dtype}, down {down.dtype}: the kernels multiply equal types")
    if not up.is_contiguous() or not down.is_contiguous():
        raise Unavailable("up and down must be contiguous; a copy at every call would cost more than the kernel saves")
    if triton.knobs.runtime.interpret:
        return
    if not x.is_cuda:
        raise Unavailable(f"x is on {x.device}; Triton kernels need a CUDA or HIP device (or TRITON_INTERPRET=1)")
    if torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        raise Unavailable("the Triton kernels need an NVIDIA device of compute capability 8.0 or later")


def _triton() -> Any:
    """The package, which is not required to be there."""
    try:
        import triton
    except ImportError as error:
        raise Unavailable(f"triton is not installed ({error})") from None
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < MIN_TRITON:
        raise Unavailable(f"triton {triton.__version__} is too old; the kernels need 3.6 or later")
    return triton


_building = threading.Lock()


def build(spec: ExpertKernelSpec) -> Kernel:
    """The kernel of a spec; made once per process, its file kept in ``~/.cache/moecompile/kernels`` (``XDG_CACHE_HOME``).

    Nothing is compiled before the first launch; then Triton does it, and keeps the results in its own cache.

    Raises:
        PlanError: as :func:`emit`.
        Unavailable: as :func:`emit`; or Triton is missing, or the file cannot be written.
    """
    _triton()
    with _building:
        return _build(spec)


@functools.lru_cache(maxsize=256)
def _build(spec: ExpertKernelSpec) -> Kernel:
    source = emit(spec)
    name = f"expert_ffn_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moecompile" / "kernels" / f"{name}.py"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != source.encode():
            write_bytes(path, source.encode())
    except (OSError, CheckpointError) as error:
        raise Unavailable(f"the generated kernel cannot be kept: {error}") from error
    module_spec = importlib.util.spec_from_file_location(f"moecompile.codegen.{name}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return Kernel(spec, source, path, module)


# Kernel parameters that are not numbers or of the element type.
_POINTERS = {"ids": "*i64", "order": "*i64", "offsets": "*i64", "tile_expert": "*i32", "tile_row": "*i32"}


def compile_for(
    spec: ExpertKernelSpec,
    target: tuple[str, int | str, int],
    dtype: torch.dtype = torch.bfloat16,
    blocks: Collection[int] | None = None,
) -> dict[str, Any]:
    """Compile every kernel of a spec ahead of time, with biases and weights; needs no device of that kind, nor any.

    Args:
        spec: what is computed.
        target: backend, architecture and threads per warp: ("cuda", 90, 32), ("hip", "gfx942", 64).
        dtype: of the tensors; its size must be the spec's.
        blocks: the tile sizes wanted, keys of the file's ``TILES``; None for all.

    Returns:
        Name (``up_tiles/128``, ``up_pairs``) -> Triton's compiled kernel, with ``asm`` and ``metadata``.

    Raises:
        Unavailable: as :func:`build`; or the interpreter is on, which compiles nothing.
    """
    triton = _triton()
    if triton.knobs.runtime.interpret:
        raise Unavailable("the interpreter is on (TRITON_INTERPRET), nothing can be compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = build(spec).module
    launches: dict[str, dict[str, Any]] = {
        "up_pairs": {**module.PAIRS, "TOP_K": spec.top_k},
        "down_pairs": module.PAIRS,
        "sum_pairs": {**module.SUM, "TOP_K": spec.top_k},
    }
    for block, tile in module.tiles_for(hip=target[0] == "hip").items():
        if blocks is None or block in blocks:
            launches[f"up_tiles/{block}"] = {**tile, "TOP_K": spec.top_k, "PRECISION": "ieee"}
            launches[f"down_tiles/{block}"] = {**tile, "PRECISION": "ieee"}
            lanes = triton.next_power_of_2(spec.experts)
            launches[f"map_tiles/{block}"] = {**module.MAP, "N": spec.experts, "LANES": lanes, "BLOCK_M": block}
    compiled = {}
    for name, launch in launches.items():
        function = getattr(module, name.partition("/")[0])
        constants = {key: value for key, value in launch.items() if key in function.arg_names}
        options = {key: value for key, value in launch.items() if key not in constants}
        signature, attributes = {}, {}
        for place, argument in enumerate(function.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
            elif argument == "tiles":
                signature[argument] = "i32"
            else:
                signature[argument] = _POINTERS.get(argument, f"*{DTYPES[dtype]}")
                attributes[(place,)] = [["tt.divisibility", 16]]  # as torch's allocators align
        source = ASTSource(function, signature, constants, attributes)
        compiled[name] = triton.compile(source, target=GPUTarget(*target), options=options)
    return compiled
