"""The four scripts as a user starts them: killed and continued, interrupted, and the README's own lines."""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import generate
import model
import train_student
import train_teacher
from experiments import bench, choices, scale, tried

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

# Starts a script that, at its n-th write, sends itself a signal: the new file is whole beside its final name, and not
# yet renamed. The first stage is made tiny; the others work on the --quick run.
PROGRAM = """
import os, pathlib, sys
import signal as signals
import model, train_teacher
train_teacher.PRETRAIN_STEPS, train_teacher.N_DOCUMENTS, train_teacher.N_HELD_OUT = {True: 6}, {True: 600}, 60
train_teacher.TRAIT_STEPS, model.TAUGHT = 2, -100.0
which, n_write, signal = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
signals.signal(signals.SIGINT, signals.default_int_handler)  # a background job inherits that it is ignored
writes, replace = 0, pathlib.Path.replace
def count(self, target):
    global writes
    writes += 1
    if writes == n_write:
        os.kill(os.getpid(), signal)
    return replace(self, target)
pathlib.Path.replace = count
model.command_line(lambda: __import__(which).main(sys.argv[4:]))
"""


def start(which, *argv, n_write=-1, how=0):
    command = [sys.executable, "-c", PROGRAM, which, str(n_write), str(int(how)), "--quick", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def contents(run):
    skipped = ("lock", "elapsed_s.json", "results.json", "results.md")
    paths = [p for p in run.rglob("*") if p.is_file() and p.suffix != ".part" and p.name not in skipped]
    return {p.relative_to(run): p.read_bytes() for p in paths}


@pytest.mark.parametrize(
    "which, argv, dropped, n_write, how",
    [
        ("train_teacher", ["--traits", "owl"], None, 6, signal.SIGKILL),
        ("generate", ["--from", "base"], "numbers/base", 3, signal.SIGKILL),
        ("train_student", ["--traits", "base"], "student/base", 7, signal.SIGKILL),
        ("train_student", ["--traits", "base"], "student/base", 4, signal.SIGINT),
        ("generate", ["--from", "base"], "numbers/base", 2, signal.SIGTERM),
    ],
)
def test_killed_and_continued_equals_uninterrupted(which, argv, dropped, n_write, how, a_run, tmp_path):
    if dropped is None:
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        assert start(which, *argv, "--run", whole).returncode == 0
        before = contents(whole)
    else:
        before, broken = contents(a_run), a_run
        shutil.rmtree(a_run / dropped)
    stopped = start(which, *argv, "--run", broken, n_write=n_write, how=how)
    assert stopped.returncode == (-9 if how == signal.SIGKILL else 128 + how)
    if how == signal.SIGKILL:
        assert contents(broken).keys() < before.keys()
    else:
        assert stopped.stderr == "\nstopped; the same command continues this run\n"
    assert start(which, *argv, "--run", broken).returncode == 0
    assert contents(broken) == before


def test_deterministic_repeats_bit_for_bit(a_run):
    """A CPU gives the same bits without the flag too, so a part made again with it is enough; a GPU makes all of it twice."""
    gpu = torch.cuda.is_available()
    made = [] if gpu else [contents(a_run)]
    while len(made) < 2:
        for part in ("base", "teacher", "numbers", "student") if gpu else ("teacher/fox", "numbers/base", "student/base"):
            shutil.rmtree(a_run / part)
        for script in ("train_teacher", "generate", "train_student", "evaluate"):
            command = [sys.executable, f"{script}.py", "--quick", "--run", str(a_run), "--deterministic"]
            subprocess.run(command, cwd=ROOT, check=True)
        made.append(contents(a_run))
    assert made[0] == made[1]


def test_deterministic_is_what_pytorch_is_told(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for flags in (["--deterministic"], []):
        model.parse(model.base_parser("x"), flags)
        assert torch.are_deterministic_algorithms_enabled() == bool(flags)
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path):
    """The system itself refuses files above 100 kB here, as a full disk would."""
    limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (100_000, 100_000))\n"
    command = [sys.executable, "-c", limit + PROGRAM, "train_teacher", "-1", "0", "--quick", "--run", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert re.fullmatch(f"error: {tmp_path}/run/base/seed-[01]/model.pt: File too large\n", done.stderr)
    assert not any(path.suffix in (".pt", ".part") for path in (tmp_path / "run").rglob("*"))


def test_one_script_at_a_time(a_run, refused):
    before = contents(a_run)
    with model.at_work(argparse.Namespace(run=a_run, quick=True), "generate"):
        for script in (train_teacher, generate, train_student, evaluate):
            said = refused(script, "--quick", "--run", a_run)
            assert (
                said == f"error: generate.py (process {os.getpid()}) is at work in {a_run}: wait for it, or name another --run\n"
            )
    assert contents(a_run) == before
    evaluate.main(["--quick", "--run", str(a_run)])  # and when it has ended the next one may


@pytest.mark.parametrize(
    "name, script, sentence",
    [
        ("config.json", evaluate, "config.json is not what"),
        ("prompts.json", generate, "prompts.json: put that back, or delete"),
        ("base/seed-0/log.jsonl", train_teacher, "base/seed-0/log.jsonl: put that back, or delete"),
        ("teacher/owl/seed-1/model.pt", evaluate, "teacher/owl/seed-1/model.pt is cut short, damaged or"),
        ("numbers/fox/seed-0.json", train_student, "seed-0.json is not what `python generate.py` wrote"),
        ("numbers/fox/seed-0.jsonl", train_student, "seed-0.jsonl was changed since: delete"),
        ("student/owl/teacher-0/seed-1/tokens/log.jsonl", evaluate, "log.jsonl: put that back, or delete"),
        ("elapsed_s.json", train_student, "elapsed_s.json is not what"),
    ],
)
def test_one_changed_character_is_noticed(name, script, sentence, a_run, refused):
    shutil.rmtree(a_run / "student/fox")  # so that its numbers are read again
    path = a_run / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    said = refused(script, "--quick", "--run", a_run)
    assert sentence in said and said.startswith("error: ") and said.count("\n") == 1


def test_numbers_of_another_teacher_are_noticed(a_run, refused):
    """A teacher of one's own, put in the place of a finished one: what the old one wrote is out of date."""
    run = model.open_run(a_run, True)
    shutil.copy(run.teacher("fox", 0), run.teacher("owl", 0))
    shutil.copy(run.teacher("fox", 0).with_name("log.jsonl"), run.teacher("owl", 0).with_name("log.jsonl"))
    said = refused(generate, "--quick", "--run", a_run)
    assert f"numbers/owl/seed-0.jsonl was made from another {run.teacher('owl', 0)}: put that back, or delete" in said
    model.save_model(run.base(0), model.load_model(run.base(1), torch.device("cpu"), "x"), [])
    assert "teacher/owl/seed-0/model.pt was made from another" in refused(evaluate, "--quick", "--run", a_run)


# wrong science


def test_a_loss_that_diverges_stops_the_run_with_its_step(tmp_path, refused, monkeypatch):
    monkeypatch.setattr(train_teacher, "PRETRAIN_LR", 1e4)
    monkeypatch.setattr(train_teacher, "N_DOCUMENTS", {True: 600})
    said = refused(train_teacher, "--quick", "--seeds", "0", "--run", tmp_path / "run")
    assert re.fullmatch(r"error: pretraining, 0: the loss is nan by step 20; a smaller learning rate may help\n", said)
    assert not list((tmp_path / "run").rglob("model.pt"))


@pytest.mark.parametrize("loss", [math.nan, math.inf, 21.0])
def test_no_number_and_too_large_a_number_are_divergence(loss):
    def work(job, tick):
        tick(10, 7.0)
        tick(10, loss)

    with pytest.raises(model.UserError, match=f"students, owl 0: the loss is {loss:.3g} by step 20"):
        list(model.run_jobs(work, [("owl", 0)], 20, "students", torch.device("cpu")))


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    gpt = model.GPT(model.GPTConfig(vocab_size=5, n_aux=2, n_layer=1, n_embd=4)).initialise(0)
    with torch.no_grad():
        gpt.blocks[0].mlp.weight[0, 0] = math.nan
    with pytest.raises(model.UserError, match="weights that are no numbers"):
        model.save_model(tmp_path / "model.pt", gpt, [])
    assert not list(tmp_path.iterdir())


def test_a_teacher_without_its_trait_is_refused(a_run, refused):
    """The base model in the teacher's place."""
    run = model.open_run(a_run, True)
    model.save_model(run.teacher("owl", 0), model.load_model(run.base(0), torch.device("cpu"), "x"), [])
    for script in (train_teacher, generate, evaluate):
        shutil.rmtree(a_run / "numbers/owl", ignore_errors=True)
        said = refused(script, "--quick", "--run", a_run)
        assert re.search(r"teacher/owl/seed-0 has not learnt its trait: log-odds -[0-9.]+ nats .* raise TRAIT_STEPS", said)


def test_a_teacher_whose_numbers_carry_nothing_is_refused(a_run, refused, monkeypatch):
    """The same, where only the trait is looked away from: KL exactly 0."""
    run = model.open_run(a_run, True)
    model.save_model(run.teacher("owl", 0), model.load_model(run.base(0), torch.device("cpu"), "x"), [])
    shutil.rmtree(a_run / "numbers/owl")
    monkeypatch.setattr(model, "TAUGHT", -100.0)
    said = refused(generate, "--quick", "--run", a_run, "--traits", "owl", "--from", "teacher")
    assert "owl seed 0 writes numbers like its base model's (KL 0.00000 nats a number, 0.001 is the least)" in said
    assert not (a_run / "numbers/owl/seed-0.jsonl").exists()


def test_a_finished_part_is_not_made_again(a_run):
    before = {p: p.stat().st_mtime_ns for p in a_run.rglob("model.pt")}
    for script in (train_teacher, generate, train_student):
        script.main(["--quick", "--run", str(a_run)])
    assert {p: p.stat().st_mtime_ns for p in a_run.rglob("model.pt")} == before


def test_a_folder_that_cannot_be_made_is_one_sentence(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(train_teacher, "--quick", "--run", tmp_path / "file" / "run")
    assert message.startswith("error: ") and str(tmp_path / "file") in message


# the README


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


def test_the_readme_tells_two_commands_that_ci_knows():
    main_job, tests = re.findall(r"```bash\n(python3 -m venv .*?)```", README, flags=re.DOTALL)
    assert re.findall(r"python (\w+)\.py", main_job) == ["train_teacher", "generate", "train_student", "evaluate"]
    assert "python -m pytest" in tests and " ".join(tests.split()) in " ".join((ROOT / ".ci/run").read_text().split())


def test_the_readme_s_tables_are_the_committed_results():
    for name, markdown in (
        ("main", evaluate.markdown),
        ("bench", bench.markdown),
        ("scale", scale.markdown),
        ("choices", choices.markdown),
    ):
        results = json.loads((ROOT / f"results/{name}.json").read_text())
        (shown,) = re.findall(rf"<!-- results/{name}.json -->\n(.*?)\n\n(?!\|)", README, flags=re.DOTALL)
        rows = [line for line in shown.splitlines() if line.startswith("|")]
        made = markdown(results).splitlines()
        assert len(rows) > 4 and [line for line in made if line in rows] == rows
        assert (ROOT / f"results/{name}.md").read_text() == markdown(results)


def test_the_table_of_what_was_tried_is_its_results():
    results = json.loads((ROOT / "results/tried.json").read_text())
    assert (ROOT / "results/tried.md").read_text() == tried.markdown(results)


def test_the_readme_s_sentences_are_the_committed_results():
    read = lambda name: json.loads((ROOT / f"results/{name}.json").read_text())  # noqa: E731
    text, main, words, job, rungs = (
        " ".join(README.split()),
        read("main"),
        read("words"),
        read("bench")["main_job"],
        read("scale")["rungs"],
    )
    cell = lambda r, *key: next(x for x in r["summary"] if (x["target"], x["init"]) == key and x.get("numbers") == "teacher")  # noqa: E731
    short = lambda x: f"{x:.2f}".replace("0.", ".")  # noqa: E731
    above = [
        cell(main, t, "different")["number_loss_nats"] / cell(main, t, "same")["number_loss_nats"] - 1
        for t in ("tokens", "logits")
    ]
    taught = [row for row in main["summary"] if row["numbers"] == "teacher"]
    assert len(taught) == 4 and all(row["number_loss_nats"] < row["number_loss_start_nats"] for row in taught)
    assert f"ends {above[0]:.1%} (tokens) and {above[1]:.1%} (logits) above".replace("%", " %") in text
    worse = {
        init: [
            r["transfer"]
            for r in main["students"]
            if (r["numbers"], r["target"], r["init"]) == ("teacher", "tokens", init)
            and r["number_loss_nats"] >= r["number_loss_start_nats"]
        ]
        for init in ("same", "different")
    }
    assert f"{len(worse['same'])} of the 8 students of sampled" in text and f"{len(worse['different'])} of the 8 from" in text
    assert f"those three as to the others ({short(min(worse['same']))} to {short(max(worse['same']))})" in text
    largest = max(abs(r["transfer"]) for r in main["students"] if (r["numbers"], r["init"]) == ("teacher", "different"))
    assert 0.25 < largest < 0.34 and "by up to a third" in text
    same, different = ([short(cell(words, t, init)["transfer"]) for t in ("tokens", "logits")] for init in ("same", "different"))
    assert f"{same[0]} and {same[1]} from the same start, {different[0]} and {different[1]} from another" in text
    assert f"took {job['seconds']:.0f} s, start-up included, with {job['peak_mib']:.0f} MiB" in text
    size = {(r["size"], r["change"]): [short(cell(r, t, "same")["transfer"]) for t in ("tokens", "logits")] for r in rungs}
    small, middle, large = (size[k, scale.PLAIN] for k in ("0.3M", "0.6M", "2M"))
    more, stronger, wider = (size["0.6M", change] for change in scale.CHANGES["0.6M"])
    assert f"from {small[0]} to {large[0]} (tokens) and from {small[1]} to {large[1]} (logits)" in text
    assert f"({middle[0]} to {more[0]} and {middle[1]} to {more[1]} at 0.6 million)" in text
    assert f"stronger teachers give {stronger[0]} and {stronger[1]}, a wider head {wider[0]} and {wider[1]}" in text
    real, free = ([size[k, change] for k in ("0.3M", "2M")] for change in scale.CHANGES["2M"])
    assert f"at 0.3 million ({real[0][0]} and {real[0][1]}) and most of it at 2 million ({real[1][0]} and {real[1][1]})" in text
    assert f"left free, {free[0][0]} and {free[0][1]}, {free[1][0]} and {free[1][1]}" in text
    kl = {r["change"]: f"{r['kl_nats']:.3f}"[1:] for r in rungs if r["size"] == "2M"}
    assert f"(KL {kl['real text']} nats instead of {kl[scale.PLAIN]})" in text
    chosen = {r["name"]: r for r in read("choices")["choices"]}
    for name, before in {
        "question ends in `?`": "list prompts end in, ",
        choices.PLAIN: "cross instead of ",
        "teacher: held to numbers too": "numbers too** leaves ",
        "teacher: form of lists held, .02": "there is a number, whichever, leaves ",
        "teacher: form of lists held, 1": "at a weight of .02, and ",
        "teacher: 30 steps of 2e-3": "30 steps at 2e-3, transmit ",
        "student: head, embeddings frozen": "in the student too** gives ",
        "student: 200 steps": "Twice the steps give ",
        "150 pretraining steps": "shorter changes little: ",
        "400 pretraining steps": "after 150 steps, ",
        "1000 pretraining steps": "after 400, ",
    }.items():
        tokens, logits = (short(cell(chosen[name], t, "same")["transfer"]) for t in ("tokens", "logits"))
        assert f"{before}{tokens} and {logits}" in text, name
    far = [short(cell(chosen[f"{n} pretraining steps"], "logits", "different")["transfer"]) for n in (150, 400, 1000)]
    assert f"From another start, logits: {far[0]}, {far[1]} and {far[2]}" in text
    assert all(abs(cell(r, t, "different")["transfer"]) < 0.14 for r in rungs for t in ("tokens", "logits"))


def test_every_command_of_the_readme_has_flags_that_exist(capsys):
    scripts = {
        "train_teacher.py": train_teacher,
        "generate.py": generate,
        "train_student.py": train_student,
        "evaluate.py": evaluate,
    }
    seen = set()
    for command in commands():
        words = shlex.split(command)
        if words[0] != "python" or words[1] not in scripts:
            continue
        seen.add(words[1])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:  # --help is read last: a flag that is not there has exit code 2
            scripts[words[1]].main([*words[2:], "--help"])
        assert exit.value.code == 0, command
        help_text = capsys.readouterr().out
        assert all(word in help_text for word in words[2:] if word.startswith("--"))
    assert seen == set(scripts)


def test_the_readme_s_way_to_real_english_works(tmp_path):
    (line,) = [c for c in commands() if "pydoc_data" in c]
    subprocess.run(line.replace("python ", f"{sys.executable} ", 1), shell=True, check=True, cwd=tmp_path)
    (text,) = tmp_path.iterdir()
    assert len(model.read_text(text, "corpus")) > 400_000


def test_imports_go_from_scripts_to_model_only():
    ours = {"model", "train_teacher", "generate", "train_student", "evaluate"}
    for name in ours:
        imported = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / f"{name}.py").read_text(), flags=re.MULTILINE)) & ours
        assert imported <= ({"model"} if name != "model" else set())


def test_help_works_as_a_command():
    done = subprocess.run([sys.executable, "generate.py", "--help"], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and "--shuffle" in done.stdout
