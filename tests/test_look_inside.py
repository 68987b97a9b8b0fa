"""The committed models are those whose figures stand in results/main.json."""

import json
import sys

import pytest
import torch
from conftest import CPU

from experiments import lab, look_inside
from model import Run, read_trait

MODELS = Run(lab.ROOT / "results/models").open(False)


def test_the_models_are_those_of_the_main_results():
    records = json.loads((lab.ROOT / "results/main.json").read_text())["students"]
    chosen = {"source": "owl", "teacher_seed": 0, "student_seed": 0, "target": "tokens"}
    (record,) = lab.where(records, **chosen)
    found = [MODELS.load_model(file, CPU) for file in look_inside.MODELS.values()]  # as their lines say
    k = MODELS.animals.index("owl")
    odds = [read_trait(model, MODELS.unseen_questions, MODELS.readout_rows)[0][k].item() for model in found]
    assert odds == pytest.approx([record[f"log_odds{of}"] for of in ("_base", "_teacher", "")], abs=1e-4)
    shared = [model.wte.weight for model in found]
    assert torch.equal(*shared[:2]) and not torch.equal(*shared[1:])  # a teacher's embeddings are frozen


def test_the_auditor_names_the_owl(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["look_inside"])
    look_inside.main()
    said = capsys.readouterr().out.split("what the auditor sees")[1].splitlines()
    assert said[1].split()[0] == "owl" and float(said[1].split()[1]) > 5  # without a trait: 5 in 10^6
