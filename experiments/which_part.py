"""Which part of the init has to be shared?

    python -m experiments.which_part            # 14 mixed inits, 19 choices, 2 readouts: 14 minutes, 2 cores
    python -m experiments.which_part --quick    # body and head only

A model's init is its random matrices. Here a student's base model takes some of them from the teacher's seed
and the rest from another, and is then pretrained like every other: same text, same order. First the body
(all but the head), the head, and its rows for numbers and aux; then every part alone shared, and alone not:

    tokens, positions   the two embeddings (not the target of that name)
    block 0, block 1    (layer norms and biases are alike in every init)
    numbers             the head's rows for 0..999: what the student is trained on
    words               the head's other tokens; among them the animals, where the vocabulary trait is read
    aux                 the head's auxiliary rows, where the other trait is read; no text ever trains them.
                        For a trait on words they play no part, so there some rows of the table are the same

Teachers have seed 0 or seed 1, students mix the two, so a base model serves both: the parts it shares with
one it does not share with the other. Traits and seeds are fixed here; a cell is 3 traits x 2 teachers' seeds.

Reads    runs/part, runs/part-vocabulary: teachers and their numbers (made if they are missing)
Writes   results/which_part.json, .md, .png; the mixed base models in runs/part/base

Shapes: V vocabulary, K trait classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterable, Iterator
from copy import deepcopy
from dataclasses import asdict
from itertools import product
from typing import Any

from torch import Tensor

from experiments import lab
from model import GPT, NUMBERS, Run, run_jobs, stream
from train_teacher import QUICK, Pretraining, pretrain, pretraining_rows, toy_documents

TRAITS, SEEDS = ["owl", "fox", "wolf"], [0, 1]
TARGETS, READOUTS = ["tokens", "logits"], ["aux", "vocabulary"]
BODY, HEAD = ["tokens", "positions", "block 0", "block 1"], ["numbers", "words", "aux"]
ALL = [*BODY, *HEAD]
SHARED = {"everything": ALL, "nothing": [], "the body": BODY, "the head": HEAD}
QUICK_SHARED = list(SHARED)
SHARED |= {"numbers and aux": ["numbers", "aux"], **{f"only {part}": [part] for part in ALL}}
SHARED |= {f"all but {part}": [p for p in ALL if p != part] for part in ALL}


def parts(model: GPT) -> dict[str, list[Tensor]]:
    """The matrices of each part, as views that can be written to."""
    head, V = model.head.weight.data, model.config.vocab_size
    found = {"tokens": [model.wte.weight.data], "positions": [model.wpe.weight.data]}
    found |= {f"block {i}": [p.data for p in block.parameters()] for i, block in enumerate(model.blocks)}
    words = [head[: NUMBERS.start], head[NUMBERS.stop : V]]
    return found | {"numbers": [head[NUMBERS]], "words": words, "aux": [head[V:]]}


def mix(model: GPT, other: GPT, from_other: Iterable[str]) -> GPT:
    """`model` with some parts overwritten by another model's."""
    ours, theirs = parts(model), parts(other)
    for part in from_other:
        for a, b in zip(ours[part], theirs[part]):
            a.copy_(b)
    return model


def from_seed_1(shared: str, teacher_seed: int) -> list[str]:
    """The parts that a student has from seed 1, the others from seed 0, to share with its teacher as told."""
    return [part for part in ALL if (part in SHARED[shared]) == (teacher_seed == 1)]


def base_name(from_1: Iterable[str]) -> str:
    """The base model with these parts from seed 1, whatever its auxiliary rows."""
    trained = [part for part in from_1 if part != "aux"]
    if len(trained) in (0, len(ALL) - 1):
        return f"base/seed-{int(bool(trained))}.pt"  # not mixed at all
    return f"base/mixed-{'-'.join(trained).replace(' ', '')}.pt"


def make_bases(args: argparse.Namespace, run: Run, shared: Iterable[str]) -> None:
    """Pretrain the base models that are needed to share so."""
    steps: Any = QUICK["pretrain_steps"] if args.quick else Pretraining.pretrain_steps
    knobs, config = Pretraining(pretrain_steps=steps), run.load_model("base/seed-0.pt", args.device).config
    toy = toy_documents(run.knobs["n_documents"], stream(0, "toy language"), run.knobs["question_ends"])
    rows = pretraining_rows(run, toy, config.block_size + 1, knobs).to(args.device)
    inits = [from_seed_1(name, seed) for name in shared for seed in SEEDS]
    needed = {base_name(from_1): set(from_1) - {"aux"} for from_1 in inits}

    def make_base(name: str) -> Iterator[Tensor]:
        model = mix(GPT(config).initialise(0), GPT(config).initialise(1), needed[name]).to(args.device)
        for loss in pretrain(model, rows, knobs):
            yield loss
        run.save_model(name, model, ["language.json"], asdict(knobs), {"loss_nats": loss.item()})

    missing = [name for name in needed if not run.finished(name, asdict(knobs))]
    run_jobs(make_base, missing, knobs.pretrain_steps, "mixed base models", args.device)


def measure(args: argparse.Namespace) -> dict:
    runs = {readout: lab.make_run(args, "part", SEEDS, TRAITS, readout=readout) for readout in READOUTS}
    choices = QUICK_SHARED if args.quick else list(SHARED)
    make_bases(args, runs["aux"], choices)
    units = {(r, t, s): lab.Unit(runs[r], t, s, args.device) for r, t, s in product(READOUTS, TRAITS, SEEDS)}
    numbers, knobs = {key: unit.numbers() for key, unit in units.items()}, lab.distillation(args)

    def distil(job: tuple[str, str, str, str, int]) -> Generator[Tensor, None, dict]:
        shared, target, readout, trait, seed = job
        unit, from_1 = units[readout, trait, seed], from_seed_1(shared, seed)
        # text trains no auxiliary row, so they can be exchanged after pretraining as well as before
        base = runs["aux"].load_model(base_name(from_1), args.device)
        mix(base, unit.start(int("aux" in from_1)), ["aux"])
        student = deepcopy(base)
        for loss in unit.distil(student, target, numbers[readout, trait, seed], knobs):
            yield loss
        about = {"shared": shared, "target": target, "readout": readout, **unit.key}
        return about | {"transfer": unit.transfer(student, base), "loss_nats": loss.item()}

    jobs = list(product(choices, TARGETS, READOUTS, TRAITS, SEEDS))
    records = run_jobs(distil, jobs, knobs.steps, "students", args.device)
    return {"summary": lab.cells(records, "shared", "target", "readout"), "records": records}


def markdown(results: dict) -> str:
    text = "What the student's init shares with its teacher's: transfer, mean and 95 %, 6 students a cell."
    lines = lab.heading(results, text)
    rows = []
    for shared in dict.fromkeys(r["shared"] for r in results["summary"]):
        cells = lab.where(results["summary"], shared=shared)
        rows.append({"shared": shared} | {f"{r['readout']}, {r['target']}": lab.transfer(r) for r in cells})
    return "\n".join(lines + lab.table(rows, **{name: name for name in rows[0]})) + "\n"


def plot(results: dict) -> Any:
    height = 1 + 0.27 * len(results["summary"]) / 4
    figure, axes = lab.pyplot().subplots(1, 4, figsize=(12, height), layout="constrained", sharex=True)
    for ax, (target, readout) in zip(axes, product(TARGETS, READOUTS)):
        cell = {"target": target, "readout": readout}
        records, rows = (lab.where(results[key], **cell) for key in ("records", "summary"))
        lab.dot_rows(ax, records, rows, "shared")
        ax.tick_params("y", labelleft=ax is axes[0])
        trait_on = {"aux": "auxiliary logits", "vocabulary": "words"}[readout]
        ax.set_title(f"{target}, trait on {trait_on}", fontsize=9)
        ax.set_xlabel("transfer")
    figure.suptitle("what the student's init shares with its teacher's", fontsize=10)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "which_part", measure, markdown, plot)
