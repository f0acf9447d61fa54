"""``moecompile.compile``: for modules, module classes, functions and methods, with and without arguments.

A compiled module is a second face of the same module: another class over the same attributes. It is an instance of the
module's class, has the same parameters under the same names, trains, saves and generates; calls of it run compiled code, calls
of the original do not. Every setting of the top-k dial has code of its own, so that turning it back costs nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from . import logs, stock
from .apply import moe_blocks
from .backend import Backend, CompileOptions
from .block_checks import check_blocks, check_experts
from .codegen import operators, packing, stored, triton_backend
from .conversion import convert
from .errors import CompileError, InputError, MatchError, MoECompileError
from .lowered import warn_once
from .overlay import share
from .plans import MoEPlan
from .recipes import Recipe
from .records import GraphRecord
from .scope import Scope, modules_in, modules_named
from .stock import ExpertsSwitch, refused_experts, stock_experts
from .tracing import calling, in_a_line

T = TypeVar("T")


class Compilation:
    """What stands behind one compiled module or function.

    Attributes:
        target: the module or function that was compiled.
        options: how.
        backend: the TorchDynamo backend, with a record of every graph.
    """

    def __init__(self, target: Any, options: CompileOptions, dynamic: bool | None) -> None:
        self.target, self.options, self.dynamic = target, options, dynamic
        self.backend = Backend(options)
        self._variants: dict[object, Callable[..., Any]] = {}
        self._scopes: WeakKeyDictionary[nn.Module, Scope] = WeakKeyDictionary()
        self._switch = ExpertsSwitch(target) if isinstance(target, nn.Module) else contextlib.nullcontext()

    @property
    def records(self) -> list[GraphRecord]:
        """The graphs compiled so far."""
        return self.backend.records

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the target, compiled."""
        # (is_compiling() is true in every thread while one compiles.)
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or "all" in logs.disabled():
            return self.target(*args, **kwargs)
        scopes = []
        for module in self._modules(args, kwargs):
            scopes.append(self._scopes.get(module) or self._scope(module))
        if not torch.is_grad_enabled():
            for scope in scopes:
                if scope.prepared != (device := scope.device):
                    _prepare(scope)
                    scope.prepared = device
        variant = self._variants.get(key := tuple([scope.dials for scope in scopes]))
        if variant is None:
            _load_ahead(scopes)
            variant = self._variants[key] = self._compile()
        handled = sys.exc_info()[1]  # by the caller, who may be within an except clause
        try:
            with self._switch, _breaks_told(self), calling(args, kwargs):
                return _settled(variant(*args, **kwargs))
        except Exception as error:  # TorchDynamo wraps what its backend raises
            below = None if error.__context__ is handled else error.__context__
            inner = getattr(error, "inner_exception", None) or error.__cause__ or below
            if isinstance(inner, MoECompileError):
                raise inner from None
            if isinstance(error, FailOnRecompileLimitHit):
                raise CompileError(f"{_name(self.target)} was compiled too often ({inner or error})") from error
            raise

    def _modules(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterable[nn.Module]:
        """What is compiled; of a function the modules that it names or is given."""
        if isinstance(self.target, nn.Module):
            return (self.target,)
        return dict.fromkeys((*modules_named(self.target), *modules_in((*args, *kwargs.values()))))

    def _scope(self, module: nn.Module) -> Scope:
        """Look through a module that is met for the first time.

        Raises:
            ParityError: with ``verify``, a block that is not the sum of its experts.
            CompileError: with ``fullgraph``, experts of a stock MoE that cannot be lowered.
        """
        if self.options.verify:
            check_blocks(module)
            check_experts(module)
        if module is self.target:  # of a function's modules perhaps not all are called: tracing says what it meets
            self._check_stock(module)
        scope = self._scopes[module] = Scope(module)
        return scope

    def _check_stock(self, module: nn.Module) -> None:
        """Say which experts of a stock MoE stay as they are.

        Raises:
            CompileError: there are some, and ``fullgraph`` was asked for.
        """
        told: dict[str, list[str]] = {}
        for path, reason in refused_experts(module).items():
            told.setdefault(reason, []).append(path)
        for reason, paths in told.items():
            where = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
            if self.options.fullgraph:
                raise CompileError(f"{where}: the experts cannot be lowered: {reason}")
            warn_once(f"{where}: the experts run their own forward: {reason}", depth=6)  # the caller's line
            stock.told.update((type(module.get_submodule(path)), reason) for path in paths)

    def _compile(self) -> Callable[..., Any]:
        """A function of its own code object, since TorchDynamo counts recompilations by code object."""
        target = self.target

        def forward(*args: Any, **kwargs: Any) -> Any:
            return target(*args, **kwargs)

        own = types.FunctionType(
            forward.__code__.replace(co_name=_name(target)), globals(), _name(target), None, forward.__closure__
        )
        own.__kwdefaults__ = None
        return torch.compile(own, backend=self.backend, fullgraph=self.options.fullgraph, dynamic=self.dynamic)


def _prepare(scope: Scope) -> None:
    """Before the first inference on a device: weights into the layout of its kernels.

    Those that an optimizer is training stay as they are, and kernels read copies: its moments are stored as the parameter
    was when they were made, and a fused step goes through the memory of both side by side.
    """
    trained = _trained()
    for parameter, turned in scope.layouts():
        if id(parameter) in trained or is_traceable_wrapper_subclass(parameter):  # a shard's layout is not ours to change
            continue
        # What is stored must be of the parameter's own kind: a normal tensor in inference mode could not be trained any
        # more if it were made one of inference, and one of inference cannot hold a normal one.
        with torch.inference_mode(parameter.is_inference()), torch.no_grad():
            if turned:
                packing.relayout_(parameter)
            elif not parameter.is_contiguous():  # was compiled on another device before
                parameter.data = parameter.data.contiguous()


def _load_ahead(scopes: Sequence[Scope]) -> None:
    """The library of CPU operators is found, or built, while TorchDynamo traces; the passes wait for it."""
    if any(parameter.is_cpu for scope in scopes for parameter, _ in scope.layouts()):
        threading.Thread(target=_load_operators, name="moecompile-operators", daemon=True).start()


def _trained() -> set[int]:
    """The identities of the parameters of which an optimizer holds state."""
    kinds = {torch.optim.Optimizer}
    while more := {kind for each in kinds for kind in type.__subclasses__(each)} - kinds:
        kinds |= more
    numbers = set(map(id, kinds))
    found = [each for each in gc.get_objects() if id(type(each)) in numbers]  # of a million: subclasses are asked for once
    return {id(parameter) for optimizer in found for parameter in optimizer.state}


def _load_operators() -> None:
    with contextlib.suppress(operators.Unavailable):  # the passes say so
        operators.load()


def _settled(outputs: Any) -> Any:
    """Outputs whose KV cache is contiguous. A prompt's keys come out of a compiled graph transposed, those of decoding do not,
    and TorchDynamo would compile decoding once for either."""
    layers = getattr(getattr(outputs, "past_key_values", None), "layers", ())
    for layer in layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or keys.requires_grad or keys.is_contiguous():
            break
        layer.keys, layer.values = keys.contiguous(), values.contiguous()
    return outputs


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", type(target).__name__))


@contextlib.contextmanager
def _breaks_told(compilation: Compilation) -> Iterator[None]:
    """One warning for every place where TorchDynamo had to leave the graph."""
    from torch._dynamo.utils import counters, graph_break_reasons

    known = len(graph_break_reasons)
    seen = counters["stats"]["calls_captured"], sum(counters["graph_break"].values())
    before = dict(counters["graph_break"]) if seen[1] else {}
    yield
    if seen != (counters["stats"]["calls_captured"], sum(counters["graph_break"].values())):
        for reason, count in counters["graph_break"].items():
            if count > before.get(reason, 0):
                where = _place(reason, graph_break_reasons[known:])
                told = f"{_name(compilation.target)}: a part runs in eager mode{where}: {in_a_line(reason)}"
                warn_once(told, depth=6)  # the caller's line


def _place(reason: str, causes: Sequence[Any]) -> str:
    """Where in the traced code it was, as TorchDynamo kept it."""
    head = next(iter(reason.strip().splitlines()), "")
    for cause in causes:
        if head in cause.reason and cause.user_stack:
            frame = cause.user_stack[-1]
            return f" at {frame.filename}:{frame.lineno} ({(frame.line or '').strip()})"
    return ""


class CompiledModule(nn.Module):
    """Mixed into the class of a compiled module; ``_moecompile`` is what stands behind it."""

    _moecompile: Compilation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, compiled."""
        return self._moecompile(*args, **kwargs)

    def get_compiled_call(self, compile_config: Any = None) -> Callable[..., Any]:
        """``generate`` of transformers asks for a compiled call where its cache is static: this is one."""
        return self.__call__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        own = self._moecompile
        return _compiled_module(copy.deepcopy(own.target, memo), own.options, own.dynamic)

    def __copy__(self) -> Any:
        own = self._moecompile
        return _compiled_module(copy.copy(own.target), own.options, own.dynamic)

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = self._moecompile
        return _compiled_module, (own.target, own.options, own.dynamic)


def _compiled_module(module: nn.Module, options: CompileOptions, dynamic: bool | None) -> nn.Module:
    """A second face of a module: the same attributes under a class whose calls are compiled."""
    base = type(module)
    compilation = Compilation(module, options, dynamic)
    attributes = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_moecompile": compilation}
    face = cast(nn.Module, object.__new__(type(base.__name__, (CompiledModule, base), attributes)))
    object.__setattr__(face, "__dict__", module.__dict__)
    return face


def _compiled_class(base: type[nn.Module], options: CompileOptions, dynamic: bool | None) -> type[nn.Module]:
    """The class itself, its instances compiled, each for itself. A subclass would not do: ``super(Net, self)`` in the
    class's own methods would find them again."""
    original = base.__dict__.get("_moecompile_plain", base.__call__)
    compilations: WeakKeyDictionary[nn.Module, Compilation] = WeakKeyDictionary()

    def of(module: nn.Module) -> Compilation:
        found = compilations.get(module)
        if found is None:
            own = type(module)  # perhaps a subclass
            attributes = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__call__": original}
            plain = cast(nn.Module, object.__new__(type(own.__name__, (own,), attributes)))
            object.__setattr__(plain, "__dict__", module.__dict__)
            found = compilations[module] = Compilation(plain, options, dynamic)
        return found

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return of(self)(*args, **kwargs)

    for name, value in (("__call__", call), ("_moecompile_plain", original), ("_moecompile", property(of))):
        setattr(base, name, value)
    return base


def _compiled_function(function: Callable[..., Any], options: CompileOptions, dynamic: bool | None) -> Callable[..., Any]:
    compilation = Compilation(function, options, dynamic)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return compilation(*args, **kwargs)

    run._moecompile = compilation  # type: ignore[attr-defined]
    return run


@overload
def compile(
    model: T,
    *,
    plan: MoEPlan | Recipe | None = None,
    calibration: Any = None,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    weights: str = "same",
    verify: bool = False,
    options: dict[str, Any] | None = None,
    disable: bool = False,
    example_inputs: Any = None,
) -> T: ...
@overload
def compile(
    model: None = None,
    *,
    plan: MoEPlan | Recipe | None = None,
    calibration: Any = None,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    weights: str = "same",
    verify: bool = False,
    options: dict[str, Any] | None = None,
    disable: bool = False,
    example_inputs: Any = None,
) -> Callable[[T], T]: ...
def compile(
    model: Any = None,
    *,
    plan: MoEPlan | Recipe | None = None,
    calibration: Any = None,
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    weights: str = "same",
    verify: bool = False,
    options: dict[str, Any] | None = None,
    disable: bool = False,
    example_inputs: Any = None,
) -> Any:
    """Compile a model, as ``torch.compile`` does, its expert FFNs by kernels written for them. Also a decorator.

    Args:
        model: a converted model, a dense one (with ``plan``), a stock MoE of transformers, any other module, a module class
            (which is changed: its instances are compiled), a function or a method.
        plan: split the dense model by this plan or recipe; the given model is left alone, what is not split is shared.
        calibration: model inputs for a recipe.
        mode: ``default``, ``reduce-overhead``, ``max-autotune`` or ``max-autotune-no-cudagraphs``.
        fullgraph: raise where a part cannot be compiled (TorchDynamo's own error where it cannot trace), instead of one warning
            and correct eager code.
        dynamic: as of ``torch.compile``; None keeps shapes symbolic from the start for models that generate (two graphs,
            prefill and decode), and otherwise from the second shape on.
        weights: how kernels read weights: ``same`` as stored; ``int8`` the experts', ``int8-all`` on CPUs also those of the
            other linear layers (projections, head); for a model on a GPU also ``int4``, and ``fp8`` from compute capability 8.9
            on. Rounded to nearest; activations and the stored weights stay as they are.
        verify: at first calls check that all experts together are the whole block, then compare each compiled graph with
            eager code, in inference layer by layer, in training with its gradients. (A rewrite by ``plan`` is compared with
            the dense model in any case.)
        options: Inductor's own options.
        disable: return the model as it is.
        example_inputs: to capture a dense model with; guessed for transformers models.

    Returns:
        A module of the same class over the same parameters, or a function; without ``model``, a decorator.

    Raises:
        InputError: an option that cannot be used as given.
        CompileError: when called with ``fullgraph``, what could not be compiled.
        ParityError: when called with ``verify``, the layer whose numbers are off.
        MatchError, PlanError, CaptureError: as of :func:`moecompile.convert`, with ``plan``.
    """
    if model is None:
        return functools.partial(
            compile, plan=plan, calibration=calibration, mode=mode, fullgraph=fullgraph, dynamic=dynamic, weights=weights,
            verify=verify, options=options, disable=disable, example_inputs=example_inputs,
        )  # fmt: skip
    if options is not None and not isinstance(options, dict):
        raise InputError(f"options must be a dict of Inductor's options, not {type(options).__name__}")
    chosen = CompileOptions(
        mode=mode or "default",
        weights=weights,
        verify=verify,
        fullgraph=fullgraph,
        options=tuple((options or {}).items()),
    )
    if disable:
        return model
    if isinstance(model, (classmethod, staticmethod)):  # the decorator stands above theirs
        inner = compile(
            model.__func__, plan=plan, calibration=calibration, mode=mode, fullgraph=fullgraph, dynamic=dynamic,
            weights=weights, verify=verify, options=options,
        )  # fmt: skip
        return type(model)(inner)
    if isinstance(model, type) and issubclass(model, nn.Module):
        _refuse_plan(plan, "a class")
        return _compiled_class(model, chosen, dynamic)
    if isinstance(model, nn.Module):
        while isinstance(model, CompiledModule):  # compiled already: once more, from the module itself
            model = model._moecompile.target
        _check_weights(model, weights)
        if weights != "same" and plan is None and not moe_blocks(model) and not stock_experts(model):
            warn_once(f"weights='{weights}' changes nothing: {type(model).__name__} has no experts")
        if plan is not None:
            model = rewritten(model, plan, calibration, example_inputs)
        if dynamic is None and isinstance(model, PreTrainedModel) and model.can_generate():
            dynamic = True
        return _compiled_module(model, chosen, dynamic)
    if callable(model):
        _refuse_plan(plan, "a function")
        return _compiled_function(model, chosen, dynamic)
    raise InputError(f"moecompile.compile takes a module or a function, not {type(model).__name__}")


def _check_weights(model: nn.Module, weights: str) -> None:
    """The devices that a model lies on have kernels for such weights.

    Raises:
        InputError: one has not.
    """
    for device in {parameter.device for parameter in model.parameters()} if weights in ("int4", "fp8") else ():
        if device.type == "cpu":
            raise InputError(
                f"weights='{weights}' is for GPUs; the model is on the CPU, whose kernels read 'same', 'int8', 'int8-all'"
            )
        reason = stored.refusal(weights, triton_backend.device_target(device), 2, 2)
        if reason:
            raise InputError(f"weights='{weights}': {reason}")


def _refuse_plan(plan: object, what: str) -> None:
    if plan is not None:
        raise InputError(f"plan= is for a module; {what} has no weights to split: compile the module itself")


def rewritten(model: nn.Module, plan: MoEPlan | Recipe, calibration: Any, example_inputs: Any) -> nn.Module:
    """A dense model with its FFNs split; everything else is the model's own. The graph where the module cannot hold a block."""
    try:
        result = convert(share(model), plan, calibration, inplace=True, example_inputs=example_inputs)
    except MatchError as error:
        if "form='graph'" not in str(error):
            raise
        logs.log("plan", f"{error}: rewritten in the captured graph")
        result = convert(model, plan, calibration, form="graph", example_inputs=example_inputs)
    for name, block in moe_blocks(result).items():
        logs.log("plan", f"{name}: {block.extra_repr()}")
    return result


def compilation_of(compiled: Any) -> Compilation:
    """What stands behind a compiled module or function.

    Raises:
        InputError: it was not compiled by :func:`compile`.
    """
    found = getattr(compiled, "_moecompile", None)
    if not isinstance(found, Compilation):
        raise InputError(f"{_name(compiled)} was not compiled by moecompile.compile")
    return found
