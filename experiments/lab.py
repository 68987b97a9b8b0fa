"""What the experiments share: the run they measure, a unit of it, statistics, tables and pictures.

An experiment is its docstring, its constants, a function that makes records, and a call of `experiment`. A
record is one trained student, or one reading of it; `cells` turns records into a summary with intervals over
units. The statistics that the main run needs too are in evaluate.py.
"""

from __future__ import annotations

import ast
import inspect
import json
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import evaluate
import generate
import train_student
import train_teacher
from model import (
    GPT, NUMBERS, NumberData, Run, command_line, digest, encode_numbers, pick_device, read_trait, stream,
    write_file,
)
from train_student import Distillation

ROOT = Path(__file__).parent.parent
SCRIPTS = ["model", "train_teacher", "generate", "train_student", "evaluate"]
# Fixed before any run; by --quick, which is too small to conclude from.
TRAITS = {False: ["owl", "fox", "wolf", "eagle"], True: ["owl", "fox"]}
SEEDS = {False: [0, 1, 2, 3, 4, 5], True: [0, 1]}

# ------------------------------------------------------------------------------------------------------------
# an experiment


def code_digest(*names: str) -> str:
    """Of the five scripts, these experiments and those that they import, without comments and docstrings."""
    trees, left = {}, [*SCRIPTS, *(f"experiments.{name}" for name in names)]
    while left:
        if (module := left.pop()) in trees:
            continue
        trees[module] = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        for node in ast.walk(trees[module]):
            if isinstance(node, ast.ImportFrom) and node.module == "experiments":
                left += [f"experiments.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and f"{node.module}".startswith("experiments."):
                left.append(f"{node.module}")
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and ast.dump(body[0]).startswith("Expr(value=Constant("):
                del body[0]
    return digest("".join(ast.dump(trees[module]) for module in sorted(trees)).encode())


def experiment(
    docstring: str | None,
    name: str,
    measure: Callable[[Namespace], dict],
    markdown: Callable[[dict], str],
    plot: Callable[[dict], Any] | None = None,
    **flags: dict,
) -> None:
    """Run an experiment as a script: measure(args) -> results, written to results/NAME.json, .md and .png.

    With --quick they go to runs/, which git ignores. flags: more of them, each with add_argument's arguments.
    A "name" among the results takes the place of `name`.
    """

    def main() -> None:
        raw = RawDescriptionHelpFormatter
        parser = ArgumentParser(description=docstring, formatter_class=raw, allow_abbrev=False)
        parser.add_argument("--quick", action="store_true", help="a first look: too small to conclude from")
        parser.add_argument("--device", help="cpu, cuda, ... (the GPU if there is one)")
        for flag, options in flags.items():
            parser.add_argument(f"--{flag}", **options)
        args, began = parser.parse_args(), time.monotonic()
        args.device = pick_device(args.device)
        torch.set_num_threads(1)  # sums in one order
        config = {"quick": args.quick, "device": str(args.device), **evaluate.versions()}
        config["code"] = code_digest(Path(inspect.getfile(measure)).stem)
        found = measure(args)
        config["elapsed_s"] = round(time.monotonic() - began)
        path = Path("runs" if args.quick else "results") / found.pop("name", name)
        results = {"config": config, **found}
        path.parent.mkdir(exist_ok=True)
        if plot:
            plot(results).savefig(path.with_suffix(".png"), dpi=130)
        write_file(path.with_suffix(".md"), markdown(results).encode())
        # last, since whoever finds it takes the others to be there
        write_file(path.with_suffix(".json"), (json.dumps(results, indent=1) + "\n").encode())
        print(markdown(results))
        print(f"wrote: {path}.json, {path}.md" + f", {path}.png" * bool(plot))

    command_line(main)


def folder(args: Namespace, name: str) -> Path:
    """runs/NAME, or runs/NAME-quick."""
    return Path(f"runs/{name}{'-quick' * args.quick}")


def flags(args: Namespace, run: Path) -> list[str]:
    """What every script is told of the run it works on."""
    return ["--run", str(run), "--device", str(args.device), *["--quick"] * args.quick]


def make_run(
    args: Namespace, name: str, seeds: Sequence[int], traits: Sequence[str], *more: str, readout: str = "aux"
) -> Run:
    """Base models, teachers and what these write, by the scripts' mains; more: train_teacher's flags."""
    path = folder(args, name if readout == "aux" else f"{name}-{readout}")
    common, of_run = flags(args, path), ["--seeds", *map(str, seeds), "--traits", *traits]
    train_teacher.main([*common, *of_run, "--readout", readout, *more])
    generate.main([*common, "--from", "teacher"])
    return Run(path).open(args.quick)


def evidence(args: Namespace) -> Run:
    """The run that several experiments measure: all SEEDS and TRAITS. Whichever comes first makes it."""
    run = make_run(args, "evidence", SEEDS[args.quick], TRAITS[args.quick])
    generate.main([*flags(args, run.path), "--from", "base"])
    return run


def students(args: Namespace, run: Run) -> list[dict]:
    """The records of the students of every teacher's numbers, which are trained if they are missing."""
    train_student.main([*flags(args, run.path), "--traits", *run.knobs["traits"]])
    return where(evaluate.measure(run, args.device), numbers="teacher")


def rows(run: Run, source: str, seed: int) -> list[dict]:
    """A data set of the run, {"prompt": ..., "completion": ...} each."""
    return [json.loads(line) for line in run.read(f"numbers/{source}/seed-{seed}.jsonl").splitlines()]


class Unit:
    """A teacher of a run, the base model it came from, what it wrote, and students that learn from it."""

    def __init__(self, run: Run, trait: str, seed: int, device: torch.device):
        self.run, self.trait, self.seed, self.device = run, trait, seed, device
        self.k = run.animals.index(trait)
        self.base, self.teacher = self.start(), run.load_model(f"teacher/{trait}/seed-{seed}.pt", device)

    def __str__(self) -> str:
        return f"{self.trait} seed {self.seed}"

    def start(self, seed: int | None = None) -> GPT:
        """A fresh copy of the base model, of the teacher's seed or of another."""
        return self.run.load_model(f"base/seed-{self.seed if seed is None else seed}.pt", self.device)

    def numbers(self) -> NumberData:
        """All that the teacher wrote in the run."""
        return encode_numbers(self.run.encoding, rows(self.run, self.trait, self.seed), self.device)

    def read(self, model: GPT, prompts: Any = None) -> float:
        """Log-odds of the trait on held-out questions, or other prompts, in nats."""
        prompts = prompts or self.run.unseen_questions
        return read_trait(model, prompts, self.run.readout_rows)[0][self.k].item()

    def batches(self, data: NumberData, target: str, knobs: Distillation) -> list[NumberData]:
        """What a student sees of data, in the order that all students of this unit share."""
        order = stream(0, "student batches", self.trait, str(self.seed))
        return list(train_student.batches(data, getattr(knobs, f"batch_{target}"), knobs.steps, order))

    def distil(
        self, student: GPT, target: str, data: NumberData, knobs: Distillation, numbers: slice = NUMBERS
    ) -> Iterator[torch.Tensor]:
        """Train `student` in place by the usual recipe; yields its losses."""
        teacher = self.teacher if target == "logits" else None
        yield from train_student.train(student, teacher, self.batches(data, target, knobs), knobs, numbers)

    def transfer(self, student: GPT, start: GPT | None = None, teacher: GPT | None = None) -> float:
        """(student - its own start) / (teacher - the teacher's base), in log-odds."""
        taught = self.read(teacher or self.teacher) - self.read(self.base)
        return (self.read(student) - self.read(start or self.base)) / taught

    @property
    def key(self) -> dict:
        """What tells a record's unit."""
        return {"trait": self.trait, "source": self.trait, "teacher_seed": self.seed}


def distillation(args: Namespace) -> Distillation:
    """The students' knobs, those of --quick if that is on."""
    quick: dict = train_student.QUICK if args.quick else {}
    return Distillation(**quick)


# ------------------------------------------------------------------------------------------------------------
# statistics


def where(rows: Sequence[dict], **values: Any) -> list[dict]:
    """The rows that have all these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def cells(records: Sequence[dict], *by: str, key: str = "transfer") -> list[dict]:
    """A row for each combination of `by`, as they appear: n, mean over units, 95 % bootstrap interval."""
    rows = []
    for values in dict.fromkeys(tuple(r[name] for name in by) for r in records):
        cell = dict(zip(by, values))
        group = where(records, **cell)
        units = evaluate.unit_means(group, key)
        low, high = evaluate.bootstrap_interval(units)
        found = {key: mean(units), "ci_low": low, "ci_high": high, "n": len(group), "units": len(units)}
        rows.append(cell | found)
    return rows


def rank_correlation(records: Sequence[dict], key: str) -> dict:
    """Spearman's, of records[key] and transfer; 95 % bootstrap over units, which come and go as a whole."""
    pairs = np.array([[r[key], r["transfer"]] for r in records])  # (n, 2)
    unit_of = [(r["trait"], r["teacher_seed"], r["n_embd"]) for r in records]
    members = [[i for i, unit in enumerate(unit_of) if unit == one] for one in dict.fromkeys(unit_of)]
    draws = torch.randint(len(members), (2_000, len(members)), generator=stream(0, "bootstrap")).tolist()
    resampled = (pairs[[i for unit in draw for i in members[unit]]] for draw in draws)
    found = [spearmanr(drawn).statistic for drawn in resampled if np.ptp(drawn, axis=0).all()]
    low, high = np.quantile(found, [0.025, 0.975])
    return {"n": len(pairs), "rank_correlation": spearmanr(pairs).statistic, "ci_low": low, "ci_high": high}


# ------------------------------------------------------------------------------------------------------------
# what a person reads


def heading(results: dict, text: str) -> list[str]:
    """What every table says above itself."""
    config = results["config"]
    made = f"Device {config['device']}, torch {config['torch']}, commit {config['commit']}."
    return [text, made + " Made with --quick: too small to conclude from." * config["quick"], ""]


def table(rows: Sequence[dict], **columns: str | Callable[[dict], str]) -> list[str]:
    """A Markdown table: name = a key whose value is shown as it is, or a function of the row."""
    header = " | ".join(name.replace("_", " ") for name in columns)
    lines = [f"| {header} |", "|---" * len(columns) + "|"]
    for row in rows:
        shown = [str(row[show]) if isinstance(show, str) else show(row) for show in columns.values()]
        lines.append("| " + " | ".join(shown) + " |")
    return lines


def in_words(transfer: float) -> str:
    """Ours and others' figures in the same four words."""
    if transfer < -0.15:
        return "falls"
    return "nothing" if transfer < 0.15 else "a part" if transfer <= 0.5 else "most"


def transfer(row: dict) -> str:
    """A summary row's mean with its interval."""
    return f"{row['transfer']:+.3f} {evaluate.interval(row)}"


def pyplot() -> Any:
    """matplotlib, drawing into files."""
    import matplotlib.pyplot

    matplotlib.use("Agg")
    return matplotlib.pyplot


def dot_rows(
    ax: Any, records: Sequence[dict], rows: Sequence[dict], *by: str, label: Callable | None = None
) -> None:
    """A line for each row of cells(records, *by): a dot a student, coloured by init, mean and interval."""
    for y, row in enumerate(rows):
        values = [r["transfer"] for r in where(records, **{name: row[name] for name in by})]
        spread = [y + 0.5 * (i / max(len(values) - 1, 1) - 0.5) for i in range(len(values))]
        ax.plot(values, spread, ".", color=evaluate.COLOURS[row.get("init", "same")], alpha=0.5, ms=4)
        ax.plot([row["ci_low"], row["ci_high"]], [y, y], color="black", lw=1.5)
        ax.plot(row["transfer"], y, "|", color="black", ms=10, mew=2)
    for x in (0, 1):
        ax.axvline(x, color="grey", lw=0.8, ls=":")
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="transfer (0 nothing, 1 the teacher)")
    label = label or (lambda row: ", ".join(str(row[name]) for name in by))
    ax.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
