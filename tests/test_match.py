"""Matching: every FFN of the 13 families and of unheard-of modules is found; nothing is invented; each refusal has its node."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Family
from torch import Tensor, nn

from moecompile.capture import capture
from moecompile.errors import CaptureError
from moecompile.explanation import explain
from moecompile.match import Matched, match

F = nn.functional


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_family(family: Family) -> None:
    explanation = explain(family.build())
    assert len(explanation.sites) == family.ffns
    for site in explanation.sites:
        assert (site.kind, site.activation, site.layout, site.bias) == (
            family.kind,
            family.activation,
            family.layout,
            family.bias,
        )
        assert (site.hidden_size, site.intermediate_size) == (32, family.width)
        assert site.placement is not None, site.refusal
    assert len({site.name for site in explanation.sites}) == family.ffns
    # BERT's masked-language head is a projection, an activation and a normalisation before the vocabulary: no FFN.
    expected = {"bert": ["cls.predictions"]}.get(family.name, [])
    assert [skipped.name for skipped in explanation.skipped] == expected
    assert all(axes for axes in explanation.dynamic.values())


def found(module: nn.Module, width: int = 8) -> Matched:
    torch.manual_seed(0)
    return match(capture(module, (torch.randn(2, 5, width),)))


def only(module: nn.Module, width: int = 8):  # type: ignore[no-untyped-def]
    matched = found(module, width)
    assert len(matched.matches) == 1, matched.skipped
    assert not matched.skipped
    return matched.matches[0].site


class Plain(nn.Module):
    """down(act(up(x))) with whatever activation."""

    def __init__(self, act, bias: bool = True) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 24, bias), nn.Linear(24, 8, bias), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


class Gated(nn.Module):
    """down(mix(gate(x), up(x)))."""

    def __init__(self, mix, bias: bool = False) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24, bias), nn.Linear(8, 24, bias), nn.Linear(24, 8, bias)
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.mix(self.gate(x), self.up(x)))


PLAIN = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "relu2": lambda h: torch.square(F.relu(h)),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "tanh": torch.tanh,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "elu": F.elu,
    "hardswish": F.hardswish,
}
GELUS = {
    "gelu": [
        lambda h: h * 0.5 * (1.0 + torch.erf(h / 2**0.5)),
        lambda h: 0.5 * h * (1 + torch.erf(h * 0.7071067811865476)),
        lambda h: h * (torch.erf(h / 1.4142135623730951) + 1) / 2,
    ],
    "gelu_tanh": [
        lambda h: 0.5 * h * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (h + 0.044715 * torch.pow(h, 3.0)))),
        lambda h: 0.5 * h * (1.0 + torch.tanh(h * 0.7978845608028654 * (1.0 + 0.044715 * h * h))),
    ],
}


@pytest.mark.parametrize("name", sorted(PLAIN))
@pytest.mark.parametrize("bias", [True, False])
def test_plain_activation(name: str, bias: bool) -> None:
    site = only(Plain(PLAIN[name], bias))
    assert (site.kind, site.activation, site.bias) == ("plain", name, bias)


@pytest.mark.parametrize(("name", "form"), [(name, i) for name, forms in GELUS.items() for i in range(len(forms))])
def test_gelu_in_every_form(name: str, form: int) -> None:
    assert only(Plain(GELUS[name][form])).activation == name


def test_gelu_clipped_keeps_its_expression() -> None:
    site = only(Plain(lambda h: torch.clip(F.gelu(h), -10, 10)))
    x = torch.linspace(-20, 20, 99)
    torch.testing.assert_close(site.act(x), torch.clip(F.gelu(x), -10, 10))


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("silu", lambda g, u: F.silu(g) * u),
        ("silu", lambda g, u: u * F.silu(g)),
        ("silu", lambda g, u: u * g * torch.sigmoid(g)),
        ("silu", lambda g, u: torch.sigmoid(g) * (u * g)),
        ("gelu", lambda g, u: F.gelu(g) * u),
        ("gelu_tanh", lambda g, u: u * F.gelu(g, approximate="tanh")),
        ("relu", lambda g, u: F.relu(g) * u),
        ("sigmoid", lambda g, u: torch.sigmoid(g) * u),
        ("sigmoid", lambda g, u: u / (1 + torch.exp(-g))),
        ("identity", lambda g, u: g * u),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_gated(name: str, mix, bias: bool) -> None:  # type: ignore[no-untyped-def]
    site = only(Gated(mix, bias))
    assert (site.kind, site.activation, site.bias) == ("gated", name, bias)
    if name != "identity":
        assert site.gate is not None and site.gate.weight == "gate.weight" and site.up.weight == "up.weight"


def test_gate_and_up_may_be_named_the_other_way_round() -> None:
    site = only(Gated(lambda g, u: g * F.silu(u)))
    assert site.gate is not None and site.gate.weight == "up.weight" and site.up.weight == "gate.weight"


class Fused(nn.Module):
    """One projection for gate and up, cut in one of the usual ways."""

    def __init__(self, cut: str) -> None:
        super().__init__()
        self.gate_up, self.down, self.cut = nn.Linear(8, 48), nn.Linear(24, 8), cut

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate_up(x)
        if self.cut == "chunk":
            g, u = h.chunk(2, dim=-1)
        elif self.cut == "split":
            g, u = torch.split(h, 24, dim=-1)
        elif self.cut == "sizes":
            g, u = torch.split(h, [24, 24], dim=2)
        elif self.cut == "slice":
            g, u = h[..., :24], h[..., 24:]
        elif self.cut == "stride":
            g, u = h[..., ::2], h[..., 1::2]
        else:
            return self.down(F.glu(h, dim=-1))
        return self.down(F.silu(g) * u)


@pytest.mark.parametrize("cut", ["chunk", "split", "sizes", "slice", "stride", "glu"])
def test_fused_gate_up(cut: str) -> None:
    site = only(Fused(cut))
    assert (site.kind, site.layout, site.intermediate_size) == ("gated", "fused", 24)
    assert site.activation == ("sigmoid" if cut == "glu" else "silu")


class Functional(nn.Module):
    """Weights without modules: x @ W + b, as research code has it."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(8, 24)), nn.Parameter(torch.randn(24))
        self.w2, self.b2 = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.w1 + self.b1) @ self.w2 + self.b2


def test_functional_weights() -> None:
    site = only(Functional())
    assert (site.layout, site.bias, site.up.weight, site.down.bias) == ("conv1d", True, "w1", "b2")
    assert site.placement is None and "root module" in site.refusal


def test_sequential_with_a_norm_in_front() -> None:
    module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24), nn.GELU(), nn.Dropout(0.1), nn.Linear(24, 8)).eval()
    site = only(module)
    assert site.placement is not None and site.placement.block == "4"


def test_torch_encoder_layer() -> None:
    matched = found(nn.TransformerEncoderLayer(8, 2, 24, batch_first=True, norm_first=True).train(False))
    assert [site.activation for site in matched.sites] == ["relu"]


# ---- adversarial negatives -------------------------------------------------------------------------------------------


class SecondUser(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        return self.down(h) + h.mean()


class ReturnsIntermediate(Plain):
    def forward(self, x: Tensor):  # type: ignore[no-untyped-def,override]
        h = self.up(x)
        return self.down(self.act(h)), h


class NormBetween(Plain):
    def __init__(self, norm) -> None:  # type: ignore[no-untyped-def]
        super().__init__(F.gelu)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.act(self.up(x))))


class RMS(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


class ReshapedAcross(Plain):
    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.up(x))
        return self.down(h.reshape(h.shape[0], -1, 12, 2).transpose(2, 3).reshape(h.shape[0], -1, 24))


class TokensMoved(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)).transpose(0, 1))


class TiedUp(Plain):
    def __init__(self) -> None:
        super().__init__(F.gelu)
        self.again = nn.Linear(8, 24)
        self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x))) + self.again(x).sum()


class SharedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = Plain(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.ffn(x))


class TwoInputs(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x.flip(-1)))


class ToAnotherWidth(Plain):
    def __init__(self) -> None:
        super().__init__(torch.tanh)
        self.down = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Learned(Plain):
    def __init__(self) -> None:
        super().__init__(nn.PReLU())


class ComputedWeight(Plain):
    def __init__(self) -> None:
        super().__init__(F.gelu)
        nn.utils.parametrizations.weight_norm(self.down)


class TrainingDropout(Plain):
    def __init__(self) -> None:
        super().__init__(F.gelu)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))


NEGATIVES = {
    "second user": (SecondUser(F.gelu), "second user"),
    "intermediate returned": (ReturnsIntermediate(F.gelu), "second user, the model's output"),
    "layer norm": (NormBetween(nn.LayerNorm(24)), "layer normalisation"),
    "rms norm": (NormBetween(RMS()), "normalisation"),
    "torch rms norm": (NormBetween(nn.RMSNorm(24)), "normalisation"),
    "softmax": (NormBetween(nn.Softmax(-1)), "softmax"),
    "softmax as activation": (Plain(nn.Softmax(-1)), "softmax"),
    "product of two activations": (Gated(lambda g, u: F.silu(g) * torch.tanh(u)), "product of two activations"),
    "sum of two branches": (Gated(lambda g, u: F.silu(g + 0 * g) * (u + g)), "otherwise than by a product"),
    "reshaped across features": (ReshapedAcross(F.gelu), "reshapes the intermediate across features"),
    "tokens moved": (TokensMoved(F.gelu), "across features"),
    "tied up projection": (TiedUp(), "shared"),
    "ffn used twice": (SharedTwice(), "shared"),
    "two inputs": (TwoInputs(None), "different inputs"),
    "another width": (ToAnotherWidth(), "returns to its own width"),
    "learned activation": (Learned(), "pointwise function"),
    "computed weight": (ComputedWeight(), "not a parameter"),
    "dropout in training mode": (TrainingDropout().train(), "training mode"),
    "cumulative sum": (Plain(lambda h: torch.cumsum(F.relu(h), -1)), "cumulative sum"),
}


@pytest.mark.parametrize("case", sorted(NEGATIVES))
def test_negative(case: str) -> None:
    module, reason = NEGATIVES[case]
    captured = capture(module, (torch.randn(2, 5, 8),))
    matched = match(captured)
    assert not matched.matches
    assert matched.skipped, "a candidate must be listed with its reason"
    assert any(reason in skipped.reason for skipped in matched.skipped), matched.skipped
    names = {node.name for node in captured.graph_module.graph.nodes}
    assert all(skipped.node in names for skipped in matched.skipped)


def test_the_same_dropout_in_eval_mode_is_no_obstacle() -> None:
    assert only(TrainingDropout().eval()).activation == "gelu"


class Attention(nn.Module):
    """Single-head attention written out: nothing in it is an FFN, nor worth a line in the report."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2), -1)
        return x + self.o(weights @ self.v(x))


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 3, bias=False), nn.Linear(3, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.b(self.a(x))


@pytest.mark.parametrize("module", [Attention(), LowRank(), nn.Linear(8, 8)], ids=["attention", "low rank", "linear"])
def test_nothing_invented(module: nn.Module) -> None:
    matched = found(module)
    assert not matched.matches and not matched.skipped


def test_frozen_layers_of_albert_share_weights() -> None:
    import transformers as tf

    config = tf.AlbertConfig(
        vocab_size=99, embedding_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    explanation = explain(tf.AlbertModel(config).eval())
    assert not explanation.sites
    assert any("shared" in skipped.reason for skipped in explanation.skipped)


def test_capture_failure_names_the_place() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"could not capture Branches: .*test_match"):
        capture(Branches(), (torch.randn(2, 3),))


def test_capture_needs_inputs_of_an_unknown_module() -> None:
    with pytest.raises(CaptureError, match="pass example_inputs"):
        capture(Plain(F.relu))


def test_printed_explanation_lists_sites_and_reasons() -> None:
    text = str(explain(FAMILIES[10].build()))
    assert "bert.encoder.layer.0" in text and "layer_norm" in text and "normalisation stands between" in text


def test_projections_of_two_types_are_skipped() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 24).to(torch.float64), nn.Linear(24, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(nn.functional.relu(self.up(x.double())).float())

    found = explain(Mixed(), example_inputs=(torch.randn(2, 3, 8),))
    assert not found.sites and any("several types, float32 and float64" in skip.reason for skip in found.skipped)
