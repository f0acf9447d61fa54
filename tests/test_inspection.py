"""Looking inside: graphs, logs, dumps, bisection, repro scripts."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import IDS, calibrated, dense_model, plain, without_inductor
from moecompile.codegen import cpu, triton_backend
from moecompile.passes import PassResult, clone, lower_triton
from moecompile.passes.match_experts import moe_nodes, set_operands
from moecompile.passes.pipeline import inference_passes
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import MixtralConfig, MixtralForCausalLM

import moecompile
from moecompile.compiled import compilation_of
from moecompile.errors import InputError
from moecompile.parity import tolerance_for
from moecompile.recipes import Contiguous


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Each test compiles anew."""
    torch._dynamo.reset()


def called(moe: Any, **options: Any) -> Any:
    fast = without_inductor(moecompile.compile(moe, **options))
    with torch.no_grad():
        fast(input_ids=IDS)
    return fast


def test_graphs_tell_their_story() -> None:
    fast = called(calibrated())
    (record,) = moecompile.last_graphs(fast)
    assert [step.name for step in record.passes] == [step.name for step in inference_passes()]
    merged = next(step for step in record.passes if step.name == "merge_shared")
    assert merged.modified == 4 and "-" in merged.diff() and "moe_ffn" in merged.diff()
    assert "fuse_block" in str(record) and "moe_ffn" in record.code() and "# lower_cpu from" in record.code()
    assert record.graph is record.graph_module.graph
    explained = moecompile.explain(fast)
    assert len(explained.layers) == 2 and "compiled graph" in str(explained) and "floor of this device" in str(explained)
    assert explained.to_dict()["costs"]["floor"]["decode_bytes"] > 0
    with pytest.raises(InputError, match="not compiled"):
        moecompile.last_graphs(calibrated())


def test_logs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called(plain())
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MOECOMPILE_LOGS", "match, passes,hoist")
    called(plain())
    lines = capsys.readouterr().err.splitlines()
    assert {line.split("]")[0] + "]" for line in lines} == {"[moecompile:match]", "[moecompile:passes]", "[moecompile:hoist]"}
    assert any("model.layers.1.mlp" in line for line in lines)
    monkeypatch.setenv("MOECOMPILE_LOGS", "match,everything")
    with pytest.raises(InputError, match="no artifact 'everything'"):
        called(plain())


def test_logs_of_what_is_generated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Plans, code, where kernels come from, launch constants."""
    monkeypatch.setenv("MOECOMPILE_LOGS", "plan,output_code,cache,autotune")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(cpu, "_kernels", {})
    dense = dense_model(intermediate_size=88)  # no other test builds its kernel
    fast = moecompile.compile(dense, plan=Contiguous(experts=6, shared=2, top_k=2))
    with torch.no_grad():
        fast(input_ids=IDS)
    lines = capsys.readouterr().err.splitlines()
    assert "[moecompile:plan] model.layers.1.mlp: D=32, shared=" in "\n".join(lines)
    assert any(line.startswith("[moecompile:output_code]") and "moe_ffn" in line for line in lines)
    if cpu.available() is None:
        assert any(line.startswith("[moecompile:cache] CPU kernel") and ": built in" in line for line in lines)
        spec = next(iter(cpu._kernels))
        cpu._kernels.clear()
        cpu.build(spec)
        assert "found on disk in" in capsys.readouterr().err
    if importlib.util.find_spec("triton"):
        node = moe_nodes(moecompile.last_graphs(fast)[-1].graph_module)[0]
        triton_backend._tuned.cache_clear()
        triton_backend.kernel_of(lower_triton.kernel_of(node), torch.device("cpu"))
        assert "[moecompile:autotune]" in capsys.readouterr().err


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
def test_generated_code_of_graphs_on_gpus() -> None:
    """A graph lowered to Triton shows the kernel's source, and another model's kernels are not in it."""
    called(plain())
    fast = called(plain(dense_model(intermediate_size=96)))
    (record,) = moecompile.last_graphs(fast)
    (name,) = [name for name in moecompile.generated_code(fast) if name.startswith("kernel_") and name != "kernel_operators"]
    assert "kernel(" in moecompile.generated_code(fast)[name]
    for node in moe_nodes(record.graph_module):
        set_operands(node, "test", backend="triton")
    (code,) = [code for name, code in moecompile.generated_code(fast).items() if name != "kernel_operators"]
    assert "@triton.jit" in code and "def expert_ffn" in code


def test_switching_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOECOMPILE_DISABLE", "fuse_block")
    layers = moecompile.last_graphs(called(plain()))[-1].layers
    assert {layer["router"] for layer in layers} == {"outside"}
    monkeypatch.setenv("MOECOMPILE_DISABLE", "all")
    assert moecompile.last_graphs(called(plain())) == []
    monkeypatch.setenv("MOECOMPILE_DISABLE", "fuse_nothing")
    with pytest.raises(InputError, match="no pass 'fuse_nothing'"):
        called(plain())


def test_dumps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOECOMPILE_DUMP_DIR", str(tmp_path / "dump"))
    called(calibrated())
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert len(files) == len(inference_passes()) and any("merge_shared" in name for name in files)
    text = next((tmp_path / "dump").glob("*fuse_router.txt")).read_text()
    assert "+++ after fuse_router" in text and "# fuse_router from" in text


class Wrong:
    """A pass that drops the output bias."""

    name, requires, ensures = "wrong", frozenset({"moe_ffn"}), frozenset[str]()

    def __call__(self, graph_module: GraphModule) -> PassResult:
        result = clone(graph_module)
        for node in moe_nodes(result):
            set_operands(node, self.name, bias=None)
        return PassResult(result, 1)


def test_bisection_names_the_pass() -> None:
    moe = calibrated(dense_model(num_hidden_layers=4))  # enough for equal layers to be outlined
    passes = inference_passes()
    at = [step.name for step in passes].index("lower_triton")
    with torch.no_grad():
        found = moecompile.bisect(moe, {"input_ids": IDS}, passes=[*passes[:at], Wrong(), *passes[at:]])
    assert found.culprit == "wrong" and "DIVERGES" in str(found)
    clean = moecompile.bisect(moecompile.compile(moe), {"input_ids": IDS})
    assert clean.culprit is None and [step.name for step in clean.steps[-2:]] == ["outline_layers", "inductor"]


def test_what_stands_for_infinity_is_no_size() -> None:
    """Anything would be allowed beside it."""
    plainly, masked = torch.full((3, 4), 7.0), torch.full((3, 4), 7.0)
    for value in (-torch.inf, torch.finfo(torch.float32).min, torch.nan):
        masked[0, 0] = value
        assert tolerance_for([masked]) == tolerance_for([plainly])


class Masked(nn.Module):
    """Puts out infinities, as a mask does."""

    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(x < 0.5, -torch.inf) * 2


class Failing:
    """A pass that cannot be run."""

    name, requires, ensures = "failing", (), ()

    def __call__(self, graph_module: GraphModule) -> PassResult:
        raise ValueError("no")


def test_bisection_of_infinities_and_of_passes_that_fail() -> None:
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    assert moecompile.bisect(Masked(), (x,)).culprit is None
    with pytest.raises(InputError, match="takes a module"):
        moecompile.bisect(moecompile.compile(lambda x: x), (x,))
    assert moecompile.bisect(Masked(), (x,), passes=[*inference_passes(), Failing()]).culprit == "failing"


def test_explaining_what_is_compiled_otherwise() -> None:
    with pytest.raises(InputError, match="takes a module"):
        moecompile.explain(moecompile.compile(lambda x: x))

    @moecompile.compile
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = plain()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(input_ids=ids).logits

    net = without_inductor(Twice().eval())
    with torch.no_grad():
        net(IDS)
    assert len(moecompile.explain(net, (IDS,)).layers) == 2
    record = compilation_of(net).records[0]
    record.fallback = "no room"
    assert f"note: graph {record.number} runs in eager mode: no room" in str(moecompile.explain(net, (IDS,)))


def test_explaining_a_stock_moe() -> None:
    """Which experts there are, what a token computes and reads of them."""
    config = MixtralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    model = MixtralForCausalLM._from_config(config, experts_implementation="eager").eval()
    told = moecompile.explain(model)
    assert [block["name"] for block in told.blocks] == [f"model.layers.{i}.mlp.experts" for i in (0, 1)]
    assert "D=32, experts=4x24, top_k=1" in str(told)
    one = 3 * 32 * 24  # a gated expert's numbers
    assert told.costs["flops_per_token"] == 2 * 2 * (one + 4 * 32) and told.costs["ffn_parameters"] == 2 * 4 * one
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    assert told.costs["floor"]["decode_bytes"] == 4 * (weights - 2 * 3 * one)
    rounded = moecompile.explain(moecompile.compile(model, weights="int8")).costs["floor"]["decode_bytes"]
    assert rounded == 4 * (weights - 2 * 4 * one) + 2 * (one + 4 * 3 * 24)  # and a scale for each row of a neuron


def test_what_rounded_weights_read() -> None:
    moe = plain()
    reads = [
        moecompile.explain(moecompile.compile(moe, weights=weights)).costs["floor"]["decode_bytes"]
        for weights in ("same", "int8", "int8-all")
    ]
    linears = sum(m.weight.numel() for n, m in moe.named_modules() if isinstance(m, nn.Linear) and "mlp" not in n)
    rows = sum(m.out_features for n, m in moe.named_modules() if isinstance(m, nn.Linear) and "mlp" not in n)
    routers = sum(b.router.weight.numel() for b in moecompile.moe_blocks(moe).values())
    assert reads[0] > reads[1] > reads[2]
    assert 0 <= (reads[1] - reads[2]) - (3 * linears - 4 * rows) <= 3 * routers  # a block's router is no linear layer there


def test_repro_scripts_compile_as_it_was_compiled(tmp_path: Path) -> None:
    fast = called(plain(), weights="int8", mode="max-autotune-no-cudagraphs")
    script = moecompile.write_repro(fast, tmp_path / "repro.py")
    assert "weights='int8'" in script.read_text() and "max-autotune-no-cudagraphs" in script.read_text()
    probe = "\nimport sys\nprint({layer['weight_format'] for layer in moecompile.last_graphs()[-1].layers}, file=sys.stderr)\n"
    script.write_text(script.read_text() + probe)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "{'int8'}" in done.stderr


def test_repro_scripts(tmp_path: Path) -> None:
    fast = moecompile.compile(plain())
    with pytest.raises(InputError, match="nothing was compiled"):
        moecompile.write_repro(fast, tmp_path / "early.py")
    without_inductor(fast)
    with torch.no_grad():
        fast(input_ids=IDS)
    script = moecompile.write_repro(fast, tmp_path / "repro.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.raises(InputError, match="no graph 5"):
        moecompile.write_repro(fast, tmp_path / "other.py", graph=5)
