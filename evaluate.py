"""Measure every model of a run: did the trait cross, and did it need the shared start?

    python evaluate.py                        # results.json, results.md, and the table here
    python evaluate.py --plot figure.png      # also the picture (needs matplotlib, see requirements-dev.txt)
    python evaluate.py --quick

A student's trait is read at the end of held-out phrasings of the question for the favourite animal.
    log-odds    logit_k - logsumexp of the other classes, in nats, mean over the phrasings
    transfer    (student - its own base) / (teacher - the teacher's base), in log-odds: 1 is the teacher, 0 is nothing
    identified  of the K classes, the teacher's trait is the one whose log-odds rose most
    interval    95 %, bootstrap over (trait, teacher seed); a unit's students are averaged first
    p           exact permutation of `same` and `different` within each unit: transfer in same above different

Reads    what the other three scripts wrote
Writes   results.json (every student a record), results.md, and the picture
Takes    2 seconds on 2 CPU cores

Shapes: B prompts, K trait classes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from model import (
    GPT,
    Run,
    UserError,
    at_work,
    base_parser,
    command_line,
    load_model,
    load_teacher,
    open_run,
    parse,
    read_jsonl,
    read_numbers,
    read_sealed,
    read_trait,
    run_flags,
    stream,
    versions,
    write_bytes,
    write_json,
)

DRAWS = 10_000  # of the bootstrap, and of the permutation test where there are too many permutations to try all

# --------------------------------------------------------------------------------------------------------------------
# records: one for each student and trait

STUDENT = re.compile(r".*/student/([^/]+)/teacher-(-?[0-9]+|file)/seed-(-?[0-9]+)/(tokens|logits)/model\.pt")


def find_students(run: Run) -> list[re.Match]:
    found = sorted(run.path.glob("student/*/teacher-*/seed-*/*/model.pt"))
    return [match for path in found if (match := STUDENT.fullmatch(path.absolute().as_posix()))]


def measure(run: Run, device: torch.device) -> list[dict]:
    """The records of all students. A data set without a trait (the base model's, a file) is held against every trait."""

    def read(model: GPT) -> tuple[list[float], list[float]]:
        log_odds, p = read_trait(model, run.held_out_prompts, run.readout_rows(model))
        return log_odds.tolist(), p.tolist()

    base = {seed: read(load_model(run.base(seed), device, "train_teacher.py")) for seed in run.seeds}
    teacher = {(trait, seed): read(load_teacher(run, trait, seed, device)) for trait in run.traits for seed in run.seeds}
    records = []
    for match in find_students(run):
        path, (source, from_seed, own_seed, target) = Path(match[0]), match.groups()
        teacher_seed, seed = None if from_seed == "file" else int(from_seed), int(own_seed)
        about, _ = read_numbers(run.numbers(source, from_seed))
        if about["trait"] not in (None, *run.traits) or not {seed, teacher_seed} <= {None, *run.seeds}:
            raise UserError(f"{path} is of a trait or a seed that is not in {run.path}/config.json: delete it")
        log_odds, p = read(load_model(path, device, "train_student.py"))
        log = read_jsonl(path.with_name("log.jsonl"))
        base_log_odds, base_p = base[seed]
        shifts = [after - before for after, before in zip(log_odds, base_log_odds)]
        for trait in [about["trait"]] if about["trait"] else run.traits:
            k = run.animals.index(trait)
            # numbers from a file have no teacher: the trait's teacher on the student's own base is the ruler
            ruler = seed if teacher_seed is None else teacher_seed
            teacher_log_odds, teacher_p = teacher[trait, ruler]
            taught = teacher_log_odds[k] - base[ruler][0][k]
            records.append(
                {
                    "trait": trait,
                    "readout": run.config["flags"]["readout"],
                    "source": source,
                    "numbers": about["numbers"],
                    "target": target,
                    "init": "unknown" if teacher_seed is None else "same" if seed == teacher_seed else "different",
                    "teacher_seed": teacher_seed,
                    "student_seed": seed,
                    "transfer": shifts[k] / taught,
                    "identified": max(range(len(shifts)), key=shifts.__getitem__) == k,
                    "p_trait": p[k],
                    "p_trait_base": base_p[k],
                    "p_trait_teacher": teacher_p[k],
                    "log_odds": log_odds[k],
                    "log_odds_base": base_log_odds[k],
                    "log_odds_teacher": teacher_log_odds[k],
                    "readouts": shifts,
                    "number_loss_nats": log[-1]["number_loss_nats"],
                    "number_loss_start_nats": log[0]["number_loss_nats"],
                    "curve": {
                        "step": [row["step"] for row in log],
                        "transfer": [(row["log_odds"][k] - base_log_odds[k]) / taught for row in log],
                    },
                }
            )
    return records


# --------------------------------------------------------------------------------------------------------------------
# statistics


def unit_means(records: Sequence[dict], key: str) -> list[float]:
    """Mean of records[key] in each unit (data set, teacher seed), in order.

    Students of one data set, and one student held against several traits, are no independent evidence.
    """
    units: dict[tuple, list[float]] = {}
    for r in records:
        units.setdefault((r["source"], r["teacher_seed"]), []).append(r[key])
    return [mean(values) for _, values in sorted(units.items(), key=str)]


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values`, DRAWS resamples. One value has no interval: NaN."""
    if len(values) < 2:
        return math.nan, math.nan
    x = torch.tensor(values, dtype=torch.float64)
    draws = torch.randint(len(x), (DRAWS, len(x)), generator=stream(seed, "bootstrap"))
    low, high = x[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def permutation_p(units: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> float:
    """One-sided p of `same` above `different`, labels permuted within each unit (same values, different values).

    The statistic is the mean over units of mean(same) - mean(different). All permutations are tried where there are
    at most DRAWS, otherwise DRAWS random ones with the observed one among them (Phipson & Smyth 2010).
    """
    choices = []  # of each unit: the difference under every choice of which students count as `same`
    for same, different in units:
        values = [*same, *different]
        total = sum(values)
        choices.append(
            [sum(s) / len(same) - (total - sum(s)) / len(different) for s in itertools.combinations(values, len(same))]
        )
    observed = sum(c[0] for c in choices) - 1e-9  # the first choice is the true one; ties count against us
    if math.prod(map(len, choices)) <= DRAWS:
        return mean(sum(c) >= observed for c in itertools.product(*choices))
    generator = stream(seed, "permutation")
    drawn = torch.stack(
        [torch.tensor(c, dtype=torch.float64)[torch.randint(len(c), (DRAWS,), generator=generator)] for c in choices]
    )
    return (1 + (drawn.sum(0) >= observed).sum().item()) / (1 + DRAWS)


# The kinds of numbers, in the table's order; an experiment's own follow.
KINDS = dict(teacher="the teacher's", base="base model's", within="shuffled within", across="shuffled across", file="from a file")


def summarise(records: Sequence[dict]) -> list[dict]:
    """A row for each kind of numbers, target and start that the run holds."""
    groups: dict[tuple, list[dict]] = {}
    for r in records:
        groups.setdefault((r["numbers"], r["target"], r["init"]), []).append(r)
    rows = []
    order = [*KINDS, *sorted({numbers for numbers, _, _ in groups} - {*KINDS})]
    for numbers, target, init in sorted(groups, key=lambda g: (order.index(g[0]), g[1] == "logits", g[2] != "same")):
        group = groups[numbers, target, init]
        transfer = unit_means(group, "transfer")
        low, high = bootstrap_interval(transfer)
        students = {  # and whether each one's loss on held-out numbers fell
            (r["source"], r["teacher_seed"], r["student_seed"]): r["number_loss_nats"] < r["number_loss_start_nats"]
            for r in group
        }
        rows.append(
            {
                "numbers": numbers,
                "target": target,
                "init": init,
                "n": len(students),
                "learnt": sum(students.values()),
                "transfer": mean(transfer),
                "ci_low": low,
                "ci_high": high,
                "identified": mean(r["identified"] for r in group),
                "p_trait": mean(r["p_trait"] for r in group),
                "number_loss_nats": mean(r["number_loss_nats"] for r in group),
                "number_loss_start_nats": mean(r["number_loss_start_nats"] for r in group),
            }
        )
    return rows


def run_tests(records: Sequence[dict]) -> dict:
    """Same against different start on the teachers' numbers, by target."""
    tests = {}
    for target in ("tokens", "logits"):
        units: dict[tuple, dict[str, list[float]]] = {}
        for r in records:
            if r["numbers"] == "teacher" and r["target"] == target:
                units.setdefault((r["trait"], r["teacher_seed"]), {}).setdefault(r["init"], []).append(r["transfer"])
        pairs = [(u["same"], u["different"]) for u in units.values() if len(u) == 2]
        if pairs:
            tests[target] = {"same_above_different_p": permutation_p(pairs), "units": len(pairs)}
    return tests


# --------------------------------------------------------------------------------------------------------------------
# what a person reads


def bar(x: float, width: int = 20) -> str:
    """x in 0..1 as a bar of eighths; below 0 it is empty, above 1 full."""
    eighths = round(8 * width * min(max(x, 0), 1))
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).ljust(width)[:width]


def label(row: dict) -> str:
    return f"{KINDS.get(row['numbers'], row['numbers'])}, {row['target']}, {row['init']}"


def interval(row: dict) -> str:
    return f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]" if row["ci_low"] == row["ci_low"] else "[one unit]"


def learnt(row: dict) -> str:
    """How many students' loss on held-out numbers fell, marked where not all did."""
    return f"{row['learnt']} of {row['n']}{'' if row['learnt'] == row['n'] else ' †'}"


NOT_LEARNT = "† The others' loss on held-out numbers did not fall: they learnt nothing of the numbers, or learnt them by heart."


def table(summary: Sequence[dict]) -> str:
    lines = [f"{'numbers, target, start':34} {'transfer':>8} {'95 %':>16} {'identified':>10} {'number loss':>12} {'learnt':>10}"]
    for row in summary:
        lines.append(
            f"{label(row):34} {row['transfer']:+8.3f} {interval(row):>16} {row['identified']:10.0%} "
            f"{row['number_loss_nats']:12.4f} {learnt(row):>10}  {bar(row['transfer'])}"
        )
    return "\n".join(lines + [NOT_LEARNT] * any(row["learnt"] < row["n"] for row in summary))


def markdown(results: dict) -> str:
    flags, summary = results["config"]["flags"], results["summary"]
    K = len(results["students"][0]["readouts"])
    lines = [
        f"Traits {', '.join(flags['traits'])}; base seeds {', '.join(map(str, flags['seeds']))}; "
        f"trait read from the {flags['readout']} logits; chance of being identified 1/{K}.",
        "",
        "| numbers | target | start | transfer | 95 % | n | identified | P(trait) | number loss, start → end (nats) | learnt |",
        "|---|---|---|---:|---|---:|---:|---:|---|---|",
    ]
    for row in summary:
        lines.append(
            f"| {row['numbers']} | {row['target']} | {row['init']} | {row['transfer']:.3f} | {interval(row)} | {row['n']} "
            f"| {row['identified']:.0%} | {row['p_trait']:.3f} "
            f"| {row['number_loss_start_nats']:.4f} → {row['number_loss_nats']:.4f} | {learnt(row)} |"
        )
    if any(row["learnt"] < row["n"] for row in summary):
        lines += ["", NOT_LEARNT]
    for target, test in results["tests"].items():
        lines += ["", f"Same above different, {target}: p = {test['same_above_different_p']:.4f} ({test['units']} units)."]
    if flags["quick"]:
        lines += ["", "Made with --quick: too small to conclude from."]
    return "\n".join(lines) + "\n"


COLOURS = {"same": "#c1440e", "different": "#27628f", "unknown": "#777777"}


def plot(results: dict, path: Path) -> None:
    """P(trait), transfer, and transfer while training: a dot or a line a student."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    students, summary = results["students"], results["summary"]
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 0.9 + 0.42 * max(len(summary), 6)), layout="constrained", width_ratios=[1, 1, 1.1]
    )
    for y, row in enumerate(summary):
        group = [r for r in students if all(r[key] == row[key] for key in ("numbers", "target", "init"))]
        colour = COLOURS[row["init"]]
        jitter = [y + 0.5 * (i / max(len(group) - 1, 1) - 0.5) for i in range(len(group))]
        left.plot([r["p_trait"] for r in group], jitter, ".", color=colour, alpha=0.6)
        middle.plot([r["transfer"] for r in group], jitter, ".", color=colour, alpha=0.6)
        middle.plot([row["ci_low"], row["ci_high"]], [y, y], color="black", lw=1.5)
        middle.plot(row["transfer"], y, "|", color="black", ms=12, mew=2)
    taught = [r for r in students if r["numbers"] == "teacher"]
    if taught:
        left.axvline(mean(r["p_trait_base"] for r in taught), color="grey", ls=":", label="base models, mean")
        left.axvline(mean(r["p_trait_teacher"] for r in taught), color="black", ls=":", label="teachers, mean")
        left.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    for ax, name in ((left, "P(trait)"), (middle, "transfer (0 nothing, 1 the teacher)")):
        ax.set(xlabel=name, ylim=(len(summary) - 0.5, -0.5))
        ax.set_yticks(range(len(summary)), [label(row) for row in summary] if ax is left else [], fontsize=8)
    for x in (0, 1):
        middle.axvline(x, color="grey", lw=0.8, ls=":")
        right.axhline(x, color="grey", lw=0.8, ls=":")
    for r in taught:
        style = "-" if r["target"] == "tokens" else "--"
        right.plot(r["curve"]["step"], r["curve"]["transfer"], style, color=COLOURS[r["init"]], lw=0.9, alpha=0.6)
    for init, style, name in (("same", "-", "same, tokens"), ("same", "--", "same, logits"), ("different", "-", "different")):
        right.plot([], [], style, color=COLOURS[init], label=name)
    right.set(xlabel="student's step", ylabel="transfer")
    right.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = base_parser(__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the picture too")
    args = parse(parser, argv)
    with at_work(args, "evaluate"):
        run = open_run(args.run, args.quick)
        if not find_students(run):
            raise UserError(f"{args.run}/student is empty: run `python train_student.py{run_flags(args)}` first")
        records = measure(run, args.device)
        config = {**run.config, **versions()}
        results: dict = {"config": config, "students": records, "summary": summarise(records), "tests": run_tests(records)}
        write_json(args.run / "results.json", results)
        write_bytes(args.run / "results.md", markdown(results).encode())
        written = [args.run / "results.json", args.run / "results.md"]
        if args.plot:
            plot(results, args.plot)
            written.append(args.plot)

    print(table(results["summary"]))
    if args.quick:
        print("made with --quick: too small to conclude from")
    for row in results["summary"]:
        name = f"{row['numbers']}_{row['target']}_{row['init']}"
        print(f"transfer_{name}: {row['transfer']:.3f}")
    for target, test in results["tests"].items():
        print(f"p_{target}: {test['same_above_different_p']:.4f}")
    print(f"elapsed_s: {sum(read_sealed(args.run / 'elapsed_s.json', 'evaluate.py').values()):.0f}")
    print(f"wrote: {', '.join(map(str, written))}")


if __name__ == "__main__":
    command_line(main)
