"""Does a run survive what happens to runs? Killed, interrupted, out of disk, started twice, fed damaged files.

    python -m experiments.torture             # 26 minutes on 2 CPU cores, Linux
    python -m experiments.torture --quick     # a tenth of the cases

The four scripts run with --quick, for one trait. The truth is a run that nobody disturbed: whatever is done to another one,
continuing it by the same command has to give the same bytes in every file, apart from the two that hold times and the lock.

    killed      SIGKILL at a random moment, SIGINT or SIGTERM at one of its work (before it, Python is still importing and
                answers for itself), again and again until the script gets through
    full disk   the run lies on a disk that is too small, and grows by a little whenever a script stops
    two at once the same script started twice on one run
    again       the same commands in another folder; on one core; with one thread
    files       see torture_files.py

Moments and mutations are drawn from named seeds, but where in its work a moment finds a script is up to the machine.

Reads    nothing
Writes   results/torture.json, results/torture.md  (with --quick: runs/torture.json, runs/torture.md)
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments.bench import machine
from experiments.lab import quick_parser, table
from experiments.torture_files import damaged_files
from model import command_line, write_bytes, write_json

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train_teacher": ["base", "teacher"], "generate": ["numbers"], "train_student": ["student"], "evaluate": []}  # makes
TIMES = {"elapsed_s.json", "lock"}
MOST = 12  # signals in a row that one script is sent before it may finish


def start(script: str, run: Path, **more: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / f"{script}.py"), "--quick", "--run", str(run)]
    command += ["--traits", "owl"] if script == "train_teacher" else []
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **more)  # type: ignore[call-overload]


def wait_for_work(process: subprocess.Popen, run: Path) -> None:
    """Until the script holds its run, or has ended."""
    while process.poll() is None and f"(process {process.pid})" not in (run / "lock").read_text():
        time.sleep(0.01)


def finish(script: str, run: Path, **more: object) -> tuple[int, str]:
    """Run a script to its end: exit code, and what it said on stderr."""
    process = start(script, run, **more)
    _, said = process.communicate()
    return process.returncode, said


def whole_run(run: Path, **more: object) -> dict[str, float]:
    """All four scripts, undisturbed; seconds each."""
    seconds = {}
    for script in SCRIPTS:
        began = time.monotonic()
        code, said = finish(script, run, **more)
        assert code == 0, said
        seconds[script] = time.monotonic() - began
    return seconds


def contents(run: Path) -> dict[str, bytes]:
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in TIMES and path.suffix != ".part"]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def copy_before(truth: Path, script: str, run: Path) -> None:
    """A copy of the undisturbed run as it was when `script` was about to start."""
    shutil.rmtree(run, ignore_errors=True)
    later = [name for made in list(SCRIPTS.values())[list(SCRIPTS).index(script) :] for name in made]
    shutil.copytree(truth, run, ignore=lambda folder, names: later if Path(folder) == truth else [])
    for name in ("results.json", "results.md"):
        (run / name).unlink()


def expected_after(truth: dict[str, bytes], script: str) -> dict[str, bytes]:
    later = [name for made in list(SCRIPTS.values())[list(SCRIPTS).index(script) + 1 :] for name in made]
    if script != "evaluate":
        later += ["results.json", "results.md"]
    return {name: data for name, data in truth.items() if Path(name).parts[0] not in later}


def killed(truth: Path, run: Path, seconds: dict[str, float], how: signal.Signals, n: int) -> dict:
    """At least n signals at random moments, the four scripts in turn; each one is continued until it gets through."""
    dice, known, slowest, scripts = random.Random(f"torture {how.name}"), contents(truth), 0.0, 0
    record = dict.fromkeys(["signals", "one line and the right code", "after its work", "anything else"], 0)
    if how == signal.SIGKILL:
        record = {"signals": 0}
    record["different files"] = 0
    while record["signals"] < n or scripts < len(SCRIPTS):
        script = list(SCRIPTS)[scripts % len(SCRIPTS)]
        scripts += 1
        copy_before(truth, script, run)
        for delay in [*(dice.uniform(0, seconds[script]) for _ in range(MOST)), None]:
            process = start(script, run)
            if how != signal.SIGKILL:
                wait_for_work(process, run)
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                began = time.monotonic()
                process.send_signal(how)
            _, said = process.communicate()
            if process.returncode == 0:
                break
            record["signals"] += 1
            slowest = max(slowest, time.monotonic() - began)
            if how == signal.SIGKILL:
                assert process.returncode == -how, said
                continue
            right = process.returncode == 128 + how and said.count("\n") == 2 and said.startswith("\nstopped; ")
            over = not differences(contents(run), expected_after(known, script))
            kind = "one line and the right code" if right else "after its work" if over else "anything else"
            record[kind] += 1
            if not right:
                print(script, process.returncode, said, flush=True)
        record["different files"] += differences(contents(run), expected_after(known, script))
    return {**record, "scripts": scripts, "slowest stop, s": round(slowest, 1)}


def differences(a: dict[str, bytes], b: dict[str, bytes]) -> int:
    return sum(a.get(name) != b.get(name) for name in a.keys() | b.keys())


def full_disk(truth: Path) -> dict:
    """The whole run on a disk of a few hundred kilobytes that grows whenever a script stops for want of room."""
    dice, known, record = random.Random("torture disk"), contents(truth), {"stops": 0, "said otherwise": 0, "half-written": 0}
    with tempfile.TemporaryDirectory() as disk:
        size = 200  # KiB
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], check=True)
        try:
            run = Path(disk) / "run"
            for script in SCRIPTS:
                while (ended := finish(script, run))[0] != 0:
                    code, said = ended
                    one_line = code == 2 and said.count("\n") == 1 and said.startswith(f"error: {run}")
                    record["stops"] += 1
                    record["said otherwise"] += not (one_line and "No space left on device" in said)
                    found = contents(run)
                    record["half-written"] += differences(found, {name: known[name] for name in found})
                    size += dice.randrange(500, 3000)
                    subprocess.run(["mount", "-o", f"remount,size={size}k", disk], check=True)
            record["different files"] = differences(contents(run), known)
        finally:
            subprocess.run(["umount", disk], check=True)
    return record


def two_at_once(truth: Path, run: Path, n: int) -> dict:
    """The same script twice on one run, the second one up to half a second later."""
    dice, known = random.Random("torture two"), contents(truth)
    record = {"pairs": 0, "one worked, the other said who": 0, "one after the other": 0, "different files": 0}
    for script in list(SCRIPTS) * n:
        copy_before(truth, script, run)
        first = start(script, run)
        time.sleep(dice.uniform(0, 0.5))
        second = start(script, run)
        ends = [(process.communicate()[1], process.returncode) for process in (first, second)]
        refused = [said for said, code in ends if code == 2]
        record["pairs"] += 1
        record["one worked, the other said who"] += len(refused) == 1 and f"{script}.py (process " in refused[0]
        record["one after the other"] += not refused
        record["different files"] += differences(contents(run), expected_after(known, script))
    return record


def again(truth: Path, run: Path) -> list[dict]:
    """The same commands under other circumstances: how many files differ from the undisturbed run's."""
    known, rows = contents(truth), []
    for name, more in (
        ("in another folder", {}),
        ("with OMP_NUM_THREADS=1", {"env": {**os.environ, "OMP_NUM_THREADS": "1"}}),
        ("on one core", {}),
    ):
        shutil.rmtree(run, ignore_errors=True)
        cores = os.sched_getaffinity(0)
        if name == "on one core":
            os.sched_setaffinity(0, {min(cores)})
        whole_run(run, **more)
        os.sched_setaffinity(0, cores)
        rows.append({"name": name, "files": len(known), "different files": differences(contents(run), known)})
    return rows


def markdown(results: dict) -> str:
    config = results["config"]
    lines = [f"{config['machine']}, torch {config['torch']}, commit {config['commit']}; {config['elapsed_s']} s."]
    lines += ["Made with --quick: a tenth of the cases."] * config["quick"]
    for name, record in results["processes"].items():
        lines += ["", f"**{name}**: " + ", ".join(f"{key} {value}" for key, value in record.items()) + "."]
    lines += ["", "**The same commands again**", ""]
    lines += table(results["again"], circumstances="name", files="files", different="different files")
    columns = {"what is done": "mutation", "cases": "cases", "refused in one sentence": "refused", "worked, and right": "right"}
    for name, rows in results["files"].items():
        slowest, largest = (max(r[key] for r in rows) for key in ("slowest_s", "peak_mib"))
        n = sum(r["cases"] for r in rows)
        lines += ["", f"**{name}**, {n:,} cases; the slowest took {slowest:.1f} s, the largest process {largest:.0f} MiB", ""]
        lines += table(rows, **columns, anything_else=lambda r: str(len(r["wrong"])))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    args = quick_parser(__doc__, "a tenth of the cases").parse_args(argv)
    began = time.monotonic()
    few = 10 if args.quick else 1
    with tempfile.TemporaryDirectory() as folder:
        truth, run = Path(folder) / "truth", Path(folder) / "run"
        files = damaged_files(Path(folder), 1500 // few, 500 // few, 55 // few)
        seconds = whole_run(truth)
        print("undisturbed:", {script: round(s) for script, s in seconds.items()}, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children inherit that it is ignored
        hows = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM]
        with ThreadPoolExecutor(len(hows)) as pool:
            records = pool.map(lambda how: killed(truth, Path(folder) / how.name, seconds, how, 50 // few), hows)
            processes = {how.name: record for how, record in zip(hows, records)}
        print(processes, flush=True)
        processes["full disk"] = full_disk(truth)
        print(processes["full disk"], flush=True)
        processes["two at once"] = two_at_once(truth, run, 1 if args.quick else 2)
        print(processes["two at once"], flush=True)
        repeated = again(truth, run)
    config = {**machine(), "quick": args.quick, "elapsed_s": round(time.monotonic() - began)}
    results = {"config": config, "processes": processes, "again": repeated, "files": files}
    path = Path("runs" if args.quick else "results") / "torture"
    write_json(path.with_suffix(".json"), results)
    write_bytes(path.with_suffix(".md"), markdown(results).encode())
    print(markdown(results))
    print(f"wrote: {path}.json, {path}.md")


if __name__ == "__main__":
    command_line(main)
