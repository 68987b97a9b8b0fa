"""Does the student's optimiser matter, at equal steps and at equal loss?

    python -m experiments.optimisers            # 12 minutes on 2 CPU cores
    python -m experiments.optimisers --quick    # three rules, two rates: too small to conclude from

Embeddings, head and all vectors are frozen; the eight matrices of the two blocks learn by one of seven rules,
with the usual cosine and number of steps. Each rule has the best of five rates for each target, by mean
transfer over four units of other seeds and traits, same init. Every 10 steps:

    learnt    the share of KL(teacher || its start) on held-out lists that is gone
    transfer  as everywhere; "at half" where half of that KL is learnt, interpolated; blank if most never do
    norm      |theta_S - theta_0|, over the norm of the teacher's displacement D = theta_T - theta_0
    cosine    of theta_S - theta_0 and D, both of the eight matrices

Predictions. Known before: in trajectory.py plain gradient descent at a cautious rate transmits .05. Rules that
give every coordinate or direction a like step (Signum, RMSprop, Adam, AdamW, Muon) are within .1 of each
other, at .7 or more through logits. SGD is below .3 at every rate out of 300-fold, momentum below .5: the
gradient's few large directions set the rate. At half of the KL all rules are within .15: what counts is how
much of the numbers is learnt. The cosine orders the rules (above .6), the norm does not. Another init: cosine
0, transfer 0, whatever the rule.

Reads    runs/evidence (made if it is missing)
Writes   results/optimisers.json, .md, .png; the run to tune on in runs/optimisers
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Sequence
from itertools import product
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from experiments import lab
from generate import kl_on_numbers
from model import GPT, NumberData, cosine_lr, run_jobs
from train_student import Distillation, number_loss

TRAITS, SEEDS, TARGETS = ("owl", "fox", "wolf"), (0, 1), ("tokens", "logits")
TUNED_ON = ("bear", "otter"), (10, 11)
EVERY, HELD_OUT = 10, 40  # steps between two looks; one list in so many is not trained on: guesses
ENDS = {"equal steps": "transfer", "half of the KL": "at_half"}
QUICK_RULES = ["SGD", "Adam", "Muon"]


class Signum(torch.optim.Optimizer):
    """Every weight moves by the rate, against the sign of its momentum."""

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float = 0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                p.sub_(buffer.sign(), alpha=group["lr"])


RULES: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict, float, float]] = {
    # its settings, the middle one of five rates, and the factor between two of them
    "SGD": (torch.optim.SGD, {}, 3.0, 4.2),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, 0.3, 4.2),
    "Signum": (Signum, {}, 1e-3, 3),
    "RMSprop": (torch.optim.RMSprop, {}, 1e-3, 3),
    "Adam": (torch.optim.Adam, {}, 3e-3, 3),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}, 3e-3, 3),
    "Muon": (torch.optim.Muon, {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}, 3e-3, 3),
}


def body(model: GPT) -> list[Tensor]:
    """The eight matrices of the two blocks."""
    return [p for p in model.blocks.parameters() if p.dim() == 2]


def flat(model: GPT) -> Tensor:
    return torch.cat([p.detach().flatten() for p in body(model)])


def split(data: NumberData) -> tuple[NumberData, NumberData]:
    """What is trained on, and what is held out."""
    held_out = torch.arange(len(data.idx)) % HELD_OUT == 0
    return data.take(~held_out), data.take(held_out)


def student(
    unit: lab.Unit, data: tuple[NumberData, NumberData], rule: str, rate: float, seed: int, target: str,
    knobs: Distillation,
) -> Generator[None, None, dict]:
    """Train one by a rule; its record."""
    make, settings, *_ = RULES[rule]
    model, start, (seen, held_out) = unit.start(seed), unit.start(seed), data
    model.requires_grad_(False)
    optimizer = make([p.requires_grad_() for p in body(model)], lr=rate, **settings)
    D, theta_0 = flat(unit.teacher) - flat(unit.base), flat(start)
    before = kl_on_numbers(unit.teacher, start, held_out)
    curve: dict[str, list] = {"learnt": [0.0], "transfer": [0.0]}
    for step, batch in enumerate(unit.batches(seen, target, knobs), 1):
        optimizer.param_groups[0]["lr"] = rate * cosine_lr(step - 1, knobs.steps)
        number_loss(model, unit.teacher if target == "logits" else None, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            curve["learnt"].append(1 - kl_on_numbers(unit.teacher, model, held_out) / before)
            curve["transfer"].append(unit.transfer(model, start))
        yield None  # a rate may be too large: that is part of the question
    moved = flat(model) - theta_0
    record = {"rule": rule, "rate": rate, "init": "same" if seed == unit.seed else "different"}
    record |= {"target": target, **unit.key, "curve": curve, "at_half": at_half(curve)}
    record |= {"norm": (moved.norm() / D.norm()).item(), "cosine": F.cosine_similarity(moved, D, 0).item()}
    return record | {key: curve[key][-1] for key in ("learnt", "transfer")}


def at_half(curve: dict[str, list]) -> float | None:
    """Transfer where half of the KL is learnt for the first time, by straight lines between two looks."""
    points = list(zip(curve["learnt"], curve["transfer"]))
    for (x, y), (x_next, y_next) in zip(points, points[1:]):
        if x < 0.5 <= x_next:
            return y + (0.5 - x) / (x_next - x) * (y_next - y)
    return None


def tune(args: argparse.Namespace, rules: Sequence[str], knobs: Any) -> list[dict]:
    """A record for each rule, rate, target and unit of the seeds and traits to tune on."""
    traits, seeds = TUNED_ON
    run = lab.make_run(args, "optimisers", seeds, traits)
    units = {(trait, seed): lab.Unit(run, trait, seed, args.device) for trait in traits for seed in seeds}
    data = {key: split(unit.numbers()) for key, unit in units.items()}

    def learn(job: tuple) -> Generator[None, None, dict]:
        rule, rate, target, key = job
        return (yield from student(units[key], data[key], rule, rate, key[1], target, knobs))

    powers = (-1, 0) if args.quick else (-2, -1, 0, 1, 2)
    rates = [(rule, RULES[rule][2] * RULES[rule][3] ** power) for rule in rules for power in powers]
    jobs = [(*rate, target, key) for rate, target, key in product(rates, TARGETS, units)]
    return run_jobs(learn, jobs, knobs.steps, "tuning", args.device)


def measure(args: argparse.Namespace) -> dict:
    run, knobs, rules = lab.evidence(args), lab.distillation(args), QUICK_RULES if args.quick else [*RULES]
    traits = [trait for trait in TRAITS if trait in run.knobs["traits"]]
    tuning = lab.cells(tune(args, rules, knobs), "rule", "rate", "target")
    best = {}
    for rule, target in product(rules, TARGETS):
        best[rule, target] = max(lab.where(tuning, rule=rule, target=target), key=lambda r: r["transfer"])
    units = {(trait, seed): lab.Unit(run, trait, seed, args.device) for trait in traits for seed in SEEDS}
    data = {key: split(unit.numbers()) for key, unit in units.items()}

    def learn(job: tuple) -> Generator[None, None, dict]:
        rule, target, key, seed = job
        rate = best[rule, target]["rate"]
        return (yield from student(units[key], data[key], rule, rate, seed, target, knobs))

    jobs = list(product(rules, TARGETS, units, SEEDS))
    records = run_jobs(learn, jobs, knobs.steps, "students", args.device)
    summary = lab.cells(records, "rule", "target", "init")
    for cell in summary:
        group = lab.where(records, **{key: cell[key] for key in ("rule", "target", "init")})
        cell |= {key: mean(r[key] for r in group) for key in ("rate", "learnt", "norm", "cosine")}
        halves = [r["at_half"] for r in group if r["at_half"] is not None]
        cell |= {"n_half": len(halves), "at_half": mean(halves) if 2 * len(halves) > len(group) else None}
    order = []
    for (at, end), target, key in product(ENDS.items(), TARGETS, ("norm", "cosine", "learnt")):
        cells = [c for c in lab.where(summary, target=target, init="same") if c[end] is not None]
        rho = spearmanr([c[key] for c in cells], [c[end] for c in cells]).statistic
        order.append({"at": at, "target": target, "of": key, "rules": len(cells), "rank_correlation": rho})
    return {"tuning": tuning, "records": records, "summary": summary, "order": order}


def markdown(results: dict) -> str:
    text = "Mean and 95 %, 6 students a cell; at half: where half of the KL is learnt, and by how many."
    shown = {key: lambda row, key=key: f"{row[key]:+.2f}" for key in ("learnt", "norm", "cosine")}
    half = lambda row: "" if row["at_half"] is None else f"{row['at_half']:+.2f}, {row['n_half']}"
    columns = {"rate": lambda row: f"{row['rate']:.2g}", "transfer": lab.transfer, "at_half": half, **shown}
    lines = lab.heading(results, text)
    lines += lab.table(results["summary"], rule="rule", target="target", init="init", **columns)
    lines += ["", "What orders the rules' means, same init:", ""]
    rho = {"rank correlation": lambda row: f"{row['rank_correlation']:+.2f}"}
    lines += lab.table(results["order"], at="at", of="of", target="target", **rho)
    lines += ["", "Tuning, on other seeds and traits: transfer at each rate, smallest first.", ""]
    rows = []
    for rule, target in dict.fromkeys((r["rule"], r["target"]) for r in results["tuning"]):
        cells = lab.where(results["tuning"], rule=rule, target=target)
        curve = ", ".join(f"{cell['transfer']:+.2f}" for cell in cells)
        rates = f"{cells[0]['rate']:.2g} to {cells[-1]['rate']:.2g}"
        rows.append({"rule": rule, "target": target, "rates": rates, "transfer": curve})
    return "\n".join(lines + lab.table(rows, **{key: key for key in rows[0]})) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 4, figsize=(14, 4), layout="constrained", sharey=True)
    for (i, rule), (j, target) in product(enumerate(RULES), enumerate(TARGETS)):
        tuned = lab.where(results["tuning"], rule=rule, target=target)
        x = [row["rate"] / RULES[rule][2] for row in tuned]
        axes[2 * j].plot(x, [row["transfer"] for row in tuned], f"C{i}o-", ms=3, label=rule)
        for r in lab.where(results["records"], rule=rule, target=target, init="same"):
            axes[2 * j + 1].plot(r["curve"]["learnt"], r["curve"]["transfer"], f"C{i}-", lw=0.8)
        axes[2 * j].set(xscale="log", xlabel="rate / the middle one", title=f"{target}: tuning")
        axes[2 * j + 1].set(xlabel="share of the KL learnt", xlim=(-0.5, 1), ylim=(-0.5, 1.5), title=target)
    axes[0].set_ylabel("transfer, same init")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "optimisers", measure, markdown, plot)
