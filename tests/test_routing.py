"""What routers do on a text: by hand, on a model, and on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import calibrated, tokens
from pregating import pregated_model

import moecompile
from moecompile import InputError
from moecompile.cli import main
from moecompile.front import decide
from moecompile.recipes import Contiguous, Static
from moecompile.report import render
from moecompile.report.text import percent
from moecompile.routing import choices, entropy, expected_kept, kept, mutual_information, reuse, routing_record, transitions

CHOSEN = torch.tensor([[[0, 1], [1, 2], [3, 2], [0, 3]]])  # (1, 4, 2)


def test_by_hand() -> None:
    assert kept(CHOSEN) == pytest.approx((1 + 1 + 1) / 6)
    assert expected_kept(CHOSEN, 4) == pytest.approx(4 * 0.5**2 / 2)
    joint = transitions(CHOSEN[..., :1], CHOSEN[..., 1:], 4)
    assert joint[0, 1] == 0.25 and joint[0, 3] == 0.25 and float(joint.sum()) == pytest.approx(1)
    assert entropy(torch.tensor([0.5, 0.25, 0.25])) == pytest.approx(1.5)


def test_mutual_information() -> None:
    """All of the entropy where one layer tells the other, none where they are independent."""
    assert mutual_information(torch.eye(4).double() / 4) == pytest.approx(2.0)
    assert mutual_information(torch.full((4, 4), 1 / 16).double()) == pytest.approx(0.0)


def test_reuse() -> None:
    """An expert every four tokens: made again within 4, not within 2."""
    chosen = (torch.arange(80) % 4).view(1, 80, 1)
    assert reuse(chosen, 4) == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("aligned", [True, False])
def test_choices_of_a_pregated_model(aligned: bool) -> None:
    model, ids = pregated_model(aligned=aligned), tokens(3, 8)
    found = choices(model, ids)
    scores, _ = decide(model, {"input_ids": ids})
    own = scores.topk(2, dim=-1).indices
    for layer, chosen in enumerate(found.values()):
        assert torch.equal(chosen.flatten(0, 1), own if aligned else own[:, layer])
    record = routing_record(model, ids, ["x"] * 8, "t.txt")
    assert record["aligned"] is aligned and len(record["layers"]) == 2
    if aligned:
        assert record["adjacent"][0]["share"] > 0.3


def test_layerwise_routers_are_looked_at_too() -> None:
    model, ids = calibrated(), tokens(2, 8)
    found = choices(model, ids)
    assert [tuple(chosen.shape) for chosen in found.values()] == [(2, 8, 2)] * 2
    moecompile.set_top_k(model, None)
    with pytest.raises(InputError, match="chooses experts"):
        choices(model, ids)


def test_page_shows_tokens_and_escapes_them() -> None:
    record = routing_record(pregated_model(aligned=False), tokens(2, 40), ["<b>&"] * 40, "t.txt")
    training = {"agreement": 0.62, "constant_agreement": 0.3, "same_as_previous": 0.7, "tokens": 512, "steps": 9}
    page = render({"routing": json.loads(json.dumps(record)), "router_training": training})
    assert "&lt;b&gt;&amp;" in page and "<b>" not in page and 'class="token s' in page
    assert percent(0.62) in page and "Mutual information between adjacent layers" in page and "Transitions" in page
    assert 'id="routing"' not in render({})
    assert "--routing" in render({"router_training": training})


def test_command_measures_and_keeps(dense_folder: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "moe"
    dense = moecompile.hub.load_dense(str(dense_folder))
    tokenizer = moecompile.hub.load_tokenizer(str(dense_folder))
    moecompile.save(moecompile.convert(dense, Contiguous(experts=4, top_k=2)), out, tokenizer=tokenizer)
    command = ["report", str(out), "--routing", str(text), "--tokens", "96", "--window", "48", "--quiet", "--json"]
    assert main(command) == 0
    page = Path(json.loads(capsys.readouterr().out)["path"]).read_text(encoding="utf-8")
    assert 'id="routing"' in page and moecompile.checkpoint.record_of(out)["routing"]["tokens"] == 96
    static = tmp_path / "static"
    plan = moecompile.plan(dense, Static(0.5), [tokens(1, 8).remainder(20)])
    moecompile.save(moecompile.convert(dense, plan), static, tokenizer=tokenizer)
    assert main(["report", str(static), "--routing", str(text), "--tokens", "96", "--window", "48", "--quiet"]) == 2
    assert "chooses experts" in capsys.readouterr().err
