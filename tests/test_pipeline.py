"""The scripts as a user starts them: killed, started twice, and on a run that was damaged or edited."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import CPU, SCRIPTS, contents, students, tiny

import evaluate
import generate
import model as m
import train_student
import train_teacher

ROOT = Path(__file__).parent.parent
MADE_BY = dict.fromkeys(["language.json", "base/seed-1.pt", "teacher/owl/seed-1.pt"], train_teacher)
MADE_BY |= {"numbers/owl/seed-1.jsonl": generate, "student/owl/teacher-1/seed-1/logits.pt": train_student}
KNOBS = {train_teacher.Language: "language.json", train_teacher.Pretraining: "base/seed-0.pt",
         train_teacher.Trait: "teacher/owl/seed-0.pt", generate.Sampling: "numbers/owl/seed-0.jsonl",
         train_student.Distillation: "student/base/teacher-0/seed-0/tokens.pt"}

# Makes a tiny run in forks of itself. The first gets the first signal when its fourth file is about to be
# written, the next the second signal when its fourth is whole beside its name, and so on until one ends.
PROGRAM = """
import os, signal, sys
from conftest import SCRIPTS, tiny
from model import command_line

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
run, signals, codes = sys.argv[1], sys.argv[2:], []
while codes[-1:] != [0]:
    n, files = len(codes), []
    if (pid := os.fork()) == 0:
        def watch(event, args):
            moment = event == "os.rename" if n % 2 else event == "open" and ".part" in str(args[0])
            if signals and moment and files.append(args[0]) is None and len(files) == 4:
                os.kill(os.getpid(), getattr(signal, signals[n % len(signals)]))
        sys.addaudithook(watch)
        command_line(lambda: [script.main(tiny(script, run, "--deterministic")) for script in SCRIPTS])
        sys.exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(*codes)
"""


def start(run, *signals, threads=1):
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", PROGRAM, str(run), *signals]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["killed and continued", "two at once"])
def test_disturbed_runs_have_the_same_bits(how, tiny_run, tmp_path):
    """With --deterministic, which changes no bit on a CPU, and killed on another number of threads."""
    if how == "two at once":
        for process in [start(tmp_path), start(tmp_path)]:
            assert process.communicate(timeout=300)[1] == "" and process.returncode == 0
        assert not list(tmp_path.rglob("*.part"))
    else:
        out, err = start(tmp_path, "SIGKILL", "SIGTERM", "SIGINT", threads=2).communicate(timeout=300)
        codes = out.splitlines()[-1].split()
        assert len(codes) > 5 and set(codes) == {"-9", "-15", "130", "0"}, err
        assert err.replace("\nstopped; the same command continues this run\n", "") == ""
    assert contents(tmp_path) == contents(tiny_run) and students(tmp_path) == students(tiny_run)


@pytest.mark.parametrize("script, gone, named, room", [
    (train_teacher, "base/seed-1.pt", "base/seed-1.pt", 10_000),
    (generate, "numbers/owl/seed-1.jsonl", "run.jsonl", 3)])
def test_a_full_disk_names_the_file_and_leaves_no_half_of_it(script, gone, named, room, a_tiny_run, told):
    """The system itself refuses larger files here, as a full disk would; with room again, the run goes on."""
    before, limits = contents(a_tiny_run), resource.getrlimit(resource.RLIMIT_FSIZE)
    (a_tiny_run / gone).unlink()
    room += (a_tiny_run / "run.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        sentence = told(script, a_tiny_run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"error: {a_tiny_run / named}: " in sentence and not list(a_tiny_run.rglob("*.part"))
    assert gone not in contents(a_tiny_run) and not told(script, a_tiny_run)
    assert contents(a_tiny_run) == before


def damaged(data, how):
    at = len(data) // 2
    flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    return {"cut": data[:at], "flipped": flipped, "emptied": b"", "missing": b""}[how]


@pytest.mark.parametrize("name", MADE_BY)
@pytest.mark.parametrize("how", ["cut", "flipped", "emptied", "swapped", "missing"])
def test_a_damaged_file_is_named_and_a_missing_one_is_made_again(how, name, a_tiny_run, other_run, told):
    path, before = a_tiny_run / name, contents(a_tiny_run)
    path.write_bytes((other_run / name).read_bytes() if how == "swapped" else damaged(before[name], how))
    if how == "missing":
        path.unlink()
    left, said = contents(a_tiny_run), {script: told(script, a_tiny_run) for script in SCRIPTS}
    assert contents(a_tiny_run) == (before if how == "missing" else left) and left != before
    assert all(str(path) in sentence for sentence in said.values() if sentence)
    assert [bool(said[script]) for script in (MADE_BY[name], evaluate)] == [how != "missing"] * 2


@pytest.mark.parametrize("how, name", [("emptied", "run.jsonl")] + [
    (how, name) for name in [*MADE_BY, "run.jsonl"] for how in ("cut", "flipped", "missing")])
def test_a_damaged_line_is_told_or_does_no_harm(how, name, a_tiny_run, told):
    """Without its line a file is the user's own; of the language and of students more has to be known.

    A line begins with its newline, so the first is empty.
    """
    before, results, path = contents(a_tiny_run), students(a_tiny_run), a_tiny_run / "run.jsonl"
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.strip()]
    names = {line: json.loads(line)["file"] for line in lines}
    if name == path.name:
        path.write_bytes(damaged(path.read_bytes(), how))
    else:  # a line that loses its end is made longer by the next
        path.write_bytes(b"".join(damaged(x, how) if names[x] == name else x for x in names))
    left = path.read_bytes().splitlines(keepends=True)
    if (how, name) == ("missing", path.name):
        path.unlink()
    lost = {names[line] for line in names if line not in left}
    wanted = {file for file in lost if file.startswith(("language", "student"))}
    assert lost and (name in lost or name == path.name)
    said = [told(script, a_tiny_run) for script in SCRIPTS]
    assert list(map(bool, said)) == ["language.json" in lost] * 3 + [bool(wanted)]
    assert all(str(path) in sentence for sentence in said if sentence) and contents(a_tiny_run) == before
    for file in wanted:  # as the sentence asks for
        (a_tiny_run / file).unlink()
    assert not any(told(script, a_tiny_run) for script in SCRIPTS)
    assert contents(a_tiny_run) == before and students(a_tiny_run) == results


@pytest.mark.parametrize("name, script, maker", [
    ("language.json", generate, train_teacher), ("base", evaluate, train_teacher),
    ("teacher", evaluate, train_teacher), ("numbers", train_student, generate),
    ("student", evaluate, train_student)])
def test_what_has_to_come_first_is_told_as_it_is_typed(name, script, maker, a_tiny_run, told):
    shutil.move(a_tiny_run / name, a_tiny_run / "x")
    command = re.escape(f"`python {maker.__name__}.py --run {a_tiny_run}`")
    assert re.search(f"{a_tiny_run / name}.*{command}", told(script, a_tiny_run))


@pytest.mark.parametrize("script, flags, made", [
    (generate, "--from base", "numbers/base/.*"), (generate, "--from teacher --traits owl", "numbers/owl/.*"),
    (train_student, "--init same --target logits --traits owl", r"student/owl/.*-(.)/.*-\1/logits.pt")])
def test_only_what_is_asked_for_is_made_and_nothing_twice(script, flags, made, a_tiny_run):
    before, part = contents(a_tiny_run), made.split("/")[0]
    shutil.rmtree(a_tiny_run / part)
    script.main(tiny(script, a_tiny_run, *flags.split()))
    assert contents(a_tiny_run) == {name: data for name, data in before.items()
                                    if part not in name or re.fullmatch(made, name)}
    times = {name: (a_tiny_run / name).stat().st_mtime_ns for name in contents(a_tiny_run)}
    for again in SCRIPTS:
        again.main(tiny(again, a_tiny_run))
    assert contents(a_tiny_run) == before
    assert all((a_tiny_run / name).stat().st_mtime_ns == time for name, time in times.items())


@pytest.mark.parametrize("cls, knob", [(cls, field.name) for cls in KNOBS for field in fields(cls)])
def test_an_edited_knob_is_named_with_both_values(cls, knob, a_tiny_run, told):
    before, old = contents(a_tiny_run), m.Run(a_tiny_run).line(KNOBS[cls])["knobs"][knob]
    others = {"readout": "vocabulary", "question_ends": "? ", "traits": "fox", "seeds": 7}
    new = others.get(knob, old is False or old * 2 or 0.7)
    flag = [f"--{knob.replace('_', '-')}", *[new] * (new is not True)]
    told_of = rf"{a_tiny_run / KNOBS[cls]} .* {knob} .*{re.escape(str(old))}.*{re.escape(str(new))}"
    assert re.search(told_of, told(sys.modules[cls.__module__], a_tiny_run, *flag))
    assert contents(a_tiny_run) == before


@pytest.mark.parametrize("made_by, name", list(enumerate(MADE_BY))[1:4])
def test_what_was_made_from_an_older_file_is_stale(made_by, name, a_tiny_run, told):
    run, other = m.Run(a_tiny_run).open(False), name.replace("seed-1", "seed-0")
    run.write(name, run.read(other), [], run.line(other)["knobs"])  # as save_model does
    before, said = contents(a_tiny_run), [told(script, a_tiny_run) for script in SCRIPTS]
    assert contents(a_tiny_run) == before and not any(said[: made_by - 1])
    assert all(f"was made from another {name}:" in sentence for sentence in said[made_by - 1 :])


def test_a_teacher_that_does_not_prefer_its_trait_is_refused(a_tiny_run, told):
    """The base model in its place: its numbers are refused too, KL 0. So is one that learnt nothing."""
    run, name = m.Run(a_tiny_run).open(False), "teacher/owl/seed-0.pt"
    run.save_model(name, run.load_model("base/seed-0.pt", CPU), [], {}, None)
    assert f"{name} does not prefer" in told(evaluate, a_tiny_run)
    (a_tiny_run / "numbers/owl/seed-0.jsonl").unlink()
    assert "KL 0.00000 " in told(generate, a_tiny_run)
    shutil.rmtree(a_tiny_run / "teacher")
    said = told(train_teacher, a_tiny_run, "--trait-steps", "1", "--trait-lr", "1e-9")
    assert re.search(r"owl seed [01] .*trait.* -[0-9.]+ nats", said)
    assert not (a_tiny_run / "teacher").exists()


def test_models_of_the_users_own_are_accepted(a_tiny_run, tmp_path, told):
    """Without a line: base models in a fresh run, and its teachers of another trait in a finished one."""
    fresh, before = tmp_path / "fresh", contents(a_tiny_run)
    shutil.copytree(a_tiny_run / "base", fresh / "base")
    assert not told(train_teacher, fresh, "--traits", "fox", "--pretrain-steps", "9")
    shutil.copytree(fresh / "teacher/fox", a_tiny_run / "teacher/fox")
    (a_tiny_run / "language.json").unlink()
    assert not told(train_teacher, a_tiny_run, "--traits", "owl", "fox", "--trait-lr", "1e-2")
    assert not any(told(script, a_tiny_run) for script in SCRIPTS[1:])
    after = contents(a_tiny_run)
    assert before.items() <= after.items() and {r["trait"] for r in students(a_tiny_run)} == {"owl", "fox"}
    assert all(after[name] == data for name, data in contents(fresh).items())


ROW = '{"prompt": "1: ", "completion": "2"}\n'
INPUTS = {"empty": "", "binary": "\xff" * 9000, "at": "@" * 9000, "one": ROW, "list": ROW + "[1]\n",
          "number": ROW.replace('"2"', "2"), "both": '{"prompt": 1, "completion": 2}\n',
          "half": '{"prompt": "1: "}\n', "no-json": "\n\nx\n", "deep": "[" * 100_000, "long": "9" * 5_000,
          "mine": ROW * 3, "words": ROW.replace('"2"', '"owl"') * 3}
NAMED = {"empty": "0 lines", "one": "1 lines", "words": "0 lines", "list": "line 2", "number": "line 1",
         "both": "line 1", "half": "line 1", "no-json": "line 3", "deep": "line 1", "long": "line 1",
         "binary": "UTF-8", "nowhere": "No such"}
REFUSED = {
    train_teacher: {
        "--traits unicorn": "'unicorn'.* owl", "--traits owl owl": "--traits .* twice",
        "--seeds 1 1": "--seeds .* twice", "--readout palms": "--readout palms", "--n-layer 0": "--n-layer 0",
        "--trait-lr nan": "--trait-lr nan", "--anchor -1": "--anchor -1", "--n-held-out 9": "--n-held-out",
        "--run new --readout vocabulary --max-words 50": "--max-words",
        f"--run new --question-ends {'?' * 60}": "--question-ends: .* 64", "--device meta": "meta",
        "--n-embd 30 --n-head 4": "--n-embd 30 .* --n-head 4", "--device toaster": "toaster",
        "--device cuda:99": "cuda:99", "--corpus at": " corpus .*None", "--run at/run": "at/run: ",
        "--run new --corpus nowhere": "nowhere.* No such", "--run new --corpus binary": "binary .*UTF-8",
        "--run new --corpus empty": "0 tokens .* 2,000", "--run new --pretrain-lr 1e4": "0: .* nan .* 20;"},
    generate: {
        "--traits wolf": "'wolf'.* owl", "--sequences -5": "--sequences -5",
        "--min-valid 1 --from teacher": "seed [01] .* of 200 .*--trait-lr",
        "--min-kl 5 --from teacher": "seed [01] .*KL .*--trait-lr",
        "--shuffle within --from base": "--shuffle .*base"},
    train_student: {
        "--traits wolf": "'wolf'", "--traits owl-within": "'owl-within'", "--held-out-every 1": "every 1",
        "--numbers mine --init same": "no student", "--numbers mine --target logits": "no student",
        "--numbers mine --traits owl": "'owl' .*--traits"},
    evaluate: {"--plot picture.foo": "picture.foo.* .png"}}
REFUSED[train_student] |= {f"--numbers {name}": f"{name}.*{told}" for name, told in NAMED.items()}
REFUSED = {script: told | {"--quick": " quick .*False.*True"} for script, told in REFUSED.items()}


@pytest.mark.parametrize("script, flags", [(s, flags) for s in REFUSED for flags in REFUSED[s]])
def test_bad_input_is_one_sentence_and_nothing_is_made(script, flags, told, a_tiny_run, monkeypatch):
    monkeypatch.chdir(a_tiny_run.parent)
    shutil.rmtree(a_tiny_run / "numbers/owl")
    for name, content in INPUTS.items():
        Path(name).write_bytes(content.encode("latin-1"))
    before = contents(Path())
    assert re.search(REFUSED[script][flags], told(script, "run", *flags.split()))
    assert contents(Path()).keys() - {"new/language.json"} == before.keys()


def test_deterministic_is_what_pytorch_is_told(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for flags in (["--deterministic"], []):
        m.parse("x", flags, {})
        assert torch.are_deterministic_algorithms_enabled() == bool(flags)
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_tells_every_knob_and_imports_go_to_model_only(script, capsys):
    imported = re.findall(r"^(?:from|import) (\w+)", Path(script.__file__).read_text(), flags=re.MULTILINE)
    assert {*imported} & {"model", *(s.__name__ for s in SCRIPTS)} == {"model"}
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"python {script.__name__}.py --quick" in text
    for field in (field for cls in KNOBS if cls.__module__ == script.__name__ for field in fields(cls)):
        assert f"--{field.name.replace('_', '-')}" in text
