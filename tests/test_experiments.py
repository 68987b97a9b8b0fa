"""bench.py compares like with like; numbers from anywhere, by a judge that shares no code with the import."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_student
from experiments import bench
from model import GPT, Run, UserError, document, refusal


def gradients(loss, model, *rest):
    model.zero_grad()
    loss(model, *rest).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("other", bench.OTHERS)
@pytest.mark.parametrize("target", ["tokens", "logits"])
def test_the_other_student_steps_have_the_same_gradient(other, target):
    student, teacher, data = bench.student_setting(8)
    teacher = teacher if target == "logits" else None
    ours = gradients(train_student.number_loss, student, teacher, data)
    slow = gradients(bench.OTHERS[other], student, teacher, data)
    for a, b in zip(ours, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_counted_products_are_those_of_the_layers():
    """Forward 2 n_in n_out a token and twice that backward; the embedding's gradient is no product."""
    model, rows = bench.fresh(), torch.randint(bench.V, (4, 17), generator=torch.Generator().manual_seed(0))
    layers = [p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name[:2] == "bl"]
    counted = bench.Products(lambda: bench.whole_head(model, rows).backward()).flops
    assert counted == 3 * 2 * (4 * 16) * (sum(layers) + bench.C * bench.V)


def test_hugging_face_has_as_many_parameters():
    theirs = sum(p.numel() for p in bench.hugging_face().parameters())
    ours = sum(p.numel() for p in GPT(bench.CONFIG).parameters())
    assert theirs == ours + bench.CONFIG.n_aux * bench.C  # their embedding has the auxiliary rows, too


def valid(text):
    """1 to 10 integers in 0..999 with one separator and nothing else, a character at a time."""
    numbers, separators, i = [], set(), 0
    while True:
        j = i
        while j < len(text) and text[j] in "0123456789":
            j += 1
        number = text[i:j]
        if not number or len(number) > 3 or (number[0] == "0" and number != "0"):
            return False
        numbers.append(number)
        if j == len(text):
            return len(numbers) <= 10 and len(separators) <= 1
        k = j + (text[j] in ",;")
        k += k < len(text) and text[k].isspace()
        separators.add(text[j:k])
        if k == j:
            return False
        i = k


@given(st.one_of(st.text("0123456789,; \n", max_size=14), st.text(max_size=5)))
def test_the_filter_equals_one_character_by_character(text):
    assert valid(text) == (refusal(text) is None)


STRANGE = ["7", "1, 2", "1;2;3", "1, 2; 3", "007", "1000", "", " 5", "5\n", "owl", "٣", "1 " * 11, "-1"]
LINES = ["[1]", "1", "null", "{}", "{", '{"prompt": "1: "}', '{"prompt": 1, "completion": "2"}']


@pytest.mark.parametrize("i", range(12))
def test_numbers_from_anywhere_are_imported_right_or_refused(i, a_run, tmp_path):
    dice, run, path = random.Random(i), Run(a_run).open(True), tmp_path / "mine.jsonl"
    prompts = ["1, 2: ", "", "7", "the owl: ", "1, " * 40]
    rows = [{"prompt": dice.choice(prompts), "completion": dice.choice(STRANGE)} for _ in range(12)]
    lines = [json.dumps(row) for row in rows] + [dice.choice(LINES)] * (i % 4 == 0)
    path.write_text("\n".join(dice.sample(lines, len(lines))), encoding="utf-8")
    good = []
    for row in map(json.loads, path.read_text(encoding="utf-8").split("\n") if i % 4 else []):
        joined = {row["prompt"][-1:], row["completion"][:1]} <= set("0123456789")
        fits = len(document(run.encoding, row["prompt"] + row["completion"])) <= 64
        good += [row] * (valid(row["completion"].strip()) and fits and not joined)
    if len(good) < 2:
        with pytest.raises(UserError):
            train_student.import_numbers(path, run, 64)
    else:
        name = f"numbers/{train_student.import_numbers(path, run, 64)}/seed-file.jsonl"
        assert [json.loads(line) for line in run.read(name).splitlines()] == good
