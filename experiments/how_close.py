"""Between the same init and another: how close is close enough, and is there a threshold or a slope?

    python -m experiments.how_close            # 20 minutes on 2 CPU cores
    python -m experiments.how_close --quick    # a few starts: too small to conclude from

A teacher of init A writes numbers; its student starts from a base model that is close to A's:

    mixed        every matrix of the init (1 - t) A + t B, B another init, with A's norm; pretrained as always
    noise, then  every matrix of the init A + noise of s times its norm, with A's norm; pretrained as always
    noise, late  the same on the finished base model
    order        init A, the same texts; after n of 500 steps in another order
    texts        init A, other texts of the toy language from the first step on
    longer       init A, pretrained two or four times as long, with a rate that falls as much slower

Each start has an A and a B of its own (seeds 0 and 2, 1 and 3). It drifts in a direction of its own too,
whatever it learns; so its students on the base model's numbers, read for the same trait, stand beside them
as `drift`. `net` is transfer less drift.

Beside each start, its correlation with A's base model: of the head's rows of the numbers, of its rows of the
classes, and of all weights (the mean over the ten matrices: in one long vector the head would be nine tenths
of the squared length). Spearman's rank correlations of `net` over the starts say which of these orders them.

The last table is of another init throughout: the mean of 120 students at every 5 steps, and of students of
the same base models on base models' numbers, for an early transient that decays as has been seen elsewhere.

Predictions, before any run. In linear_model.py a student gets V'_aux V_num^+ V_num D, so two windows have to
be shared: the product of their correlations should order the starts better than all weights do. For a mixed
init that is (1 - t)^2 / ((1 - t)^2 + t^2), .5 half-way: a slope without a threshold, .4 to .6 of the same
init's transfer there. Noise as large as the weights, late: as much. Another order of texts, and other texts:
three quarters or more of the same init's (39 % was reported for another order by others). Two and four times
as long: more than .5. No transient above .05 that is not there with base models' numbers as well.

What a first run found, with B the other of the two seeds, without `drift`, and with all weights as one
vector: a slope, .22 and .35 of the same init's half-way (drift included), other texts .41 and .59, twice as
long .33 and .57, four times .20 and .29: less than predicted. Of this run: with another B, and less the
drift, half-way .05 to .15 through tokens and .2 to .3 through logits; no threshold; the mean over matrices
orders the starts worse than the numbers' rows do, since most matrices are in the body.

Writes   results/how_close.json, .md, .png; reads the run in runs/evidence, which seed_matrix makes, too

Shapes: C channels, K trait classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from copy import copy, deepcopy
from itertools import product
from statistics import mean
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor

from experiments import lab
from model import GPT, NUMBERS, GPTConfig, Run, read_trait, run_jobs, stream
from train_teacher import QUICK, Pretraining, pretrain, pretraining_rows, toy_documents

TRAITS, TARGETS = ("owl", "fox", "wolf"), ("tokens", "logits")
SEEDS, QUICK_SEEDS = {0: 2, 1: 3}, {0: 1, 1: 0}  # of A: of B
KEYS = ["numbers", "classes", "product", "weights"]
EVERY = 5  # steps of the trajectory


class Start(NamedTuple):
    how: str
    x: float = 0.0  # t, s, n, or times as long


STARTS = [
    Start("the same"), *(Start("mixed", t) for t in (0.1, 0.25, 0.5, 0.75)), Start("another"),
    *(Start("noise, then", s) for s in (0.1, 0.3, 1.0)), *(Start("noise, late", s) for s in (0.1, 0.3, 1.0)),
    *(Start("order", n) for n in (400, 200, 0)), Start("texts"), Start("longer", 2), Start("longer", 4),
]
QUICK_STARTS = [STARTS[0], Start("mixed", 0.5), Start("another"), Start("noise, late", 1.0)]


@torch.no_grad()
def blend(model: GPT, others: dict[str, Tensor], keep: float, add: float) -> GPT:
    """Every matrix keep * W + add * W', W' of W's norm, brought back to W's norm; in place."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            norm = p.norm()
            p.mul_(keep).add_(others[name].to(p.device), alpha=(add * norm / others[name].norm()).item())
            p.mul_(norm / p.norm())
    return model


def noise(model: GPT, seed: int, use: str) -> dict[str, Tensor]:
    draws = stream(seed, "noise", use)
    return {name: torch.randn(p.shape, generator=draws) for name, p in model.named_parameters()}


def init(start: Start, seed: int, seed_of_B: int, config: GPTConfig) -> GPT:
    model = GPT(config).initialise(seed)
    if start.how == "mixed":
        other = GPT(config).initialise(seed_of_B)
        return blend(model, dict(other.named_parameters()), 1 - start.x, start.x)
    return blend(model, noise(model, seed, "init"), 1, start.x) if start.how == "noise, then" else model


def text(start: Start, run: Run, knobs: Pretraining) -> Tensor:
    """What the start's base model reads, in order."""
    n_steps = knobs.pretrain_steps * int(start.x if start.how == "longer" else 1)
    use = "other texts" if start.how == "texts" else "toy language"
    toy = toy_documents(run.knobs["n_documents"], stream(0, use), run.knobs["question_ends"])
    rows = pretraining_rows(run, toy, GPTConfig.block_size + 1, Pretraining(pretrain_steps=n_steps))
    if start.how == "order":
        n = int(start.x / Pretraining.pretrain_steps * len(rows))
        rows[n:] = rows[n:][torch.randperm(len(rows) - n, generator=stream(0, "another order"))]
    return rows


@torch.no_grad()
def correlations(model: GPT, base: GPT, run: Run) -> dict[str, float]:
    """Of the weights of two base models, around their means."""
    of = lambda *pair: torch.corrcoef(torch.stack([p.flatten() for p in pair]))[0, 1].item()
    numbers, classes = (of(model.head.weight[r], base.head.weight[r]) for r in (NUMBERS, run.readout_rows))
    weights = mean(of(p, q) for p, q in zip(model.parameters(), base.parameters()) if p.dim() == 2)
    return {"numbers": numbers, "classes": classes, "product": numbers * classes, "weights": weights}


def measure(args: argparse.Namespace) -> dict:
    run, knobs, starts = lab.evidence(args), lab.distillation(args), QUICK_STARTS if args.quick else STARTS
    partners = QUICK_SEEDS if args.quick else SEEDS
    traits = [trait for trait in TRAITS if trait in run.knobs["traits"]]
    steps: Any = QUICK["pretrain_steps"] if args.quick else Pretraining.pretrain_steps
    usual = Pretraining(pretrain_steps=steps)
    units = {(trait, seed): lab.Unit(run, trait, seed, args.device) for trait in traits for seed in SEEDS}
    writers = units | base_writers(units)
    numbers = {key: unit.numbers() for key, unit in writers.items()}
    config = units[traits[0], 0].base.config

    def make(job: tuple[Start, int]) -> Generator[Tensor, None, GPT]:
        start, seed = job
        unit = units[traits[0], seed]
        if start.how in ("the same", "another", "noise, late"):
            model = unit.start(partners[seed] if start.how == "another" else seed)
            return blend(model, noise(model, seed, "late"), 1, start.x) if start.x else model
        model = init(start, seed, partners[seed], config).to(args.device)
        yield from pretrain(model, text(start, run, usual).to(args.device), usual)
        return model

    pairs = list(product(starts, SEEDS))
    bases = dict(zip(pairs, run_jobs(make, pairs, usual.pretrain_steps, "base models", args.device)))

    def learn(job: tuple[Start, str, int, str]) -> Generator[Tensor, None, dict[str, float]]:
        """Transfer for the writer's trait; for every trait, if the base model wrote."""
        start, writer, seed, target = job
        unit, student = writers[writer, seed], deepcopy(bases[start, seed])
        yield from unit.distil(student, target, numbers[writer, seed], knobs)
        read = traits if writer == "base" else [writer]
        return {trait: units[trait, seed].transfer(student, bases[start, seed]) for trait in read}

    jobs = list(product(starts, [*traits, "base"], SEEDS, TARGETS))
    found, records = dict(zip(jobs, run_jobs(learn, jobs, knobs.steps, "students", args.device))), []
    for start, trait, seed, target in product(starts, traits, SEEDS, TARGETS):
        unit, transfer = units[trait, seed], found[start, trait, seed, target][trait]
        record = {**start._asdict(), "target": target, **unit.key, "transfer": transfer}
        record["drift"] = found[start, "base", seed, target][trait]
        record["net"] = transfer - record["drift"]
        records.append(record | correlations(bases[start, seed], unit.base, run))
    summary = lab.cells(records, "how", "x", "target")
    for cell in summary:
        group = lab.where(records, how=cell["how"], x=cell["x"], target=cell["target"])
        cell |= {key: mean(r[key] for r in group) for key in [*KEYS, "drift", "net"]}
    order = []
    for key, target in product(KEYS, TARGETS):
        cells = lab.where(summary, target=target)
        rho = spearmanr([c[key] for c in cells], [c["net"] for c in cells]).statistic
        order.append({"of": key, "target": target, "rank_correlation": rho})
    return {"records": records, "summary": summary, "order": order, "trajectory": trajectory(args, run)}


def base_writers(units: dict[tuple[str, int], lab.Unit]) -> dict[tuple[str, int], lab.Unit]:
    """The base models as teachers, whose numbers count for every trait."""
    writers = {("base", seed): copy(unit) for (_, seed), unit in units.items()}
    for writer in writers.values():
        writer.trait, writer.teacher = "base", writer.base
    return writers


def trajectory(args: argparse.Namespace, run: Run) -> list[dict]:
    """Students of another init: the mean transfer at every EVERY steps, by writer and target."""
    knobs, seeds, traits = lab.distillation(args), run.knobs["seeds"], run.knobs["traits"]
    units = {(trait, seed): lab.Unit(run, trait, seed, args.device) for trait, seed in product(traits, seeds)}
    writers = units | base_writers(units)
    numbers = {key: unit.numbers() for key, unit in writers.items()}
    taught = {key: unit.read(unit.teacher) - unit.read(unit.base) for key, unit in units.items()}
    read = lambda model: read_trait(model, run.unseen_questions, run.readout_rows)[0]  # (K,)

    def learn(job: tuple[str, int, int, str]) -> Generator[Tensor, None, list]:
        writer, teacher_seed, seed, target = job
        unit = writers[writer, teacher_seed]
        student, curve = unit.start(seed), []
        before = read(student)
        for step, loss in enumerate(unit.distil(student, target, numbers[writer, teacher_seed], knobs), 1):
            if step % EVERY == 0:
                curve.append(read(student) - before)
            yield loss
        moved, against = torch.stack(curve), traits if writer == "base" else [writer]  # (points, K)
        return [(moved[:, units[t, teacher_seed].k] / taught[t, teacher_seed]).tolist() for t in against]

    jobs = [job for job in product([*traits, "base"], seeds, seeds, TARGETS) if job[1] != job[2]]
    found, rows = run_jobs(learn, jobs, knobs.steps, "other init", args.device), []
    for kind, target in product(("teacher", "base"), TARGETS):
        chosen = [(job[0] == "base") == (kind == "base") and job[3] == target for job in jobs]
        curves = torch.tensor([mine for mine, is_one in zip(found, chosen) if is_one])  # (n, traits, points)
        row = {"numbers": kind, "target": target, "n": len(curves)}
        rows.append(row | {"transfer": curves.mean((0, 1)).tolist()})
    return rows


def markdown(results: dict) -> str:
    rows = []
    for how, x in dict.fromkeys((r["how"], r["x"]) for r in results["summary"]):
        cells = lab.where(results["summary"], how=how, x=x)
        row = {"start": f"{how} {x:g}" if x or how == "order" else how}
        row |= {key: f"{cells[0][key]:.2f}" for key in ("numbers", "classes", "weights")}
        row |= {cell["target"]: lab.transfer(cell) for cell in cells}
        row |= {f"{c['target']}, {key}": f"{c[key]:+.2f}" for key in ("drift", "net") for c in cells}
        rows.append(row)
    lines = lab.heading(results, "Correlations with the teacher's base model; transfer, 6 students a cell.")
    lines += lab.table(rows, **{key: key for key in rows[0]}) + ["", "What orders the starts, by `net`:", ""]
    rho = {"rank correlation": lambda row: f"{row['rank_correlation']:+.2f}"}
    lines += lab.table(results["order"], of="of", target="target", **rho)
    lines += ["", f"Another init, mean transfer at every {EVERY} steps:", ""]
    curve = {"transfer": lambda row: " ".join(f"{x:+.2f}" for x in row["transfer"])}
    lines += lab.table(results["trajectory"], numbers="numbers", target="target", n="n", **curve)
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 3, figsize=(12, 4), layout="constrained")
    hows = dict.fromkeys(r["how"] for r in results["summary"])
    for (ax, key), (colour, how) in product(zip(axes, ("numbers", "weights")), enumerate(hows)):
        for target, marker in zip(TARGETS, "ox"):
            rows = lab.where(results["summary"], how=how, target=target)
            x, y = ([row[name] for row in rows] for name in (key, "net"))
            ax.plot(x, y, marker, color=f"C{colour}", label=how if target == "tokens" else None)
        ax.set(title="o tokens, x logits", ylabel="transfer less drift")
        ax.set_xlabel(f"correlation with the teacher's base model: {key}")
    axes[1].legend(fontsize=7, frameon=False)
    for row in results["trajectory"]:
        style = {"color": "C3" if row["numbers"] == "teacher" else "grey"}
        style["ls"] = "-" if row["target"] == "tokens" else "--"
        steps = [EVERY * (i + 1) for i in range(len(row["transfer"]))]
        axes[2].plot(steps, row["transfer"], **style, label=f"{row['numbers']}'s numbers, {row['target']}")
    axes[2].set(xlabel="step", ylabel="transfer, another init", ylim=(-0.2, 0.4))
    axes[2].legend(fontsize=7, frameon=False)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "how_close", measure, markdown, plot)
