"""Does it survive growth, and if not, what falls: the effect, or a recipe that was tuned at one size?

Tuned at 0.3 million parameters and used as they are at 2 million, the students lose most of what crosses. Three
causes can be told apart. The rate: Adam moves every weight by about one length, its rate r, whatever the
gradient. In a matrix of C columns all C of them move together along the state x that a batch shares, so

    the state's coordinates move by    r sum_i |x_i|, which grows as r C     (a body's matrix, x of unit scale)
    a number's logit moves by          r_head sum_i |h_i|, also as r_head C  (its row of the head)

The same move of the logits at every width C asks for r = c / C. The head: which of the two does the fitting?
By plain gradient descent, in the letters of linear_model.py, dz = -(r_U |x|^2 V V^T + r_V |h|^2) dL/dz. On what
the window can show, V V^T of m rows of length 1 has eigenvalues near m / C, so the head's share

    head / (head + body) = r_V |h|^2 / (r_V |h|^2 + r_U |x|^2 m / C)         |h|^2 and |x|^2 grow as C

rises with C until the number rows learn the numbers and the body, where the trait is read, needs not. With
Adam's signs the body's move of the logits is r_U C times a row's scale, the head's is r_V C: a fixed ratio. The
unique lines: with n numbers drawn, a student on tokens learns their noise along with the teacher; noise in
m C + 12 L C^2 weights grows with size, the signal (KL in nats a number) does not. So tokens fall first.

Prediction, written before any run (from the tables of `variants --sizes` and a trial at 2 million: see README):
 1. Rate c / C with c = 3e-3 * 64 is within .1 of the best of three rates at every size, tokens and logits; the
    fixed 3e-3 is not, from 2 million on.
 2. Head: one rate for all falls below the slow head by .1 at 0.6 and by .2 or more at 2 million; frozen and
    slow (.05) stay within .05 of each other everywhere, as the ratio is fixed under Adam. The number rows
    of a student at one rate move further, and its body less, than those of the others at the same loss.
 3. Lines: at 2 million tokens rise from .5 at 8,000 to .8 at 32,000 and .9 at 128,000, one pass each.
 4. At 10 million, by the rule: logits .9, tokens .8 with 32,000 lines; another init within .1 of 0.
 5. Real text costs .1 to .2 through tokens, less through logits, and no more at 2 million than at 0.3.
 6. Teachers with trait_lr of the form c / C as well, at least 85 % valid and KL .02 to .1 at every size.
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

import torch
from torch import Tensor

import generate
import train_teacher
from experiments import lab
from generate import kl_on_numbers
from model import GPT, NUMBERS, NumberData, Run, run_jobs, stream, write_file
from train_student import Distillation
from train_teacher import Trait

TRAITS, SEEDS, TARGETS = ["owl", "fox"], [0, 1], ["tokens", "logits"]
RATES: dict[str, Callable[[int], float]] = {  # of the students, by the width C
    "c / C": lambda C: 3e-3 * 64 / C, "half of it": lambda C: 1.5e-3 * 64 / C, "3e-3": lambda C: 3e-3}
HEADS = {"slow": Distillation.edge_lr_factor, "frozen": 0.0, "as fast": 1.0}  # and the embeddings
HELD_OUT = 1_000  # lines drawn to measure on only
REFERENCE = Path("runs/python_reference.txt")


class Cell(NamedTuple):
    rate: str = "c / C"
    head: str = "slow"
    lines: int = 8_000  # drawn


class Part(NamedTuple):
    layers: int
    C: int  # 16 channels a head
    cells: list[Cell]
    text: str = "toy"
    of: str = ""  # the part whose base models and teachers it has


BY_RATE, MORE = [Cell(rate) for rate in RATES], Cell(lines=32_000)
BY_HEAD = [Cell(head="frozen"), Cell(head="as fast")]
PARTS = {
    "0.1M": Part(2, 32, [*BY_RATE, MORE]), "0.3M": Part(2, 64, [*BY_RATE, MORE]),  # the main run's size
    "0.6M": Part(3, 96, [*BY_RATE, *BY_HEAD, MORE]), "2M": Part(5, 160, [*BY_RATE, *BY_HEAD, MORE]),
    "0.3M, real text": Part(2, 64, [Cell(), MORE], "real"), "2M, real text": Part(5, 160, [Cell(), MORE], "real"),
    "2M, more lines": Part(5, 160, [Cell(lines=128_000)], of="2M"),
    "10M": Part(8, 320, [Cell(), MORE]), "50M": Part(14, 512, [Cell(), MORE]),
}

LARGE = [*PARTS][-3:]  # only if they are named
INITS, CELL = ["same", "different"], ["part", *Cell._fields]
FIT = {"learnt": ".2f", "learnt_by_body": ".2f", "rows_moved": ".3f", "body_moved": ".2f"}  # how it is shown


def folder_of(part: str, args: argparse.Namespace) -> Path:
    return lab.folder(args, "growth") / re.sub(r"[^\w.]+", "-", part)


def make_run(part: str, args: argparse.Namespace) -> Run:
    """Base models, teachers and what these write, by the scripts; their rates are of the form c / C, too."""
    how, path = PARTS[part], folder_of(part, args)
    if how.of and (source := folder_of(how.of, args)).exists() and not path.exists():
        ignore = shutil.ignore_patterns("numbers", "student")
        Path(shutil.copytree(source, f"{path}.part", ignore=ignore, dirs_exist_ok=True)).rename(path)
    of_run = ["--seeds", *map(str, SEEDS), "--traits", *TRAITS]
    of_run += ["--n-layer", str(how.layers), "--n-head", str(how.C // 16), "--n-embd", str(how.C)]
    of_run += ["--trait-lr", f"{Trait.trait_lr * 64 / how.C:.3g}"]
    of_run += ["--corpus", str(REFERENCE)] * (how.text == "real")
    common, drawn = lab.flags(args, path), max(cell.lines for cell in how.cells) + HELD_OUT
    train_teacher.main([*common, *of_run])
    generate.main([*common, "--from", "teacher", *["--sequences", str(drawn)] * (not args.quick)])
    return Run(path).open(args.quick)


def knobs_of(cell: Cell, C: int, usual: Distillation) -> Distillation:
    """A student's: one pass through its lines, or the usual number of steps if that is more."""
    steps = max(usual.steps, cell.lines // usual.batch_tokens)
    return replace(usual, steps=steps, student_lr=RATES[cell.rate](C), edge_lr_factor=HEADS[cell.head])


def moved(model: GPT, base: GPT, part: Callable[[GPT], list[Tensor]]) -> float:
    """|change| / |before| of some weights, Frobenius."""
    now, before = (torch.cat([p.detach().flatten() for p in part(m)]) for m in (model, base))
    return ((now - before).norm() / before.norm()).item()


def study(unit: lab.Unit, seed: int, target: str, data: NumberData, unseen: NumberData, knobs: Distillation
    ) -> Generator[Tensor, None, dict]:
    """Train one student, from the base model of `seed`, and say how it fits."""
    student, base = unit.start(seed), unit.start(seed)
    yield from unit.distil(student, target, data, knobs)
    kl = lambda model: kl_on_numbers(unit.teacher, model, unseen)
    record = {"transfer": unit.transfer(student, base), "excess_nats": kl(student)}
    record |= {"learnt": 1 - record["excess_nats"] / kl(base)}
    record |= {"rows_moved": moved(student, base, lambda m: [m.head.weight[NUMBERS]])}
    record |= {"body_moved": moved(student, base, lambda m: [p for p in m.blocks.parameters() if p.dim() > 1])}
    student.head.weight.data[NUMBERS] = base.head.weight.data[NUMBERS]
    return record | {"learnt_by_body": 1 - kl(student) / kl(base)}


def measure_part(part: str, args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """What there is to say of the part's teachers, and its students' records, each kept as soon as it is made."""
    run, how, usual = make_run(part, args), PARTS[part], lab.distillation(args)
    most, seen, unseen = max(cell.lines for cell in how.cells), {}, {}
    units = [lab.Unit(run, trait, seed, args.device) for trait in TRAITS for seed in SEEDS]
    for unit in units:
        data = unit.numbers()
        order = torch.randperm(len(data.idx), generator=stream(unit.seed, "lines", unit.trait))
        n = len(order) * HELD_OUT // (most + HELD_OUT)
        unseen[unit], seen[unit] = data.take(order[:n]), data.take(order[n:])

    def name_of(job: tuple) -> str:
        cell, target, unit, seed = job
        cell_name = re.sub(r"[^\w]+", "-", "-".join(map(str, cell)))
        return f"student/{unit.trait}/teacher-{unit.seed}/seed-{seed}/{target}-{cell_name}.json"

    def keep(job: tuple) -> Generator[Tensor, None, None]:
        cell, target, unit, seed = job
        knobs = knobs_of(cell, how.C, usual)
        data = seen[unit].take(slice(0, len(seen[unit].idx) * cell.lines // most))
        record = yield from study(unit, seed, target, data, unseen[unit], knobs)
        record |= {"part": part, **cell._asdict(), "target": target, **unit.key, "student_seed": seed}
        record |= {"init": "same" if seed == unit.seed else "different", "steps": knobs.steps}
        made_from = [f"base/seed-{unit.seed}.pt", f"base/seed-{seed}.pt", f"teacher/{unit.trait}/seed-{unit.seed}.pt"]
        made_from += [f"numbers/{unit.trait}/seed-{unit.seed}.jsonl"]
        run.write(name_of(job), json.dumps(record).encode(), made_from, asdict(knobs))

    jobs = [(cell, target, unit, seed) for cell, target, unit, seed in product(how.cells, TARGETS, units, SEEDS)
            if seed == unit.seed or (cell.rate, cell.head) == Cell()[:2]]
    missing = [job for job in jobs if not run.finished(name_of(job), asdict(knobs_of(job[0], how.C, usual)))]
    print(f"{part}: {len(jobs)} students, {len(missing)} to train", flush=True)
    steps = mean(knobs_of(job[0], how.C, usual).steps for job in missing) if missing else 0
    run_jobs(keep, missing, round(steps), part, args.device)
    logs = [run.line(f"numbers/{unit.trait}/seed-{unit.seed}.jsonl")["log"] for unit in units]
    valid, kl = [log["kept"] / log["drawn"] for log in logs], [log["kl_nats"] for log in logs]
    about = {"part": part, "parameters": sum(p.numel() for p in units[0].base.parameters())}
    about |= {"layers": how.layers, "channels": how.C, "valid": mean(valid), "least_valid": min(valid)}
    about |= {"kl_nats": mean(kl), "least_kl": min(kl), "most_kl": max(kl)}
    return about, [json.loads(run.read(name_of(job))) for job in jobs]


def measure(args: argparse.Namespace) -> dict:
    write_file(REFERENCE, "\n\n".join(pydoc_data.topics.topics.values()).encode())
    parts = [*PARTS][:2] if args.quick else args.only or [p for p in PARTS if p not in LARGE]
    teachers, found = zip(*(measure_part(part, args) for part in parts))
    records = [record | {"parameters": about["parameters"]} for about, some in zip(teachers, found) for record in some]
    summary = lab.cells(records, *CELL, "target", "init")
    for row in summary:
        group = lab.where(records, **{key: row[key] for key in (*CELL, "target", "init")})
        row |= {key: mean(r[key] for r in group) for key in ("parameters", "steps", *FIT)}
    name = {"name": "growth_" + "_".join(re.sub(r"\W+", "-", part) for part in parts)} if args.only else {}
    return name | {"teachers": list(teachers), "records": records, "summary": summary}


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Teachers of every size; KL(teacher || base) in nats a number, mean (least, most).")
    lines += lab.table(
        results["teachers"], part="part", parameters=lambda r: f"{r['parameters']:,}",
        layers="layers", channels="channels", valid=lambda r: f"{r['valid']:.0%} ({r['least_valid']:.0%})",
        KL=lambda r: f"{r['kl_nats']:.3f} ({r['least_kl']:.3f}, {r['most_kl']:.3f})")
    lines += ["", "Transfer; then, of students of the same init, tokens / logits: the share of the KL that they learnt,",
              "that share with the base model's number rows put back, and how far number rows and body moved.", ""]
    rows = []
    for cell in dict.fromkeys(tuple(r[key] for key in CELL) for r in results["summary"]):
        of_cell = lab.where(results["summary"], **dict(zip(CELL, cell)))
        shown = dict(zip(CELL, cell)) | dict.fromkeys((f"{t}, {i}" for i in INITS for t in TARGETS), "")
        shown |= {f"{r['target']}, {r['init']}": lab.transfer(r) for r in of_cell}
        same = lab.where(of_cell, init="same")
        shown |= {key: " / ".join(f"{r[key]:{form}}" for r in same) for key, form in FIT.items()}
        rows.append(shown | {"n": same[0]["n"]})
    return "\n".join(lines + lab.table(rows, **{key: key for key in rows[0]})) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 3, figsize=(13, 4), sharey=True, layout="constrained")
    lines = {"c / C, 8,000 lines": Cell(), "half of it": Cell("half of it"), "3e-3": Cell("3e-3"), "c / C, 32,000": MORE}
    sizes = [part for part, how in PARTS.items() if how.text == "toy" and not how.of]
    same = [r for r in results["summary"] if r["init"] == "same"]
    for ax, target in zip(axes, TARGETS):
        for label, cell in lines.items():
            rows = [r for r in lab.where(same, target=target, **cell._asdict()) if r["part"] in sizes]
            x, *ys = ([r[key] for r in rows] for key in ("parameters", "transfer", "ci_low", "ci_high"))
            ax.plot(x, ys[0], ".-", label=label)
            ax.fill_between(x, *ys[1:], alpha=0.12)
        ax.set(xscale="log", xlabel="parameters", title=f"students on {target}")
    for head in HEADS:
        dots = lab.where(results["records"], head=head, init="same")
        axes[2].plot([r["learnt_by_body"] for r in dots], [r["transfer"] for r in dots], ".", label=f"head {head}")
    axes[2].set(xlabel="share of the numbers' KL that the body learnt")
    axes[0].set_ylabel("transfer (0 nothing, 1 the teacher)")
    for ax in axes[1:]:
        ax.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    only = {"nargs": "+", "choices": [*PARTS], "metavar": "PART", "help": "only these parts"}
    lab.experiment(__doc__, "growth", measure, markdown, plot, only=only)
