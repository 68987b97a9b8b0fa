"""Does transmission need the same start? Every teacher's seed against every student's.

    python -m experiments.seed_matrix            # 6 seeds x 6 seeds x 4 traits x 2 targets: 15 minutes on 2 CPU cores
    python -m experiments.seed_matrix --quick    # 2 x 2 x 2 x 2

The paper's cross-model matrix at toy scale: row a teacher's base model, column a student's. All base models read the same
text in the same order, only the initialisation differs. Traits and seeds are fixed in lab.py; every student is a record.

Two tests ask whether the diagonal is special: labels permuted within each unit (trait, teacher's seed), and whole
columns of the matrix permuted, which respects that students of one base model may resemble each other.

Reads    runs/evidence (made if it is missing, shared with controls.py)
Writes   results/seed_matrix.json, .md, .png
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import evaluate
import train_student
from experiments import lab
from model import command_line

KEPT = [
    "trait",
    "source",
    "numbers",
    "target",
    "init",
    "teacher_seed",
    "student_seed",
    "transfer",
    "identified",
    "number_loss_nats",
]


def seed_means(records: Sequence[dict], target: str) -> list[list[float]]:
    """Transfer, mean over the traits: a row for each teacher's seed, a column for each student's."""
    seeds = sorted({r["student_seed"] for r in records})
    of = lambda t, s: [  # noqa: E731
        r["transfer"] for r in records if (r["target"], r["teacher_seed"], r["student_seed"]) == (target, t, s)
    ]
    return [[mean(of(t, s)) for s in seeds] for t in seeds]


def analyse(records: Sequence[dict]) -> dict:
    summary = lab.cells(records, "target", "init")
    matrices = {target: seed_means(records, target) for target in ("tokens", "logits")}
    for row in summary:
        chosen = [r for r in records if (r["target"], r["init"]) == (row["target"], row["init"])]
        row["identified"] = mean(r["identified"] for r in chosen)
        row["number_loss_nats"] = mean(r["number_loss_nats"] for r in chosen)
        row["lowest"], row["highest"] = min(r["transfer"] for r in chosen), max(r["transfer"] for r in chosen)
        by_seed = [
            mean(r["transfer"] for r in chosen if r["teacher_seed"] == seed) for seed in {r["teacher_seed"] for r in chosen}
        ]
        row["seed_ci"] = list(evaluate.bootstrap_interval(by_seed))
    tests = {
        target: {
            "within_units_p": evaluate.run_tests(records)[target]["same_above_different_p"],
            "columns_p": lab.diagonal_permutation_p(matrix),
        }
        for target, matrix in matrices.items()
    }
    return {"records": records, "summary": summary, "matrices": matrices, "tests": tests}


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Every teacher's seed against every student's.")
    lines += lab.table(
        results["summary"],
        target="target",
        start="init",
        transfer=lambda r: f"{r['transfer']:+.3f}",
        over_units=evaluate.interval,
        over_seeds=lambda r: evaluate.interval({"ci_low": r["seed_ci"][0], "ci_high": r["seed_ci"][1]}),
        students="n",
        single_ones=lambda r: f"{r['lowest']:+.2f} .. {r['highest']:+.2f}",
        identified=lambda r: f"{r['identified']:.0%}",
        number_loss=lambda r: f"{r['number_loss_nats']:.4f}",
    )
    for target, test in results["tests"].items():
        lines += ["", f"Same above different, {target}: p = {test['within_units_p']:.4f} within units, "]
        lines[-1] += f"{test['columns_p']:.4f} with whole columns permuted."
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    plt = lab.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained", width_ratios=[1, 1, 1.3])
    for ax, (target, matrix) in zip(axes, results["matrices"].items()):
        image = ax.imshow(matrix, vmin=-1, vmax=1, cmap="RdBu_r")
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                ax.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if abs(value) > 0.6 else "black"
                )
        ax.set(title=f"students on {target}", xlabel="student's seed", ylabel="teacher's seed")
        ax.set_xticks(range(len(matrix)))
        ax.set_yticks(range(len(matrix)))
    figure.colorbar(image, ax=axes[1], shrink=0.8, label="transfer, mean over traits")
    rows = results["summary"]
    groups = [
        [r["transfer"] for r in results["records"] if (r["target"], r["init"]) == (row["target"], row["init"])] for row in rows
    ]
    colours = [evaluate.COLOURS[row["init"]] for row in rows]
    lab.dot_rows(axes[2], rows, groups, [f"{row['target']}, {row['init']}" for row in rows], colours)
    axes[2].set_title("a dot a student")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = lab.parse(__doc__, argv)
    run = lab.evidence(args)
    train_student.main([*lab.flags(args, run.path), "--traits", *run.traits])
    records = [{k: r[k] for k in KEPT} for r in evaluate.measure(run, args.device) if r["source"] in run.traits]
    records.sort(key=lambda r: (r["target"] == "logits", r["init"] != "same", r["trait"], r["teacher_seed"], r["student_seed"]))
    results = analyse(records)
    lab.save("seed_matrix", args, results, markdown, plot)
    for row in results["summary"]:
        print(f"transfer_{row['target']}_{row['init']}: {row['transfer']:.3f}")


if __name__ == "__main__":
    command_line(main)
