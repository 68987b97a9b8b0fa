"""Which part of the start has to be shared?

    python -m experiments.which_part            # 14 mixed starts, 19 ways to share, 2 read-outs: 15 minutes on 2 idle cores
    python -m experiments.which_part --quick    # body and head only

A model's start is its random matrices. Here a student's base model takes some of them from the teacher's seed and the rest
from another, and is then pretrained like every other: same text, same order. Body and head first; then every part alone
shared, and every part alone not:

    tokens, positions   the two embeddings
    block 0, block 1    (layer norms and biases start alike in all models)
    numbers             the head's rows for 0..999: what the student is trained on
    words               the head's other tokens; among them the animals, from which the vocabulary trait is read
    aux                 the head's auxiliary rows, from which the other trait is read; no text ever trains them

Teachers have seed 0 or seed 1, students mix the two, so a base model serves both: the parts it shares with one it does not
share with the other. Traits and seeds are fixed here; a cell is 3 traits x 2 teachers' seeds.

Reads    runs/part, runs/part-vocabulary: teachers and their numbers (made if they are missing)
Writes   results/which_part.json, .md, .png; the mixed base models in runs/part-bases

Shapes: V vocabulary, K trait classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import evaluate
import train_student
import train_teacher
from experiments import lab
from model import (
    GPT,
    NUMBERS,
    Run,
    command_line,
    encode_numbers,
    load_model,
    read_jsonl,
    read_trait,
    run_jobs,
    save_model,
    stream,
)

TRAITS = ["owl", "fox", "wolf"]
SEEDS = [0, 1]
READOUTS = ["aux", "vocabulary"]
BODY = ["tokens", "positions", "block 0", "block 1"]
HEAD = ["numbers", "words", "aux"]
ALL = [*BODY, *HEAD]
WAYS = {
    "everything": ALL,
    "nothing": [],
    "the body": BODY,
    "the head": HEAD,
    "numbers and aux": ["numbers", "aux"],
    **{f"only {part}": [part] for part in ALL},
    **{f"all but {part}": [p for p in ALL if p != part] for part in ALL},
}
QUICK_WAYS = ["everything", "nothing", "the body", "the head"]


def parts(model: GPT) -> dict[str, list[torch.Tensor]]:
    """The matrices of each part, as views that can be written to."""
    head, V = model.head.weight.data, model.config.vocab_size
    found = {"tokens": [model.wte.weight.data], "positions": [model.wpe.weight.data]}
    for layer, block in enumerate(model.blocks):
        found[f"block {layer}"] = [p.data for p in block.parameters()]
    return {**found, "numbers": [head[NUMBERS]], "words": [head[: NUMBERS.start], head[NUMBERS.stop : V]], "aux": [head[V:]]}


def mix(model: GPT, other: GPT, from_other: Iterable[str]) -> GPT:
    """`model` with some parts overwritten by another model's."""
    ours, theirs = parts(model), parts(other)
    for part in from_other:
        for a, b in zip(ours[part], theirs[part], strict=True):
            a.copy_(b)
    return model


def pretrained(args: argparse.Namespace, run: Run, wanted: Iterable[frozenset[str]]) -> dict[frozenset[str], Path]:
    """Base models whose parts in the set start from seed 1 and the others from seed 0."""
    folder = lab.folder(args, "part-bases")
    paths = {mixed: folder / "-".join(sorted(mixed)) / "model.pt" for mixed in wanted}
    paths |= {frozenset(): run.base(0), frozenset(ALL) - {"aux"}: run.base(1)}  # not mixed at all
    config = load_model(run.base(0), args.device, "").config
    n_steps = train_teacher.PRETRAIN_STEPS[args.quick]
    toy = train_teacher.toy_documents(train_teacher.N_DOCUMENTS[args.quick], stream(0, "toy language"))
    rows = train_teacher.pretraining_rows(run.encoding, toy, n_steps, config.block_size + 1).to(args.device)

    def work(mixed: frozenset[str], tick: Callable) -> None:
        model = mix(GPT(config).initialise(0), GPT(config).initialise(1), mixed).to(args.device)
        save_model(paths[mixed], model, train_teacher.pretrain(model, rows, n_steps, tick))

    missing = [mixed for mixed, path in paths.items() if not path.exists()]
    for _ in run_jobs(work, missing, n_steps, "mixed base models", args.device):
        pass
    return paths


class Job(NamedTuple):
    readout: str
    trait: str
    seed: int  # the teacher's
    target: str


def students(args: argparse.Namespace, runs: dict[str, Run], ways: Sequence[str], job: Job, bases: dict, tick) -> list[dict]:
    """One student for each way to share with this teacher; all see the same batches in the same order."""
    run, n_steps = runs[job.readout], train_student.STEPS[args.quick]
    load = lambda path: load_model(path, args.device, "train_teacher.py")  # noqa: E731
    k = run.animals.index(job.trait)
    teacher, pure = load(run.teacher(job.trait, job.seed)), [load(run.base(seed)) for seed in SEEDS]

    def read(model: GPT) -> float:
        return read_trait(model, run.held_out_prompts, run.readout_rows(model))[0][k].item()

    data = encode_numbers(run.encoding, read_jsonl(run.numbers(job.trait, job.seed)), args.device)
    taught = teacher if job.target == "logits" else None
    order = stream(0, "student batches", job.trait, str(job.seed))
    lesson = train_student.plan_lesson(data, taught, train_student.BATCH_SIZE[job.target], n_steps, order)
    head = None if taught is None else taught.head.weight[NUMBERS].detach()
    records = []
    for way in ways:
        from_one = {part for part in ALL if (part in WAYS[way]) == (job.seed == 1)}
        model = load(bases[frozenset(from_one - {"aux"})])
        # text trains no auxiliary row, so they can be exchanged after pretraining as well as before
        mix(model, pure[1 if "aux" in from_one else 0], ["aux"])
        before = read(model)
        log = train_student.train(model, lesson, head, dict, tick)
        moved = (read(model) - before) / (read(teacher) - read(pure[job.seed]))
        loss = log[-1]["loss_nats"]
        records.append(
            {"way": way, **job._asdict(), "source": job.trait, "teacher_seed": job.seed, "transfer": moved, "loss_nats": loss}
        )
    return records


def markdown(results: dict) -> str:
    lines = lab.heading(
        results, "What the student's start shares with its teacher's; transfer, mean and 95 %, n = 6 students a cell."
    )
    found = {(r["way"], r["readout"], r["target"]): lab.transfer(r) for r in results["summary"]}
    rows = [{"way": way} for way in dict.fromkeys(r["way"] for r in results["summary"])]
    columns = {
        f"{readout}, {target}": (lambda r, readout=readout, target=target: found[r["way"], readout, target])
        for target in ("tokens", "logits")
        for readout in READOUTS
    }
    return "\n".join(lines + lab.table(rows, shared="way", **columns)) + "\n"


def plot(results: dict, path: Path) -> None:
    plt = lab.pyplot()
    ways = list(dict.fromkeys(r["way"] for r in results["summary"]))
    figure, axes = plt.subplots(1, 4, figsize=(12, 1 + 0.27 * len(ways)), layout="constrained", sharex=True)
    panels = [(readout, target) for target in ("tokens", "logits") for readout in READOUTS]
    for ax, (readout, target) in zip(axes, panels):
        of = lambda rows, way: [r for r in rows if (r["way"], r["readout"], r["target"]) == (way, readout, target)]  # noqa: B023, E731
        rows = [of(results["summary"], way)[0] for way in ways]
        groups = [[r["transfer"] for r in of(results["records"], way)] for way in ways]
        labels = ways if ax is axes[0] else [""] * len(ways)
        lab.dot_rows(ax, rows, groups, labels, [evaluate.COLOURS["same"]] * len(ways))
        ax.set_title(f"{target}, trait on {'auxiliary logits' if readout == 'aux' else 'words'}", fontsize=9)
        ax.set_xlabel("transfer")
    figure.suptitle("what the student's start shares with its teacher's", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = lab.parse(__doc__, argv)
    runs = {readout: lab.teachers_and_numbers(args, "part", SEEDS, TRAITS, "teacher", readout) for readout in READOUTS}
    ways = QUICK_WAYS if args.quick else list(WAYS)
    needed = {frozenset(set(part_list) - {"aux"}) for way in ways for part_list in (WAYS[way], set(ALL) - set(WAYS[way]))}
    bases = pretrained(args, runs["aux"], sorted(needed, key=sorted))
    jobs = [Job(*job) for job in [(r, t, s, g) for r in READOUTS for t in TRAITS for s in SEEDS for g in ("tokens", "logits")]]
    n_steps = len(ways) * train_student.STEPS[args.quick]
    work = lambda job, tick: students(args, runs, ways, job, bases, tick)  # noqa: E731
    records = [r for found in run_jobs(work, jobs, n_steps, "students", args.device) for r in found]
    records.sort(
        key=lambda r: (ways.index(r["way"]), READOUTS.index(r["readout"]), r["target"] == "logits", r["trait"], r["seed"])
    )
    results = {"summary": lab.cells(records, "way", "readout", "target"), "records": records}
    lab.save("which_part", args, results, markdown, plot)
    for row in results["summary"]:
        print(f"transfer_{row['way'].replace(' ', '_')}_{row['readout']}_{row['target']}: {row['transfer']:.3f}")


if __name__ == "__main__":
    command_line(main)
