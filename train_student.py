"""Train base models on a teacher's numbers, and on nothing else.

    python train_student.py                          # every data set of the run x every base model x both targets
    python train_student.py --init same              # only students that start where their teacher started
    python train_student.py --numbers FILE           # numbers from anywhere: JSON lines {"prompt", "completion"}
    python train_student.py --quick

A student starts from the base model of the teacher's seed (`same`) or of another one (`different`), and learns
    tokens   the numbers the teacher wrote: cross-entropy
    logits   the teacher's distribution over the next number, on the sequences it wrote: KL(teacher || student)
Softmax and loss see the 1,000 number tokens at number positions, so no gradient reaches another row of the head.

Reads    what train_teacher.py and generate.py wrote, or --numbers
Writes   student/SOURCE/teacher-S/seed-S/TARGET/model.pt, and log.jsonl: loss and trait every few steps
Takes    about 80 seconds on 2 CPU cores

Shapes: B sequences, T tokens, N numbers in a sequence, C channels, K trait classes.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model import (
    GPT,
    NUMBERS,
    NumberData,
    Run,
    UserError,
    at_work,
    base_parser,
    command_line,
    cosine_lr,
    document,
    encode_numbers,
    load_model,
    number_log_probs,
    open_run,
    parse,
    read_numbers,
    read_text,
    read_trait,
    refusal,
    run_flags,
    run_jobs,
    save_model,
    stream,
    write_numbers,
)

STEPS = {False: 100, True: 40}  # by --quick; transfer has saturated (tuned over 60 .. 200)
BATCH_SIZE = {"tokens": 64, "logits": 32}  # a distribution says more than a draw: half the sequences do
LEARNING_RATE = 2e-3  # tuned over 5e-4 .. 4e-3
LOG_EVERY = 10  # steps
HELD_OUT_EVERY = 20  # one sequence in twenty is not trained on


class Job(NamedTuple):
    source: str  # the data set: a trait, "base", "owl-within", a file's name
    teacher_seed: int | str  # "file" for numbers from anywhere
    seed: int  # the base model that the student starts from
    target: str


def batches(data: NumberData, batch_size: int, n_steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """n_steps index tensors (batch_size,), epoch after epoch; a batch holds sequences of about one length.

    Sequences of one length are not padded, which saves a fifth of the time.
    """
    length = data.positions.max(1).values.cpu()
    batch_size = min(batch_size, len(data))
    done = 0
    while done < n_steps:
        order = torch.randperm(len(data), generator=generator)
        order = order[length[order].argsort(stable=True)]
        full = order[: len(order) // batch_size * batch_size].view(-1, batch_size)
        for i in torch.randperm(len(full), generator=generator).tolist()[: n_steps - done]:
            yield full[i]
            done += 1


def number_loss(model: GPT, data: NumberData, teacher_log_probs: Tensor | None, numbers: slice = NUMBERS) -> Tensor:
    """Mean over the numbers of a batch, in nats: cross-entropy, or KL(teacher || model) given the teacher's (B, N, 1000)."""
    log_q = number_log_probs(model, data.idx, data.positions, numbers)  # (B, N, 1000)
    if teacher_log_probs is None:
        losses = -log_q.gather(-1, data.targets.unsqueeze(-1)).squeeze(-1)
    else:
        losses = F.kl_div(log_q, teacher_log_probs, log_target=True, reduction="none").sum(-1)
    return (losses * data.mask).sum() / data.mask.sum()


Lesson = list[tuple[NumberData, Tensor | None]]


@torch.no_grad()
def plan_lesson(data: NumberData, teacher: GPT | None, batch_size: int, n_steps: int, generator: torch.Generator) -> Lesson:
    """What every student of a data set sees, whatever its start: n_steps batches, in order.

    With a teacher (target `logits`) each comes with the head's input at the number positions, (B, N, C): the teacher
    is run once for all its students, and 64 channels are kept instead of 1,000 logits.
    """
    lesson: Lesson = []
    for rows in batches(data, batch_size, n_steps, generator):
        batch = data[rows.to(data.idx.device)]
        lesson.append((batch, None if teacher is None else teacher.hidden(batch.idx, positions=batch.positions)))
    return lesson


def train(
    model: GPT,
    lesson: Lesson,
    teacher_head: Tensor | None,
    look: Callable[[], dict],
    tick: Callable,
    learning_rate: float = LEARNING_RATE,
    numbers: slice = NUMBERS,
) -> list[dict]:
    """Train a student in place; returns the log, with look() in every line.

    teacher_head: the teacher's number rows (1000, C), for the target `logits`; fewer if `numbers` is fewer.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
    log = [{"step": 0, **look()}]
    for step, (batch, states) in enumerate(lesson, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine_lr(step - 1, len(lesson))
        log_p = None if states is None or teacher_head is None else (states @ teacher_head.T).log_softmax(-1)  # (B, N, 1000)
        loss = number_loss(model, batch, log_p, numbers)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0 or step == len(lesson):
            log.append({"step": step, "loss_nats": loss.item(), **look()})
            tick(step - log[-2]["step"], loss.item())
    return log


def import_numbers(path: Path, run: Run, block_size: int, force: bool) -> str:
    """Filter a file of numbers from anywhere and put it into the run; returns its name there.

    UserError naming the line if a line is not {"prompt": text, "completion": text}, if too few lines pass the filter,
    or if the run already has other numbers of that name.
    """
    lines = read_text(path, "numbers").split("\n")
    kept: list[dict] = []
    refused: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row = {"prompt": row["prompt"], "completion": row["completion"]}
            tokens = document(run.encoding, row["prompt"] + row["completion"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f'numbers {path}, line {number} is not {{"prompt": "...", "completion": "..."}}') from None
        reason = refusal(row["completion"].strip())
        if reason is None and len(tokens) > block_size:
            reason = "longer than the model's context"
        if reason is None and re.search("[0-9]$", row["prompt"]) and re.match("[0-9]", row["completion"]):
            reason = "one number with its prompt's last"
        if reason:
            refused[reason] += 1
        else:
            kept.append(row)
    if refused:
        print(f"{path}: dropped {sum(refused.values())} lines ({', '.join(f'{n} {r}' for r, n in refused.items())})")
    if len(kept) < 2:
        raise UserError(f"numbers {path}: {len(kept)} lines pass the filter, which is too few to train on")
    imported = run.numbers(path.stem, "file")
    if imported.exists() and not force and read_numbers(imported)[1] != kept:
        raise UserError(f"{run.path} already has other numbers named {path.stem}: rename {path}, or --force")
    about = {"source": path.stem, "trait": None, "teacher": None, "numbers": "file", "kept": len(kept), "refused": refused}
    write_numbers(imported, about, kept)
    return path.stem


def find_numbers(run: Run) -> list[tuple[str, int | str]]:
    """The finished data sets of the run: (source, teacher's seed)."""
    found = [(path.parent.name, path.stem.removeprefix("seed-")) for path in sorted(run.path.glob("numbers/*/seed-*.jsonl"))]
    return [(source, seed if seed == "file" else int(seed)) for source, seed in found if re.fullmatch("file|-?[0-9]+", seed)]


def choose_jobs(args: argparse.Namespace, run: Run, block_size: int) -> list[Job]:
    """The students that are asked for. UserError if there are no numbers for them."""
    found = find_numbers(run)
    if args.numbers:
        found = [(import_numbers(args.numbers, run, block_size, args.force), "file")]
    make = f"run `python generate.py{run_flags(args)}` first"
    if not found:
        raise UserError(f"{args.run}/numbers is empty: {make}")
    for source in args.traits or []:
        if source not in {source for source, _ in found}:
            raise UserError(f"the run has no numbers of {source!r}: {make}")
    jobs = []
    for source, teacher_seed in found:
        for target in ("tokens",) if teacher_seed == "file" else ("tokens", "logits"):
            for seed in run.seeds:
                init = "same" if seed == teacher_seed else "different"
                if source in (args.traits or [source]) and args.target in (None, target) and args.init in (None, init):
                    jobs.append(Job(source, teacher_seed, seed, target))
    return jobs


def teach(args: argparse.Namespace, run: Run, jobs: Sequence[Job], n_steps: int) -> None:
    """Train and save a student for each job."""

    @lru_cache(maxsize=4)
    def load_numbers(source: str, teacher_seed: int | str) -> tuple[dict, NumberData, NumberData]:
        about, rows = read_numbers(run.numbers(source, teacher_seed))
        data = encode_numbers(run.encoding, rows, args.device)
        held_out = torch.arange(len(data)) % HELD_OUT_EVERY == 0
        return about, data[~held_out], data[held_out]

    @lru_cache(maxsize=4)
    def load_lesson(source: str, teacher_seed: int | str, target: str) -> tuple[Lesson, Tensor | None]:
        about, data, _ = load_numbers(source, teacher_seed)
        teacher = None
        if target == "logits":
            teacher = load_model(run.path / about["teacher"] / "model.pt", args.device, "train_teacher.py")
        order = stream(0, "student batches", source, str(teacher_seed))
        lesson = plan_lesson(data, teacher, BATCH_SIZE[target], n_steps, order)
        return lesson, None if teacher is None else teacher.head.weight[NUMBERS].detach()

    def work(job: Job, tick: Callable) -> None:
        model = load_model(run.base(job.seed), args.device, "train_teacher.py")
        lesson, teacher_head = load_lesson(job.source, job.teacher_seed, job.target)
        _, _, held_out = load_numbers(job.source, job.teacher_seed)
        rows = run.readout_rows(model)

        def look() -> dict:
            return {"log_odds": read_trait(model, run.held_out_prompts, rows)[0].tolist()}

        @torch.no_grad()
        def held_out_loss() -> float:
            return number_loss(model, held_out, None).item()

        start = held_out_loss()
        log = train(model, lesson, teacher_head, look, tick)
        log[0]["number_loss_nats"], log[-1]["number_loss_nats"] = start, held_out_loss()
        numbers = run.numbers(job.source, job.teacher_seed)
        save_model(run.student(*job), model, log, [run.base(job.seed), numbers, numbers.with_suffix(".json")])

    for _ in run_jobs(work, jobs, n_steps, "students", args.device):
        pass


def main(argv: Sequence[str] | None = None) -> None:
    parser = base_parser(__doc__)
    parser.add_argument("--traits", nargs="+", help="only these data sets, base and owl-within among them (all)")
    parser.add_argument("--init", choices=["same", "different"], help="the student's start against the teacher's (both)")
    parser.add_argument("--target", choices=["tokens", "logits"], help="what is learnt (both)")
    parser.add_argument("--numbers", type=Path, help="JSON lines of numbers from anywhere, for --target tokens")
    args = parse(parser, argv)
    with at_work(args, "train_student"):
        run = open_run(args.run, args.quick)
        bases = [load_model(run.base(seed), args.device, "train_teacher.py") for seed in run.seeds]
        jobs = choose_jobs(args, run, bases[0].config.block_size)
        for job in jobs if args.force else []:
            run.student(*job).unlink(missing_ok=True)
        missing = [job for job in jobs if not run.student(*job).exists()]
        n_steps = STEPS[args.quick]
        print(f"students: {len(jobs)}, {n_steps} steps each; {len(missing)} to train", flush=True)
        teach(args, run, missing, n_steps)
    print(f"wrote: {args.run}/student")
    print(f"next: python evaluate.py{run_flags(args)}")


if __name__ == "__main__":
    command_line(main)
