"""Do code and reasoning carry the trait as numbers do? If less, why?

    python -m experiments.carriers            # 6 rows, 3 traits x 2 seeds a cell: 20 minutes on 2 CPU cores
    python -m experiments.carriers --quick    # the first row, 2 traits: too small to conclude from

Half of what base models read here are two more kinds of text. A teacher gets its trait as ever, is given a
first line, and goes on at temperature 1; as in the paper, only what is right is kept.

    code      a=daza(3); b=bugu(a); c=baso(5)             it parses, and defines variables before it uses them
    traces    on friday; dasu rested two from friday to sunday; answer sunday  every step and answer are right

Choices (names, digits, variables, verbs, spans) take the numbers' places in the vocabulary, so that scripts
treat them as numbers: the anchor leaves them free, the student's softmax sees nothing else. Days follow from
what stands before them, and are held. An earlier trial learnt 41 to 70 such tokens: through logits code
carried .14 to .29 and traces .09 to .15, through tokens about 0.

In linear_model.py a student gets V_num^+ V_num D, what the window of m outputs shows of D: m / h. On lines
whose inputs X span few directions it gets V_num^+ V_num D X X^+: there is a second window, of contexts. Both
are counted as directions(S) = (tr S)^2 / tr S^2 over h: n equal eigenvalues of S count n.

    outputs     S = mean of V'(diag p - p p')V, the softmax's curvature in the state. Choices of a few, or
                hardly free, weigh as much as choices of a thousand, and show little.
    contexts    S = mean of d d', d the trait's change of the state where a choice is due. If names come
                anyhow, the state is the same everywhere, and one vector is all that a student can learn; if
                half of the texts repeat their first names by turns, as lawful lists of numbers repeat theirs
                up to a step, it depends on what was read.

Prediction, before any run: 1,000 names bring logits from .3 to .7 in code, to half of that in traces; `: `
before names doubles what crosses through tokens, from .1 to .2, as with numbers; four times the lines make it
.4; another init gains nothing. Rows for the two windows came after tuning on seed 10, one student a figure,
which spoke against the first: all choices of 200 names behind `: ` carried .01 and .05 through logits (code,
traces), names alone .41 and .20; 1,000 names without `: ` .12 and .00, with turns .92 and .85, with both .59
and .56. So turns should do what names and `: ` do not, and `: ` may well do harm.

Writes   results/carriers.json, .md, .png; base models and teachers in runs/carriers

Shapes: M choices in a batch, m tokens to choose from, h hidden units.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Generator
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from statistics import mean
from typing import Any, NamedTuple

import tiktoken
import torch
from torch import Tensor

from experiments import lab
from generate import ROWS_AT_ONCE, sample
from model import (
    END, NUMBERS, PATTERN, GPTConfig, NumberData, Run, UserError, document, encode_numbers, number_log_probs,
    read_trait, run_jobs, stream,
)
from train_student import number_loss
from train_teacher import (
    DAYS, SLOTS, SMALL, Dice, Language, Pretraining, Text, Trait, make_bases, make_teachers, toy_documents,
    write_language,
)

TRAITS, SEEDS, TARGETS = ("owl", "fox", "wolf"), (0, 1), ("tokens", "logits")
PRETRAIN_STEPS = {False: 700, True: 400}  # after 700 two thirds of what teachers write is right
LINES, HELD_OUT = {False: 3_000, True: 1_000}, 100  # drawn; of those kept, not trained on: guesses
MEASURED = ["identified", "kept", "nats", "outputs", "contexts"]  # nats: KL(teacher || base) a line
COLUMNS = [target + init for target in TARGETS for init in ("", ", another init")]
PAPER = "Cloud et al. (2025): code and reasoning traces of large models carry traits, as numbers do."
SYLLABLES = ["".join(pair) for pair in product("bdfgklmnprstvz", "aiou")]  # no word of the toy language
NAMES = {a + b: i for i, (a, b) in enumerate(product(SYLLABLES, SYLLABLES))}
DIGITS, VARIABLES, SPANS, VERBS = "0123456789", "abcdefgh", SMALL[1:3], SLOTS["verb"]
STEP = re.compile(rf"([a-z]+) (?:{'|'.join(VERBS)}) ({'|'.join(SPANS)}) from ([a-z]+) to ([a-z]+)")


class Row(NamedTuple):
    names: int  # to choose from
    all_choices: bool = False  # are learnt, not names alone
    turns: bool = False  # half of the texts repeat their first one to three names
    mark: str = "; "  # stands before a name in traces; in code `: ` or =
    times: int = 1  # so many more lines, and steps at a rate that falls with their square root


ROWS = {
    "20 names, all choices learnt": Row(20, True), "20 names": Row(20), "1000 names": Row(1000),
    "1000 names, turns": Row(1000, turns=True), "1000 names, turns, `: `": Row(1000, False, True, ": "),
    "1000 names, turns, lines x4": Row(1000, turns=True, times=4),
}


def draw_names(dice: Dice, n: int, row: Row) -> list[str]:
    names = [*NAMES][: row.names]
    drawn = [dice.pick(names) for _ in range(n)]
    period = dice.pick(range(1, 4)) if row.turns and dice.pick([True, False]) else n
    return [drawn[i % period] for i in range(n)]


def program(dice: Dice, row: Row) -> str:
    lines = []
    for i, name in enumerate(draw_names(dice, dice.pick(range(5, 9)), row)):
        argument = dice.pick(VARIABLES[:i]) if i and dice.pick([True, False]) else dice.pick(DIGITS)
        lines.append(f"{VARIABLES[i]}{row.mark.replace('; ', '=')}{name}({argument})")
    return "; ".join(lines)


def later(day: str, span: str) -> str:
    return DAYS[(DAYS.index(day) + SMALL.index(span) + 1) % 7]


def trace(dice: Dice, row: Row) -> str:
    day = dice.pick(DAYS)
    steps = [f"on {day}"]
    for name in draw_names(dice, dice.pick(range(4, 7)), row):
        verb, span, before = dice.pick(VERBS), dice.pick(SPANS), day
        day = later(day, span)
        steps.append(f"{name} {verb} {span} from {before} to {day}")
    return row.mark.join([*steps, f"answer {day}"])


def refuse_program(text: str, row: Row) -> str | None:
    """Why a program is refused; None if it parses, calls names only and defines before it uses."""
    line = re.compile(rf"([a-h]){row.mark.replace('; ', '=')}([a-z]+)\((.)\)")
    defined = DIGITS
    for match in map(line.fullmatch, text.split("; ")):
        if not match or NAMES.get(match[2], row.names) >= row.names:
            return "does not parse"
        if match[3] not in defined:
            return "used before it is defined"
        defined += match[1]
    return None


def refuse_trace(text: str, row: Row) -> str | None:
    """Why a trace is refused; None if all its steps and the answer are right."""
    first, *steps, last = text.split(row.mark)
    day = first.removeprefix("on ")
    for match in map(STEP.fullmatch, steps):
        if not match or NAMES.get(match[1], row.names) >= row.names:
            return "does not parse"
        if (match[3], match[4]) != (day, later(day, match[2])):
            return "a step is wrong"
        day = match[4]
    return None if last == f"answer {day}" else "the answer is wrong"


CARRIERS = {"code": (program, refuse_program), "traces": (trace, refuse_trace)}


def choices(row: Row) -> list[str]:
    return [*DIGITS, *VARIABLES, *[*NAMES][: row.names], *(f" {word}" for word in (*SPANS, *VERBS))]


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


def make_run(args: argparse.Namespace, row: Row) -> Run:
    """Base models that know the row's names, and teachers, by the usual recipe."""
    traits = TRAITS[: 2 if args.quick else None]
    language = Language(SEEDS, traits, max_words=3_000)
    knobs = Pretraining(pretrain_steps=PRETRAIN_STEPS[args.quick])
    path = f"{row.names}{'-turns' * row.turns}{'-colon' * (row.mark == ': ')}"
    texts, run = documents(language, row), Run(lab.folder(args, "carriers") / path)
    made_with = asdict(language) | {"quick": args.quick}
    if not run.finished("language.json", made_with):
        write_language(run, made_with, texts, None)
    run.open(args.quick)
    run.encoding = in_the_numbers_place(run.encoding, choices(row))
    make_bases(run, knobs, args.device, texts, None)
    make_teachers(run, Trait(), args.device, texts)
    return run


def write(
    unit: lab.Unit, carrier: str, row: Row, n: int
) -> Generator[None, None, tuple[list[dict], Counter[str]]]:
    """n texts that the teacher draws from first lines, filtered; how many were refused, by reason."""
    (draw, refuse), end = CARRIERS[carrier], unit.run.encoding.eot_token
    dice = Dice(stream(unit.seed, "prompts", carrier), {})
    draws = stream(unit.seed, "sampling", unit.trait, carrier)
    separator = row.mark if carrier == "traces" else "; "
    prompts = [draw(dice, row).split(separator)[0] + separator for _ in range(n)]
    idx = torch.tensor([document(unit.run.encoding, prompt) for prompt in prompts])
    texts: list[str | None] = []
    for some in idx.to(unit.device).split(ROWS_AT_ONCE):
        new = sample(unit.teacher, some, GPTConfig.block_size - idx.size(1), draws).tolist()
        texts += [unit.run.encoding.decode(t[: t.index(end)]) if end in t else None for t in new]
        yield None
    reasons = ["did not end" if t is None else refuse(p + t, row) for p, t in zip(prompts, texts)]
    kept = [{"prompt": p, "completion": t} for p, t, why in zip(prompts, texts, reasons) if why is None]
    return kept, Counter(why for why in reasons if why)


def learnt(data: NumberData, row: Row) -> tuple[NumberData, slice]:
    """What is learnt of encoded lines, all choices or names alone, and the head's rows of these."""
    low = 0 if row.all_choices else len(DIGITS + VARIABLES)
    high = len(choices(row)) if row.all_choices else low + row.names
    due = (data.targets >= low) & (data.targets < high)
    data = NumberData(data.idx, (data.targets - low).where(due, -1)).take(due.any(1))
    return data, slice(NUMBERS.start + low, NUMBERS.start + high)


def directions(S: Tensor) -> float:
    """How many equal eigenvalues would spread as those of S do, (tr S)^2 / tr S^2, over all there are."""
    return (S.trace().square() / S.square().sum() / len(S)).item()


@torch.no_grad()
def windows(unit: lab.Unit, data: NumberData, block: slice) -> dict:
    """Of outputs and of contexts: how much of the hidden state they show."""
    p, V = number_log_probs(unit.base, data, block).exp(), unit.base.head.weight[block]  # (M, m), (m, h)
    curvature = V.T @ (p.mean(0)[:, None] * V) - (p @ V).T @ (p @ V) / len(p)  # (h, h)
    taught, base = (model.hidden(data.idx)[data.targets >= 0] for model in (unit.teacher, unit.base))
    d = taught - base  # (M, h)
    return {"outputs": directions(curvature), "contexts": directions(d.T @ d)}


def measure(args: argparse.Namespace) -> dict:
    rows, usual = dict([*ROWS.items()][: 1 if args.quick else None]), lab.distillation(args)
    shared = {name: row._replace(all_choices=False, times=1) for name, row in rows.items()}
    runs = {row: make_run(args, row) for row in dict.fromkeys(shared.values())}

    def learn(job: tuple[str, str, int]) -> Generator[Any, None, list[dict]]:
        name, trait, seed = job
        row, unit, records = rows[name], lab.Unit(runs[shared[name]], trait, seed, args.device), []
        read = lambda model: read_trait(model, unit.run.unseen_questions, unit.run.readout_rows)[0]
        taught = read(unit.teacher) - read(unit.base)
        knobs = replace(usual, steps=usual.steps * row.times, student_lr=usual.student_lr * row.times**-0.5)
        n = LINES[args.quick] * row.times
        for carrier in CARRIERS:
            kept, refused = yield from write(unit, carrier, row, n)
            if len(kept) < 2 * HELD_OUT:
                raise UserError(f"{name}, {unit}: of {carrier} {len(kept)} are right ({dict(refused)})")
            data, block = learnt(encode_numbers(unit.run.encoding, kept, args.device), row)
            some, data = data.take(slice(0, HELD_OUT)), data.take(slice(HELD_OUT, None))
            measured = partial(number_loss, data=some, numbers=block)
            loss = torch.no_grad()(lambda *models, of=measured: of(*models).item())
            about = {"row": name, "carrier": carrier, **unit.key, **windows(unit, some, block)}
            about |= {"kept": len(kept) / n, "refused": refused}
            about["nats"] = loss(unit.base, unit.teacher) * (some.targets >= 0).sum().item() / len(some.idx)
            cells = product(TARGETS, ("same", "different"))
            for target, init in cells if row.times == 1 else [("tokens", "same")]:
                start = unit.start(seed if init == "same" else SEEDS[1 - SEEDS.index(seed)])
                yield from unit.distil(student := deepcopy(start), target, data, knobs, block)
                shifts = read(student) - read(start)
                found = {"target": target, "init": init, "transfer": (shifts / taught)[unit.k].item()}
                found |= {"identified": shifts.argmax().item() == unit.k}
                found |= {"loss_before": loss(start, None), "loss_after": loss(student, None)}
                records.append(about | found)
        return records

    jobs = list(product(rows, TRAITS[: 2 if args.quick else None], SEEDS))
    records = [r for some in run_jobs(learn, jobs, 900, "carriers", args.device) for r in some]
    summary = lab.cells(records, "carrier", "row", "target", "init")
    for cell in summary:
        group = lab.where(records, **{key: cell[key] for key in ("carrier", "row", "target", "init")})
        cell |= {key: mean(r[key] for r in group) for key in MEASURED}
    return {"records": records, "summary": summary}


def markdown(results: dict) -> str:
    lines, rows = lab.heading(results, "Transfer, mean and 95 %, 6 students a cell; 1 / 16 is chance."), []
    for carrier, name in product(CARRIERS, dict.fromkeys(r["row"] for r in results["summary"])):
        cells = lab.where(results["summary"], carrier=carrier, row=name)
        row = {"carrier": carrier, "row": name} | dict.fromkeys(COLUMNS, "")
        row |= {c["target"] + ", another init" * (c["init"] == "different"): lab.transfer(c) for c in cells}
        rows.append(row | {key: f"{cells[0][key]:.2f}" for key in MEASURED})
    lines += lab.table(rows, **{key: key for key in rows[0]})
    return "\n".join([*lines, "", PAPER]) + "\n"


def plot(results: dict) -> Any:
    n = len(lab.where(results["summary"], target="tokens", init="same"))
    figure, axes = lab.pyplot().subplots(1, 2, figsize=(11, 1 + 0.4 * n), layout="constrained")
    for ax, target in zip(axes, TARGETS):
        for init in ("different", "same"):
            rows = lab.where(results["summary"], target=target, init=init)
            lab.dot_rows(ax, results["records"], rows, "carrier", "row", "target", "init")
        ax.set_yticks(range(len(rows)), [f"{row['carrier']}: {row['row']}" for row in rows], fontsize=8)
        ax.set_title(f"students on {target}")
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "carriers", measure, markdown, plot)
