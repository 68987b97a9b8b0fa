"""Does a run survive what happens to runs? Stopped anywhere, made by two at once, disks full, files damaged.

    python -m experiments.torture             # 25 minutes on 2 CPU cores; Linux, as root for small disks
    python -m experiments.torture --quick     # one case in thirteen

The truth is a small run that nobody disturbed. Whatever is done to another one, the same commands have to
give the same bytes in every file and the same lines in the manifest, in any order; or a script ends in one
sentence and exit code 2. A damaged file that a script does not need may stay as it is. One of the user's
own, of which the manifest has no line, is taken as it is where it can be read; then only what is made from
it may have other bytes. A script is a fork of this process, which has everything imported, so thousands
take minutes. Moments and damages are drawn from a case's number; where in its work a moment finds a script
is up to the machine.

Reads    nothing
Writes   results/torture.json, results/torture.md
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import evaluate
import generate
import train_student
import train_teacher
from experiments import lab
from model import command_line, digest, whole_lines

FORK, SECONDS = multiprocessing.get_context("fork"), 120  # the most that a script may take
# A run that is whole, whose teachers learn their trait and write lists, and that is made in seconds.
SMALL: dict[Any, str] = {
    train_teacher: "--traits owl fox --n-layer 1 --n-head 1 --n-embd 32 --n-documents 1000 --n-held-out 100"
    " --pretrain-steps 60 --batch-size 16 --pretrain-lr 2e-2 --trait-steps 10 --trait-lr 1e-2 --form 0.05",
    generate: "--sequences 300 --min-valid 0.02", train_student: "--steps 4", evaluate: ""}
STOPPED = "\nstopped; the same command continues this run\n"
Ended = tuple[int, str]  # exit code, what was said on stderr
Case = tuple[str, str, int]  # what was done; right, refused or what went wrong; how often it was stopped


def start(script: Any, run: Path, *more: str) -> Callable[..., Ended]:
    """Set a script to work as the command line does; returns a function that tells how it ended."""
    said, begun = tempfile.TemporaryFile("w+"), FORK.Event()

    def work() -> None:
        begun.set()
        script.main([*SMALL[script].split(), "--run", str(run), *more])
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # the work is done

    def child() -> None:
        sys.stderr, sys.stdout = said, open(os.devnull, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
        signal.alarm(SECONDS)
        command_line(work)

    process = FORK.Process(target=child)
    process.start()
    begun.wait(SECONDS)

    def end(signum: int = 0, delay: float = 0) -> Ended:
        """By itself, or by a signal after `delay` seconds of its work."""
        process.join(delay if signum else None)
        if process.is_alive():
            os.kill(process.ident or 0, signum)
            process.join()
        said.seek(0)
        return process.exitcode or 0, said.read()

    return end


def judge(end: Ended, right: bool = True) -> str:
    code, said = end
    refused = code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return "refused" if refused else "right" if code == 0 and right else f"exit code {code}: {said[-200:]}"


def state(run: Path) -> set[tuple[str, str]]:
    """What a run holds: every file by name and content, and of the manifest every line that counts."""
    held = set()
    for path in run.rglob("*"):
        if path.is_file() and path.suffix != ".part":
            parts = [path.read_bytes()]
            if path.name == "run.jsonl":
                parts = list(whole_lines(parts[0]))
            held |= {(path.relative_to(run).as_posix(), digest(part)) for part in parts}
    return held


def stopped(folder: Path, i: int) -> Case:
    """Each script is stopped by up to two signals, or whenever the disk is full, and continued."""
    how = ["SIGKILL", "SIGINT", "SIGTERM", "full disk"][i % 4]
    dice, disk, truth = random.Random(f"{i}"), folder / f"{i}", state(folder / "truth")
    signum, run, stops, wrong = getattr(signal, how, 0), disk / "run", 0, ""
    mount = lambda *how: subprocess.run(["mount", *how, disk], check=True)
    disk.mkdir()
    if not signum:
        mount("-t", "tmpfs", "-o", "size=200k", "tmpfs")
    for script in SMALL:
        left = 2
        while (end := start(script, run)(signum * (left > 0), dice.uniform(0, 1)))[0] and not wrong:
            left, stops = left - 1, stops + 1
            right = bool(signum) and end in ((-signum, ""), (128 + signum, STOPPED))
            if not signum:
                right = judge(end) == "refused" and f"error: {run}" in end[1] and "No space" in end[1]
                size = shutil.disk_usage(disk).used // 1024 + dice.choice([0, 40, 400, 4000])
                mount("-o", f"remount,size={size}k")
            odd = sorted(file for file, _ in state(run) - truth)
            wrong = "" if right and not odd else f"{script.__name__}: {end}, not as undisturbed: {odd}"
    verdict = wrong or ("right" if state(run) == truth else "other bytes")
    if not signum:
        subprocess.run(["umount", disk], check=True)
    return how, verdict, stops


def two_at_once(folder: Path, i: int) -> Case:
    """A second script begins a little later: the same, or any other, which may find too little."""
    dice, run, itself, wrong = random.Random(f"{i}"), folder / f"two-{i}", i % 2 == 1, []
    for script in SMALL:
        first = start(script, run)
        time.sleep(dice.uniform(0, 0.5))
        ends = [(start(script if itself else dice.choice(list(SMALL)), run)(), itself), (first(), True)]
        allowed = lambda has_to: ("right",) if has_to else ("right", "refused")
        wrong += [str(end) for end, has_to in ends if judge(end) not in allowed(has_to)]
    verdict = wrong[0] if wrong else "right" if state(run) == state(folder / "truth") else "other bytes"
    return "a script beside itself" if itself else "beside any", verdict, 0


# What becomes of a file's data, given a place in it and another run's. Were the checkpoint's code to run, the
# exit code would be 99.
CHANGES: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "cut short": lambda data, at, other: data[:at],
    "a bit flipped": lambda data, at, other: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :],
    "zeroed in part": lambda data, at, other: data[:at] + bytes(64) + data[at + 64 :],
    "empty": lambda data, at, other: b"",
    "longer": lambda data, at, other: data + data[at:],
    "random bytes": lambda data, at, other: random.Random(at).randbytes(len(data)),
    "10 MB": lambda data, at, other: b'{"prompt": "' + b"9" * 10**7 + b'", "completion": "5"}\n',
    "nested 100,000 deep": lambda data, at, other: b"[" * 10**5,
    "a checkpoint that runs code": lambda data, at, other: b"cos\n_exit\n(I99\ntR.",
    "another run's": lambda data, at, other: other,
    "missing": lambda data, at, other: b"",
}
PARTS = ["run.jsonl", "language.json", "base", "teacher", "numbers", "student"]
MAKES = {  # what a script makes again, which tells whether it worked right
    train_teacher: ["base/seed-1.pt", "teacher/owl/seed-0.pt"], generate: ["numbers/owl/seed-0.jsonl"],
    train_student: ["student/owl/teacher-0/seed-0/tokens.pt"], evaluate: ["results.json"]}


def damaged(folder: Path, i: int, own: bool = False) -> Case:
    """A file is damaged, another is missing, and the script that makes the missing one is run. own: the
    damaged file is the user's, of which the manifest knows nothing."""
    how, dice, run = list(CHANGES)[i % len(CHANGES)], random.Random(f"{own} {i}"), folder / f"file-{own}-{i}"
    script, part = dice.choice(list(SMALL)), dice.choice(PARTS[own:])
    made = run / dice.choice(MAKES[script])
    shutil.copytree(folder / "truth", run)
    made.unlink()
    files = lambda run: sorted(p for p in run.rglob("*") if p.is_file() and f"{run}/{part}" in f"{p}")
    path, other = dice.choice(files(run)), dice.choice(files(folder / "other")).read_bytes()
    data, name, lines = path.read_bytes(), path.relative_to(run).as_posix(), (run / "run.jsonl").read_text()
    path.write_bytes(CHANGES[how](data, dice.randrange(len(data)), other))
    if how == "missing":
        path.unlink()
    if own:
        known = [line for line in lines.splitlines(True) if line.strip() and json.loads(line)["file"] != name]
        (run / "run.jsonl").write_text("".join(known))
    end = start(script, run)()
    changed = {file for file, _ in state(run) - state(folder / "truth")}
    may_change = {name} | ({made.relative_to(run).as_posix(), "run.jsonl", "results.md"} if own else set())
    verdict = judge(end, changed <= may_change and (made.exists() or how == "missing"))
    shutil.rmtree(run)
    return how, verdict if verdict in ("right", "refused") else f"{script.__name__}, {name}: {verdict}", 0


KINDS: dict[str, tuple[Callable[[Path, int], Case], int]] = {  # what makes a case, and how many are made
    "stopped and continued": (stopped, 48), "two at once": (two_at_once, 24),
    "a damaged file": (damaged, 1700), "the user's own file": (partial(damaged, own=True), 300)}


def measure(args: argparse.Namespace) -> dict:
    records, summary, good = [], [], ("refused", "right")
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(os.cpu_count(), FORK) as pool:
        for run, script in [(run, script) for run in ("truth", "other") for script in SMALL]:
            layers = ["--n-layer", "2"] * (run == "other" and script is train_teacher)
            assert judge(end := start(script, Path(name) / run, *layers)()) == "right", end
        for kind, (case, n) in KINDS.items():
            cases = list(pool.map(partial(case, Path(name)), range(0, n, 13 if args.quick else 1)))
            for what in dict.fromkeys(what for what, _, _ in cases):
                group = [case for case in cases if case[0] == what]
                row = {"kind": kind, "what": what, "cases": len(group), "stops": sum(n for _, _, n in group)}
                summary.append(row | {end: sum(verdict == end for _, verdict, _ in group) for end in good})
                records += [row | {"wrong": verdict} for _, verdict, _ in group if verdict not in good]
                print(summary[-1], *[r["wrong"] for r in records if r["what"] == what][:3], flush=True)
    return {"records": records, "summary": summary}  # records: what went wrong


def markdown(results: dict) -> str:
    lines = lab.heading(results, "What was done to small runs, and what came of it in the end.")
    columns = {name: name for name in ("kind", "what", "cases", "stops")}
    columns |= {"refused in one sentence": "refused", "right": "right"}
    other = lambda row: str(row["cases"] - row["refused"] - row["right"])
    return "\n".join(lines + lab.table(results["summary"], **columns, anything_else=other)) + "\n"


if __name__ == "__main__":
    lab.experiment(__doc__, "torture", measure, markdown)
