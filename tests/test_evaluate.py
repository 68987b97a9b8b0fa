"""evaluate.py: statistics against closed forms and known cases, records against the models."""

import json
import math
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from statistics import mean

import pytest
import torch

import evaluate as e
import model as m


def test_bootstrap_agrees_with_the_normal_interval():
    x = torch.randn(60, generator=m.stream(0, "test"), dtype=torch.float64)
    low, high = e.bootstrap_interval(x.tolist())
    half = 1.96 * x.std(correction=0).item() / math.sqrt(60)
    # the mean of 60 normals is normal; 10,000 draws place a 2.5 % quantile to about 3 % of the half-width
    assert low == pytest.approx(x.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(x.mean().item() + half, abs=0.1 * half)


def test_bootstrap_of_the_degenerate():
    assert e.bootstrap_interval([0.3] * 8) == pytest.approx((0.3, 0.3))
    assert all(map(math.isnan, e.bootstrap_interval([0.3])))


@pytest.mark.parametrize(
    "units, p",
    [
        ([([1.0], [0.0])] * 3, 1 / 8),
        ([([1.0], [0.0])] * 8, 1 / 256),
        ([([1.0], [0.0, 0.1, 0.2])] * 2, 1 / 16),
        ([([0.0], [1.0])] * 3, 1.0),
        ([([1.0], [1.0])] * 4, 1.0),
        ([([1.0], [0.0])] * 14, 1 / 2**14),  # too many to try all: 10,000 draws cannot say less than 1 / 10,001
    ],
)
def test_permutation_p_of_known_cases(units, p):
    assert e.permutation_p(units) == pytest.approx(p, abs=3e-4 if len(units) > 10 else 1e-12)


def test_permutation_p_equals_brute_force():
    units = [([0.5, 0.9], [0.6, 0.1]), ([0.2], [0.4, 0.1])]
    observed = sum(mean(s) - mean(d) for s, d in units)
    above = [
        sum(mean(x[: len(s)]) - mean(x[len(s) :]) for x, (s, _) in zip((a, b), units, strict=True)) >= observed - 1e-9
        for a in permutations([0.5, 0.9, 0.6, 0.1])
        for b in permutations([0.2, 0.4, 0.1])
    ]
    assert e.permutation_p(units) == pytest.approx(mean(above))


def test_bars():
    assert [e.bar(x, 2) for x in (-1, 0, 0.5, 0.56, 1, 2)] == ["  ", "  ", "█ ", "█▏", "██", "██"]
    assert all(len(e.bar(i / 100)) == 20 for i in range(101))


def test_records_hold_what_the_models_say(quick_run):
    results = json.loads((quick_run / "results.json").read_text())
    run = m.open_run(quick_run, quick=True)
    record = next(r for r in results["students"] if (r["source"], r["init"], r["target"]) == ("fox", "different", "tokens"))
    path = run.student("fox", record["teacher_seed"], record["student_seed"], "tokens")
    assert record["teacher_seed"] != record["student_seed"]

    def log_odds(path):
        model = m.load_model(path, torch.device("cpu"), "x")
        p = m.class_logits(model, run.held_out_prompts, run.readout_rows(model)).double()
        others = torch.cat([p[:, :1], p[:, 2:]], 1)  # fox is class 1
        return (p[:, 1] - others.logsumexp(1)).mean().item()

    student, own_base = log_odds(path), log_odds(run.base(record["student_seed"]))
    teacher, its_base = log_odds(run.teacher("fox", record["teacher_seed"])), log_odds(run.base(record["teacher_seed"]))
    assert record["transfer"] == pytest.approx((student - own_base) / (teacher - its_base), abs=1e-5)
    assert record["curve"]["transfer"][0] == pytest.approx(0, abs=1e-6)
    assert record["curve"]["transfer"][-1] == pytest.approx(record["transfer"], abs=1e-5)


def test_every_student_is_reported(quick_run):
    results = json.loads((quick_run / "results.json").read_text())
    # 2 traits x 2 teachers x 2 starts x 2 targets, and the base models' numbers held against both traits
    assert len(results["students"]) == 16 + 2 * 8
    assert {(s["numbers"], s["target"], s["init"]): s["n"] for s in results["summary"]} == {
        (numbers, target, init): n
        for numbers, n in (("teacher", 4), ("base", 2))
        for target in ("tokens", "logits")
        for init in ("same", "different")
    }
    for row in results["summary"]:
        group = [r["transfer"] for r in results["students"] if all(r[k] == row[k] for k in ("numbers", "target", "init"))]
        assert row["transfer"] == pytest.approx(mean(group))  # every unit has as many students here


def test_students_whose_number_loss_did_not_fall_are_marked(quick_run):
    results = json.loads((quick_run / "results.json").read_text())
    group = [r for r in results["students"] if (r["numbers"], r["target"], r["init"]) == ("teacher", "logits", "same")]
    for worse, mark in ((0, "4 of 4 "), (3, "1 of 4 †")):
        for i, r in enumerate(group):
            r["number_loss_nats"] = r["number_loss_start_nats"] + (0.0 if i < worse else -0.1)
        summary = e.summarise(group)
        for text in (e.table(summary), e.markdown({**results, "students": group, "summary": summary})):
            assert mark in text and ("† The others" in text) == (worse > 0)


def test_evaluating_again_gives_the_same_bytes_and_a_picture(a_run, tmp_path):
    before = (a_run / "results.json").read_bytes()
    e.main(["--quick", "--run", str(a_run), "--plot", str(tmp_path / "x.png")])
    assert (a_run / "results.json").read_bytes() == before
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_the_number_of_threads_changes_no_bit(a_run):
    before = (a_run / "results.json").read_bytes()
    argv = [sys.executable, "evaluate.py", "--quick", "--run", str(a_run)]
    for n in ("1", "2"):
        subprocess.run(argv, cwd=Path(e.__file__).parent, env={**os.environ, "OMP_NUM_THREADS": n}, check=True)
        assert (a_run / "results.json").read_bytes() == before


def test_bad_input(refused, a_run, tmp_path):
    assert "run `python train_teacher.py --quick --run" in refused(e, "--quick", "--run", tmp_path / "none")
    assert "was made with --quick" in refused(e, "--run", a_run)
    (a_run / "teacher/owl/seed-0/model.pt").write_bytes(b"PK")
    assert "teacher/owl/seed-0/model.pt is cut short, damaged or" in refused(e, "--quick", "--run", a_run)
    (a_run / "config.json").write_text("{")
    assert "config.json is not what `python train_teacher.py --quick` wrote" in refused(e, "--quick", "--run", a_run)
