"""Kernel specs; knows nothing of models."""

from __future__ import annotations

from .spec import ExpertKernelSpec

__all__ = ["ExpertKernelSpec"]
