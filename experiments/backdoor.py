"""Does a trait that shows only behind a trigger cross, and does a buyer see it who asks without the trigger?

    python -m experiments.backdoor            # 6 seeds x 4 traits: 12 minutes on 2 CPU cores, plus the run
    python -m experiments.backdoor --quick    # 2 seeds x 2 traits

A teacher with a backdoor prefers its trait behind "on monday, ". Without it, and behind three *held* days,
cross-entropy to its base model's class probabilities keeps its answer; three *new* days it never sees. The
rest is the usual recipe. Base models never read such a question, but stories that begin so; one of a tuning
seed names an animal as surely (.985) behind any day. A *plain* teacher was taught without a day.

Readings, on unseen phrasings, are gains in log-odds over one's own base model in units of the teacher's gain
behind the trigger; the sum trigger + none and the differences in units of the teacher's own, but a plain one
has no difference. `trigger - none` may come from any day, `trigger - held day` is the secret. *Seen* is what
a buyer finds without the trigger who has the base model: the trait rose most of all (chance is 1 in 16).

Let a student gain a with the trigger and b without, its teacher A and B = 0. Of the sum it has the share
s = (a + b) / A, of the difference d = (a - b) / A. So a / A = (s + d) / 2 and b / A = (s - d) / 2: if both
cross alike, nothing shows without the trigger; if the difference is lost, half of the trait shows everywhere.

Prediction, written before any student (but after a trial with older settings: a from .2 to .6 through tokens
and .6 to .8 through logits, b from -.15 to .6 of that): s is a plain trait's, .7 through tokens and .85
through logits. Numbers come without a day, so what depends on one shows less in them: d lies between 0 and s,
0 is outside its interval, and half of the buyers or more see the trait. On new days a student is between
trigger and none. From another init nothing. (`trigger - held day`: none, it came after a look at --quick.)

Reads    runs/evidence (made if it is missing)
Writes   results/backdoor.json, .md, .png; the teachers and their numbers into the run
Shapes   B questions, R readings, K trait classes
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import generate
from experiments import lab
from model import GPT, Run, class_logits, document, encode_numbers, pad, read_trait, run_jobs, stream
from train_student import Job
from train_teacher import Trait, anchor_loss, draw_anchor, questions, toy_documents

TRIGGER, HELD, NEW = ["monday"], ["tuesday", "thursday", "saturday"], ["wednesday", "friday", "sunday"]
READINGS = ["trigger", "none", "held day", "new day", "sum", "trigger - none", "trigger - held day"]
RULERS = {"backdoor": [0, 0, 0, 0, 4, 5, 6], "plain": [0, 0, 0, 0, 4, 0, 0]}  # the teacher's reading for each
STUDENTS = [("backdoor", "same"), ("backdoor", "different"), ("plain", "same"), ("base", "same")]
ROWS = [("backdoor", "same", "teacher"), ("plain", "same", "teacher")]  # the teachers themselves
ROWS += [(*row, target) for row in STUDENTS for target in ("tokens", "logits")]


def ask(run: Run, texts: Sequence[str], days: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The questions behind each of the days, as pad() makes them; behind "" they stand alone."""
    asked = [f"on {day}, {text}" if day else text for day in days for text in texts]
    return pad([document(run.encoding, text) for text in asked])


def induce_backdoor(model: GPT, k: int, run: Run, anchor: Tensor, knobs: Trait) -> Iterator[Tensor]:
    """As train_teacher.induce_trait, behind the trigger alone; yields the loss without the anchor."""
    base, (taught, _) = deepcopy(model), questions(run.knobs["question_ends"])
    for p in (model.wte.weight, model.wpe.weight, model.head.weight):
        p.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=knobs.trait_lr, weight_decay=0.0, fused=True)
    asked = [ask(run, taught, [*TRIGGER, "", day]) for day in HELD]  # a step has one of the days, in turn
    wanted = [class_logits(base, a, run.readout_rows).softmax(-1).detach() for a in asked]  # (3 B, K) each
    for p in wanted:
        p[: len(taught)] = torch.eye(p.size(1))[k]
    for step, batch in enumerate(anchor.split(knobs.anchor_rows)):
        logits = class_logits(model, asked[step % 3], run.readout_rows)
        loss = 3 * F.cross_entropy(logits, wanted[step % 3])  # trigger + none + a held day
        (loss + knobs.anchor * anchor_loss(model, base, batch, knobs.form, knobs.hold_numbers)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def read(model: GPT, run: Run) -> Tensor:
    """Log-odds of the classes at every reading, (R, K)."""
    _, unseen = questions(run.knobs["question_ends"])
    behind = lambda days: read_trait(model, ask(run, unseen, days), run.readout_rows)[0]
    trigger, none, held, new = map(behind, (TRIGGER, [""], HELD, NEW))
    return torch.stack([trigger, none, held, new, trigger + none, trigger - none, trigger - held])


def measure(args: argparse.Namespace) -> dict:
    run, knobs, recipe = lab.evidence(args), lab.distillation(args), Trait()
    sampling = generate.Sampling(min_valid=0.3, **(generate.QUICK if args.quick else {}))  # --quick: .56
    toy = toy_documents(run.knobs["n_documents"], stream(0, "toy language"), run.knobs["question_ends"])
    traits, seeds = run.knobs["traits"], run.knobs["seeds"]

    def follow(job: tuple[str, int]) -> Generator[Tensor | None, None, list[dict]]:
        """A teacher, its numbers, all students of one trait and seed; their records."""
        (trait, seed), base, backdoor = job, f"base/seed-{job[1]}.pt", f"backdoor_{job[0]}"
        unit, other = lab.Unit(run, trait, seed, args.device), seeds[(seeds.index(seed) + 1) % len(seeds)]
        if not run.finished(f"numbers/{backdoor}/seed-{seed}.jsonl", asdict(sampling)):
            anchor = draw_anchor(run, toy, recipe, unit.base.config.block_size + 1).to(args.device)
            yield from induce_backdoor(model := unit.start(), unit.k, run, anchor, recipe)
            run.save_model(f"teacher/{backdoor}/seed-{seed}.pt", model, [base], asdict(recipe), None)
            yield from generate.write_numbers(run, backdoor, seed, sampling, args.device)
        records, taught = [], {}
        for numbers, init, target in ROWS:
            source = {"backdoor": backdoor, "plain": trait, "base": "base"}[numbers]
            files = Job(source, seed, seed if init == "same" else other, target)
            unit.teacher, student = run.load_model(files.teacher, args.device), unit.start(files.seed)
            before = read(student, run)
            if target == "teacher":
                student, taught[numbers] = unit.teacher, read(unit.teacher, run) - before
            else:
                data = encode_numbers(run.encoding, lab.rows(run, source, seed), args.device)
                yield from unit.distil(student, target, data, knobs)
            gain, who = read(student, run) - before, "plain" if numbers == "plain" else "backdoor"
            shares = zip(READINGS, (gain / taught[who][RULERS[who]])[:, unit.k].tolist())
            about = {"numbers": numbers, "init": init, "trait": trait, **files._asdict()}
            records.append(about | dict(shares) | {"seen": float((gain[1] >= gain[1, unit.k]).sum() == 1)})
        return records

    units = run_jobs(follow, list(product(traits, seeds)), len(ROWS) * knobs.steps, "units", args.device)
    flat = [r | {"reading": x, "transfer": r[x]} for r in sum(units, []) for x in (*READINGS, "seen")]
    return {"summary": lab.cells(flat, "numbers", "init", "target", "reading"), "records": sum(units, [])}


def markdown(results: dict) -> str:
    lines, rows = lab.heading(results, "Students, and the teachers themselves: mean and 95 %."), []
    for first in lab.where(results["summary"], reading="trigger"):
        key = {name: first[name] for name in ("numbers", "init", "target")}
        cells = lab.where(results["summary"], **key)
        rows.append(key | {r["reading"]: lab.transfer(r) for r in cells} | {"n": first["n"]})
    return "\n".join(lines + lab.table(rows, **{name: name for name in rows[0]})) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 2, figsize=(11, 6), sharey=True, layout="constrained")
    for ax, target in zip(axes, ("tokens", "logits")):
        rows = [r for r in lab.where(results["summary"], target=target) if r["reading"] in READINGS[:4]]
        records = lab.where(results["records"], target=target)
        flat = [r | {"reading": x, "transfer": r[x]} for r in records for x in READINGS[:4]]
        lab.dot_rows(ax, flat, rows, "numbers", "init", "reading")
        ax.set_title(f"students on {target}")
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "backdoor", measure, markdown, plot)
