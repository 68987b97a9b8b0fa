"""The pages: their commands exist, their links lead somewhere, and their tables are the committed results."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import SCRIPTS

import evaluate
from experiments import tables

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {"README.md": README, "experiments/README.md": (ROOT / "experiments/README.md").read_text()}


def commands():
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    return [part.strip() for line in lines if line for part in line.split("&&")]


def test_two_commands_tell_the_main_job_and_the_tests_that_ci_runs():
    main_job, tests = re.findall(r"```bash\n(python3 -m venv .*?)```", README, flags=re.DOTALL)
    scripts = re.findall(r"python (\w+)\.py", main_job)
    assert scripts == [script.__name__ for script in SCRIPTS]
    assert "python -m pytest" in tests
    assert " ".join(tests.split()) in " ".join((ROOT / ".ci/run").read_text().split())


def test_every_command_has_flags_that_exist(capsys):
    scripts = {f"{script.__name__}.py": script for script in SCRIPTS}
    seen = set()
    for words in map(shlex.split, commands()):
        if words[0] == "python" and words[1] in scripts:
            seen.add(words[1])
            with pytest.raises(SystemExit) as exit:  # --help comes last: an unknown flag has exit code 2
                scripts[words[1]].main([*words[2:], "--help"])
            assert exit.value.code == 0, words
    capsys.readouterr()
    assert seen == set(scripts)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_sections(page):
    for link in re.findall(r"\]\(([^)]*)\)", PAGES[page]):
        if link.startswith("http"):
            continue
        path, _, section = link.partition("#")
        target = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert target.exists(), link
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert section in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_the_committed_results(page):
    assert "<!-- table: " in PAGES[page] and tables.filled(PAGES[page]) == PAGES[page]


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_table_is_its_json(path):
    results = json.loads(path.read_text())
    made_by = {"main": "evaluate", "words": "evaluate", "other_seeds": "evaluate",
               "mlp_fashion_mnist": "experiments.mlp", "growth_large": "experiments.growth"}
    maker = importlib.import_module(made_by.get(path.stem, f"experiments.{path.stem}"))
    assert path.with_suffix(".md").read_text() == maker.markdown(results)
    assert results == json.loads(path.read_text())  # a table changes nothing in what it shows
    assert not results["config"]["quick"] and "dirty" not in results["config"]["commit"]
    assert {"config", "records", "summary"} <= results.keys() or maker is evaluate
