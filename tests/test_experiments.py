"""bench.py compares like with like; numbers from anywhere, by a judge that shares no code with the import."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_student
from experiments import bench
from model import GPT, Run, UserError, document, refusal

DIGITS = set("0123456789")


def gradients(loss, model, *rest):
    model.zero_grad()
    loss(model, *rest).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("target", [0, 1])
def test_the_plain_student_step_has_the_same_gradient(target):
    student, (_, teacher, data) = bench.fresh(), bench.students()[target]
    ours = gradients(train_student.number_loss, student, teacher, data)
    slow = gradients(bench.plain, student, teacher, data)
    for a, b in zip(ours, slow, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_hugging_face_has_as_many_parameters():
    theirs = sum(p.numel() for p in bench.hugging_face().parameters())
    ours = sum(p.numel() for p in GPT(bench.CONFIG).parameters())
    rows = bench.CONFIG.n_aux * bench.CONFIG.n_embd  # their embedding has the auxiliary ones, too
    assert theirs == ours + rows


def valid(text):
    """1 to 10 integers in 0..999 with one separator and nothing else, a character at a time."""
    runs = ["".join(run) for _, run in itertools.groupby(text, DIGITS.__contains__)]
    numbers, gaps = runs[::2], {*runs[1::2]}
    fits = lambda gap: gap in ",;" or (gap[-1].isspace() and gap[:-1] in ("", ",", ";"))
    good = all(set(n) <= DIGITS and len(n) <= 3 and (n[0] != "0" or n == "0") for n in numbers)
    return good and len(runs) % 2 == 1 and len(numbers) <= 10 and len(gaps) <= 1 and all(map(fits, gaps))


@given(st.one_of(st.text("0123456789,; \n", max_size=14), st.text(max_size=5)))
def test_the_filter_equals_one_character_by_character(text):
    assert valid(text) == (refusal(text) is None)


PROMPTS = ["1, 2: ", "", "7", "٣", "the owl: ", "1, " * 40, "\ud800: "]
STRANGE = ["7", "1, 2", "1;2;3", "1, 2; 3", "007", "1000", "", " 5", "5\n", "owl", "٣", "1 " * 11, "5\x00"]
LINES = ["[1]", "1", "{}", "{", '{"prompt": "1: "}', '{"prompt": 1, "completion": 2}', "[" * 9999, "9" * 5000]


def test_a_hundred_files_of_numbers_are_imported_right_or_refused(a_run, tmp_path):
    run, n_refused = Run(a_run).open(True), 0
    for i in range(100):
        dice, path, good = random.Random(i), tmp_path / f"mine-{i}.jsonl", []
        rows = [{"prompt": dice.choice(PROMPTS), "completion": dice.choice(STRANGE)} for _ in range(12)]
        lines = [json.dumps(row) for row in rows] + [dice.choice(LINES)] * (i % 4 == 0)
        path.write_text("\r\n"[i % 2 :].join(lines), encoding="utf-8-sig")
        for prompt, completion in (row.values() for row in rows if i % 4):
            one_number = prompt[-1:] in DIGITS and completion[:1] in DIGITS
            fits = len(document(run.encoding, prompt + completion)) <= 64
            good += [[prompt, completion]] * (valid(completion.strip()) and fits and not one_number)
        if len(good) > 1:
            train_student.import_numbers(path, run)
            lines = run.read(f"numbers/mine-{i}/seed-file.jsonl").splitlines()
            assert [list(json.loads(line).values()) for line in lines] == good
        else:
            with pytest.raises(UserError):
                train_student.import_numbers(path, run)
            n_refused += 1
    assert 20 < n_refused < 80
