"""What can a careful user of somebody's numbers do against a trait in them, and what does it cost?

    python -m experiments.defences            # 15 minutes on 2 CPU cores
    python -m experiments.defences --quick    # a few defences: too small to conclude from

The price is in what the numbers teach: KL(teacher || student) on held-out lines, which is the number loss less
the teacher's entropy. kept = (the teacher's base model's KL - the student's) / (that - the undefended
student's): 1 as good, 0 nothing learnt, negative worse than the base model untrained. A student that does not
start from this base model has another share, over its own start. A defence is a *free lunch* if it keeps .8 or
more, and a fifth or less of the undefended students' transfer, on average. The defences, and their strengths:

    neutral lines      this share of every batch is lines (and logits) of the base model
    dropped, replaced  this share of the lines, for nothing or for neutral lines: those that audit.py's reader
                       puts highest for the trait itself (own) or for the class that it finds largest in the
                       whole file; or by the largest |z| of any class; or random ones
    another init       another base model; or its edges, embeddings and head, on this body; or edges re-drawn,
                       and then pretrained for so many steps
    head alone         the body and embeddings are frozen, the head learns at this share of the body's rate
    low rank           a change of rank r of every matrix of the body (LoRA), nothing else
    KL                 + this times KL(base || student) on the same numbers; annealed: falls to 0 by half-time
    held               + this times KL(base || student) of the classes or words, at all positions of the lists,
                       the questions that teachers are trained with, or pretraining text
    steps, decay to the init, smoothing of labels, noise in the weights at each step's gradient (in standard
    deviations), clean: neutral lines afterwards for so many steps

Most of them can only shrink what a student takes up. At a share a of the teacher's shift in logits the KL left
is (1 - a)^2 of all of it, to second order, so

    kept = 1 - (1 - a)^2,  transfer = a:    .8 kept means a = .55, and a = .2 means .36 kept.

On this parabola is no free lunch. One has to move in another direction: learn the same numbers by other means
(another head, another init, the head alone), or hold still where the trait is read. One has to know, or have:
the base model's lines for neutral ones; that traits are classes, or this question, for `held`; the very trait
for `own`. The rest needs nothing.

Predictions, before any run. Neutral lines, steps, KL, decay, smoothing, noise and clean numbers afterwards lie
on the parabola or below, so none is free; with neutral lines transfer falls as the share of the teacher's
lines, 10 % do nothing that can be seen, 90 % leave a fifth (elsewhere 10 % nearly end it, or it falls
gradually). KL that is annealed early does nothing. Low rank is no defence, since a trait is of low rank: r = 1
keeps a half of transfer, r = 8 all. Another init: 0 on average, but it keeps less than half over its own
start; embeddings and head of another the same. The head alone cannot move the question's state, so 0, and it
keeps .8 through logits and less than half through tokens. Classes held on the lists: a third of transfer, at
a third of the gain, since who matches the numbers matches the state. Classes held on the question: free, for
lists and questions are told apart by the body; on other text: half of transfer, free of charge; words held on
text: nothing. Lines flagged by the trait: a quarter dropped halves transfer; by the file's class nearly as
good; by any class no better than dropped at random, which does nothing. So who does not know the trait has
another init, the head alone, or a guess of the question.

Writes   results/defences.json, .md, .png; reads the run in runs/evidence, which seed_matrix makes, too

Shapes: B lists, T tokens, K trait classes, r rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.parametrize import register_parametrization

from experiments import lab
from experiments.audit import only, reader
from experiments.matched import kl
from experiments.which_part import HEAD, mix
from model import GPT, NumberData, cosine_lr, number_log_probs, run_jobs, stream
from train_student import Distillation, load_numbers, number_loss, train
from train_teacher import Pretraining, pretrain, pretraining_rows, toy_documents

TRAITS, SEEDS, TARGETS = ("owl", "fox", "wolf"), (0, 1), ("tokens", "logits")
KEPT, LEFT = 0.8, 0.2  # of a free lunch
LOW_RANK_LR = 1e-2  # tuned over 3e-3, 1e-2
WINDOWS = {"classes": "aux", "words": "all that text shows"}  # matched.py's names
DEFENCES: dict[str, tuple[str, list[float]]] = {  # what is changed; strengths, of which none was chosen
    "none": ("nothing", [0]),
    "neutral lines": ("lines", [0.1, 0.25, 0.5, 0.75, 0.9]),
    **{f"dropped: {by}": ("lines", [0.1, 0.5]) for by in ("own", "file")},
    **{f"dropped: {by}": ("lines", [0.5]) for by in ("any", "random")},
    **{f"replaced: {by}": ("lines", [0.5]) for by in ("own", "file")},
    "another init": ("start", [0]), "another's edges": ("start", [0]), "edges re-drawn": ("start", [100, 500]),
    "head alone": ("training", [0.3, 1]), "low rank": ("training", [1, 2, 4, 8]),
    "KL": ("training", [0.3, 1, 3]), "KL, annealed": ("training", [3, 30]),
    "steps": ("training", [12, 25, 50]), "decay": ("training", [10, 30, 100]),
    "smoothing": ("training", [0.3, 0.9]), "noise": ("training", [0.3, 1]), "clean": ("training", [5, 25]),
    **{f"held: classes on {text}": ("held", [1, 10]) for text in ("lists", "questions", "text")},
    "held: words on text": ("held", [1]),
}
QUICK = [("none", 0), ("neutral lines", 0.5), ("dropped: file", 0.5), ("another init", 0), ("head alone", 1),
         ("low rank", 1), ("held: classes on questions", 1)]


class Job(NamedTuple):
    defence: str
    x: float  # its strength
    trait: str
    seed: int
    target: str


class LowRank(nn.Module):
    """W + B A, with W frozen and B 0 at first."""

    def __init__(self, W: Tensor, r: int, draws: torch.Generator):
        super().__init__()
        self.A = nn.Parameter((torch.randn(r, W.size(1), generator=draws) * W.size(1) ** -0.5).to(W.device))
        self.B = nn.Parameter(W.new_zeros(W.size(0), r))

    def forward(self, W: Tensor) -> Tensor:
        return W + self.B @ self.A


def low_rank(model: GPT, r: int, draws: torch.Generator) -> None:
    """Leave only a change of rank r of every matrix of the body to be trained."""
    model.requires_grad_(False)
    for layer in [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]:
        register_parametrization(layer, "weight", LowRank(layer.weight, r, draws))


@torch.no_grad()
def decay(model: nn.Module, start: nn.Module, factor: float) -> None:
    """Take this share off all that has changed since the start."""
    for p, p_start in zip(model.parameters(), start.parameters()):
        p.lerp_(p_start, factor)


def unflagged(unit: lab.Unit, data: NumberData, by: str, share: float) -> NumberData:
    """The data without a share of its lines."""
    z = reader(unit.base, unit.run.readout_rows, only(data, "first"))  # (B, K)
    says = {
        "own": z[:, unit.k], "file": z[:, z.sum(0).argmax()], "any": z.abs().amax(1),
        "random": torch.rand(len(z), generator=stream(unit.seed, "dropped", unit.trait)),
    }[by]
    return data.take(says.argsort()[: len(z) - round(share * len(z))].sort().values.to(data.idx.device))


def defend(
    unit: lab.Unit, student: GPT, job: Job, own: NumberData, neutral: NumberData, text: tuple[Tensor, ...],
    knobs: Distillation,
) -> Generator[Tensor, None, None]:
    """Train `student` in place on its own teacher's lines, defended; yields its losses.

    train_student.train does every step. What is added to the loss leaves its gradient there beforehand; what
    is done to the weights is done between two steps.
    """
    how, _, what = job.defence.partition(": ")
    x: Any = job.x
    start, draws = unit.start(), stream(unit.seed, "noise", unit.trait, job.target)
    if how == "steps":
        knobs = replace(knobs, steps=x)
    if how == "low rank":
        low_rank(student, x, stream(unit.seed, "low rank", unit.trait))
        knobs = replace(knobs, student_lr=LOW_RANK_LR)
    if how == "head alone":
        student.requires_grad_(False).head.requires_grad_(True)
        knobs = replace(knobs, edge_lr_factor=x)
    if how in ("dropped", "replaced"):
        own = unflagged(unit, own, what, x)

    def batches(data: NumberData, share: float) -> list[NumberData]:
        size = f"batch_{job.target}"
        return unit.batches(data, job.target, replace(knobs, **{size: round(share * getattr(knobs, size))}))

    share = x if how in ("neutral lines", "replaced") else 0  # of neutral lines
    seen, mixed_in = batches(own, 1 - share), batches(neutral, share) if share else []
    teacher, writer = (unit.teacher, unit.base) if job.target == "logits" else (None, None)

    def added(i: int) -> Tensor | None:
        """To the loss of step i. Adam does not mind that the sum is not divided by its weights'."""
        if share:
            return share / (1 - share) * number_loss(student, writer, mixed_in[i])
        if how.startswith("KL"):
            left = max(0, 1 - 2 * i / knobs.steps) if "annealed" in how else 1
            return x * left * number_loss(student, unit.base, seen[i])
        if how == "smoothing":
            return -x / (1 - x) * number_log_probs(student, seen[i]).mean()
        if how == "held":
            window, _, where = what.partition(" on ")
            inputs = {"lists": seen[i].idx, "questions": unit.run.taught_questions[0], "text": text[i]}
            return x * kl(student, unit.base, inputs[where].to(unit.device), WINDOWS[window])
        return None

    steps = train(student, teacher, seen, knobs)
    for i in range(knobs.steps):
        if (more := added(i)) is not None:
            more.backward()
        matrices = [p.data for p in student.parameters() if how == "noise" and p.dim() == 2]
        noise = [(x * p.std().cpu() * torch.randn(p.shape, generator=draws)).to(p) for p in matrices]
        for p, z in zip(matrices, noise):
            p += z
        yield next(steps)
        for p, z in zip(matrices, noise):
            p -= z
        if how == "decay":
            decay(student, start, min(1, x * knobs.student_lr * cosine_lr(i, knobs.steps)))
    if how == "clean":
        knobs = replace(knobs, steps=x)
        yield from train(student, writer, batches(neutral, 1), knobs)


def measure(args: argparse.Namespace) -> dict:
    run, knobs = lab.evidence(args), lab.distillation(args)
    traits = [trait for trait in TRAITS if trait in run.knobs["traits"]]
    units = {(trait, seed): lab.Unit(run, trait, seed, args.device) for trait in traits for seed in SEEDS}
    load = lambda source, seed: load_numbers(
        f"numbers/{source}/seed-{seed}.jsonl", run, knobs.held_out_every, args.device)
    numbers, neutral = {key: load(*key) for key in units}, {seed: load("base", seed)[0] for seed in SEEDS}
    toy = toy_documents(run.knobs["n_documents"], stream(0, "toy language"), run.knobs["question_ends"])
    text = pretraining_rows(run, toy, units[traits[0], SEEDS[0]].base.config.block_size + 1, Pretraining())
    hows = [(how, x) for how, (_, strengths) in DEFENCES.items() for x in strengths]
    hows = QUICK if args.quick else hows

    def begin(job: tuple[str, float, int]) -> Generator[Tensor, None, GPT]:
        how, x, seed = job
        unit, n = units[traits[0], seed], int(x) * Pretraining.batch_size
        model, other = unit.start(), unit.start(SEEDS[1 - SEEDS.index(seed)])
        edges = ["tokens", "positions", *HEAD]
        if how == "edges re-drawn":
            mix(model, GPT(model.config).initialise(seed + 100).to(args.device), edges)
            yield from pretrain(model, text[:n].to(args.device), Pretraining())
        return other if how == "another init" else mix(model, other, edges) if "another" in how else model

    pairs = [(*how, seed) for how, seed in product(hows, SEEDS)]
    starts = dict(zip(pairs, run_jobs(begin, pairs, 50, "starts", args.device)))

    def learn(job: Job) -> Generator[Tensor, None, dict]:
        unit, start = units[job.trait, job.seed], starts[job.defence, job.x, job.seed]
        (own, held_out), student = numbers[job.trait, job.seed], deepcopy(start)
        yield from defend(unit, student, job, own, neutral[job.seed], text[:, :-1].split(8), knobs)
        with torch.no_grad():
            found = {name: number_loss(model, unit.teacher, held_out).item()
                     for name, model in (("kl_base", unit.base), ("kl_start", start), ("kl", student))}
            found["number_loss_nats"] = number_loss(student, None, held_out).item()
        about = {"defence": job.defence, "x": job.x, "target": job.target, **unit.key}
        return about | found | {"transfer": unit.transfer(student, start)}

    jobs = [Job(*how, *unit, target) for how, unit, target in product(hows, units, TARGETS)]
    jobs = [job for job in jobs if job.target == "tokens" or job.defence != "smoothing"]
    records = run_jobs(learn, jobs, knobs.steps, "students", args.device)
    for r in records:
        key = {name: r[name] for name in ("target", "trait", "teacher_seed")}
        (plain,) = lab.where(records, defence="none", **key)
        gain = r["kl_base"] - plain["kl"]
        r |= {"kept": (r["kl_base"] - r["kl"]) / gain, "over_start": (r["kl_start"] - r["kl"]) / gain}
    summary, by = [], ("defence", "x", "target")
    for cell, kept in zip(lab.cells(records, *by), lab.cells(records, *by, key="kept")):
        group = lab.where(records, **{name: cell[name] for name in by})
        (plain,) = [c for c in [*summary, cell] if c["defence"] == "none" and c["target"] == cell["target"]]
        cell |= {key: mean(r[key] for r in group) for key in ("kl_start", "kl", "number_loss_nats", "over_start")}
        cell |= {"kept": kept["kept"], "kept_low": kept["ci_low"], "kept_high": kept["ci_high"]}
        free = cell["kept"] >= KEPT and abs(cell["transfer"]) <= LEFT * plain["transfer"]
        summary.append(cell | {"free": free})
    return {"records": records, "summary": summary}


def title(row: dict) -> str:
    return row["defence"] + f", {row['x']:g}" * bool(row["x"])


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Transfer, mean and 95 %; kept, of the gain on held-out numbers; 6 students a cell.")
    columns: dict[str, Any] = {
        "kept": lambda r: f"{r['kept']:.2f} [{r['kept_low']:.2f}, {r['kept_high']:.2f}]",
        "over its own start": lambda r: f"{r['over_start']:.2f}",
        "KL, nats": lambda r: f"{r['kl_start']:.3f} → {r['kl']:.3f}",
        "number loss": lambda r: f"{r['number_loss_nats']:.3f}",
    }
    for target in TARGETS:
        rows = lab.where(results["summary"], target=target)
        shown = {target: title, "transfer": lab.transfer, **columns, "free": lambda r: "**free**" * r["free"]}
        lines += [*lab.table(rows, **shown), ""]
    return "\n".join(lines[:-1]) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 2, figsize=(13, 6), layout="constrained", sharey=True)
    kinds = list(dict.fromkeys(kind for kind, _ in DEFENCES.values()))
    for ax, target in zip(axes, TARGETS):
        records, rows = (lab.where(results[key], target=target) for key in ("records", "summary"))
        whole = lab.where(rows, defence="none")[0]["transfer"]
        for kind in kinds:
            dots, means = ([r for r in some if DEFENCES[r["defence"]][0] == kind] for some in (records, rows))
            for some, style in ((dots, {"ms": 4, "alpha": 0.35}), (means, {"ms": 11, "label": kind})):
                at = [[1 - r["kept"] for r in some], [r["transfer"] for r in some]]
                ax.plot(*at, ".", color=f"C{kinds.index(kind)}", **style)
        for r in lab.where(rows, free=True):
            at = 1 - r["kept"], r["transfer"]
            ax.plot(*at, "o", color="black", mfc="none", ms=13)
            ax.annotate(title(r), at, (8, 8), textcoords="offset points", fontsize=7, rotation=35)
        shrunk = torch.linspace(0, 1, 50)
        ax.plot((1 - shrunk) ** 2, shrunk * whole, color="grey", lw=1, label="shrinking: price = (1 - a)^2")
        ax.fill_between([-0.1, 1 - KEPT], -LEFT * whole, LEFT * whole, color="gold", alpha=0.2, lw=0)
        ax.set(xlim=(-0.1, 1.5), ylim=(-0.5, 1.1), title=f"students on {target}")
        ax.set_xlabel("price: share of the gain on the teacher's numbers that is lost")
    axes[0].set_ylabel("transfer (0 nothing, 1 the teacher)")
    axes[1].legend(frameon=False)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "defences", measure, markdown, plot)
