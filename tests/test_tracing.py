"""What TorchDynamo is spared while it traces: configs are read as they are stored, and nothing is left behind the call."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import dense_model, plain, tokens, without_inductor
from torch import Tensor, nn
from torch._dynamo.variables import user_defined
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig

import moecompile
from moecompile.compiled import _trained, compilation_of
from moecompile.errors import CompileError
from moecompile.lowered import FallbackWarning, _told
from moecompile.tracing import stored_plainly

IDS = tokens(2, 11)


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Each test compiles anew."""
    torch._dynamo.reset()


class Own(LlamaConfig):
    """Looks its attributes up in a way of its own."""

    def __getattribute__(self, name: str) -> Any:
        return 7 if name == "answer" else super().__getattribute__(name)


class Layered(LlamaConfig):
    """Says something else than what it holds, as one with a value for each layer does."""

    model_type = "layered"

    @property
    def rate(self) -> float:
        """Never what is stored under that name."""
        raise RuntimeError("ask a layer")


def test_which_configs_are_found_as_they_are_stored() -> None:
    assert stored_plainly(LlamaConfig())
    assert not stored_plainly(GPT2Config())  # hidden_size stands for n_embd
    assert not stored_plainly(Own())
    config = Layered()
    assert stored_plainly(config)
    vars(config)["rate"] = 0.5
    assert not stored_plainly(config)


def test_layers_with_values_of_their_own() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    if not hasattr(config, "per_layer_config"):
        pytest.skip("this transformers has no heterogeneous configs")
    config.per_layer_config = {1: {"intermediate_size": 48}}
    assert not stored_plainly(config)


def test_nothing_is_left_behind_a_call() -> None:
    moe = plain()
    fast = without_inductor(moecompile.compile(moe))
    backend, asked = compilation_of(fast).backend, []

    def looking(graph_module: Any, inputs: Any) -> Any:
        asked.append(user_defined.object_has_getattribute(moe.config))
        return graph_module.forward

    def failing(graph_module: Any, inputs: Any) -> Any:
        raise CompileError("no")

    backend._compile = looking  # type: ignore[method-assign]
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=IDS).logits, moe(input_ids=IDS).logits)
        assert asked == [False]
        assert user_defined.object_has_getattribute(moe.config)
        backend._compile = failing  # type: ignore[method-assign]
        torch._dynamo.reset()
        with pytest.raises(CompileError):
            fast(input_ids=IDS)
    assert user_defined.object_has_getattribute(moe.config)


def test_collection_goes_on_within_a_call() -> None:
    """A function with a graph break runs for as long as it likes."""
    states = []

    @moecompile.compile
    def steps(x: Tensor) -> Tensor:
        y = x * 2
        torch._dynamo.graph_break()
        states.append(gc.isenabled())
        torch._dynamo.graph_break()
        return y + 1

    _told.clear()
    with pytest.warns(FallbackWarning, match=r"eager mode at .*test_tracing.py:\d+ \(.*graph_break\(\)\)") as told:
        without_inductor(steps)(torch.ones(3))
    assert states == [True]
    assert {Path(one.filename) for one in told if one.category is FallbackWarning} == {Path(__file__)}  # the call's line


def test_a_number_for_each_call_is_compiled_once() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, by: float) -> Tensor:
            return x * by

    fast = without_inductor(moecompile.compile(Scaled(), fullgraph=True))
    for number in range(12):
        torch.testing.assert_close(fast(torch.ones(3), 1.5 + number), torch.full((3,), 1.5 + number))
    assert len(moecompile.last_graphs(fast)) <= 2


def test_a_config_that_is_changed_later_is_seen() -> None:
    moe = plain()
    fast = without_inductor(moecompile.compile(moe))
    with torch.no_grad():
        assert fast(input_ids=IDS).past_key_values is not None
        moe.config.use_cache = False
        assert fast(input_ids=IDS).past_key_values is None


def test_names_that_stand_for_others() -> None:
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, n_inner=64, vocab_size=96, n_positions=64)).eval()
    moe = moecompile.convert(dense, moecompile.recipes.Contiguous(experts=4, shared=2, top_k=2)).eval()
    fast = without_inductor(moecompile.compile(moe))
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids=IDS).logits, moe(input_ids=IDS).logits)


def test_optimizers_of_any_kind_are_found() -> None:
    class Odd(type):
        def __eq__(cls, other: object) -> bool:  # so it cannot be hashed
            return False

        __hash__ = None  # type: ignore[assignment]

    class Thing(metaclass=Odd):
        others: list[object]

    class Mine(torch.optim.AdamW):
        pass

    thing = Thing()
    thing.others = [thing]
    layer = nn.Linear(2, 2)
    optimizer = Mine(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    assert not {id(parameter) for parameter in layer.parameters()} & _trained()
    optimizer.step()
    assert {id(parameter) for parameter in layer.parameters()} <= _trained()


def test_a_model_beside_the_compiled_one_is_traced_as_ever() -> None:
    """Another torch.compile of the same process sees TorchDynamo as it is."""
    dense = dense_model()
    fast = without_inductor(moecompile.compile(plain()))

    def logits(call: Any) -> Tensor:
        with torch.no_grad():
            return call(input_ids=IDS).logits

    logits(fast)
    torch.testing.assert_close(logits(torch.compile(dense, backend="eager")), logits(dense))


def test_what_is_compiled_too_often_is_told() -> None:
    """Numbers that TorchDynamo guards on: the ninth runs in eager mode, with one warning; then as before."""
    _told.clear()
    fast = without_inductor(moecompile.compile(lambda x, name: x * len(name) if name in "abcdefghijkl" else x))
    x = torch.ones(3)
    with pytest.warns(FallbackWarning, match="<lambda>.*run in eager mode from now on: recompile_limit") as told:
        for letter in "abcdefghijkl":
            assert torch.equal(fast(x, letter), x)
    assert len(told) == 1
    assert len(moecompile.last_graphs(fast)) == torch._dynamo.config.recompile_limit
    strict = without_inductor(moecompile.compile(lambda x, name: x * len(name), fullgraph=True))
    with pytest.raises(CompileError, match="compiled too often"):
        for letter in "abcdefghijkl":
            strict(x, letter)
