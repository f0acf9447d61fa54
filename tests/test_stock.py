"""MoE models of transformers through our operator: the numbers, gradients and tokens of their own eager experts."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from compiling import without_inductor
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

import moecompile
from moecompile import lowered, stock
from moecompile.errors import CompileError, ParityError
from moecompile.lowered import FallbackWarning

stock.register_experts()

_BASE: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
# name -> (class prefix, settings beside the common ones, layers with experts)
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}, 2),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}, 2),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "head_dim": 8, "decoder_sparse_step": 1, "norm_topk_prob": True}, 2),
    "olmoe": ("Olmoe", {"num_experts": 4}, 2),
    "deepseek_v2": ("DeepseekV2", {**_LATENT, "topk_method": "group_limited_greedy"}, 1),
    "deepseek_v3": ("DeepseekV3", _LATENT, 1),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def build(prefix: str, settings: dict[str, Any], kind: str = "ForCausalLM") -> Any:
    """A model with eager experts and weights so large that routers decide clearly and experts matter."""
    torch.manual_seed(0)
    config = getattr(tf, f"{prefix}Config")(**settings)
    model = getattr(tf, f"{prefix}{kind}")._from_config(config, experts_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: build(prefix, {**_BASE, **settings}) for name, (prefix, settings, _) in FAMILIES.items()}


def tokens(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(1))


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()


def with_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return with_gradients_of(model, model)


def with_gradients_of(call: Any, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients, with a model's parameters and what runs it."""
    model.zero_grad()
    out = call(tokens(), labels=tokens())
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_family
def test_logits_and_gradients_are_those_of_eager_experts(models: dict[str, Any], name: str) -> None:
    model = models[name]
    assert len(stock.stock_experts(model)) == FAMILIES[name][2] and not stock.refused_experts(model)
    wanted, wanted_gradients = with_gradients(model)
    with stock.using_moecompile_experts(model):
        got, gradients = with_gradients(model)
    assert apart(got, wanted) < 1e-5
    assert gradients.keys() == wanted_gradients.keys() and any("gate.weight" in key for key in gradients)
    for key, gradient in gradients.items():
        assert apart(gradient, wanted_gradients[key]) < 1e-5, key


@every_family
def test_greedy_tokens_with_a_cache(models: dict[str, Any], name: str) -> None:
    model = models[name]
    settings = {"max_new_tokens": 12, "do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(tokens())}
    wanted = model.generate(tokens(), **settings)
    with stock.using_moecompile_experts(model):
        assert torch.equal(model.generate(tokens(), **settings), wanted)


@every_family
def test_bfloat16_experts_take_float32_weights_of_a_router(models: dict[str, Any], name: str) -> None:
    experts = copy.deepcopy(next(iter(stock.stock_experts(models[name]).values())))
    results = []
    for implementation, dtype in (("eager", torch.float32), ("moecompile", torch.bfloat16)):
        experts.to(dtype).config._experts_implementation = implementation
        x, weights, ids = experts_inputs(32)
        y = experts(x.to(dtype), ids, weights.requires_grad_())
        assert y.dtype == dtype
        results.append((y.float(), torch.autograd.grad(y.float().square().mean(), weights)[0]))
    assert all(apart(b, a) < 0.03 for a, b in zip(*results, strict=True))


@every_family
@torch.no_grad()
def test_compiles_to_one_graph_with_one_operator_a_layer(models: dict[str, Any], name: str) -> None:
    model, graphs = copy.deepcopy(models[name]), []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, wanted = torch.compile(model, fullgraph=True, backend=backend), model(tokens(), use_cache=False).logits
    with stock.using_moecompile_experts(model):
        assert apart(compiled(tokens(), use_cache=False).logits, wanted) < 1e-5
    assert len(graphs) == 1
    assert sum("expert_ffn" in str(node.target) for node in graphs[0].graph.nodes) == FAMILIES[name][2]


@torch.no_grad()
def test_exports_with_any_number_of_tokens(models: dict[str, Any]) -> None:
    model = copy.deepcopy(models["mixtral"])
    shapes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    with stock.using_moecompile_experts(model):  # experts never run before: the activation is recognised under fake tensors
        keywords = {"input_ids": tokens(), "use_cache": False}
        program = torch.export.export(model, (), keywords, strict=False, dynamic_shapes={**shapes, "use_cache": None})
    assert apart(program.module()(input_ids=tokens(2, 5), use_cache=False).logits, model(tokens(2, 5)).logits) < 1e-5


def test_configurations_are_restored(models: dict[str, Any]) -> None:
    model = models["mixtral"]
    switch = stock.ExpertsSwitch(model)
    with pytest.raises(RuntimeError, match="inside"), switch, switch:
        assert model.config._experts_implementation == "moecompile"
        raise RuntimeError("inside")
    assert model.config._experts_implementation == "eager"
    model.set_experts_implementation("grouped_mm")
    with stock.using_moecompile_experts(nn.ModuleList([model])):  # any module around it
        assert model.config._experts_implementation == "moecompile"
    assert model.config._experts_implementation == "grouped_mm"
    model.set_experts_implementation("eager")


@torch.no_grad()
def test_nested_configurations_of_a_vision_language_model() -> None:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    text = {**_BASE, "num_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
    model = build("Qwen3VLMoe", {"text_config": text, "vision_config": vision}, "ForConditionalGeneration")
    wanted = model(tokens()).logits
    with stock.using_moecompile_experts(model):
        assert model.get_experts_implementation() == {"": "eager", "text_config": "moecompile", "vision_config": "eager"}
        assert apart(model(tokens()).logits, wanted) < 1e-5
    assert set(model.get_experts_implementation().values()) == {"eager"}


def test_chosen_when_loading_and_when_set(models: dict[str, Any], tmp_path: Path) -> None:
    stock.register_experts()  # again
    assert ALL_EXPERTS_FUNCTIONS["moecompile"] is stock.experts_forward
    models["olmoe"].save_pretrained(tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moecompile")
    assert loaded.config._experts_implementation == "moecompile"
    assert apart(loaded(tokens()).logits, models["olmoe"](tokens()).logits) < 1e-5
    loaded.set_experts_implementation("eager")
    loaded.set_experts_implementation("moecompile")


def test_gpt_oss_keeps_its_own_experts_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "told", set())
    model = build("GptOss", {**_BASE, "num_local_experts": 4, "head_dim": 8})
    wanted = model(tokens()).logits
    assert not stock.stock_experts(model)
    refused = stock.refused_experts(model)
    assert list(refused) == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert all("_apply_gate" in reason for reason in refused.values())
    with stock.using_moecompile_experts(model):
        assert model.config._experts_implementation == "eager"  # nothing to serve, so nothing is changed
    model.set_experts_implementation("moecompile")
    with pytest.warns(UserWarning, match=r"GptOssExperts runs its own eager forward.*_apply_gate") as told:
        assert torch.equal(model(tokens()).logits, wanted)
        model(tokens())
    assert len([w for w in told if "moecompile" in str(w.message)]) == 1


@every_family
def test_compile_lowers_the_experts_of_stock_models(name: str, models: dict[str, Any]) -> None:
    """Without transformers' switch: every layer with experts becomes a kernel, and its numbers are the model's own."""
    torch._dynamo.reset()
    fast = without_inductor(moecompile.compile(models[name], fullgraph=True))
    with torch.no_grad():
        assert apart(fast(tokens()).logits, models[name](tokens()).logits) < 1e-5
    (record,) = moecompile.last_graphs(fast)
    assert [layer["backend"] for layer in record.layers] == ["cpu"] * FAMILIES[name][2]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_stock_experts_are_lowered_wherever_they_are_met(implementation: str, models: dict[str, Any]) -> None:
    """In functions, methods and behind torch.compile, whatever the model is set to; other backends get transformers' own."""
    model = copy.deepcopy(models["olmoe"])
    wanted = model(tokens()).logits
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        torch._dynamo.reset()
        assert apart(torch.compile(model, backend="moecompile")(tokens()).logits, wanted) < 1e-5
        assert [layer["backend"] for layer in moecompile.last_graphs()[-1].layers] == ["cpu"] * 2
        fast = without_inductor(moecompile.compile(lambda ids: {"model": model}["model"](ids).logits, fullgraph=True))
        assert apart(fast(tokens()), wanted) < 1e-5
        (record,) = moecompile.last_graphs(fast)
        assert [layer["backend"] for layer in record.layers] == ["cpu"] * 2
        assert model.config._experts_implementation == implementation
        torch._dynamo.reset()
        graphs: list[torch.fx.GraphModule] = []
        torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)(tokens())
    assert graphs and not any("expert_ffn" in str(node.target) for graph in graphs for node in graph.graph.nodes)


def test_transformers_own_experts_are_as_they_were(models: dict[str, Any]) -> None:
    """A subclass that calls its parent's forward, and other compilers' graphs, which no layer of equal shape adds to."""

    class Louder(tf.models.mixtral.modeling_mixtral.MixtralExperts):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args) * 2

    experts = copy.deepcopy(models["mixtral"].model.layers[0].mlp.experts)
    x, weights, ids = experts_inputs(32)
    wanted = experts(x, ids, weights)
    louder = copy.deepcopy(experts)
    louder.__class__ = Louder
    assert torch.equal(louder(x, ids, weights), wanted * 2)
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()

    @torch.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
    def run(layer: nn.Module) -> Tensor:
        return layer(x, ids, weights)

    with torch.no_grad():
        for _ in range(3):
            layer = copy.deepcopy(experts)
            layer.config._experts_implementation = "batched_mm"
            assert apart(run(layer), wanted) < 1e-5
    assert len(graphs) == 1


def test_disabled_experts_are_transformers_own(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_DISABLE", "all")
    torch._dynamo.reset()
    model, recent = copy.deepcopy(models["mixtral"]), moecompile.last_graphs()[-1:]
    model.set_experts_implementation("batched_mm")
    monkeypatch.setattr(stock, "experts_forward", None)  # nobody calls it
    with torch.no_grad():
        torch.compile(model, backend="moecompile")(tokens())
    assert moecompile.last_graphs()[-1:] == recent


def test_turned_weights_are_laid_out_for_the_kernel() -> None:
    """Experts that are stored transposed are read in place: no copy of them at a call."""
    experts = layout(is_transposed=True)
    x, weights, ids = experts_inputs()
    experts.config._experts_implementation = "batched_mm"
    wanted = experts(x, ids, weights)
    torch._dynamo.reset()
    fast = without_inductor(moecompile.compile(experts, fullgraph=True))
    with torch.no_grad():
        assert apart(fast(x, ids, weights), wanted) < 1e-5
    assert experts.gate_up_proj.mT.is_contiguous() and experts.down_proj.is_contiguous()
    assert apart(experts(x, ids, weights), wanted) < 1e-5


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_training_of_compiled_stock_models(name: str, models: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = copy.deepcopy(models[name])
    (wanted, gradients), (found, ours) = with_gradients(model), with_gradients_of(moecompile.compile(model), model)
    assert apart(found, wanted) < 1e-5 and ours.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert apart(ours[key], gradient) < 1e-4, key


@torch.no_grad()
def test_generation_of_a_compiled_stock_moe(models: dict[str, Any]) -> None:
    torch._dynamo.reset()
    for family in ("mixtral", "deepseek_v3"):
        model = models[family]
        fast = moecompile.compile(model)
        settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens())}
        assert torch.equal(fast.generate(tokens(), **settings), model.generate(tokens(), **settings))
        records = moecompile.last_graphs(fast)
        assert 0 < len(records) <= 3 and all(record.layers and not record.fallback for record in records)


def test_verification_of_a_router_with_masked_groups(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of minus infinity are no size beside which every choice is close."""
    from moecompile.backend import Backend

    model = copy.deepcopy(models["deepseek_v3"]).train()
    torch._dynamo.reset()
    without_inductor(moecompile.compile(model, verify=True))(tokens(), labels=tokens())
    monkeypatch.setattr(Backend, "_lower", lambda self, graph, *_: lambda *args: [
        leaf * 1.1 if leaf.is_floating_point() else leaf for leaf in graph(*args)
    ])  # fmt: skip
    with pytest.raises(ParityError, match="differ"):
        without_inductor(moecompile.compile(model, verify=True))(tokens(), labels=tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verification_of_stock_experts(dtype: torch.dtype, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(models["mixtral"]).to(dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            without_inductor(moecompile.compile(model, verify=True))(tokens())
        without_inductor(moecompile.compile(model, verify=True))(tokens())
        monkeypatch.setattr("moecompile.block_checks.experts_forward", lambda *operands: stock.experts_forward(*operands) + 0.1)
        with pytest.raises(ParityError, match=r"model\.layers\.0\.mlp\.experts: all experts on"):
            moecompile.compile(model, verify=True)(tokens())


def test_compiling_experts_that_cannot_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered, "_told", set())
    monkeypatch.setattr(stock, "told", set())
    torch._dynamo.reset()
    model = build("GptOss", {**_BASE, "num_local_experts": 4, "head_dim": 8})
    with pytest.raises(CompileError, match=r"model.layers.0.mlp.experts and 1 more: .*_apply_gate"):
        moecompile.compile(model, fullgraph=True)(tokens())
    fast = without_inductor(moecompile.compile(model))
    with pytest.warns(FallbackWarning, match=r"model.layers.0.mlp.experts and 1 more: .*_apply_gate") as told, torch.no_grad():
        assert apart(fast(tokens()).logits, model(tokens()).logits) < 1e-5
    assert len([w for w in told if "_apply_gate" in str(w.message)]) == 1
    monkeypatch.setattr(stock, "told", set())
    monkeypatch.setattr(lowered, "_told", set())
    torch._dynamo.reset()
    with pytest.raises(CompileError, match=r"GptOssExperts: .*_apply_gate"):
        moecompile.compile(lambda ids: model(ids), fullgraph=True)(tokens())
    around = torch.compile(model, backend="moecompile", options={"max_autotune": False})
    with pytest.warns(FallbackWarning, match=r"GptOssExperts: .*_apply_gate") as told, torch.no_grad():
        assert apart(around(tokens()).logits, model(tokens()).logits) < 1e-5
    assert len([w for w in told if "_apply_gate" in str(w.message)]) == 1


class Plain(nn.Module):
    """Experts as transformers writes them, in every layout."""

    def __init__(self, config: Any, act: Any, gated: bool, transposed: bool, bias: bool) -> None:
        super().__init__()
        self.num_experts, self.act_fn, rows = 4, act, 24 * (2 if gated else 1)
        name = "gate_up_proj" if gated else "up_proj"
        up, down = nn.Parameter(torch.randn(4, rows, 16) / 4), nn.Parameter(torch.randn(4, 16, 24) / 5)
        if transposed:
            up, down = nn.Parameter(up.mT.detach().contiguous()), nn.Parameter(down.mT.detach().contiguous())
        self.register_parameter(name, up)
        self.register_parameter("down_proj", down)
        if bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(4, rows)))
            self.register_parameter("down_proj_bias", nn.Parameter(torch.randn(4, 16)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return hidden_states * 0


def experts_inputs(hidden: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """x (13, D), weights (13, 2), ids (13, 2)."""
    torch.manual_seed(2)
    return torch.randn(13, hidden), *torch.randn(13, 4).softmax(-1).topk(2)


def layout(act: Any = None, **flags: bool) -> Any:
    """An experts module of its own class, decorated with these flags."""
    torch.manual_seed(3)
    kind = use_experts_implementation(type("Experts", (Plain,), {"forward": Plain.forward}), **flags)
    config = SimpleNamespace(_experts_implementation="moecompile")
    return kind(
        config, act or nn.SiLU(), flags.get("has_gate", True), flags.get("is_transposed", False), flags.get("has_bias", False)
    )


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_layouts_and_biases(gated: bool, transposed: bool) -> None:
    experts = layout(ACT2FN["relu2"], has_gate=gated, is_transposed=transposed, has_bias=True)
    x, weights, ids = experts_inputs()
    results: list[list[Tensor]] = []
    for implementation in ("batched_mm", "moecompile"):
        experts.config._experts_implementation = implementation
        inputs = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *experts.parameters()]
        y = experts(inputs[0], ids, inputs[1])
        results.append([y, *torch.autograd.grad((y * x.cos()).sum(), inputs)])
    assert max(apart(b, a) for a, b in zip(*results, strict=True)) < 1e-5


def test_autocast_computes_in_its_dtype_and_returns_the_given_one() -> None:
    experts, (x, weights, ids) = layout(), experts_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, ids, weights)
    assert y.dtype == torch.float32
    assert torch.equal(y, experts.bfloat16()(x.bfloat16(), ids, weights).float())


def test_what_cannot_be_expressed_runs_eagerly() -> None:
    clamped = layout(lambda x: nn.functional.silu(x).clamp(max=40.0))
    odd = {"interleaved": layout(is_concatenated=False), "activation": clamped}
    if "has_post_expert_norm" in inspect.signature(use_experts_implementation).parameters:  # since transformers 5.20
        odd["normalises"] = layout(has_post_expert_norm=True)
    odd |= {reason: layout() for reason in ("expert parallel", "quantized", "usual names", "do not fit")}
    odd["expert parallel"]._is_expert_parallel = True
    odd["quantized"].down_proj = nn.Parameter(odd["quantized"].down_proj.to(torch.int8), requires_grad=False)
    del odd["usual names"].down_proj
    odd["do not fit"].down_proj = nn.Parameter(torch.zeros(4, 16, 23))
    x, weights, ids = experts_inputs()
    for reason, experts in odd.items():
        with pytest.warns(UserWarning, match=reason):
            assert torch.equal(experts(x, ids, weights), x * 0)  # its eager forward
        assert reason in stock.refused_experts(experts)[""] and not stock.stock_experts(experts)


def test_a_changed_activation_and_a_missing_interface_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, (x, weights, ids) = layout(nn.SiLU()), experts_inputs()
    before = experts(x, ids, weights)
    experts.act_fn = nn.ReLU()
    after = experts(x, ids, weights)
    experts.config._experts_implementation = "batched_mm"
    assert apart(after, experts(x, ids, weights)) < 1e-5 < apart(after, before)
    monkeypatch.setattr(stock, "_unregistered", None)
    with warnings.catch_warnings(), monkeypatch.context() as context:
        warnings.simplefilter("error")
        context.setitem(sys.modules, "transformers.integrations.moe", None)
        stock.register_experts()
    assert "no interface for experts" in stock.refused_experts(experts)[""]
