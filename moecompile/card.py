"""The model card of a converted folder: how it was made and what was measured, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .plans import MoEPlan

_HEAD = """---
library_name: transformers
tags:
- mixture-of-experts
- moecompile
---

# {title}

A dense model whose feed-forward networks were split into experts by moecompile.
{fraction} of the FFN neurons are computed per token.

```python
import moecompile
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""


def model_card(record: Mapping[str, Any], plan: MoEPlan) -> str:
    """The card as Markdown; figures come from the record, what was not measured is not mentioned."""
    source = str(record.get("source", "a dense model"))
    text = _HEAD.format(title=f"{source} as an MoE ({plan.recipe})", fraction=f"{plan.active_fraction:.0%}")
    first = plan.sites[0]
    per_layer = "" if len({site.top_k for site in plan.sites}) == 1 else " on average over the layers"
    rows = [
        ("source", source),
        ("recipe", plan.recipe),
        ("FFNs split", str(len(plan.sites))),
        ("experts per FFN (first)", f"{len(first.experts)} of {first.expert_width} neurons, {plan.top_k} chosen{per_layer}"),
        ("shared neurons (first)", str(len(first.shared))),
        ("router", plan.router),
    ]
    if "parity_max_abs_error" in record:
        rows.append(
            ("all experts on, before compensation: max abs error of the logits", f"{record['parity_max_abs_error']:.2e}")
        )
    calibration = record.get("calibration")
    if calibration:
        files = ", ".join(calibration.get("files", ()))
        rows.append(("calibration", f"{calibration.get('tokens', 0)} tokens of {files}{_shares(calibration)}"))
    for run in record.get("tuning") or ():
        change = f"perplexity {run['perplexity_before']:.2f} to {run['perplexity_after']:.2f} on their held-out tenth"
        rows.append(("tuning", f"{run['tokens']} tokens of {', '.join(run['texts'])}{_shares(run)}: {change}"))
    text += "\n## How it was made\n\n" + _table(("", ""), rows)
    evaluations = record.get("evaluations") or ()
    if evaluations:
        measured = [
            (
                str(e.get("name", "")),
                str(e.get("corpus", "")),
                f"{e.get('windows', '')} x {e.get('window', '')}"
                if e.get("task") == "perplexity"
                else f"{e.get('examples', '')} passages",
                f"{e.get('active_fraction', 1.0):.0%}",
                f"perplexity {e['perplexity']:.2f}" if "perplexity" in e else f"accuracy {e.get('accuracy', 0.0):.3f}",
            )
            for e in evaluations
        ]
        text += "\n## What was measured\n\n" + _table(("model", "corpus", "windows", "active", "result"), measured)
    versions = record.get("versions") or {}
    if versions:
        text += "\nMade with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n"
    return text


def _shares(read: Mapping[str, Any]) -> str:
    """The texts' weights, where they were not alike."""
    weights = read.get("weights")
    return f" in shares of {' : '.join(f'{weight:g}' for weight in weights)}" if weights else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |\n"

    return line(head) + "|" + "---|" * len(head) + "\n" + "".join(line(row) for row in rows)
