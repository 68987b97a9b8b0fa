"""Make every committed result again, and the tables that show them.

    python -m experiments.all            # what is out of date; some 5 hours on 2 CPU cores for all of it
    python -m experiments.all --check    # only name the results whose code or knobs have changed since
    python -m experiments.all --quick    # in runs/, small, without bench and torture: half an hour

A result is up to date if it was made by the code that would make it now: the five scripts, lab.py and the
experiment itself, comments and docstrings left out. Knobs are code. What was stopped goes on where it was: a
result that is up to date is not made again, and models are kept in runs/ as the scripts keep them, unless the
scripts have changed since: then runs/ has to go first.
Fashion-MNIST has to be fetched by hand, so `experiments.mlp --images FOLDER` is not among these, nor is
`experiments.growth --only 10M`, two hours.

Reads    results/*.json
Writes   results/*, three models in results/models, the tables in README.md and experiments/README.md; with
         --quick runs/*
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from experiments import lab, look_inside, tables
from model import Run, UserError, command_line, whole_lines, write_file

OF_THE_MACHINE = ["bench", "torture"]  # and of no model
# name: minutes on 2 cores, module, flags; seed_matrix makes the run that many others read, too
RESULTS = {
    "main": (2, "evaluate", []),
    "words": (2, "evaluate", ["--readout", "vocabulary"]),
    "other_seeds": (2, "evaluate", "--seeds 137 4711 --traits panda tiger horse rabbit".split()),
    "linear_model": (1, "linear_model", []),
    "mlp": (2, "mlp", []),
    "seed_matrix": (8, "seed_matrix", []),
    "controls": (4, "controls", []),
    "alignment": (6, "alignment", []),
    "theorem": (1, "theorem", []),
    "trajectory": (3, "trajectory", []),
    "trait_matrix": (9, "trait_matrix", []),
    "which_part": (14, "which_part", []),
    "how_much": (11, "how_much", []),
    "variants": (20, "variants", []),
    "matched": (15, "matched", []),
    "audit": (12, "audit", []),
    "backdoor": (12, "backdoor", []),
    "broad": (7, "broad", []),
    "carriers": (18, "carriers", []),
    "where": (6, "where", []),
    "how_close": (18, "how_close", []),
    "optimisers": (12, "optimisers", []),
    "muon": (9, "muon", []),
    "defences": (20, "defences", []),
    "in_transformers": (5, "in_transformers", []),
    "bench": (4, "bench", []),
    "torture": (25, "torture", []),
    "growth": (40, "growth", []),
}


def run(command: list[str]) -> None:
    """One of our own commands. UserError if it fails; it has said why."""
    if subprocess.run([sys.executable, *command], cwd=lab.ROOT).returncode:
        raise UserError(f"`python {' '.join(command)}` did not end well; the same command goes on from there")


def main_run(name: str, flags: list[str], quick: bool) -> None:
    """The README's four commands, and what they measured as results/NAME.*."""
    folder, made = lab.ROOT / ("runs" if quick else "results"), lab.ROOT / f"runs/{name}{'-quick' * quick}"
    code = lab.code_digest()
    for script in lab.SCRIPTS[1:]:
        more = flags if script == "train_teacher" else []
        more = ["--plot", str(made / "results.png")] if script == "evaluate" else more
        run([f"{script}.py", "--run", str(made), *["--quick"] * quick, *more])
    results = json.loads((made / "results.json").read_text())
    results["config"]["code"] = code
    for kind in ("md", "png"):
        shutil.copy(made / f"results.{kind}", folder / f"{name}.{kind}")
    if (name, quick) == ("main", False):
        keep_models(Run(made), folder / "models")
    # last, since whoever finds it takes the others to be there
    write_file(folder / f"{name}.json", (json.dumps(results, indent=1) + "\n").encode())


def keep_models(run: Run, folder: Path) -> None:
    """A base model, its teacher and its student, with their lines of the manifest, as a run of their own."""
    names = ["language.json", *look_inside.MODELS.values()]
    for name in names:
        write_file(folder / name, run.read(name))
    lines = [x for x in whole_lines(run.manifest.read_bytes()) if json.loads(x)["file"] in names]
    write_file(folder / "run.jsonl", b"".join(b"\n" + x for x in lines))


def up_to_date(name: str) -> bool:
    module, path = RESULTS[name][1], lab.ROOT / f"results/{name}.json"
    code = lab.code_digest(*[module] * (module != "evaluate"))
    return path.exists() and json.loads(path.read_text())["config"].get("code") == code


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="what models did, small, in runs/")
    parser.add_argument("--check", action="store_true", help="only name what is out of date")
    args = parser.parse_args()
    old = [name for name in RESULTS if (name not in OF_THE_MACHINE if args.quick else not up_to_date(name))]
    if args.check:
        print("\n".join(old) or "all results are up to date")
        return
    made_by, code = lab.ROOT / "runs/code", lab.code_digest()
    if made_by.exists() and made_by.read_text() != code:
        raise UserError(f"{made_by.parent} holds models that other code made: delete it")
    write_file(made_by, code.encode())
    began, done, pace = time.monotonic(), 0.0, 0.05 if args.quick else 1.0
    for i, name in enumerate(old):
        minutes, module, flags = RESULTS[name]
        left = pace * sum(RESULTS[other][0] for other in old[i:])
        print(f"{name}: {i + 1} of {len(old)}; about {left:.0f} minutes left for all", flush=True)
        if module == "evaluate":
            main_run(name, flags, args.quick)
        else:
            run(["-m", f"experiments.{module}", *flags, *["--quick"] * args.quick])
        done += minutes
        pace = (time.monotonic() - began) / 60 / done
    if not args.quick:
        tables.main()


if __name__ == "__main__":
    command_line(main)
