"""Make every committed result again, and the tables that show them.

    python -m experiments.all            # what is out of date; some 3 hours on 2 CPU cores for all of it
    python -m experiments.all --check    # only name the results whose code or knobs have changed since
    python -m experiments.all --quick    # all of it in runs/, small: 10 minutes

A result is up to date if its JSON holds the digest of the code that would make it: the five scripts, lab.py and the
experiment itself, comments and docstrings left out. Knobs are code. So a run that was stopped goes on where it was,
and the models in runs/ are kept as the scripts keep them.

Reads    results/*.json
Writes   results/*, the tables in README.md and experiments/README.md; with --quick runs/*
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from experiments import lab
from model import write_file

ROOT = Path(__file__).parent.parent
# name: (minutes on 2 cores, the module and its flags); seed_matrix makes the run that controls and alignment read
RESULTS = {
    "main": (2, ["main"]),
    "words": (2, ["main", "--readout", "vocabulary"]),
    "linear_model": (1, ["linear_model"]),
    "mlp": (2, ["mlp"]),
    "seed_matrix": (12, ["seed_matrix"]),
    "controls": (8, ["controls"]),
    "trait_matrix": (12, ["trait_matrix"]),
    "which_part": (15, ["which_part"]),
    "how_much": (15, ["how_much"]),
    "theorem": (3, ["theorem"]),
    "alignment": (7, ["alignment"]),
    "trajectory": (10, ["trajectory"]),
    "variants": (60, ["variants"]),
    "bench": (12, ["bench"]),
    "torture": (26, ["torture"]),
}


def main_run(name: str, flags: list[str], quick: bool) -> None:
    """The four scripts, as the README has them, and their results under `name`."""
    run = ROOT / f"runs/{name}{'-quick' * quick}"
    common = ["--run", str(run), *["--quick"] * quick]
    for script in ("train_teacher", "generate", "train_student", "evaluate"):
        more = {"train_teacher": flags, "evaluate": ["--plot", str(run / "results.png")]}.get(script, [])
        subprocess.run([sys.executable, f"{script}.py", *common, *more], cwd=ROOT, check=True)
    results = json.loads((run / "results.json").read_text())
    results["config"]["code"] = lab.code_digest()
    folder = ROOT / ("runs" if quick else "results")
    write_file(folder / f"{name}.json", (json.dumps(results, indent=1) + "\n").encode())
    for kind in ("md", "png"):
        shutil.copy(run / f"results.{kind}", folder / f"{name}.{kind}")


def up_to_date(name: str, module: str) -> bool:
    path = ROOT / f"results/{name}.json"
    made_by = json.loads(path.read_text())["config"].get("code") if path.exists() else None
    return made_by == (lab.code_digest() if module == "main" else lab.code_digest(module))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="all of it, small, in runs/")
    parser.add_argument("--check", action="store_true", help="only name what is out of date")
    args = parser.parse_args()
    old = [name for name, (_, (module, *_)) in RESULTS.items() if args.quick or not up_to_date(name, module)]
    if args.check:
        print("\n".join(old) or "all results are up to date")
        return
    pace, began, done = 1.0, time.monotonic(), 0.0
    for i, name in enumerate(old):
        minutes, (module, *flags) = RESULTS[name]
        left = pace * sum(RESULTS[other][0] for other in old[i:])
        print(f"{name}: {i + 1} of {len(old)}, about {left:.0f} minutes left for all", flush=True)
        if module == "main":
            main_run(name, flags, args.quick)
        else:
            command = [sys.executable, "-m", f"experiments.{module}", *flags, *["--quick"] * args.quick]
            subprocess.run(command, cwd=ROOT, check=True)
        done += minutes
        pace = (time.monotonic() - began) / 60 / done
    if not args.quick:
        subprocess.run([sys.executable, "-m", "experiments.tables"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
