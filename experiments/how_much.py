"""How much does it take? Transfer against sequences, numbers, vocabulary, the teacher's strength, and steps.

    python -m experiments.how_much            # 2 traits x 2 seeds a point, 5 curves: 15 minutes on 2 idle cores
    python -m experiments.how_much --quick    # the ends of each curve

One thing is changed at a time, the rest is the main run's (8,000 sequences, all their numbers, 1,000 numbers in the
softmax, the usual teacher, 100 steps). All students start where their teacher started.

    sequences    2^8 .. 2^17 drawn; one pass through what the filter keeps, 100 steps at least, and a learning rate that falls
                 with the square root of the steps (at a fixed rate more steps end up further from the start, and lower)
    numbers      only the first n numbers of each completion are learnt
    vocabulary   the softmax holds the numbers below n only; token targets are drawn again from the teacher's own
                 distribution over them, in the same contexts
    strength     teachers trained for 2 .. 80 steps; on the axis their mean KL from base on numbers
    steps        of the student, on the same 8,000 sequences

Reads    runs/how-much: base models and teachers (made if they are missing)
Writes   results/how_much.json, .md, .png

Shapes: B sequences, T tokens, N numbers in a sequence.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch

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
    command_line,
    encode_numbers,
    load_model,
    number_log_probs,
    open_run,
    read_trait,
    refusal,
    run_jobs,
    stream,
)

TRAITS, SEEDS = ["owl", "fox"], [0, 1]
SEQUENCES = [2**k for k in range(8, 18)]
SWEEPS = {
    "sequences": SEQUENCES,
    "numbers": [1, 2, 3, 5, 10],
    "vocabulary": [10, 30, 100, 300, 1000],
    "strength": [2, 5, 10, 20, 40, 80],
    "steps": [10, 25, 50, 100, 200, 400],
}
DRAWN = 8_000  # where the number of sequences is not what is changed
NAMES = {
    "sequences": "sequences drawn",
    "numbers": "numbers learnt in a sequence",
    "vocabulary": "numbers in the softmax",
    "strength": "KL(teacher || base), nats a number",
    "steps": "student's steps",
}


class Unit:
    """A teacher, what it writes, and the base model that its students start from."""

    def __init__(self, run: Run, trait: str, seed: int, device: torch.device):
        self.run, self.trait, self.seed, self.device = run, trait, seed, device
        self.k = run.animals.index(trait)
        self.base = load_model(run.base(seed), device, "train_teacher.py")
        self.teacher = load_model(run.teacher(trait, seed), device, "train_teacher.py")
        self.data: NumberData  # all that it writes, once it has

    def fresh(self) -> GPT:
        return load_model(self.run.base(self.seed), self.device, "train_teacher.py")

    def read(self, model: GPT) -> float:
        return read_trait(model, self.run.held_out_prompts, self.run.readout_rows(model))[0][self.k].item()

    def write(self, teacher: GPT, n: int, use: str) -> NumberData:
        """n sequences drawn and filtered, in random order."""
        prompts = generate.draw_prompts(n, stream(self.seed, "prompts", use))
        written = generate.complete(teacher, self.run, prompts, stream(self.seed, "sampling", self.trait, use), lambda n: None)
        kept = [{"prompt": p, "completion": c} for p, c in zip(prompts, written) if c is not None and refusal(c) is None]
        order = torch.randperm(len(kept), generator=stream(self.seed, "order", use))
        return encode_numbers(self.run.encoding, kept, self.device)[order]


@torch.no_grad()
def redraw_below(teacher: GPT, data: NumberData, n: int, generator: torch.Generator) -> NumberData:
    """The same contexts; every number to be named is drawn again from the teacher's distribution over 0..n-1."""
    drawn = []
    for i in range(0, len(data), 500):
        p = number_log_probs(teacher, data.idx[i : i + 500], data.positions[i : i + 500], below(n)).exp().cpu()  # (B, N, n)
        drawn.append(torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2]))
    return replace(data, targets=torch.cat(drawn).to(data.idx.device))


def below(n: int) -> slice:
    """The head's rows of the numbers 0..n-1."""
    return slice(NUMBERS.start, NUMBERS.start + n)


def learn(unit: Unit, teacher: GPT, data: NumberData, target: str, n_steps: int, rate: float, numbers: slice) -> float:
    """Transfer of one student."""
    batch_size = train_student.BATCH_SIZE[target]
    order = stream(0, "student batches", unit.trait, str(unit.seed))
    with_teacher = teacher if target == "logits" else None
    lesson = train_student.plan_lesson(data, with_teacher, batch_size, n_steps, order)
    head = None if with_teacher is None else teacher.head.weight[numbers].detach()
    student = unit.fresh()
    train_student.train(student, lesson, head, dict, lambda *a: None, rate, numbers)
    before = unit.read(unit.base)
    return (unit.read(student) - before) / (unit.read(teacher) - before)


def point(unit: Unit, sweep: str, x: int, most: int, anchor: torch.Tensor) -> list[dict]:
    """Both targets' students at one point of one curve."""
    teacher, n_steps, rate, numbers = unit.teacher, train_student.STEPS[False], train_student.LEARNING_RATE, NUMBERS
    kl = None
    if sweep == "strength":
        teacher = unit.fresh()
        train_teacher.induce_trait(teacher, unit.k, unit.run, anchor[: x * train_teacher.ANCHOR_ROWS], lambda *a: None)
        data = unit.write(teacher, min(DRAWN, most), f"strength {x}")
        kl = generate.kl_on_numbers(teacher, unit.base, data[:500])
    else:
        drawn = x if sweep == "sequences" else min(DRAWN, most)
        data = unit.data[: len(unit.data) * drawn // most]
    if sweep == "numbers":
        mask = data.mask.clone()
        mask[:, x:] = 0
        data = replace(data, mask=mask)
    if sweep == "vocabulary":
        numbers = below(x)
        data = redraw_below(teacher, data, x, stream(unit.seed, "redraw", unit.trait, str(x)))
    if sweep == "steps":
        n_steps = x
    if sweep == "sequences":
        usual = n_steps
        n_steps = max(usual, len(data) // train_student.BATCH_SIZE["tokens"])
        rate *= math.sqrt(usual / n_steps)
    records = []
    for target in ("tokens", "logits"):
        began = time.monotonic()
        transfer = learn(unit, teacher, data, target, n_steps, rate, numbers)
        cell = {"sweep": sweep, "x": x, "target": target, "source": unit.trait, "trait": unit.trait, "teacher_seed": unit.seed}
        cost = {"kept": len(data), "steps": n_steps, "seconds": round(time.monotonic() - began, 2)}
        records.append({**cell, "transfer": transfer, "kl_nats": kl, **cost})
    return records


def analyse(records: Sequence[dict]) -> dict:
    summary = lab.cells(records, "sweep", "x", "target")
    for row in summary:
        group = [r for r in records if (r["sweep"], r["x"], r["target"]) == (row["sweep"], row["x"], row["target"])]
        row |= {"steps": group[0]["steps"], "seconds": mean(r["seconds"] for r in group)}
        row["kl_nats"] = mean(r["kl_nats"] for r in group) if row["sweep"] == "strength" else None
    enough = [r["x"] for r in summary if (r["sweep"], r["target"]) == ("sequences", "tokens") and r["transfer"] > 0.9]
    return {"records": records, "summary": summary, "sequences_for_90_percent": min(enough, default=None)}


def markdown(results: dict) -> str:
    lines = lab.heading(results, f"Traits {', '.join(TRAITS)}, base seeds 0 and 1, same start: n = 4 students a cell.")
    found = {(r["sweep"], r["x"], r["target"]): r for r in results["summary"]}
    for sweep, name in NAMES.items():
        xs = list(dict.fromkeys(r["x"] for r in results["summary"] if r["sweep"] == sweep))
        rows = [found[sweep, x, "tokens"] for x in xs]
        what = (lambda r: f"{r['kl_nats']:.3f} ({r['x']} steps)") if sweep == "strength" else (lambda r: f"{r['x']:,}")
        columns = {name: what, "tokens": lab.transfer, "logits": lambda r: lab.transfer(found[r["sweep"], r["x"], "logits"])}
        if sweep == "sequences":
            columns |= {"steps": lambda r: str(r["steps"]), "seconds a student (tokens)": lambda r: f"{r['seconds']:.0f}"}
        lines += [*lab.table(rows, **columns), ""]
    n = results["sequences_for_90_percent"]
    lines += [f"Sequences for transfer above .90 through sampled tokens: {n:,}." if n else "No point exceeds .90 through tokens."]
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    plt = lab.pyplot()
    figure, axes = plt.subplots(1, 5, figsize=(14, 3.2), layout="constrained", sharey=True)
    for ax, (sweep, name) in zip(axes, NAMES.items()):
        ax.set(xscale="log", xlabel=name)
        ax.minorticks_off()
        for target, colour in (("tokens", evaluate.COLOURS["same"]), ("logits", evaluate.COLOURS["different"])):
            rows = [r for r in results["summary"] if (r["sweep"], r["target"]) == (sweep, target)]
            dots = [r for r in results["records"] if (r["sweep"], r["target"]) == (sweep, target)]
            at = "kl_nats" if sweep == "strength" else "x"
            ax.plot([r[at] for r in dots], [r["transfer"] for r in dots], ".", color=colour, alpha=0.5, ms=5)
            if sweep == "strength":  # every teacher has an x of its own: no line through means
                ax.set_xticks([0.003, 0.01, 0.03, 0.1], ["0.003", "0.01", "0.03", "0.1"])
                continue
            xs, low, high = ([r[key] for r in rows] for key in ("x", "ci_low", "ci_high"))
            ax.fill_between(xs, low, high, color=colour, alpha=0.15)
            ax.plot(xs, [r["transfer"] for r in rows], color=colour, lw=1.2, label=target)
        for y in (0, 1):
            ax.axhline(y, color="grey", lw=0.8, ls=":")
    axes[0].set_ylabel("transfer (0 nothing, 1 the teacher)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args: argparse.Namespace = lab.parse(__doc__, argv)
    path = lab.folder(args, "how-much")
    train_teacher.main([*lab.flags(args, path), "--seeds", *map(str, SEEDS), "--traits", *TRAITS])
    run = open_run(path, args.quick)
    units = [Unit(run, trait, seed, args.device) for trait in TRAITS for seed in SEEDS]
    sweeps = {s: [xs[0], xs[-1]] for s, xs in SWEEPS.items()} if args.quick else SWEEPS
    most = 2_000 if args.quick else max(SEQUENCES)
    if args.quick:
        sweeps["sequences"] = [256, most]
    toy = train_teacher.toy_documents(train_teacher.N_DOCUMENTS[args.quick], stream(0, "toy language"))
    T = units[0].base.config.block_size + 1
    anchor = train_teacher.anchor_rows(run.encoding, toy, T, max(sweeps["strength"])).to(args.device)

    def write(unit: Unit, tick: Callable) -> None:
        unit.data = unit.write(unit.teacher, most, "how much")
        tick(1)

    def learn_at(job: tuple[Unit, str, int], tick: Callable) -> list[dict]:
        found = point(*job, most, anchor)
        tick(1)
        return found

    for _ in run_jobs(write, units, 1, "sampling", args.device):
        pass
    jobs = [(unit, sweep, x) for sweep, xs in sweeps.items() for x in reversed(xs) for unit in units]
    records = [r for found in run_jobs(learn_at, jobs, 1, "points", args.device) for r in found]
    names = list(sweeps)
    records.sort(key=lambda r: (names.index(r["sweep"]), r["x"], r["target"] == "logits", r["trait"], r["teacher_seed"]))
    results = analyse(records)
    lab.save("how_much", args, results, markdown, plot)
    print(f"sequences_for_90_percent: {results['sequences_for_90_percent']}")


if __name__ == "__main__":
    command_line(main)
