"""The report: its structure, what it escapes, what it says when parts are missing, and how a browser shows it."""

from __future__ import annotations

import copy
import html
import math
import re
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moecompile.report import charts, render, text
from moecompile.report.quality import entropy

LAYERS, EXPERTS, SHARED, TOP_K = 6, 12, 4, 4
EVAL = "moecompile eval OUT --text FILE"
TUNE = "moecompile tune OUT --text FILE --tokens 500000"
SECTIONS = ("perplexity", "sites", "usage", "reconstruction", "diagnosis", "tuning", "costs")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "br", "img", "hr", "input"}


def measured(name: str, value: float | None, fraction: float | None = 0.5, **more: Any) -> dict[str, Any]:
    """A perplexity entry; ``more`` overrides its setting."""
    entry = {"name": name, "task": "perplexity", "corpus": "wiki.raw", "window": 1024, "windows": 8, "tokens": 8184}
    return entry | {"perplexity": value, "top_k": None, "active_fraction": fraction, "seconds": 16.5} | more


@pytest.fixture
def record() -> dict[str, Any]:
    """A whole record, with numbers that occur nowhere else by chance."""
    names = [f"model.layers.{i}.mlp" for i in range(LAYERS)]
    site = {
        "kind": "gated",
        "activation": "silu",
        "hidden_size": 577,
        "intermediate_size": 1537,
        "bias": False,
        "layout": "linear",
        "shared_neurons": 385,
        "experts": EXPERTS,
        "expert_width": 97,
        "top_k": TOP_K,
        "router": "layerwise",
    }
    fractions = [1 / 3] * (EXPERTS - 2) + [0.0005, 2 / 3 - 0.0005]
    return {
        "format": 1,
        "moecompile_version": "0.1.0",
        "created": "2026-11-21T01:00:00Z",
        "versions": {"torch": "2.13.0", "python": "3.11.7"},
        "source": "Small-135M",
        "recipe": "calibrated",
        "recipe_config": {"experts": EXPERTS, "ridge": 0.0123, "compensate": True},
        "experts": EXPERTS,
        "shared": SHARED,
        "top_k": TOP_K,
        "router": "layerwise",
        "active_fraction": 0.5,
        "parity_max_abs_error": 2.1e-5,
        "parity_tolerance": 1e-4,
        "calibration": {"files": ["books.txt", "code.txt"], "tokens": 32768, "window": 512, "seed": 7},
        "reconstruction": [
            {"site": name, "relative_error": 0.3111 + i / 100, "relative_error_uncompensated": 0.4555 + i / 100}
            for i, name in enumerate(names)
        ],
        "usage": [{"site": name, "fraction": fractions} for name in names],
        "sites": [{"name": name, **site} for name in names],
        "skipped": [{"name": "lm_head", "node": "linear_14", "reason": "no second projection"}],
        "costs": {
            "parameters": 136_284_992,
            "parameters_dense": 134_515_008,
            "ffn_parameters": 79_626_240,
            "router_parameters": 1_769_984,
            "active_ffn_parameters": 39_813_120,
            "flops_per_token_dense": 269_030_016,
            "flops_per_token": 192_943_744,
            "bytes": 547_000_123,
            "bytes_dense": 538_060_032,
        },
        "seconds": {"total": 201.4, "capture": 3.25, "calibrate": 182.6},
        "peak_rss_bytes": 3_412_000_000,
        "evaluations": [
            measured("dense", 29.25, 1.0),
            measured("calibrated", 58.5, top_k=TOP_K),
            measured("static", 162.75),
            measured("dense", 18.5, 1.0, corpus="books.txt", window=2048, windows=4),
            {"name": "calibrated", "task": "lambada", "corpus": "lambada.jsonl", "examples": 499, "accuracy": 0.2625},
        ],
    }


@dataclass
class Page:
    """What a reader of the page finds: text by section, table rows, attributes."""

    source: str
    text: str
    tables: dict[str, list[list[str]]]
    attributes: list[tuple[str, str, str]]
    headings: list[tuple[str, str]]
    unclosed: list[str]

    def section(self, anchor: str) -> str:
        found = re.search(rf'<section id="{anchor}".*?</section>', self.source, re.S)
        assert found, anchor
        return html.unescape(re.sub(r"<[^>]+>", " ", found[0]))

    def table(self, caption: str) -> list[list[str]]:
        return next(rows for name, rows in self.tables.items() if name.startswith(caption))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[tuple[list[str], list[list[str]]]] = []
        self.headings: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append(([], []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and self.open[-1] == "caption":
            self.tables[-1][0].append(data)
        elif self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][1][-1][-1] += data
        elif self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append((self.open[-1], data))


def read(source: str) -> Page:
    """Parse a page; fails where tags do not nest."""
    reader = _Reader()
    reader.feed(source)
    tables = {"".join(caption): rows for caption, rows in reader.tables}
    return Page(source, " ".join(reader.words), tables, reader.attributes, reader.headings, reader.open)


def test_structure(record: dict[str, Any]) -> None:
    page = read(render(record))
    assert page.source.startswith("<!doctype html>")
    assert not page.unclosed
    assert [tag for tag, _ in page.headings].count("h1") == 1
    assert [value for tag, key, value in page.attributes if tag == "section" and key == "id"] == list(SECTIONS)
    assert len(page.tables) == page.source.count("<table>") == page.source.count("<caption>")
    labels = [value for tag, key, value in page.attributes if tag == "svg" and key == "aria-label"]
    assert len(labels) == page.source.count('role="img"') and all(labels)
    targets = {value for _, key, value in page.attributes if key == "id"}
    assert all(value[1:] in targets for tag, key, value in page.attributes if tag == "a" and key == "href")


def test_headline(record: dict[str, Any]) -> None:
    head = html.unescape(re.sub(r"<[^>]+>", "", render(record).split("<main>")[0])).replace("\u202f", " ")
    for expected in (
        "Small-135M",
        "calibrated",
        "50 % of FFN neurons active per token",
        "29.25 \u2192 58.50",
        "2.00\u00d7",
    ):
        assert expected in head
    assert "2.1e-05" in head and "\u2713" in head and "\u2717" not in head
    assert "538.1 MB \u2192 547 MB" in head and "4 of 12 experts" in head


@pytest.mark.parametrize(
    ("error", "tolerance", "mark"),
    [
        (2e-4, 1e-4, "\u2717"),
        (float("nan"), 1e-4, "\u2717"),
        (1e-4, 1e-4, "\u2713"),
        (1e-5, None, None),
        (None, 1, None),
    ],
)
def test_parity_is_judged_only_where_it_can_be(
    record: dict[str, Any], error: float | None, tolerance: float | None, mark: str | None
) -> None:
    page = render(record | {"parity_max_abs_error": error, "parity_tolerance": tolerance})
    assert [one for one in "\u2713\u2717" if one in page] == ([mark] if mark else [])


def test_numbers_come_from_the_record(record: dict[str, Any]) -> None:
    page = read(render(record))
    rows = page.table("Perplexity on wiki.raw")
    assert rows[0][5:7] == ["perplexity", "over dense"]
    assert [row[5:7] for row in rows[1:]] == [
        ["29.25", "1.00\u00d7"],
        ["58.50", "2.00\u00d7"],
        ["162.75", "5.56\u00d7"],
    ]
    assert rows[1][7] == "8,184"
    sites = page.table("Rewritten sites")
    assert len(sites) == 1 + LAYERS
    assert sites[1][:4] == ["model.layers.0.mlp", "gated", "silu", "577"] and sites[1][7:] == [
        "385",
        "12",
        "97",
        "4",
        "layerwise",
    ]
    assert page.table("Left as they were")[1] == ["lm_head", "linear_14", "no second projection"]
    assert page.table("Relative error by site")[2][1:] == ["0.4655", "0.3211"]
    assert page.table("Sizes and FLOPs")[1] == [
        "FLOPs per token of FFNs, routers",
        "269,030,016",
        "192,943,744",
        "71.7\u202f%",
    ]
    for value in record["costs"].values():
        assert f"{value:,}" in page.text
    for expected in ("3.412\u202fGB", "3\u202fmin 21\u202fs", "32,768", "books.txt, code.txt", "2.13.0", "0.0123"):
        assert expected in page.text
    accuracy = page.table("Share of passages")
    assert accuracy[1][5:7] == ["499", "26.2\u202f%"]


def test_no_stray_numbers(record: dict[str, Any]) -> None:
    """Other numbers in, and none of the first ones is left on the page."""

    def scaled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: scaled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [scaled(item) for item in value]
        return value * 3 if isinstance(value, int) and value > 5000 else value

    before, after = read(render(record)).text, read(render(scaled(copy.deepcopy(record)))).text
    for value in record["costs"].values():
        assert f"{value:,}" in before and f"{value:,}" not in after and f"{3 * value:,}" in after


def test_only_like_is_compared(record: dict[str, Any]) -> None:
    record["evaluations"] = [
        measured("dense", 20.0, 1.0),
        measured("calibrated", 40.0),
        measured("calibrated", 90.0, window=2048),
        measured("calibrated", 70.0, windows=4),
        measured("calibrated", 60.0, corpus="books.txt"),
    ]
    page = read(render(record))
    section = page.section("perplexity")
    assert page.table("Perplexity on wiki.raw, 8\u00a0\u00d7\u00a01,024")[2][6] == "2.00\u00d7"
    for setting in (
        "wiki.raw, 8\u00a0\u00d7\u00a02,048",
        "wiki.raw, 4\u00a0\u00d7\u00a01,024",
        "books.txt, 8\u00a0\u00d7\u00a01,024",
    ):
        rows = page.table(f"Perplexity on {setting}")
        assert len(rows) == 2 and rows[1][6] == text.MISSING
    assert section.count("has not been measured in this setting") == 3
    assert page.source.count('class="line"') == 2  # those of the reconstruction errors alone


def test_a_score_behind_a_prefix_is_another_setting(record: dict[str, Any]) -> None:
    record["evaluations"] = [
        measured("dense", 20.0, 1.0),
        measured("calibrated", 40.0, skip=512),
        measured("dense", 16.0, 1.0, skip=512),
        measured("calibrated", 24.0, dense_prefix=512),
        measured("calibrated", 59.0),
    ]
    page = read(render(record))
    whole = "Perplexity on wiki.raw, 8\u00a0\u00d7\u00a01,024 tokens"
    assert [row[6] for row in page.table(whole)[2:]] == ["2.95\u00d7"]
    behind = page.table(f"{whole} behind their first 512")
    assert sorted(row[6] for row in behind[2:]) == ["1.50\u00d7", "2.50\u00d7"]
    head = render(record).split("<main>")[0]
    assert "59.00" in head and "40.00" not in head


def test_comparisons_join(record: dict[str, Any]) -> None:
    other = record | {"experts": 36, "evaluations": [measured("dense", 29.25, 1.0), measured("calibrated", 39.0)]}
    stranger = record | {"source": "Other-1B", "evaluations": [measured("calibrated", 11.0)]}
    page = read(render(record, comparisons=[other, stranger, record, measured("flap", 87.75)]))
    rows = {row[0]: row for row in page.table("Perplexity on wiki.raw, 8\u00a0\u00d7\u00a01,024 tokens \u00b7 Small-135M")[1:]}
    assert list(rows) == [
        "dense",
        "calibrated",
        "calibrated (36 experts, 4 shared, layerwise router)",
        "flap",
        "static",
    ]
    assert rows["flap"][6] == "3.00\u00d7" and rows["calibrated"][5] == "58.50"
    assert page.table("Perplexity on wiki.raw, 8\u00a0\u00d7\u00a01,024 tokens \u00b7 Other-1B")[1][6] == text.MISSING


def test_headline_is_at_the_folders_own_top_k(record: dict[str, Any]) -> None:
    record["evaluations"] = [measured("dense", 20.0, 1.0), measured("calibrated", 25.0, 0.75, top_k=8)]
    head = render(record).split("<main>")[0]
    assert "25.00" not in head and EVAL in head


def test_usage_and_entropy(record: dict[str, Any]) -> None:
    page = read(render(record))
    rows = page.table("Use of the experts by site")
    assert rows[1][1] == "12" and rows[1][2] == "33.3\u202f%" and rows[1][6] == "1"
    assert "top-k / N = 33.3\u202f%" in page.section("usage")
    assert page.source.count("model.layers.3.mlp, expert ") == EXPERTS
    assert entropy([0.25] * 8) == "1.000" and entropy([1.0, 0.0, 0.0]) == "0.000"
    assert entropy([0.0, 0.0]) == entropy([1.0]) == text.MISSING
    assert entropy([0.5, math.nan]) == "NaN"
    shares = [0.5, 0.25, 0.125, 0.125]
    assert float(entropy(shares)) == pytest.approx(1.75 / 2)


def test_everything_is_escaped(record: dict[str, Any]) -> None:
    attack = "\"><script>alert('x')</script><img src=x onerror=alert(1)>"

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if key in known else key + attack: poisoned(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poisoned(item) for item in value]
        return value + attack if isinstance(value, str) and value not in ("perplexity", "dense") else value

    known = {key for part in (record, *record["evaluations"], record["costs"], record["calibration"]) for key in part}
    known |= {key for part in ("reconstruction", "usage", "sites", "skipped") for key in record[part][0]}
    page = read(render(poisoned(record)))
    tags = {tag for tag, _, _ in page.attributes}
    assert "<script" not in page.source and "<img" not in page.source
    assert not tags & {"script", "img"} and not any(key.startswith("on") for _, key, _ in page.attributes)
    assert "<script>" in page.text  # shown as text


def test_nothing_is_loaded(record: dict[str, Any]) -> None:
    record["source"] = "https://example.org/model"
    record["recipe_config"]["origin"] = "http://example.org"
    page = read(render(record))
    assert "https://example.org/model" in page.text
    loads = [value for _, key, value in page.attributes if key in ("src", "href", "srcset", "data", "action")]
    assert all(value.startswith("#") for value in loads)
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "://" not in style
    assert "default-src 'none'" in page.source and "<link" not in page.source


@pytest.mark.parametrize("missing", ["evaluations", "usage", "reconstruction", "costs", "sites", "calibration", "seconds"])
def test_a_missing_part_is_one_sentence(record: dict[str, Any], missing: str) -> None:
    empty: tuple[Any, ...] = (None, [], {})
    for value in empty:
        changed = record | {missing: value}
        whole, part = read(render(record)), read(render(changed))
        assert part.source.count('class="missing"') > 0
        assert part.source.count("<svg") <= whole.source.count("<svg")
        assert "None" not in part.text and not re.search(r"<svg[^>]*></svg>", part.source)
        if missing in ("evaluations", "usage"):
            anchor, command = ("perplexity", EVAL) if missing == "evaluations" else ("usage", TUNE)
            assert command in part.section(anchor)
    del record[missing]
    assert read(render(record)).source.count("<section") == len(SECTIONS)


def test_an_empty_record_renders() -> None:
    page = read(render({}))
    assert [value for tag, key, value in page.attributes if tag == "section" and key == "id"] == list(SECTIONS)
    assert EVAL in page.section("perplexity") and "<svg" not in page.source and "None" not in page.text


def test_a_static_recipe_has_no_router(record: dict[str, Any]) -> None:
    record |= {"recipe": "static", "router": "none", "usage": [], "experts": None, "shared": None, "top_k": None}
    page = read(render(record))
    assert "has no router" in page.section("usage") and "no router" in page.source.split("<main>")[0]
    assert "162.75" in page.source.split("<main>")[0]


def test_what_is_not_finite_is_text(record: dict[str, Any]) -> None:
    inf, nan = math.inf, math.nan
    record["evaluations"] += [measured("cmoe", inf), measured("flap", nan), measured("broken", None)]
    record["reconstruction"][0]["relative_error"] = nan
    record["usage"][0]["fraction"] = [nan, inf, None] + [0.3] * (EXPERTS - 3)
    record["costs"]["flops_per_token"] = nan
    record["seconds"]["calibrate"] = inf
    page = read(render(record))
    rows = {row[0]: row for row in page.table("Perplexity on wiki.raw")[1:]}
    assert rows["cmoe"][5] == "infinite" and rows["flap"][5] == "NaN" and rows["broken"][5] == text.MISSING
    assert "3 of 6 rows" in page.section("perplexity")
    drawn = [value for tag, key, value in page.attributes if key in ("d", "x", "y", "width", "transform", "viewbox")]
    assert not any("nan" in value.lower() or "inf" in value.lower() for value in drawn)
    values: tuple[Any, ...] = (nan, inf, -inf, "NaN", "odd", [], {}, 1e308, -1e308, 5e-324, -1.0, 0, True, 10**400)
    for odd in values:
        changed = copy.deepcopy(record) | {"active_fraction": odd, "top_k": odd, "peak_rss_bytes": odd, "seconds": odd}
        changed["evaluations"].append(measured("odd", odd, odd, tokens=odd, window=odd))
        changed["reconstruction"][1]["relative_error"] = odd
        changed["usage"][1]["fraction"] = [odd] * EXPERTS
        changed["costs"] = dict.fromkeys(changed["costs"], odd)
        read(render(changed))


def test_the_plan_fills_in(record: dict[str, Any]) -> None:
    @dataclass
    class Site:
        name: str
        kind: str = "plain"

    @dataclass
    class Plan:
        sites: tuple[Site, ...]
        router: str = "pregate"

    del record["sites"], record["router"]
    page = read(render(record, plan=Plan((Site("encoder.0.mlp"),))))
    assert page.table("Rewritten sites")[1][:2] == ["encoder.0.mlp", "plain"] and "pregate router" in page.text
    assert "layerwise" not in read(render(record, plan={"router": "pregate"})).text


@pytest.mark.parametrize("span", [(0.0, 1.0), (29.2, 162.7), (5.0, 5.0), (0.0, 0.0), (-3.0, 2.0), (1e-9, 3e-9)])
def test_ticks_cover(span: tuple[float, float]) -> None:
    found = charts.ticks(*span)
    assert 2 <= len(found) <= 9 and found == sorted(set(found))
    assert found[0] <= span[0] and found[-1] >= span[1] * (1 - 1e-9)


def test_wide_spans_are_logarithmic(record: dict[str, Any]) -> None:
    assert "logarithmic" not in read(render(record)).section("perplexity")
    record["evaluations"].append(measured("contiguous", 48_000.0))
    assert "logarithmic" in read(render(record)).section("perplexity")
    assert charts.log_ticks(29.0, 48_000.0)[0] <= 29 and charts.log_ticks(29.0, 48_000.0)[-1] >= 48_000


def browse(tmp_path: Path, page: Path, *flags: str) -> str:
    """What headless Chromium prints for a page, with every host name unresolvable."""
    assert CHROMIUM
    common = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    command = [CHROMIUM, *common.split(), "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", *flags]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def pixels(png: bytes) -> set[bytes]:
    """The distinct rows of a PNG, unfiltered enough to tell a drawing from a blank page."""
    data, at = b"", 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        data += png[at + 8 : at + 8 + length] if kind == b"IDAT" else b""
        at += 12 + length
    width, _, _, colour = struct.unpack(">IIBB", png[16:26])
    stride = 1 + width * {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    raw = zlib.decompress(data)
    return {raw[i : i + stride] for i in range(0, len(raw), stride)}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_in_a_browser(record: dict[str, Any], tmp_path: Path) -> None:
    """Offline: the sections are there, the page is not blank, and nothing makes it wider than a phone."""
    record["source"] = "organisation/" + "a-very-long-model-name-" * 6
    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    source = render(record)
    page.write_text(source, encoding="utf-8")
    dom = browse(tmp_path, page, "--dump-dom", f"--screenshot={shot}", "--window-size=1200,1600")
    if not dom:  # some versions do one of the two at a time
        dom = browse(tmp_path, page, "--dump-dom", "--window-size=1200,1600")
    if not shot.exists():
        browse(tmp_path, page, f"--screenshot={shot}", "--window-size=1200,1600")
    assert all(f'<section id="{anchor}"' in dom for anchor in SECTIONS)
    assert len(pixels(shot.read_bytes())) > 100

    # A window is at least 500 px wide, a frame is not. The frame's script comes before the policy that forbids scripts.
    report = "parent.document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    script = f"<head><script>addEventListener('load', () => {{ {report} }})</script>"
    framed = html.escape(source.replace("<head>", script, 1))
    frame = f'<iframe style="width:390px;height:800px;border:0" srcdoc="{framed}"></iframe>'
    page.write_text(f"<!doctype html><meta charset=utf-8><title>none</title>{frame}", encoding="utf-8")
    found = re.search(r"<title>(\d+) of (\d+)</title>", browse(tmp_path, page, "--dump-dom"))
    assert found, "the page in the frame did not load"
    assert int(found[2]) == 390 and int(found[1]) <= 390
