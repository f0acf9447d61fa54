"""What long computations multiply in: float32, or bfloat16 under autocast where the device multiplies that natively."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

PRECISIONS = ("auto", "float32", "bfloat16")


def native_bfloat16() -> bool:
    """Whether this CPU has instructions that multiply bfloat16 (AVX-512 BF16 or AMX), by torch's word."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """One of :data:`PRECISIONS` as a type; ``auto`` is bfloat16 on a GPU and on a CPU that multiplies it natively."""
    if precision != "auto":
        return getattr(torch, precision)  # type: ignore[no-any-return]
    return torch.bfloat16 if device.type == "cuda" or native_bfloat16() else torch.float32


def multiplying(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Products within are of ``dtype``: autocast, or nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b, multiplied in ``dtype``; float32."""
    return (a.to(dtype) @ b.to(dtype)).float()
