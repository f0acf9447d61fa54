"""What a compiled function works with: the modules that it names or is given, and what a call depends on in each."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .apply import moe_blocks
from .block import MoEFFN
from .stock import stock_experts

_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


class Scope:
    """One module's MoE blocks and stock experts, found once. Nothing here keeps the module alive.

    Args:
        module: looked through at any depth.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._blocks = [weakref.ref(block) for block in moe_blocks(module).values()]
        self._experts = [weakref.ref(experts) for experts in stock_experts(module).values()]
        self.checked = False
        self.prepared: torch.device | None = None

    @property
    def module(self) -> nn.Module | None:
        """The module, while there is one."""
        return self._module()

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

    def down_projections(self) -> Iterator[nn.Parameter]:
        """The projections that CPU kernels read by neuron."""
        for block in self.blocks:
            yield block.experts.down_proj
            if block.shared is not None:
                yield block.shared.down_proj.weight  # type: ignore[misc]
        for experts in self.experts:
            yield experts.down_proj  # type: ignore[misc]


def modules_named(function: Any) -> list[nn.Module]:
    """The modules that a function names: in its closure, its globals and defaults, and what it is bound to, with the modules
    that this holds."""
    if isinstance(function, functools.partial):
        inner = modules_named(function.func)
        return _distinct([*inner, *modules_in([*function.args, *function.keywords.values()])])
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    if code is None:  # an object that can be called
        return list(modules_in([function]))
    cells = dict(zip(code.co_freevars, plain.__closure__ or (), strict=True))
    values = [getattr(function, "__self__", None), *(plain.__defaults__ or ()), *(plain.__kwdefaults__ or {}).values()]
    values += [plain.__globals__[name] for name in _names(code) if name in plain.__globals__]
    for cell in cells.values():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    return list(modules_in(values))


def _names(code: types.CodeType) -> set[str]:
    inner = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def modules_in(values: Iterable[Any]) -> Iterator[nn.Module]:
    """The modules among values, in lists and dicts among them, and among the attributes of other objects."""
    found = []
    for value in values:
        if isinstance(value, nn.Module):
            found.append(value)
            continue
        held: Any = value if isinstance(value, (list, tuple, dict)) else None
        if held is None and not isinstance(value, (Tensor, *_CODE)):
            held = getattr(value, "__dict__", None)
        held = held.values() if isinstance(held, Mapping) else held or ()
        found += [each for each in held if isinstance(each, nn.Module)]
    yield from _distinct(found)


def _distinct(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for module in modules}.values())
