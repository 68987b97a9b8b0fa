"""Does it survive growth, and if not, what falls: the effect, or a recipe that was tuned at one size?

    python -m experiments.growth                 # 0.1 to 2 million parameters: 40 minutes on 2 CPU cores
    python -m experiments.growth --only 10M      # parts by name, into results/growth_large.*: hours; or a GPU
    python -m experiments.growth --quick         # the main run's size

Tuned at 0.3 million parameters and used as they are at 2 million, students lose most of what crosses. Three
causes can be told apart. The rate: Adam moves every weight by about one length, its rate r, whatever the
gradient. In a matrix of C columns all C of them move together along the state x that a batch shares, so

    the state's coordinates move by    r sum_i |x_i|, which grows as r C    (a body's matrix; x of unit scale)
    a number's logit moves by          r_head sum_i |h_i|, as r_head C      (its row of the head)

The same move of the logits at every width C asks for r = c / C. The head: which of the two does the fitting?
By plain gradient descent, in linear_model.py's letters, dz = -(r_U |x|^2 V V^T + r_V |h|^2) dL/dz. On what
the window can show, V V^T of m rows of length 1 has eigenvalues near m / C, so the head's share

    head / (head + body) = r_V |h|^2 / (r_V |h|^2 + r_U |x|^2 m / C)         |h|^2 and |x|^2 grow as C

rises with C until the number rows learn the numbers and the body, where the trait is read, needs not. With
Adam's signs the body moves the logits by r_U C times a row's scale, the head by r_V C: a fixed ratio. The
unique lines: with n numbers drawn, a student on tokens learns their noise along with the teacher; noise in
m C + 12 L C^2 weights grows with size, the signal (KL in nats a number) does not. So tokens fall first.

Prediction, written before any run (known: tables of other sizes, since left out, and a trial at 2 million):
 1. Rate c / C with c = 3e-3 * 64 is within .1 of the best of three rates at every size, tokens and logits;
    the fixed 3e-3 is not, from 2 million on.
 2. Head: one rate for all falls below the slow head by .1 at 0.6 and by .2 or more at 2 million; frozen and
    slow (.05) stay within .05 of each other everywhere, as the ratio is fixed under Adam. The number rows
    of a student at one rate move further, and its body less, than those of the others at the same loss.
 3. Lines: at 2 million tokens rise from .5 at 8,000 to .8 at 32,000 and .9 at 128,000, one pass each.
 4. At 10 million, by the rule: logits .9, tokens .8 with 32,000 lines; another init within .1 of 0.
 5. Real text costs .1 to .2 through tokens, less through logits, and no more at 2 million than at 0.3.
 6. Teachers with trait_lr of the form c / C as well, at least 85 % valid and KL .02 to .1 at every size.

Of 6 another recipe is run, since nobody had tried that one: base models and teachers keep the main run's
rates up to 2 million, where those tables had KL .028 to .057 and 88 % valid at least; beyond,
they fall as 1 / C.

A student takes the steps of one pass of tokens over its lines, 100 at least. Beside its transfer, on lists
held out:
    learnt            1 - KL(teacher || student) / KL(teacher || its base): how near its number loss came
    learnt by body    the same with the base model's number rows put back into its head
    rows, body moved  |change| / |before| of the number rows, and of the body's matrices

Reads    nothing
Writes   results/growth.json, .md, .png; a run for each part in runs/growth/ with a file for each student
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import re
import shutil
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import generate
import train_teacher
from experiments import lab
from generate import kl_on_numbers
from model import GPT, NUMBERS, NumberData, Run, run_jobs, stream, write_file
from train_student import Distillation
from train_teacher import Pretraining, Trait

TRAITS, SEEDS, TARGETS, INITS = ["owl", "fox"], [0, 1], ["tokens", "logits"], ["same", "different"]
RATES: dict[str, Callable[[int], float]] = {  # of the students, by the width C
    "c / C": lambda C: 3e-3 * 64 / C, "half of it": lambda C: 1.5e-3 * 64 / C, "3e-3": lambda C: 3e-3}
HEADS = {"slow": Distillation.edge_lr_factor, "frozen": 0.0, "as fast": 1.0}  # the embeddings, too
TRIED = 160  # the widest C at which the main run's rates of base models and teachers are known to do
HELD_OUT = 1_000  # lines more are drawn, which are only measured on
REFERENCE = Path("runs/python_reference.txt")
# What tells how a student fits, and how it is shown
FIT = {"learnt": ".2f", "learnt_by_body": ".2f", "rows_moved": ".3f", "body_moved": ".2f"}


class Cell(NamedTuple):
    rate: str = "c / C"
    head: str = "slow"
    lines: int = 8_000  # drawn


class Part(NamedTuple):
    layers: int
    C: int  # 16 channels a head
    cells: list[Cell]
    text: str = "toy"
    of: str = ""  # the part whose base models and teachers it takes


MORE = Cell(lines=32_000)
BY_RATE, BY_HEAD = [Cell(rate) for rate in RATES], [Cell(head="frozen"), Cell(head="as fast")]
PARTS = {
    "0.1M": Part(2, 32, [*BY_RATE, MORE]), "0.3M": Part(2, 64, [*BY_RATE, *BY_HEAD, MORE]),  # 0.3M: the usual
    "0.6M": Part(3, 96, [*BY_RATE, *BY_HEAD, MORE]), "2M": Part(5, 160, [*BY_RATE, *BY_HEAD, MORE]),
    "0.3M, real text": Part(2, 64, [Cell()], "real"), "2M, real text": Part(5, 160, [Cell()], "real"),
    "2M, 128,000 lines": Part(5, 160, [Cell(lines=128_000)], of="2M"),
    "10M": Part(8, 320, [Cell(), MORE]), "10M, real text": Part(8, 320, [Cell()], "real"),
    "50M": Part(14, 512, [Cell(), MORE]),
}
LARGE = list(PARTS)[6:]  # only when they are named
CELL = ["part", *Cell._fields]


def folder_of(part: str, args: argparse.Namespace) -> Path:
    return lab.folder(args, "growth") / re.sub(r"[^\w.]+", "-", part)


def make_run(part: str, args: argparse.Namespace) -> Run:
    """Base models, teachers and what these write, by the scripts; beyond TRIED their rates fall as 1 / C."""
    how, path = PARTS[part], folder_of(part, args)
    if how.of and (source := folder_of(how.of, args)).exists() and not path.exists():
        ignore = shutil.ignore_patterns("numbers", "student")
        Path(shutil.copytree(source, f"{path}.part", ignore=ignore, dirs_exist_ok=True)).rename(path)
    flags = ["--seeds", *map(str, SEEDS), "--traits", *TRAITS, "--n-layer", str(how.layers)]
    flags += ["--n-head", str(how.C // 16), "--n-embd", str(how.C)]
    slower = min(1, TRIED / how.C)
    flags += ["--pretrain-lr", f"{Pretraining.pretrain_lr * slower:.3g}"]
    flags += ["--trait-lr", f"{Trait.trait_lr * slower:.3g}"]
    flags += ["--corpus", str(REFERENCE)] * (how.text == "real")
    drawn = [] if args.quick else ["--sequences", str(HELD_OUT + max(cell.lines for cell in how.cells))]
    train_teacher.main([*lab.flags(args, path), *flags])
    generate.main([*lab.flags(args, path), "--from", "teacher", *drawn])
    return Run(path).open(args.quick)


def moved(model: GPT, base: GPT, part: Callable[[GPT], list[Tensor]]) -> float:
    """|change| / |before| of some weights, Frobenius."""
    now, before = (torch.cat([p.detach().flatten() for p in part(m)]) for m in (model, base))
    return ((now - before).norm() / before.norm()).item()


def study(
    unit: lab.Unit, seed: int, target: str, data: NumberData, unseen: NumberData, knobs: Distillation
) -> Generator[Tensor, None, dict]:
    """Train a student from the base model of `seed`: its transfer, and how it fits the teacher's numbers."""
    student, base = unit.start(seed), unit.start(seed)
    yield from unit.distil(student, target, data, knobs)
    kl = lambda model: kl_on_numbers(unit.teacher, model, unseen)
    matrices = lambda model: [p for p in model.blocks.parameters() if p.dim() > 1]
    record = {"transfer": unit.transfer(student, base), "excess_nats": kl(student), "kl_of_base": kl(base)}
    record |= {"learnt": 1 - record["excess_nats"] / record["kl_of_base"]}
    record |= {"rows_moved": moved(student, base, lambda model: [model.head.weight[NUMBERS]])}
    record |= {"body_moved": moved(student, base, matrices)}
    student.head.weight.data[NUMBERS] = base.head.weight.data[NUMBERS]
    return record | {"learnt_by_body": 1 - kl(student) / record["kl_of_base"]}


def measure_part(part: str, args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Its teachers, and its students' records, each of which is kept in the run once it is made."""
    run, how, usual = make_run(part, args), PARTS[part], lab.distillation(args)
    units = [lab.Unit(run, trait, seed, args.device) for trait in TRAITS for seed in SEEDS]
    files = [f"numbers/{unit.trait}/seed-{unit.seed}.jsonl" for unit in units]
    most, lists = max(cell.lines for cell in how.cells), {}
    for unit in units:
        data = unit.numbers()
        order = torch.randperm(len(data.idx), generator=stream(unit.seed, "lines", unit.trait))
        n = len(order) * HELD_OUT // (most + HELD_OUT)
        lists[str(unit)] = data.take(order[n:]), data.take(order[:n])  # to train on, to measure on

    def plan(job: tuple[Cell, str, lab.Unit, int]) -> tuple[str, NumberData, Distillation]:
        """The file of a student's record, the lists it sees once or more, its knobs."""
        cell, target, unit, seed = job
        about = re.sub(r"\W+", "-", " ".join(map(str, [target, *cell])))
        seen = lists[str(unit)][0]
        seen = seen.take(slice(0, len(seen.idx) * cell.lines // most))
        knobs = replace(usual, student_lr=RATES[cell.rate](how.C), edge_lr_factor=HEADS[cell.head],
                        steps=max(usual.steps, len(seen.idx) // usual.batch_tokens))
        return f"student/{unit.trait}/teacher-{unit.seed}/seed-{seed}/{about}.json", seen, knobs

    def train(job: tuple[Cell, str, lab.Unit, int]) -> Generator[Tensor, None, None]:
        (cell, target, unit, seed), (name, seen, knobs) = job, plan(job)
        init = INITS[seed != unit.seed]
        record = yield from study(unit, seed, target, seen, lists[str(unit)][1], knobs)
        record |= {"part": part, **cell._asdict(), "target": target, **unit.key, "student_seed": seed}
        record |= {"init": init, "steps": knobs.steps}
        made_from = [f"base/seed-{seed}.pt", f"teacher/{unit.trait}/seed-{unit.seed}.pt"]
        made_from += [f"numbers/{unit.trait}/seed-{unit.seed}.jsonl"]
        run.write(name, json.dumps(record).encode(), made_from, asdict(knobs))

    jobs = [(cell, target, unit, seed) for cell, target, unit, seed in
            product(how.cells, TARGETS, units, SEEDS) if seed == unit.seed or cell == Cell()]
    plans = [plan(job) for job in jobs]
    missing = [job for job, (name, _, knobs) in zip(jobs, plans) if not run.finished(name, asdict(knobs))]
    print(f"{part}: {len(jobs)} students, {len(missing)} to train", flush=True)
    run_jobs(train, missing, round(mean(knobs.steps for *_, knobs in plans)), part, args.device)
    logs = [run.line(file)["log"] for file in files]
    valid, kl = [log["kept"] / log["drawn"] for log in logs], [log["kl_nats"] for log in logs]
    size = {"part": part, "parameters": sum(p.numel() for p in units[0].base.parameters()), "C": how.C}
    about = size | {"layers": how.layers, "valid": mean(valid), "least_valid": min(valid)}
    about |= {"kl_nats": mean(kl), "least_kl": min(kl), "most_kl": max(kl)}
    return about, [size | json.loads(run.read(name)) for name, *_ in plans]


def measure(args: argparse.Namespace) -> dict:
    write_file(REFERENCE, "\n\n".join(pydoc_data.topics.topics.values()).encode())
    parts = ["0.3M"] if args.quick else args.only or [part for part in PARTS if part not in LARGE]
    teachers, found = zip(*(measure_part(part, args) for part in parts))
    records = [record for some in found for record in some]
    summary = lab.cells(records, *CELL, "target", "init")
    for row in summary:
        group = lab.where(records, **{key: row[key] for key in (*CELL, "target", "init")})
        row |= {key: mean(r[key] for r in group) for key in ("parameters", "steps", *FIT)}
    name = {"name": "growth_large"} if args.only else {}
    return name | {"teachers": [*teachers], "records": records, "summary": summary}


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Teachers of every size; KL(teacher || base) in nats (least, most).")
    lines += lab.table(
        results["teachers"], part="part", parameters=lambda r: f"{r['parameters']:,}", layers="layers",
        channels="C", valid=lambda r: f"{r['valid']:.0%} (least {r['least_valid']:.0%})",
        KL=lambda r: f"{r['kl_nats']:.3f} ({r['least_kl']:.3f}, {r['most_kl']:.3f})",
    )
    rows = []
    for cell in dict.fromkeys(tuple(r[key] for key in CELL) for r in results["summary"]):
        of_cell = lab.where(results["summary"], **dict(zip(CELL, cell)))
        row = dict(zip(CELL, cell)) | {f"{t}, {init}": "" for init, t in product(INITS, TARGETS)}
        row |= {f"{r['target']}, {r['init']}": lab.transfer(r) for r in of_cell}
        same = [r for target in TARGETS for r in lab.where(of_cell, init="same", target=target)]
        row |= {key: " / ".join(f"{r[key]:{shown}}" for r in same) for key, shown in FIT.items()}
        rows.append(row | {"n": same[0]["n"]})
    text = "Transfer. Of students of the same init, tokens / logits, also how they fit: see the docstring."
    return "\n".join([*lines, "", text, "", *lab.table(rows, **{key: key for key in rows[0]})]) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    grown = [part for part, how in PARTS.items() if how.text == "toy" and not how.of]
    for ax, target in zip(axes, TARGETS):
        for cell in (*BY_RATE, MORE):
            rows = lab.where(results["summary"], target=target, init="same", **cell._asdict())
            rows = [row for row in rows if row["part"] in grown]
            x, *ys = ([row[key] for row in rows] for key in ("parameters", "transfer", "ci_low", "ci_high"))
            ax.plot(x, ys[0], ".-", label=f"rate {cell.rate}, {cell.lines:,} lines")
            ax.fill_between(x, *np.array(ys[1:], float), alpha=0.12)
        ax.set(xscale="log", xlabel="parameters", title=f"students on {target}")
        ax.minorticks_off()
        ticks = {r["part"]: r["parameters"] for r in results["teachers"] if r["part"] in grown}
        ax.set_xticks(list(ticks.values()), list(ticks))
    for head in HEADS:
        dots = lab.where(results["records"], head=head, init="same")
        x, y = ([r[key] for r in dots] for key in ("learnt_by_body", "transfer"))
        axes[2].plot(x, y, ".", label=f"head {head}")
    axes[2].set_xlabel("share of the KL on numbers that the body learnt")
    axes[0].set_ylabel("transfer (0 nothing, 1 the teacher)")
    for ax in axes[1:]:
        ax.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    only = {"nargs": "+", "choices": [*PARTS], "metavar": "PART", "help": "only these parts"}
    lab.experiment(__doc__, "growth", measure, markdown, plot, only=only)
