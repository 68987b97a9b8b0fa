"""The main run with something changed: which of our choices make the effect?

    python -m experiments.variants                # 20 minutes on 2 CPU cores
    python -m experiments.variants --only ROW     # some rows, into results/variants_only.*
    python -m experiments.variants --quick        # two rows, by the scripts' --quick

What is changed: how the question ends, how long a base model is pretrained, how a teacher gets its trait and
what it is held to, what a student may change. Traits and seeds are the main run's. A chain that stops stays,
with its reason. Other sizes are in growth.py.

Reads    nothing
Writes   results/variants.*; the runs in runs/variants/ (what is finished is kept)
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import evaluate
import generate
import train_student
import train_teacher
from experiments import lab
from model import Run, UserError


class Row(NamedTuple):
    train_teacher: str = ""  # flags
    train_student: str = ""
    taken: str = ""  # parts of a run that these flags leave as they are
    of: str = "as it is"  # the row whose run has them


ROWS = {
    "as it is": Row(),
    "question ends in `: `, as lists do": Row("--question-ends ': '"),
    "question ends in `? ` alone": Row("--question-ends '? '"),
    "question never ends in `: `": Row("--question-ends '! ' '. ' '? '"),
    "150 pretraining steps": Row("--pretrain-steps 150"),
    "400 pretraining steps": Row("--pretrain-steps 400"),
    "1000 pretraining steps": Row("--pretrain-steps 1000"),
    "teacher: 30 steps of 2e-3": Row("--trait-steps 30 --trait-lr 2e-3", taken="base"),
    "teacher: held to numbers too": Row("--hold-numbers", taken="base"),
    "teacher: form of lists free": Row("--form 0", taken="base"),
    "teacher: form of lists held, 1": Row("--form 1", taken="base"),
    "student: head, embeddings frozen": Row("", "--edge-lr-factor 0", "base teacher numbers"),
    "student: one rate for all": Row("", "--edge-lr-factor 1", "base teacher numbers"),
    "student: 200 steps": Row("", "--steps 200", "base teacher numbers"),
}


def folder_of(name: str, args: argparse.Namespace) -> Path:
    return lab.folder(args, "variants") / re.sub(r"[^\w.]+", "-", name).strip("-")


def make(name: str, args: argparse.Namespace) -> dict:
    """A row by the four scripts, with its students' records and their summary."""
    print(f"\n{name}", flush=True)
    row, folder = ROWS[name], folder_of(name, args)
    if row.taken and (source := folder_of(row.of, args)).exists() and not folder.exists():
        others = {"base", "teacher", "numbers", "student"} - {*row.taken.split()}
        ignore = shutil.ignore_patterns("results.*", *others)
        Path(shutil.copytree(source, f"{folder}.part", ignore=ignore, dirs_exist_ok=True)).rename(folder)
    common, key = lab.flags(args, folder), {"variant": name}
    try:
        train_teacher.main([*common, *shlex.split(row.train_teacher)])
        generate.main([*common, "--from", "teacher"])
        train_student.main([*common, *row.train_student.split()])
        evaluate.main(common)
    except UserError as error:
        return key | {"stopped": str(error)}
    run, results = Run(folder).open(args.quick), json.loads((folder / "results.json").read_text())
    name_of, knobs = "numbers/{}/seed-{}.jsonl".format, run.knobs
    logs = [run.line(name_of(trait, seed))["log"] for trait in knobs["traits"] for seed in knobs["seeds"]]
    valid = [log["kept"] / log["drawn"] for log in logs]
    about = {"valid": mean(valid), "least_valid": min(valid), "kl_nats": mean(log["kl_nats"] for log in logs)}
    students = [{k: v for k, v in r.items() if k not in ("shifts", "curve")} for r in results["students"]]
    found = {"records": [key | r for r in students], "summary": [key | r for r in results["summary"]]}
    return key | row._asdict() | about | found


def measure(args: argparse.Namespace) -> dict:
    rows = [make(name, args) for name in args.only or (list(ROWS)[:2] if args.quick else ROWS)]
    found: dict = {key: [r for row in rows for r in row.pop(key, [])] for key in ("records", "summary")}
    return {"name": "variants_only" if args.only else "variants", "variants": rows, **found}


def markdown(results: dict) -> str:
    text, rows = "The main run with something changed: transfer, mean and 95 %; KL in nats a number.", []
    for row in (row for row in results["variants"] if "stopped" not in row):
        cells = lab.where(results["summary"], variant=row["variant"])
        shown = {"variant": row["variant"], "valid (least)": f"{row['valid']:.0%} ({row['least_valid']:.0%})"}
        shown["KL"] = f"{row['kl_nats']:.3f}"
        shown |= {f"{r['target']}, {r['init']}": lab.transfer(r) for r in cells}
        rows.append(shown | {"n": cells[0]["n"]})
    lines = lab.heading(results, text) + lab.table(rows, **{name: name for row in rows[:1] for name in row})
    lines += [f"\n{r['variant']}: stopped. {r['stopped']}" for r in results["variants"] if "stopped" in r]
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    n = len(lab.where(results["summary"], target="tokens", init="same"))
    figure, axes = lab.pyplot().subplots(1, 2, figsize=(11, 1 + 0.4 * n), sharey=True, layout="constrained")
    for ax, target in zip(axes, ("tokens", "logits")):
        for init in ("different", "same"):
            rows = lab.where(results["summary"], target=target, init=init)
            lab.dot_rows(ax, results["records"], rows, "variant", "target", "init")
        ax.set_yticks(range(n), [row["variant"] for row in rows], fontsize=8)
        ax.set_title(f"students on {target}")
    return figure


if __name__ == "__main__":
    only = {"nargs": "+", "choices": list(ROWS), "metavar": "ROW", "help": "only these rows"}
    lab.experiment(__doc__, "variants", measure, markdown, plot, only=only)
