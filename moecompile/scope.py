"""What a compiled function works with: the modules that it names or is given, and what a call depends on in each."""

from __future__ import annotations

import contextlib
import dis
import functools
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .apply import moe_blocks
from .block import MoEFFN
from .stock import stock_experts

_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_MOST = 256  # entries of a list or dict: it is looked through at each call


class Scope:
    """One module's MoE blocks and stock experts, found once. Nothing here keeps the module alive.

    Args:
        module: looked through at any depth.
    """

    def __init__(self, module: nn.Module) -> None:
        self._blocks = [weakref.ref(block) for block in moe_blocks(module).values()]
        self._experts = [weakref.ref(experts) for experts in stock_experts(module).values()]
        self.prepared: torch.device | None = None

    @property
    def blocks(self) -> list[MoEFFN]:
        """Its converted blocks."""
        return [block for each in self._blocks if (block := each()) is not None]

    @property
    def experts(self) -> list[nn.Module]:
        """The experts of transformers' MoE models that can be lowered."""
        return [module for each in self._experts if (module := each()) is not None]

    @property
    def dials(self) -> tuple[object, ...]:
        """The top-k settings; each has code of its own."""
        return tuple(block.dial for block in self.blocks)

    @property
    def device(self) -> torch.device | None:
        """Where the first expert lies; None where there is none."""
        for block in self.blocks:
            return block.experts.down_proj.device
        for experts in self.experts:
            return experts.down_proj.device  # type: ignore[return-value]
        return None

    def layouts(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """The projections whose layout kernels care about, and whether it is (..., B, A) for a parameter (..., A, B). CPU
        kernels read all matrices by neuron, GPU kernels as rows; transformers stores some experts turned."""
        for block in self.blocks:
            yield block.experts.down_proj, block.experts.down_proj.is_cpu
            if block.shared is not None:
                down: Any = block.shared.down_proj.weight
                yield down, down.is_cpu
        for experts in self.experts:
            up: Any = experts.gate_up_proj if experts.has_gate else experts.up_proj
            down, turned = experts.down_proj, bool(experts.is_transposed)
            yield up, turned
            yield down, turned != down.is_cpu


def modules_named(function: Any) -> list[nn.Module]:
    """The modules that a function names: in its closure, its globals and defaults, and what it is bound to, with the modules
    that these hold. Decorators that keep what they wrap (``torch.no_grad()``) are looked through."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    while function is not None and id(function) not in seen and len(seen) < _MOST:
        seen.add(id(function))
        if isinstance(function, functools.partial):
            found += modules_in([*function.args, *function.keywords.values()])
            function = function.func
            continue
        plain = getattr(function, "__func__", function)
        if isinstance(plain, types.FunctionType):
            found += modules_in(_values_of(plain, getattr(function, "__self__", None)))
        else:  # an object that can be called
            found += modules_in([function])
        function = getattr(function, "__wrapped__", None)
    return _distinct(found)


def _values_of(function: types.FunctionType, bound: Any) -> Iterator[Any]:
    yield bound
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in globals_of(function.__code__):
        if name in function.__globals__:
            yield function.__globals__[name]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            yield cell.cell_contents


@functools.lru_cache(maxsize=1024)
def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The global names that a function reads, and the functions within it. (``co_names`` has attributes as well.)"""
    names = [each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    inner = [name for each in code.co_consts if isinstance(each, types.CodeType) for name in globals_of(each)]
    return tuple(dict.fromkeys([*names, *inner]))


def modules_in(values: Iterable[Any]) -> list[nn.Module]:
    """The modules among values, in short lists and dicts among them, and among the attributes of other objects."""
    found = []
    for value in values:
        if isinstance(value, nn.Module):
            found.append(value)
            continue
        held: Any = value if isinstance(value, (list, tuple, dict)) else None
        if held is None and not isinstance(value, (Tensor, *_CODE)):
            held = getattr(value, "__dict__", None)
        if not isinstance(held, (list, tuple, dict)) or len(held) > _MOST:
            continue
        # Copied: another thread may change it.
        found += [each for each in list(held.values() if isinstance(held, dict) else held) if isinstance(each, nn.Module)]
    return _distinct(found)


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())
