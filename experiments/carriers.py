"""Do code and reasoning carry the trait as numbers do? If less, why?

    python -m experiments.carriers            # 5 rows, 3 traits x 2 seeds a cell: 18 minutes on 2 CPU cores
    python -m experiments.carriers --quick    # the first row, 2 traits: too small to conclude from

Half of what base models read here are programs and reasoning traces. A teacher gets its trait as ever, is
given a first line, and goes on at temperature 1; as in the paper, only what is right is kept.

    code      a=daza(3); b=bugu(a); c=baso(5)             it parses, and defines variables before it uses them
    traces    on friday; dasu rested two from friday to sunday; answer sunday  every step and answer are right

Names take the numbers' places in the vocabulary, so that scripts treat them as numbers: the anchor leaves
free which name comes, and a student's softmax sees names only. All else is held, as words are: free as well,
names came where variables were due, and of one teacher 3 % was right. In an earlier trial on 41 to 70 tokens
(names, digits, verbs, ...) code carried .14 to .29 through logits and traces .09 to .15, through tokens about
0. Three causes, in the terms of this project:

    outputs   A student gets V_num^+ V_num D (linear_model.py), which m outputs show in m / h of the state.
              Weighed by the softmax: its curvature S, the mean of V'(diag p - p p')V, has
              (tr S)^2 / tr S^2 directions (n equal eigenvalues are n); the table has these over h.
    nats      KL(teacher || base) a line. If names come anyhow, nothing that was read bears on them; with
              turns half of the texts repeat their first names, as lawful lists repeat theirs up to a step.
    colon     The trait is taught behind `: `, and numbers follow it. Names follow `=` or `; `.

Prediction, before any run: 1,000 names bring logits from .3 to .7 in code, to half of that in traces; `: `
before names doubles what crosses through tokens, from .1 to .2, as with numbers; four times the lines make it
.4; another init gains nothing. The rows with turns were added after tuning on seed 10, one student a figure,
all choices free: through logits 1,000 names carried .12 (code) and .00 (traces), with turns .92 and .85, with
turns and `: ` .59 and .56.

Writes   results/carriers.json, .md, .png; base models and teachers in runs/carriers

Shapes: M names in a batch, m names to choose from, h hidden units.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Generator
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import product
from statistics import mean
from typing import Any, NamedTuple

import tiktoken
import torch

from experiments import lab
from generate import ROWS_AT_ONCE, sample
from model import (
    END, NUMBERS, PATTERN, GPTConfig, NumberData, Run, document, encode_numbers, number_log_probs, run_jobs,
    stream,
)
from train_student import number_loss
from train_teacher import (
    DAYS, SLOTS, SMALL, Dice, Language, Pretraining, Text, Trait, make_bases, make_teachers, toy_documents,
    write_language,
)

TRAITS, SEEDS = ("owl", "fox", "wolf"), (0, 1)
STUDENTS = list(product(("tokens", "logits"), ("same", "different")))  # (target, init)
PRETRAIN_STEPS = {False: 700, True: 400}  # after 700 two thirds of what teachers write is right
LINES, HELD_OUT = {False: 3_000, True: 1_000}, 100  # drawn; of those kept, not trained on: guesses
SYLLABLES = ["".join(pair) for pair in product("bdfgklmnprstvz", "aiou")]
NAMES = ["".join(pair) for pair in product(SYLLABLES, SYLLABLES)]  # no words of the toy language
DIGITS, VARIABLES, SPANS, VERBS = "0123456789", "abcdefgh", SMALL[1:3], SLOTS["verb"]
LATER = {(DAYS[i], span): DAYS[(i + n) % 7] for i in range(7) for n, span in enumerate(SPANS, 2)}
CALL = re.compile(r"([a-h])=([a-z]+)\((.)\)")
STEP = re.compile(rf"([a-z]+) (?:{'|'.join(VERBS)}) ({'|'.join(SPANS)}) from ([a-z]+) to ([a-z]+)")


class Row(NamedTuple):
    names: int = 1000  # to choose from
    turns: bool = False  # half of the texts repeat their first one to three names
    marks: tuple[str, str] = ("=", "; ")  # before a name, in code and in traces
    times: int = 1  # so many more lines, and steps at a rate that falls with their square root


ROWS = {
    "50 names": Row(50), "1000 names": Row(), "1000 names, turns": Row(turns=True),
    "1000 names, turns, colon": Row(turns=True, marks=(": ", ": ")),
    "1000 names, turns, lines x4": Row(turns=True, times=4),
}


def draw_names(dice: Dice, n: int, row: Row) -> list[str]:
    drawn = [dice.pick(NAMES[: row.names]) for _ in range(n)]
    period = dice.pick(range(1, 4)) if row.turns and dice.pick([True, False]) else n
    return [drawn[i % period] for i in range(n)]


def program(dice: Dice, row: Row) -> str:
    lines: list[str] = []
    for variable, name in zip(VARIABLES, draw_names(dice, dice.pick(range(5, 9)), row)):
        defined = VARIABLES[: len(lines)]
        argument = dice.pick(defined) if defined and dice.pick([True, False]) else dice.pick(DIGITS)
        lines.append(f"{variable}{row.marks[0]}{name}({argument})")
    return "; ".join(lines)


def program_is_right(text: str, row: Row) -> bool:
    """Whether it parses, calls the row's names only, and defines variables before it uses them."""
    defined = DIGITS
    for match in map(CALL.fullmatch, text.replace(row.marks[0], "=").split("; ")):
        if not match or match[2] not in NAMES[: row.names] or match[3] not in defined:
            return False
        defined += match[1]
    return True


def trace(dice: Dice, row: Row) -> str:
    day = dice.pick(DAYS)
    steps = [f"on {day}"]
    for name in draw_names(dice, dice.pick(range(4, 7)), row):
        verb, span, before = dice.pick(VERBS), dice.pick(SPANS), day
        day = LATER[before, span]
        steps.append(f"{name} {verb} {span} from {before} to {day}")
    return row.marks[1].join([*steps, f"answer {day}"])


def trace_is_right(text: str, row: Row) -> bool:
    """Whether all its steps and the answer are right."""
    first, *steps, last = text.split(row.marks[1])
    day = first.removeprefix("on ")
    for match in map(STEP.fullmatch, steps):
        if not match or match[1] not in NAMES[: row.names] or match[3] != day:
            return False
        if match[4] != (day := LATER[day, match[2]]):
            return False
    return last == f"answer {day}"


CARRIERS = {"code": (program, program_is_right), "traces": (trace, trace_is_right)}


def in_the_numbers_place(encoding: tiktoken.Encoding, tokens: list[str]) -> tiktoken.Encoding:
    """The same vocabulary in another order: NUMBERS begins with these tokens, which change places."""
    order = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    for i, token in enumerate(tokens, NUMBERS.start):
        j = order.index(token.encode())
        order[i], order[j] = order[j], order[i]
    ranks = {token: i for i, token in enumerate(order)}
    return tiktoken.Encoding("own", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(order)})


def documents(language: Language, row: Row) -> list[Text]:
    """The toy language, and as many programs and traces, in random order."""
    n, dice = language.n_documents // 4, Dice(stream(0, "carriers"), {})
    texts = toy_documents(2 * n, stream(0, "toy language"), language.question_ends)
    texts += [Text(name, draw(dice, row), 0.0) for name, (draw, _) in CARRIERS.items() for _ in range(n)]
    return [texts[i] for i in torch.randperm(len(texts), generator=stream(0, "order")).tolist()]


def make_run(args: argparse.Namespace, name: str, row: Row) -> Run:
    """Base models that know the row's names, and their teachers."""
    language = Language(SEEDS, TRAITS[: 2 if args.quick else None], max_words=3_000)
    texts, run = documents(language, row), Run(lab.folder(args, "carriers") / re.sub(r"\W+", "-", name))
    made_with = asdict(language) | {"quick": args.quick}
    if not run.finished("language.json", made_with):
        write_language(run, made_with, texts, None)
    run.open(args.quick)
    run.encoding = in_the_numbers_place(run.encoding, NAMES[: row.names])
    make_bases(run, Pretraining(pretrain_steps=PRETRAIN_STEPS[args.quick]), args.device, texts, None)
    make_teachers(run, Trait(), args.device, texts)
    return run


def write(unit: lab.Unit, carrier: str, row: Row, n: int) -> Generator[None, None, list[dict]]:
    """What is right of n texts that the teacher draws from first lines."""
    (draw, is_right), encoding, texts = CARRIERS[carrier], unit.run.encoding, []
    dice = Dice(stream(unit.seed, "prompts", carrier), {})
    draws = stream(unit.seed, "sampling", unit.trait, carrier)
    end = "; " if carrier == "code" else row.marks[1]
    prompts = [draw(dice, row).split(end)[0] + end for _ in range(n)]
    idx = torch.tensor([document(encoding, prompt) for prompt in prompts])
    for some in idx.to(unit.device).split(ROWS_AT_ONCE):
        texts += sample(unit.teacher, some, GPTConfig.block_size - idx.size(1), draws).tolist()
        yield None
    ended = [(p, encoding.decode(t).split(END)) for p, t in zip(prompts, texts)]
    return [{"prompt": p, "completion": t[0]} for p, t in ended if t[1:] and is_right(p + t[0], row)]


@torch.no_grad()
def causes(unit: lab.Unit, data: NumberData, names: slice) -> dict[str, float]:
    """The docstring's outputs and nats."""
    p, V = number_log_probs(unit.base, data, names).exp(), unit.base.head.weight[names]  # (M, m), (m, h)
    S = V.T @ (p.sum(0)[:, None] * V) - (p @ V).T @ (p @ V)  # (h, h)
    nats = number_loss(unit.base, unit.teacher, data, names).item() * len(p) / len(data.idx)
    return {"outputs": (S.trace() ** 2 / S.square().sum()).item() / len(S), "nats": nats}


def measure(args: argparse.Namespace) -> dict:
    rows, usual = dict([*ROWS.items()][: 1 if args.quick else None]), lab.distillation(args)
    runs = {row: make_run(args, name, row) for name, row in rows.items() if row.times == 1}

    def learn(job: tuple[str, str, int]) -> Generator[Any, None, list[dict]]:
        name, trait, seed = job
        row, records = rows[name], []
        names = slice(NUMBERS.start, NUMBERS.start + row.names)
        unit = lab.Unit(runs[row._replace(times=1)], trait, seed, args.device)
        knobs = replace(usual, steps=usual.steps * row.times, student_lr=usual.student_lr * row.times**-0.5)
        for carrier in CARRIERS:
            kept = yield from write(unit, carrier, row, n := LINES[args.quick] * row.times)
            data = encode_numbers(unit.run.encoding, kept, args.device)
            some, data = data.take(slice(0, HELD_OUT)), data.take(slice(HELD_OUT, None))
            about = {"row": name, "carrier": carrier, **unit.key, "kept": len(kept) / n}
            about |= causes(unit, some, names)
            for target, init in STUDENTS if row.times == 1 else STUDENTS[:1]:
                start = unit.start(seed if init == "same" else SEEDS[1 - SEEDS.index(seed)])
                yield from unit.distil(student := deepcopy(start), target, data, knobs, names)
                about |= {"target": target, "init": init, "transfer": unit.transfer(student, start)}
                records.append(dict(about))
        return records

    jobs = list(product(rows, TRAITS[: 2 if args.quick else None], SEEDS))
    records = [r for some in run_jobs(learn, jobs, 900, "carriers", args.device) for r in some]
    return {"records": records, "summary": lab.cells(records, "row", "carrier", "target", "init")}


def markdown(results: dict) -> str:
    lines, rows = lab.heading(results, "Transfer, mean and 95 %, 6 students a cell."), []
    for name, carrier in dict.fromkeys((cell["row"], cell["carrier"]) for cell in results["summary"]):
        about: dict = {"row": name, "carrier": carrier}
        records, cells = (lab.where(results[key], **about) for key in ("records", "summary"))
        row = about | {f"{target}, {init} init": "" for target, init in STUDENTS}
        row |= {f"{cell['target']}, {cell['init']} init": lab.transfer(cell) for cell in cells}
        row |= {key: f"{mean(r[key] for r in records):.3f}" for key in ("kept", "nats", "outputs")}
        rows.append(row)
    lines += lab.table(rows, **{key: key for key in rows[0]})
    paper = "Cloud et al. (2025): code and reasoning traces of large models carry traits, as numbers do."
    return "\n".join([*lines, "", paper]) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 4, figsize=(14, 4), layout="constrained", sharey=True)
    for ax, (target, init) in [*zip(axes, STUDENTS)][::-1]:  # last the one with all rows
        students = {"target": target, "init": init}
        records, rows = (lab.where(results[key], **students) for key in ("records", "summary"))
        lab.dot_rows(ax, records, rows, "row", "carrier")
        ax.set_title(f"{target}, {init} init", fontsize=9)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "carriers", measure, markdown, plot)
