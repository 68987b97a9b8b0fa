"""What can a careful user of somebody's numbers do against a trait in them, and what does it cost?

    python -m experiments.defences            # 20 minutes on 2 CPU cores
    python -m experiments.defences --quick    # a few defences: too small to conclude from

The price is in KL(teacher || student) on held-out lines, the number loss less the teacher's entropy. kept =
(that of the teacher's base model - the student's) / (the same, the undefended student's): 1 as good, 0 no
better than that base model untrained. A *free lunch* keeps .8, and at most a fifth of transfer, on average.

    neutral lines      this share of every batch is lines (and logits) of the base model
    dropped, replaced  this share of the lines, for nothing or for neutral lines: what audit.py's reader puts
                       highest for the trait (own), for the class that it finds largest in the whole file, or
                       by the largest |z| of any class; or random lines
    another init       another base model; only its edges, embeddings and head, on this body; or new edges
    head alone         is trained, at this share of the body's rate
    low rank           only the body's matrices are trained; their change is cut to this rank after each step
    KL                 + this times KL(base || student) on the same numbers; annealed: falls to 0 by half-time
    held               + this times KL(base || student) of all classes, or words, at all positions of the
                       lists, of the questions that teachers are trained with, or of text without the question
                       and without numbers
    fewer steps; decay to the init; smoothing of labels; noise on the trained weights, in standard deviations;
    clean: then neutral lines for so many steps

Most can only shrink what a student takes up. At a share a of the teacher's shift in logits (1 - a)^2 of the
KL is left, to second order: kept = 1 - (1 - a)^2, at transfer a. .8 kept means a = .55; a = .2, .36 kept. On
this parabola is no free lunch: one has to learn the numbers by other means (another head, the head alone), or
hold still where the trait is read. Neutral lines take the base model, `held` that traits are classes, or
answer this question, `own` the very trait. The rest needs to know nothing.

Predictions, before any run. Neutral lines, steps, KL, decay, smoothing, noise and clean numbers afterwards
lie on the parabola or below, so none is free; with neutral lines transfer falls as the share of the teacher's
lines, 10 % do nothing that can be seen, 90 % leave a fifth (elsewhere 10 % nearly end it, or it falls
gradually). KL that is annealed early does nothing. Low rank is no defence, since a trait is of low rank:
r = 1 keeps a half of transfer, r = 8 all. Another init: 0 on average, but it keeps less than half over its
own start; embeddings and head of another the same. The head alone cannot move the question's state, so 0, and
it keeps .8 through logits and less than half through tokens. Classes held on the lists: a third of transfer,
at a third of the gain, since who matches the numbers matches the state. Classes held on the question: free,
for lists and questions are told apart by the body; on other text: half of transfer, free of charge; words
held on text: nothing. Lines flagged by the trait: a quarter dropped halves transfer; by the file's class
nearly as good; by any class no better than dropped at random, which does nothing. So who does not know the
trait has another init, the head alone, or a guess of the question.

In a first run text was lists for the most part, and `words` held which number comes as well: it cost a third
of transfer. Held on text without numbers, words should do nothing, as predicted, and classes less than then
(.25 and .1 of transfer left at the strengths 1 and 3): half at 1.

Writes   results/defences.json, .md, .png; reads the run in runs/evidence, which seed_matrix makes, too

Shapes: B lists, K trait classes, r rank.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from copy import deepcopy
from dataclasses import replace
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from experiments import lab
from experiments.audit import only, reader
from experiments.matched import kl
from experiments.which_part import HEAD, mix
from model import GPT, NumberData, cosine_lr, number_log_probs, run_jobs, stream
from train_student import Distillation, load_numbers, number_loss, train
from train_teacher import Trait, draw_anchor, toy_documents

TRAITS, SEEDS, TARGETS = ("owl", "fox", "wolf"), (0, 1), ("tokens", "logits")
KEPT, LEFT = 0.8, 0.2  # of a free lunch
DEFENCES: dict[str, dict[str, list[Any]]] = {  # what is changed, how; strengths, tuned to span the price
    "nothing": {"none": [0]},
    "lines": {
        "neutral lines": [0.1, 0.25, 0.5, 0.75, 0.9], "dropped: own": [0.1, 0.25, 0.5], "clean": [5, 25],
        "dropped: file": [0.1, 0.25, 0.5], "dropped: any": [0.25], "dropped: random": [0.25, 0.5],
        "replaced: own": [0.25], "replaced: file": [0.25]},
    "start": {"another init": [0], "another's edges": [0], "new edges": [0]},
    "training": {
        "head alone": [0.1, 0.3, 1], "low rank": [1, 2, 4, 8], "KL": [0.3, 1, 3], "KL, annealed": [3, 30],
        "steps": [12, 25, 50], "decay": [30, 100, 300], "smoothing": [0.1, 0.3], "noise": [0.1, 0.3]},
    "held": {
        "held: classes on lists": [1, 10], "held: classes on questions": [1],
        "held: classes on text": [1, 3, 10], "held: words on text": [1]}}
QUICK = ["none", "neutral lines", "dropped: file", "another init", "head alone", "held: classes on questions"]


@torch.no_grad()
def after_step(model: nn.Module, start: nn.Module, low_rank: int = 0, decay: float = 0.0) -> None:
    """Cut each matrix's change to its largest singular values; take this share off all that has changed."""
    for p, p_start in zip(model.parameters(), start.parameters()):
        if low_rank and p.dim() == 2:
            U, S, V = torch.linalg.svd(p - p_start, full_matrices=False)
            p.copy_(p_start + U[:, :low_rank] * S[:low_rank] @ V[:low_rank])
        p.lerp_(p_start, decay)


def unflagged(unit: lab.Unit, data: NumberData, by: str, share: float) -> NumberData:
    """The data without a share of its lines."""
    z = reader(unit.base, unit.run.readout_rows, only(data, "first"))  # (B, K)
    random = torch.rand(len(z), generator=stream(unit.seed, "dropped", unit.trait))
    says = {"own": z[:, unit.k], "file": z[:, z.sum(0).argmax()], "any": z.abs().amax(1), "random": random}
    return data.take(says[by].argsort()[: len(z) - round(share * len(z))].sort().values.to(data.idx.device))


def begin(unit: lab.Unit, defence: str) -> GPT:
    """What the student starts from."""
    model, other = unit.start(), unit.start(SEEDS[1 - SEEDS.index(unit.seed)])
    if defence == "new edges":
        other = GPT(model.config).initialise(unit.seed + 100).to(unit.device)
    edges = ["tokens", "positions", *HEAD]
    return other if defence == "another init" else mix(model, other, edges if "edges" in defence else [])


def defend(
    unit: lab.Unit, student: GPT, defence: str, x: Any, target: str, own: NumberData, neutral: NumberData,
    text: tuple[Tensor, ...], knobs: Distillation,
) -> Generator[Tensor, None, None]:
    """Train `student` in place on its own teacher's lines, defended; yields its losses.

    train_student.train does every step. What is added to its loss puts down a gradient beforehand, and what
    is done to the weights is done between two steps.
    """
    (how, _, what), start, size = defence.partition(": "), unit.start(), f"batch_{target}"
    if how == "steps":
        knobs = replace(knobs, steps=x)
    if how == "head alone":
        knobs = replace(knobs, edge_lr_factor=x)
        student.requires_grad_(False).head.requires_grad_(True)
    if how == "low rank":
        for p in student.parameters():
            p.requires_grad_(p.dim() == 2)
        nn.ModuleList([student.wte, student.wpe, student.head]).requires_grad_(False)
    if how in ("dropped", "replaced"):
        own = unflagged(unit, own, what, x)
    share = x if how in ("neutral lines", "replaced") else 0  # of neutral lines
    part = lambda s: replace(knobs, **{size: round(s * getattr(knobs, size))})
    seen = unit.batches(own, target, part(1 - share))
    mixed_in = unit.batches(neutral, target, part(share)) if share else []
    teacher, writer = (unit.teacher, unit.base) if target == "logits" else (None, None)

    def added(i: int) -> Tensor | None:
        """To the loss of step i. Only the ratio counts: Adam's steps have a length of their own."""
        if share:
            return share / (1 - share) * number_loss(student, writer, mixed_in[i])
        if how.startswith("KL"):
            left = max(0, 1 - 2 * i / knobs.steps) if "annealed" in how else 1
            return x * left * number_loss(student, unit.base, seen[i])
        if how == "smoothing":
            return -x / (1 - x) * number_log_probs(student, seen[i]).mean()
        if how != "held":
            return None
        window, _, where = what.partition(" on ")
        idx = {"lists": seen[i].idx, "questions": unit.run.taught_questions[0], "text": text[i]}[where]
        window = {"classes": "aux", "words": "words"}[window]  # matched.py's
        return x * kl(student, unit.base, idx.to(unit.device), window)

    steps = train(student, teacher, seen, knobs)
    for i in range(knobs.steps):
        if (more := added(i)) is not None:
            more.backward()
        yield next(steps)
        if how == "low rank":
            after_step(student.blocks, start.blocks, low_rank=x)
        if how == "decay":
            after_step(student, start, decay=min(1, x * knobs.student_lr * cosine_lr(i, knobs.steps)))
    if how == "clean":
        knobs = replace(knobs, steps=x)
        yield from train(student, writer, unit.batches(neutral, target, knobs), knobs)
    for name, p in student.named_parameters() if how == "noise" else ():
        z = torch.randn(p.shape, generator=stream(unit.seed, "noise", unit.trait, name))
        p.data += (x * p.std().item() * z).to(p) if p.dim() == 2 else 0


def measure(args: argparse.Namespace) -> dict:
    run, knobs = lab.evidence(args), lab.distillation(args)
    traits = [trait for trait in TRAITS if trait in run.knobs["traits"]]
    units = {(trait, seed): lab.Unit(run, trait, seed, args.device) for trait in traits for seed in SEEDS}
    load = lambda source, seed: load_numbers(
        f"numbers/{source}/seed-{seed}.jsonl", run, knobs.held_out_every, args.device)
    numbers, neutral = {key: load(*key) for key in units}, {seed: load("base", seed)[0] for seed in SEEDS}
    toy = toy_documents(run.knobs["n_held_out"], stream(0, "held text"), run.knobs["question_ends"])
    toy = [document for document in toy if document.category in ("fact", "story")]
    text = draw_anchor(run, toy, Trait(trait_steps=knobs.steps, anchor_rows=8), 64).split(8)

    def learn(job: tuple[str, Any, str, int, str]) -> Generator[Tensor, None, dict]:
        defence, x, trait, seed, target = job
        unit, (own, held_out) = units[trait, seed], numbers[trait, seed]
        start = begin(unit, defence)
        student = deepcopy(start)
        yield from defend(unit, student, defence, x, target, own, neutral[seed], text, knobs)
        with torch.no_grad():
            found = {name: number_loss(model, unit.teacher, held_out).item()
                     for name, model in (("kl_base", unit.base), ("kl_start", start), ("kl", student))}
        about = {"defence": defence, "x": x, "target": target, **unit.key, **found}
        return about | {"transfer": unit.transfer(student, start)}

    strengths = {name: xs for some in DEFENCES.values() for name, xs in some.items()}
    strengths = {name: strengths[name][-1:] for name in QUICK} if args.quick else strengths
    rows = [(name, x) for name, xs in strengths.items() for x in xs]
    jobs = [(*row, *unit, target) for row, unit, target in product(rows, units, TARGETS)]
    jobs = [job for job in jobs if job[0] != "smoothing" or job[-1] == "tokens"]
    records = run_jobs(learn, jobs, knobs.steps, "students", args.device)
    plain = {(r["target"], r["trait"], r["teacher_seed"]): r["kl"] for r in records if r["defence"] == "none"}
    for r in records:
        gain = r["kl_base"] - plain[r["target"], r["trait"], r["teacher_seed"]]
        r |= {"kept": (r["kl_base"] - r["kl"]) / gain, "over_start": (r["kl_start"] - r["kl"]) / gain}
    summary = lab.cells(records, "defence", "x", "target")
    for cell in summary:
        group = lab.where(records, **{key: cell[key] for key in ("defence", "x", "target")})
        cell |= {key: mean(r[key] for r in group) for key in ("kept", "over_start", "kl_start", "kl")}
        (whole,) = lab.where(summary, defence="none", target=cell["target"])
        cell["free"] = cell["kept"] >= KEPT and abs(cell["transfer"]) <= LEFT * whole["transfer"]
    return {"records": records, "summary": summary}


def title(row: dict) -> str:
    return row["defence"] + f", {row['x']:g}" * bool(row["x"])


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Means over students; transfer with its 95 %; KL(teacher || student), nats.")
    columns: dict[str, Any] = {"kept": lambda r: f"{r['kept']:.2f}"}
    columns["over_its_own_start"] = lambda r: f"{r['over_start']:.2f}"
    columns["KL"] = lambda r: f"{r['kl_start']:.3f} → {r['kl']:.3f}"
    for target in TARGETS:
        rows = lab.where(results["summary"], target=target)
        shown = {target: title, "transfer": lab.transfer, **columns, "free": lambda r: "free" * r["free"]}
        lines += [*lab.table(rows, **shown), ""]
    return "\n".join(lines[:-1]) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 2, figsize=(13, 6), layout="constrained", sharey=True)
    shrunk = torch.linspace(0, 1, 50)
    for ax, target in zip(axes, TARGETS):
        records, summary = (lab.where(results[key], target=target) for key in ("records", "summary"))
        whole = lab.where(summary, defence="none")[0]["transfer"]
        for colour, (kind, names) in enumerate(DEFENCES.items()):
            for rows, style in ((records, {"ms": 4, "alpha": 0.4}), (summary, {"ms": 10, "label": kind})):
                dots = [(1 - r["kept"], r["transfer"]) for r in rows if r["defence"] in names]
                ax.plot(*zip(*dots) if dots else ((), ()), ".", color=f"C{colour}", **style)
        free = sorted(lab.where(summary, free=True), key=lambda r: -r["transfer"])
        for i, r in enumerate(free):  # named below each other, where no dot is
            at, line = (1 - r["kept"], r["transfer"]), {"arrowstyle": "-", "lw": 0.5, "relpos": (0, 0.5)}
            ax.annotate(title(r), at, (0.3, -0.12 - 0.06 * i), fontsize=8, va="center", arrowprops=line)
        ax.plot((1 - shrunk) ** 2, shrunk * whole, color="grey", lw=1, label="only shrunk")
        ax.fill_between([-0.1, 1 - KEPT], -LEFT * whole, LEFT * whole, color="gold", alpha=0.2, lw=0)
        ax.set(xlim=(-0.1, 1.5), ylim=(-0.5, 1.1), title=f"students on {target}; free lunches are named")
        ax.set(xlabel="price: share of the gain on the teacher's numbers that is lost", ylabel="transfer")
    axes[1].legend(frameon=False)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "defences", measure, markdown, plot)
