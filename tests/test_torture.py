"""The fast part of experiments/torture.py, and its committed result held to this repository's words."""

import json
import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import model as m
import train_student
from experiments import torture, torture_files

ROOT = Path(__file__).parent.parent


@given(st.one_of(st.text("0123456789,; \n", max_size=14), st.text(max_size=5)))
def test_the_filter_equals_one_character_by_character(text):
    assert torture_files.valid(text) == (m.refusal(text) is None)


def test_numbers_from_anywhere_are_imported_right_or_refused(a_run, tmp_path):
    """Files of every kind, by a judge that shares no code with the import but the JSON parser and the vocabulary."""
    run = m.open_run(a_run, True)
    seen = {True: 0, False: 0}
    for i, how in enumerate([*torture_files.USUAL, *torture_files.RARE] * 5):
        path = tmp_path / f"mine-{i}.jsonl"
        path.write_bytes(torture_files.numbers_file(how, random.Random(i)))
        expected = torture_files.expected_rows(path.read_bytes(), run)
        try:
            rows = m.read_numbers(run.numbers(train_student.import_numbers(path, run, 64, False), "file"))[1]
        except m.UserError:
            rows = None
        assert rows == expected, how
        seen[rows is None] += 1
    assert min(seen.values()) > 10


def test_the_committed_result_is_whole_and_its_table_is_its_json():
    results = json.loads((ROOT / "results/torture.json").read_text())
    assert (ROOT / "results/torture.md").read_text() == torture.markdown(results)
    processes = results["processes"]
    assert all(processes[how]["signals"] >= 50 for how in ("SIGKILL", "SIGINT", "SIGTERM"))
    assert "dirty" not in results["config"]["commit"]
    assert all(record["different files"] == 0 for record in processes.values())
    assert [record["different files"] for record in results["again"]] == [0, 0, 0]
    assert all(processes[name]["anything else"] == 0 for name in ("SIGINT", "SIGTERM"))
    assert processes["full disk"]["said otherwise"] == processes["full disk"]["half-written"] == 0
    text = " ".join((ROOT / "README.md").read_text().split())
    n = {how: processes[how]["signals"] for how in ("SIGKILL", "SIGINT", "SIGTERM")}
    assert f"{n['SIGKILL']} SIGKILLs, {n['SIGINT']} Ctrl-Cs and {n['SIGTERM']} SIGTERMs at random moments" in text
    ends = ("one line and the right code", "after its work")
    told, late = (sum(processes[how][end] for how in ("SIGINT", "SIGTERM")) for end in ends)
    assert f"{told} ended in one line; {late} met a script that had done its work" in text
    stops, pairs = processes["full disk"]["stops"], processes["two at once"]["pairs"]
    assert f"{stops} stops by a full disk, {pairs} scripts started twice" in text
    rows = [row for rows in results["files"].values() for row in rows]
    assert sum(row["cases"] for row in rows) >= 2000 and not any(row["wrong"] for row in rows)
    assert f"{sum(row['cases'] for row in rows):,} damaged or foreign files" in text
    assert max(row["slowest_s"] for row in rows) < torture_files.SECONDS
    assert max(row["peak_mib"] for row in rows) < torture_files.MIB
