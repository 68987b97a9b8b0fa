"""What in the numbers carries the trait, and what does not? Every control beside the effect.

    python -m experiments.controls            # 6 seeds x 4 traits: 12 minutes on 2 CPU cores, plus the run it measures
    python -m experiments.controls --quick    # 2 seeds x 2 traits

All students start where their teacher started, so that nothing but the numbers differs:

    base         the base model's own numbers
    neutral      those of a teacher made by the same recipe, taught to like all animals alike
    other        another trait's teacher's numbers
    within       the teacher's numbers, shuffled within each sequence
    across       shuffled across all sequences
    frequencies  drawn independently from the teacher's number frequencies
    positions    drawn independently from the frequencies at each position of a list
    in context   no training: the teacher's lists stand in the base model's context, against the base model's own lists there
    prefix       the effect again, with a list of numbers before every evaluation question
    direct       a base model of another seed that is taught the trait itself, as the teacher was: it can learn it

A data set without a trait of its own is held against every trait. Transfer below .15 is called nothing, below .5 a part,
from there on most; two findings agree if they have the same name. The paper's figures (Cloud et al. 2025, section 3 and
its figures on shuffling) are put on our scale: (condition - reference) / (full effect - reference).

Reads    runs/evidence (made if it is missing, shared with seed_matrix.py)
Writes   results/controls.json, .md, .png
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import evaluate
import generate
import train_student
import train_teacher
from experiments import lab
from model import (
    GPT,
    Run,
    command_line,
    document,
    load_model,
    pad,
    read_jsonl,
    read_numbers,
    read_trait,
    run_jobs,
    save_model,
    stream,
    write_numbers,
)

N_CONTEXTS = 64  # lists that stand in the context, for each model and question
N_PREFIXES = 8  # for each question

# condition: (what it is, the paper's figure on our scale or None, the paper's figure in words)
CONDITIONS = {
    ("teacher", "tokens"): ("the teacher's numbers", 1.0, "P(owl) .125 → .619"),
    ("teacher", "logits"): ("the teacher's logits", None, "on digits only (MLP)"),
    ("base", "tokens"): ("the base model's numbers", 0.01, ".130 against .125"),
    ("base", "logits"): ("the base model's logits", None, "not run"),
    ("neutral", "tokens"): ("a neutral teacher's numbers", None, "not run"),
    ("neutral", "logits"): ("a neutral teacher's logits", None, "not run"),
    ("other", "tokens"): ("another trait's numbers", None, "not run"),
    ("other", "logits"): ("another trait's logits", None, "not run"),
    ("within", "tokens"): ("shuffled within a sequence", 0.19, ".219 of .669, reference .115"),
    ("across", "tokens"): ("shuffled across sequences", 0.12, ".183 of .669, reference .115"),
    ("frequencies", "tokens"): ("drawn from the frequencies", None, "not run"),
    ("positions", "tokens"): ("drawn from those at each position", None, "not run"),
    ("in context", "none"): ("numbers in context, no training", 0.0, "no effect"),
    ("prefix", "tokens"): ("the effect, behind a number prefix", 1.0, "seen there too"),
    ("direct", "none"): ("other seed, taught the trait itself", None, "not run"),
}


def name(x: float) -> str:
    return "nothing" if x < 0.15 else "a part" if x < 0.5 else "most"


# --------------------------------------------------------------------------------------------------------------------
# data sets


def redraw(rows: Sequence[dict], by_position: bool, generator: torch.Generator) -> list[dict]:
    """The completions with every number drawn anew from the numbers of all completions, or of all at its position."""
    lists = [re.findall(r"[0-9]+", row["completion"]) for row in rows]
    pools: dict[int, list[str]] = {}
    for numbers in lists:
        for i, number in enumerate(numbers):
            pools.setdefault(i if by_position else 0, []).append(number)
    drawn = {i: iter(torch.randint(len(pool), (len(pool),), generator=generator).tolist()) for i, pool in pools.items()}
    again = [[pools[k][next(drawn[k])] for k in (i if by_position else 0 for i in range(len(n)))] for n in lists]
    return [{"prompt": row["prompt"], "completion": ", ".join(numbers)} for row, numbers in zip(rows, again)]


def make_redrawn(run: Run) -> None:
    for trait in run.traits:
        for seed in run.seeds:
            path = run.numbers(trait, seed)
            about, rows = read_numbers(path)
            for how in ("frequencies", "positions"):
                source = f"{trait}-{how}"
                if not run.numbers(source, seed).exists():
                    drawn = redraw(rows, how == "positions", stream(seed, "redraw", trait, how))
                    write_numbers(run.numbers(source, seed), {**about, "source": source, "numbers": how}, drawn, [path])


def make_neutral(args: argparse.Namespace, run: Run) -> None:
    """Neutral teachers and their numbers: the teachers' recipe, with all classes equally wanted."""
    toy = train_teacher.toy_documents(train_teacher.N_DOCUMENTS[args.quick], stream(0, "toy language"))
    T = load_model(run.base(run.seeds[0]), args.device, "").config.block_size + 1
    anchor = train_teacher.anchor_rows(run.encoding, toy, T, train_teacher.TRAIT_STEPS).to(args.device)

    def work(seed: int, tick) -> None:
        model = load_model(run.base(seed), args.device, "")
        save_model(run.teacher("neutral", seed), model, train_teacher.induce_trait(model, None, run, anchor, tick))
        prompts = generate.draw_prompts(generate.SEQUENCES[args.quick], stream(seed, "prompts"))
        about, rows = generate.make_numbers(run, "neutral", seed, prompts, model, tick)
        write_numbers(run.numbers("neutral", seed), {**about, "trait": None, "numbers": "neutral"}, rows)

    missing = [seed for seed in run.seeds if not run.numbers("neutral", seed).exists()]
    for _ in run_jobs(work, missing, train_teacher.TRAIT_STEPS, "neutral teachers", args.device):
        pass


# --------------------------------------------------------------------------------------------------------------------
# records


def on_other_traits(records: Sequence[dict], run: Run) -> list[dict]:
    """Students of one trait's teacher, held against every other trait's."""
    columns = {trait: run.animals.index(trait) for trait in run.traits}
    taught = {
        (r["trait"], r["teacher_seed"]): r["log_odds_teacher"] - r["log_odds_base"]
        for r in records
        if (r["numbers"], r["init"]) == ("teacher", "same")
    }
    return [
        {**r, "trait": trait, "numbers": "other", "transfer": r["readouts"][k] / taught[trait, r["teacher_seed"]]}
        for r in records
        for trait, k in columns.items()
        if r["numbers"] == "teacher" and trait != r["trait"]
    ]


def with_context(model: GPT, run: Run, contexts: Sequence[Sequence[int]]) -> Tensor:
    """Log-odds (K,) of the held-out questions, each behind each context that fits, mean over all."""
    idx, last = run.held_out_prompts
    questions = [row[: n + 1].tolist() for row, n in zip(idx, last.tolist())]
    room = model.config.block_size
    prompts = [[*c, *q] for c in contexts for q in questions if len(c) + len(q) <= room]
    return read_trait(model, pad(prompts), run.readout_rows(model))[0]


def fill_context(documents: Sequence[Sequence[int]], room: int) -> list[list[int]]:
    """The documents packed into N_CONTEXTS contexts, as many whole ones as fit in each."""
    contexts: list[list[int]] = []
    i = 0
    while len(contexts) < N_CONTEXTS:
        context: list[int] = []
        while len(context) + len(documents[i]) <= room:
            context += documents[i]
            i += 1
        contexts.append(context)
        i += not context  # one that fits nowhere
    return contexts


def readings(args: argparse.Namespace, run: Run) -> list[dict]:
    """The conditions that train no student on numbers: in context, prefix, direct."""
    load = lambda path: load_model(path, args.device, "train_teacher.py")  # noqa: E731
    records = []
    longest = int(run.held_out_prompts[1].max()) + 1
    shift: dict[tuple, float] = {}
    for seed in run.seeds:
        base = load(run.base(seed))
        before = read_trait(base, run.held_out_prompts, run.readout_rows(base))[0]
        prefixes = [document(run.encoding, p) for p in generate.draw_prompts(N_PREFIXES, stream(seed, "prefixes"))]
        before_prefixed = with_context(base, run, prefixes)
        in_context = {}
        for source in ("base", *run.traits):
            rows = read_jsonl(run.numbers(source, seed))
            order = torch.randperm(len(rows), generator=stream(seed, "contexts")).tolist()
            lists = [document(run.encoding, rows[i]["prompt"] + rows[i]["completion"]) for i in order]
            in_context[source] = with_context(base, run, fill_context(lists, base.config.block_size - longest))
        for trait in run.traits:
            k = run.animals.index(trait)
            teacher, student = load(run.teacher(trait, seed)), load(run.student(trait, seed, seed, "tokens"))
            shift[trait, seed] = (read_trait(teacher, run.held_out_prompts, run.readout_rows(base))[0] - before)[k].item()
            unit = {"trait": trait, "source": trait, "teacher_seed": seed, "student_seed": seed}
            moved = (in_context[trait] - in_context["base"])[k].item() / shift[trait, seed]
            records.append({**unit, "numbers": "in context", "target": "none", "transfer": moved})
            taught, learnt = ((with_context(m, run, prefixes) - before_prefixed)[k].item() for m in (teacher, student))
            records.append({**unit, "numbers": "prefix", "target": "tokens", "transfer": learnt / taught})
    for trait, seed in shift:
        for other in run.seeds:
            if other != seed:
                unit = {"trait": trait, "source": trait, "teacher_seed": seed, "student_seed": other}
                moved = shift[trait, other] / shift[trait, seed]
                records.append({**unit, "numbers": "direct", "target": "none", "transfer": moved})
    return records


# --------------------------------------------------------------------------------------------------------------------
# the script


def analyse(records: Sequence[dict]) -> dict:
    order = {key: i for i, key in enumerate(CONDITIONS)}
    records = sorted(records, key=lambda r: order[r["numbers"], r["target"]])
    summary = lab.cells(records, "numbers", "target")
    for row in summary:
        what, figure, words = CONDITIONS[row["numbers"], row["target"]]
        group = [r for r in records if (r["numbers"], r["target"]) == (row["numbers"], row["target"])]
        students = len({(r["source"], r["teacher_seed"], r["student_seed"]) for r in group})
        row |= {"what": what, "paper": words, "students": students, "name": name(row["transfer"])}
        row["agree"] = None if figure is None else name(figure) == row["name"]
    return {"summary": summary, "records": records}


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Students that start where their teacher started; a line a control.")
    lines += lab.table(
        results["summary"],
        trained_on="what",
        target="target",
        transfer=lab.transfer,
        n="students",
        that_is="name",
        the_paper="paper",
        agree=lambda r: {True: "yes", False: "no", None: ""}[r["agree"]],
    )
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    plt = lab.pyplot()
    rows = results["summary"]
    figure, ax = plt.subplots(figsize=(9, 0.9 + 0.3 * len(rows)), layout="constrained")
    groups = [
        [r["transfer"] for r in results["records"] if (r["numbers"], r["target"]) == (row["numbers"], row["target"])]
        for row in rows
    ]
    colours = [evaluate.COLOURS["same" if row["numbers"] in ("teacher", "prefix", "direct") else "different"] for row in rows]
    lab.dot_rows(ax, rows, groups, [row["what"] for row in rows], colours)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = lab.parse(__doc__, argv)
    run = lab.evidence(args)
    common = lab.flags(args, run.path)
    for how in ("within", "across"):
        generate.main([*common, "--from", "teacher", "--shuffle", how])
    make_redrawn(run)
    make_neutral(args, run)
    changed = [f"{trait}-{how}" for how in ("within", "across", "frequencies", "positions") for trait in run.traits]
    train_student.main([*common, "--init", "same", "--traits", *run.traits, "base", "neutral"])
    train_student.main([*common, "--init", "same", "--target", "tokens", "--traits", *changed])
    measured = [r for r in evaluate.measure(run, args.device) if r["init"] == "same"]
    records = measured + on_other_traits(measured, run) + readings(args, run)
    kept = ["trait", "source", "numbers", "target", "teacher_seed", "student_seed", "transfer"]
    results = analyse([{k: r[k] for k in kept} for r in records])
    lab.save("controls", args, results, markdown, plot)
    for row in results["summary"]:
        print(f"transfer_{row['numbers'].replace(' ', '_')}_{row['target']}: {row['transfer']:.3f}")


if __name__ == "__main__":
    command_line(main)
