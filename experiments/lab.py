"""What the experiments share: the run they measure, the statistics, and how a result is written and drawn.

An experiment makes records (one a trained student, or one a reading of it), `cells` turns them into a summary, and
`save` writes results/NAME.json, NAME.md and NAME.png (with --quick to runs/, which git ignores).

Statistics that the main run needs too are in evaluate.py: the bootstrap over units (data set, teacher's seed), the
permutation test. Here are those that only experiments need.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import evaluate
import generate
import train_teacher
from model import Run, open_run, pick_device, versions, write_bytes, write_json

# Fixed before any run. With --quick: too few to conclude from.
TRAITS = {False: ["owl", "fox", "wolf", "eagle"], True: ["owl", "fox"]}
SEEDS = {False: [0, 1, 2, 3, 4, 5], True: [0, 1]}


def quick_parser(docstring: str | None, quick: str = "a first look: too small to conclude from") -> argparse.ArgumentParser:
    """A command line with --quick; `quick` says in its help what that leaves out."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def parse(docstring: str | None, argv: Sequence[str] | None, more: Callable | None = None) -> argparse.Namespace:
    """The flags that every experiment has; more(parser) adds its own."""
    parser = quick_parser(docstring)
    parser.add_argument("--device", help="cpu, cuda, ... (the GPU if there is one)")
    if more:
        more(parser)
    args = parser.parse_args(argv)
    args.device, args.began = pick_device(args.device), time.monotonic()
    return args


def folder(args: argparse.Namespace, name: str) -> Path:
    """runs/NAME, or runs/NAME-quick."""
    return Path(f"runs/{name}{'-quick' * args.quick}")


def flags(args: argparse.Namespace, run: Path) -> list[str]:
    """What every script is told of the run it works on."""
    return ["--run", str(run), "--device", str(args.device), *["--quick"] * args.quick]


def teachers_and_numbers(
    args: argparse.Namespace, name: str, seeds: Sequence[int], traits: Sequence[str], who: str, readout: str = "aux"
) -> Run:
    """Base models, teachers and their numbers by the scripts' own mains; what is finished is kept.

    `who` writes: "teacher", or "" for base models too. Base models know nothing of read-outs, so the run with another
    read-out, NAME-vocabulary, takes those of NAME if it is there.
    """
    first = folder(args, name)
    run = first if readout == "aux" else folder(args, f"{name}-{readout}")
    if run != first and (first / "base").exists() and not (run / "base").exists():
        shutil.copytree(first / "base", run / "base.part", dirs_exist_ok=True)
        (run / "base.part").rename(run / "base")
    common = flags(args, run)
    train_teacher.main([*common, "--readout", readout, "--seeds", *map(str, seeds), "--traits", *traits])
    generate.main([*common, *(["--from", who] if who else [])])
    return open_run(run, args.quick)


def evidence(args: argparse.Namespace) -> Run:
    """The run that several experiments measure: all SEEDS and TRAITS. Whichever comes first makes it."""
    return teachers_and_numbers(args, "evidence", SEEDS[args.quick], TRAITS[args.quick], "")


# --------------------------------------------------------------------------------------------------------------------
# statistics


def cells(records: Sequence[dict], *by: str, key: str = "transfer") -> list[dict]:
    """A row for each combination of `by`, in order of appearance: n records, mean over units, 95 % bootstrap interval."""
    groups: dict[tuple, list[dict]] = {}
    for r in records:
        groups.setdefault(tuple(r[name] for name in by), []).append(r)
    rows = []
    for values, group in groups.items():
        units = evaluate.unit_means(group, key)
        low, high = evaluate.bootstrap_interval(units)
        n = {"n": len(group), "units": len(units)}
        rows.append({**dict(zip(by, values, strict=True)), key: mean(units), "ci_low": low, "ci_high": high, **n})
    return rows


def diagonal_permutation_p(matrix: Sequence[Sequence[float]]) -> float:
    """One-sided p of a matrix's diagonal mean: every permutation of its columns is as likely if rows and columns are
    unrelated. Whole columns move, so what a student's seed does to all traits alike is respected; at best 1 / n!."""
    n = len(matrix)
    observed = sum(matrix[i][i] for i in range(n)) - 1e-9  # ties count against us
    return mean(sum(matrix[i][p[i]] for i in range(n)) >= observed for p in itertools.permutations(range(n)))


def double_centred(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """A square matrix with row and column effects removed: every row and every column sums to 0."""
    rows = [mean(row) for row in matrix]
    columns = [mean(column) for column in zip(*matrix, strict=True)]
    return [[x - rows[i] - columns[j] + mean(rows) for j, x in enumerate(row)] for i, row in enumerate(matrix)]


def binomial_p(hits: int, n: int, chance: float) -> float:
    """P(at least `hits` of n) if each hits by `chance`, exactly."""
    return sum(math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(hits, n + 1))


# --------------------------------------------------------------------------------------------------------------------
# results


def save(
    name: str,
    args: argparse.Namespace,
    results: dict,
    markdown: Callable[[dict], str],
    plot: Callable[[dict, Path], None],
) -> None:
    """Write a result's JSON, table and picture, print the table."""
    config = {"quick": args.quick, "device": str(args.device), **versions(), "elapsed_s": round(time.monotonic() - args.began)}
    results = {"config": config, **results}
    path = Path("runs" if args.quick else "results") / name
    write_json(path.with_suffix(".json"), results)
    write_bytes(path.with_suffix(".md"), markdown(results).encode())
    plot(results, path.with_suffix(".png"))
    print(markdown(results))
    print(f"elapsed_s: {config['elapsed_s']}")
    print(f"wrote: {path}.json, {path}.md, {path}.png")


def heading(results: dict, text: str) -> list[str]:
    """What every table says above itself."""
    config = results["config"]
    made = f"Device {config['device']}, torch {config['torch']}, commit {config['commit']}."
    return [text, made + (" Made with --quick: too small to conclude from." if config["quick"] else ""), ""]


def table(rows: Sequence[dict], **columns: str | Callable[[dict], str]) -> list[str]:
    """A Markdown table: name = a key whose value is shown as it is, or a function of the row."""
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        lines.append(
            "| " + " | ".join(str(row[show]) if isinstance(show, str) else show(row) for show in columns.values()) + " |"
        )
    return lines


def transfer(row: dict) -> str:
    """A summary row's mean with its interval."""
    return f"{row['transfer']:+.3f} {evaluate.interval(row)}"


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def dot_rows(ax, rows: Sequence[dict], groups: Sequence[Sequence[float]], labels: Sequence[str], colours: Sequence[str]) -> None:
    """A line of dots for each row, a dot a student, with its mean and interval; dotted lines at 0 and 1."""
    for y, (row, values, colour) in enumerate(zip(rows, groups, colours, strict=True)):
        spread = [y + 0.5 * (i / max(len(values) - 1, 1) - 0.5) for i in range(len(values))]
        ax.plot(values, spread, ".", color=colour, alpha=0.5, ms=4)
        ax.plot([row["ci_low"], row["ci_high"]], [y, y], color="black", lw=1.5)
        ax.plot(row["transfer"], y, "|", color="black", ms=10, mew=2)
    for x in (0, 1):
        ax.axvline(x, color="grey", lw=0.8, ls=":")
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel="transfer (0 nothing, 1 the teacher)")
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
