"""Text files in, windows of tokens out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import corpus
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from moecompile import InputError
from moecompile.text import (
    calibration_windows,
    evaluation_windows,
    read_passages,
    read_text,
    shares,
    start_of,
    token_ids,
    windows,
)
from moecompile.tuning.data import Windows


class Numbers:
    """A tokenizer whose tokens are the numbers in the text, so that every window tells where it came from."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """The numbers of a text."""
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def numbers() -> Numbers:
    """The tokenizer."""
    return Numbers()


def count_up(path: Path, start: int, stop: int) -> Path:
    """A file of the numbers from start to stop."""
    path.write_text(" ".join(map(str, range(start, stop))))
    return path


# Reading


def test_text_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("  h\u00e9llo \u2014 w\u00f6rld\n\n\u4f60\u597d \U0001f600\n".encode())
    assert read_text(path) == "  h\u00e9llo \u2014 w\u00f6rld\n\n\u4f60\u597d \U0001f600\n"
    assert read_text(str(path)) == read_text(path)


def test_jsonl_is_its_text_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one\ntwo", "id": 1}, {"id": 2, "text": "three \u2028 four"}]
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=row["id"] == 1) for row in rows) + "\n", encoding="utf-8")
    assert read_passages(path) == ["one\ntwo", "three \u2028 four"]
    assert read_text(path) == "one\ntwo\nthree \u2028 four"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("no.txt", None, "there is no text file"),
        ("no.jsonl", None, "there is no text file"),
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\t\n", "is empty"),
        ("empty.jsonl", b"\n \n", "is empty"),
        ("latin.txt", b"caf\xe9", "not UTF-8 text \\(byte 3\\)"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}', "line 3: .*'text'"),
        ("b.jsonl", b'{"text": null}', "line 1: .*'text'"),
        ("c.jsonl", b'"text"', "line 1: .*'text'"),
        ("d.jsonl", b"{", "line 1: .*'text'"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_text(path)
    assert str(path) in str(caught.value)


def test_tokens_have_no_special_ones(tokenizer: Any) -> None:
    ids = token_ids(tokenizer, "the router sends")
    assert ids == [tokenizer.convert_tokens_to_ids(word) for word in ("the", "router", "sends")]


# Windows


def test_windows_do_not_overlap_and_leave_the_rest_out() -> None:
    assert windows(range(10), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows(range(9), 3).tolist() == windows(range(10), 3).tolist()
    assert windows(range(2), 3).shape == (0, 3)
    assert windows([], 3).dtype == torch.long
    assert windows(range(5), 3, start=[9]).tolist() == [[9, 0, 1], [9, 2, 3]]


def test_windows_begin_as_the_tokenizer_begins_a_text(tmp_path: Path, tokenizer: Any) -> None:
    assert start_of(tokenizer) == []
    begins = copy.deepcopy(tokenizer)
    begins.add_special_tokens({"bos_token": "the"})
    assert start_of(begins) == []  # it has such a token, but does not put it there
    bos = begins.bos_token_id
    begins._tokenizer.post_processor = processors.TemplateProcessing(single="the $A", special_tokens=[("the", bos)])
    assert start_of(begins) == [bos]
    text = tmp_path / "text.txt"
    text.write_text("router sends " * 20)
    plain = token_ids(begins, "router sends")
    for rows in (evaluation_windows(begins, [text], 5, 3), calibration_windows(begins, [text], 15, 5, 0)):
        assert rows.tolist() == [[bos, *plain, *plain]] * 3


def test_evaluation_takes_the_first_windows_of_each_file(tmp_path: Path, numbers: Numbers) -> None:
    a, b = count_up(tmp_path / "a.txt", 0, 11), count_up(tmp_path / "b.txt", 100, 109)
    rows = evaluation_windows(numbers, [a, b], 4, None)
    assert rows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [100, 101, 102, 103], [104, 105, 106, 107]]
    assert rows.dtype == torch.long
    assert evaluation_windows(numbers, [b, a], 4, 3).tolist() == [*rows[2:].tolist(), rows[0].tolist()]
    assert evaluation_windows(numbers, [a, b], 4, 2).tolist() == [rows[0].tolist(), rows[2].tolist()]  # a figure of both
    with pytest.raises(InputError, match="--max-windows is 1"):
        evaluation_windows(numbers, [a, b], 4, 1)
    assert evaluation_windows(numbers, [a], 11, None).tolist() == [list(range(11))]


def test_evaluation_refuses_what_cannot_be_measured(tmp_path: Path, numbers: Numbers) -> None:
    a, short = count_up(tmp_path / "a.txt", 0, 12), count_up(tmp_path / "short.txt", 0, 3)
    with pytest.raises(InputError, match="--window is 1"):
        evaluation_windows(numbers, [a], 1, None)
    with pytest.raises(InputError, match="--max-windows is 0"):
        evaluation_windows(numbers, [a], 4, 0)
    with pytest.raises(InputError, match=r"short\.txt has 3 tokens; one window needs 4"):
        evaluation_windows(numbers, [a, short], 4, None)
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        evaluation_windows(numbers, [a, tmp_path / "nowhere.txt"], 4, None)
    with pytest.raises(InputError, match=r"short\.txt has 3 tokens"):
        evaluation_windows(numbers, [a, short], 4, 3)  # it would be a figure of one


# Calibration


def test_calibration_takes_equal_shares_without_overlap(tmp_path: Path, numbers: Numbers) -> None:
    paths = [count_up(tmp_path / f"{part}.txt", 1000 * part, 1000 * part + 400) for part in range(3)]
    rows = calibration_windows(numbers, paths, 240, 10, seed=0)
    assert rows.shape == (24, 10) and rows.dtype == torch.long
    assert (rows.diff(dim=1) == 1).all()  # a window is a piece of the text
    assert (rows[:, 0] % 10 == 0).all()
    assert rows.unique().numel() == rows.numel()
    assert [int((rows[:, 0] // 1000 == part).sum()) for part in range(3)] == [8, 8, 8]


def test_calibration_shares_differ_by_one_at_most(tmp_path: Path, numbers: Numbers) -> None:
    paths = [count_up(tmp_path / f"{part}.txt", 1000 * part, 1000 * part + 400) for part in range(3)]
    rows = calibration_windows(numbers, paths, 110, 10, seed=0)
    assert sorted(int((rows[:, 0] // 1000 == part).sum()) for part in range(3)) == [3, 4, 4]


@given(st.integers(1, 200), st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 100)), min_size=1, max_size=6))
def test_shares_follow_the_weights_as_far_as_the_texts_go(total: int, texts: list[tuple[int, float]]) -> None:
    sizes, weights = [size for size, _ in texts], [weight for _, weight in texts]
    taken = shares(total, sizes, weights)
    assert sum(taken) == min(total, sum(sizes)) and all(0 <= part <= size for part, size in zip(taken, sizes, strict=True))
    some = [index for index, size in enumerate(sizes) if taken[index] < size]
    for a in some:  # no text that has more gives less, by its weight, than another
        for b in range(len(sizes)):
            assert (taken[a] + 1) / weights[a] >= (taken[b] - 1) / weights[b] - 1e-9


def test_calibration_by_weights(tmp_path: Path, numbers: Numbers) -> None:
    paths = [count_up(tmp_path / f"{part}.txt", 1000 * part, 1000 * part + size) for part, size in enumerate((400, 400, 50))]

    def parts(tokens: int, weights: list[float]) -> list[int]:
        rows = calibration_windows(numbers, paths, tokens, 10, 0, weights)
        return [int((rows[:, 0] // 1000 == part).sum()) for part in range(3)]

    assert parts(80, [1, 2, 1]) == [2, 4, 2]
    assert parts(400, [1, 3, 4]) == [9, 26, 5]  # the last has no more
    for weights in ([1, 2], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]):
        with pytest.raises(InputError, match="--calibration-weights"):
            parts(80, weights)


def test_calibration_is_spread_over_the_file(tmp_path: Path, numbers: Numbers) -> None:
    path = count_up(tmp_path / "a.txt", 0, 10_000)
    rows = calibration_windows(numbers, [path], 1000, 10, seed=0)
    quarters = [int((rows[:, 0] // 2500 == quarter).sum()) for quarter in range(4)]
    assert sum(quarters) == 100 and min(quarters) >= 10


def test_calibration_is_mixed(tmp_path: Path, numbers: Numbers) -> None:
    paths = [count_up(tmp_path / f"{part}.txt", 1000 * part, 1000 * part + 400) for part in range(2)]
    files = (calibration_windows(numbers, paths, 400, 10, seed=0)[:, 0] // 1000).tolist()
    assert files != sorted(files) and files != sorted(files, reverse=True)


def test_calibration_is_the_same_for_the_same_seed(tmp_path: Path, numbers: Numbers) -> None:
    path = count_up(tmp_path / "a.txt", 0, 1000)
    torch.manual_seed(1)
    first = calibration_windows(numbers, [path], 100, 10, seed=3)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, calibration_windows(numbers, [path], 100, 10, seed=3))
    assert not torch.equal(first, calibration_windows(numbers, [path], 100, 10, seed=4))
    torch.set_rng_state(state)


def test_calibration_leaves_the_global_random_state_alone(tmp_path: Path, numbers: Numbers) -> None:
    path = count_up(tmp_path / "a.txt", 0, 1000)
    before = torch.get_rng_state()
    calibration_windows(numbers, [path], 100, 10, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_calibration_takes_all_of_a_short_text(tmp_path: Path, numbers: Numbers) -> None:
    path = count_up(tmp_path / "a.txt", 0, 35)
    rows = calibration_windows(numbers, [path], 1000, 10, seed=0)
    assert sorted(rows[:, 0].tolist()) == [0, 10, 20]


def test_calibration_refuses_what_is_too_small(tmp_path: Path, numbers: Numbers) -> None:
    path, short = count_up(tmp_path / "a.txt", 0, 100), count_up(tmp_path / "short.txt", 0, 9)
    with pytest.raises(InputError, match="--calibration-window is 1"):
        calibration_windows(numbers, [path], 100, 1, seed=0)
    with pytest.raises(InputError, match="--calibration-tokens is 9; one window needs 10"):
        calibration_windows(numbers, [path], 9, 10, seed=0)
    with pytest.raises(InputError, match=r"short\.txt is shorter than one window of 10 tokens"):
        calibration_windows(numbers, [path, short], 100, 10, seed=0)


def test_calibration_with_a_real_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "words.txt"
    path.write_text(corpus(300, 7))
    rows = calibration_windows(tokenizer, [path], 128, 32, seed=0)
    ids = token_ids(tokenizer, path.read_text())
    assert rows.shape == (4, 32)
    for row in rows.tolist():
        assert any(ids[start : start + 32] == row for start in range(0, len(ids), 32))


def test_weights_are_shares_whatever_their_unit() -> None:
    assert shares(16, [99, 99], [1e307, 1e307]) == shares(16, [99, 99]) == [8, 8]
    assert sum(shares(16, [99, 99], [1e307, 1.0])) == 16
    parts = [torch.zeros(9, 4, dtype=torch.long), torch.ones(9, 4, dtype=torch.long)]
    assert len(Windows(parts, 3, 2, 0, [1e307, 1.0])) == 3
