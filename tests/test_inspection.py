"""Looking inside: graphs, logs, dumps, bisection, repro scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import calibrated, plain, tokens, without_inductor
from moecompile.passes import PassResult, clone
from moecompile.passes.match_experts import moe_nodes, set_operands
from moecompile.passes.pipeline import inference_passes
from torch import Tensor, nn
from torch.fx import GraphModule

import moecompile
from moecompile.compiled import compilation_of
from moecompile.errors import InputError
from moecompile.parity import tolerance_for

IDS = tokens(2, 11)


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
    moe = calibrated()
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
