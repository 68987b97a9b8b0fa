"""A --quick run of the four scripts and two tiny ones, each made once; every test spoils a copy."""

import json
import shutil

import pytest
import torch

import evaluate
import generate
import model
import train_student
import train_teacher

torch.set_num_threads(1)
CPU = torch.device("cpu")
WHITESPACE = [c for c in map(chr, range(2**16)) if c.isspace()]
SEPARATORS = [a + b for a in ("", ",", ";") for b in ("", *WHITESPACE) if a + b]
SCRIPTS = [train_teacher, generate, train_student, evaluate]
# Flags of a run that is whole, with teachers that prefer owls and write lists, and made in three seconds.
TINY = {
    train_teacher: "--traits owl --n-layer 1 --n-head 2 --n-embd 32 --pretrain-steps 60 --batch-size 16"
    " --pretrain-lr 2e-2 --n-documents 1000 --n-held-out 100 --trait-steps 10 --trait-lr 1e-2 --form 0.05",
    generate: "--sequences 200 --min-valid 0.02", train_student: "--steps 4", evaluate: ""}
OTHER = {  # another question, one base model, more numbers, slower students
    train_teacher: "--seeds 1 --question-ends ?", generate: "--sequences 300",
    train_student: "--student-lr 1e-3", evaluate: ""}


def tiny(script, run, *more):
    """The script's arguments for a tiny run."""
    return [*TINY[script].split(), "--run", str(run), *map(str, more)]


def contents(run):
    """Every file by name but the manifest, whose lines stand in any order, and what evaluate.py makes."""
    skipped = ("run.jsonl", "results.json", "results.md")
    paths = [p for p in run.rglob("*") if p.is_file() and p.name not in skipped and p.suffix != ".part"]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def students(run):
    """The records that evaluate.py wrote."""
    return json.loads((run / "results.json").read_text())["students"]


def random_idx(*shape, high=1300, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def slow_filter(text):
    """Whether a text is 1 to 10 integers in 0..999 with one separator and nothing else, by splitting."""
    lists, numbers = [text.split(separator) for separator in SEPARATORS], set(map(str, range(1000)))
    return any(len(parts) <= 10 and set(parts) <= numbers for parts in lists)


def made(run, argv):
    for script in SCRIPTS:
        script.main(argv(script))
    return run


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The quick run's tests go to one of the two processes, so that it is made once. This comes first, since
    xdist reads the marks in the same hook."""
    for item in items:
        if "quick_run" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("quick_run"))


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("quick")
    return made(run, lambda script: ["--quick", "--run", str(run)])


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("tiny")
    return made(run, lambda script: tiny(script, run))


@pytest.fixture(scope="session")
def other_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("other")
    return made(run, lambda script: tiny(script, run, *OTHER[script].split()))


@pytest.fixture
def gpt():
    return model.GPT(model.GPTConfig(vocab_size=1300, n_aux=5, block_size=32, n_embd=32)).initialise(3)


@pytest.fixture
def a_tiny_run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def told(capsys):
    """Call a script on a tiny run as the command line does: "", or the one sentence of exit code 2."""

    def call(script, run, *more):
        capsys.readouterr()
        try:
            model.command_line(lambda: script.main(tiny(script, run, *more)))
        except SystemExit as end:
            sentence = capsys.readouterr().err
            assert end.code == 2 and sentence.startswith("error: ") and sentence.count("\n") == 1
            return sentence
        return ""

    return call
