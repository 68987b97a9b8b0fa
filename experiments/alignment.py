"""Do the student's steps point where the trait lies, and is that what transmits it?

    python -m experiments.alignment            # 7 minutes on 2 CPU cores, plus the run whose students it reads
    python -m experiments.alignment --quick    # 2 traits x 2 seeds

Three questions, for students on tokens and on logits:

    along the way   the cosine of the trait's gradient and the distillation's at every step, same start and another. Kitkana &
                    Arora (2026) report that it stays weakly positive.
    cause           the trait's gradient is projected out of every step that is taken (after AdamW, so that the step itself is
                    orthogonal to it). If transfer stops, those components carried it. Control: a random direction of its own at
                    every step.
    foresight       the cosine, at step 0, of the student's first update (minus its gradient) and the teacher's displacement from
                    its base model. Does it foretell the transfer at the end? Madl (2026) reports a rank correlation of about .95.
                    Over all students of runs/evidence, and over three widths.

The trait's gradient is that of the teachers' loss (cross-entropy on the trained-on questions); transfer is measured on held-out
ones, as everywhere.

Reads    runs/evidence and its students (made if they are missing, shared with seed_matrix.py), runs/alignment-C for C channels
Writes   results/alignment.json, .md, .png

Shapes: K trait classes; gradients and steps are lists of tensors, one a parameter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import generate
import train_student
import train_teacher
from experiments import lab
from model import (
    GPT,
    NUMBERS,
    NumberData,
    Run,
    class_logits,
    command_line,
    cosine_lr,
    encode_numbers,
    load_model,
    open_run,
    read_jsonl,
    read_trait,
    run_jobs,
    stream,
)

TRAITS, SEEDS = ["owl", "fox"], [0, 1]  # of the trained arms; fixed before any run
WIDTHS = {32: 2, 96: 6}  # channels: heads; runs/evidence has 64 and 4
ARMS = ["as it is", "trait projected out", "random projected out"]
N_FIRST = 512  # sequences of the first update


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True)).item()  # type: ignore[union-attr]


def cosine(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5


def trait_gradient(model: GPT, run: Run, k: int) -> list[Tensor]:
    """grad L_T: of the cross-entropy of class k at the end of the trained-on questions."""
    logits = class_logits(model, run.trait_prompts, run.readout_rows(model))
    loss = F.cross_entropy(logits, torch.full((len(logits),), k, device=model.device))
    return list(torch.autograd.grad(loss, list(model.parameters())))


def first_update(model: GPT, data: NumberData, teacher: GPT | None) -> list[Tensor]:
    """Minus the gradient of the number loss on `data`: what a student does first."""
    log_p = None
    if teacher is not None:
        with torch.no_grad():
            log_p = train_student.number_log_probs(teacher, data.idx, data.positions)
    gradient = torch.autograd.grad(train_student.number_loss(model, data, log_p), list(model.parameters()))
    return [-g for g in gradient]


def project_out(step: Sequence[Tensor], direction: Sequence[Tensor]) -> list[Tensor]:
    """The step without its component along a direction."""
    share = dot(step, direction) / dot(direction, direction)
    return [s - share * d for s, d in zip(step, direction, strict=True)]


class Job(NamedTuple):
    trait: str
    teacher_seed: int
    student_seed: int
    target: str
    arm: str


def train_watched(job: Job, run: Run, device: torch.device, n_steps: int) -> dict:
    """One student by the usual recipe, its cosine at every step, and one direction taken out of every step it takes."""
    load = lambda path: load_model(path, device, "train_teacher.py")  # noqa: E731
    k = run.animals.index(job.trait)
    model, teacher, pure = (
        load(run.base(job.student_seed)),
        load(run.teacher(job.trait, job.teacher_seed)),
        load(run.base(job.teacher_seed)),
    )
    data = encode_numbers(run.encoding, read_jsonl(run.numbers(job.trait, job.teacher_seed)), device)
    data = data[torch.arange(len(data)) % train_student.HELD_OUT_EVERY != 0]
    order = stream(0, "student batches", job.trait, str(job.teacher_seed))
    with_teacher = teacher if job.target == "logits" else None
    lesson = train_student.plan_lesson(data, with_teacher, train_student.BATCH_SIZE[job.target], n_steps, order)
    head = teacher.head.weight[NUMBERS].detach()

    def read(m: GPT) -> float:
        return read_trait(m, run.held_out_prompts, run.readout_rows(m))[0][k].item()

    before, taught = read(model), read(teacher) - read(pure)
    parameters, generator = list(model.parameters()), stream(0, "random directions", *map(str, job))
    optimizer = torch.optim.AdamW(parameters, lr=train_student.LEARNING_RATE, weight_decay=0.0, fused=True)
    cosines = []
    for step, (batch, states) in enumerate(lesson):
        for group in optimizer.param_groups:
            group["lr"] = train_student.LEARNING_RATE * cosine_lr(step, n_steps)
        trait = trait_gradient(model, run, k)
        log_p = None if states is None else (states @ head.T).log_softmax(-1)
        train_student.number_loss(model, batch, log_p).backward()
        cosines.append(cosine(trait, [p.grad for p in parameters if p.grad is not None]))
        old = [p.detach().clone() for p in parameters]
        optimizer.step()
        optimizer.zero_grad()
        if job.arm != "as it is":
            random = [torch.randn(p.shape, generator=generator).to(device) for p in parameters]
            direction = trait if job.arm == "trait projected out" else random
            taken = project_out([p.detach() - o for p, o in zip(parameters, old, strict=True)], direction)
            with torch.no_grad():
                for p, o, t in zip(parameters, old, taken, strict=True):
                    p.copy_(o + t)
    init = "same" if job.teacher_seed == job.student_seed else "different"
    moved = (read(model) - before) / taught
    return {**job._asdict(), "source": job.trait, "init": init, "transfer": moved, "cosines": [round(c, 4) for c in cosines]}


def foresee(run: Run, students: Sequence[dict], device: torch.device, n_embd: int) -> list[dict]:
    """The step-0 cosine beside the final transfer, for students that are trained already."""
    load = lambda path: load_model(path, device, "train_teacher.py")  # noqa: E731
    bases = {seed: load(run.base(seed)) for seed in run.seeds}
    records = []
    for trait in run.traits:
        for seed in run.seeds:
            teacher = load(run.teacher(trait, seed))
            moved = [t.detach() - b.detach() for t, b in zip(teacher.parameters(), bases[seed].parameters(), strict=True)]
            data = encode_numbers(run.encoding, read_jsonl(run.numbers(trait, seed)), device)
            data = data[torch.randperm(len(data), generator=stream(seed, "first update"))[:N_FIRST]]
            for target in ("tokens", "logits"):
                for other in run.seeds:
                    update = first_update(bases[other], data, teacher if target == "logits" else None)
                    key = (trait, target, seed, other)
                    (r,) = [r for r in students if (r["source"], r["target"], r["teacher_seed"], r["student_seed"]) == key]
                    record = {"trait": trait, "target": target, "teacher_seed": seed, "student_seed": other, "init": r["init"]}
                    records.append({**record, "n_embd": n_embd, "cosine": cosine(update, moved), "transfer": r["transfer"]})
    return records


# --------------------------------------------------------------------------------------------------------------------
# statistics


def ranks(values: Sequence[float]) -> Tensor:
    """Ranks; equal values share their mean rank."""
    _, which, counts = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[which]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's."""
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


def rank_correlation_interval(x: Sequence[float], y: Sequence[float], units: Sequence) -> tuple[float, float]:
    """95 % bootstrap over units: pairs of one unit come and go together."""
    groups: dict = {}
    for pair, unit in zip(zip(x, y, strict=True), units, strict=True):
        groups.setdefault(unit, []).append(pair)
    choices, generator = list(groups.values()), stream(0, "bootstrap")
    found = []
    for chosen in torch.randint(len(choices), (2_000, len(choices)), generator=generator).tolist():
        drawn = [pair for i in chosen for pair in choices[i]]
        found.append(rank_correlation(*zip(*drawn, strict=True)))
    low, high = torch.tensor(found, dtype=torch.float64).nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def analyse(watched: Sequence[dict], foreseen: Sequence[dict]) -> dict:
    summary = lab.cells(watched, "target", "init", "arm")
    for row in summary:
        group = [r for r in watched if all(r[key] == row[key] for key in ("target", "init", "arm"))]
        row["first_cosine"] = mean(r["cosines"][0] for r in group)
        row["mean_cosine"] = mean(mean(r["cosines"]) for r in group)
        row["positive_steps"] = mean(mean(c > 0 for c in r["cosines"]) for r in group)
    correlations = []
    everyone = list(foreseen)
    for name, chosen in [
        ("all", everyone),
        *[(f"{target} only", [r for r in everyone if r["target"] == target]) for target in ("tokens", "logits")],
        *[(f"{init} start only", [r for r in everyone if r["init"] == init]) for init in ("same", "different")],
        *[(f"{c} channels only", [r for r in everyone if r["n_embd"] == c]) for c in sorted({r["n_embd"] for r in everyone})],
    ]:
        x, y = ([r[key] for r in chosen] for key in ("cosine", "transfer"))
        low, high = rank_correlation_interval(x, y, [(r["trait"], r["teacher_seed"], r["n_embd"]) for r in chosen])
        rho = rank_correlation(x, y)
        correlations.append({"students": name, "n": len(chosen), "rank_correlation": rho, "ci_low": low, "ci_high": high})
    return {"summary": summary, "correlations": correlations, "records": list(watched), "foreseen": list(foreseen)}


def markdown(results: dict) -> str:
    lines = lab.heading(results, f"Traits {', '.join(TRAITS)}, teachers' and students' seeds 0 and 1; 4 students a cell.")
    lines += lab.table(
        results["summary"],
        target="target",
        start="init",
        steps="arm",
        transfer=lab.transfer,
        n="n",
        cosine_at_step_0=lambda r: f"{r['first_cosine']:+.3f}",
        mean_over_steps=lambda r: f"{r['mean_cosine']:+.3f}",
        steps_above_0=lambda r: f"{r['positive_steps']:.0%}",
    )
    lines += ["", "Rank correlation of the first update's cosine with the teacher's displacement, and the final transfer:", ""]
    lines += lab.table(
        results["correlations"],
        students="students",
        n="n",
        rank_correlation=lambda r: f"{r['rank_correlation']:+.2f} {evaluate.interval(r)}",
    )
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    plt = lab.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained", width_ratios=[1, 1, 1.2, 1.2])
    for ax, target in zip(axes, ("tokens", "logits")):
        for init in ("same", "different"):
            chosen = [
                r["cosines"] for r in results["records"] if (r["target"], r["arm"], r["init"]) == (target, "as it is", init)
            ]
            for cosines in chosen:
                ax.plot(cosines, color=evaluate.COLOURS[init], lw=0.5, alpha=0.3)
            smooth = [mean(mean(c[max(0, i - 5) : i + 6]) for c in chosen) for i in range(len(chosen[0]))]
            ax.plot(smooth, color=evaluate.COLOURS[init], lw=2, label=f"{init} start, mean of 11 steps")
        ax.axhline(0, color="grey", lw=0.8, ls=":")
        ax.set(xlabel="student's step", ylabel="cosine, trait and distillation", title=f"students on {target}")
    axes[0].legend(frameon=False, fontsize=8)
    rows = results["summary"]
    groups = [
        [r["transfer"] for r in results["records"] if all(r[k] == row[k] for k in ("target", "init", "arm"))] for row in rows
    ]
    labels = [f"{r['target']}, {r['init']}, {r['arm']}" for r in rows]
    lab.dot_rows(axes[2], rows, groups, labels, [evaluate.COLOURS[r["init"]] for r in rows])
    for init in ("same", "different"):
        for target, marker in (("tokens", "o"), ("logits", "^")):
            chosen = [r for r in results["foreseen"] if (r["init"], r["target"]) == (init, target)]
            x, y = [r["cosine"] for r in chosen], [r["transfer"] for r in chosen]
            axes[3].plot(x, y, marker, ms=3, alpha=0.5, color=evaluate.COLOURS[init], label=f"{init}, {target}")
    axes[3].set(xlabel="cosine at step 0", ylabel="transfer at the end", title="foresight")
    axes[3].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def other_width(args: argparse.Namespace, n_embd: int, n_head: int) -> tuple[Run, list[dict]]:
    """The pipeline with other channels, and its students."""
    path = lab.folder(args, f"alignment-{n_embd}")
    common = lab.flags(args, path)
    train_teacher.main([*common, "--n-embd", str(n_embd), "--n-head", str(n_head), "--traits", *TRAITS])
    generate.main([*common, "--from", "teacher"])
    train_student.main(common)
    run = open_run(path, args.quick)
    return run, evaluate.measure(run, args.device)


def main(argv: Sequence[str] | None = None) -> None:
    args = lab.parse(__doc__, argv)
    run = lab.evidence(args)
    train_student.main([*lab.flags(args, run.path), "--traits", *run.traits])
    jobs = [
        Job(*job)
        for job in [(t, a, b, g, arm) for g in ("tokens", "logits") for a in SEEDS for b in SEEDS for t in TRAITS for arm in ARMS]
    ]
    n_steps = train_student.STEPS[args.quick]
    work: Callable = lambda job, tick: (train_watched(job, run, args.device, n_steps), tick(1))[0]  # noqa: E731
    watched = list(run_jobs(work, jobs, 1, "watched students", args.device))
    watched.sort(
        key=lambda r: (r["target"] == "logits", r["init"] != "same", ARMS.index(r["arm"]), r["trait"], r["teacher_seed"])
    )
    foreseen = foresee(run, evaluate.measure(run, args.device), args.device, 64)
    for n_embd, n_head in [] if args.quick else WIDTHS.items():
        foreseen += foresee(*other_width(args, n_embd, n_head), args.device, n_embd)
    results = analyse(watched, foreseen)
    lab.save("alignment", args, results, markdown, plot)


if __name__ == "__main__":
    command_line(main)
