"""What a converted model must still do: be captured, be compiled, train, generate with its cache, change its top_k."""

from __future__ import annotations

import pytest
import torch
from families import BY_NAME, FAMILIES, Family, batch_of
from moecompile.passes import PassError, PassResult, SplitFFN, run_passes

import moecompile
from moecompile.capture import capture
from moecompile.conversion import find_ffns
from moecompile.errors import MatchError, MoECompileError, PlanError
from moecompile.parity import outputs_of
from moecompile.recipes import Calibrated, Contiguous, Static

CAUSAL = [family for family in FAMILIES if family.causal]


def converted(family: Family, top_k: int = 2) -> torch.nn.Module:
    return moecompile.convert(family.build(), Contiguous(experts=5, shared=1, top_k=top_k))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_is_itself_capturable(family: Family) -> None:
    """torch.export takes it, batch and sequence stay symbolic, and the graph computes the same at another size."""
    moe = converted(family)
    captured = capture(moe)
    calls = [n for n in captured.graph_module.graph.nodes if n.target is torch.ops.moecompile.expert_ffn.default]
    assert len(calls) == family.ffns
    assert all(axes for axes in captured.dynamic.values())
    batch = batch_of(family, tokens=14, rows=4)
    for a, b in zip(outputs_of(captured.graph_module, batch), outputs_of(moe, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dynamo_takes_it_without_a_break() -> None:
    moe = converted(BY_NAME["llama"])
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph_module, inputs):  # type: ignore[no-untyped-def]
        graphs.append(graph_module)
        return graph_module

    torch._dynamo.reset()
    fast = torch.compile(moe, backend=backend, fullgraph=True)
    for batch in (batch_of(BY_NAME["llama"]), batch_of(BY_NAME["llama"], tokens=12, rows=2)):
        torch.testing.assert_close(fast(**batch).logits, moe(**batch).logits, rtol=1e-4, atol=1e-5)
    assert graphs and all(len(list(g.graph.nodes)) > 50 for g in graphs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_trains(family: str) -> None:
    """Every parameter of the blocks gets a gradient, the router too, and a few steps lower the loss."""
    family = BY_NAME[family]
    moe = converted(family).train()
    for module in moe.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = batch_of(family, tokens=12, rows=4)
    optimizer = torch.optim.AdamW([p for p in moe.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(8):
        loss = moe(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        if step == 0:
            for name, block in moecompile.moe_blocks(moe).items():
                for own, parameter in block.named_parameters():
                    assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), f"{name}.{own}"
                assert block.router is not None and float(block.router.weight.grad.abs().sum()) > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradients_are_the_dense_ones_with_all_experts_on() -> None:
    family = BY_NAME["llama"]
    dense = family.build().double()
    moe = moecompile.convert(dense, Contiguous(experts=5, shared=1))
    batch = batch_of(family)
    for model in (dense, moe):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    torch.testing.assert_close(moe.model.embed_tokens.weight.grad, dense.model.embed_tokens.weight.grad)
    block = moe.model.layers[0].mlp
    whole = dense.model.layers[0].mlp.up_proj.weight.grad
    torch.testing.assert_close(block.shared.up_proj.weight.grad, whole[:8])
    torch.testing.assert_close(block.experts.up.grad[0, 8:], whole[8:16])


def test_training_router_weights_do_not_change_the_value() -> None:
    moe = converted(BY_NAME["llama"])
    batch = batch_of(BY_NAME["llama"])
    expected = moe(**batch).logits
    torch.testing.assert_close(moe.train()(**batch).logits, expected, rtol=1e-5, atol=1e-6)


def test_autocast() -> None:
    moe = converted(BY_NAME["llama"]).train()
    batch = batch_of(BY_NAME["llama"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = moe(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in moe.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", CAUSAL, ids=lambda f: f.name)
def test_generates_with_the_cache_as_without(family: Family) -> None:
    moe = converted(family)
    prompt = batch_of(family, tokens=5, rows=2)["input_ids"]
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(prompt),
        "eos_token_id": None,
    }
    assert torch.equal(moe.generate(prompt, **options), moe.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize("family", CAUSAL, ids=lambda f: f.name)
def test_generates_as_the_dense_model_with_all_experts_on(family: Family) -> None:
    dense = family.build()
    moe = moecompile.convert(dense, Contiguous(experts=5, shared=1))
    prompt = batch_of(family, tokens=5, rows=2)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(moe.generate(prompt, **options), dense.generate(prompt, **options))


def test_top_k_is_a_dial() -> None:
    family = BY_NAME["llama"]
    dense, batch = family.build(), batch_of(family)
    moe = converted(family, top_k=1)
    exact = dense(**batch).logits
    errors = []
    for k in (0, 2, 5):
        moecompile.set_top_k(moe, k)
        errors.append((moe(**batch).logits - exact).norm().item())
    assert errors[0] > errors[1] > 100 * errors[2]
    moecompile.set_top_k(moe, None)
    assert all(block.top_k == 5 for block in moecompile.moe_blocks(moe).values())
    with pytest.raises(PlanError, match="has 5 experts"):
        moecompile.set_top_k(moe, 6)
    with pytest.raises(PlanError, match="no MoE block"):
        moecompile.set_top_k(dense, 1)
    static = moecompile.convert(dense, Static(0.5), [batch])
    with pytest.raises(PlanError, match="no router"):
        next(iter(moecompile.moe_blocks(moecompile.convert(dense, Contiguous(3))).values())).top_k = 1
    moecompile.set_top_k(static, 1)
    torch.testing.assert_close(static(**batch).logits, exact, rtol=1e-4, atol=1e-5)


class Inline(torch.nn.Module):
    """A gated FFN written inside a bigger forward: there is no module that is the FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.w1, self.w2, self.w3 = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8), torch.nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.w2(torch.nn.functional.silu(self.w1(h)) * self.w3(h))


def test_what_only_the_graph_can_do_is_said_and_done() -> None:
    torch.manual_seed(0)
    model, inputs = torch.nn.Sequential(Inline(), Inline()), (torch.randn(2, 3, 8),)
    with pytest.raises(MatchError, match=r"forward of '0'.*form='graph'"):
        moecompile.convert(model, Contiguous(4), example_inputs=inputs)
    moe = moecompile.convert(model, Contiguous(4), example_inputs=inputs, form="graph")
    x = torch.randn(5, 7, 8)
    torch.testing.assert_close(moe(x), model(x), rtol=1e-4, atol=1e-5)
    loss = moe(x).square().mean()
    loss.backward()
    assert all(block.experts.up.grad is not None for block in moecompile.moe_blocks(moe).values())
    assert not any("w1" in name for name in moe.state_dict()), "the dense weights are gone"


def test_split_pass_leaves_the_given_graph_alone_and_keeps_metadata() -> None:
    model = BY_NAME["t5"].build()
    captured, matched = find_ffns(model)
    plan = moecompile.plan(model, Contiguous(4))
    blocks = moecompile.apply.build_blocks(model, plan)
    before = captured.graph_module.code
    result = run_passes(captured.graph_module, [SplitFFN(matched.matches, blocks)])
    assert captured.graph_module.code == before
    assert result.modified == 4
    calls = [node for node in result.graph_module.graph.nodes if node.op == "call_module"]
    assert [node.meta["moecompile_site"] for node in calls] == [m.site.name for m in matched.matches]
    assert all("val" in node.meta and node.meta["nn_module_stack"] for node in calls)


def test_pipeline_checks_order_and_graphs() -> None:
    captured, _ = find_ffns(BY_NAME["llama"].build())

    class Needs:
        name, requires, ensures = "needs", frozenset({"moe"}), frozenset()

        def __call__(self, graph_module):  # type: ignore[no-untyped-def]
            return PassResult(graph_module, 0)

    class Breaks:
        name, requires, ensures = "breaks", frozenset(), frozenset()

        def __call__(self, graph_module):  # type: ignore[no-untyped-def]
            from moecompile.passes import clone

            copy = clone(graph_module)
            calls = [node for node in copy.graph.nodes if node.op == "call_function"]
            calls[0].prepend(calls[-1])
            return PassResult(copy, 1)

    with pytest.raises(PassError, match="needs a graph with: moe"):
        run_passes(captured.graph_module, [Needs()])
    with pytest.raises(PassError, match="breaks made a malformed graph"):
        run_passes(captured.graph_module, [Breaks()])


def test_all_errors_are_the_projects() -> None:
    import moecompile.errors as errors

    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert all(issubclass(kind, MoECompileError) for kind in kinds) and issubclass(PassError, MoECompileError)


def test_calibrated_graph_form_equals_live_form() -> None:
    family = BY_NAME["bert"]
    dense, batches = family.build(), [batch_of(family, 40, 8)]
    plan = moecompile.plan(dense, Calibrated(6, 2, 2), batches)
    live, graph = (moecompile.convert(dense, plan, form=form) for form in ("module", "graph"))
    for a, b in zip(outputs_of(live, batches[0]), outputs_of(graph, batches[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Pair(torch.nn.Module):
    """An FFN that also gives its hidden state's mean, which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 24), torch.nn.Linear(24, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.down(torch.nn.functional.gelu(self.up(x))), None


class Unpacking(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)[0]


def test_a_module_that_gives_more_than_its_ffn_is_left() -> None:
    torch.manual_seed(0)
    model, inputs = Unpacking(), (torch.randn(2, 3, 8),)
    with pytest.raises(MatchError, match=r"'ffn' gives a tuple.*form='graph'"):
        moecompile.convert(model, Contiguous(4), example_inputs=inputs)
    moe = moecompile.convert(model, Contiguous(4), example_inputs=inputs, form="graph")
    torch.testing.assert_close(moe(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def test_verify_names_the_layers_of_a_plan_that_leaves_some_dense() -> None:
    torch.manual_seed(0)
    model, inputs = torch.nn.Sequential(Inline(), Inline(), Inline()), (torch.randn(2, 3, 8),)
    chosen: list[str] = []

    def last(_module: torch.nn.Module, name: str) -> bool:
        chosen.append(name)
        return name == "2" or name.startswith("2.")

    moe = moecompile.convert(model, Contiguous(4), example_inputs=inputs, form="graph", filter_fn=last)
    report = moecompile.verify(moe, model, inputs)
    assert report.exact and [row["site"] for row in report.layers] == [name for name in chosen if name.startswith("2")]
    assert report.layers[0]["all"] < 1e-5
