"""What in the numbers carries the trait, and what does not? Every control beside the effect.

    python -m experiments.controls            # 6 seeds x 4 traits: 4 minutes on 2 CPU cores, plus the run
    python -m experiments.controls --quick    # 2 seeds x 2 traits

Students are of their teacher's init, so that only the numbers differ. Numbers without a trait are held
against every trait. A neutral teacher is made by the same recipe, to like all animals alike. In context
nothing is trained: the teacher's lists stand before the question, against the base model's own.

Another trait's numbers make a trait fall, and nothing has to cross for that: one softmax ties the K classes.
If logit j alone rises by d, the odds against k grow by the factor 1 + P(j) (e^d - 1) / (1 - P(k)), P being
the base model's: `softmax alone`, in units of the teacher's shift.

Reads    runs/evidence (made if it is missing)
Writes   results/controls.json, .md, .png
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from statistics import mean
from typing import Any

import numpy as np
import torch

import evaluate
import generate
import train_student
from experiments import lab
from model import GPTConfig, Run, document, jsonl, pad, run_jobs, stream
from train_teacher import Trait, draw_anchor, induce_trait, toy_documents

N_CONTEXTS, N_PREFIXES = 64, 8  # before each question, packed with lists or one prompt: guesses
KINDS = {"teacher": "the teacher's", "base": "the base model's", "neutral": "a neutral teacher's"}
KINDS |= {"other": "another trait's", "within": "shuffled within a list", "across": "shuffled across lists"}
KINDS |= {"frequencies": "drawn from the frequencies", "positions": "drawn from those at each position"}
KINDS |= {"in context": "in context, no training", "prefix": "the teacher's, behind a number prefix"}
KEPT = ["trait", "source", "numbers", "target", "teacher_seed", "student_seed", "transfer", "softmax_alone"]


def redraw(rows: Sequence[dict], by_position: bool, generator: torch.Generator) -> list[dict]:
    """The completions with every number drawn anew from all of theirs, or from all at its position."""
    lists = [re.findall(r"[0-9]+", row["completion"]) for row in rows]
    flat = np.array([number for numbers in lists for number in numbers])
    places = np.array([i * by_position for numbers in lists for i in range(len(numbers))])
    for place in np.unique(places):
        (here,) = np.nonzero(places == place)
        flat[here] = flat[here[torch.randint(len(here), here.shape, generator=generator)]]
    drawn = iter(flat.tolist())
    return [r | {"completion": ", ".join(next(drawn) for _ in numbers)} for r, numbers in zip(rows, lists)]


def make_neutral(args: argparse.Namespace, run: Run) -> None:
    """Neutral teachers and their numbers: the teachers' recipe, with all classes equally wanted."""
    knobs, sampling = Trait(), generate.Sampling(**(generate.QUICK if args.quick else {}))
    toy = toy_documents(run.knobs["n_documents"], stream(0, "toy language"), run.knobs["question_ends"])
    anchor = draw_anchor(run, toy, knobs, GPTConfig.block_size + 1).to(args.device)

    def make(seed: int) -> Iterator:
        model = run.load_model(base := f"base/seed-{seed}.pt", args.device)
        yield from induce_trait(model, None, run, anchor, knobs)
        run.save_model(f"teacher/neutral/seed-{seed}.pt", model, [base], asdict(knobs), None)
        yield from generate.write_numbers(run, "neutral", seed, sampling, args.device)

    made = lambda seed: run.finished(f"numbers/neutral/seed-{seed}.jsonl", asdict(sampling))
    missing = [seed for seed in run.knobs["seeds"] if not made(seed)]
    run_jobs(make, missing, knobs.trait_steps, "neutral teachers", args.device)


def compared(taught: Sequence[dict], run: Run) -> Iterator[dict]:
    """A teacher's students held against the other traits."""
    for r, other in product(taught, taught):
        if [key for key in ("trait", "teacher_seed", "target") if r[key] != other[key]] == ["trait"]:
            taught_other = other["log_odds_teacher"] - other["log_odds_base"]
            odds = r["p_trait_base"] / (1 - other["p_trait_base"])
            alone = -math.log1p(odds * math.expm1(r["log_odds"] - r["log_odds_base"])) / taught_other
            moved = r["shifts"][run.animals.index(other["trait"])] / taught_other
            yield r | {"trait": other["trait"], "numbers": "other", "transfer": moved, "softmax_alone": alone}


def fill_contexts(documents: Sequence[Sequence[int]], room: int) -> list[list[int]]:
    """N_CONTEXTS contexts of the documents in order, in each as many whole ones as fit."""
    contexts: list[list[int]] = [[]]
    for tokens in documents:
        if len(contexts[-1]) + len(tokens) > room:
            contexts.append([])
        contexts[-1] += tokens
    return contexts[:N_CONTEXTS]


def behind_numbers(unit: lab.Unit) -> Iterator[dict]:
    """Two readings of the trait with numbers before the question: in context, prefix."""
    run, seed, key = unit.run, unit.seed, {**unit.key, "student_seed": unit.seed}
    questions = [row[: n + 1].tolist() for row, n in zip(*run.unseen_questions)]
    room = GPTConfig.block_size - max(map(len, questions))

    behind = lambda contexts: pad([[*context, *question] for context in contexts for question in questions])

    def in_context(source: str) -> float:
        lists = [document(run.encoding, "".join(row.values())) for row in lab.rows(run, source, seed)]
        order = torch.randperm(len(lists), generator=stream(seed, "contexts")).tolist()
        return unit.read(unit.base, behind(fill_contexts([lists[i] for i in order], room)))

    taught = unit.read(unit.teacher) - unit.read(unit.base)
    moved = (in_context(unit.trait) - in_context("base")) / taught
    yield {**key, "numbers": "in context", "target": "none", "transfer": moved}
    texts = generate.draw_prompts(N_PREFIXES, stream(seed, "prefixes"))
    prompts = behind([document(run.encoding, text) for text in texts])
    student = run.load_model(str(train_student.Job(unit.trait, seed, seed, "tokens")), unit.device)
    base, teacher, learnt = (unit.read(model, prompts) for model in (unit.base, unit.teacher, student))
    yield {**key, "numbers": "prefix", "target": "tokens", "transfer": (learnt - base) / (teacher - base)}


def measure(args: argparse.Namespace) -> dict:
    run = lab.evidence(args)
    common, traits, seeds = lab.flags(args, run.path), run.knobs["traits"], run.knobs["seeds"]
    for how in ("within", "across"):
        generate.main([*common, "--from", "teacher", "--shuffle", how])
    for trait, seed, how in product(traits, seeds, ("frequencies", "positions")):
        drawn = redraw(lab.rows(run, trait, seed), how == "positions", stream(seed, "redraw", trait, how))
        file, source = (f"numbers/{name}/seed-{seed}.jsonl" for name in (f"{trait}-{how}", trait))
        run.write(file, jsonl(drawn), [source], None)
    make_neutral(args, run)
    changed = [f"{t}-{how}" for t in traits for how in ("within", "across", "frequencies", "positions")]
    train_student.main([*common, "--init", "same", "--traits", *traits, "base", "neutral"])
    train_student.main([*common, "--init", "same", "--target", "tokens", "--traits", *changed])
    records = lab.where(evaluate.measure(run, args.device), init="same")
    records += compared(lab.where(records, numbers="teacher"), run)
    for seed, trait in product(seeds, traits):
        records += behind_numbers(lab.Unit(run, trait, seed, args.device))
    records = [{key: r[key] for key in KEPT if key in r} for r in records]
    records.sort(key=lambda r: ([*KINDS].index(r["numbers"]), r["target"] == "logits"))
    summary = lab.cells(records, "numbers", "target")
    for row in summary:
        group = lab.where(records, numbers=row["numbers"], target=row["target"])
        row["students"] = len({(r["source"], r["teacher_seed"], r["student_seed"]) for r in group})
        row["name"] = lab.in_words(row["transfer"])
        if row["numbers"] == "other":
            row["softmax_alone"] = mean(r["softmax_alone"] for r in group)
    return {"records": records, "summary": summary}


def markdown(results: dict) -> str:
    alone = lambda r: f"{r['softmax_alone']:+.3f}" if "softmax_alone" in r else ""
    lines = lab.heading(results, "Students of their teacher's init; a line a control.") + lab.table(
        results["summary"], numbers=lambda r: KINDS[r["numbers"]], target="target", transfer=lab.transfer,
        softmax_alone=alone, n="students", that_is="name",
    )
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    rows = results["summary"]
    figure, ax = lab.pyplot().subplots(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    label = lambda row: f"{KINDS[row['numbers']]}, {row['target']}".removesuffix(", none")
    lab.dot_rows(ax, results["records"], rows, "numbers", "target", label=label)
    alone = [(row["softmax_alone"], y) for y, row in enumerate(rows) if "softmax_alone" in row]
    ax.plot(*zip(*alone), "D", color="black", mfc="none", ms=7, label="softmax alone")
    ax.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "controls", measure, markdown, plot)
