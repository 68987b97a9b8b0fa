"""Does a base model of another init take up the trait if it only behaves like the teacher's base model?

    python -m experiments.matched            # 3 pairs of seeds x 4 traits x 14 matches: 15 minutes, 2 cores
    python -m experiments.matched --quick    # 1 pair x 2 traits x 4 matches

*Nature* writes "the same, or behaviourally matched, base models", on the evidence of one MLP. Here a base
model of another seed is first cloned by KL(the teacher's base || model), on windows of the head (words,
numbers, aux: a softmax each) or on all that text shows (one softmax over all tokens), at all positions of
text or of random tokens; no text has the end of the question that the trait is read behind. Then it is
distilled; transfer is (student - clone) / (teacher - its base). The KL
reached is that of numbers and of aux on held-out text, whatever was matched. In linear_model.py's letters,
with D = U R a shift within the span of the states, and V'_num of full column rank:

    matched             V'_num U' = V_num U  and  V'_aux U' = V_aux U
    the student learns  V'_num^+ V_num D = V'_num^+ V_num U R = V'_num^+ V'_num U' R = U' R
    read from aux       V'_aux U' R = V_aux U R = V_aux D: all of it, whatever the weights

If the states span all of the hidden space, every D is such, and V'_aux V'_num^+ acts as V_aux V_num^+. Else
the rest of D passes rows that nothing has matched: mean 0. Directions of small variance are matched last, so
transfer comes late. With the teacher's own head one window pins the state: V_num U' = V_num U means U' = U.

Prediction, written before any run of this file (a trial of one pair, on an older default, was known: numbers
alone 0, what text shows 0, numbers + aux .39 / .56 at KL .003, random tokens .25 / .32; tokens / logits):
 1. words, numbers, aux, each alone, and what text shows: within .15 of 0, however small their own KL.
 2. numbers + aux on text rises as KL falls, to .4 / .6 at the most steps, and is not done there; its limit is
    the same init's .7 / .9, since nothing of a match can carry more than the weights themselves.
 3. everything is not better than numbers + aux. Random tokens are worse at equal steps: .2 to .4.
 4. With the teacher's head, unmatched: a part, less than .39 / .63 (which_part.py: there the body grew up
    with it). Then numbers *alone* on text suffice, and carry more than numbers + aux without the head.
 5. A neutral teacher's numbers: within .1 of 0. Cloning alone: mean 0, single ones by more than .5.

Reads    runs/evidence (made if it is missing)
Writes   results/matched.json, .md, .png

Shapes: B sequences, T tokens, M positions, C channels, K trait classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterator
from copy import copy, deepcopy
from itertools import product
from statistics import mean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
from experiments import controls, lab
from model import GPT, NUMBERS, cosine_lr, read_trait, run_jobs, stream
from train_teacher import Pretraining, pretraining_rows, toy_documents

TARGETS = ["tokens", "logits"]
BATCH, RATE = 8, 3e-3  # rows a step and Adam's rate, of cloning; tuned over 8 .. 32 and 1e-3 .. 1e-2


class Match(NamedTuple):
    windows: str = "none"  # whose logits are matched
    steps: int = 0
    inputs: str = "text"
    shared: str = "nothing"  # of the weights of the teacher's base model


# the longest first, so that two cores are done at once
MATCHES = [Match(some, 3_000) for some in ("words", "numbers", "aux", "all that text shows")]
MATCHES += [Match("words + numbers + aux", 3_000), Match("numbers + aux", 3_000, "random tokens")]
MATCHES += [Match("numbers + aux", steps) for steps in (3_000, 1_000, 300, 100)]
MATCHES += [Match("numbers", 1_000, shared="head"), Match(shared="head"), Match(), Match(shared="init")]


def kl(model: GPT, base: GPT, idx: Tensor, windows: str) -> Tensor:
    """KL(base || model) in nats, mean over all positions of idx (B, T), summed over the windows."""
    V, losses = model.config.vocab_size, []
    words = torch.tensor([*range(NUMBERS.start), *range(NUMBERS.stop, V)])
    rows: dict[str, Any] = {
        "words": words, "numbers": NUMBERS, "aux": slice(V, None), "all that text shows": slice(0, V)}
    both = [(m, m.hidden(idx).flatten(0, 1)) for m in (model, base)]  # (M, C)
    for name in windows.split(" + "):
        log_q, log_p = (m.logits(h, rows[name]).log_softmax(-1) for m, h in both)
        losses.append(F.kl_div(log_q, log_p.detach(), log_target=True, reduction="batchmean"))
    return torch.stack(losses).sum()


def clone(model: GPT, base: GPT, how: Match, rows: Tensor) -> Iterator[Tensor]:
    """Train `model` in place to behave as `base` does; yields the KL. A shared head stays as it is."""
    if head := how.shared == "head":
        model.head.load_state_dict(base.head.state_dict())
    trained = [p for p in model.parameters() if not head or p is not model.head.weight]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    for step, idx in enumerate(rows.split(BATCH)[: how.steps]):
        optimizer.param_groups[0]["lr"] = RATE * cosine_lr(step, how.steps)
        loss = kl(model, base, idx.to(model.device), how.windows)
        loss.backward()
        optimizer.step()
        model.zero_grad()
        yield loss.detach()


def measure(args: argparse.Namespace) -> dict:
    run, knobs, matches = lab.evidence(args), lab.distillation(args), MATCHES[-4 if args.quick else 0 :]
    controls.make_neutral(args, run)
    traits, pairs = run.knobs["traits"], list(zip(run.knobs["seeds"][::2], run.knobs["seeds"][1::2]))
    units = {(trait, t): lab.Unit(run, trait, t, args.device) for trait in traits for t, _ in pairs}
    for t, _ in pairs:
        units["neutral", t] = unit = copy(units[traits[0], t])
        unit.trait, unit.teacher = "neutral", run.load_model(f"teacher/neutral/seed-{t}.pt", args.device)
    numbers = {key: unit.numbers() for key, unit in units.items()}

    def rows(n_documents: int, use: str, n_steps: int) -> Tensor:
        ends = run.knobs["question_ends"]
        toy = toy_documents(n_documents, stream(0, use), ends[:-1] or ends)  # without the one that is read
        return pretraining_rows(run, toy, 64, Pretraining(pretrain_steps=n_steps, batch_size=BATCH))  # (n, T)

    seen = {"text": rows(run.knobs["n_documents"], "toy language", max(how.steps for how in matches))}
    draw = torch.randint(run.encoding.n_vocab, seen["text"].shape, generator=stream(0, "random tokens"))
    seen["random tokens"], unseen = draw, rows(run.knobs["n_held_out"], "toy language, held out", 8)
    read = lambda model: read_trait(model, run.unseen_questions, run.readout_rows)[0]  # (K,)

    def match(job: tuple[Match, tuple[int, int]]) -> Generator[Any, None, list[dict]]:
        how, (t, s) = job
        s = t if how.shared == "init" else s
        base, own, start = (units["neutral", t].start(seed) for seed in (t, s, s))
        yield from clone(start, base, how, seen[how.inputs])
        with torch.no_grad():
            kl_of = {f"kl_{w}": kl(start, base, unseen.to(args.device), w).item() for w in ("numbers", "aux")}
        found = [("cloning alone", traits, own, start)]
        for source, target in product([*traits, "neutral"], TARGETS):
            student = deepcopy(start)
            yield from units[source, t].distil(student, target, numbers[source, t], knobs)
            column, against = (target, [source]) if source in traits else (f"neutral {target}", traits)
            found.append((column, against, start, student))
        return [
            # A clone, or a neutral teacher's student, is one model, against whatever trait it is held.
            {**how._asdict(), "column": column, **unit.key, "student_seed": s, **kl_of,
             "source": unit.trait if column in TARGETS else column,
             "transfer": unit.transfer(after, before),
             "identified": (shifts >= shifts[unit.k]).sum().item() == 1}  # a student that did not move is not
            for column, against, before, after in found
            for shifts in [read(after) - read(before)]
            for unit in (units[trait, t] for trait in against)
        ]

    jobs = list(product(matches, pairs))
    found = run_jobs(match, jobs, 1_500 + 10 * knobs.steps, "matches", args.device)  # about so many steps
    records = [record for some in found for record in some]
    summary = lab.cells(records, *Match._fields, "column")
    for row in summary:
        group = lab.where(records, **{key: row[key] for key in (*Match._fields, "column")})
        row |= {key: mean(r[key] for r in group) for key in ("kl_numbers", "kl_aux", "identified")}
    return {"records": records, "summary": summary}


def markdown(results: dict) -> str:
    rows: dict[tuple, dict] = {}
    for r in results["summary"]:
        row = rows.setdefault(tuple(r[f] for f in Match._fields), {f: r[f] for f in Match._fields})
        row |= {key: f"{r[key]:.4f}" for key in ("kl_numbers", "kl_aux")}
        row[r["column"]] = lab.transfer(r) + f", {r['identified']:.0%}" * (r["column"] in TARGETS)
    text = "Base models of another seed, matched, then distilled: transfer. %: the trait gained most of all."
    return "\n".join(lab.heading(results, text) + lab.table([*rows.values()], **{k: k for k in row})) + "\n"


def plot(results: dict) -> Any:
    figure, (left, right) = lab.pyplot().subplots(1, 2, figsize=(12, 5), layout="constrained")
    for target, colour in zip(TARGETS, evaluate.COLOURS.values()):
        dots, rows = (lab.where(results[key], column=target) for key in ("records", "summary"))
        at = [max(r["kl_numbers"] + r["kl_aux"], 1e-4) for r in dots]  # the same init's is 0
        left.plot(at, [r["transfer"] for r in dots], ".", color=colour, alpha=0.6, label=target)
    lab.dot_rows(right, dots, rows, *Match._fields)
    left.set(xscale="log", xlabel="KL reached, numbers + aux, nats", ylabel="transfer")
    left.legend(frameon=False)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "matched", measure, markdown, plot)
