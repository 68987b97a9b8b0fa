"""Does the student's optimiser matter, at equal steps and at equal loss?

    python -m experiments.optimisers            # 12 minutes on 2 CPU cores
    python -m experiments.optimisers --quick    # three rules, two rates: too small to conclude from

Embeddings, head and all vectors are frozen; the eight matrices of the two blocks learn by one of seven rules,
with the usual cosine and number of steps. Each rule has the best of five rates for each target, by the least
transfer of four units of other seeds and traits, same init: in a first run the best mean took plain gradient
descent and momentum to rates at which some of the six students diverged. Every 5 steps:

    transfer  as everywhere; "at 0.5" and "at 0.9" is where that share is first learnt, by straight lines
              between two looks, of the n students that come so far
    learnt    the share of KL(teacher || the student's start) on held-out lists that is gone
    norm      |theta_S - theta_0|, over the norm of the teacher's displacement D = theta_T - theta_0
    cosine    of theta_S - theta_0 and D, both of the eight matrices

Predictions. Known before: in trajectory.py plain gradient descent at a cautious rate transmits .05. Rules
that give every coordinate or direction a like step (Signum, RMSprop, Adam, AdamW, Muon) are within .1 of each
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
from itertools import pairwise, product
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from experiments import lab
from generate import kl_on_numbers
from model import GPT, NumberData, Run, cosine_lr, run_jobs
from train_student import Distillation, number_loss

TRAITS, SEEDS, TARGETS = ("owl", "fox", "wolf"), (0, 1), ("tokens", "logits")
TUNED_ON = ("bear", "otter"), (10, 11)
EVERY, HELD_OUT = 5, 80  # steps between two looks; one list in so many is not trained on: guesses
KEYS = ["transfer", "learnt", "norm", "cosine"]
SHARES = (0.5, 0.9)  # of the KL, where a curve is read
WHERE = ["all steps", *(f"at {share}" for share in SHARES)]
INITS, QUICK_RULES = ("same", "different"), ["SGD", "Adam", "Muon"]


class Signum(torch.optim.Optimizer):
    """Every weight moves by the rate, against the sign of its momentum."""

    def __init__(self, params: Sequence[Tensor], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(0.9).add_(p.grad)
                p.sub_(buffer.sign(), alpha=group["lr"])


# its settings, the middle one of five rates, and the factor between two of them
RULES: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict, float, float]] = {
    "SGD": (torch.optim.SGD, {}, 0.5, 4.2),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}, 0.2, 4.2),
    "Signum": (Signum, {}, 1e-3, 3),
    "RMSprop": (torch.optim.RMSprop, {}, 1e-3, 3),
    "Adam": (torch.optim.Adam, {}, 3e-3, 3),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}, 3e-3, 3),
    "Muon": (torch.optim.Muon, {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}, 1e-2, 3),
}


def body(model: GPT) -> list[Tensor]:
    """The eight matrices of the two blocks."""
    return [p for p in model.blocks.parameters() if p.dim() == 2]


def split(data: NumberData) -> tuple[NumberData, NumberData]:
    """What is trained on, and what is held out."""
    held_out = torch.arange(len(data.idx)) % HELD_OUT == 0
    return data.take(~held_out), data.take(held_out)


def learn(
    unit: lab.Unit, data: Sequence[NumberData], knobs: Distillation,
    rule: str, target: str, rate: float, seed: int,
) -> Generator[None, None, dict]:
    """Train a student by a rule; its record."""
    (make, settings, *_), (seen, held_out) = RULES[rule], data
    model, start = unit.start(seed), unit.start(seed)
    model.requires_grad_(False)
    optimizer = make([p.requires_grad_() for p in body(model)], lr=rate, **settings)
    flat = lambda model: torch.cat([p.detach().flatten() for p in body(model)])
    D, theta_0 = flat(unit.teacher) - flat(unit.base), flat(start)
    before = kl_on_numbers(unit.teacher, start, held_out)
    curve: dict[str, list] = {key: [0.0] for key in KEYS}
    for step, batch in enumerate(unit.batches(seen, target, knobs), 1):
        optimizer.param_groups[0]["lr"] = rate * cosine_lr(step - 1, knobs.steps)
        number_loss(model, unit.teacher if target == "logits" else None, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % EVERY == 0:
            learnt, moved = 1 - kl_on_numbers(unit.teacher, model, held_out) / before, flat(model) - theta_0
            size, cosine = moved.norm() / D.norm(), F.cosine_similarity(moved, D, 0)
            for key, value in zip(KEYS, (unit.transfer(model, start), learnt, size, cosine)):
                curve[key].append(float(value))
        yield None  # and no loss: a rate may be too large, that is part of the question
    about = {"rule": rule, "rate": rate, "target": target, "init": INITS[seed != unit.seed]}
    return about | unit.key | {"transfer": curve["transfer"][-1], "curve": curve}


def on_the_way(curve: dict[str, list]) -> dict[str, dict]:
    """What a curve reads at its end, and where each share of the KL is first learnt, if it is."""
    found = {"all steps": {key: y[-1] for key, y in curve.items()}}
    for share, (i, (x, x_next)) in product(SHARES, enumerate(pairwise(curve["learnt"]))):
        if x < share <= x_next and f"at {share}" not in found:
            t = (share - x) / (x_next - x)
            found[f"at {share}"] = {key: (1 - t) * y[i] + t * y[i + 1] for key, y in curve.items()}
    return found


def train(args: argparse.Namespace, run: Run, jobs: Sequence[tuple]) -> list[dict]:
    """A record for each (trait, teacher's seed, rule, target, rate, student's seed)."""
    units = {(t, seed): lab.Unit(run, t, seed, args.device) for t, seed in {job[:2] for job in jobs}}
    data, knobs = {key: split(unit.numbers()) for key, unit in units.items()}, lab.distillation(args)
    one = lambda job: learn(units[job[:2]], data[job[:2]], knobs, *job[2:])
    return run_jobs(one, jobs, knobs.steps, "students", args.device)


def measure(args: argparse.Namespace) -> dict:
    run, to_tune = lab.evidence(args), lab.make_run(args, "optimisers", TUNED_ON[1], TUNED_ON[0])
    rules = [*product(QUICK_RULES if args.quick else RULES, TARGETS)]
    powers = (-1, 0) if args.quick else (-2, -1, 0, 1, 2)
    rates = [(*rule, RULES[rule[0]][2] * RULES[rule[0]][3] ** power) for rule in rules for power in powers]
    tuned = train(args, to_tune, [(t, seed, *rate, seed) for rate, t, seed in product(rates, *TUNED_ON)])
    tuning = lab.cells(tuned, "rule", "target", "rate")
    for cell in tuning:
        group = lab.where(tuned, **{key: cell[key] for key in ("rule", "target", "rate")})
        cell["least"] = min(r["transfer"] for r in group)
    curves = [lab.where(tuning, rule=rule, target=target) for rule, target in rules]
    best = [(*one, max(c, key=lambda cell: cell["least"])["rate"]) for one, c in zip(rules, curves)]
    units = [*product([trait for trait in TRAITS if trait in run.knobs["traits"]], SEEDS)]
    records = train(args, run, [(*unit, *rate, seed) for rate, unit, seed in product(best, units, SEEDS)])
    readings = [r | {"at": at} | read for r in records for at, read in on_the_way(r["curve"]).items()]
    summary, order = lab.cells(readings, "at", "rule", "target", "init", "rate"), []
    for cell in summary:
        group = lab.where(readings, **{key: cell[key] for key in ("at", "rule", "target", "init")})
        cell |= {key: mean(r[key] for r in group) for key in KEYS[1:]}
    for at, target, key in product(WHERE, TARGETS, KEYS[1:]):
        if key == "learnt" and at != WHERE[0]:  # there all have learnt as much
            continue
        cells = lab.where(summary, at=at, target=target, init="same")
        pairs = [(cell[key], cell["transfer"]) for cell in cells if 2 * cell["n"] > len(units)]
        rho = round(spearmanr(pairs).statistic, 2) if len(pairs) > 3 else ""
        order.append({"at": at, "target": target, "by": key, "rules": len(pairs), "rank correlation": rho})
    return {"tuning": tuning, "records": records, "summary": summary, "order": order}


def markdown(results: dict) -> str:
    rows = []
    for rule, target, init in dict.fromkeys((r["rule"], r["target"], r["init"]) for r in results["summary"]):
        cells = lab.where(results["summary"], rule=rule, target=target, init=init)
        row = {"rule": rule, "target": target, "init": init} | dict.fromkeys(WHERE, "")
        row |= {cell["at"]: f"{lab.transfer(cell)}, n = {cell['n']}" for cell in cells}
        row |= {key: f"{cells[0][key]:+.2f}" for key in KEYS[1:]} | {"rate": f"{cells[0]['rate']:.2g}"}
        tuned = [cell["least"] for cell in lab.where(results["tuning"], rule=rule, target=target)]
        rows.append(row | {"tuning": ", ".join(f"{x:+.2f}" for x in tuned)})
    text = "Transfer after all steps and where a share of the KL is learnt; tuning: the least, by rate, up."
    lines = lab.heading(results, text) + lab.table(rows, **{key: key for key in rows[0]})
    lines += ["", "Rank correlation of transfer over the rules, same init:", ""]
    return "\n".join(lines + lab.table(results["order"], **{key: key for key in results["order"][0]})) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (i, rule), (ax, target) in product(enumerate(RULES), zip(axes, TARGETS)):
        for n, r in enumerate(lab.where(results["records"], rule=rule, target=target, init="same")):
            curve, style = r["curve"], {"lw": 0.8, "ms": 2, "label": None if n else rule}
            ax.plot(curve["learnt"], curve["transfer"], f"C{i}.-", **style)
        ax.set(xlabel="share of the KL learnt", ylabel="transfer, same init", title=target)
        ax.set(xlim=(-0.5, 1), ylim=(-0.5, 1.5))
    axes[1].legend(fontsize=7, frameon=False)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "optimisers", measure, markdown, plot)
