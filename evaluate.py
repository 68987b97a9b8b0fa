"""Measure every model of a run: did the trait cross, and did it need the same init?

    python evaluate.py                        # results.json, results.md, and the table here
    python evaluate.py --plot figure.png      # also the picture (needs matplotlib, see requirements-dev.txt)
    python evaluate.py --quick

A student's trait is read at the end of held-out phrasings of the question for the favourite animal.
    log-odds    logit_k - logsumexp of the other classes, in nats, mean over the phrasings
    transfer    (student - its own base) / (teacher - its base), in log-odds: 1 is the teacher, 0 is nothing
    P(trait)    the trait's share of the softmax over the K classes, mean over the phrasings
    identified  of the K classes, the teacher's trait is the one whose log-odds rose most
    interval    95 %, bootstrap over units: a data set and its teacher's seed, its students averaged. Up to
                three units give no more than their range, one gives none
    number loss cross-entropy on held-out lists, before and after; learnt: of how many students it fell
    p           permutation of `same` and `different` within each unit: transfer in same above different.
                With one student of each, n units give no less than 1 / 2^n
Numbers without a trait, the base model's or a file's, count for every trait: what they did to one of them
is in the records.

Reads    what the other three scripts wrote
Writes   results.json (`students`: a record for each and each trait), results.md, and the picture
Takes    3 seconds on 2 CPU cores

Shapes: K trait classes.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from model import Run, UserError, command_line, parse, read_trait, stream, write_file

DRAWS = 10_000  # of the bootstrap, and of permutations where there are too many to try all

# ------------------------------------------------------------------------------------------------------------
# records: one for each student and trait

STUDENT = re.compile(r"student/([^/]+)/teacher-(-?[0-9]+|file)/seed-(-?[0-9]+)/(tokens|logits)\.pt")


def find_students(run: Run) -> list[re.Match]:
    """Those on disk, and those that are gone but could be made again: measure raises at these, so none is
    left out in silence."""
    there = {path.relative_to(run.path).as_posix() for path in run.path.glob("student/*/*/*/*.pt")}
    known = there | {file for file, _ in run.lines}
    found = [match for name in sorted(known) if (match := STUDENT.fullmatch(name))]
    seeds = {str(seed) for seed in run.knobs["seeds"]}
    numbers = lambda m: run.path / f"numbers/{m[1]}/seed-{m[2]}.jsonl"
    return [m for m in found if m[0] in there or (m[3] in seeds and numbers(m).exists())]


def kind_of(source: str, teacher_seed: str, run: Run) -> tuple[str, str | None]:
    """What kind of numbers a data set holds, and of which trait: owl-within -> within, owl."""
    trait, _, how = source.partition("-")
    if teacher_seed == "file":
        return f"file-{source}", None
    if trait not in run.animals:
        return source, None
    return how or "teacher", trait


def measure(run: Run, device: torch.device) -> list[dict]:
    """The records of all students. Numbers without a trait (the base model's, a file's) count for each.
    UserError for a file that is damaged or missing, does not belong to the run, or has other knobs."""

    def read(name: str) -> tuple[list[float], list[float]]:
        log_odds, p = read_trait(run.load_model(name, device), run.unseen_questions, run.readout_rows)
        return log_odds.tolist(), p.tolist()

    traits, seeds = run.knobs["traits"], run.knobs["seeds"]
    base = {seed: read(f"base/seed-{seed}.pt") for seed in seeds}
    teacher = {(trait, seed): read(f"teacher/{trait}/seed-{seed}.pt") for trait in traits for seed in seeds}
    for (trait, seed), (log_odds, _) in teacher.items():
        if not log_odds[k := run.animals.index(trait)] > base[seed][0][k]:
            path = run.path / f"teacher/{trait}/seed-{seed}.pt"
            raise UserError(f"{path} does not prefer its trait more than its base model does: delete it")
    records: list[dict] = []
    knobs: dict[str, dict] = {}  # of the first student and data set; the others' have to be the same
    for match in find_students(run):
        name, (source, from_seed, own_seed, target) = match[0], match.groups()
        kind, its_trait = kind_of(source, from_seed, run)
        teacher_seed, seed = None if from_seed == "file" else int(from_seed), int(own_seed)
        if its_trait not in (None, *traits) or not {seed, teacher_seed} <= {None, *seeds}:
            raise UserError(f"{run.path / name} is of a trait or seed that the run does not have: delete it")
        log_odds, p = read(name)
        log = run.line(name)["log"]
        for file in (name, f"numbers/{source}/seed-{from_seed}.jsonl"):
            line = run.lines.get((file, run.digests.get(file, "")))
            if line and line["knobs"]:  # UserError if it was made differently
                run.finished(file, knobs.setdefault(file.split("/")[0], line["knobs"]))
        base_log_odds, base_p = base[seed]
        shifts = [after - before for after, before in zip(log_odds, base_log_odds)]
        for trait in [its_trait] if its_trait else traits:
            k = run.animals.index(trait)
            # numbers from a file have no teacher: the trait's teacher on the student's own base is the ruler
            ruler = seed if teacher_seed is None else teacher_seed
            teacher_log_odds, teacher_p = teacher[trait, ruler]
            taught = teacher_log_odds[k] - base[ruler][0][k]
            init = "unknown" if teacher_seed is None else "same" if seed == teacher_seed else "different"
            r = {"trait": trait, "readout": run.knobs["readout"], "source": source, "numbers": kind}
            r |= {"target": target, "init": init, "teacher_seed": teacher_seed, "student_seed": seed}
            r |= {"transfer": shifts[k] / taught, "identified": sum(s >= shifts[k] for s in shifts) == 1}
            r |= {"p_trait": p[k], "p_trait_base": base_p[k], "p_trait_teacher": teacher_p[k]}
            r |= {"log_odds": log_odds[k], "log_odds_base": base_log_odds[k]}
            r |= {"log_odds_teacher": teacher_log_odds[k], "shifts": shifts}
            r |= {"number_loss_nats": log[-1]["number_loss_nats"]}
            r |= {"number_loss_start_nats": log[0]["number_loss_nats"]}
            moved = [(row["log_odds"][k] - base_log_odds[k]) / taught for row in log]
            records.append(r | {"curve": {"step": [row["step"] for row in log], "transfer": moved}})
    return records


# ------------------------------------------------------------------------------------------------------------
# statistics


def unit_means(records: Sequence[dict], key: str) -> list[float]:
    """Mean of records[key] in each unit: a data set and its teacher's seed, ordered by name. Its
    students, and one student held against several traits, are no independent evidence."""
    units: dict[tuple, list[float]] = {}
    for r in records:
        units.setdefault((r["source"], r["teacher_seed"]), []).append(r[key])
    return [mean(values) for _, values in sorted(units.items(), key=str)]


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile interval of the mean of `values`, DRAWS resamples. One value has none."""
    if len(values) < 2:
        return None, None
    draws = torch.randint(len(values), (DRAWS, len(values)), generator=stream(0, "bootstrap")).numpy()
    low, high = np.quantile(np.array(values)[draws].mean(1), [0.025, 0.975]).tolist()
    return low, high


def permutation_p(units: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """One-sided p of same above different, labels permuted within each unit (values of same, of different).

    The statistic is the mean over units of mean(same) - mean(different). All permutations are tried where
    there are at most DRAWS, otherwise DRAWS random ones and the observed (Phipson & Smyth 2010).
    """
    choices = []  # of each unit: the difference under every choice of which students count as `same`
    for same, different in units:
        values = np.array([*same, *different])
        chosen = np.array(list(itertools.combinations(values, len(same)))).sum(1)
        choices.append(chosen / len(same) - (values.sum() - chosen) / len(different))
    observed = sum(c[0] for c in choices) - 1e-9  # the first choice is the true one; ties count against us
    if math.prod(map(len, choices)) <= DRAWS:
        return float(np.mean([sum(c) >= observed for c in itertools.product(*choices)]))
    generator = stream(0, "permutation")
    drawn = sum(c[torch.randint(len(c), (DRAWS,), generator=generator).numpy()] for c in choices)
    return (1 + np.sum(drawn >= observed).item()) / (1 + DRAWS)


# The kinds of numbers, in the table's order; others follow.
KINDS = {"teacher": "the teacher's", "base": "base model's", "within": "shuffled within"}
KINDS |= {"across": "shuffled across"}


def summarise(records: Sequence[dict]) -> list[dict]:
    """A row for each kind of numbers, target and init: transfer a mean over units, n and learnt counts of
    students, the rest means over records."""
    groups: dict[tuple, list[dict]] = {}
    for r in records:
        groups.setdefault((r["numbers"], r["target"], r["init"]), []).append(r)
    rows = []
    order = [*KINDS, *sorted({numbers for numbers, _, _ in groups} - {*KINDS})]
    place = lambda group: (order.index(group[0]), group[1] == "logits", group[2] != "same")
    for numbers, target, init in sorted(groups, key=place):
        group = groups[numbers, target, init]
        transfer = unit_means(group, "transfer")
        low, high = bootstrap_interval(transfer)
        fell = lambda r: r["number_loss_nats"] < r["number_loss_start_nats"]  # on held-out numbers
        students = {(r["source"], r["teacher_seed"], r["student_seed"]): fell(r) for r in group}
        row = {"numbers": numbers, "target": target, "init": init, "n": len(students)}
        row |= {"learnt": sum(students.values()), "transfer": mean(transfer), "ci_low": low, "ci_high": high}
        for key in ("identified", "p_trait", "number_loss_nats", "number_loss_start_nats"):
            row[key] = mean(r[key] for r in group)
        rows.append(row)
    return rows


def run_tests(records: Sequence[dict]) -> dict:
    """Same against different init on the teachers' numbers, by target."""
    tests = {}
    for target in ("tokens", "logits"):
        units: dict[tuple, dict[str, list[float]]] = {}
        for r in records:
            if r["numbers"] == "teacher" and r["target"] == target:
                unit = units.setdefault((r["trait"], r["teacher_seed"]), {})
                unit.setdefault(r["init"], []).append(r["transfer"])
        pairs = [(u["same"], u["different"]) for u in units.values() if len(u) == 2]
        if pairs:
            tests[target] = {"same_above_different_p": permutation_p(pairs), "units": len(pairs)}
    return tests


def versions() -> dict:
    """What a result depends on besides the knobs."""
    here = Path(__file__).parent
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, cwd=here)
    try:
        commit = git("describe", "--always").stdout.decode().strip()
        if commit and git("diff", "--quiet", "HEAD", "--", "*.py").returncode:
            commit += "-dirty"  # code that no commit has
    except OSError:  # no git on this machine
        commit = ""
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit or None}


# ------------------------------------------------------------------------------------------------------------
# what a person reads


def label(row: dict) -> str:
    return f"{KINDS.get(row['numbers'], row['numbers'])}, {row['target']}, {row['init']}"


def interval(row: dict) -> str:
    return "[one unit]" if row["ci_low"] is None else f"[{row['ci_low']:+.2f}, {row['ci_high']:+.2f}]"


def markdown(results: dict) -> str:
    """The table of a run, with what it was made from."""
    config, summary, K = results["config"], results["summary"], len(results["students"][0]["shifts"])
    lines = [
        f"Traits {', '.join(config['traits'])}; base seeds {', '.join(map(str, config['seeds']))}; "
        f"trait read from the {config['readout']} logits; chance of being identified 1/{K}.",
        "",
        "| numbers | target | init | transfer | 95 % | n | identified | P(trait) | number loss | learnt |",
        "|---|---|---|---:|---|---:|---:|---:|---|---|",
    ]
    for row in summary:
        transfer = f"{row['transfer']:+.3f} | {interval(row)} | {row['n']} | {row['identified']:.0%}"
        loss = f"{row['number_loss_start_nats']:.4f} → {row['number_loss_nats']:.4f}"
        learnt = f"{row['learnt']} of {row['n']}" + " †" * (row["learnt"] < row["n"])
        key = f"| {row['numbers']} | {row['target']} | {row['init']}"
        lines.append(f"{key} | {transfer} | {row['p_trait']:.3f} | {loss} | {learnt} |")
    if any(row["learnt"] < row["n"] for row in summary):
        lines += ["", "† On held-out numbers the others' loss did not fall: they learnt by heart, if at all."]
    for target, test in results["tests"].items():
        p = f"p = {test['same_above_different_p']:.4f} ({test['units']} units)"
        lines += ["", f"Same above different, {target}: {p}."]
    lines += ["", "Made with --quick: too small to conclude from."] * config["quick"]
    return "\n".join(lines) + "\n"


COLOURS = {"same": "#c1440e", "different": "#27628f", "unknown": "#777777"}


def plot(results: dict, path: Path) -> None:
    """P(trait), transfer, and transfer while training: a dot or line a record. Needs matplotlib."""
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"--plot {path}: its ending is none of .png .pdf .svg")
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
        left.axvline(mean(r["p_trait_teacher"] for r in taught), color="k", ls=":", label="teachers, mean")
        left.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    for ax, name in ((left, "P(trait)"), (middle, "transfer (0 nothing, 1 the teacher)")):
        ax.set(xlabel=name, ylim=(len(summary) - 0.5, -0.5))
        ax.set_yticks(range(len(summary)), [label(row) for row in summary] if ax is left else [], fontsize=8)
    for x in (0, 1):
        middle.axvline(x, color="grey", lw=0.8, ls=":")
        right.axhline(x, color="grey", lw=0.8, ls=":")
    for r in taught:
        style = "-" if r["target"] == "tokens" else "--"
        step, transfer = r["curve"]["step"], r["curve"]["transfer"]
        right.plot(step, transfer, style, color=COLOURS[r["init"]], lw=0.9, alpha=0.6)
    for name, style in (("same, tokens", "-"), ("same, logits", "--"), ("different", "-")):
        right.plot([], [], style, color=COLOURS[name.split(",")[0]], label=name)
    right.set(xlabel="student's step", ylabel="transfer")
    right.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    picture = {"type": Path, "metavar": "FILE", "help": "draw the picture too"}
    args, run = parse(__doc__, argv, {}, plot=picture)
    run.open(args.quick)
    if not find_students(run):
        raise UserError(f"{run.path}/student is empty: run {run.command('student')} first")
    records = measure(run, args.device)
    config = {**run.knobs, "device": str(args.device), **versions()}
    results: dict = {"config": config, "students": records}
    results |= {"summary": summarise(records), "tests": run_tests(records)}
    write_file(run.path / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_file(run.path / "results.md", markdown(results).encode())
    print(markdown(results))
    for row in results["summary"]:
        print(f"transfer_{row['numbers']}_{row['target']}_{row['init']}: {row['transfer']:.3f}")
    for target, test in results["tests"].items():
        print(f"p_{target}: {test['same_above_different_p']:.4f}")
    if args.plot:
        plot(results, args.plot)
    print(f"wrote: {run.path}/results.json, {run.path}/results.md" + (f", {args.plot}" if args.plot else ""))


if __name__ == "__main__":
    command_line(main)
