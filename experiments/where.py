"""Where does it sit: in which part of the student, which numbers of the lists, which draws?

    python -m experiments.where            # 6 minutes on 2 CPU cores
    python -m experiments.where --quick    # two rows a question: too small to conclude from

    part         only this part of the student is trained, or all but this one, each at its usual rate
    tenth        of the numbers, sorted by ln p_teacher - ln p_base, the top, a random or the bottom tenth is
                 treated: left out of the loss; alone in it; replaced as a label, as an input, or as both,
                 by another draw from the base model in its place
    temperature  the labels are drawn anew from the teacher at this temperature, in the same contexts; 0 takes
                 the likeliest; `all logits` is the usual other target
    place        only this number of a completion counts, of lists that have a 7th
    numbers      the softmax, teacher's and student's, sees a quarter of the numbers: those whose ln p_teacher
                 - ln p_base varies most over contexts, least, or a random quarter

Predictions. Part: the trait was put into the body, so each block alone brings a half or more, block 1 more
than block 0, head or embeddings alone nothing; no block is needed. Tenth: the top tenth holds what the draw
says for the teacher, so without it transfer falls by more than half, below 0 without label; a random tenth
changes nothing; replaced inputs matter little (elsewhere a replaced label leaves .12 of the effect, one left
out .43, a replaced input .78). Temperature: the likeliest number of a near uniform law is a matter of noise,
but of the same noise each time, so 0 and .5 still carry it, 2 carries half (at a billion parameters sampled
lines were reported to carry nothing). Place: the first number, which comes where a question's answer would,
carries more than any other. Numbers: the quarter that varies most carries more than a random one, the least
varying less.

Predicted after a first run, in which places were groups of one to four numbers and no tenth stood alone: of
single numbers the first carries more than any other; the top tenth alone brings as much as all numbers, since
it was picked by the teacher's own likelihood, and the bottom tenth alone less than 0.

Writes   results/where.json, .md, .png; reads the run in runs/evidence, which seed_matrix makes, too

Shapes: B sequences, T tokens, M numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from experiments import lab
from model import GPT, N_NUMBERS, NUMBERS, NumberData, number_log_probs, run_jobs, stream

TRAITS, SEEDS, TARGETS = ("owl", "fox", "wolf"), (0, 1), ("tokens", "logits")
TEMPERATURES = ["0", "0.5", "1", "2"]


def parts(model: GPT) -> dict[str, list[nn.Module]]:
    found: dict[str, list[nn.Module]] = {"embeddings": [model.wte, model.wpe]}
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        found[f"attention {i}"] = [block.ln_1, block.attn, block.attn_proj]
        found[f"MLP {i}"] = [block.ln_2, block.mlp, block.mlp_proj]
    return found | {"head": [model.ln_f, model.head]}


def freeze(model: GPT, row: str) -> None:
    """Leave only one part to be trained, or all but one."""
    how, _, name = row.partition(": ")
    for part, modules in parts(model).items():
        for module in modules:
            module.requires_grad_((part == name) == (how == "only"))


class Facts(NamedTuple):
    """What the rows need to know of a unit's data, at its M numbers."""

    says: Tensor  # (M,) ln p_teacher - ln p_base of the number that stands there
    drawn: Tensor  # (M,) another, from the base model
    cooled: dict[str, Tensor]  # (M,) others, from the teacher at each temperature
    varying: Tensor  # (1000,) the numbers in order of how much ln p_teacher - ln p_base varies


@torch.no_grad()
def facts(unit: lab.Unit, data: NumberData) -> Generator[None, None, Facts]:
    draws, found = stream(unit.seed, "where", unit.trait), []
    pick = lambda log_p: torch.multinomial(log_p.exp().cpu(), 1, generator=draws)[:, 0].to(log_p.device)
    total, squares = torch.zeros(2, N_NUMBERS, device=unit.device)
    for idx, targets in zip(data.idx.split(500), data.targets.split(500)):
        part = NumberData(idx, targets)
        log_p, log_b = (number_log_probs(model, part) for model in (unit.teacher, unit.base))  # (M, 1000)
        ratio, y = log_p - log_b, targets[part.due]
        cooled = [pick((log_p / max(float(t), 1e-6)).log_softmax(-1)) for t in TEMPERATURES]
        found.append([ratio.gather(1, y[:, None])[:, 0], pick(log_b), *cooled])
        total += ratio.sum(0)
        squares += ratio.square().sum(0)
        yield None
    says, drawn, *cooled = map(torch.cat, zip(*found))
    varying = (squares / len(says) - (total / len(says)) ** 2).argsort()
    return Facts(says, drawn, dict(zip(TEMPERATURES, cooled)), varying)


def tenth(unit: lab.Unit, data: NumberData, known: Facts, row: str) -> NumberData:
    """The data with a tenth of its numbers treated."""
    which, how = row.split(": ")
    order, n = known.says.argsort(), len(known.says) // 10
    if which == "random":
        order = torch.randperm(len(order), generator=stream(unit.seed, "tenth", unit.trait))
    chosen = order[-n:] if which == "top" else order[:n]
    rows, columns = (at[chosen] for at in data.due)
    idx, targets = data.idx.clone(), data.targets.clone()
    if how == "left out":
        targets[rows, columns] = -1
    if how == "alone":  # of lists that have one
        targets = torch.full_like(targets, -1)
        targets[rows, columns] = data.targets[rows, columns]
        return NumberData(idx, targets).take(rows.unique())
    if how in ("label", "both"):
        targets[rows, columns] = known.drawn[chosen]
    if how in ("input", "both"):
        seen = columns + 1 < idx.size(1)  # an input that stands at the end is not read
        idx[rows[seen], columns[seen] + 1] = NUMBERS.start + known.drawn[chosen][seen]
    return NumberData(idx, targets)


def relabelled(data: NumberData, labels: Tensor) -> NumberData:
    targets = data.targets.clone()
    targets[data.due] = labels
    return NumberData(data.idx, targets)


def quarter(unit: lab.Unit, known: Facts, row: str) -> Tensor:
    """The head's rows of 250 numbers."""
    order = known.varying
    if row == "random quarter":
        order = torch.randperm(len(order), generator=stream(unit.seed, "quarter"))
    return NUMBERS.start + (order[:250] if row == "least varying" else order[-250:])


def count(data: NumberData, n: int) -> NumberData:
    """Only the n-th number of a completion counts, from 1 on, of lists that have one in every place."""
    is_due = data.targets >= 0
    targets = data.targets.where(is_due & (is_due.cumsum(1) == n), -1)
    return NumberData(data.idx, targets).take(is_due.sum(1) >= max(PLACES.values()))


PLACES = {"1st": 1, "2nd": 2, "4th": 4, "7th": 7}
NAMES = ["embeddings", "attention 0", "MLP 0", "attention 1", "MLP 1", "head"]
HOW = ["left out", "alone", "label", "input", "both"]
QUESTIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {  # its rows, the targets
    "part": (["all", *(f"{how}: {name}" for how in ("only", "all but") for name in NAMES)], TARGETS),
    "tenth": ([f"{which}: {how}" for which in ("top", "random", "bottom") for how in HOW], ("tokens",)),
    "temperature": (TEMPERATURES, ("tokens",)),
    "place": ([*PLACES], TARGETS),
    "numbers": (["most varying", "random quarter", "least varying"], ("logits",)),
}


def measure(args: argparse.Namespace) -> dict:
    run, knobs = lab.evidence(args), lab.distillation(args)
    traits = [trait for trait in TRAITS if trait in run.knobs["traits"]]
    units = {(trait, seed): lab.Unit(run, trait, seed, args.device) for trait in traits for seed in SEEDS}
    numbers = {key: unit.numbers() for key, unit in units.items()}
    find = lambda key: facts(units[key], numbers[key])
    known = dict(zip(units, run_jobs(find, list(units), 20, "facts", args.device)))

    def learn(job: tuple[str, str, str, str, int]) -> Generator[Tensor, None, dict]:
        question, row, target, trait, seed = job
        unit, data = units[trait, seed], numbers[trait, seed]
        student = unit.start()
        window: Any = NUMBERS  # the head's rows of the softmax
        if question == "part" and row != "all":
            freeze(student, row)
        if question == "tenth":
            data = tenth(unit, data, known[trait, seed], row)
        if question == "temperature":
            data = relabelled(data, known[trait, seed].cooled[row])
        if question == "place":
            data = count(data, PLACES[row])
        if question == "numbers":
            window = quarter(unit, known[trait, seed], row)
        yield from unit.distil(student, target, data, knobs, window)
        about = {"question": question, "row": row, "target": target, **unit.key}
        return about | {"transfer": unit.transfer(student)}

    jobs = [
        (question, row, target, *unit)
        for question, (rows, targets) in QUESTIONS.items()
        for row, target, unit in product(rows[: 2 if args.quick else None], targets, units)
    ]
    records = run_jobs(learn, jobs, knobs.steps, "students", args.device)
    return {"records": records, "summary": lab.cells(records, "question", "row", "target")}


def markdown(results: dict) -> str:
    lines, rows = lab.heading(results, "Transfer, same init, mean and 95 %, 6 students a cell."), []
    for question, row in dict.fromkeys((r["question"], r["row"]) for r in results["summary"]):
        cells = lab.where(results["summary"], question=question, row=row)
        found = dict.fromkeys(TARGETS, "") | {cell["target"]: lab.transfer(cell) for cell in cells}
        rows.append({"question": question, "row": row} | found)
    return "\n".join(lines + lab.table(rows, **{key: key for key in rows[0]})) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 2, figsize=(12, 8), layout="constrained")
    for ax, target in zip(axes, TARGETS):
        records, rows = (lab.where(results[key], target=target) for key in ("records", "summary"))
        lab.dot_rows(ax, records, rows, "question", "row")
        ax.set_title(f"students on {target}")
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "where", measure, markdown, plot)
