"""evaluate.py: statistics against closed forms and brute force, records against the models."""

import json
import math
import re
import shutil
from itertools import permutations
from statistics import mean

import pytest
import torch
from conftest import CPU, contents, students

import evaluate as e
import generate
import model as m
import train_student
import train_teacher

CELL = ("numbers", "target", "init")


def test_bootstrap_agrees_with_the_normal_interval():
    x = torch.randn(60, generator=m.stream(0, "test"), dtype=torch.float64)
    half = 1.96 * x.std(correction=0).item() / math.sqrt(60)
    # the mean of 60 normals is normal; 10,000 draws place a 2.5 % quantile to about 3 % of the half-width
    around = x.mean().item() - half, x.mean().item() + half
    assert e.bootstrap_interval(x.tolist()) == pytest.approx(around, abs=0.1 * half)
    assert e.bootstrap_interval([0.3] * 8) == pytest.approx((0.3, 0.3))
    assert e.bootstrap_interval([0.3]) == (None, None)


@pytest.mark.parametrize("units, p", [
    ([([1.0], [0.0])] * 3, 1 / 8), ([([1.0], [0.0])] * 8, 1 / 256), ([([0.0], [1.0])] * 3, 1.0),
    ([([1.0], [1.0])] * 4, 1.0), ([([1.0], [0.0, 0.1, 0.2])] * 2, 1 / 16),
    ([([1.0], [0.0])] * 14, 1 / 2**14)])  # too many to try all: 10,000 draws say no less than 1 / 10,001
def test_permutation_p_of_known_cases(units, p):
    assert e.permutation_p(units) == pytest.approx(p, abs=3e-4 if len(units) > 10 else 1e-12)


def test_permutation_p_equals_brute_force():
    units = [([0.5, 0.9], [0.6, 0.1]), ([0.2], [0.4, 0.1])]
    statistic = lambda x, n: mean(x[:n]) - mean(x[n:])
    observed = sum(statistic(same + different, len(same)) for same, different in units)
    above = [statistic(a, 2) + statistic(b, 1) >= observed - 1e-9
             for a in permutations([0.5, 0.9, 0.6, 0.1]) for b in permutations([0.2, 0.4, 0.1])]
    assert e.permutation_p(units) == pytest.approx(mean(above))


def test_records_hold_what_the_models_say(quick_run):
    run = m.Run(quick_run).open(True)

    def log_odds(name):  # fox is class 1
        logits = m.class_logits(run.load_model(name, CPU), run.unseen_questions, run.readout_rows).double()
        return (logits[:, 1] - logits[:, [0, *range(2, 16)]].logsumexp(1)).mean().item()

    for r in (r for r in students(quick_run) if r["source"] == "fox"):
        its, own = r["teacher_seed"], r["student_seed"]
        moved = log_odds(f"student/fox/teacher-{its}/seed-{own}/{r['target']}.pt")
        moved -= log_odds(f"base/seed-{own}.pt")
        transfer = moved / (log_odds(f"teacher/fox/seed-{its}.pt") - log_odds(f"base/seed-{its}.pt"))
        assert r["init"] == ("same" if its == own else "different")
        curve = r["curve"]["transfer"]
        assert [r["transfer"], curve[0], curve[-1]] == pytest.approx([transfer, 0, transfer], abs=1e-5)
        assert r["identified"] == (r["shifts"].index(max(r["shifts"])) == 1)


def test_every_student_is_reported(quick_run):
    results = json.loads((quick_run / "results.json").read_text())
    # 2 traits x 2 teachers x 2 inits x 2 targets, and the base models' numbers held against both traits
    assert len(results["students"]) == 16 + 2 * 8
    ways = [(target, init) for target in ("tokens", "logits") for init in ("same", "different")]
    assert {tuple(map(row.get, CELL)): row["n"] for row in results["summary"]} == {
        (numbers, *way): n for numbers, n in (("teacher", 4), ("base", 2)) for way in ways}
    for row in results["summary"]:
        group = [r for r in results["students"] if all(r[key] == row[key] for key in CELL)]
        assert row["transfer"] == pytest.approx(mean(r["transfer"] for r in group))  # units are as large here
        assert row["ci_low"] <= row["transfer"] <= row["ci_high"]
    for test in results["tests"].values():  # four units, each with one student of each init: 16 labellings
        assert test["units"] == 4 and 16 * test["same_above_different_p"] % 1 == 0


def test_a_unit_counts_once_and_students_that_did_not_learn_are_marked(quick_run):
    results = json.loads((quick_run / "results.json").read_text())
    of = lambda its, own, transfer, loss: results["students"][0] | {
        "source": "owl", "numbers": "teacher", "target": "tokens", "init": "different", "teacher_seed": its,
        "student_seed": own, "transfer": transfer, "number_loss_start_nats": 2.0, "number_loss_nats": loss}
    for loss, learnt, mark in ((1.0, "4 of 4", False), (2.0, "1 of 4 †", True)):
        (row,) = e.summarise([*(of(0, seed, 0.5, loss) for seed in (1, 2, 3)), of(1, 0, 0.1, 1.0)])
        assert (row["transfer"], row["ci_low"], row["ci_high"]) == pytest.approx((0.3, 0.1, 0.5))
        text = e.markdown(results | {"summary": [row]})
        assert learnt in text and ("†" in text) == mark


def test_evaluating_again_gives_the_same_records_and_a_picture(quick_run, tmp_path, capsys):
    run = shutil.copytree(quick_run, tmp_path / "run")
    e.main(["--quick", "--run", str(run), "--plot", str(tmp_path / "x.png")])
    before, after = (json.loads((path / "results.json").read_text()) for path in (quick_run, run))
    assert all(before[key] == after[key] for key in ("students", "summary", "tests"))
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    out, table = capsys.readouterr().out, (run / "results.md").read_text()
    for row in after["summary"]:
        assert "transfer_{}_{}_{}:".format(*map(row.get, CELL)) + f" {row['transfer']:.3f}\n" in out
        assert f"| {row['transfer']:+.3f} |" in table


def test_one_base_model_is_one_unit_and_no_test(other_run):
    results = json.loads((other_run / "results.json").read_text())
    assert results["tests"] == {} and {r["init"] for r in results["students"]} == {"same"}
    assert [row["n"] for row in results["summary"]] == [1] * 4  # owl's and the base model's, two targets
    assert (other_run / "results.md").read_text().count("one unit") == 4


@pytest.mark.parametrize("gone, made, told_of", [
    (["student/owl"], [(train_student, "--traits owl --steps 5")], "student/owl/.* steps = 5, not 4"),
    (["numbers/owl", "student/owl"], [(generate, "--from teacher --sequences 300"), (train_student, "")],
     "numbers/owl/.* sequences = 300, not 200")])
def test_what_was_made_with_different_knobs_is_not_averaged(gone, made, told_of, a_tiny_run, told):
    for part in gone:
        shutil.rmtree(a_tiny_run / part)
    assert not any(told(script, a_tiny_run, *flags.split()) for script, flags in made)
    before = contents(a_tiny_run)
    assert re.search(told_of, told(e, a_tiny_run)) and contents(a_tiny_run) == before


@pytest.mark.parametrize("name", ["owl/teacher-0/seed-7", "owl/teacher-7/seed-0", "wolf/teacher-0/seed-0"])
def test_a_student_of_what_the_run_has_not_is_named(name, a_tiny_run, told):
    (a_tiny_run / f"student/{name}").parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(a_tiny_run / "student/owl/teacher-0/seed-0", a_tiny_run / f"student/{name}")
    assert f"student/{name}/" in told(e, a_tiny_run)


def test_what_was_dropped_with_all_that_came_of_it_is_not_asked_for(a_tiny_run, tmp_path, told):
    """The base models' numbers, then seed 1; the manifest still tells of both."""
    for part in ("numbers/base", "student/base"):
        shutil.rmtree(a_tiny_run / part)
    assert not told(e, a_tiny_run) and {r["source"] for r in students(a_tiny_run)} == {"owl"}
    dropped = shutil.ignore_patterns("language.json", "*-1*")
    less = shutil.copytree(a_tiny_run, tmp_path / "less", ignore=dropped)
    assert not told(train_teacher, less, "--seeds", "0") and not told(e, less)
    assert {r["student_seed"] for r in students(less)} == {0}


def test_a_student_that_did_not_move_is_not_identified(a_tiny_run, told):
    shutil.rmtree(a_tiny_run / "student")
    assert told(train_student, a_tiny_run, "--student-lr", "0") == ""
    assert told(e, a_tiny_run) == ""
    assert not any(r["identified"] or r["transfer"] for r in students(a_tiny_run))
