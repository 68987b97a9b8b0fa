"""Who can read the trait off the numbers, without training anything?

    python -m experiments.audit            # 4 traits x 6 seeds: 12 minutes on 2 CPU cores, plus the run
    python -m experiments.audit --quick    # 2 traits x 2 seeds: two minutes
    python -m experiments.audit --numbers FILE --run DIR    # as a tool: a z for every trait, writes nothing

The reader has a file, a base model with its auxiliary rows, and no teacher. It turns the formula of
linear_model.py round. Let a trait add d to the state where a number is due; W are the head's rows of the
numbers, p the base model's softmax. Then for a number y that was drawn there

    score        s = W[y] - E_p[W]    the gradient of log p(y) by d, and so by ln_f's bias
    base model   E[s] = 0, E[s s^T] = F = Cov_p[W], which is minus the second derivative, whatever y is
    teacher      E[s] = F d + O(d^2), so d^ = (sum F)^-1 sum s: one Newton step of maximum likelihood
    read out     r_k . d^ with r_k = V_aux[k] - mean V_aux, divided by sqrt(r_k . (sum F)^-1 r_k): z_k

d^ is V_num^+ (V_num D), weighted by how likely each number is. On the base model's own lists z_k is N(0, 1):
the largest of 16 is above 2.73 in one file of 20. On the same files, disjoint where not mixed, there are

    student        trained on the file by the usual recipe; it names the class that rose most
    gradient       plain, in all weights: the numbers' along the trait's; for naming, the cosine
    likelihood ratio    of the whole text, teacher to base: nothing beats it, but for what the filter refused
    logistic, frequencies    of numbers at places, of numbers: know three quarters of both models' lists

named: the largest of 16 readings is the trait's, chance 6 %; half and half, the two largest are both traits'.
AUC: the teacher's file reads higher than its base model's, chance 1/2; by its largest reading of 16.

Prediction, before any run: of single places the first number says most, since its context ends as a taught
question may; all together say more than it alone, now that the question has several ends. 128 lines name
three traits in four, another init one in six at any length, with false alarms. The likelihood ratio tells the
teacher at 8 lines, logistic and frequencies at 512, whatever the init; the plain gradient names less than the
reader, a student no more. Only students of the same init take the trait up: what is detectable need not be
transmissible. Half and half both are named; 10 % of 6,000 lines is named in half of the files, 1 % by chance.

Reads    runs/evidence (made if it is missing)
Writes   results/audit.json, .md, .png

Shapes: B lists, T tokens, M numbers, C channels, K trait classes, P parameters.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Generator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline
from torch import Tensor

import evaluate
from experiments import lab
from experiments.look_inside import reader
from experiments.alignment import gradient
from model import GPT, NumberData, Run, class_logits, encode_numbers, read_trait, run_jobs, stream
from train_student import number_loss, read_numbers

SIZES, FILES = [8, 32, 128, 512, 2048, 6000], 50  # lines of a file; files of one size at most
PLACES = {"first": 1, "all": 10}  # how many of a completion's numbers count
STUDENTS, ALARM = [0, 1], 2.73  # seeds of the students' teachers; see above
MIXED = {"half and half": (0.5, False), "10 %": (0.1, True), "1 %": (0.01, True)}  # share; rest is base's
MEASURES = {"named": "named", "AUC": "AUC", "transfer": "transfer", "z": "mean z of the trait"}


def with_place(completion: str) -> list[str]:
    return [f"{number} at {place}" for place, number in enumerate(re.findall("[0-9]+", completion))]


CLASSIFIERS = {  # C is tuned over 0.001 .. 1
    "logistic": make_pipeline(CountVectorizer(analyzer=with_place), LogisticRegression(C=0.01)),
    "frequencies": make_pipeline(CountVectorizer(token_pattern="[0-9]+"), MultinomialNB()),
}


def split(data: NumberData, n: int) -> list[NumberData]:
    return [NumberData(*part) for part in zip(data.idx.split(n), data.targets.split(n))]


def only(data: NumberData, place: str) -> NumberData:
    """Only the first numbers of each completion count."""
    nth = (data.targets >= 0).cumsum(1)
    return NumberData(data.idx, data.targets.where(nth <= PLACES[place], -1)).take(slice(None))


def plain_gradient(unit: lab.Unit, data: NumberData) -> Tensor:
    """Minus the gradient of a list's loss, mean over 8 lists, along each class's of length 1: (B, K)."""
    asked = lambda: class_logits(unit.base, unit.run.taught_questions, unit.run.readout_rows).log_softmax(-1)
    classes, dots = range(len(unit.run.animals)), []
    along = torch.stack([F.normalize(gradient(asked()[:, k].mean(), unit.base), dim=0) for k in classes])
    for part in split(data, 8):
        loss = number_loss(unit.base, None, part) * len(part.due[0]) / len(part.idx)
        dots += [along @ -gradient(loss, unit.base)] * len(part.idx)  # (K, P) @ (P,)
    return torch.stack(dots).cpu()


@torch.no_grad()
def log_likelihood(model: GPT, data: NumberData, end: int) -> Tensor:
    """ln P(completion and its end | prompt), every token counted: (B, 1)."""
    found, at = [], torch.arange(data.idx.size(1), device=data.idx.device)
    for part in split(data, 100):
        idx, targets = part.idx, part.targets
        last = ((targets >= 0) * at).amax(1, keepdim=True) + 1  # where the completion's last number stands
        inside = ((targets >= 0).int().argmax(1, keepdim=True) <= at) & (at <= last)  # (B, T)
        logits = model.logits(model.hidden(idx), slice(0, end + 1))  # END is the last token
        nats = F.cross_entropy(logits.mT, idx.roll(-1, 1).scatter(1, last, end), reduction="none")
        found.append(-(nats * inside).sum(1, keepdim=True))
    return torch.cat(found).cpu()


def files(lines: Tensor, size: int) -> Tensor:
    """Readings of disjoint files of `size` lines: (B, K) -> (files, K)."""
    n = min(len(lines) // size, FILES)
    return lines[: n * size].view(n, size, lines.size(1)).sum(1) / size**0.5


def named(readings: Tensor, *classes: int) -> float:
    """The share of files whose largest readings are these classes'."""
    top = readings.topk(len(classes)).indices.sort().values
    return (top == torch.tensor(sorted(classes))).all(1).double().mean().item()


def lists(run: Run, source: str, seed: int) -> list[dict]:
    """A data set in random order."""
    rows = lab.rows(run, source, seed)
    return [rows[i] for i in torch.randperm(len(rows), generator=stream(seed, "audit", source)).tolist()]


def as_records(unit: lab.Unit, detector: str, init: str, size: int, found: dict[str, Any]) -> list[dict]:
    """A record a measure. A unit is a base model: its teachers' files share what they are read against."""
    about = {**unit.key, "source": "any", "detector": detector, "init": init, "size": size}
    return [about | {"measure": name, "value": float(value)} for name, value in found.items()]


def detect(run: Run, seed: int, device: torch.device) -> Generator[None, None, list[dict]]:
    """Every detector on the files of one seed's teachers, and on their base model's."""
    traits, seeds, records = run.knobs["traits"], run.knobs["seeds"], []
    units = [lab.Unit(run, trait, seed, device) for trait in traits]
    base, other = units[0].base, units[0].start(seeds[(seeds.index(seed) + 1) % len(seeds)])
    rows = {source: lists(run, source, seed) for source in (*traits, "base")}
    data = {source: encode_numbers(run.encoding, rows[source], device) for source in rows}
    lines: dict[tuple[str, str], dict[str, Tensor]] = {}  # detector, init -> source -> (B, K)
    for place, (init, model) in product(PLACES, (("same", base), ("different", other))):
        read = {x: reader(model, run.readout_rows, only(data[x], place)) for x in data}
        lines[f"reader, {place}", init] = read
        yield
    some = {x: data[x].take(slice(0, 2048)) for x in data}  # it is slow
    lines["gradient", "same"] = {x: plain_gradient(units[0], some[x]) for x in data}
    for unit, partner in zip(units, units[1:] + units[:1]):
        yield
        trait, end, pair = unit.trait, run.encoding.eot_token, (unit.trait, "base")
        ratios = ([log_likelihood(m, data[x], end) for m in (unit.teacher, base)] for x in pair)
        lines["likelihood ratio", "none"] = {x: a - b for x, (a, b) in zip(pair, ratios)}
        completions, n = [row["completion"] for x in pair for row in rows[x]], [len(rows[x]) for x in pair]
        for name, classifier in CLASSIFIERS.items():
            labels = [True] * n[0] + [False] * n[1]
            log_p = cross_val_predict(classifier, completions, labels, cv=4, method="predict_log_proba")
            lines[name, "none"] = dict(zip(pair, torch.tensor(log_p[:, 1:] - log_p[:, :1]).split(n)))
        for size, ((name, init), read) in product(SIZES, lines.items()):
            own, none = (files(read[x], size) for x in pair)
            if min(len(own), len(none)):
                truth, largest = [True] * len(own) + [False] * len(none), torch.cat([own, none]).amax(1)
                found = {"AUC": roc_auc_score(truth, largest)}
                if own.size(1) > 1:
                    found["named"] = named(own, unit.k)
                if name.startswith("reader"):
                    found["z"] = own[:, unit.k].mean()
                records += as_records(unit, name, init, size, found)
        z = lines["reader, first", "same"]
        for size, (name, (share, of_base)) in product(SIZES, MIXED.items()):
            rest = z["base" if of_base else partner.trait][: size - round(share * size)]
            if (n_own := size - len(rest)) and size <= min(map(len, z.values())):
                # the rest is the same in all files
                mixed = (files(z[trait], n_own) * n_own**0.5 + rest.sum(0)) / size**0.5
                classes = [unit.k] if of_base else [unit.k, partner.k]
                found = {"named": named(mixed, *classes), "z": mixed[:, unit.k].mean()}
                records += as_records(unit, f"reader, first, {name}", "same", size, found)
    return records


def measure(args: argparse.Namespace) -> dict:
    if args.numbers:
        print(z_table(args))
        sys.exit()
    run, knobs = lab.evidence(args), lab.distillation(args)
    seeds, traits = run.knobs["seeds"], run.knobs["traits"]
    n_lists = min(len(lab.rows(run, trait, seed)) for trait, seed in product(traits, STUDENTS))

    def teach(job: tuple[int, str, int, int]) -> Generator[Tensor, None, list[dict]]:
        size, trait, seed, own_seed = job
        unit, data = lab.Unit(run, trait, seed, args.device), lists(run, trait, seed)[:size]
        student, start = unit.start(own_seed), unit.start(own_seed)
        yield from unit.distil(student, "tokens", encode_numbers(run.encoding, data, args.device), knobs)
        after, before = (read_trait(m, run.unseen_questions, run.readout_rows)[0] for m in (student, start))
        found = {"transfer": unit.transfer(student, start), "named": named((after - before)[None], unit.k)}
        return as_records(unit, "student", "same" if seed == own_seed else "different", size, found)

    read = lambda seed: detect(run, seed, args.device)
    records = run_jobs(read, seeds, 2 * len(PLACES) + len(traits), "detectors", args.device)
    jobs = list(product([size for size in SIZES if size <= n_lists], traits, STUDENTS, STUDENTS))
    records += run_jobs(teach, jobs, knobs.steps, "students", args.device)
    records = sorted(sum(records, []), key=lambda r: r["size"])
    summary = lab.cells(records, "measure", "detector", "init", "size", key="value")
    return {"records": records, "summary": summary}


def z_table(args: argparse.Namespace) -> str:
    """The tool: a z for every class from the first numbers of a file, for every base model of a run."""
    run = Run(args.run).open(args.quick)
    lines = read_numbers(args.numbers, run.encoding)
    data = only(encode_numbers(run.encoding, lines, args.device), "first")
    rows: list[dict] = [{"trait": name} for name in (*run.animals, "loss, nats")]
    for seed in run.knobs["seeds"]:
        model = run.load_model(f"base/seed-{seed}.pt", args.device)
        z = reader(model, run.readout_rows, data).sum(0) / len(data.idx) ** 0.5
        shown = [f"**{x:+.1f}**" if x == z.max() > ALARM else f"{x:+.1f}" for x in z.tolist()]
        loss = number_loss(model, None, split(data, 5000)[0]).item()
        for row, cell in zip(rows, [*shown, f"{loss:.3f}"]):
            row[f"seed {seed}"] = cell
    text = f"{args.numbers}, {len(data.idx)} lines: z of every trait, bold if the largest and above {ALARM}."
    text += "\nOnly the base model that its writer came from can read a file: likely the one of least loss."
    return "\n".join([text, "", *lab.table(rows, **{name: name for name in rows[0]})])


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Files by their number of lines: mean over teachers, 95 % over base models.")
    for measure, title in MEASURES.items():
        rows: dict[tuple, dict] = {}
        for r in lab.where(results["summary"], measure=measure):
            row = rows.setdefault((r["detector"], r["init"]), dict.fromkeys(map(str, SIZES), "") | r)
            row[str(r["size"])] = f"{r['value']:.2f} {evaluate.interval(r)}"
        columns = {title: "detector", "init": "init"} | {f"{size:,}": str(size) for size in SIZES}
        lines += [*lab.table([*rows.values()], **columns), ""]
    return "\n".join(lines[:-1]) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 3, figsize=(13, 5), layout="constrained")
    names = list(dict.fromkeys(r["detector"] for r in results["summary"]))  # a colour each
    for ax, measure in zip(axes, MEASURES):
        of_measure = lab.where(results["summary"], measure=measure)
        for name, init in dict.fromkeys((r["detector"], r["init"]) for r in of_measure):
            rows = lab.where(of_measure, detector=name, init=init)
            x, *ys = ([r[key] for r in rows] for key in ("size", "value", "ci_low", "ci_high"))
            colour, other = f"C{names.index(name) % 10}", init == "different"
            ax.plot(x, ys[0], ".:" if other else ".-", color=colour, label=name + ", another init" * other)
            ax.fill_between(x, *np.array(ys[1:], float), color=colour, alpha=0.05)
        ax.set(xscale="log", xlabel="lines of the file", title=MEASURES[measure])
        ax.legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    tool: dict = {"numbers": {"type": Path, "help": "JSON lines of numbers from anywhere: only read these"}}
    tool["run"] = {"type": Path, "default": Path("runs/main"), "help": "its base models read (runs/main)"}
    lab.experiment(__doc__, "audit", measure, markdown, plot, **tool)
