"""The CPU backend: a fused C++ kernel of a whole MoE FFN block, generated from a spec and compiled by Inductor's toolchain.

    emit: BlockKernelSpec -> C++      build: C++ -> a callable, kept on disk by hash      moe_ffn: tensors -> spec, built once

The number of tokens and ``top_k`` are arguments of a kernel: neither makes it compile again.
"""

from __future__ import annotations

import operator
import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import cast

import jinja2
import torch
from torch import Tensor

from ..activations import Activation
from ..errors import PlanError
from ..logs import log
from . import packing
from .block_spec import CPP_TYPES, BlockKernelSpec
from .cpp_expressions import Unsupported, activation_function

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_TEMPLATES = Path(__file__).parent / "templates"


class Unavailable(RuntimeError):
    """A generated kernel cannot be had here; the message is one line that says why."""


# emit and build


@lru_cache(maxsize=1)
def available() -> str | None:
    """Why no kernel can be compiled here, or None when one can."""
    try:
        from torch._inductor.codecache import CppPythonBindingsCodeCache  # noqa: F401
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        return f"there is no working C++ compiler: {_line(error)}"
    return None


@lru_cache(maxsize=256)
def unsupported(activation: str) -> str | None:
    """Why there is no kernel for blocks with this activation, or None."""
    try:
        activation_function(activation)
    except (Unsupported, PlanError) as error:
        return _line(error)
    return available()


def _line(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


@lru_cache(maxsize=4)
def template(name: str) -> jinja2.Template:
    """A template of C++ source."""
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(name)


def emit(spec: BlockKernelSpec) -> str:
    """The C++ source of the kernel for ``spec``.

    Raises:
        Unavailable: the activation has no C++ form.
    """
    try:
        activation = activation_function(spec.activation)
    except (Unsupported, PlanError) as error:
        raise Unavailable(_line(error)) from error
    name = Activation(spec.activation).name.replace("\n", " ")
    summary = (
        f"MoE FFN block: {spec.experts} experts of {spec.expert_width} neurons, {spec.shared_width} shared, D = "
        f"{spec.hidden_size}, {name}, {spec.dtype}, weights {spec.weight_format}, routing {spec.routing}"
    )
    weighted = spec.score != "none" if spec.linear else spec.weighted
    first = "gate" if spec.gated else "up"  # what is read first of a neuron
    return template("moe_block.cpp.jinja").render(
        spec=spec, types=CPP_TYPES, activation=activation, summary=summary, weighted=weighted, first=first
    )


_lock = threading.Lock()
_sources: dict[BlockKernelSpec, str] = {}
_kernels: dict[BlockKernelSpec, Callable[..., None] | str] = {}  # a text is the reason why it failed


def build(spec: BlockKernelSpec) -> Callable[..., None]:
    """The compiled kernel; its arguments are ``spec.arguments``. Built once per process, found on disk when built before.

    Raises:
        Unavailable: it could not be compiled; a second call says so again without trying.
    """
    with _lock:
        kernel = _kernels.get(spec)
        if kernel is None:
            start = time.time()
            try:
                kernel = _compile(spec)
                log("cache", f"CPU kernel {spec.name}: {origin(getattr(kernel, '__self__', None), start)}")
            except Unavailable as error:
                kernel = str(error)
            _kernels[spec] = kernel
    if isinstance(kernel, str):
        raise Unavailable(kernel)
    return kernel


def origin(library: object, start: float) -> str:
    """Where a library comes from that was asked for at ``start`` (``time.time()``), in words."""
    path = str(getattr(library, "__file__", None) or getattr(library, "_name", ""))
    try:
        found = os.stat(path).st_mtime < start
    except OSError:  # no file, or none any more
        return f"loaded in {time.time() - start:.1f} s"
    return f"{'found on disk' if found else 'built'} in {time.time() - start:.1f} s: {path}"


def _compile(spec: BlockKernelSpec) -> Callable[..., None]:
    code = emit(spec)
    if (reason := available()) is not None:
        raise Unavailable(reason)
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    try:
        kernel = CppPythonBindingsCodeCache.load_pybinding([kind for kind, _ in spec.arguments], code)
    except Exception as error:
        raise Unavailable(first_error(error)) from error
    _sources[spec] = code
    return kernel


def first_error(error: Exception) -> str:
    """What a C++ compiler says first, in a line."""
    lines = [line for line in str(error).splitlines() if "error:" in line]
    return f"the C++ compiler failed: {_line(RuntimeError(lines[0])) if lines else _line(error)}"


def source(spec: BlockKernelSpec) -> str:
    """The C++ source that runs for ``spec``: the one that was built, or the one that would be."""
    return _sources.get(spec) or emit(spec)


# launch

# Operands of moe_ffn that stay the same from call to call, in order.
STATIC = (
    "router_weight", "router_bias", "up", "down", "up_bias", "down_bias", "shared_gate", "shared_up", "shared_down",
    "shared_gate_bias", "shared_up_bias", "bias",
)  # fmt: skip
_MATRICES = ("up", "down", "shared_gate", "shared_up", "shared_down")
_BIASES = ("up_bias", "down_bias", "shared_gate_bias", "shared_up_bias", "bias")


class _Bound:
    """A kernel and the weights of one block: everything that a call need not look at again.

    Attributes:
        kernel: the compiled kernel.
        spec: what it was compiled for.
        pick: takes the kernel's weight arguments out of operands + parts.
        parts: copies of weights in the form that the kernel wants.
        versions: (index of an operand, version of it, address of it) for each copied operand.
        lasting: whether all copied operands are such that a copy may be used again.
        addresses: where the kernel's weight arguments are. The kernel compares: a parameter whose ``.data`` was replaced is the
            same object elsewhere.
    """

    __slots__ = ("addresses", "kernel", "lasting", "parts", "pick", "references", "spec", "versions")

    def __init__(self, spec: BlockKernelSpec, operands: tuple[Tensor | None, ...]) -> None:
        self.spec, self.kernel = spec, build(spec)
        named, made = dict(zip(STATIC, operands, strict=True)), dict[str, Tensor]()
        forms = {name: form for name, tensor in named.items() if tensor is not None and (form := form_of(name, tensor, spec))}
        for name, form in forms.items():
            packed = _packed(named[name], form)
            made[name] = packed[0]
            if len(packed) == 2:
                made[f"{name}_scale"] = packed[1]
        copied = [(STATIC.index(name), tensor) for name in forms if (tensor := named[name]) is not None]
        self.versions = tuple((index, tensor._version, tensor.data_ptr()) for index, tensor in copied)
        self.lasting = all(packing.lasts(tensor) for _, tensor in copied)
        self.parts = tuple(made.values())
        places = {name: len(STATIC) + place for place, name in enumerate(made)}
        indices = [places[name] if name in places else STATIC.index(name) for name in spec.weights]
        self.pick = operator.itemgetter(*indices)  # always two at least: up and down
        picked = self.pick(operands + self.parts)
        self.addresses = torch.tensor([tensor.data_ptr() for tensor in picked])


def form_of(name: str, tensor: Tensor, spec: BlockKernelSpec) -> str | None:
    """How the kernel wants an operand, a key of :data:`packing.FORMS`; None where it takes it as it is."""
    if name in _MATRICES:
        rows = "neurons" if name.endswith("down") else "rows"
        if spec.quantised:
            return f"int8 {rows}"
        stored = packing.by_neuron(tensor) if rows == "neurons" else tensor.is_contiguous()
        return None if stored else rows
    wanted = spec.router_dtype if name.startswith("router") else spec.bias_dtype
    if _DTYPES[tensor.dtype] != wanted:
        return "float32"
    return None if tensor.is_contiguous() else "rows"


def _packed(tensor: Tensor | None, form: str) -> tuple[Tensor, ...]:
    assert tensor is not None
    if tensor.is_inference():
        raise Unavailable("a weight has to be copied, but is an inference tensor, whose changes cannot be seen")
    try:
        return packing.cache.get(tensor, form)
    except ValueError as error:
        raise Unavailable(_line(error)) from error


# By the identities of the operands and what else a spec depends on. An entry goes when one of its tensors does.
_bound: dict[tuple[object, ...], _Bound] = {}


def moe_ffn(
    x: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    ids: Tensor | None,
    weights: Tensor | None,
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
    top_k: int,
    score: str,
    normalise: bool,
    activation: str,
    gated: bool,
    weight_format: str,
) -> Tensor:
    """A whole MoE FFN block in one kernel:  y_t = shared(x_t) + sum_k w_tk (W2_e h_e + b2_e) + bias.

    T tokens, N experts, K = ``top_k`` chosen, D hidden, I expert width, S shared width, G = 2 if gated else 1. All on the CPU;
    arithmetic, router scores included, is float32. Weights are recognised by identity and address: after ``param.data = ...``
    with a view of the same memory in another shape, make the parameter anew.

    Args:
        x: (T, D) float32, bfloat16 or float16.
        router_weight: (N, D), scores are computed here; or None, then ``ids`` is given. With neither, K is 0 or N.
        router_bias: (N,) or None.
        ids: (T, K) int64 expert numbers.
        weights: (T, K), or None for 1.
        up: (N, G*I, D), gate rows first.
        down: (N, D, I), best stored by neuron (:func:`packing.relayout_`); copied otherwise, parameters once per
            version of them.
        up_bias: (N, G*I) or None.
        down_bias: (N, D) or None.
        shared_gate: (S, D) or None.
        shared_up: (S, D) or None.
        shared_down: (D, S) or None, best stored by neuron.
        shared_gate_bias: (S,) or None.
        shared_up_bias: (S,) or None.
        bias: (D,) or None.
        top_k: 0 to N.
        score: ``none``, ``softmax`` or ``sigmoid``; for computed scores only.
        normalise: whether computed weights are divided by their sum over the chosen.
        activation: a name or expression of :mod:`moecompile.activations`.
        gated: whether there is a gate projection.
        weight_format: ``same``, or ``int8``: weights are quantised per row, parameters once per version of them.

    Returns:
        (T, D), dtype of x.

    Raises:
        Unavailable: there is no kernel for these operands here.
        IndexError: an expert number is outside 0..N-1.
        ValueError: shapes do not fit.
    """
    operands = (
        router_weight, router_bias, up, down, up_bias, down_bias, shared_gate, shared_up, shared_down,
        shared_gate_bias, shared_up_bias, bias,
    )  # fmt: skip
    key = (*map(id, operands), x.dtype, score, normalise, activation, gated, weight_format, weights is None)
    bound = _bound.get(key)
    if bound is None:
        bound = _bind(key, x, operands, weights is not None, score, normalise, activation, gated, weight_format)
    for index, version, address in bound.versions:
        tensor = cast(Tensor, operands[index])
        if tensor._version != version or tensor.data_ptr() != address:
            bound = _bind(key, x, operands, weights is not None, score, normalise, activation, gated, weight_format)
            break
    tokens, hidden = x.shape
    spec = bound.spec
    if hidden != spec.hidden_size or not x.is_cpu or not 0 <= top_k <= spec.experts:
        raise _misfit(x, top_k, spec)
    x = x if x.is_contiguous() else x.contiguous()
    out = torch.empty_like(x)
    if tokens == 0:
        return out
    routing: tuple[Tensor, ...] = ()
    if router_weight is None:
        routing = _given(ids, weights, tokens, top_k, spec)
    arguments = bound.pick(operands + bound.parts)
    try:
        bound.kernel(out, x, *routing, *arguments, bound.addresses, tokens, top_k, torch.get_num_threads())
    except RuntimeError as error:
        if str(error) == "moved":
            _bound.pop(key, None)
            return moe_ffn(
                x, router_weight, router_bias, ids, weights, up, down, up_bias, down_bias, shared_gate, shared_up, shared_down,
                shared_gate_bias, shared_up_bias, bias, top_k, score, normalise, activation, gated, weight_format,
            )  # fmt: skip
        if str(error).startswith("expert number"):
            raise IndexError(f"moe_ffn: {error}") from None
        raise
    return out


def _misfit(x: Tensor, top_k: int, spec: BlockKernelSpec) -> Exception:
    if not x.is_cpu:
        return Unavailable("a tensor is not on the CPU")
    return ValueError(f"moe_ffn: x {tuple(x.shape)} and top_k {top_k} do not fit D = {spec.hidden_size}, N = {spec.experts}")


def _given(ids: Tensor | None, weights: Tensor | None, tokens: int, top_k: int, spec: BlockKernelSpec) -> tuple[Tensor, ...]:
    """The routing operands as the kernel wants them."""
    if ids is None:
        if top_k not in (0, spec.experts):
            raise ValueError(f"moe_ffn: neither a router nor ids are given, so top_k is 0 or {spec.experts}, not {top_k}")
        ids = torch.arange(top_k).expand(tokens, -1)
    shape = (tokens, top_k)
    if ids.shape != shape or ids.dtype != torch.int64 or not ids.is_cpu:
        raise ValueError(f"moe_ffn: ids are {tuple(ids.shape)} {_name(ids.dtype)} and should be {shape} int64 on the CPU")
    if weights is None:
        return (ids.contiguous(),)
    if weights.shape != shape or not weights.is_cpu:
        raise ValueError(f"moe_ffn: weights are {tuple(weights.shape)} and should be {shape}, on the CPU")
    return ids.contiguous(), weights.detach().to(torch.float32).contiguous()


def _bind(
    key: tuple[object, ...],
    x: Tensor,
    operands: tuple[Tensor | None, ...],
    weighted: bool,
    score: str,
    normalise: bool,
    activation: str,
    gated: bool,
    weight_format: str,
) -> _Bound:
    spec = spec_of(x, dict(zip(STATIC, operands, strict=True)), weighted, score, normalise, activation, gated, weight_format)
    bound = _Bound(spec, operands)
    if bound.lasting:
        bound.references = [weakref.ref(tensor, lambda _: _bound.pop(key, None)) for tensor in operands if tensor is not None]
        _bound[key] = bound
    return bound


def spec_of(
    x: Tensor,
    named: dict[str, Tensor | None],
    weighted: bool,
    score: str,
    normalise: bool,
    activation: str,
    gated: bool,
    weight_format: str,
) -> BlockKernelSpec:
    """The spec of the kernel for these operands, which are looked at for their shapes and types alone.

    Args:
        x: (T, D).
        named: the operands of :func:`moe_ffn` that stay the same from call to call, by name; all of them.
        weighted: whether weights of the chosen are given.

    Raises:
        Unavailable: no kernel takes them.
        ValueError: shapes do not fit.
    """
    if any(tensor is not None and not tensor.is_cpu for tensor in (x, *named.values())):
        raise Unavailable("a tensor is not on the CPU")
    if any(tensor is not None and tensor.layout != torch.strided for tensor in (x, *named.values())):
        raise Unavailable("a tensor is sparse")
    if x.dtype not in _DTYPES:
        raise Unavailable(f"there is no CPU kernel for {_name(x.dtype)}")
    if weight_format not in ("same", "int8"):
        raise Unavailable(f"the CPU kernel has no weight format '{weight_format}'")
    stored = _common(named, _MATRICES, "weights")
    if stored is None:
        raise Unavailable("the weights are of several types")
    up, down, shared_up = named["up"], named["down"], named["shared_up"]
    assert up is not None and down is not None
    linear = named["router_weight"] is not None
    spec = BlockKernelSpec(
        hidden_size=up.shape[-1],  # that of x may be symbolic
        expert_width=down.shape[-1],
        shared_width=0 if shared_up is None else shared_up.shape[0],
        experts=up.shape[0],
        gated=gated,
        activation=activation,
        dtype=_DTYPES[x.dtype],
        weight_format="int8" if weight_format == "int8" else stored,
        routing="linear" if linear else "given",
        score=score if linear else "none",
        normalise=linear and normalise and score != "none",
        weighted=weighted and not linear,
        up_bias=named["up_bias"] is not None,
        down_bias=named["down_bias"] is not None,
        shared_bias=named["shared_up_bias"] is not None,
        output_bias=named["bias"] is not None,
        router_bias=linear and named["router_bias"] is not None,
        bias_dtype=_common(named, _BIASES, "biases") or "float32",
        router_dtype=_common(named, ("router_weight", "router_bias"), "the router") or "float32",
    )
    _check_shapes(named, spec)
    return spec


def _common(named: dict[str, Tensor | None], names: tuple[str, ...], what: str) -> str | None:
    """The one type of these operands, None if there are several."""
    types = {tensor.dtype for name in names if (tensor := named[name]) is not None}
    for dtype in types:
        if dtype not in _DTYPES:
            raise Unavailable(f"{what}: there is no CPU kernel for {_name(dtype)}")
    return _DTYPES[types.pop()] if len(types) == 1 else None


def _check_shapes(named: dict[str, Tensor | None], spec: BlockKernelSpec) -> None:
    d, i, s, n = spec.hidden_size, spec.expert_width, spec.shared_width, spec.experts
    rows = 2 * i if spec.gated else i
    wanted = {
        "router_weight": (n, d), "router_bias": (n,), "up": (n, rows, d), "down": (n, d, i), "up_bias": (n, rows),
        "down_bias": (n, d), "shared_gate": (s, d), "shared_up": (s, d), "shared_down": (d, s), "shared_gate_bias": (s,),
        "shared_up_bias": (s,), "bias": (d,),
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != wanted[name]:
            raise ValueError(f"moe_ffn: {name} is {tuple(tensor.shape)} and should be {wanted[name]}")
    together = [("shared_up", "shared_down", s > 0), ("shared_up", "shared_gate", s > 0 and spec.gated)]
    together += [("shared_up_bias", "shared_gate_bias", spec.gated)]
    for first, second, both in together:
        if both and (named[first] is None) != (named[second] is None):
            raise ValueError(f"moe_ffn: one of {first} and {second} is missing")
    if not spec.gated and (named["shared_gate"] is not None or named["shared_gate_bias"] is not None):
        raise ValueError("moe_ffn: a block without gates has a shared gate")
    if named["shared_up_bias"] is not None and not s:
        raise ValueError("moe_ffn: there is a shared bias, but no shared neurons")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
