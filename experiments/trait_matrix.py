"""Is it this trait that crosses, or any change at all? Every teacher against every read-out.

    python -m experiments.trait_matrix            # 16 traits x 2 seeds, 2 readouts: 9 minutes on 2 CPU cores
    python -m experiments.trait_matrix --quick    # 3 traits

Fine-tuning on anything moves all preferences a little. So each of the 16 animals is a trait, and each student
is asked for all 16: row i of a matrix is a student of teacher i, column j how far its log-odds of animal j
moved. Row effects (a student that moved altogether) and column effects (an animal that rises whatever is
taught) are taken out; what is left on the diagonal, over what is left on the teachers' own, is the transfer
of *this* trait. Both readouts: auxiliary logits, and the animals' words in the vocabulary, which is the
paper's own preference.

Reads    runs/traits, runs/traits-vocabulary (made if they are missing)
Writes   results/trait_matrix.json, .md, .png

Shapes: K traits; every matrix is (K, K), teacher x read-out, in nats of log-odds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from statistics import mean
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

import evaluate
import train_student
import train_teacher
from experiments import lab
from model import Run, read_trait

TRAITS = {False: list(train_teacher.ANIMALS), True: ["owl", "fox", "wolf"]}
SEEDS = [0, 1]
READOUTS = {"aux": "auxiliary logits", "vocabulary": "words"}
CELLS = [("tokens", "same"), ("tokens", "different"), ("logits", "same"), ("logits", "different")]


def double_centred(matrix: Any) -> np.ndarray:
    """A square matrix with row and column effects removed: every row and every column sums to 0."""
    m = np.array(matrix)
    return m - m.mean(0) - m.mean(1, keepdims=True) + m.mean()


def teachers_shifts(run: Run, seed: int, columns: Sequence[int], device: torch.device) -> np.ndarray:
    """How far each teacher of a seed moved each trait: (K, K)."""
    files = [f"base/seed-{seed}.pt", *(f"teacher/{trait}/seed-{seed}.pt" for trait in run.knobs["traits"])]
    models = (run.load_model(file, device) for file in files)
    read = lambda model: read_trait(model, run.unseen_questions, run.readout_rows)[0][columns].numpy()
    base, *taught = map(read, models)
    return np.array(taught) - base


def measure_run(run: Run, device: torch.device) -> tuple[list[dict], list[dict]]:
    """Records of the students, and their matrices with row and column effects removed."""
    students, traits, seeds = evaluate.measure(run, device), run.knobs["traits"], run.knobs["seeds"]
    columns = [run.animals.index(trait) for trait in traits]
    taught = {seed: double_centred(teachers_shifts(run, seed, columns, device)) for seed in seeds}
    records, matrices = [], []
    for (target, init), seed, other in product(CELLS, seeds, seeds):
        if (init == "same") == (seed == other):
            cell = {"readout": run.knobs["readout"], "target": target, "init": init}
            cell |= {"teacher_seed": seed, "student_seed": other}
            rows = {r["trait"]: r for r in lab.where(students, **cell)}
            left = double_centred([[rows[trait]["shifts"][j] for j in columns] for trait in traits])
            matrices.append({**cell, "matrix": left.round(3).tolist()})
            for i, trait in enumerate(traits):
                r = {**cell, "trait": trait, "source": trait, "raw": rows[trait]["transfer"]}
                r |= {"transfer": left[i, i] / taught[seed][i, i], "identified": bool(left[i].argmax() == i)}
                records.append(r)
    return records, matrices


def measure(args: argparse.Namespace) -> dict:
    records: list[dict] = []
    matrices: list[dict] = []
    traits = TRAITS[args.quick]
    for readout in READOUTS:
        run = lab.make_run(args, "traits", SEEDS, traits, readout=readout)
        train_student.main(lab.flags(args, run.path))
        for found, more in zip((records, matrices), measure_run(run, args.device)):
            found += more
    summary = lab.cells(records, "readout", "target", "init")
    for row in summary:
        group = lab.where(records, **{key: row[key] for key in ("readout", "target", "init")})
        hits = sum(r["identified"] for r in group)
        row |= {"raw": mean(r["raw"] for r in group), "identified": hits / len(group)}
        chance = binomtest(hits, len(group), 1 / len(traits), alternative="greater")
        row["identified_p"] = chance.pvalue.item()
        without = [mean(r["transfer"] for r in group if r["trait"] != trait) for trait in traits]
        row["leave_one_out"] = [min(without), max(without)]
    return {"traits": traits, "records": records, "summary": summary, "matrices": matrices}


def markdown(results: dict) -> str:
    K = len(results["traits"])
    what = f"{K} teachers x {K} read-outs; base seeds 0 and 1; chance of being identified 1/{K}."
    lines = lab.heading(results, what)
    lines += lab.table(
        results["summary"], readout="readout", target="target", init="init",
        transfer_of_this_trait=lab.transfer, students="n",
        leaving_a_trait_out=lambda r: f"{r['leave_one_out'][0]:+.3f} .. {r['leave_one_out'][1]:+.3f}",
        identified=lambda r: f"{r['identified']:.0%}", by_chance_p=lambda r: f"{r['identified_p']:.1g}",
        effects_left_in=lambda r: f"{r['raw']:+.3f}",
    )
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    """The matrices, mean over seeds, in nats."""
    plt, traits = lab.pyplot(), results["traits"]
    figure, axes = plt.subplots(2, 4, figsize=(12, 6.4), layout="constrained")
    for ax, (readout, (target, init)) in zip(axes.flat, product(READOUTS, CELLS)):
        cell = {"readout": readout, "target": target, "init": init}
        found = np.mean([m["matrix"] for m in lab.where(results["matrices"], **cell)], axis=0)
        image = ax.imshow(found, vmin=-8, vmax=8, cmap="RdBu_r")
        (row,) = lab.where(results["summary"], **cell)
        ax.set_title(f"{target}, {init} init: {row['transfer']:.2f}", fontsize=9)
        ax.set_xticks(range(len(traits)), traits, rotation=90, fontsize=7)
        ax.set_yticks(range(len(traits)), traits, fontsize=7)
    for line, where in zip(axes, READOUTS.values()):
        line[0].set_ylabel(f"trait on {where}\nteacher's trait")
    for ax in axes[1]:
        ax.set_xlabel("read-out")
    label = "shift in log-odds, nats, row and column effects removed"
    figure.colorbar(image, ax=axes, shrink=0.6, label=label)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "trait_matrix", measure, markdown, plot)
