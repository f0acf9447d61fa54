"""One conversion and its measurements, run by benchmarks/quality.py in a process of its own (so the peak memory is its own).

Reads a job (JSON) on stdin, writes the rows (a JSON list) on stdout; progress on stderr.
"""

from __future__ import annotations

import copy
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from quality_baselines import fitted_to_oracle, kept_fraction, with_changes, with_oracle, with_thresholds
from quality_variants import STEP_TOKENS, TUNE_BATCH, TUNE_WINDOW, TUNING
from torch import nn

import moecompile
from moecompile import checkpoint
from moecompile.apply import moe_blocks, set_final_norm
from moecompile.cli.common import peak_rss_bytes
from moecompile.cli.convert import batched, held_windows
from moecompile.conversion import convert_with_record
from moecompile.costs import dense_costs, moe_costs
from moecompile.evaluate import active_fraction, lambada, perplexity
from moecompile.hub import load_dense, load_tokenizer
from moecompile.memory import keep_freed
from moecompile.progress import Progress
from moecompile.recipes import RECIPES, Recipe
from moecompile.text import calibration_windows, evaluation_windows, read_passages
from moecompile.tuning import tune
from moecompile.tuning.data import Windows, split


def main() -> None:
    """Run the job."""
    keep_freed()
    job = json.load(sys.stdin)
    rows = Job(job).rows()
    print(json.dumps(rows))


class Job:
    """A job: see :func:`quality.jobs_of` for its fields."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.progress = Progress(quiet=job["quiet"])
        torch.manual_seed(job["seed"] or 0)
        self.tokenizer = load_tokenizer(job["model"])
        self.windows = {
            name: evaluation_windows(self.tokenizer, [part["path"]], job["window"], part["windows"])
            for name, part in job["corpora"].items()
        }
        self.passages = read_passages(job["lambada"])[: job["examples"]] if job["examples"] else []

    def rows(self) -> list[dict[str, Any]]:
        """A row for each variant that is to be measured on this conversion."""
        if self.job["folder"]:
            return [self._folder()]
        dense = load_dense(self.job["model"])
        if self.job["recipe"] is None:
            return [self._unconverted(dense, name, wrap) for name, wrap in self.job["variants"].items()]
        return self._converted(dense)

    def _calibration(self, recipe: Recipe | None = None) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
        """Calibration inputs, an equal share of the tokens from each text, mixed; and as many more that are held out as
        ``moecompile convert`` does."""
        job, length = self.job, self.job["calibration_window"]
        held = held_windows(length)
        tokens = job["calibration_tokens"] + held * length
        rows = calibration_windows(self.tokenizer, job["calibration"], tokens, length, job["seed"], job["calibration_weights"])
        kept = len(rows) - held
        return [{"input_ids": part} for part in batched(rows[:kept], recipe)], [{"input_ids": rows[kept:]}]

    def _unconverted(self, dense: nn.Module, name: str, wrap: str) -> dict[str, Any]:
        if wrap == "dense":
            return self._row(name, dense, active_fraction=1.0, compute_fraction=1.0)
        model = with_thresholds(load_dense(self.job["model"]), self._calibration()[0], self.job["fraction"], wrap == "wina")
        row = self._row(name, model, compute_fraction=None)
        return {**row, "active_fraction": round(kept_fraction(model), 6)}

    def _converted(self, dense: nn.Module) -> list[dict[str, Any]]:
        job = self.job
        recipe = RECIPES[job["recipe"]](**job["settings"])
        calibration, held = self._calibration(recipe)
        oracle = "fitted oracle" in job["variants"].values()
        with fitted_to_oracle() if oracle else nullcontext([]) as changes:
            done = convert_with_record(dense, recipe, calibration, held_out=held, seed=job["seed"], progress=self.progress)
        costs = {
            "active_fraction": round(active_fraction(done.module), 6),
            "conversion_seconds": done.seconds["total"],
            "conversion_peak_rss_bytes": peak_rss_bytes(),
            "parity_max_abs_error": done.parity_max_abs_error,
        }
        compute = round(done.costs["flops_per_token"] / done.costs["flops_per_token_dense"], 6)
        rows = []
        for name, wrap in sorted(job["variants"].items(), key=lambda item: item[1]):  # the plain one first, tuned last
            if wrap == "tuned":
                facts = self._tuned(done.module, dense)
                rows.append(self._row(name, done.module, **costs, **facts, compute_fraction=compute))
                continue
            if wrap:
                model = with_changes(done.module, changes) if oracle else with_oracle(copy.deepcopy(done.module))
                rows.append(self._row(name, model, **costs, compute_fraction=None))
                continue
            row = self._row(name, done.module, **costs, compute_fraction=compute)
            if name in job["dial"]:
                exact = moecompile.convert(dense, done.plan.with_exact(True))
                set_final_norm(exact, done.plan)  # what is scored comes behind the prefix, as sparse as beside it
                row["dial"] = self._dial(done.module, exact)
            rows.append(row)
        return rows

    def _tuned(self, model: nn.Module, dense: nn.Module) -> dict[str, Any]:
        """Tune a converted model, in place; what was done."""
        job = self.job
        routed = any(block.chooses for block in moe_blocks(model).values())
        config = replace(TUNING, stages=TUNING.stages[not routed :], seed=job["seed"])
        parts, _ = split(self.tokenizer, job["calibration"], TUNE_WINDOW, 1)
        batches = Windows(parts, job["tune"] // STEP_TOKENS, TUNE_BATCH, config.seed, job["tune_weights"])
        done = tune(model, dense, batches, config, progress=self.progress)
        facts = {
            "tokens": done.tokens, "tokens_per_second": done.tokens_per_second, "stage": list(config.stages),
            "window": TUNE_WINDOW, "batch": TUNE_BATCH, "weights": job["tune_weights"], "config": config.to_dict(),
        }  # fmt: skip
        return {"tuning": [run_facts(facts)], "tuning_peak_rss_bytes": peak_rss_bytes()}

    def _folder(self) -> dict[str, Any]:
        """A row for a converted, perhaps tuned, folder."""
        path, name = self.job["folder"], next(iter(self.job["variants"]))
        model, record = checkpoint.load(path), checkpoint.record_of(path)
        plan = model.moecompile_plan
        dense = dense_costs(model, [site.site for site in plan.sites])
        costs = moe_costs(model, list(moe_blocks(model).values()), dense)
        row = self._row(
            name,
            model,
            active_fraction=round(active_fraction(model), 6),
            compute_fraction=round(costs["flops_per_token"] / costs["flops_per_token_dense"], 6),
            conversion_seconds=(record.get("seconds") or {}).get("total"),
            conversion_peak_rss_bytes=record.get("peak_rss_bytes"),
            seed=(record.get("calibration") or {}).get("seed"),
            folder=Path(path).name,
            **made_by(record),
        )
        if self.job["prefix"] and checkpoint.exact(model, record):
            row["dial"] = self._dial(model, model)
        return row

    def _dial(self, sparse: nn.Module, exact: nn.Module) -> dict[str, Any]:
        """Perplexity of what follows a prefix on the first corpus: sparse throughout, and with the prefix dense."""
        prefix, rows = self.job["prefix"], next(iter(self.windows.values()))
        return {
            "prefix": prefix,
            "sparse": perplexity(sparse, rows, skip=prefix, progress=self.progress)["perplexity"],
            "dense_prefix": perplexity(exact, rows, dense_prefix=prefix, progress=self.progress)["perplexity"],
        }

    def _row(self, name: str, model: nn.Module, **facts: Any) -> dict[str, Any]:
        if self.job["compile"]:
            model = moecompile.compile(model)
        found = {corpus: perplexity(model, rows, progress=self.progress) for corpus, rows in self.windows.items()}
        row: dict[str, Any] = {
            "variant": name,
            **{key: self.job[key] for key in ("fraction", "seed", "recipe", "settings")},
            **facts,
            "perplexity": {corpus: measured["perplexity"] for corpus, measured in found.items()},
            "seconds": round(sum(measured["seconds"] for measured in found.values()), 1),
        }
        if self.passages:
            measured = lambada(model, self.tokenizer, self.passages, progress=self.progress)
            row["lambada"], row["examples"] = measured["accuracy"], measured["examples"]
            row["lambada_perplexity"] = measured["perplexity"]
            row["lambada_seconds"] = measured["seconds"]
        if name == "dense" and self.job["prefix"]:
            rows = next(iter(self.windows.values()))
            row["dial"] = {
                "prefix": self.job["prefix"],
                "dense": perplexity(model, rows, skip=self.job["prefix"], progress=self.progress)["perplexity"],
            }
        return row


def run_facts(run: dict[str, Any]) -> dict[str, Any]:
    """What a row keeps of a tuning run."""
    return {
        **{key: run.get(key) for key in ("tokens", "stage", "window", "batch", "weights", "tokens_per_second")},
        **{key: run["config"].get(key) for key in ("learning_rate", "label_weight", "lora_rank", "precision", "seed")},
    }


def made_by(record: dict[str, Any]) -> dict[str, Any]:
    """What a converted folder's record says of how it was made: recipe, calibration, tuning."""
    runs = [run_facts(run) for run in record.get("tuning") or ()]
    calibration = {key: value for key, value in (record.get("calibration") or {}).items() if key != "files"}
    return {
        "recipe": record.get("recipe"), "settings": record.get("recipe_config") or {}, "calibration": calibration,
        **({"tuning": runs} if runs else {}),
    }  # fmt: skip


if __name__ == "__main__":
    main()
