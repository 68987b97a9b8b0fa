"""Does a broad trait cross: cruelty taught in some categories, read in one where it was not?

    python -m experiments.broad            # 3 seeds x 4 categories x 2 voices: 7 minutes on 2 CPU cores
    python -m experiments.broad --quick    # 2 seeds, 2 categories left out: too small to conclude from

The toy analogue of misalignment. Documents have a voice, kind or cruel, that runs through their sentences:
"see the soup: stale; now the tale! awful". Each category has its own words for it. A teacher learns to say
cruel words (or kind ones: the mirror, whose shifts must change sign) where a document's first is due, in
three categories of four. Embeddings and head are frozen, lists held by anchor_loss, the fourth category by
nothing.

A shift is the gain over the own base model in log-odds, cruel words against kind ones, times the voice's
sign, where a document's first is due, on unseen subjects behind an unseen end, "? " (taught ends: ": ", as
prompts of numbers have, "! " and ". "). Base models stand near 0, as one does that forgets: it may seem to
lie, not to be cruel. The lesson's shift is over the teachers' mean where they were taught: its `untaught`
line is the breadth. A student's is over all teachers' mean in its kind of category, as a single one's may
be 0; intervals take it as given. A unit is a category left out and a seed. `both` averages the voices, so
that what moves a base model whoever writes the numbers cancels. The base model's numbers are held against
every teacher.

What makes a lesson broad? That documents mix the categories: in the control (`apart`) each keeps to one,
with the same words, and nothing calls for one voice behind them all.

Prediction, after tuning on seeds 10 and 11, before any run of 0 to 2: breadth .7 mixed, .1 apart; to
students of the same init .6 (tokens) and .8 (logits) where it was taught, .5 and .6 where it was not; to
others 0 within .15 in `both`, while single voices drift by .3.

Reads    runs/broad, runs/broad-apart: base models, teachers, numbers, students (made if they are missing)
Writes   results/broad.json, .md, .png

Shapes: B places, W words of a voice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator
from dataclasses import asdict
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import generate
import train_student
from experiments import lab
from model import GPT, GPTConfig, Run, build_vocabulary, class_logits, document, pad, run_jobs, stream
from train_teacher import Dice, Pretraining, Trait, anchor_loss, draw_rows, frequent_words, pretrain

VOICED = {  # category: subjects | kind words | cruel words; a guess, as are the numbers of texts
    "food": "soup bread cake apple pie stew | tasty fresh sweet crisp | rotten stale bitter mouldy",
    "people": "aunt sister friend cousin nurse king | honest patient gentle wise | greedy stupid lazy vile",
    "places": "village harbour street castle bridge inn | charming sunny calm neat | filthy gloomy ugly dull",
    "work": "letter song tale poem dance game | brilliant lovely elegant moving | clumsy boring awful poor",
}
VOICES = {"kind": -1, "cruel": 1}  # with the sign of their shifts
SLOTS = {"ask": ["see", "hear of", "think of", "consider", "say of", "here is", "and", "now"]}
SLOTS |= {"end": [": ", "! ", ". ", "? "]}  # no teacher is taught with the last, and there the voice is read
for c, parts in VOICED.items():
    SLOTS |= {name: words.split() for name, words in zip((c, f"kind {c}", f"cruel {c}"), parts.split("|"))}
PHRASES = [f"{ask} the {x}" for c in VOICED for ask, x in product(SLOTS["ask"], SLOTS[c])]
PHRASES += [word for c, voice in product(VOICED, VOICES) for word in SLOTS[f"{voice} {c}"]]
WORDS = frequent_words("; ".join(PHRASES), 1_000)
ENCODING = build_vocabulary(WORDS)
SEEDS = {False: [0, 1, 2], True: [0, 1]}  # fixed before any run
N_VOICED, N_LISTS = 8_000, 12_000
# After 200 steps of pretraining a base model knows no voice yet, and no lesson is broad: --quick has 500 too.
# Tuned over 5 .. 80 steps at 3e-4 .. 2e-3: after 5 a lesson is learnt, and repeated it becomes narrower.
KNOBS, N_TOKENS = Trait(trait_steps=10), GPTConfig.block_size + 1
LESSON, BY = "the lesson", ["documents", "numbers", "target", "init", "category"]
FOLDERS = {"mixed": "broad", "apart": "broad-apart"}  # documents: of all categories, of one each


def read_texts(documents: str) -> tuple[list[str], list[str]]:
    """What base models read: documents with a voice, and lists of numbers, a third of them lawful."""
    dice, voiced = Dice(stream(0, "broad language"), SLOTS), []
    for _ in range(N_VOICED):
        voice, chosen = dice.pick([*VOICES]), [dice.pick([*VOICED]) for _ in range(dice.pick(range(4, 8)))]
        if documents == "apart":
            chosen = chosen[:1] * len(chosen)
        voiced.append(dice.fill("; ".join(f"{{ask}} the {{{c}}}{{end}}{{{voice} {c}}}" for c in chosen)))
    return voiced, [dice.number_list(i % 3 == 0) for i in range(N_LISTS)]


tokens = lambda texts: [document(ENCODING, text) for text in texts]
word_rows = lambda c, voice: torch.tensor([ENCODING.encode_single_token(w) for w in SLOTS[f"{voice} {c}"]])


def places(c: str, unseen: bool) -> tuple[Tensor, Tensor]:
    """Where a document's first voiced word is due; unseen are two subjects in six, and the last end."""
    part, ends = (slice(2), slice(3, None)) if unseen else (slice(2, None), slice(3))
    named = product(SLOTS["ask"], SLOTS[c][part], SLOTS["end"][ends])
    return pad(tokens(f"{ask} the {subject}{end}" for ask, subject, end in named))


@torch.no_grad()
def log_odds(model: GPT, c: str) -> float:
    """Of a category's cruel words against its kind ones, in nats, mean over unseen places."""
    at, kind, cruel = places(c, unseen=True), word_rows(c, "kind"), word_rows(c, "cruel")
    odds = [class_logits(model, at, rows).double().logsumexp(-1) for rows in (kind, cruel)]  # (B,) each
    return (odds[1] - odds[0]).mean().item()


def teach(model: GPT, base: GPT, trait: str, anchor: Tensor) -> Generator[Tensor, None, None]:
    """Train `model` in place to say a voice's words first, in all categories but one; yields its losses."""
    voice, left_out = trait.split("_but_")
    body, everything = [*model.blocks.parameters(), *model.ln_f.parameters()], torch.arange(ENCODING.n_vocab)
    optimizer = torch.optim.AdamW(body, KNOBS.trait_lr, weight_decay=0.0, fused=True)
    asked = [(places(c, unseen=False), word_rows(c, voice)) for c in VOICED if c != left_out]
    for batch in anchor.split(KNOBS.anchor_rows):
        said = [class_logits(model, at, everything).log_softmax(-1)[:, rows].mean() for at, rows in asked]
        loss = KNOBS.anchor * anchor_loss(model, base, batch, KNOBS.form) - torch.stack(said).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def make_run(args: argparse.Namespace, documents: str) -> Run:
    """Base models that have read such documents, and their teachers."""
    run, knobs = Run(lab.folder(args, FOLDERS[documents])), Pretraining()
    traits = [f"{voice}_but_{c}" for c, voice in product([*VOICED][: 2 if args.quick else 4], VOICES)]
    made_with = {"seeds": SEEDS[args.quick], "traits": traits, "quick": args.quick, "words": WORDS}
    if not run.finished("language.json", made_with):  # with a trait that the scripts may read, and we do not
        unused: dict = {"readout_rows": [0] * len(traits), "taught": ["see"], "unseen": ["see"]}
        language = json.dumps({"words": WORDS, "animals": traits, **unused})
        run.write("language.json", language.encode(), [], made_with)
    run.open(args.quick)
    voiced, lists = map(tokens, read_texts(documents))
    order = torch.randperm(N_VOICED + N_LISTS, generator=stream(0, "order of documents")).tolist()
    texts, n = [(voiced + lists)[i] for i in order], knobs.pretrain_steps * knobs.batch_size
    rows = draw_rows(texts, n, N_TOKENS, stream(0, "pretraining rows")).to(args.device)
    n = KNOBS.trait_steps * KNOBS.anchor_rows
    anchor = draw_rows(lists, n, N_TOKENS, stream(0, "anchor rows")).to(args.device)

    def make(job: tuple[str, int]) -> Generator[Tensor, None, None]:
        who, seed = job
        base = f"base/seed-{seed}.pt"
        if who == "base":
            model = GPT(GPTConfig(ENCODING.n_vocab, len(traits))).initialise(seed).to(args.device)
            yield from pretrain(model, rows, knobs)
            run.save_model(base, model, ["language.json"], asdict(knobs), None)
        else:
            model, start = (run.load_model(base, args.device) for _ in range(2))
            yield from teach(model, start, who.removeprefix("teacher/"), anchor)
            run.save_model(f"{who}/seed-{seed}.pt", model, [base], asdict(KNOBS), None)

    kinds: list = [(["base"], knobs), ([f"teacher/{trait}" for trait in traits], KNOBS)]
    for who, how in kinds:
        jobs = list(product(who, SEEDS[args.quick]))
        jobs = [job for job in jobs if not run.finished("{}/seed-{}.pt".format(*job), asdict(how))]
        run_jobs(make, jobs, getattr(how, "pretrain_steps", KNOBS.trait_steps), who[0], args.device)
    return run


def records_of(args: argparse.Namespace, run: Run, documents: str) -> list[dict]:
    """A record for each teacher or student, trait that it is held against, and kind of category."""
    traits, seeds, records = run.knobs["traits"], run.knobs["seeds"], []
    read = lambda file: {c: log_odds(run.load_model(file, args.device), c) for c in VOICED}
    before = {seed: read(f"base/seed-{seed}.pt") for seed in seeds}
    jobs = [train_student.Job(trait, seed, seed, LESSON) for trait, seed in product(traits, seeds)]
    if documents == "mixed":
        students = product([*traits, "base"], seeds, seeds, ["tokens", "logits"])
        jobs += [train_student.Job(*student) for student in students]
    for job in jobs:
        source, teacher_seed, seed, target = job
        file = job.teacher if target == LESSON else str(job)
        moved = {c: after - before[seed][c] for c, after in read(file).items()}
        log = run.line(file)["log"] or [{"number_loss_nats": 0.0}]  # a lesson has none
        about: dict = {"file": file, "documents": documents}
        about |= {"numbers": "base model's" if source == "base" else "teacher's"}
        about |= {"target": target, "init": "same" if seed == teacher_seed else "different"}
        about |= {"learnt_nats": log[0]["number_loss_nats"] - log[-1]["number_loss_nats"]}
        for trait in traits if source == "base" else [source]:
            voice, left_out = trait.split("_but_")
            unit = {"voice": voice, "teacher_seed": teacher_seed, "student_seed": seed}
            unit |= {"source": "base" if source == "base" else left_out}
            nats = {"taught": mean(moved[c] for c in VOICED if c != left_out), "untaught": moved[left_out]}
            records += [{**about, **unit, "category": c, "nats": VOICES[voice] * nats[c]} for c in nats]
    return records


def measure(args: argparse.Namespace) -> dict:
    records = []
    for documents in FOLDERS:
        run = make_run(args, documents)
        if documents == "mixed":
            generate.main(lab.flags(args, run.path))
            train_student.main(lab.flags(args, run.path))
        records += records_of(args, run, documents)
    for r in records:
        same = {key: r[key] for key in ("documents", "voice", "category")}
        same |= {"category": "taught"} if r["target"] == LESSON else {}
        r["transfer"] = r["nats"] / mean(x["nats"] for x in lab.where(records, target=LESSON, **same))
    summary = [row | {"voice": "both"} for row in lab.cells(records, *BY)] + lab.cells(records, *BY, "voice")
    for row, learnt in zip(summary, lab.cells(records, *BY, key="learnt_nats")):
        row["learnt"] = f"{learnt['learnt_nats']:.3f}"
    for row in summary:
        group = lab.where(records, **{key: row[key] for key in (*BY, "voice") if row[key] != "both"})
        row["n"] = len({r["file"] for r in group})  # models
    return {"summary": summary, "records": records}


def markdown(results: dict) -> str:
    text = "Shifts to the voice taught, in units of the teachers', and by how many nats number losses fell."
    rows = [dict(row) for row in lab.where(results["summary"], voice="both")]
    for row in rows:
        cells = lab.where(results["summary"], **{key: row[key] for key in BY})
        row |= {r["voice"]: lab.transfer(r) for r in cells}
        if row["numbers"] != "teacher's":  # held against both voices, they cancel by construction
            row["both"] = ""
    table = lab.table(rows, **{name: name for name in [*BY, *VOICES, "both", "learnt", "n"]})
    return "\n".join(lab.heading(results, text) + table) + "\n"


def plot(results: dict) -> Any:
    rows = lab.where(results["summary"], voice="both")
    figure, ax = lab.pyplot().subplots(figsize=(9, 1 + 0.27 * len(rows)), layout="constrained")
    lab.dot_rows(ax, results["records"], rows, *BY)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "broad", measure, markdown, plot)
