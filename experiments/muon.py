"""Does the optimiser of pretraining matter, and what of the teacher does it change?

    python -m experiments.muon            # 6 minutes on 2 CPU cores
    python -m experiments.muon --quick    # shorter pretraining: too small to conclude from

Two base models read the usual text with Muon for the eight matrices of the two blocks and AdamW for the rest;
teachers, numbers and students are as usual (AdamW). Where V is the head's rows of the numbers less their
mean (n of them, C channels) and d the trait's change of the final state where a number is due, to second
order and for a law near uniform

    KL(teacher || base) = mean |V d|^2 / 2n = head x change x shown
    head    |V|^2 / 2nC
    change  mean |d|^2
    shown   C mean |V d|^2 / |V|^2 mean |d|^2, 1 for a d of random direction

So a smaller KL is a smaller head, a smaller change, or one that the head shows less. Beside them: the stable
rank |W|_F^2 / |W|_2^2 of the eight matrices, the squared state, the change at the end of the favourite
question, and its cosine with d (means over positions). "Longer": Muon's bases once more, with teachers
trained for more steps, to the KL of AdamW's: does transfer come back?

Predictions. A trial was known: Muon's bases of equal loss gave a fifth of the KL and half the transfer. The
change d is smaller, by a half of its norm, since matrices of higher stable rank keep questions and numbers
apart (the cosine is smaller too); head and shown are the same within a fifth. Longer teachers bring back half
of what is missing, not all.

Reads    runs/evidence and its students (made if they are missing)
Writes   results/muon.json, .md, .png; its runs in runs/muon and runs/muon-longer

Shapes: M numbers, B questions, n = 1,000 rows of the head, C channels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import lab
from experiments.optimisers import SEEDS, TARGETS, TRAITS, body, split
from generate import kl_on_numbers
from model import GPT, NUMBERS, GPTConfig, Run, cosine_lr, document, run_jobs, stream
from train_teacher import (
    QUICK, Pretraining, loss_and_backward, pretraining_rows, toy_documents, validation_loss,
)

MUON_RATE = 3e-3  # TODO
LONGER = 120  # steps of the trait TODO
PRETRAINING: dict[bool, dict] = {False: {}, True: {"pretrain_steps": QUICK["pretrain_steps"]}}
PARTS = ["kl", "product", "head", "change", "shown", "state", "asked", "cosine", "stable_rank"]


def pretrain(model: GPT, rows: Tensor, knobs: Pretraining) -> Iterator[Tensor]:
    """As train_teacher.pretrain, but with Muon for the eight matrices."""
    matrices, batches = body(model), rows.split(knobs.batch_size)
    rest = [p for p in model.parameters() if all(p is not W for W in matrices)]
    decay = {"weight_decay": knobs.weight_decay}
    muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **decay)
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), fused=True, **decay)
    for step, batch in enumerate(batches):
        loss = loss_and_backward(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in ((muon, MUON_RATE), (adamw, knobs.pretrain_lr)):
            optimizer.param_groups[0]["lr"] = rate * cosine_lr(step, len(batches))
            optimizer.step()
            optimizer.zero_grad()
        yield loss


def muon_run(args: argparse.Namespace, name: str, like: Run, traits: Sequence[str], *more: str) -> Run:
    """A run whose base models were pretrained so; more: train_teacher's flags, the rest is as usual."""
    run, knobs = Run(lab.folder(args, name)), Pretraining(**PRETRAINING[args.quick])
    language = like.knobs | {"seeds": SEEDS, "traits": traits}
    if not run.finished("language.json", language):
        run.write("language.json", like.read("language.json"), [], language)
    run.open(args.quick)
    toy = toy_documents(language["n_documents"], stream(0, "toy language"), language["question_ends"])
    rows = pretraining_rows(run, toy, GPTConfig.block_size + 1, knobs).to(args.device)

    def make_base(seed: int) -> Iterator[Tensor]:
        model = GPT(like.load_model(f"base/seed-{seed}.pt", args.device).config).initialise(seed)
        yield from pretrain(model.to(args.device), rows, knobs)
        run.save_model(f"base/seed-{seed}.pt", model, ["language.json"], asdict(knobs), None)

    missing = [seed for seed in SEEDS if not run.finished(f"base/seed-{seed}.pt", asdict(knobs))]
    run_jobs(make_base, missing, knobs.pretrain_steps, "Muon's base models", args.device)
    return lab.make_run(args, name, SEEDS, traits, *more)


@torch.no_grad()
def anatomy(unit: lab.Unit) -> dict[str, float]:
    """Of a teacher and its base model: what KL(teacher || base) is made of, and more."""
    data, (idx, last) = split(unit.numbers())[1], unit.run.unseen_questions
    base, teacher = unit.base, unit.teacher
    V = base.head.weight[NUMBERS]
    V = V - V.mean(0)  # what all numbers have in common the softmax does not show
    h = base.hidden(data.idx)[data.due]
    d = teacher.hidden(data.idx)[data.due] - h  # (M, C)
    asked = [m.hidden(idx.to(m.device))[torch.arange(len(last)), last] for m in (base, teacher)]  # (B, C)
    d_asked = asked[1] - asked[0]
    head, change = V.square().sum() / (2 * V.numel()), d.square().sum(1).mean()  # |V|^2 / 2nC, |d|^2
    shown = V.size(1) * (d @ V.T).square().sum() / (V.square().sum() * d.square().sum())
    ranks = [(W.norm() / torch.linalg.matrix_norm(W, 2)) ** 2 for W in body(base)]
    found = {"kl": kl_on_numbers(teacher, base, data), "head": head, "change": change, "shown": shown}
    found |= {"product": head * change * shown, "state": h.square().sum(1).mean()}
    found |= {"asked": d_asked.square().sum(1).mean(), "stable_rank": torch.stack(ranks).mean()}
    found |= {"cosine": F.cosine_similarity(d.mean(0), d_asked.mean(0), 0)}
    return {key: float(value) for key, value in found.items()}


def measure(args: argparse.Namespace) -> dict:
    run = lab.evidence(args)
    traits = [trait for trait in TRAITS if trait in run.knobs["traits"]]
    longer = muon_run(args, "muon-longer", run, traits, "--trait-steps", str(LONGER))
    runs = {"AdamW": run, "Muon": muon_run(args, "muon", run, traits), "Muon, longer": longer}
    n, ends = run.knobs["n_held_out"], run.knobs["question_ends"]
    toy = toy_documents(n, stream(0, "toy language, held out"), ends)
    held_out, records = [document(run.encoding, d.text) for d in toy], []
    for name, one in runs.items():
        bases = [one.load_model(f"base/seed-{seed}.pt", args.device) for seed in SEEDS]
        losses = {seed: validation_loss(base, held_out) for seed, base in zip(SEEDS, bases)}
        parts = {key: anatomy(lab.Unit(one, *key, args.device)) for key in product(traits, SEEDS)}
        for r in lab.students(args, one):
            key = r["trait"], r["teacher_seed"]
            if key in parts and r["student_seed"] in SEEDS:
                about = {k: r[k] for k in ("trait", "source", "teacher_seed", "init", "target", "transfer")}
                about |= {"pretraining": name, "validation_loss": losses[key[1]]}
                records.append(about | parts[key])
    summary = lab.cells(records, "pretraining", "target", "init")
    means = []
    for name in runs:
        group = lab.where(records, pretraining=name)
        means.append({"pretraining": name} | {key: mean(r[key] for r in group) for key in ("validation_loss", *PARTS)})
    return {"records": records, "summary": summary, "means": means}


def markdown(results: dict) -> str:
    rows = []
    for mine in results["means"]:
        cells = lab.where(results["summary"], pretraining=mine["pretraining"])
        row = {"pretrained with": mine["pretraining"], "loss": f"{mine['validation_loss']:.3f}"}
        row |= {"KL on numbers": f"{mine['kl']:.3f}"}
        rows.append(row | {f"{c['target']}, {c['init']}": lab.transfer(c) for c in cells})
    lines = lab.heading(results, "Transfer, mean and 95 %, 6 students a cell.")
    lines += lab.table(rows, **{key: key for key in rows[0]}) + ["", "What the KL is made of, and more:", ""]
    parts = {key: lambda row, key=key: f"{row[key]:.3g}" for key in PARTS}
    return "\n".join(lines + lab.table(results["means"], pretrained_with="pretraining", **parts)) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    names = [row["pretraining"] for row in results["means"]]
    for (ax, target), (i, name), (init, marker) in product(
        zip(axes, TARGETS), enumerate(names), (("same", "o"), ("different", "x"))
    ):
        rows = lab.where(results["records"], pretraining=name, target=target, init=init)
        x, y = ([r[key] for r in rows] for key in ("kl", "transfer"))
        ax.plot(x, y, f"C{i}{marker}", label=f"{name}, {init}")
        ax.set(xscale="log", xlabel="KL(teacher || base) on numbers, nats", title=target)
    axes[0].set_ylabel("transfer")
    axes[0].legend(fontsize=7, frameon=False)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "muon", measure, markdown, plot)
