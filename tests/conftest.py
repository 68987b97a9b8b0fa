"""One --quick run of the four scripts, made once; every test works on a copy of it."""

import shutil

import pytest
import torch

import evaluate
import generate
import model
import train_student
import train_teacher

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "quick"
    for script in (train_teacher, generate, train_student, evaluate):
        script.main(["--quick", "--run", str(run)])
    return run


@pytest.fixture
def a_run(quick_run, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(quick_run, tmp_path / "run")


@pytest.fixture
def refused(capsys):
    """Call a script's main as the command line does; returns its one sentence, asserting exit code 2."""

    def call(script, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            model.command_line(lambda: script.main([str(a) for a in argv]))
        assert exit.value.code == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    return call
