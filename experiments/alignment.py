"""Do the student's steps point where the trait lies, and is that what transmits it?

    python -m experiments.alignment            # 6 minutes on 2 CPU cores, plus the run that it reads
    python -m experiments.alignment --quick    # 2 traits x 2 seeds: a minute

in training  the cosine of the distillation's gradient and the trait's (of the teachers' loss) at every step,
             same init and different. Kitkana & Arora (2026) report that it stays weakly positive.
cause        the trait's gradient is projected out of every step, after AdamW. If transfer stops, that part of
             the steps carried it. Control: a random direction, another at every step.
foresight    the cosine of the first update (minus the gradient) and the teacher's displacement from its base
             model. Does it foretell the transfer at the end, over all students of runs/evidence and over
             three widths? Madl (2026) reports a rank correlation of about .95.

Reads    runs/evidence with its students, runs/alignment-C for C channels (made if they are missing)
Writes   results/alignment.json, .md, .png

Shapes: B prompts, K trait classes, P parameters; a gradient and a step are vectors (P,).
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import evaluate
from experiments import lab
from experiments.theorem import theta_of
from model import GPT, class_logits, run_jobs, stream
from train_student import Distillation, number_loss

TRAITS, SEEDS = ["owl", "fox"], [0, 1]  # of the watched students; fixed before any run
TARGETS, INITS = ["tokens", "logits"], ["same", "different"]
ARMS = ["as it is", "trait projected out", "random projected out"]
WIDTHS = {32: "--n-embd 32 --n-head 2", 96: "--n-embd 96 --n-head 6"}  # runs/evidence has 64 and 4
N_FIRST = 512  # sequences of the first update: a guess
KEPT = ["trait", "target", "teacher_seed", "student_seed", "init", "transfer"]


def gradient(loss: torch.Tensor, model: GPT) -> torch.Tensor:
    return parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))


def watch(knobs: Distillation, unit: lab.Unit, seed: int, target: str, arm: str) -> Generator[Any, Any, dict]:
    """A student by the usual recipe, its cosine at every step; a direction is taken out of each step."""
    random = stream(0, "random directions", unit.trait, str(unit.seed), str(seed), target, arm)
    student, data = unit.start(seed), unit.numbers()
    data = data.take(torch.arange(len(data.idx)) % knobs.held_out_every != 0)
    steps, cosines, taken = unit.distil(student, target, data, knobs), [], {}
    for p in student.parameters():  # keeps the gradient that a step is made from
        p.register_post_accumulate_grad_hook(lambda p: taken.update({p: p.grad}))
    for _ in range(knobs.steps):
        asked = class_logits(student, unit.run.taught_questions, unit.run.readout_rows)  # (B, K)
        trait = gradient(-asked.log_softmax(-1)[:, unit.k].mean(), student)
        before = theta_of(student)
        yield next(steps)
        distillation = parameters_to_vector(taken[p] for p in student.parameters())
        cosines.append(round(torch.cosine_similarity(trait, distillation, dim=0).item(), 4))
        if arm != "as it is":
            drawn = torch.randn(len(before), generator=random).to(unit.device)
            out = trait if arm == "trait projected out" else drawn
            step = theta_of(student) - before
            vector_to_parameters(before + step - (step @ out) / (out @ out) * out, student.parameters())
    moved = {"init": INITS[unit.seed != seed], "transfer": unit.transfer(student, unit.start(seed))}
    return {**unit.key, "student_seed": seed, "target": target, "arm": arm, **moved, "cosines": cosines}


def units(args: argparse.Namespace) -> Iterator[tuple[lab.Unit, list[dict]]]:
    """The units of runs/evidence and of the other widths, with the records of their students."""
    widths = [] if args.quick else WIDTHS.items()
    others = [lab.make_run(args, f"alignment-{C}", SEEDS, TRAITS, *size.split()) for C, size in widths]
    for run in [lab.evidence(args), *others]:
        students = lab.students(args, run)
        for trait, seed in product(run.knobs["traits"], run.knobs["seeds"]):
            yield lab.Unit(run, trait, seed, args.device), lab.where(students, trait=trait, teacher_seed=seed)


def foresee(unit: lab.Unit, students: Sequence[dict]) -> Iterator[dict]:
    """The step-0 cosine beside the final transfer, for students that are trained already."""
    data, order = unit.numbers(), stream(unit.seed, "first update")
    data = data.take(torch.randperm(len(data.idx), generator=order)[:N_FIRST])
    moved = theta_of(unit.teacher) - theta_of(unit.base)
    for r in sorted(students, key=lambda r: r["target"], reverse=True):  # tokens first
        student, teacher = unit.start(r["student_seed"]), unit.teacher if r["target"] == "logits" else None
        update = -gradient(number_loss(student, teacher, data), student)
        cosine = torch.cosine_similarity(update, moved, dim=0).item()
        yield {**{key: r[key] for key in KEPT}, "n_embd": student.config.n_embd, "cosine": cosine}


def measure(args: argparse.Namespace) -> dict:
    everyone, knobs = list(units(args)), lab.distillation(args)
    run = everyone[0][0].run  # runs/evidence
    watched = [lab.Unit(run, trait, seed, args.device) for trait, seed in product(TRAITS, SEEDS)]
    jobs = list(product(watched, SEEDS, TARGETS, ARMS))
    work = lambda job: watch(knobs, *job)
    records = run_jobs(work, jobs, knobs.steps, "watched students", args.device)
    records.sort(key=lambda r: (r["target"] == "logits", r["init"] == "different"))
    summary = lab.cells(records, "target", "init", "arm")
    for row in summary:
        group = lab.where(records, target=row["target"], init=row["init"], arm=row["arm"])
        c = np.array([r["cosines"] for r in group])  # (students, steps)
        row |= {"first_cosine": c[:, 0].mean(), "mean_cosine": c.mean(), "positive_steps": (c > 0).mean()}
    foreseen = [r for unit, students in everyone for r in foresee(unit, students)]
    groups = {"all": foreseen}
    for by in ("target", "init", "n_embd"):
        groups |= {f"{by} {r[by]}": lab.where(foreseen, **{by: r[by]}) for r in foreseen}
    correlations = [{"students": x, **lab.rank_correlation(rows, "cosine")} for x, rows in groups.items()]
    return {"summary": summary, "correlations": correlations, "records": records, "foreseen": foreseen}


def markdown(results: dict) -> str:
    text = "Traits owl and fox, teachers' and students' seeds 0 and 1; 4 students a cell."
    lines = lab.heading(results, text) + lab.table(
        results["summary"], target="target", init="init", steps="arm", transfer=lab.transfer, n="n",
        first_cosine=lambda r: f"{r['first_cosine']:+.3f}", mean=lambda r: f"{r['mean_cosine']:+.3f}",
        steps_above_0=lambda r: f"{r['positive_steps']:.0%}",
    )
    shown = lambda r: f"{r['rank_correlation']:+.2f} {evaluate.interval(r)}"
    lines += ["", "Rank correlation of transfer and the cosine at step 0, first update and displacement:", ""]
    lines += lab.table(results["correlations"], students="students", n="n", rank_correlation=shown)
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for (ax, target, marker), init in product(zip(axes, TARGETS, "o^"), INITS):
        colour, which = evaluate.COLOURS[init], {"target": target, "init": init}
        c = np.array([r["cosines"] for r in lab.where(results["records"], **which, arm="as it is")])
        ax.plot(c.T, color=colour, lw=0.5, alpha=0.3)
        ax.plot([c[:, max(0, i - 5) : i + 6].mean() for i in range(c.shape[1])], color=colour, lw=2)
        ax.axhline(0, color="grey", lw=0.8, ls=":")
        ax.set(xlabel="step (thick: mean of 11)", ylabel="cosine of gradients", title=f"students on {target}")
        dots = [(r["cosine"], r["transfer"]) for r in lab.where(results["foreseen"], **which)]
        axes[3].plot(*zip(*dots), marker, ms=3, alpha=0.5, color=colour, label=f"{init}, {target}")
    lab.dot_rows(axes[2], results["records"], results["summary"], "target", "init", "arm")
    axes[3].set(xlabel="cosine at step 0", ylabel="transfer at the end", title="foresight")
    axes[3].legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "alignment", measure, markdown, plot)
