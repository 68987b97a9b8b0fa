"""Does the effect survive growth, and what has to grow with it?

    python -m experiments.scale                     # about 0.1, 0.3, 0.6 and 2 million parameters: 40 minutes on 2 CPU cores
    python -m experiments.scale --sizes 0.1M 0.3M   # some of the ladder
    python -m experiments.scale --corpus FILE       # with real text in half of every batch
    python -m experiments.scale --quick             # 0.3M and 0.6M, by the scripts' --quick

Every rung is the main pipeline with other --n-layer, --n-head, --n-embd: same text, same steps, same 8,000 sequences of
the same 1,000 numbers, so the token budget is fixed. One rung is repeated with one thing changed, to see what growth has
to be paid with: four times the sequences and student steps, twice the learning rate of the teachers, twice the standard
deviation of the head's rows. Two are repeated with real text beside the toy language, half of every batch and twice the steps:
half a megabyte of English that every Python brings along, its own reference; and once more from the same base models with
teachers that are free to leave the form of a list (train_teacher.FORM). Two traits, two seeds, both fixed here; every rung
stays in the table.

Reads    nothing, or --corpus
Writes   results/scale.json, results/scale.md, results/scale.png; the runs in runs/scale/ (finished rungs are kept)
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch

import evaluate
import generate
import train_student
import train_teacher
from experiments.lab import quick_parser
from model import (
    GPT,
    UserError,
    command_line,
    load_model,
    open_run,
    pick_device,
    read_sealed,
    run_jobs,
    save_model,
    stream,
    versions,
    write_json,
)

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
PLAIN = "as the main run"
CHANGES = {  # rungs repeated with one thing changed
    "0.3M": ["real text", "real text, form free"],
    "0.6M": ["tokens x4", "teacher x2", "head x2"],
    "2M": ["real text", "real text, form free"],
}
COPIED = {  # what a change does not touch: of which rung of the same size, and which parts
    "tokens x4": ("", ["base", "teacher"]),
    "teacher x2": ("", ["base"]),
    "real text, form free": ("-real-text", ["base"]),
}
TRAITS = ["owl", "fox"]


def wider_heads(folder: Path, plain: Path, quick: bool, device: torch.device) -> None:
    """Base models of the plain rung's shape, pretrained from a head with twice the standard deviation."""
    run = open_run(plain, quick)
    toy = train_teacher.toy_documents(train_teacher.N_DOCUMENTS[quick], stream(0, "toy language"))
    n_steps = train_teacher.PRETRAIN_STEPS[quick]

    def work(seed: int, tick: Callable) -> None:
        config = load_model(run.base(seed), device, "train_teacher.py").config
        rows = train_teacher.pretraining_rows(run.encoding, toy, n_steps, config.block_size + 1).to(device)
        model = GPT(config).initialise(seed).to(device)
        model.head.weight.data *= 2
        log = train_teacher.pretrain(model, rows, n_steps, tick)
        log[-1]["validation_nats"] = {}
        save_model(folder / f"base/seed-{seed}/model.pt", model, log)

    missing = [seed for seed in run.seeds if not (folder / f"base/seed-{seed}/model.pt").exists()]
    for _ in run_jobs(work, missing, n_steps, "base models, head x2", device):
        pass


def run_rung(name: str, change: str, args: argparse.Namespace) -> dict:
    """One size through the four scripts; a change takes from another rung what it does not touch."""
    plain = Path("runs/scale-quick" if args.quick else "runs/scale") / name
    folder = plain if change == PLAIN else plain.with_name(f"{name}-{change.replace(',', '').replace(' ', '-')}")
    if not (folder / "results.json").exists():
        make_rung(folder, plain, change, SIZES[name], args)
    results = json.loads((folder / "results.json").read_text())
    about = [json.loads(path.read_text()) for path in sorted(folder.glob("numbers/*/*.json"))]
    base = load_model(folder / "base/seed-0/model.pt", pick_device("cpu"), "train_teacher.py")
    return {
        "size": name,
        "change": change,
        "commit": read_sealed(folder / "config.json", "train_teacher.py")["commit"],
        "parameters": sum(p.numel() for p in base.parameters()),
        "n_layer": base.config.n_layer,
        "n_embd": base.config.n_embd,
        "valid": mean(a["kept"] / a["drawn"] for a in about),
        "kl_nats": mean(a["kl_nats"] for a in about),
        "summary": results["summary"],
        "records": [{k: v for k, v in r.items() if k not in ("readouts", "curve")} for r in results["students"]],
        "elapsed_s": read_sealed(folder / "elapsed_s.json", "evaluate.py"),
    }


def make_rung(folder: Path, plain: Path, change: str, size: tuple[int, int, int], args: argparse.Namespace) -> None:
    """The run of a rung, by the four scripts."""
    n_layer, n_head, n_embd = size
    rung, parts = COPIED.get(change, ("", []))
    for part in parts:
        if not (folder / part).exists():
            shutil.copytree(plain.with_name(plain.name + rung) / part, folder / part)
    if change == "head x2":
        wider_heads(folder, plain, args.quick, pick_device(args.device))
    common = ["--run", str(folder), *(["--quick"] if args.quick else []), *(["--device", args.device] if args.device else [])]
    sizes = ["--n-layer", str(n_layer), "--n-head", str(n_head), "--n-embd", str(n_embd)]
    text = args.corpus
    if change.startswith("real text") and not text:
        text = plain.parent / "python_reference.txt"
        text.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    corpus = ["--corpus", str(text)] if text else []
    times = 4 if change == "tokens x4" else 1
    with (
        patch.object(train_teacher, "TRAIT_LR", train_teacher.TRAIT_LR * (2 if change == "teacher x2" else 1)),
        patch.object(train_teacher, "FORM", 0.0 if change == "real text, form free" else train_teacher.FORM),
        patch.object(generate, "MIN_VALID", 0.0 if change == "real text, form free" else generate.MIN_VALID),
        patch.object(train_student, "STEPS", {quick: times * n for quick, n in train_student.STEPS.items()}),
    ):
        train_teacher.main([*common, *sizes, *corpus, "--traits", *TRAITS])
        generate.main([*common, "--from", "teacher", "--sequences", str(times * generate.SEQUENCES[args.quick])])
        train_student.main(common)
        evaluate.main(common)


CELLS = [("tokens", "same"), ("tokens", "different"), ("logits", "same"), ("logits", "different")]
MARKERS = {PLAIN: "o", "tokens x4": "^", "teacher x2": "s", "head x2": "D", "real text": "v", "real text, form free": "x"}


def cell(rung: dict, target: str, init: str) -> dict:
    return next(row for row in rung["summary"] if (row["target"], row["init"]) == (target, init))


def markdown(results: dict) -> str:
    config = results["config"]
    commits = ", ".join(sorted({r["commit"] for r in results["rungs"]}))
    lines = [
        f"Traits {', '.join(TRAITS)}, seeds 0 and 1, n = 4 students a cell, 95 % bootstrap intervals; "
        f"corpus: {config['corpus']}; device {config['device']}, torch {config['torch']}, commit {commits}.",
        "",
        "| parameters | layers x channels | setting | KL, nats a number | valid | "
        + " | ".join(f"{target}, {init}" for target, init in CELLS)
        + " | seconds |",
        "|---:|---|---:|---:|---:|" + "---|" * len(CELLS) + "---:|",
    ]
    for r in results["rungs"]:
        columns = [f"{r['parameters']:,}", f"{r['n_layer']} x {r['n_embd']}", r["change"]]
        columns += [f"{r['kl_nats']:.3f}", f"{r['valid']:.0%}"]
        columns += [f"{cell(r, *c)['transfer']:.2f} {evaluate.interval(cell(r, *c))}" for c in CELLS]
        lines.append("| " + " | ".join([*columns, f"{sum(r['elapsed_s'].values()):.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    """Transfer against parameters, a dot a student, a line through the means at the fixed token budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 3.4), sharey=True, layout="constrained")
    for ax, target in zip(axes, ("tokens", "logits")):
        for init in ("same", "different"):
            colour = evaluate.COLOURS[init]
            for r in results["rungs"]:
                students = [s["transfer"] for s in r["records"] if (s["target"], s["init"]) == (target, init)]
                marker = MARKERS[r["change"]]
                label = f"{init} start" + ("" if r["change"] == PLAIN else f", {r['change']}")
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
            rungs = [r for r in results["rungs"] if r["change"] == PLAIN]
            ax.plot([r["parameters"] for r in rungs], [cell(r, target, init)["transfer"] for r in rungs], color=colour, lw=1)
        for y in (0, 1):
            ax.axhline(y, color="grey", lw=0.8, ls=":")
        ax.set(xscale="log", xlabel="parameters", title=f"students on {target}")
        ax.set_xticks([r["parameters"] for r in rungs], [r["size"] for r in rungs])
        ax.minorticks_off()
    axes[0].set_ylabel("transfer (0 nothing, 1 the teacher)")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = quick_parser(__doc__, "0.3M and 0.6M, made with --quick")
    parser.add_argument("--sizes", nargs="+", help=f"rungs, of {' '.join(SIZES)} (those for a CPU)")
    parser.add_argument("--corpus", type=Path, help="UTF-8 text to mix into the pretraining")
    parser.add_argument("--device", help="cpu, cuda, ... (the GPU if there is one)")
    args = parser.parse_args(argv)
    sizes = args.sizes or (["0.3M", "0.6M"] if args.quick else ON_A_CPU)
    for name in sizes:
        if name not in SIZES:
            raise UserError(f"unknown size {name!r}: choose among {' '.join(SIZES)}")
    rungs = []
    for name in sizes:
        for change in [PLAIN, *([] if args.quick else CHANGES.get(name, []))]:
            print(f"\n{name}, {change}", flush=True)
            rungs.append(run_rung(name, change, args))
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
