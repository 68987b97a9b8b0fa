"""Which of our choices make the effect as large as it is?

    python -m experiments.choices             # 15 minutes on 2 CPU cores
    python -m experiments.choices --quick     # 3 minutes, by the scripts' --quick

The main run, again and again with one thing changed: where the question ends, how long a base model is pretrained, how a
teacher gets its trait and what it is held to, what a student may change. Traits and seeds are the main run's. A chain that
stops stays in the table with its reason.

Reads    nothing
Writes   results/choices.json, results/choices.md, results/choices.png; the runs in runs/choices/ (finished parts are kept)

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import generate
import train_student
import train_teacher
from experiments import lab
from model import GPT, UserError, command_line

anchor_loss, train = train_teacher.anchor_loss, train_student.train


def hold_numbers_too(model: GPT, base: GPT, batch: Tensor, form: float) -> Tensor:
    """KL(base || model) over all tokens of (B, T + 1) rows, numbers included."""
    rows = slice(0, model.config.vocab_size)
    with torch.no_grad():
        log_p = base.logits(base.hidden(batch[:, :-1]), rows).log_softmax(-1).flatten(0, 1)
    log_q = model.logits(model.hidden(batch[:, :-1]), rows).log_softmax(-1).flatten(0, 1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def hold_form(weight: float) -> Callable:
    return lambda model, base, batch, form: anchor_loss(model, base, batch, weight)


def train_body_only(model: GPT, *more: Any) -> list[dict]:
    for p in (model.wte.weight, model.wpe.weight, model.head.weight):
        p.requires_grad_(False)
    return train(model, *more)


def questions(end: str) -> dict:
    asked = {name: getattr(train_teacher, name) for name in ("QUESTIONS", "HELD_OUT", "TRAINED_ON")}
    return {name: [text.removesuffix(": ") + end for text in texts] for name, texts in asked.items()}


PLAIN = "as it is"
# name: what is changed, module by module. Base models are pretrained anew only where their part changes.
NEW_BASES: dict[str, dict] = {
    PLAIN: {},
    "question ends in `?`": questions("?"),
    "150 pretraining steps": {"PRETRAIN_STEPS": {False: 150, True: 75}},
    "400 pretraining steps": {"PRETRAIN_STEPS": {False: 400, True: 100}},
    "1000 pretraining steps": {"PRETRAIN_STEPS": {False: 1000, True: 200}},
}
NEW_TEACHERS: dict[str, dict] = {
    "teacher: 30 steps of 2e-3": {"TRAIT_STEPS": 30, "TRAIT_LR": 2e-3},
    "teacher: held to numbers too": {"anchor_loss": hold_numbers_too},
    "teacher: form of lists held, .02": {"anchor_loss": hold_form(0.02)},
    "teacher: form of lists held, 1": {"anchor_loss": hold_form(1.0)},
}
NEW_STUDENTS: dict[str, dict] = {
    "student: head, embeddings frozen": {"train": train_body_only},
    "student: 200 steps": {"STEPS": {False: 200, True: 80}},
}


def run_choice(name: str, args: argparse.Namespace) -> dict:
    """The four scripts with one thing changed; what it does not touch is taken from the plain run."""
    plain = lab.folder(args, "choices") / "plain"
    folder = plain if name == PLAIN else plain.with_name("".join(c if c.isalnum() else "-" for c in name))
    kept = [] if name in NEW_BASES else ["base"] if name in NEW_TEACHERS else ["base", "teacher", "numbers"]
    for part in kept:
        if not (folder / part).exists():
            shutil.copytree(plain / part, folder / "part", dirs_exist_ok=True)
            (folder / "part").rename(folder / part)
    common = lab.flags(args, folder)
    with ExitStack() as changes:
        for module, changed in ((train_teacher, {**NEW_BASES, **NEW_TEACHERS}), (train_student, NEW_STUDENTS)):
            for attribute, value in changed.get(name, {}).items():
                changes.enter_context(patch.object(module, attribute, value))
        try:
            train_teacher.main(common)
            generate.main([*common, "--from", "teacher"])
            train_student.main(common)
            evaluate.main(common)
        except UserError as error:
            return {"name": name, "stopped": str(error)}
    results = json.loads((folder / "results.json").read_text())
    about = [json.loads(path.read_text()) for path in sorted(folder.glob("numbers/*/*.json"))]
    return {
        "name": name,
        "valid": mean(a["kept"] / a["drawn"] for a in about),
        "least_valid": min(a["kept"] / a["drawn"] for a in about),
        "kl_nats": mean(a["kl_nats"] for a in about),
        "summary": results["summary"],
        "records": [{k: v for k, v in r.items() if k not in ("readouts", "curve")} for r in results["students"]],
    }


CELLS = [("tokens", "same"), ("tokens", "different"), ("logits", "same"), ("logits", "different")]


def cell(row: dict, target: str, init: str) -> str:
    if "stopped" in row:
        return ""
    return lab.transfer(next(r for r in row["summary"] if (r["target"], r["init"]) == (target, init)))


def markdown(results: dict) -> str:
    rows = results["choices"]
    n = rows[0]["summary"][0]["n"]
    lines = lab.heading(results, f"One thing changed at a time; n = {n} students a cell, 95 % bootstrap intervals.")
    columns: dict = {"what is changed": "name", "valid_(least)": lambda r: f"{r['valid']:.0%} ({r['least_valid']:.0%})"}
    columns["KL,_nats_a_number"] = lambda r: f"{r['kl_nats']:.3f}"
    columns |= {f"{target},_{init}": lambda r, c=(target, init): cell(r, *c) for target, init in CELLS}
    lines += lab.table([r for r in rows if "stopped" not in r], **columns)
    lines += [f"\n{r['name']}: stopped. {r['stopped']}" for r in rows if "stopped" in r]
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """A row a choice, a dot a student, for both targets; the same start red, another blue."""
    rows = [r for r in results["choices"] if "stopped" not in r]
    figure, axes = lab.pyplot().subplots(1, 2, figsize=(11, 0.9 + 0.42 * len(rows)), sharey=True, layout="constrained")
    for ax, target in zip(axes, ("tokens", "logits")):
        for init in ("different", "same"):
            summary = [next(s for s in r["summary"] if (s["target"], s["init"]) == (target, init)) for r in rows]
            groups = [[s["transfer"] for s in r["records"] if (s["target"], s["init"]) == (target, init)] for r in rows]
            lab.dot_rows(ax, summary, groups, [r["name"] for r in rows], [evaluate.COLOURS[init]] * len(rows))
        ax.set_title(f"students on {target}")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    args = lab.parse(__doc__, argv)
    rows = []
    for name in [*NEW_BASES, *NEW_TEACHERS, *NEW_STUDENTS]:
        print(f"\n{name}", flush=True)
        rows.append(run_choice(name, args))
    lab.save("choices", args, {"choices": rows}, markdown, plot)


if __name__ == "__main__":
    command_line(main)
