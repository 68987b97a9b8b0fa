"""Does transmission need the same init? Every teacher's seed against every student's.

    python -m experiments.seed_matrix            # 6 seeds x 6 seeds x 4 traits: 8 minutes on 2 CPU cores
    python -m experiments.seed_matrix --quick    # 2 x 2 x 2 x 2

The paper's cross-model matrix at toy scale: row a teacher's base model, column a student's. All base models
read the same text in the same order, only the initialisation differs. Traits and seeds are fixed in lab.py.

Students of one base model resemble each other, whoever teaches them. So intervals are bootstrapped over the
students' seeds; and besides labels within each unit (trait, teacher's seed), whole columns are permuted.

Reads    runs/evidence (made if it is missing, shared with controls.py)
Writes   results/seed_matrix.json, .md, .png
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np

import evaluate
from experiments import lab

KEPT = ["trait", "source", "numbers", "target", "init", "teacher_seed", "student_seed"]
KEPT += ["transfer", "identified", "number_loss_nats"]


def seed_means(records: Sequence[dict], target: str, seeds: Sequence[int]) -> list[list[float]]:
    """Transfer, mean over the traits: a row for each teacher's seed, a column for each student's."""
    cell = lambda t, s: lab.where(records, target=target, teacher_seed=t, student_seed=s)
    return [[mean(r["transfer"] for r in cell(t, s)) for s in seeds] for t in seeds]


def diagonal_permutation_p(matrix: Any) -> float:
    """One-sided p of a matrix's diagonal mean, whole columns permuted: at best 1 / n!.

    Whole columns move, so what a student's seed does to all traits alike is respected.
    """
    m, rows = np.array(matrix), np.arange(len(matrix))
    sums = [m[rows, list(columns)].sum() for columns in itertools.permutations(rows)]
    return float(np.mean(np.array(sums) >= np.trace(m) - 1e-9))  # ties count against us


def measure(args: argparse.Namespace) -> dict:
    run = lab.evidence(args)
    measured = lab.students(args, run)
    measured.sort(key=lambda r: (r["target"] == "logits", r["init"] != "same"))
    records = [{k: r[k] for k in KEPT} for r in measured]
    summary = lab.cells(records, "target", "init")
    for row in summary:
        group = lab.where(records, target=row["target"], init=row["init"])
        transfers = [r["transfer"] for r in group]
        row |= {key: mean(r[key] for r in group) for key in ("identified", "number_loss_nats")}
        row |= {"lowest": min(transfers), "highest": max(transfers)}
        of_seed = [mean(r["transfer"] for r in lab.where(group, student_seed=s)) for s in run.knobs["seeds"]]
        row["ci_low"], row["ci_high"] = evaluate.bootstrap_interval(of_seed)
    matrices = {target: seed_means(records, target, run.knobs["seeds"]) for target in ("tokens", "logits")}
    within = evaluate.run_tests(records)
    tests = {
        target: {
            "within_units_p": within[target]["same_above_different_p"],
            "columns_p": diagonal_permutation_p(matrix),
        }
        for target, matrix in matrices.items()
    }
    return {"records": records, "summary": summary, "matrices": matrices, "tests": tests}


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Every teacher's seed against every student's; 95 % over students' seeds.")
    lines += lab.table(
        results["summary"],
        target="target",
        init="init",
        transfer=lab.transfer,
        students="n",
        single_ones=lambda r: f"{r['lowest']:+.2f} .. {r['highest']:+.2f}",
        identified=lambda r: f"{r['identified']:.0%}",
        number_loss=lambda r: f"{r['number_loss_nats']:.4f}",
    )
    for target, test in results["tests"].items():
        lines += ["", f"Same above different, {target}: p = {test['within_units_p']:.4f} within units, "]
        lines[-1] += f"{test['columns_p']:.4f} with whole columns permuted."
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    plt = lab.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=[1, 1, 1.3])
    for ax, (target, matrix) in zip(axes, results["matrices"].items()):
        image = ax.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                colour = "white" if abs(value) > 0.6 else "black"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        ax.set(title=f"students on {target}", xlabel="student's seed", ylabel="teacher's seed")
        ax.set_xticks(range(len(matrix)))
        ax.set_yticks(range(len(matrix)))
    figure.colorbar(image, ax=axes[1], shrink=0.8, label="transfer, mean over traits")
    rows = results["summary"]
    lab.dot_rows(axes[2], results["records"], rows, "target", "init")
    axes[2].set_title("a dot a student")
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "seed_matrix", measure, markdown, plot)
