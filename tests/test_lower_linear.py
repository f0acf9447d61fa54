"""Linear layers around expert FFNs: the kernel's numbers, what the pass merges, what it leaves alone and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import dense_model, plain, tokens, without_inductor
from moecompile.codegen import operators, packing
from moecompile.passes import PassResult, run_passes
from moecompile.passes.lower_linear import LowerLinear
from moecompile.passes.pipeline import inference_passes
from torch import Tensor, nn
from torch.fx import GraphModule

import moecompile
from moecompile import linears
from moecompile.ops import expert_ffn

needs_compiler = pytest.mark.skipif(operators.available() is not None, reason=str(operators.available()))
D = 37  # no multiple of a vector


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@needs_compiler
@pytest.mark.parametrize("weight_format", linears.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers(dtype: torch.dtype, weight_format: str) -> None:
    operators.load()
    weights = [random(rows, D, seed=rows).to(dtype) for rows in (5, 1, 130)]
    biases = [random(5).to(dtype), None, random(130).to(dtype)]
    near = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for shape in ((1, 1), (3,), (2, 2, 2), (9,), (70,), (0,), ()):
        x = random(*shape, D, seed=1).to(dtype)
        ours = linears.linears(x, weights, biases, weight_format)
        exact = [packing.rounded(weight.double()) if weight_format == "int8" else weight.double() for weight in weights]
        wide = [None if bias is None else bias.double() for bias in biases]
        for a, b in zip(ours, linears.linears_reference(x.double(), exact, wide, "same"), strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, rtol=near, atol=near * 8)


@needs_compiler
def test_operands_the_kernel_does_not_take() -> None:
    operators.load()
    x, weight = random(2, D), random(6, D)
    for given, rows, dtype in ((x.t().contiguous().t(), weight, None), (x, random(D, 6).t(), None), (x, weight, torch.float64)):
        given, rows = given.to(dtype or given.dtype), rows.to(dtype or rows.dtype)
        (ours,) = linears.linears(given, [rows], [None], "same")
        torch.testing.assert_close(ours, nn.functional.linear(given, rows))
    with pytest.raises(RuntimeError):
        linears.linears(x, [random(6, D + 1)], [None], "same")


@needs_compiler
def test_int8_follows_its_weight() -> None:
    operators.load()
    x, weight = random(1, D), nn.Parameter(random(6, D), False)

    def check(weight: Tensor) -> None:
        (ours,) = linears.linears(x, [weight], [None], "int8")
        torch.testing.assert_close(ours, linears.linears_reference(x, [weight], [None], "int8")[0])

    check(weight)
    check(weight)
    weight.mul_(-2)
    check(weight)
    weight.data = random(6, D, seed=3)
    check(weight)
    before = len(packing.cache)
    del weight
    assert len(packing.cache) < before


def test_schema() -> None:
    weights, biases = [random(5, D), random(3, D)], [random(5), None]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(linears.linears, (random(2, D), weights, biases, "same"), test_utils=checks)
    torch.library.opcheck(torch.ops.moecompile.int8_rows.default, (random(5, D),), test_utils=checks)


class Net(nn.Module):
    """Two projections, a routed FFN and a head; ``form`` says what is special."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.form, self.q, self.k, self.head = form, nn.Linear(D, 8), nn.Linear(D, 5, bias=False), nn.Linear(D, 11)
        self.up, self.down = nn.Parameter(random(3, 8, D)), nn.Parameter(random(3, D, 4))
        for number, parameter in enumerate(self.parameters()):
            parameter.data = random(*parameter.shape, seed=number) * 0.3

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.form == "input written":
            x = x * 2
            q = self.q(x)
            x.add_(1)
            k = self.k(x)
        elif self.form == "input written by an argument":
            x = x * 2
            q = self.q(x)
            nn.functional.silu(x, inplace=True)
            k = self.k(x)
        elif self.form == "weight computed":
            q, k = nn.functional.linear(x, self.q.weight * 2, self.q.bias), self.k(x)
        elif self.form == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                q, k = self.q(x).float(), self.k(x).float()
        else:
            q, k = self.q(x), self.k(x)
        flat = x.reshape(-1, D)
        ids = torch.zeros(flat.shape[0], 1, dtype=torch.long)
        y = expert_ffn(flat, ids, torch.ones_like(ids, dtype=x.dtype), self.up, self.down, None, None, "silu", True)
        return q, k, self.head(y)


def lowered(graph_module: GraphModule, inputs: list[Any], weight_format: str = "same") -> PassResult:
    """The whole pipeline; the numbers behind it are those before."""
    with torch.no_grad():
        before = graph_module(*inputs)
        result = run_passes(graph_module, inference_passes(weight_format))
        after = result.graph_module(*inputs)
    for a, b in zip(before, after, strict=True):
        rough = weight_format != "same"
        torch.testing.assert_close(a, b, rtol=1 if rough else 1e-4, atol=0.5 if rough else 2e-5)
    return result


def traced(function: Callable[..., Any], *inputs: Any) -> tuple[GraphModule, list[Any]]:
    """The graph that TorchDynamo makes of a function, and the inputs of that graph."""
    found: list[tuple[GraphModule, list[Any]]] = []

    def backend(graph_module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        found.append((graph_module, list(example_inputs)))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return found[0]


def calls(graph_module: GraphModule) -> list[int]:
    """How many layers each launch holds."""
    return [len(node.args[1]) for node in graph_module.graph.nodes if node.target is linears.linears]


@needs_compiler
@pytest.mark.parametrize("origin", ["dynamo", "export"])
def test_layers_of_one_input_are_one_launch(origin: str) -> None:
    x = random(1, 2, D)
    if origin == "dynamo":
        graph_module, inputs = traced(Net(), x)
    else:
        graph_module, inputs = torch.export.export(Net(), (x,)).module(check_guards=False), [x]
    result = lowered(graph_module, inputs)
    assert calls(result.graph_module) == [2, 1]
    assert calls(lowered(graph_module, inputs, "int8-all").graph_module) == [2, 1]
    assert calls(lowered(graph_module, inputs, "int8").graph_module) == [2, 1]


@needs_compiler
@pytest.mark.parametrize(
    ("form", "count", "left", "reason"),
    [
        ("plain", operators.MOST_TOKENS, [2, 1], ""),
        ("plain", operators.MOST_TOKENS + 1, [], "9 tokens are a matrix product"),
        ("input written", 1, [1], "is changed in place"),
        ("input written by an argument", 1, [1], "is changed in place"),
        ("weight computed", 1, [1, 1], "computed in the graph"),
        ("autocast", 1, [1], "of several types, or it is cast by autocast"),
    ],
)
def test_what_stays(form: str, count: int, left: list[int], reason: str) -> None:
    result = lowered(*traced(Net(form), random(count, D)))
    assert calls(result.graph_module) == left
    notes = [note for note in result.notes if note.startswith("lower_linear")]
    assert any(reason in note for note in notes) if reason else not notes


@needs_compiler
def test_other_types() -> None:
    result = run_passes(traced(Net().double(), random(1, D).double())[0], inference_passes())
    assert calls(result.graph_module) == []
    assert any("no CPU kernel for float64" in note for note in result.notes)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise operators.Unavailable("there is no working C++ compiler")

    monkeypatch.setattr(operators, "load", missing)
    graph_module, inputs = traced(Net(), random(1, D))
    result = lowered(graph_module, inputs)
    assert calls(result.graph_module) == []
    assert any("no working C++ compiler" in note for note in result.notes)
    assert calls(lowered(graph_module, inputs, "int8-all").graph_module) == [2, 1]  # asked for: in torch operators


def test_a_graph_without_experts_is_left_alone() -> None:
    graph_module, _ = traced(nn.Linear(D, 3), random(1, D))
    result = LowerLinear()(graph_module)
    assert result.graph_module is graph_module
    assert not result.modified


def generated(model: Any, steps: int = 3) -> list[Tensor]:
    """Logits of a prompt and of a few decoded tokens."""
    out = model(input_ids=tokens(1, 12), use_cache=True)
    found = [out.logits]
    for seed in range(steps):
        out = model(input_ids=tokens(1, 1, seed), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return found


@needs_compiler
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_its_cache(tied: bool) -> None:
    moe = plain(dense_model(tie_word_embeddings=tied))
    fast = without_inductor(moecompile.compile(moe, verify=True))
    with torch.no_grad():
        for a, b in zip(generated(fast), generated(moe), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    prefill, decode = moecompile.last_graphs(fast)
    assert calls(decode.graph_module) == [3, 1, 3, 1, 1]  # q, k, v; o; ...; head
    assert calls(prefill.graph_module) == [3, 1, 3, 1, 1]  # its length is symbolic: the operator looks at run time


@needs_compiler
def test_int8_of_everything() -> None:
    moe = plain()
    whole, experts = (
        without_inductor(moecompile.compile(moe, weights=weights, verify=True)) for weights in ("int8-all", "int8")
    )
    with torch.no_grad():
        exact, ours, theirs = generated(moe), generated(whole), generated(experts)
    error = [max(float((a - b).norm() / b.norm()) for a, b in zip(each, exact, strict=True)) for each in (ours, theirs)]
    assert 0 < error[1] < error[0] < 0.05


@needs_compiler
def test_gradients_keep_torchs_own() -> None:
    moe = plain()
    fast = without_inductor(moecompile.compile(moe))
    fast(input_ids=tokens(1, 4)).logits.square().mean().backward()
    (record,) = moecompile.last_graphs(fast)
    assert record.training
    assert calls(record.graph_module) == []
    assert moe.model.layers[0].self_attn.q_proj.weight.grad is not None


@needs_compiler
@pytest.mark.slow
def test_through_inductor() -> None:
    moe = plain()
    fast = torch.compile(moe, backend="moecompile", dynamic=True)
    with torch.no_grad():
        for a, b in zip(generated(fast), generated(moe), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert any("moecompile.linears" in code for record in moecompile.last_graphs() for code in record.output_code)
