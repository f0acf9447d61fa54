"""The pre-gating router inside a model: it runs before the first layer, and every block reads its decision.

The model's own forward decides, calls the dense forward, and forgets the decision: plain Python on one object that the router
and the blocks share, so that torch.export and TorchDynamo trace it into one graph. The router's keys and values are one more
layer at the end of the model's own cache: whatever crops, reorders, repeats or selects that cache does it to both.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from .errors import InputError, MatchError
from .pregate import KIND, PreGateSpec, PreGatingRouter, Routing, RoutingPlan, positions_of
from .reading import IDS, MASK, embedder, ids_and_mask, refusal

if TYPE_CHECKING:
    from .block import MoEFFN
    from .plans import MoEPlan


class _Wrapping:
    """A layer behind the model's last one. It stays on its device; a cache that offloads its layers, which fetches the next one
    ahead, is led on to the first."""

    following: Any = None

    def prefetch(self) -> None:
        """Fetch the model's first layer of the next step."""
        if self.following is not None:
            self.following.prefetch()


class RouterLayer(_Wrapping, DynamicLayer):
    """The router's keys and values in a growing cache."""

    _layer_type = None


class StaticRouterLayer(_Wrapping, StaticLayer):
    """The router's keys and values in a cache of fixed size."""

    _layer_type = None


class PreGate(nn.Module):
    """What a model holds under the name ``pregate``: the router, and what it shares with the blocks.

    Args:
        spec: the router's shape.
        routing: shared with the blocks.
        layers: how many layers the model's own cache has.
    """

    def __init__(self, spec: PreGateSpec, routing: Routing, layers: int) -> None:
        super().__init__()
        self.router = PreGatingRouter(spec)
        self.routing, self.layers = routing, layers

    def begin(self, model: nn.Module, inputs: dict[str, Any], caches: bool) -> dict[str, Any]:
        """Decide for a step; the plan stands in ``routing`` afterwards.

        Args:
            model: whose forward is about to run.
            inputs: its keyword arguments.
            caches: whether it takes a cache.

        Returns:
            The arguments, with a cache where the model would have made one itself.

        Raises:
            InputError: there are no token ids, or the cache was not filled by this model.
        """
        ids = inputs.get(self.router.spec.argument or IDS)
        if ids is None:
            name = self.router.spec.argument or f"{IDS}, not with inputs_embeds"
            raise InputError(f"the pre-gating router reads token ids: call the model with {name}")
        if self.router.spec.argument:
            self._check_others(inputs)
        cache = inputs.get("past_key_values")
        wanted = inputs.get("use_cache")
        wanted = model.config.use_cache if wanted is None and caches else wanted  # type: ignore[union-attr]
        if cache is None and caches and wanted:
            cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
            inputs["past_key_values"] = cache
        layer = None if cache is None else self._layer(cache)
        k = self.routing.wanted()
        if k or layer is not None:  # a cache is kept up to date whatever the dial says: it may be turned later
            hidden = self._hidden(self.tokens(model, ids), inputs.get(MASK), inputs.get("position_ids"), layer)
            self.routing.plan = self._plan(hidden, k) if k else None
            if self._again(model) and not torch.compiler.is_compiling():
                self._remember(model)
        return inputs

    def _hidden(self, tokens: Tensor, mask: Any, index: Tensor | None, layer: Any) -> Tensor:
        batch, length = tokens.shape[:2]
        past = 0 if layer is None else layer.get_seq_length()
        if isinstance(layer, StaticRouterLayer):
            past, keys = torch.as_tensor(past, device=tokens.device), layer.max_cache_len  # (an int before its first token)
        else:
            keys = past + length
        if isinstance(mask, dict):  # ready masks, one for each kind of layer
            mask = mask.get("full_attention")
        positions = positions_of(batch, length, past, keys, mask, index, tokens.device, packed=layer is None)
        return self.router.hidden(tokens, positions, layer)

    def _check_others(self, inputs: Mapping[str, Any]) -> None:
        """A model that is none of transformers may take a cache of its own, of which the router would know nothing."""
        for name, value in inputs.items():
            known = name in (self.router.spec.argument, MASK) or value is None or isinstance(value, (bool, int, float, str))
            if not known:
                raise InputError(f"the pre-gating router does not know what '{name}' holds; it reads whole texts of token ids")

    def tokens(self, model: nn.Module, ids: Tensor) -> Tensor:
        """What the router reads for (B, S) ids: the model's embeddings (B, S, E), without gradients, or the ids themselves."""
        return embedder(model, self.router.spec)(ids)

    def forward(self, ids: Tensor, mask: Tensor | None, table: Tensor | None) -> Tensor:
        """Decide within a graph, which has no forward of a model around it.

        Args:
            ids: (B, S).
            mask: (B, S) of real tokens.
            table: (V, E) that embeds ids; None where the router has its own.

        Returns:
            The ids; what reads them comes behind the decision.
        """
        k = self.routing.wanted()
        if k:
            tokens = ids if table is None else nn.functional.embedding(ids, table).detach()
            self.routing.plan = self._plan(self._hidden(tokens, mask, None, None), k)
        return ids

    def _plan(self, hidden: Tensor, k: int) -> RoutingPlan:
        best, ids = torch.topk(self.router.scores(hidden), k, dim=-1)
        learning = self.training and torch.is_grad_enabled()
        return RoutingPlan(ids, best if learning else None)

    def _layer(self, cache: Cache) -> Any:
        """The router's layer of a cache; appended to one that is new."""
        layers = cache.layers
        if layers and isinstance(layers[-1], (RouterLayer, StaticRouterLayer)):
            if not torch.compiler.is_compiling() and int(layers[-1].get_seq_length()) != int(cache.get_seq_length()):
                raise InputError("the cache holds other tokens for the pre-gating router than for the model")
            return layers[-1]
        if not torch.compiler.is_compiling() and int(cache.get_seq_length()) > 0:
            raise InputError("the cache was filled by another model: the pre-gating router has not seen its tokens")
        if cache.layer_class_to_replicate is not None:  # the model's own layers come first
            while len(layers) < self.layers:
                layers.append(cache.layer_class_to_replicate())
        static = [layer for layer in layers if isinstance(layer, StaticLayer)]
        whole = [layer.max_cache_len for layer in static if not layer.is_sliding]
        if static and not whole:
            raise InputError("a static cache of sliding windows alone does not say how many tokens the router must keep")
        own = StaticRouterLayer(max(whole)) if static else RouterLayer()
        if getattr(cache, "offloading", False):
            stays = getattr(cache, "only_non_sliding", True)
            own.following = next((layer for layer in layers if not (stays and getattr(layer, "is_sliding", False))), None)
        layers.append(own)
        return own

    def _again(self, model: nn.Module) -> bool:
        """Whether the model's layers will be computed again for the backward pass."""
        return self.training and bool(getattr(model, "is_gradient_checkpointing", False))

    def _remember(self, model: nn.Module) -> None:
        """Layers that are computed again for the backward pass read the plan of their own step."""
        for module in model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and getattr(function, "func", None) is not _checkpoint:
                module.__dict__["_gradient_checkpointing_func"] = functools.partial(_checkpoint, self.routing, function)

    def end(self, model: nn.Module) -> None:
        """Forget the plan; compiled code keeps it where layers will be computed again for the backward pass."""
        if not (torch.compiler.is_compiling() and self._again(model)):
            self.routing.plan = None


def _checkpoint(routing: Routing, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """``checkpoint(function, *args)``, the function with the plan of now whenever it runs."""
    plan = routing.plan

    def run(*inputs: Any) -> Any:
        before, routing.plan = routing.plan, plan
        try:
            return function(*inputs)
        finally:
            routing.plan = before

    return checkpoint(run, *args)


def pregated(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class with a router at its front."""
    inner = base.forward
    names = list(inspect.signature(inner).parameters)[1:]
    caches = "past_key_values" in names and issubclass(base, PreTrainedModel)

    @functools.wraps(inner)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = dict(zip(names, args, strict=False))
        inputs.update(kwargs)
        front = self.pregate
        inputs = front.begin(self, inputs, caches)
        outputs = inner(self, **inputs)
        front.end(self)
        return outputs

    return forward


class Forget(nn.Module):
    """The end of a step in a graph: as an output goes out, the plan is gone."""

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing

    def forward(self, output: Tensor) -> Tensor:
        """``output`` as it is."""
        self.routing.plan = None
        return output


def attach(model: nn.Module, plan: MoEPlan, blocks: Sequence[MoEFFN]) -> PreGate:
    """Put the plan's router at the front of a model whose blocks are in place.

    Raises:
        MatchError: the model gives it nothing to read.
    """
    assert plan.pregate is not None
    own = isinstance(model, PreTrainedModel)
    reason = refusal(model) if own else ""
    if not own and not plan.pregate.argument:
        reason = f"the plan does not say where {type(model).__name__} takes them"
    if reason:
        raise MatchError(f"a pre-gating router reads token ids before the first layer: {reason}")
    routing = Routing()
    for number, block in enumerate(blocks):
        block.connect(routing, number)
    layers = 0
    if own:
        config: Any = model.config
        layers = int((config.get_text_config() if hasattr(config, "get_text_config") else config).num_hidden_layers)
    like = blocks[0].experts.down_proj
    front = PreGate(plan.pregate, routing, layers).to(device=like.device, dtype=like.dtype)
    fitted = plan.site_tensors(KIND)
    if fitted:
        front.router.load_state_dict(fitted)
    model.pregate = front.train(model.training)
    return front


def attach_to_graph(graph_module: GraphModule, plan: MoEPlan, blocks: Sequence[MoEFFN]) -> None:
    """Put the plan's router at the front of a graph, as its first node; the last one forgets the decision.

    Raises:
        MatchError: as :func:`attach`.
    """
    front = attach(graph_module, plan, blocks)
    graph_module.pregate_end = Forget(front.routing)
    graph, spec = graph_module.graph, front.router.spec
    inputs = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    ids, output = inputs[spec.argument], next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_after(list(inputs.values())[-1]):
        table = None if spec.vocabulary else graph.get_attr(spec.embedding)
    with graph.inserting_after(list(inputs.values())[-1] if table is None else table):
        decided = graph.call_module("pregate", (ids, inputs.get(MASK), table))
    ids.replace_all_uses_with(decided, delete_user_cb=lambda user: user is not decided)
    last = output.all_input_nodes[0]
    with graph.inserting_before(output):
        ended = graph.call_module("pregate_end", (last,))
    output.replace_input_with(last, ended)
    for new, old in ((decided, ids), (ended, last)):
        new.meta = dict(old.meta)
    graph.lint()
    graph_module.recompile()


def front_of(model: nn.Module) -> PreGate | None:
    """The router at a model's front, or None."""
    front = getattr(model, "pregate", None)
    return front if isinstance(front, PreGate) else None


@torch.no_grad()
def decide(model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """What the router at the front says about one batch, without running the model.

    Args:
        model: a pre-gated model.
        inputs: as :func:`moecompile.capture.normalise_inputs` takes them.

    Returns:
        scores (T, N) or (T, L, N), and which of the T tokens are real (T,) bool.
    """
    front = front_of(model)
    if front is None:
        raise InputError("the model has no pre-gating router")
    ids, mask, named = ids_and_mask(model, inputs, front.router.spec.argument)
    scores = front.router.scores(front._hidden(front.tokens(model, ids), mask, named.get("position_ids"), None))
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None or mask.dim() != 2 else mask.bool()
    return scores, real.reshape(-1)


@contextlib.contextmanager
def decided(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """The decision for one batch stands within the block: for calling what a pre-gated model's own forward calls.

    Without a router at the front nothing happens.
    """
    front = front_of(model)
    if front is not None:
        front.begin(model, dict(inputs), caches=False)
    try:
        yield
    finally:
        if front is not None:
            front.end(model)


@contextlib.contextmanager
def deciding(model: nn.Module, batches: Sequence[Any]) -> Iterator[None]:
    """The router's decision for batches, padding left out, stands within the block: for looking at single layers."""
    front = front_of(model)
    if front is None:
        yield
        return
    k = front.routing.wanted()
    before = front.routing.plan
    if k:
        parts = [scores[real] for scores, real in (decide(model, batch) for batch in batches)]
        front.routing.plan = RoutingPlan(torch.topk(torch.cat(parts), k, dim=-1).indices)
    try:
        yield
    finally:
        front.routing.plan = before
