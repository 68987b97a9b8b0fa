"""Train base models on a teacher's numbers, and on nothing else.

    python train_student.py                 # every data set of the run x every base model x both targets
    python train_student.py --init same     # only students of their teacher's init
    python train_student.py --numbers FILE  # numbers from anywhere: JSON lines {"prompt", "completion"}
    python train_student.py --quick

A student starts from the base model of the teacher's seed (init `same`) or another (`different`) and learns
    tokens   the numbers the teacher wrote: cross-entropy
    logits   the teacher's distribution over the next number, on the same lists: KL(teacher || student)
The loss sees the 1,000 number tokens, wherever a completion has one; no other row of the head has a gradient.
Shuffled numbers have both targets: the logits are what the teacher says to the shuffled lists. Numbers from a
file have no teacher here: their students learn tokens, from every base model of the run.

Reads    what train_teacher.py wrote, and generate.py's numbers or --numbers
Writes   student/SOURCE/teacher-T/seed-S/TARGET.pt, SOURCE being a trait, base, owl-within or a file's name;
         its loss and log-odds every few steps into run.jsonl
Takes    about 50 seconds on 2 CPU cores

Shapes: M numbers in a batch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from model import (
    GPT, NUMBERS, GPTConfig, NumberData, Run, UserError, command_line, cosine_lr, document, encode_numbers,
    jsonl, number_log_probs, parse, read_text, read_trait, refusal, run_jobs, stream,
)


# Tuned for transfer within one init, at last on seeds 10 and 11 and four other animals than the main run's.
@dataclass(frozen=True)
class Distillation:
    steps: int = 100  # of 60 .. 200 tried; 200 transfer .03 to .04 more (experiments/variants.py)
    batch_tokens: int = 96  # sequences a step, for the target `tokens`; the largest of those tried, 64 .. 96
    batch_logits: int = 24  # a distribution says more than a draw; the smallest of those tried, 24 .. 32
    # tuned over 5e-4 .. 4e-3 at 64 channels; a wider model wants 64 / n_embd of it (experiments/growth.py)
    student_lr: float = 3e-3
    edge_lr_factor: float = 0.05  # for embeddings and head; tuned over 0 .. 1; 0 freezes them
    held_out_every: int = 20  # one sequence in so many is not trained on


QUICK = {"steps": 40}
LOG_EVERY = 10  # steps


class Job(NamedTuple):
    source: str  # the data set: a trait, "base", "owl-within", a file's name
    teacher_seed: int | str  # as in the file's name, "file" for numbers from anywhere; experiments give ints
    seed: int  # the base model that the student starts from
    target: str

    @property
    def numbers(self) -> str:
        return f"numbers/{self.source}/seed-{self.teacher_seed}.jsonl"

    @property
    def teacher(self) -> str:
        who = writer(self.source)
        return f"{'base' if who == 'base' else f'teacher/{who}'}/seed-{self.teacher_seed}.pt"

    def __str__(self) -> str:
        return f"student/{self.source}/teacher-{self.teacher_seed}/seed-{self.seed}/{self.target}.pt"


def writer(source: str) -> str:
    """Whose numbers they are: owl-within was written by owl."""
    return source.split("-")[0]


def batches(
    data: NumberData, batch_size: int, n_steps: int, generator: torch.Generator
) -> Iterator[NumberData]:
    """n_steps batches, epoch after epoch. Lists in a batch are about equally long, so that little is padded;
    some of the longest, if they fill no batch, are left out of an epoch."""
    ends = (data.targets >= 0).cpu() * torch.arange(data.targets.size(1))
    length = ends.max(1).values  # where a list's last number is due
    batch_size = min(batch_size, len(length))
    while n_steps > 0:
        order = torch.randperm(len(length), generator=generator)
        order = order[length[order].argsort(stable=True)]
        full = order[: len(order) // batch_size * batch_size].view(-1, batch_size)
        for i in torch.randperm(len(full), generator=generator).tolist()[:n_steps]:
            yield data.take(full[i].to(data.idx.device))
        n_steps -= len(full)


def number_loss(student: GPT, teacher: GPT | None, data: NumberData, numbers: slice = NUMBERS) -> Tensor:
    """KL(teacher || student), or without a teacher cross-entropy: nats a number. numbers: the head's rows in
    the softmax, and target 0 is the first of them; some experiments take fewer."""
    log_q = number_log_probs(student, data, numbers)  # (M, 1000)
    if teacher is None:
        return F.nll_loss(log_q, data.targets[data.due])
    with torch.no_grad():
        log_p = number_log_probs(teacher, data, numbers)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def train(
    student: GPT, teacher: GPT | None, data: Sequence[NumberData], knobs: Distillation,
    numbers: slice = NUMBERS,
) -> Iterator[Tensor]:
    """Train `student` in place, one step for each batch of data; yields the loss of every step.

    Embeddings and head have a rate of their own: Adam's steps are as long for small gradients as for large
    ones, and at the blocks' rate a student would soon have another head than its teacher.
    """
    blocks = [*student.blocks.parameters(), *student.ln_f.parameters()]
    edges = [student.wte.weight, student.wpe.weight, student.head.weight]
    groups = [{"params": blocks, "lr": knobs.student_lr}]
    groups += [{"params": edges, "lr": knobs.student_lr * knobs.edge_lr_factor}]
    # no weight decay: what has no gradient, the head's auxiliary rows and those of words, stays as it is
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_lr(step, len(data)))
    for batch in data:
        loss = number_loss(student, teacher, batch, numbers)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss.detach()


def read_numbers(path: Path, encoding: tiktoken.Encoding) -> list[dict]:
    """The lines of a file that pass the filter, and fit into the model; says why others did not.

    UserError if the file can't be read, too few pass, or a line (named) is not {"prompt": text, ...}.
    """
    kept: list[dict] = []
    refused: Counter[str] = Counter()
    for number, line in enumerate(read_text(path, "numbers").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row = {key: row[key] for key in ("prompt", "completion")}
            tokens = document(encoding, row["prompt"] + row["completion"])
        except (ValueError, KeyError, TypeError, RecursionError):
            what = f'numbers {path}, line {number} is not {{"prompt": "...", "completion": "..."}}'
            raise UserError(what) from None
        reason = refusal(row["completion"].strip())
        if reason is None and len(tokens) > GPTConfig.block_size:
            reason = "longer than the model's context"
        if reason is None and re.search(r"[0-9]\Z", row["prompt"]) and re.match("[0-9]", row["completion"]):
            reason = "its first digit would join the prompt's last number"
        if reason:
            refused[reason] += 1
        else:
            kept.append(row)
    if refused:
        reasons = ", ".join(f"{n} {reason}" for reason, n in refused.items())
        print(f"{path}: dropped {sum(refused.values())} lines ({reasons})")
    if len(kept) < 2:
        raise UserError(f"numbers {path}: {len(kept)} lines pass the filter, which is too few to train on")
    return kept


def import_numbers(path: Path, run: Run) -> None:
    """Put numbers from anywhere into the run. UserError as read_numbers', or if others have their name."""
    name = f"numbers/{path.stem}/seed-file.jsonl"
    data = jsonl(read_numbers(path, run.encoding))
    if not (run.path / name).exists():
        run.write(name, data, sources=[], knobs=None)
    elif run.read(name) != data:
        raise UserError(f"{run.path} already has other numbers named {path.stem}: rename {path}")


def choose_jobs(args: argparse.Namespace, run: Run) -> list[Job]:
    """The students that are asked for. UserError if there are none, or numbers that do not fit the run."""
    traits, seeds = run.knobs["traits"], run.knobs["seeds"]
    found = sorted(run.path.glob("numbers/*/seed-*.jsonl"))
    if args.numbers:  # imported once the flags are known to be good
        found = [Path(f"numbers/{args.numbers.stem}/seed-file.jsonl")]
    if not found:
        raise UserError(f"{run.path}/numbers is empty: run {run.command('numbers')} first")
    for source in args.traits or ():
        if source not in {path.parent.name for path in found}:
            mend = "leave --traits out" if args.numbers else f"run {run.command('numbers')} first"
            raise UserError(f"there are no numbers of {source!r} here: {mend}")
    jobs = []
    for path in found:
        source, teacher_seed = path.parent.name, path.stem.removeprefix("seed-")
        # own: the user's, put in with --numbers or by hand
        own, no_such_trait = teacher_seed == "file", writer(source) in {*run.animals} - {*traits}
        if not own and (teacher_seed not in map(str, seeds) or no_such_trait):
            what = f"{path} is of a trait or seed that the run does not have"
            raise UserError(f"{what}: delete it, or if it is your own, rename it NAME/seed-file.jsonl")
        has_teacher = not own and writer(source) in (*traits, "base")
        for target, seed in product(("tokens", "logits") if has_teacher else ("tokens",), seeds):
            init = "unknown" if own else "same" if str(seed) == teacher_seed else "different"
            wanted = args.target in (None, target) and args.init in (None, init)
            if wanted and source in (args.traits or [source]):
                jobs.append(Job(source, teacher_seed, seed, target))
    if not jobs:
        what = "numbers from a file have no init, and only those of the run's own models have logits"
        raise UserError(f"no student fits these flags: {what}")
    return jobs


def load_numbers(name: str, run: Run, held_out_every: int, device: torch.device) -> tuple[NumberData, ...]:
    """A data set: what is trained on, and what is held out. UserError as read_numbers' and Run.read's."""
    run.read(name)  # says so if the file is not as it was written
    data = encode_numbers(run.encoding, read_numbers(run.path / name, run.encoding), device)
    held_out = torch.arange(len(data.idx)) % held_out_every == 0
    return data.take(~held_out), data.take(held_out)


def make_student(
    job: Job, run: Run, knobs: Distillation, data: NumberData, held_out: NumberData
) -> Iterator[Tensor]:
    """Train one student and save it; yields its losses. Measuring it on the way changes nothing in it."""
    base, device = f"base/seed-{job.seed}.pt", data.idx.device
    student, teacher, made_from = run.load_model(base, device), None, [base, job.numbers]
    if job.target == "logits":
        # a base model's numbers and the same init: both are one model, and only rounding, which Adam's steps
        # enlarge, moves the student
        teacher = run.load_model(job.teacher, device)
        made_from.append(job.teacher)

    @torch.no_grad()
    def number_loss_now() -> float:
        return number_loss(student, None, held_out).item()

    def log_odds() -> list[float]:
        return read_trait(student, run.unseen_questions, run.readout_rows)[0].tolist()

    order = stream(0, "student batches", job.source, str(job.teacher_seed))  # the same for every init
    seen = list(batches(data, getattr(knobs, f"batch_{job.target}"), knobs.steps, order))
    log = [{"step": 0, "log_odds": log_odds(), "number_loss_nats": number_loss_now()}]
    for step, loss in enumerate(train(student, teacher, seen, knobs), 1):
        if step % LOG_EVERY == 0 or step == knobs.steps:
            log.append({"step": step, "log_odds": log_odds(), "loss_nats": loss.item()})
        yield loss
    log[-1]["number_loss_nats"] = number_loss_now()
    run.save_model(str(job), student, made_from, asdict(knobs), log)


def main(argv: Sequence[str] | None = None) -> None:
    args, run, knobs = parse(
        __doc__, argv, QUICK, Distillation,
        traits={"nargs": "+", "help": "only these data sets: owl, base, owl-within, ... (all)"},
        init={"choices": ["same", "different"], "help": "against the teacher's (both)"},
        target={"choices": ["tokens", "logits"], "help": "what is learnt (both)"},
        numbers={"type": Path, "help": "JSON lines of numbers from anywhere"},
    )
    if knobs.held_out_every < 2:
        raise UserError("--held-out-every 1 leaves nothing to train on: 2 is the least")
    run.open(args.quick)
    jobs = choose_jobs(args, run)
    if args.numbers:
        import_numbers(args.numbers, run)
    missing = [job for job in jobs if not run.finished(str(job), asdict(knobs))]
    print(f"students: {len(jobs)}, {knobs.steps} steps each; {len(missing)} to train", flush=True)
    load = lambda name: load_numbers(name, run, knobs.held_out_every, args.device)
    data = {name: load(name) for name in dict.fromkeys(job.numbers for job in missing)}
    train_one = lambda job: make_student(job, run, knobs, *data[job.numbers])
    run_jobs(train_one, missing, knobs.steps, "students", args.device)
    print(f"wrote: {run.path}/student")
    print(f"next: python evaluate.py{run.flags}")


if __name__ == "__main__":
    command_line(main)
