"""Decode and prefill of a converted model beside dense, beside a static narrow model, beside transformers' experts; one run.

    python benchmarks/speed.py [--dtype float32 bfloat16] [--output benchmarks/results]

Every system of a table is compiled first; then rounds go through all of them in turn, so that a slow minute of the machine hits
all alike. Medians over rounds; ``speedup`` is over dense in the same dtype. Rows:

    dense             the model under torch.compile (Inductor)
    static 50%, 25%   a dense model of half, a quarter of the FFN width under torch.compile: the practical ceiling
    ours 50%, 25%     the split model under moecompile.compile; with int8, the experts' weights are read as int8; with int8-all,
                      those of projections and head too. "slices of 6": quality.py's split for `calibrated`; the others have 24
    batched_mm, ...   the same split, the same weights and router, experts by transformers' implementations under torch.compile
                      (eager: without torch.compile, which would compile each of its loops' graphs anew)

The limit beside a decode row counts bytes: weights that dense must read per token over those that the row must read. The limit
beside a prefill row counts multiply-adds. Quality does not enter here: neurons are split in stored order, routers are random.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import moecompile
from moecompile.block import Experts
from moecompile.files import write_bytes
from moecompile.hub import load_dense
from moecompile.overlay import share
from moecompile.plans import MoEPlan
from moecompile.recipes import Contiguous

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from fetch_model import fetch
from quality_variants import OWN

PEERS = ("eager", "batched_mm", "grouped_mm")
PROMPT = 128  # tokens in the cache when decoding starts
Step = Callable[[], Tensor]  # one step -> its logits


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def split(dense: nn.Module, shared: int, experts: int, top_k: int) -> nn.Module:
    """A split of the dense model whose routers are random: every token chooses other experts."""
    plan: MoEPlan = moecompile.plan(dense, Contiguous(experts=experts, shared=shared, top_k=top_k))
    moe = moecompile.convert(dense, plan)
    generator = torch.Generator().manual_seed(0)
    for block in moecompile.moe_blocks(moe).values():
        block.router.weight.data = torch.randn(block.router.weight.shape, generator=generator)
    return moe.eval()


def narrow(dense: Any, share: float) -> Any:
    """A dense model with the first share of every FFN's neurons: what a static split of that size costs."""
    config = copy.deepcopy(dense.config)
    config.intermediate_size = int(config.intermediate_size * share)
    small = type(dense)(config)
    state = dense.state_dict()
    for name, tensor in small.state_dict().items():
        full = state[name]
        tensor.copy_(full[tuple(slice(0, size) for size in tensor.shape)])
    return small.eval()


class PeerExperts(nn.Module):
    """The split's experts as transformers' implementations want them; its eager loop is Mixtral's."""

    def __init__(self, experts: Experts, implementation: str) -> None:
        super().__init__()
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        self.gate_up_proj, self.down_proj = experts.up, nn.Parameter(experts.down_proj.detach().contiguous(), False)
        self.num_experts, self.act_fn = experts.up.shape[0], nn.SiLU()
        self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = True, False, False, True
        self.has_post_expert_norm = self._is_expert_parallel = False
        self.config = type("Config", (), {"_experts_implementation": implementation})()
        eager = getattr(MixtralExperts.forward, "__wrapped__", None)
        if implementation == "eager" and eager is None:
            raise RuntimeError("transformers' eager experts were not found")
        self.function = eager if implementation == "eager" else ALL_EXPERTS_FUNCTIONS[implementation]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """(T, D), (T, K), (T, K) -> (T, D)."""
        return self.function(self, x, ids, weights)


def peer(moe: nn.Module, implementation: str) -> nn.Module:
    """The split model with its experts computed by transformers."""
    twin = share(moe)
    for block in moecompile.moe_blocks(twin).values():
        block.experts = PeerExperts(block.experts, implementation)
    return twin


def decoder(model: Any, call: Any, vocabulary: int) -> Step:
    """One decoded token at batch 1 behind a prompt; every round begins with the cache of the prompt."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, vocabulary, (1, PROMPT), generator=generator)
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)  # uncompiled: one graph less to build
    saved = [(layer.keys.contiguous().clone(), layer.values.contiguous().clone()) for layer in cache.layers]
    tokens = torch.randint(0, vocabulary, (64, 1, 1), generator=generator)
    count = 0

    def step() -> Tensor:
        nonlocal count
        count += 1
        out = call(input_ids=tokens[count % 64], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cast(Tensor, out.logits)

    def rewind() -> None:
        for layer, (keys, values) in zip(cache.layers, saved, strict=True):
            layer.keys, layer.values = keys.clone(), values.clone()

    rewind()
    step.rewind = rewind  # type: ignore[attr-defined]
    return step


def prefiller(call: Any, vocabulary: int, length: int) -> Step:
    """One prompt, as generate() runs it: the last position's logits."""
    prompt = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(2))

    def step() -> Tensor:
        return cast(Tensor, call(input_ids=prompt, use_cache=True, logits_to_keep=1).logits)

    return step


def measure(
    steps: dict[str, Step], rounds: int, repeat: int, ask: bool = False, verify: Callable[[str], object] = lambda _: None
) -> dict[str, float]:
    """Median seconds per step over rounds; within a round each system takes ``repeat`` steps, of which the median counts.
    With ``ask`` the rounds begin when a line is read, so that other work can be stopped for them alone. ``verify`` as for
    :func:`agree`."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    first = {}
    for name, step in steps.items():
        first[name] = step()
        for _ in range(3):
            step()
        say(f"    warm: {name}")
    agree(first, verify)
    if ask:
        say("    ready: Enter starts the rounds")
        sys.stdin.readline()
    for _ in range(rounds):
        for name, step in steps.items():
            times = []
            if rewind := getattr(step, "rewind", None):
                rewind()
            for _ in range(repeat):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            taken[name].append(statistics.median(times))
    return {name: statistics.median(times) for name, times in taken.items()}


def sizes(model: Any, active: float) -> tuple[float, float]:
    """(parameters read per decoded token, multiply-adds per prompt token without the head) at an active share of the FFNs."""
    config = model.config
    ffn = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    attention = sum(p.numel() for n, p in model.named_parameters() if "self_attn" in n)
    return attention + head + active * ffn, attention + active * ffn


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """Compiled code of one table is forgotten before the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    gc.collect()


@dataclass(frozen=True)
class System:
    """One row: a model, what is called, the active share of the FFNs, bytes per weight over the dtype's (FFNs, others)."""

    model: Any
    call: Any
    active: float
    width: float = 1.0
    others: float = 1.0


def systems(dense: Any, dtype: torch.dtype, phase: str, peers: bool, only: list[str] | None) -> dict[str, System]:
    """The rows of one table; of those named by ``only`` if it is given. What is not asked for is not built."""

    def asked(name: str) -> bool:
        return only is None or name in only

    dense = copy.deepcopy(dense).to(dtype)
    chosen = {"dense": System(dense, torch.compile(dense, dynamic=True), 1.0)}
    for part in (0.5, 0.25) if phase == "decode" else (0.5,):
        if asked(name := f"static {part:.0%}"):
            small = narrow(dense, part).to(dtype)
            chosen[name] = System(small, torch.compile(small, dynamic=True), part)
    splits = {0.75: (16, 48, 32), 0.5: (16, 48, 16), 0.25: (8, 56, 8)}
    for part, (shared, experts, top_k) in splits.items():
        if part == (0.75 if phase == "decode" else 0.25) or not (part == 0.5 or asked(f"ours {part:.0%}")):
            continue
        moe = split(dense, shared, experts, top_k)
        others = [f"{implementation} {part:.0%}" for implementation in PEERS]
        others = [name for name in others if peers and asked(name)]
        base = copy.deepcopy(moe) if others else moe  # ours lays its weights out anew
        for name in others:
            other = peer(base, name.split()[0])
            call = other if name.startswith("eager") else torch.compile(other, dynamic=True)
            chosen[name] = System(other, call, part)
        chosen[f"ours {part:.0%}"] = System(moe, moecompile.compile(moe, dynamic=True), part)
        if asked(name := f"ours {part:.0%}, slices of 6"):
            shared, top_k, experts = OWN[part]
            fine = split(dense, shared, experts, top_k)
            chosen[name] = System(fine, moecompile.compile(fine, dynamic=True), part)
        byte = 1 / dtype.itemsize
        for weights, rest in (("int8", 1.0), ("int8-all", byte))[: 2 if phase == "decode" else 1]:
            if part == 0.5 and asked(name := f"ours {part:.0%}, {weights}"):
                fast = moecompile.compile(moe, dynamic=True, weights=weights)
                chosen[name] = System(moe, fast, part, byte, rest)
    return chosen


def agree(found: dict[str, Tensor], verify: Callable[[str], object]) -> None:
    """Systems with the same weights and routers gave the same logits (float32; rounding to bfloat16 changes routing).

    Sums in another order may turn a close choice of a random router, and with it everything behind (in a prompt of 512 tokens
    and 30 layers a choice as close as rounding is to be expected): a difference is said. One of the eager loop must be such a
    turn: ``verify`` compares every layer of the compiled model of a share with eager code on the same inputs, and finds the
    turned choice.

    Raises:
        ParityError: ours are wrong.
    """
    for name in found:
        implementation, _, share = name.partition(" ")
        wanted = found.get(f"ours {share}")
        if implementation in PEERS and wanted is not None and wanted.dtype == torch.float32:
            error = ((found[name] - wanted).norm() / wanted.norm()).item()
            say(f"    {name} against ours: relative difference {error:.1e}")
            if error > 1e-3 and implementation == "eager":
                verify(share)
                say("    on the same inputs every layer agrees with eager code: a close choice of a random router turned")


def table(dense: Any, dtype: torch.dtype, phase: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one phase in one dtype."""
    rows = []
    name_of = str(dtype).removeprefix("torch.")
    with fresh(), torch.no_grad():
        chosen = systems(dense, dtype, phase, not options.no_peers, options.only)
        vocabulary = dense.config.vocab_size
        if phase == "decode":
            steps = {name: decoder(each.model, each.call, vocabulary) for name, each in chosen.items()}
            seconds = measure(steps, options.rounds, 16, options.ask)
        else:
            steps = {name: prefiller(each.call, vocabulary, options.prefill) for name, each in chosen.items()}

            def verify(share: str) -> object:
                moe = chosen[f"ours {share}"].model
                return prefiller(moecompile.compile(moe, dynamic=True, verify=True), vocabulary, options.prefill)()

            seconds = measure(steps, options.rounds, 1, options.ask, verify)
        full = sizes(dense, 1.0)
        for name, each in chosen.items():
            own = sizes(dense, each.active)
            ffn = own[0] - sizes(dense, 0.0)[0]
            read = ffn * each.width + (own[0] - ffn) * each.others
            limit = full[0] / read if phase == "decode" else full[1] / own[1]
            tokens = 1 if phase == "decode" else options.prefill
            rows.append(
                {
                    "system": name, "phase": phase, "dtype": name_of, "batch": 1, "tokens": tokens,
                    "seconds": seconds[name], "tokens_per_second": tokens / seconds[name],
                    "speedup": seconds["dense"] / seconds[name], "limit": limit, "date": str(date.today()),
                }
            )  # fmt: skip
    return rows


COMPILE = """
import sys, time, torch, moecompile
torch.set_num_threads({threads})
model = moecompile.load({path!r}).eval()
ids = torch.randint(0, 1000, (1, 12))
fast = moecompile.compile(model)
start = time.perf_counter()
with torch.no_grad():
    out = fast(input_ids=ids, use_cache=True)
    first = time.perf_counter() - start
    for _ in range(2):
        out = fast(input_ids=torch.tensor([[7]]), past_key_values=out.past_key_values, use_cache=True)
print(first, time.perf_counter() - start, len(moecompile.last_graphs(fast)))
"""


def compile_seconds(dense: Any) -> dict[str, Any]:
    """Seconds in a new process from the first call until it returns (one graph), and until the second decoded token (all
    graphs): with an empty cache, and with a filled one."""
    with tempfile.TemporaryDirectory() as folder:
        moe = split(dense, 16, 48, 16)
        moecompile.save(moe, Path(folder) / "moe")
        script = COMPILE.format(threads=torch.get_num_threads(), path=str(Path(folder) / "moe"))
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "cache")}
        found: dict[str, Any] = {"date": str(date.today())}
        for name in ("cold", "warm"):
            command = [sys.executable, "-c", script]
            printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
            found[f"{name}_first_call"], found[name], found["graphs"] = map(float, printed[-3:])
            say(f"  compile, {name}: {found[f'{name}_first_call']:.1f} s, then {found[name]:.1f} s")
        return found


def markdown(result: dict[str, Any]) -> str:
    """The tables as text."""
    lines = [f"# Speed: {result['model']}, {result['machine']}", ""]
    lines += [f"torch {result['torch']}, transformers {result['transformers']}, {result['threads']} threads."]
    if compiled := result.get("compile_seconds"):
        measured = compiled.get("date", result["date"])
        first = f"cold {compiled['cold_first_call']:.1f} s, warm {compiled['warm_first_call']:.1f} s"
        lines += [
            f"Compile time of the 50 % model in a new process: its first call, a prompt: {first}; until the second decoded"
        ]
        last = f"cold {compiled['cold']:.1f} s, warm {compiled['warm']:.1f} s"
        lines += [f"token, {compiled['graphs']:.0f} graphs: {last} ({measured})."]
    groups = dict.fromkeys((row["phase"], row["dtype"]) for row in result["rows"])
    for phase, dtype in groups:
        rows = [row for row in result["rows"] if (row["phase"], row["dtype"]) == (phase, dtype)]
        tokens = f"{rows[0]['tokens']} tokens" if phase == "prefill" else "batch 1"
        lines += [
            "",
            f"## {phase}, {tokens}, {dtype} ({rows[0].get('date', result['date'])})",
            "",
            "| system | ms | tokens/s | over dense | limit |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            lines.append(
                f"| {row['system']} | {row['seconds'] * 1e3:.1f} | {row['tokens_per_second']:.1f} | {row['speedup']:.2f} | "
                f"{row['limit']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def machine() -> str:
    """The processor's name and number of cores."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        name = text.split("model name")[1].split(":")[1].splitlines()[0].strip()
    return f"{name}, {os.cpu_count()} cores"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--phase", nargs="+", choices=("decode", "prefill"), default=["decode", "prefill"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prefill", type=int, default=512, metavar="L", help="tokens of the prompt (default: 512)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-peers", action="store_true", help="leave transformers' experts out")
    parser.add_argument("--compile-time-only", action="store_true", help="measure nothing else; the tables stay")
    parser.add_argument("--no-compile-time", action="store_true", help="do not measure how long compiling takes")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="only these rows, and dense and ours 50%% beside them")
    parser.add_argument("--ask", action="store_true", help="wait for Enter before the rounds of each table")
    parser.add_argument("--append", action="store_true", help="keep the other tables of --output/speed.json")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = load_dense(str(fetch())).float().eval()
    result: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct", "machine": machine(), "threads": options.threads, "date": str(date.today()),
        "torch": torch.__version__, "transformers": transformers.__version__, "rounds": options.rounds, "rows": [],
    }  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    if options.append or options.compile_time_only:
        if not (options.output / "speed.json").exists():
            raise SystemExit(f"there are no tables in {options.output} yet to keep")
        before = json.loads((options.output / "speed.json").read_text())
        asked = () if options.compile_time_only else options.phase
        again = {(phase, dtype) for phase in asked for dtype in options.dtype}
        result["rows"] = [row for row in before["rows"] if (row["phase"], row["dtype"]) not in again]
        result |= {"compile_seconds": before["compile_seconds"]} if "compile_seconds" in before else {}

    def keep() -> None:  # after each table: an interrupted run leaves what it has measured
        write_bytes(options.output / "speed.json", (json.dumps(result, indent=1) + "\n").encode())
        write_bytes(options.output / "speed.md", markdown(result).encode())

    for dtype in options.dtype:
        for phase in () if options.compile_time_only else options.phase:
            say(f"  {phase}, {dtype}")
            result["rows"] += table(dense, getattr(torch, dtype), phase, options)
            keep()
    if not options.no_compile_time:
        result["compile_seconds"] = compile_seconds(dense)
        keep()
    print(markdown(result))


if __name__ == "__main__":
    main()
