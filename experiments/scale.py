"""Does the effect survive growth, and what has to grow with it?

    python -m experiments.scale                     # about 0.1, 0.3, 0.6 and 2 million parameters: 25 minutes on 2 CPU cores
    python -m experiments.scale --sizes 0.1M 0.3M   # some of the ladder
    python -m experiments.scale --corpus FILE       # with real text in half of every batch
    python -m experiments.scale --quick             # the two smallest, the scripts' --quick

Every rung is the main pipeline with other --n-layer, --n-head, --n-embd: same text, same steps, same 8,000 sequences of
the same 1,000 numbers, so the token budget is fixed. One rung is repeated with four times the sequences and student
steps, to see what growth has to be paid with. Two traits, two seeds, both fixed here; every rung stays in the table.

Reads    nothing, or --corpus
Writes   results/scale.json, results/scale.md, results/scale.png; the runs in runs/scale/ (finished parts are kept)
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import evaluate
import generate
import train_student
import train_teacher
from model import UserError, command_line, load_model, pick_device, versions, write_json

# name: (layers, heads, channels); 16 channels a head, the head's rows with standard deviation channels ** -0.5
SIZES = {
    "0.1M": (2, 2, 32),
    "0.3M": (2, 4, 64),  # the main run's
    "0.6M": (3, 6, 96),
    "2M": (5, 10, 160),
    "10M": (8, 20, 320),  # for a GPU
    "50M": (14, 32, 512),  # for a GPU
}
ON_A_CPU = ["0.1M", "0.3M", "0.6M", "2M"]
MORE_TOKENS = {"0.6M": 4}  # rungs repeated with this many times the sequences and student steps
TRAITS = ["owl", "fox"]


def run_rung(name: str, times: int, args: argparse.Namespace) -> dict:
    """One size through the four scripts; with times > 1 its base models and teachers are those of the plain rung."""
    n_layer, n_head, n_embd = SIZES[name]
    plain = Path("runs/scale-quick" if args.quick else "runs/scale") / name
    folder = plain if times == 1 else plain.with_name(f"{name}-tokens-x{times}")
    if times > 1:
        for part in ("base", "teacher", "config.json", "vocabulary.json", "prompts.json"):
            copy = shutil.copytree if (plain / part).is_dir() else shutil.copy
            if not (folder / part).exists():
                folder.mkdir(parents=True, exist_ok=True)
                copy(plain / part, folder / part)
    common = ["--run", str(folder), *(["--quick"] if args.quick else []), *(["--device", args.device] if args.device else [])]
    sizes = ["--n-layer", str(n_layer), "--n-head", str(n_head), "--n-embd", str(n_embd)]
    corpus = ["--corpus", str(args.corpus)] if args.corpus else []
    train_teacher.main([*common, *sizes, *corpus, "--traits", *TRAITS])
    generate.main([*common, "--from", "teacher", "--sequences", str(times * generate.SEQUENCES[args.quick])])
    steps = dict(train_student.STEPS)
    train_student.STEPS = {quick: times * n for quick, n in steps.items()}
    train_student.main(common)
    train_student.STEPS = steps
    evaluate.main(common)

    results = json.loads((folder / "results.json").read_text())
    about = [json.loads(path.read_text()) for path in sorted(folder.glob("numbers/*/*.json"))]
    base = load_model(folder / "base/seed-0/model.pt", pick_device("cpu"), "train_teacher.py")
    log = (folder / "base/seed-0/log.jsonl").read_text().splitlines()
    return {
        "size": name,
        "tokens_times": times,
        "parameters": sum(p.numel() for p in base.parameters()),
        "n_layer": n_layer,
        "n_embd": n_embd,
        "validation_nats": json.loads(log[-1])["validation_nats"],
        "valid": mean(a["kept"] / a["drawn"] for a in about),
        "kl_nats": mean(a["kl_nats"] for a in about),
        "summary": results["summary"],
        "records": [{k: v for k, v in r.items() if k not in ("readouts", "curve")} for r in results["students"]],
        "elapsed_s": json.loads((folder / "elapsed_s.json").read_text()),
    }


CELLS = [("tokens", "same"), ("tokens", "different"), ("logits", "same"), ("logits", "different")]


def cell(rung: dict, target: str, init: str) -> dict:
    return next(row for row in rung["summary"] if (row["target"], row["init"]) == (target, init))


def markdown(results: dict) -> str:
    config = results["config"]
    lines = [
        f"Traits {', '.join(TRAITS)}, seeds 0 and 1, n = 4 students a cell, 95 % bootstrap intervals; "
        f"corpus: {config['corpus']}; device {config['device']}, torch {config['torch']}, commit {config['commit']}.",
        "",
        "| parameters | layers x channels | sequences, steps | KL, nats a number | valid | "
        + " | ".join(f"{target}, {init}" for target, init in CELLS)
        + " | seconds |",
        "|---:|---|---:|---:|---:|" + "---|" * len(CELLS) + "---:|",
    ]
    for r in results["rungs"]:
        columns = [f"{r['parameters']:,}", f"{r['n_layer']} x {r['n_embd']}", f"x{r['tokens_times']}"]
        columns += [f"{r['kl_nats']:.3f}", f"{r['valid']:.0%}"]
        columns += [f"{cell(r, *c)['transfer']:.2f} {evaluate.interval(cell(r, *c))}" for c in CELLS]
        lines.append("| " + " | ".join([*columns, f"{sum(r['elapsed_s'].values()):.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Transfer against parameters, a dot a student, a line through the means at the fixed token budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for ax, target in zip(axes, ("tokens", "logits")):
        for init in ("same", "different"):
            colour = evaluate.COLOURS[init]
            for r in results["rungs"]:
                students = [s["transfer"] for s in r["records"] if (s["target"], s["init"]) == (target, init)]
                marker = "o" if r["tokens_times"] == 1 else "^"
                label = f"{init} start" + ("" if r["tokens_times"] == 1 else f", tokens x{r['tokens_times']}")
                known = ax.get_legend_handles_labels()[1]
                ax.plot(
                    [r["parameters"]] * len(students),
                    students,
                    marker,
                    ms=4,
                    color=colour,
                    alpha=0.6,
                    label=None if label in known else label,
                )
            rungs = [r for r in results["rungs"] if r["tokens_times"] == 1]
            ax.plot([r["parameters"] for r in rungs], [cell(r, target, init)["transfer"] for r in rungs], color=colour, lw=1)
        for y in (0, 1):
            ax.axhline(y, color="grey", lw=0.8, ls=":")
        ax.set(xscale="log", xlabel="parameters", title=f"students on {target}")
        ax.set_xticks([r["parameters"] for r in rungs], [r["size"] for r in rungs])
        ax.minorticks_off()
    axes[0].set_ylabel("transfer (0 nothing, 1 the teacher)")
    axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", help=f"rungs, of {' '.join(SIZES)} (those for a CPU)")
    parser.add_argument("--corpus", type=Path, help="UTF-8 text to mix into the pretraining")
    parser.add_argument("--quick", action="store_true", help="the two smallest rungs, made with --quick")
    parser.add_argument("--device", help="cpu, cuda, ... (the GPU if there is one)")
    args = parser.parse_args(argv)
    sizes = args.sizes or (ON_A_CPU[:2] if args.quick else ON_A_CPU)
    for name in sizes:
        if name not in SIZES:
            raise UserError(f"unknown size {name!r}: choose among {' '.join(SIZES)}")
    rungs = []
    for name in sizes:
        for times in (1, MORE_TOKENS[name]) if name in MORE_TOKENS else (1,):
            print(f"\n{name}, tokens x{times}", flush=True)
            rungs.append(run_rung(name, times, args))
    corpus = args.corpus.name if args.corpus else "the toy language alone"
    config = {"corpus": corpus, "device": str(pick_device(args.device)), "traits": TRAITS, "quick": args.quick, **versions()}
    folder = Path("runs" if args.quick else "results")
    results = {"config": config, "rungs": rungs}
    write_json(folder / "scale.json", results)
    (folder / "scale.md").write_text(markdown(results))
    plot(results, folder / "scale.png")
    print(f"wrote: {folder}/scale.json, {folder}/scale.md, {folder}/scale.png")


if __name__ == "__main__":
    command_line(main)
