"""Capture: any ``nn.Module`` -> a ``torch.fx`` graph that shares the module's parameters.

``torch.export`` (non-strict) is the tracer: on the 13 families of transformers that were tried it is the only route that
works on all of them. Batch and sequence stay symbolic. The graph is not decomposed, so that a SiLU is still a SiLU when the
matcher looks at it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.export._trace
from torch import Tensor, nn
from torch.fx import GraphModule

from .errors import CaptureError

# Sample sizes. Not 1 (export would specialise on it), all different, small: nothing is computed at capture but on fakes.
_BATCH, _LENGTH, _DECODER_LENGTH = 2, 11, 7


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        module: the live module that was captured.
        graph_module: its graph; parameters and buffers are the module's own tensors, under the same names.
        args: the positional example inputs.
        kwargs: the keyword example inputs.
        dynamic: for each tensor input, the dimensions that stayed symbolic, such as ``{"input_ids": (0, 1)}``.
    """

    module: nn.Module
    graph_module: GraphModule
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dynamic: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Small example inputs for a transformers model, read off its config.

    Returns:
        Keyword arguments: ``input_ids`` (2, 11) int64 for text, ``decoder_input_ids`` (2, 7) besides for an
        encoder-decoder, ``pixel_values`` (2, channels, size, size) for a vision model.

    Raises:
        CaptureError: the module is no transformers model, or takes inputs that cannot be guessed.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        raise CaptureError(
            f"{type(model).__name__} is not a transformers model, so its inputs cannot be guessed: pass example_inputs"
        )
    parameter = next(iter(model.parameters()), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    main = getattr(model, "main_input_name", "input_ids")
    inputs: dict[str, Any] = {}
    if main == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        shape = (_BATCH, getattr(config, "num_channels", 3), height, width)
        inputs[main] = torch.zeros(shape, device=device, dtype=dtype)
    elif main == "input_ids":
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        vocabulary = int(getattr(text_config, "vocab_size", 2))
        generator = torch.Generator().manual_seed(0)
        longest = int(getattr(text_config, "max_position_embeddings", None) or _LENGTH)
        length = min(_LENGTH, longest)
        inputs[main] = torch.randint(0, vocabulary, (_BATCH, length), generator=generator).to(device)
        if getattr(config, "is_encoder_decoder", False):
            decoder_shape = (_BATCH, min(_DECODER_LENGTH, longest))
            inputs["decoder_input_ids"] = torch.randint(0, vocabulary, decoder_shape, generator=generator).to(device)
    else:
        raise CaptureError(f"{type(model).__name__} takes '{main}', which cannot be guessed: pass example_inputs")
    return inputs


def normalise_inputs(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as (args, kwargs): a mapping is keyword arguments, a tuple or list positional, a tensor the only one
    (a transformers model's main input)."""
    if inputs is None:
        return (), example_inputs(model)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, Tensor):
        name = getattr(model, "main_input_name", None) if hasattr(model, "config") else None
        return ((inputs,), {}) if name is None else ((), {name: inputs})
    if isinstance(inputs, Sequence):
        return tuple(inputs), {}
    raise CaptureError(f"example inputs must be a tensor, a tuple or a dict, not {type(inputs).__name__}")


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """A transformers model that returns no KV cache, without an argument for it; its configs are as before afterwards."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None and hasattr(c, "use_cache")}
    before = [(config, config.use_cache) for config in configs.values()]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def _dynamic_shape(value: Any, dynamic: bool) -> Any:
    """AUTO for batch and sequence of a tensor: export keeps them symbolic where the model allows it."""
    if isinstance(value, Tensor):
        if not dynamic or value.dim() == 0:
            return None
        axes = range(min(2, value.dim()))
        return {axis: torch.export.Dim.AUTO for axis in axes if value.shape[axis] > 1} or None
    if isinstance(value, Mapping):
        return {key: _dynamic_shape(item, dynamic) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_dynamic_shape(item, dynamic) for item in value)
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _user_frame(error: BaseException) -> str:
    """The innermost frame outside torch in an exception's traceback: where the model itself stood."""
    place, trace = "", error.__traceback__
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if "/torch/" not in filename and "/moecompile/" not in filename and not filename.startswith("<"):
            place = f"{trace.tb_frame.f_code.co_qualname} ({filename}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place


def capture(model: nn.Module, inputs: Any = None, *, dynamic: bool = True) -> Captured:
    """Capture a module as a graph.

    Args:
        model: any module, in the mode (eval or train) in which it is to be looked at; it is not changed.
        inputs: example inputs (dict of keyword arguments, tuple of positional ones, or one tensor); guessed from the
            config of a transformers model when None.
        dynamic: keep dimensions 0 and 1 of every tensor input symbolic where the model allows it.

    Raises:
        CaptureError: with the reason, and the place in the model's code where the trace broke off.
    """
    args, kwargs = normalise_inputs(model, inputs)
    shapes: Any = None
    if dynamic:
        names = list(inspect.signature(model.forward).parameters)
        if args and len(names) < len(args):  # *args: export wants the tuple under the star's own name
            shapes = None
        else:
            shapes = {name: _dynamic_shape(value, True) for name, value in zip(names, args, strict=False)}
            shapes.update({name: _dynamic_shape(value, True) for name, value in kwargs.items()})
    try:
        # Where it fails on a size that depends on data it prints the whole graph.
        silent = mock.patch.object(torch.export._trace, "print", lambda *_, **__: None, create=True)
        with torch.no_grad(), without_cache(model), silent:
            program = torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes, strict=False)
            graph_module = program.module(check_guards=False)
    except Exception as error:  # torch.export raises dozens of types; each is a reason, none may escape as a traceback
        place = _user_frame(error)
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__}: {_first_line(error)}" + (f", at {place}" if place else "")
        ) from error
    assert isinstance(graph_module, GraphModule)
    found: dict[str, tuple[int, ...]] = {}
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor):
            found[str(node.target)] = tuple(i for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt))
    return Captured(model, graph_module, args, kwargs, found)
