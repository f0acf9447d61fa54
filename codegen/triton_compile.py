"""Ahead-of-time compilation of generated Triton files, and what the assembly says: registers, spills, instructions, hazards.

No device is needed. :func:`compile_for` compiles each kernel of a spec, :func:`resources` reads what it uses,
:func:`lint` gives the reasons why a kernel must not be used.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .triton_backend import build, triton_module
from .triton_constants import Constants, shared_bytes
from .triton_expressions import Unavailable
from .triton_spec import Target, TritonSpec

TARGETS = tuple(Target.parse(text) for text in ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942", "hip:gfx1100"))
# Tensor-core instructions as they are written in PTX and AMD's assembly.
MMA = ("tcgen05.mma", "wgmma.mma_async", "mma.sync", "v_mfma", "v_wmma")
# Types of a kernel's parameters that are not of the element type; `pairs` is a number where ids come before it.
_POINTERS = {"ids": "*i64", "order": "*i64", "offsets": "*i64", "tile_expert": "*i32", "tile_row": "*i32"}
_POINTERS |= {"partial": "*fp32", "scores": "*fp32", "gates": "*fp32"}
_NUMBERS = ("tiles", "tokens", "pairs")
_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_STORED = {"fp8": "fp8e4nv", "int8": "i8", "int4": "u8"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        registers: of a thread.
        spill_bytes: of local memory or stack per thread; on AMD devices spilled registers count four bytes each.
        shared_bytes: of a program.
        mma: the tensor-core instruction that it uses, or "".
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    mma: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def _launches(spec: TritonSpec, module: Any, blocks: Collection[int] | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, function, constants and options) of every kernel of a file."""
    yield "up_pairs", "up_pairs", {**module.PAIRS, "TOP_K": spec.top_k}
    yield "down_pairs", "down_pairs", module.PAIRS
    yield "sum_pairs", "sum_pairs", {**module.SUM, "TOP_K": spec.top_k}
    yield "rank_pairs", "rank_pairs", module.RANK
    lanes, slots = (1 << (count - 1).bit_length() for count in (spec.experts, max(spec.top_k, 1)))
    routing = {"CHOSEN": spec.top_k, "SLOTS": slots, "LANES": lanes, "SCORE": "softmax", "NORMALISE": True, "num_warps": 1}
    yield "choose", "choose", routing
    for block, tile in module.TILES.items():
        if blocks is not None and block not in blocks:
            continue
        yield f"up_tiles/{block}", "up_tiles", {**tile, "TOP_K": spec.top_k}
        yield f"down_tiles/{block}", "down_tiles", tile
        yield f"map_tiles/{block}", "map_tiles", {**module.MAP, "N": spec.experts, "LANES": lanes, "BLOCK_M": block}
    if spec.direction == "backward":
        yield from module.backward_launches(spec.top_k, blocks)


def _absent(spec: TritonSpec) -> set[str]:
    """Operands that a spec does not have; a kernel is compiled without them."""
    absent = set() if spec.weighted else {"weights"}
    absent |= set() if spec.up_bias else {"up_bias"}
    absent |= set() if spec.down_bias else {"down_bias"}
    absent |= set() if spec.output_bias else {"bias"}
    absent |= set() if spec.shared_bias else {"shared_gate_bias", "shared_up_bias"}
    return absent | (set() if spec.gated else {"shared_gate", "shared_gate_bias"})


def compile_for(
    spec: TritonSpec,
    blocks: Collection[int] | None = None,
    constants: Constants | None = None,
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """Compile the kernels of a spec ahead of time for its target; needs no device of that kind, nor any.

    Args:
        spec: what is computed.
        blocks: the tile sizes wanted, keys of the file's ``TILES``; None for all.
        constants: launch constants; None for the heuristic.
        only: names of functions that are wanted; None for all.

    Returns:
        Name (``up_tiles/128``, ``up_pairs``) -> Triton's compiled kernel, with ``asm`` and ``metadata``.

    Raises:
        Unavailable: as :func:`~.triton_backend.build`; or the interpreter is on, which compiles nothing; or the compiler
            refuses a kernel.
    """
    triton = triton_module()
    if triton.knobs.runtime.interpret:
        raise Unavailable("the interpreter is on (TRITON_INTERPRET), nothing can be compiled")
    module = build(spec, constants).module
    return {
        name: _compile(spec, name, getattr(module, function), launch, _absent(spec))
        for name, function, launch in _launches(spec, module, blocks)
        if only is None or function in only
    }


def _compile(spec: TritonSpec, name: str, function: Any, launch: dict[str, Any], absent: set[str]) -> Any:
    """One kernel, as Triton would compile it at a launch with aligned pointers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {key: value for key, value in launch.items() if key in function.arg_names}
    options = {key: value for key, value in launch.items() if key not in constants}
    constants |= {key: None for key in absent if key in function.arg_names}
    signature: dict[str, str] = {}
    attributes = {}
    for place, argument in enumerate(function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in _NUMBERS:
            signature[argument] = "i32"
        elif argument in ("up", "down") and launch.get("TMA"):
            parts = 2 if spec.gated and argument == "up" else 1
            signature[argument] = (
                f"tensordesc<{_TYPES[spec.dtype]}[1,{parts},{launch['BLOCK_N'] // parts},{launch['BLOCK_K']}]>"
            )
        else:
            signature[argument] = _pointer(spec, argument)
            attributes[(place,)] = [["tt.divisibility", 16]]  # as torch's allocators align
    source = ASTSource(function, signature, constants, attributes)
    target = spec.target
    try:
        return triton.compile(source, target=GPUTarget(target.backend, target.arch, target.lanes), options=options)
    except Exception as error:  # Triton has no one class for what it refuses
        reason = " ".join(str(error).split())[-300:]
        raise Unavailable(f"{name} does not compile for {target}: {type(error).__name__}: {reason}") from error


def _pointer(spec: TritonSpec, argument: str) -> str:
    if spec.quantised and argument in ("up", "down"):
        return f"*{_STORED[spec.weight_format]}"
    if spec.quantised and argument.endswith("_scale"):
        return "*fp32"
    return _POINTERS.get(argument, f"*{_TYPES[spec.dtype]}")


def assembly(kernel: Any) -> str:
    """PTX, or AMD's assembly."""
    return kernel.asm.get("ptx") or kernel.asm["amdgcn"]


def binary(kernel: Any) -> tuple[str, bytes]:
    """(file name's end, contents) of what the device loads."""
    kind = "cubin" if "cubin" in kernel.asm else "hsaco"
    return kind, kernel.asm[kind]


def resources(kernel: Any) -> Resources:
    """Registers, spills and shared memory, as the assembler counts them.

    Raises:
        Unavailable: Triton's ``cuobjdump`` is missing or says something else.
    """
    text = assembly(kernel)
    mma = next((name for name in MMA if name in text), "")
    if "amdgcn" in kernel.asm:
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size): +(\d+)", text))
        spills = 4 * (int(counts["vgpr_spill_count"]) + int(counts["sgpr_spill_count"])) + int(
            counts["private_segment_fixed_size"]
        )
        return Resources(int(counts["vgpr_count"]), spills, kernel.metadata.shared, mma)
    tool = Path(triton_module().__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        try:
            done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Unavailable(f"the registers of a compiled kernel cannot be read: {error}") from error
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    if used.keys() != {"REG", "STACK", "LOCAL"}:
        raise Unavailable(f"the registers of a compiled kernel cannot be read from: {' '.join(done.stdout.split())[:200]}")
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], kernel.metadata.shared, mma)


def lint(name: str, kernel: Any, spec: TritonSpec) -> list[str]:
    """Reasons why a compiled kernel must not be used; none if it may.

    Spills; shared memory beyond what a program may have; tiles of 16-bit products without tensor-core instructions; and on
    Hopper a left operand that is computed in registers and feeds a pipelined WGMMA, which Triton 3.4 to 3.7 can overwrite.
    """
    used, reasons = resources(kernel), []
    if used.spill_bytes:
        reasons.append(f"{name}: spills {used.spill_bytes} bytes per thread")
    room = shared_bytes(spec.target)
    if used.shared_bytes > room:
        reasons.append(f"{name}: {used.shared_bytes} bytes of shared memory, of {room} on {spec.target}")
    product = " tt.dot " in kernel.asm["ttir"]
    if product and (spec.element_bytes == 2 or spec.precision == "tf32") and not used.mma:
        reasons.append(f"{name}: no tensor-core instruction")
    if "wgmma.mma_async" in assembly(kernel) and left_in_registers(kernel):
        reasons.append(f"{name}: a WGMMA reads its left operand from registers, where it can be overwritten")
    return reasons


def left_in_registers(kernel: Any) -> bool:
    """Whether a WGMMA of the kernel has its left operand in registers rather than in shared memory, by descriptor."""
    operands = re.findall(r"wgmma\.mma_async\S+\s+\{[^}]*\},\s*(\S)", assembly(kernel))
    return any(first == "{" for first in operands)
