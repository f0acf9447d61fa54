"""What a router at the front reads: the argument of a model's forward that holds token ids, and the table that embeds them.

A transformers model says so itself. For any other model its captured graph does: the ids are the one input that an embedding
reads as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from transformers import PreTrainedModel

from .capture import Captured, normalise_inputs
from .pregate import PreGateSpec

IDS, MASK = "input_ids", "attention_mask"
_aten = torch.ops.aten
_CASTS = (_aten.to.dtype, _aten._to_copy.default, _aten.contiguous.default, _aten.alias.default)


@dataclass(frozen=True)
class TokenInput:
    """Where token ids come into a model.

    Attributes:
        argument: of its forward, (B, S) integers.
        embedding: the name of the parameter (V, E) that embeds them.
    """

    argument: str
    embedding: str


def refusal(model: nn.Module) -> str:
    """Why a transformers model can have no router at its front; empty where it can."""
    if getattr(model, "main_input_name", "") != IDS:
        return f"{type(model).__name__} reads {getattr(model, 'main_input_name', 'something else')}, not token ids"
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{type(model).__name__} reads two texts, and its encoder's layers another one than its decoder's"
    if not isinstance(getattr(model.get_input_embeddings(), "weight", None), Tensor):  # type: ignore[operator]
        return f"{type(model).__name__} has no input embedding"
    return ""


def token_input(captured: Captured) -> TokenInput | str:
    """Where token ids come into a captured model, or why no router can read them."""
    kind, parameters = type(captured.module).__name__, dict(captured.module.named_parameters(remove_duplicate=False))
    if isinstance(captured.module, PreTrainedModel):
        reason = refusal(captured.module)
        if reason:
            return reason
        own: Any = captured.module.get_input_embeddings()
        name = next((name for name, value in parameters.items() if value is own.weight), "")
        return TokenInput(IDS, name) if name else f"{kind}'s input embedding is no parameter"
    placeholders = [node for node in captured.graph_module.graph.nodes if node.op == "placeholder"]
    names = [*_names(captured.module)[: len(captured.args)], *captured.kwargs]
    if len(names) != len(placeholders):
        return f"{kind} takes inputs that hold several tensors"
    name_of = dict(zip(placeholders, names, strict=True))
    tables: dict[Node, list[str]] = {}
    for node in captured.graph_module.graph.nodes:
        if node.op == "call_function" and node.target is _aten.embedding.default:
            table, ids = node.args[0], _source(node.args[1])
            if ids in name_of and isinstance(table, Node) and table.op == "get_attr":
                tables.setdefault(ids, []).append(str(table.target))
    if not tables:
        return f"{kind} embeds none of its inputs"
    if len(tables) > 1:
        return f"{kind} embeds several of its inputs: {', '.join(sorted(name_of[node] for node in tables))}"
    ids, found = next(iter(tables.items()))
    value = ids.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 2:
        return f"{kind}'s '{name_of[ids]}' is not (batch, length)"
    others = [name for node, name in name_of.items() if node is not ids and not _is_mask(name, node)]
    if others:
        return f"{kind} takes '{others[0]}' besides token ids, and what that means to a router is not known"
    known = [name for name in found if name in parameters]
    if not known:
        return f"{kind}'s '{name_of[ids]}' is embedded by what is no parameter"
    return TokenInput(name_of[ids], max(known, key=lambda name: len(parameters[name])))


def _names(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _source(value: Any) -> Any:
    while isinstance(value, Node) and value.op == "call_function" and value.target in _CASTS:
        value = value.args[0]
    return value


def _is_mask(name: str, node: Node) -> bool:
    value = node.meta.get("val")
    return name == MASK and isinstance(value, Tensor) and value.dim() == 2


def ids_and_mask(model: nn.Module, inputs: Any, argument: str) -> tuple[Any, Any, dict[str, Any]]:
    """The token ids and the padding mask among a model's inputs (as :func:`.capture.normalise_inputs` takes them), and all of
    them by name; None for what is not there."""
    args, kwargs = normalise_inputs(model, inputs)
    named = {**dict(zip(_names(model), args, strict=False)), **kwargs}
    return named.get(argument or IDS), named.get(MASK), named


def embedder(model: nn.Module, spec: PreGateSpec) -> Callable[[Tensor], Tensor]:
    """What the router reads for (B, S) ids: the model's frozen embeddings (B, S, E), or the ids for a table of its own."""
    if spec.vocabulary:
        return lambda ids: ids
    if not spec.embedding:
        own: Any = model.get_input_embeddings()  # type: ignore[operator]
        return lambda ids: own(_beside(ids, own.weight)).detach()
    table: Any = model
    for name in spec.embedding.split("."):
        table = getattr(table, name)
    return lambda ids: nn.functional.embedding(_beside(ids, table), table).detach()


def _beside(ids: Tensor, table: Tensor) -> Tensor:
    return ids if ids.device == table.device else ids.to(table.device)
