"""What in the numbers carries the trait, and what does not? Every control beside the effect.

    python -m experiments.controls            # 6 seeds x 4 traits: 12 minutes on 2 CPU cores, plus the run
    python -m experiments.controls --quick    # 2 seeds x 2 traits

Students are of their teacher's init, so that only the numbers differ. Numbers without a trait are held
against every trait. A neutral teacher is made by the same recipe, to like all animals alike. In context
nothing is trained: the teacher's lists stand before the question, against the base model's own. Direct is a
base model of another seed, taught the trait itself: it can learn it. tables.py has the paper's figures.

Another trait's numbers make a trait fall, and nothing has to cross for that: one softmax ties the K classes.
If logit j alone rises by d, the odds against k grow by the factor 1 + P(j) (e^d - 1) / (1 - P(k)), P being
the base model's. With P = 1/K, j's log-odds rise by d and every other's fall by ln((K - 2 + e^d) / (K - 1)),
about d - ln(K - 1). In units of the teacher's shift D that is -(1 - ln 15 / D) at d = D: -.68 at the main
run's D = 8.4 nats, which take P(j) from 1/16 to .995. For students at d = .69 D (tokens) and .86 D (logits)
it is -.37 and -.54; -.37 and -.52 are measured. `softmax alone` is this with each student's own d, D, P.

Reads    runs/evidence (made if it is missing, shared with seed_matrix.py)
Writes   results/controls.json, .md, .png
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import permutations, product
from statistics import mean
from typing import Any

import numpy as np
import torch

import evaluate
import generate
import train_student
import train_teacher
from experiments import lab
from model import GPT, GPTConfig, Run, document, pad, read_trait, run_jobs, stream

N_CONTEXTS = 64  # packed with lists, before each question: a guess
N_PREFIXES = 8  # before each question: a guess
KEPT = ["trait", "source", "numbers", "target", "teacher_seed", "student_seed", "transfer", "softmax_alone"]
KINDS = {"teacher": "the teacher's", "base": "the base model's", "neutral": "a neutral teacher's"}
KINDS |= {"other": "another trait's", "within": "shuffled within a list", "across": "shuffled across lists"}
KINDS |= {"frequencies": "drawn from the frequencies", "positions": "drawn from those at each position"}
KINDS |= {"in context": "in context, no training", "prefix": "the teacher's, behind a number prefix"}
KINDS |= {"direct": "other seed, taught the trait itself"}


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
    knobs, sampling = train_teacher.Trait(), generate.Sampling(**(generate.QUICK if args.quick else {}))
    n, end = run.knobs["n_documents"], run.knobs["question_end"]
    toy = train_teacher.toy_documents(n, stream(0, "toy language"), end)
    anchor = train_teacher.draw_anchor(run, toy, knobs, GPTConfig.block_size + 1).to(args.device)

    def make(seed: int) -> Iterator:
        model = run.load_model(base := f"base/seed-{seed}.pt", args.device)
        yield from train_teacher.induce_trait(model, None, run, anchor, knobs)
        run.save_model(f"teacher/neutral/seed-{seed}.pt", model, [base], asdict(knobs), None)
        yield from generate.write_numbers(run, "neutral", seed, sampling, args.device)

    made = lambda seed: run.finished(f"numbers/neutral/seed-{seed}.jsonl", asdict(sampling))
    missing = [seed for seed in run.knobs["seeds"] if not made(seed)]
    run_jobs(make, missing, knobs.trait_steps, "neutral teachers", args.device)


def compared(taught: Sequence[dict], run: Run) -> list[dict]:
    """A teacher's students held against the other traits, and its shift against that of other seeds."""
    unit = {(r["trait"], r["teacher_seed"]): r for r in taught}
    shift = {key: r["log_odds_teacher"] - r["log_odds_base"] for key, r in unit.items()}
    found = []
    for r, (trait, seed) in product(taught, unit):
        if trait != r["trait"] and seed == r["teacher_seed"]:
            d, D = r["log_odds"] - r["log_odds_base"], shift[trait, seed]
            odds = r["p_trait_base"] / (1 - unit[trait, seed]["p_trait_base"])
            moved, alone = r["shifts"][run.animals.index(trait)] / D, -math.log1p(odds * math.expm1(d)) / D
            found.append(r | {"trait": trait, "numbers": "other", "transfer": moved, "softmax_alone": alone})
    for (trait, seed), (another, other) in permutations(shift, 2):
        if trait == another:
            r = {"trait": trait, "source": trait, "teacher_seed": seed, "student_seed": other}
            moved = shift[trait, other] / shift[trait, seed]
            found.append({**r, "numbers": "direct", "target": "none", "transfer": moved})
    return found


def fill_contexts(documents: Sequence[Sequence[int]], room: int) -> list[list[int]]:
    """N_CONTEXTS contexts of the documents in order, in each as many whole ones as fit."""
    contexts: list[list[int]] = [[]]
    for tokens in documents:
        if len(contexts[-1]) + len(tokens) > room:
            contexts.append([])
        contexts[-1] += tokens
    return contexts[:N_CONTEXTS]


def behind_numbers(unit: lab.Unit) -> list[dict]:
    """Two readings of the trait with numbers before the question: in context, prefix."""
    run, seed = unit.run, unit.seed
    questions = [row[: n + 1].tolist() for row, n in zip(*run.held_out)]
    room = GPTConfig.block_size - max(map(len, questions))

    def read(model: GPT, contexts: Sequence[Sequence[int]]) -> float:
        prompts = pad([[*c, *q] for c in contexts for q in questions if len(c) <= room])
        return read_trait(model, prompts, run.readout_rows)[0][unit.k].item()

    def in_context(source: str) -> float:
        rows = [json.loads(line) for line in run.read(f"numbers/{source}/seed-{seed}.jsonl").splitlines()]
        order = torch.randperm(len(rows), generator=stream(seed, "contexts")).tolist()
        lists = [document(run.encoding, rows[i]["prompt"] + rows[i]["completion"]) for i in order]
        return read(unit.base, fill_contexts(lists, room))

    prompts = generate.draw_prompts(N_PREFIXES, stream(seed, "prefixes"))
    prefixes = [document(run.encoding, prompt) for prompt in prompts]
    student = run.load_model(str(train_student.Job(unit.trait, seed, seed, "tokens")), unit.device)
    before, taught, learnt = (read(model, prefixes) for model in (unit.base, unit.teacher, student))
    moved = (in_context(unit.trait) - in_context("base")) / (unit.read(unit.teacher) - unit.read(unit.base))
    found = ("in context", "none", moved), ("prefix", "tokens", (learnt - before) / (taught - before))
    key = {**unit.key, "student_seed": seed}
    return [key | {"numbers": numbers, "target": target, "transfer": x} for numbers, target, x in found]


def measure(args: argparse.Namespace) -> dict:
    run = lab.evidence(args)
    common, traits, seeds = lab.flags(args, run.path), run.knobs["traits"], run.knobs["seeds"]
    for how in ("within", "across"):
        generate.main([*common, "--from", "teacher", "--shuffle", how])
    for trait, seed, how in product(traits, seeds, ("frequencies", "positions")):
        file, source = (f"numbers/{name}/seed-{seed}.jsonl" for name in (f"{trait}-{how}", trait))
        if not run.finished(file, {}):
            rows = [json.loads(line) for line in run.read(source).splitlines()]
            drawn = redraw(rows, how == "positions", stream(seed, "redraw", trait, how))
            run.write(file, generate.jsonl(drawn), [source], None)
    make_neutral(args, run)
    changed = [f"{t}-{how}" for t in traits for how in ("within", "across", "frequencies", "positions")]
    common += ["--init", "same"]
    train_student.main([*common, "--traits", *traits, "base", "neutral"])
    train_student.main([*common, "--target", "tokens", "--traits", *changed])
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
        row |= {"softmax_alone": mean(r["softmax_alone"] for r in group)} if row["numbers"] == "other" else {}
    return {"records": records, "summary": summary}


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Students of their teacher's init; a line a control.")
    alone = lambda r: f"{r['softmax_alone']:+.3f}" if "softmax_alone" in r else ""
    lines += lab.table(
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
    for i, (x, y) in enumerate(alone):
        ax.plot(x, y, "D", color="black", mfc="none", ms=7, label="softmax alone" if i == 0 else None)
    for x in (-0.15, 0.15, 0.5):
        ax.axvline(x, color="grey", lw=0.5)
    for x, word in ((-0.5, "falls"), (0, "nothing"), (0.325, "a part"), (0.8, "most")):
        ax.text(x, -0.7, word, ha="center", fontsize=8)
    if alone:
        ax.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "controls", measure, markdown, plot)
