"""MoE models that transformers already has, served by the operator of this project.

transformers lets every experts module that carries ``@use_experts_implementation`` (Mixtral, Qwen-MoE, OLMoE, DeepSeek, ...)
compute its experts by a registered function. The one registered here, ``"moecompile"``, is a single ``expert_ffn``:

    y_t = sum_k w_tk (W2_e h + b2_e),  h = act(G_e x_t + bg_e) * (U_e x_t + bu_e),  e = ids_tk

What that formula cannot express is refused with a reason, and the module runs its own eager forward.
Letters: T tokens, N experts, K chosen, D hidden, I expert width.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from .activations import NAMED, Activation, probe
from .ops import expert_ffn

NAME = "moecompile"

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MARKS = {"config", "has_gate", "has_bias", "is_transposed", "is_concatenated"}  # what the decorator sets on a module
_USUAL_GATE = "transformers.integrations.moe"  # where act(gate) * up is defined; a model's own gate is defined elsewhere
_unregistered: str | None = "the experts implementation is not registered: call register_experts()"
told: set[tuple[type, str]] = set()  # what was said of which class
# Modules found to be served, with their act_fn at that time and its name. Without it a call spent 15 us on the checks.
_served: weakref.WeakKeyDictionary[nn.Module, tuple[object, str]] = weakref.WeakKeyDictionary()


def register_experts() -> None:
    """Register the experts implementation ``"moecompile"`` with transformers; calling it again changes nothing.

    It is then a value of ``model.set_experts_implementation(...)`` and of ``from_pretrained(..., experts_implementation=...)``.
    Where transformers has no such interface nothing is raised: :func:`refused_experts` gives the reason.
    """
    global _unregistered
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    except (ImportError, AttributeError) as error:
        _unregistered = f"this version of transformers has no interface for experts ({error})"
        return
    _unregistered = None
    try:  # FP8 models look their experts up in a table of their own, where an unknown name is an error
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

        ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    except (ImportError, AttributeError):
        pass


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module: one ``expert_ffn``, or the module's own eager forward and one warning.

    It computes in the dtype of the weights (of autocast where that is on), and is traceable without graph breaks.

    Args:
        self: the experts module.
        hidden_states: (T, D) tokens.
        top_k_index: (T, K) integers, all different within a row.
        top_k_weights: (T, K), any floating dtype.

    Returns:
        (T, D), dtype of hidden_states.
    """
    activation = _activation_or_warn(self)
    if activation is None:
        return inspect.unwrap(type(self).forward)(self, hidden_states, top_k_index, top_k_weights)
    up, down, up_bias, down_bias = weights_of(self)
    kind = hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else up.dtype
    y = expert_ffn(
        _to(hidden_states, dtype),
        _to(top_k_index, torch.int64),
        _to(top_k_weights, dtype),
        _to(up, dtype),
        _to(down, dtype),
        None if up_bias is None else _to(up_bias, dtype),
        None if down_bias is None else _to(down_bias, dtype),
        activation,
        bool(self.has_gate),
    )
    return _to(y, hidden_states.dtype)


def stock_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a transformers model that ``"moecompile"`` serves, by path."""
    return {path: module for path, module in _experts(model) if refusal(module) is None}


def refused_experts(model: nn.Module) -> dict[str, str]:
    """The experts modules that would run their own eager forward: path -> reason.

    Modules without ``@use_experts_implementation`` never ask for an implementation; they appear nowhere.
    """
    return {path: reason for path, module in _experts(model) if (reason := refusal(module)) is not None}


# What configurations of transformers call K (those of `use_experts_implementation`, 5.23).
_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_selected_experts")


def chosen(model: nn.Module, experts: nn.Module) -> int | None:
    """K of a module of experts, as its configuration or the model's says; None where neither does."""
    own: list[Any] = [one for each in (experts, model) if (one := getattr(each, "config", None)) is not None]
    for config in [*own, *(each.get_text_config() for each in own if hasattr(each, "get_text_config"))]:
        for name in _CHOSEN:
            if isinstance(found := getattr(config, name, None), int) and found > 0:
                return found
    return None


def all_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules whose weights are stored as the operator wants them, by path, whether it serves them or not."""
    return {path: module for path, module in _experts(model) if _weights_refusal(module) is None}


def width_of(experts: nn.Module) -> tuple[int, int, int]:
    """(N, D, I) of an experts module."""
    _, down, _, _ = weights_of(experts)
    return down.shape[0], down.shape[1], down.shape[2]


class ExpertsSwitch:
    """Sets ``"moecompile"`` for a model while it is entered, and what was set before when it is left.

    The configurations are looked up once, so that it may be entered at each forward call (15 us for one configuration), and
    again while it is entered. Configurations that only refused experts read are left alone.

    Args:
        model: any module; its experts are found at any depth, with sub-configurations of their own or not.
    """

    def __init__(self, model: nn.Module) -> None:
        configs = {id(module.config): module.config for module in stock_experts(model).values()}
        # The internal attribute: the public one would be set on all sub-configurations too.
        internal = "_experts_implementation_internal"
        self._places = [(c, internal if hasattr(c, internal) else "_experts_implementation") for c in configs.values()]
        self._before: list[list[Any]] = []

    def __enter__(self) -> ExpertsSwitch:
        self._before.append([getattr(config, name, None) for config, name in self._places])
        for config, name in self._places:
            setattr(config, name, NAME)
        return self

    def __exit__(self, *_: object) -> None:
        for (config, name), value in zip(self._places, self._before.pop(), strict=True):
            setattr(config, name, value)


@contextmanager
def using_moecompile_experts(model: nn.Module) -> Iterator[None]:
    """Experts of the model run through ``"moecompile"`` inside the block; the previous implementations are restored behind it.

    For many short blocks make one :class:`ExpertsSwitch` and enter that.
    """
    with ExpertsSwitch(model):
        yield


def _experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, module) of all modules that ask transformers for an experts implementation."""
    for path, module in model.named_modules():
        if vars(module).keys() >= _MARKS and hasattr(type(module).forward, "__wrapped__"):
            yield path, module


def _to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # no node in a traced graph where nothing changes


def weights_of(module: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """up (N, G*I, D), down (N, D, I) and their biases (N, G*I), (N, D) or None; transposed storage is viewed, not copied."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    if not module.has_bias:
        return up, down, None, None
    return up, down, getattr(module, f"{name}_bias"), module.down_proj_bias


@torch.compiler.assume_constant_result
def _activation_or_warn(module: Any) -> str | None:
    """The name of the module's activation, or None and one warning for each class and reason; a constant to tracing."""
    act = getattr(module, "act_fn", None)
    known = _served.get(module)
    if known is not None and known[0] is act:
        return known[1]
    reason = refusal(module)
    if reason is not None:
        _warn_once(type(module), reason)
        return None
    name = _activation(module.act_fn)
    assert name is not None
    _served[module] = act, name
    return name


def _warn_once(kind: type, reason: str) -> None:
    if (kind, reason) not in told:
        told.add((kind, reason))
        text = f"{kind.__name__} runs its own eager forward, not moecompile's: {reason}"
        warnings.warn(f"{text}; experts_implementation='grouped_mm' may be faster for it", UserWarning, stacklevel=4)


def refusal(module: Any) -> str | None:
    """Why ``expert_ffn`` cannot compute this experts module, or None."""
    if _unregistered is not None:
        return _unregistered
    if getattr(module, "_is_expert_parallel", _many_processes()):
        return "its experts are spread over processes (expert parallel), and ids may name experts of another one"
    if (reason := _weights_refusal(module)) is not None:
        return reason
    if module.has_gate and getattr(type(module)._apply_gate, "__module__", "") != _USUAL_GATE:
        return "it has a gate of its own (_apply_gate), which is not act(gate) * up"
    if module.has_gate and not module.is_concatenated:
        return "its gate and up rows are interleaved; the operator wants all gate rows first"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalises the output of each expert (post_expert_norm)"
    return _activation_refusal(module)


def _many_processes() -> bool:
    """transformers 5.17 does not mark expert parallel modules: assume the worst where there is more than one process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _weights_refusal(module: Any) -> str | None:
    try:
        up, down, up_bias, down_bias = weights_of(module)
    except (AttributeError, IndexError) as error:
        return f"its weights are not stored as 3-D tensors under the usual names ({error})"
    given = [tensor for tensor in (up, down, up_bias, down_bias) if tensor is not None]
    for tensor in given:
        if not isinstance(tensor, Tensor) or is_traceable_wrapper_subclass(tensor):
            return f"its weights are of {type(tensor).__name__}, not plain tensors"
        if tensor.dtype not in _DTYPES:
            return f"its weights are quantized ({tensor.dtype})"
    halves = 2 if module.has_gate else 1
    if up.dim() != 3 or down.shape != (up.shape[0], up.shape[2], up.shape[1] // halves):
        return f"its weights {tuple(up.shape)} and {tuple(down.shape)} do not fit each other"
    return None


def _activation_refusal(module: Any) -> str | None:
    act = getattr(module, "act_fn", None)
    if act is None:
        return "it has no activation (act_fn)"
    if _activation(act) is None:
        return f"its activation {getattr(act, '__name__', type(act).__name__)} is none of: {', '.join(NAMED)}"
    return None


def _activation(act: Callable[[Tensor], Tensor]) -> str | None:
    """The name in ``activations.NAMED`` of a function or module, found by its numbers; None where no name fits."""
    if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
        return None  # training could change what it computes
    # Under export the model runs on fake tensors, and on another default device perhaps; here numbers are needed.
    with _disable_current_modes(), torch.device("cpu"), torch.no_grad():
        grid = probe()
        try:
            value = act(grid.clone())
        except Exception:  # foreign code: whatever cannot be evaluated on plain numbers is not recognised
            return None
        if not isinstance(value, Tensor) or value.shape != grid.shape or value.dtype != grid.dtype:
            return None
        for name in NAMED:
            if torch.allclose(value, Activation(name)(grid), rtol=1e-9, atol=1e-12):
                return name
    return None
