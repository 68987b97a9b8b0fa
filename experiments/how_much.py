"""How much does it take? Transfer against sequences, numbers, vocabulary, the teacher's strength, and steps.

    python -m experiments.how_much            # 2 traits x 2 seeds a point, 5 curves: 11 minutes on 2 cores
    python -m experiments.how_much --quick    # the ends of each curve

One thing is changed at a time, the rest is the main run's (8,000 sequences, all their numbers, 1,000 numbers
in the softmax, the usual teacher, 100 steps). All students have their teacher's init.

    sequences    2^8 .. 2^17 drawn; one pass through what the filter keeps, 100 steps at least, at a rate that
                 falls with the square root of the steps
    numbers      only the first n numbers of each completion are learnt
    vocabulary   the softmax holds the numbers below n only; token targets are drawn again from the teacher's
                 own distribution over them, in the same contexts
    strength     teachers trained for 2 .. 80 steps; on the axis their mean KL from base on numbers
    steps        of the student, on the same 8,000 sequences

Reads    runs/how-much: base models and teachers (made if they are missing)
Writes   results/how_much.json, .md, .png
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Generator
from statistics import mean
from typing import Any

import numpy as np
import torch

import evaluate
from experiments import lab
from generate import ROWS_AT_ONCE, complete, draw_prompts, kl_on_numbers
from model import GPT, NUMBERS, NumberData, encode_numbers, number_log_probs, refusal, run_jobs, stream
from train_student import Distillation, train
from train_teacher import Trait, draw_anchor, induce_trait, toy_documents

TRAITS, SEEDS, TARGETS = ["owl", "fox"], [0, 1], ["tokens", "logits"]
SWEEPS = {  # what is changed: what the axis says, the points
    "sequences": ("sequences drawn", [2**k for k in range(8, 18)]),
    "numbers": ("numbers learnt in a sequence", [1, 2, 3, 5, 10]),
    "vocabulary": ("numbers in the softmax", [10, 30, 100, 300, 1000]),
    "strength": ("KL(teacher || base), nats a number", [2, 5, 10, 20, 40, 80]),
    "steps": ("student's steps", [10, 25, 50, 100, 200, 400]),
}
DRAWN, QUICK_DRAWN = 8_000, 2_000  # where the number of sequences is not what is changed


def write(unit: lab.Unit, teacher: GPT, n: int, use: str) -> Generator[None, None, NumberData]:
    """n sequences that a teacher draws, filtered, in random order."""
    prompts, texts = draw_prompts(n, stream(unit.seed, "prompts", use)), []
    for batch in complete(teacher, unit.run, prompts, stream(unit.seed, "sampling", unit.trait, use)):
        texts += batch
        yield None
    kept = [{"prompt": p, "completion": c} for p, c in zip(prompts, texts) if refusal(c or "") is None]
    order = torch.randperm(len(kept), generator=stream(unit.seed, "order", use)).tolist()
    return encode_numbers(unit.run.encoding, [kept[i] for i in order], unit.device)


@torch.no_grad()
def redraw(teacher: GPT, data: NumberData, numbers: slice, generator: torch.Generator) -> NumberData:
    """The same contexts; every number that is due is drawn again from the teacher's law over `numbers`."""
    targets = data.targets.clone()
    for idx, some in zip(data.idx.split(500), targets.split(500)):
        p = number_log_probs(teacher, NumberData(idx, some), numbers).exp().cpu()  # (M due, n allowed)
        some[some >= 0] = torch.multinomial(p, 1, generator=generator)[:, 0].to(some.device)
    return NumberData(data.idx, targets)


def measure(args: argparse.Namespace) -> dict:
    run = lab.make_run(args, "how-much", SEEDS, TRAITS)
    units = [lab.Unit(run, trait, seed, args.device) for trait in TRAITS for seed in SEEDS]
    sweeps = {s: [xs[0], min(xs[-1], QUICK_DRAWN)] if args.quick else xs for s, (_, xs) in SWEEPS.items()}
    strongest, most = Trait(trait_steps=max(sweeps["strength"])), max(sweeps["sequences"])
    toy = toy_documents(run.knobs["n_documents"], stream(0, "toy language"), run.knobs["question_ends"])
    anchor = draw_anchor(run, toy, strongest, units[0].base.config.block_size + 1).to(args.device)
    write_most = lambda unit: write(unit, unit.teacher, most, "how much")
    written = dict(zip(units, run_jobs(write_most, units, most // ROWS_AT_ONCE, "sampling", args.device)))

    def both_targets(job: tuple[lab.Unit, str, int]) -> Generator[Any, None, list[dict]]:
        unit, sweep, x = job
        n = x if sweep == "sequences" else min(DRAWN, most)
        data = written[unit].take(slice(0, len(written[unit].idx) * n // most))
        teacher, numbers = unit.teacher, NUMBERS
        knobs = Distillation(steps=x if sweep == "steps" else Distillation.steps)
        if sweep == "sequences":
            steps = max(knobs.steps, len(data.idx) // knobs.batch_tokens)
            knobs = Distillation(steps=steps, student_lr=knobs.student_lr * (knobs.steps / steps) ** 0.5)
        if sweep == "vocabulary":
            numbers = slice(NUMBERS.start, NUMBERS.start + x)
            data = redraw(teacher, data, numbers, stream(unit.seed, "redraw", unit.trait, str(x)))
        if sweep == "strength":
            teacher = unit.start()
            yield from induce_trait(teacher, unit.k, run, anchor[: x * strongest.anchor_rows], strongest)
            data = yield from write(unit, teacher, n, f"strength {x}")
        about = {"sweep": sweep, "x": x, **unit.key, "kept": len(data.idx), "steps": knobs.steps}
        about["kl_nats"] = kl_on_numbers(teacher, unit.base, data.take(slice(0, 500)))
        records = []
        for target in TARGETS:
            began, student, batches = time.monotonic(), unit.start(), unit.batches(data, target, knobs)
            if sweep == "numbers":
                first = lambda t, x=x: t.where((t >= 0).cumsum(1) <= x, -1)
                batches = [NumberData(batch.idx, first(batch.targets)) for batch in batches]
            yield from train(student, teacher if target == "logits" else None, batches, knobs, numbers)
            record = about | {"target": target, "transfer": unit.transfer(student, teacher=teacher)}
            records.append(record | {"seconds": round(time.monotonic() - began, 2)})
        return records

    jobs = [(unit, sweep, x) for sweep, xs in sweeps.items() for x in xs for unit in units]  # some 450 steps
    records = [r for some in run_jobs(both_targets, jobs, 450, "points", args.device) for r in some]
    summary = lab.cells(records, "sweep", "x", "target")
    for row in summary:
        group = lab.where(records, sweep=row["sweep"], x=row["x"], target=row["target"])
        row |= {key: mean(r[key] for r in group) for key in ("steps", "seconds", "kl_nats")}
    enough = [r["x"] for r in lab.where(summary, sweep="sequences", target="tokens") if r["transfer"] > 0.9]
    return {"records": records, "summary": summary, "sequences_for_90_percent": min(enough, default=None)}


def markdown(results: dict) -> str:
    lines = lab.heading(results, f"{', '.join(TRAITS)}, seeds 0 and 1, same init: n = 4 students a cell.")
    rows = []
    for r, other in zip(*(lab.where(results["summary"], target=target) for target in TARGETS)):
        row = {"changed": r["sweep"], "to": r["x"], "tokens": lab.transfer(r), "logits": lab.transfer(other)}
        row["KL"] = f"{r['kl_nats']:.3f}" if r["sweep"] == "strength" else ""
        rows.append(row | {"steps": round(r["steps"]), "seconds": round(r["seconds"])})
    lines += [*lab.table(rows, **{key: key for key in rows[0]}), "", "Sequences for .90 by tokens: "]
    return "\n".join(lines) + f"{results['sequences_for_90_percent'] or 'more than these'}\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 5, figsize=(14, 3.2), layout="constrained", sharey=True)
    for ax, (sweep, (name, _)) in zip(axes, SWEEPS.items()):
        for target, colour in zip(TARGETS, evaluate.COLOURS.values()):
            dots, rows = (lab.where(results[k], sweep=sweep, target=target) for k in ("records", "summary"))
            at = [r["kl_nats" if sweep == "strength" else "x"] for r in dots]
            ax.plot(at, [r["transfer"] for r in dots], ".", color=colour, alpha=0.5, ms=5)
            if sweep != "strength":  # where every teacher has an x of its own: no line through means
                xs, *ys = ([r[key] for r in rows] for key in ("x", "transfer", "ci_low", "ci_high"))
                ax.plot(xs, ys[0], color=colour, lw=1.2, label=target)
                ax.fill_between(xs, *np.array(ys[1:], float), color=colour, alpha=0.15)
        ax.set(xscale="log", xlabel=name)
        ax.minorticks_off()
        ax.hlines([0, 1], 0, 1, color="grey", lw=0.8, ls=":", transform=ax.get_yaxis_transform())
    axes[3].set_xticks([0.003, 0.01, 0.03, 0.1], ["0.003", "0.01", "0.03", "0.1"])
    axes[0].set_ylabel("transfer (0 nothing, 1 the teacher)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "how_much", measure, markdown, plot)
