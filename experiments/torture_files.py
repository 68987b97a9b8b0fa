"""The part of torture.py that damages files: every file that a script reads, one at a time, and numbers from anywhere.

Not a script: torture.py runs it. A case forks this process, which has everything imported, and runs a script's main in the
child: it has to end in 10 seconds and 2 GiB, with the undisturbed result or with one sentence and exit code 2.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch

import evaluate
import generate
import model
import train_student
import train_teacher
from model import Run, command_line, document, open_run

SECONDS, MIB = 10, 2048  # the most that a case may take
NOBODY = 65534

# A run of two base models and two traits that is made in seconds: small, but whole.
SIZES = ["--traits", "owl", "fox", "--n-layer", "1", "--n-head", "2", "--n-embd", "32"]
SMALL = [
    patch.object(train_teacher, "N_DOCUMENTS", {True: 3000}),
    patch.object(train_teacher, "N_HELD_OUT", 60),
    patch.object(generate, "SEQUENCES", {True: 300}),
    patch.object(generate, "MIN_VALID", 0.1),
    patch.object(train_student, "STEPS", {True: 4}),
]


def in_child(main: Callable[[], None], user: int | None = None) -> dict:
    """Run `main` as the command line does, in a fork: exit code, stderr, seconds, largest size in MiB."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(SECONDS)
                if user is not None:
                    os.setegid(user)
                    os.seteuid(user)
                with redirect_stderr(said), redirect_stdout(open(os.devnull, "w")):
                    command_line(main)
                    code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 71
            except BaseException:
                traceback.print_exc(file=said)
            said.flush()
            os._exit(code)
        _, status, used = os.wait4(pid, 0)
        said.seek(0)
        text = said.read()
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "said": text, "seconds": time.monotonic() - began, "mib": used.ru_maxrss / 1024}


def verdict(end: dict, right: bool) -> str:
    """refused, right, or what went wrong."""
    if end["mib"] > MIB:
        return f"{end['mib']:.0f} MiB"
    if end["code"] == 2 and end["said"].startswith("error: ") and end["said"].count("\n") == 1:
        return "refused"
    if end["code"] == 0 and right:
        return "right"
    return f"exit code {end['code']}, right {right}: {end['said'][-500:]}"


def tally(cases: Sequence[tuple[str, str, dict]]) -> list[dict]:
    """A row for each mutation: (mutation, verdict, end) -> counts, and every wrong verdict in full."""
    rows = []
    for mutation in dict.fromkeys(name for name, _, _ in cases):
        group = [(v, end) for name, v, end in cases if name == mutation]
        rows.append(
            {
                "mutation": mutation,
                "cases": len(group),
                "refused": sum(v == "refused" for v, _ in group),
                "right": sum(v == "right" for v, _ in group),
                "wrong": [v for v, _ in group if v not in ("refused", "right")],
                "slowest_s": max(end["seconds"] for _, end in group),
                "peak_mib": max(end["mib"] for _, end in group),
            }
        )
        print(f"{mutation}: {rows[-1]['cases']} cases, {len(rows[-1]['wrong'])} wrong", *rows[-1]["wrong"][:3], flush=True)
    return rows


def all_cases(case: Callable[[int], tuple[str, str, dict]], n: int) -> list[dict]:
    """case(0) .. case(n - 1), tallied; one process a core."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        return tally(list(pool.map(case, range(n))))


def small_run(path: Path, *more: str) -> None:
    train_teacher.main(["--quick", "--run", str(path), *SIZES, *more])
    for script in (generate, train_student, evaluate):
        script.main(["--quick", "--run", str(path)])


# --------------------------------------------------------------------------------------------------------------------
# files of the run


def flip(data: bytes, dice: random.Random) -> bytes:
    i = dice.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << dice.randrange(8)]) + data[i + 1 :]


def zeros(data: bytes, dice: random.Random) -> bytes:
    i = dice.randrange(len(data))
    return data[:i] + bytes(len(data[i : i + 64])) + data[i + 64 :]


def random_json(dice: random.Random, depth: int = 0) -> object:
    kind = dice.randrange(8 if depth < 3 else 6)
    if kind < 6:
        text = "".join(map(chr, dice.choices([*range(32, 127), 0, 0x663, 0xD800, 0x1F989], k=dice.randrange(9))))
        return [None, True, dice.randrange(-9, 1000), 10**30, dice.random() * 1e300, text][kind]
    parts = [random_json(dice, depth + 1) for _ in range(dice.randrange(4))]
    names = dice.choices(["prompt", "completion", "flags", "seal", "words", "trait", "made_from"], k=len(parts))
    return parts if kind == 6 else dict(zip(names, parts, strict=True))


def random_lines(dice: random.Random, n: int) -> bytes:
    return "".join(json.dumps(random_json(dice)) + "\n" for _ in range(n)).encode()


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut short": lambda data, dice: data[: dice.randrange(len(data))],
    "a bit flipped": flip,
    "a stretch of zeros": zeros,
    "empty": lambda data, dice: b"",
    "something after its end": lambda data, dice: data + dice.randbytes(1 + dice.randrange(100)),
    "twice": lambda data, dice: data + data,
    "random bytes": lambda data, dice: dice.randbytes(len(data)),
    "random JSON": lambda data, dice: json.dumps(random_json(dice)).encode(),
    "random JSON lines": lambda data, dice: random_lines(dice, 1 + dice.randrange(50)),
    "a line of 10 MB": lambda data, dice: b'{"seal": "' + b"9" * 10_000_000 + b'"}\n',
    "nested 100,000 deep": lambda data, dice: b"[" * 100_000,
}
OTHERS = ["another run's", "another seed's", "a directory", "no permission", "missing"]


def damage(path: Path, how: str, run: Path, other: Path, dice: random.Random) -> None:
    name = str(path.relative_to(run))
    if how in CHANGES:
        path.write_bytes(CHANGES[how](path.read_bytes(), dice))
    elif how == "no permission":
        for file in [run, *run.rglob("*")]:
            os.chown(file, NOBODY, NOBODY)
        path.chmod(0)
    else:
        path.unlink()
        if how == "a directory":
            path.mkdir()
        elif how == "another run's":
            shutil.copy(other / name, path)
        elif how == "another seed's":
            shutil.copy(other.with_name("small") / name.translate(str.maketrans("01", "10")), path)


# script: what it makes again in a case, whose bytes tell whether it worked right
MAKES: dict[ModuleType, list[str]] = {
    evaluate: ["results.json"],
    train_student: ["student/owl/teacher-0/seed-0/tokens", "student/fox/teacher-1/seed-0/logits"],
    generate: ["numbers/owl/seed-0.jsonl", "numbers/base/seed-1.jsonl"],
    train_teacher: ["teacher/owl/seed-0", "teacher/fox/seed-1"],
}
SHARES = [6, 2, 1, 1]  # of the cases


def what_counts(path: Path) -> bytes:
    """What counts: a model's weights, a data set, or the results without the versions they were made with."""
    if path.name == "results.json":
        return json.dumps(json.loads(path.read_text())["students"]).encode()
    if path.is_dir():
        weights = torch.load(path / "model.pt", weights_only=True)["weights"]
        return b"".join(p.numpy().tobytes() for p in weights.values())
    return path.read_bytes()


def file_case(folder: Path, names: Sequence[str], i: int) -> tuple[str, str, dict]:
    """One file of a finished run damaged, one part of the run missing, and the script run that makes the part."""
    torch.set_num_threads(1)
    dice, truth, run = random.Random(f"torture file {i}"), folder / "small", folder / f"case-{i}"
    how = [*CHANGES, *OTHERS][i % (len(CHANGES) + len(OTHERS))]
    (script,) = dice.choices(list(MAKES), SHARES)
    made = dice.choice(MAKES[script])
    # a student that is gone is no damage: it is measured no more
    spared = made if how != "missing" else (made, "student")
    name = dice.choice([name for name in names if not name.startswith(spared)])
    shutil.copytree(truth, run)
    missing = run / made
    shutil.rmtree(missing) if missing.is_dir() else missing.unlink()
    damage(run / name, how, run, folder / "small-other", dice)
    argv = ["--quick", "--run", str(run)] + (SIZES if script is train_teacher else [])
    end = in_child(lambda: script.main(argv), NOBODY if how == "no permission" else None)
    right = end["code"] == 0 and what_counts(missing) == what_counts(truth / made)
    shutil.rmtree(run)
    found = verdict(end, right)
    return how, found if found in ("refused", "right") else f"{script.__name__} with {name}: {found}", end


# --------------------------------------------------------------------------------------------------------------------
# numbers and text from anywhere

NUMBERS = ["5", "٣", "1e3", "-0", "007", str(10**30), "\ud800", "\x00", "5\x00", "1,2", "1, 2, 3", "1; 2", "1 2", "1,2;3", ""]
NUMBERS += [" ", "5\n", "٣, 4", "1234", "999", "1000", "00", "+1", "1_000", "1.0", "½", "1,,2", ",1", "1,", "1, 2" + ", 3" * 9]
PROMPTS = ["1, 2: ", "", "1, 2, 3", "7", "٣", "1," * 70, "\ud800: ", "owl: ", "1,"]
LINES = ["", " ", "[1]", "null", '"text"', '{"prompt": "1: "}', '{"prompt": "1: ", "completion": 2}', "{", "not json"]
LINES += ["[" * 100_000, "9" * 5000]


def valid(completion: str) -> bool:
    """The filter, character by character."""
    separators: set[str] = set()
    numbers = i = 0
    while True:
        j = i
        while j < len(completion) and completion[j] in "0123456789":
            j += 1
        if not 1 <= j - i <= 3 or (completion[i] == "0" and j - i > 1):
            return False
        numbers += 1
        if j == len(completion):
            return numbers <= 10 and len(separators) <= 1
        k = j + (completion[j] in ",;")
        k += k < len(completion) and completion[k].isspace()
        separators.add(completion[j:k])
        if k == j:
            return False
        i = k


def expected_rows(data: bytes, run: Run) -> list[dict] | None:
    """The rows that a file of numbers should give a run, or None if it has to be refused."""
    try:
        lines = [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
        rows = [json.loads(line) for line in lines]
    except (ValueError, RecursionError):
        return None
    kept = []
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("prompt", "completion")):
            return None
        prompt, completion = row["prompt"], row["completion"]
        joined = prompt[-1:] in set("0123456789") and completion[:1] in set("0123456789")
        fits = len(document(run.encoding, prompt + completion)) <= 64
        if valid(completion.strip()) and fits and not joined:
            kept.append({"prompt": prompt, "completion": completion})
    return kept if len(kept) > 1 else None


def numbers_file(how: str, dice: random.Random) -> bytes:
    choose = lambda: json.dumps({"prompt": dice.choice(PROMPTS), "completion": dice.choice(NUMBERS)})  # noqa: E731
    good = [json.dumps({"prompt": "1, 2: ", "completion": f"{dice.randrange(1000)}, {dice.randrange(1000)}"}) for _ in range(20)]
    if how == "a strange line":
        good.insert(dice.randrange(20), dice.choice(LINES))
    elif how == "10,000 random JSON lines":
        return random_lines(dice, 10_000)
    elif how == "CRLF and a BOM":
        return b"\xef\xbb\xbf" + "\r\n".join(good + [choose()]).encode()
    elif how == "a number of 10 MB":
        good.append(json.dumps({"prompt": "1: ", "completion": "9" * 10_000_000}))
    elif how == "a prompt of 10 MB":
        good.append(json.dumps({"prompt": dice.choice(["the", "1, ", "x", "é"]) * 3_000_000, "completion": "5"}))
    elif how in CHANGES:
        return CHANGES[how]("\n".join(good).encode(), dice)
    else:
        good += [choose() for _ in range(5)]
    return "\n".join(good).encode()


USUAL = [
    "strange numbers",
    "a strange line",
    "CRLF and a BOM",
    "a bit flipped",
    "cut short",
    "random bytes",
    "a stretch of zeros",
]
RARE = ["10,000 random JSON lines", "a number of 10 MB", "a prompt of 10 MB", "nested 100,000 deep"]  # one in twenty


def numbers_case(folder: Path, i: int) -> tuple[str, str, dict]:
    """train_student.py --numbers with a file of any kind."""
    torch.set_num_threads(1)
    dice, run, path = random.Random(f"torture numbers {i}"), folder / f"case-{i}", folder / f"mine-{i}.jsonl"
    how = dice.choice(RARE) if i % 20 == 0 else USUAL[i % len(USUAL)]
    shutil.copytree(folder / "small", run, ignore=shutil.ignore_patterns("student", "numbers", "teacher"))
    path.write_bytes(numbers_file(how, dice))
    end = in_child(lambda: train_student.main(["--quick", "--run", str(run), "--numbers", str(path)]))
    rows, made = expected_rows(path.read_bytes(), open_run(run, True)), run / f"numbers/{path.stem}/seed-file.jsonl"
    if rows is None:
        right = False
    else:
        right = end["code"] == 0 and [json.loads(line) for line in made.read_bytes().splitlines()] == rows
    found = verdict(end, right)
    if found == "refused" and rows is not None:
        found = f"refused, though {len(rows)} rows are good: {end['said'][:300]}"
    shutil.rmtree(run)
    path.unlink()
    return how, found, end


WORDS = "the animal of the sea is wise, 12 and 7; é ½ ß 猫 "


def text_file(how: str, dice: random.Random) -> bytes:
    text = (WORDS * 1000).encode()
    made = {
        "words": text,
        "one word of 10 MB": b"a" * 10_000_000,
        "no words": "猫犬。".encode() * 10_000,
        "only spaces": b" \n" * 20_000,
        "digits and zeros": b"0\x00" * 20_000,
        "CRLF and a BOM": b"\xef\xbb\xbf" + text.replace(b" is", b"\r\n\r\n"),
        "few tokens": b"abcdefghijkl" * 1000,
    }
    return made[how] if how in made else CHANGES[how](text, dice)


TEXTS = ["words", "one word of 10 MB", "no words", "only spaces", "digits and zeros", "CRLF and a BOM", "few tokens"]
TEXTS += ["a bit flipped", "cut short", "random bytes", "empty"]


def text_case(folder: Path, i: int) -> tuple[str, str, dict]:
    """train_teacher.py --corpus with a file of any kind; what is not UTF-8 is refused, and so is what is too short."""
    torch.set_num_threads(1)
    dice, run, path = random.Random(f"torture text {i}"), folder / f"case-{i}", folder / f"text-{i}"
    how = TEXTS[i % len(TEXTS)]
    path.write_bytes(text_file(how, dice))
    argv = ["--quick", "--run", str(run), *SIZES, "--seeds", "0", "--corpus", str(path)]
    with patch.object(train_teacher, "PRETRAIN_STEPS", {True: 2}), patch.object(model, "TAUGHT", -100.0):
        end = in_child(lambda: train_teacher.main(argv))
    right = how not in ("empty", "few tokens")
    try:
        path.read_bytes().decode()
    except ValueError:
        right = False
    found = verdict(end, right)
    if found == "refused" and how in ("words", "no words", "CRLF and a BOM"):
        found = f"refused: {end['said'][:300]}"
    shutil.rmtree(run, ignore_errors=True)
    path.unlink()
    return how, found, end


# --------------------------------------------------------------------------------------------------------------------


def damaged_files(folder: Path, n_files: int, n_numbers: int, n_texts: int) -> dict[str, list[dict]]:
    """Each kind of case by name: a row for each thing done."""
    folder.chmod(0o755)  # for the cases that run as another user
    with ExitStack() as small:
        for change in SMALL:
            small.enter_context(change)  # type: ignore[arg-type]
        small_run(folder / "small")
        small_run(folder / "small-other", "--n-layer", "2", "--seeds", "0", "1", "2")
        files = [str(path.relative_to(folder / "small")) for path in (folder / "small").rglob("*") if path.is_file()]
        read = sorted(name for name in files if name not in ("lock", "results.json", "results.md"))
        return {
            "files of a run": all_cases(partial(file_case, folder, read), n_files),
            "numbers from anywhere": all_cases(partial(numbers_case, folder), n_numbers),
            "text from anywhere": all_cases(partial(text_case, folder), n_texts),
        }
