"""The benchmark grid: shapes of known MoE models, and the table of what their kernels use.

    python -m moecompile.codegen.triton_grid codegen/resources.json

compiles every kernel of the grid for every target (minutes) and writes the table, so that a regression shows in a diff. It
fails where :func:`~.triton_compile.lint` has a reason.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path

from ..errors import CompileError
from ..files import write_bytes
from .triton_backend import triton_module
from .triton_compile import TARGETS, compile_for, lint, resources
from .triton_spec import Target, TritonSpec

# name -> D, I, N, K
SHAPES = {
    "Mixtral-8x7B": (4096, 14336, 8, 2),
    "Qwen3-30B-A3B": (2048, 768, 128, 8),
    "DeepSeek-V2-Lite": (2048, 1408, 64, 6),
    "OLMoE": (2048, 1024, 64, 8),
    "Llama-7B/8": (4096, 1376, 8, 2),
}
Row = list[int | str]  # registers, spill_bytes, shared_bytes, mma
TABLE = Path(__file__).parent / "resources.json"


def spec_of(shape: str, target: Target, dtype: str = "bfloat16", **fields: object) -> TritonSpec:
    """The spec of one shape of the grid: gated, silu, routing weights, no biases."""
    return TritonSpec(*SHAPES[shape], True, "silu", dtype, target=target, **fields)  # type: ignore[arg-type]


def rows_of(
    shape: str, target: Target, blocks: Collection[int] | None = None, only: Collection[str] | None = None
) -> dict[str, Row]:
    """Kernel -> what it uses, for one shape and target, forward and backward; all kernels that a benchmark of it launches.

    Raises:
        CompileError: the lint has a reason against a kernel.
        Unavailable: Triton is missing, or does not compile one.
    """
    spec = spec_of(shape, target, direction="backward")
    rows: dict[str, Row] = {}
    for name, kernel in compile_for(spec, blocks, only=only).items():
        reasons = lint(name, kernel, spec)
        if reasons:
            raise CompileError(f"{shape} for {target}: {'; '.join(reasons)}")
        used = resources(kernel)
        rows[name] = [used.registers, used.spill_bytes, used.shared_bytes, used.mma]
    return rows


def main() -> None:
    """Compile the grid and write the table; groups that the file holds already, by the same Triton, are kept."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else TABLE
    version = triton_module().__version__
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    groups: dict[str, dict[str, Row]] = before.get("kernels", {}) if before.get("triton") == version else {}
    for shape in SHAPES:
        for target in TARGETS:
            name = f"{shape} {target}"
            if name not in groups:
                groups[name] = rows_of(shape, target)
                print(name, file=sys.stderr, flush=True)
                write_bytes(path, text_of(version, groups).encode())


def text_of(version: str, groups: dict[str, dict[str, Row]]) -> str:
    """The table as JSON, a line for each kernel."""
    parts = []
    for name, rows in groups.items():
        lines = ",\n".join(f"   {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in rows.items())
        parts.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    columns = json.dumps(["registers", "spill_bytes", "shared_bytes", "mma"])
    body = ",\n".join(parts)
    return f'{{\n "triton": {json.dumps(version)},\n "columns": {columns},\n "kernels": {{\n{body}\n }}\n}}\n'


if __name__ == "__main__":
    main()
