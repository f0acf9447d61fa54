"""Streams over models that write in place: every FFN's input, and the outputs behind it, are those of the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from families import BY_NAME
from torch import Tensor, nn

import moecompile
from moecompile.apply import moe_blocks
from moecompile.conversion import capture_inputs, find_ffns
from moecompile.diagnose import layer_rows
from moecompile.recipes import Calibrated, RandomSplit
from moecompile.recipes.drift import factors, repaired
from moecompile.sites import DenseFFN
from moecompile.stream import Stream

VOCABULARY = 99


class _FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))  # type: ignore[no-any-return]


class _Shifting(nn.Module):
    """A token shift, as in RWKV: written into new memory, whose views nobody reads. A buffer takes notes, too."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.ffn = nn.Linear(32, 32), nn.LayerNorm(32), _FFN()
        self.register_buffer("last", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        before = torch.zeros_like(x)
        before[:, 1:] = x[:, :-1]
        before[:, 0] = self.last
        x = x + self.mix(before)
        x += self.ffn(self.norm(x))
        before *= 0.5
        return x + before  # type: ignore[no-any-return]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.layers = nn.ModuleList(_Shifting() for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def _latent_attention() -> nn.Module:
    """Keys and queries are put together by slices of new memory."""
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        first_k_dense_replace=2, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


@pytest.fixture(params=[_Model, _latent_attention])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param().eval()


class _Scaled(nn.Module):
    """A factor before the sum, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.layers = nn.ModuleList(_FFN() for _ in range(3))
        self.in_place = in_place

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            y = layer(x)
            if self.in_place:
                y *= 0.1
            x = x + (y if self.in_place else y * 0.1)
        return self.head(x)  # type: ignore[no-any-return]


def _batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, VOCABULARY, (2, 12), generator=generator)} for _ in range(3)]


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_added_is_asked_for_without_a_trace(in_place: bool) -> None:
    torch.manual_seed(0)
    model, batches = _Scaled(in_place).eval(), _batches()
    recipe = Calibrated(experts=6, shared=2, top_k=2, precision="float32")
    moe = moecompile.convert(model, recipe, batches * 8)
    found, expected = moe(**batches[0]), model(**batches[0])
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("family", ["bart", "llama"])
@torch.no_grad()
def test_outputs_behind_values_that_were_let_go(family: str) -> None:
    """An encoder's states are an output beside the decoder's; so are a decoder's hidden states where they are asked for."""
    if family == "bart":
        sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64}
        ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
        model = transformers.BartForConditionalGeneration(
            transformers.BartConfig(vocab_size=VOCABULARY, **sizes, **heads, **ends)
        )
        batch = {**_batches()[0], "decoder_input_ids": _batches()[1]["input_ids"][:, :9]}
    else:
        model, batch = BY_NAME["llama"].build(output_hidden_states=True), _batches()[0]
    model.eval()
    logits = model(**batch).logits
    captured, matched = find_ffns(model, capture_inputs(model, None, [batch]))
    stream = Stream(captured, matched.matches, [batch])
    for match, inputs in stream:
        dense = DenseFFN.read(match.site, captured.module)
        (x,) = inputs
        found = stream.outputs(0, dense.output(dense.hidden(x)))
        assert any(t.shape == logits.shape and torch.allclose(t, logits, atol=1e-5) for t in found), match.site.name
        stream.feed(lambda rows, dense=dense: dense.output(dense.hidden(rows)))  # type: ignore[misc]


@torch.no_grad()
def test_inputs_and_outputs_are_the_models(model: Any) -> None:
    batches, seen = _batches(), list[Tensor]()
    names = [name for name, _ in model.named_modules() if name.endswith(("ffn", "mlp"))]
    hooks = [model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0])) for name in names]
    logits = [getattr(found, "logits", found) for found in (model(**batch) for batch in batches)]
    for hook in hooks:
        hook.remove()
    captured, matched = find_ffns(model, capture_inputs(model, None, batches))
    assert len(matched.matches) == len(names)
    stream = Stream(captured, matched.matches, batches)
    for number, (match, inputs) in enumerate(stream):
        dense = DenseFFN.read(match.site, captured.module)
        for index, x in enumerate(inputs):
            torch.testing.assert_close(x, seen[index * len(names) + number])
            put_out = dense.output(dense.hidden(x))
            (found,) = (t for t in stream.outputs(index, put_out) if t.shape[-1:] == (VOCABULARY,))
            torch.testing.assert_close(found, logits[index])
            changed = stream.outputs(index, put_out * 2)
            assert not any(t.shape == found.shape and torch.allclose(t, found, atol=1e-3) for t in changed)
        stream.feed(lambda rows, dense=dense: dense.output(dense.hidden(rows)))  # type: ignore[misc]


def _family(name: str) -> Any:
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    others: dict[str, Any] = {
        "cohere": (transformers.CohereForCausalLM, transformers.CohereConfig),
        "phi": (transformers.PhiForCausalLM, transformers.PhiConfig),
        "granite": (transformers.GraniteForCausalLM, transformers.GraniteConfig),
    }
    torch.manual_seed(0)
    if name not in others:
        return BY_NAME[name].build()
    if name == "granite":
        settings["residual_multiplier"] = 0.3
    return others[name][0](others[name][1](**settings)).eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "cohere", "phi", "granite", "gemma2", "gemma3"])
@torch.no_grad()
def test_residual_and_ffn_are_the_layers_output(family: str) -> None:
    """GPT-NeoX and Phi add attention's output first, Cohere adds the FFN last, behind its own sum; Granite scales, Gemma
    normalises what is added."""
    model = _family(family)
    for name, parameter in model.named_parameters():
        if "norm" in name and "weight" in name:
            parameter.normal_(1.0, 0.3)
    batch, seen = _batches()[0], list[Tensor]()
    layers = [each for each in model.modules() if type(each).__name__.endswith(("DecoderLayer", "Block", "NeoXLayer"))]

    def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [each.register_forward_hook(look) for each in layers]
    model(**batch)
    for hook in hooks:
        hook.remove()
    captured, matched = find_ffns(model, capture_inputs(model, None, [batch]))
    assert len(layers) == len(matched.matches) == 2
    stream = Stream(captured, matched.matches, [batch])
    for number, (match, (x,)) in enumerate(stream):
        dense = DenseFFN.read(match.site, captured.module)
        y = dense.output(dense.hidden(x.reshape(-1, 32)))
        assert bool(match.between) == (family in ("granite", "gemma2", "gemma3"))
        added = stream.added(number, y) if match.between else y
        torch.testing.assert_close(stream.residual(number) + added, seen[number].reshape(-1, 32))
        stream.feed(lambda rows, dense=dense: dense.output(dense.hidden(rows)))  # type: ignore[misc]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "granite", "gemma2"])
@torch.no_grad()
def test_what_is_repaired_of_the_drift(family: str) -> None:
    model, batches = _family(family), _batches()
    captured, matched = find_ffns(model, capture_inputs(model, None, batches))
    dense, moe = (Stream(captured, matched.matches, batches) for _ in range(2))
    first = DenseFFN.read(matched.matches[0].site, captured.module)
    for stream, factor in ((dense, 1.0), (moe, 0.999)):
        stream.inputs(0)
        stream.feed(lambda rows, factor=factor: first.output(first.hidden(rows)) * factor)  # type: ignore[misc]
        if factor != 1.0 and matched.matches[0].between:
            for state in stream._states:  # a norm takes the factor out again
                state[matched.matches[0].residual[0]] = state[matched.matches[0].residual[0]] * factor
    match = matched.matches[1]
    ffn = DenseFFN.read(match.site, captured.module)
    x = dense.tokens(1, dense.inputs(1))
    moe.inputs(1)
    y = ffn.output(ffn.hidden(x))
    drift = dense.residual(1) - moe.residual(1)
    assert float(drift.abs().max()) > 0
    assert torch.equal(repaired(dense, moe, 1, y, 0.0), y)
    target = repaired(dense, moe, 1, y, 0.5)
    p = (lambda value: dense.added(1, value)) if match.between else (lambda value: value)
    gained, wanted = p(target) - p(y), 0.5 * drift
    kept = ((target - y).norm(dim=1) < 3.9 * y.norm(dim=1)).nonzero().flatten()  # the others are clipped
    assert len(kept) > len(y) // 2
    error = (gained - wanted)[kept].norm() / wanted[kept].norm()
    assert float(error) < (0.6 if family == "gemma2" else 0.05)  # a norm takes part of it out with the token's size


def test_errors_of_float16_are_no_zeros() -> None:
    """The norm of a text's outputs is beyond float16: an error over it was 0, whatever the block did."""
    dense = BY_NAME["llama"].build().half()
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.up_proj.weight.mul_(60)
            layer.mlp.down_proj.weight.mul_(1e5)
    moe = moecompile.convert(dense, RandomSplit(4, 0, 2))
    captured, matched = find_ffns(dense, _batches()[0])
    rows = layer_rows(captured, matched.matches, lambda number, _: list(moe_blocks(moe).values())[number], _batches())
    assert all(row["top_k"] > 0.05 for row in rows), rows


def test_factors_of_a_norm_and_of_nothing_else() -> None:
    torch.manual_seed(0)
    y, token, channel = torch.randn(50, 16), torch.rand(50) * 100 + 1e-3, torch.randn(16)
    found = factors(y, y * token[:, None] * channel)
    assert found is not None
    torch.testing.assert_close(found[0][:, None] * found[1], token[:, None] * channel, rtol=1e-4, atol=1e-6)
    token[3], channel[5] = 0.0, 0.0
    found = factors(y, y * token[:, None] * channel)
    assert found is not None
    torch.testing.assert_close(found[0][:, None] * found[1], token[:, None] * channel, rtol=1e-4, atol=1e-6)
    assert factors(y, torch.layer_norm(y, (16,)) + 0.5) is None
    assert factors(y, torch.randn(50, 16)) is None
    assert factors(torch.zeros(4, 16), torch.zeros(4, 16)) is None


def test_two_ffns_on_one_input() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.LayerNorm(32), _FFN(), _FFN()

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.one(h) + self.two(h) + x  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, batches = Twins().eval(), [torch.randn(2, 12, 32) for _ in range(3)]
    recipe = Calibrated(experts=6, shared=2, top_k=6, precision="float32")
    moe = moecompile.convert(model, recipe, batches)
    with torch.no_grad():
        torch.testing.assert_close(moe(batches[0]), model(batches[0]))


@torch.no_grad()
def test_padding_is_left_out_of_flattened_inputs() -> None:
    model = BY_NAME["opt"].build()  # its FFNs read (B S, D)
    (batch, *_) = _batches()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][:, 8:] = 0
    captured, matched = find_ffns(model, capture_inputs(model, None, [batch]))
    stream = Stream(captured, matched.matches, [batch])
    inputs = stream.inputs(0)
    assert inputs[0].dim() == 2
    expected = inputs[0].view(2, 12, -1)[:, :8].flatten(0, 1)
    torch.testing.assert_close(stream.tokens(0, inputs), expected)


def test_they_are_converted(model: Any) -> None:
    recipe = Calibrated(experts=6, shared=2, top_k=6, precision="float32")
    moe = moecompile.convert(model, recipe, _batches())
    (batch, *_) = _batches()
    with torch.no_grad():
        found, expected = (getattr(out, "logits", out) for out in (moe(**batch), model(**batch)))
    torch.testing.assert_close(found, expected)
