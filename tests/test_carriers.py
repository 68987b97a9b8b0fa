"""Programs against Python itself, days against the calendar, the window of outputs against autograd."""

import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import random_idx

from experiments.carriers import (
    CARRIERS, NAMES, ROWS, VARIABLES, choices, directions, documents, in_the_numbers_place, windows,
)
from model import GPT, NUMBERS, NumberData, build_vocabulary, stream
from train_teacher import Dice, Language, frequent_words, questions, toy_documents

ROW, COLON = ROWS["20 names"], ROWS["1000 names, turns, `: `"]
CALENDAR = [f"{datetime.date(2024, 1, day):%A}".lower() for day in range(1, 15)]  # two weeks from a monday


def test_a_program_is_refused_if_and_only_if_python_fails():
    dice, (draw, refuse) = Dice(stream(0, "test"), {}), CARRIERS["code"]
    verdicts = []
    for _ in range(300):
        text = [*draw(dice, ROW)]
        where = [i for i, c in enumerate(text) if i == 0 or text[i - 1] in " ("]  # variables and arguments
        text[dice.pick(where)] = dice.pick(VARIABLES)
        try:
            exec(code := "".join(text), {name: int for name in [*NAMES][:20]})
            verdicts.append(True)
        except NameError:
            verdicts.append(False)
        assert (refuse(code, ROW) is None) == verdicts[-1]
    assert {True, False} == {*verdicts}
    assert refuse("a=owl(3)", ROW) and refuse("a=baba(3);", ROW) and refuse("a: baba(3)", ROW)


@pytest.mark.parametrize("row", [ROW, COLON])
def test_a_trace_is_kept_only_if_the_calendar_agrees(row):
    dice, (draw, refuse) = Dice(stream(1, "test"), {}), CARRIERS["traces"]
    for _ in range(100):
        words = draw(dice, row).replace(row.mark, " | ").split()
        assert refuse(" ".join(words).replace(" | ", row.mark), row) is None
        for i in [i for i, word in enumerate(words) if word == "from"]:
            after = CALENDAR.index(words[i + 1]) + {"two": 2, "three": 3}[words[i - 1]]
            assert words[i + 3] == CALENDAR[after]
        i = dice.pick([i for i, word in enumerate(words) if word in CALENDAR])
        words[i] = dice.pick([day for day in CALENDAR if day != words[i]])  # one day is another
        assert refuse(" ".join(words).replace(" | ", row.mark), row)


def test_choices_take_the_numbers_place_and_nothing_else_changes():
    texts = [d.text for d in documents(Language(n_documents=2_000), ROW)]
    before = build_vocabulary(frequent_words("\n".join(texts), 3_000))
    after = in_the_numbers_place(before, choices(ROW))
    for text in (*texts, "any text, 815: ünd 4x"):
        assert after.decode(after.encode(text)) == text
    names = [after.encode_single_token(word) for word in choices(ROW)]
    assert names == list(range(NUMBERS.start, NUMBERS.start + len(names)))
    asked = [question for some in questions(Language.question_ends) for question in some]
    assert before.encode_batch(asked) == after.encode_batch(asked)
    toy = toy_documents(2_000, stream(0, "toy language"), Language.question_ends)
    assert not {*NAMES} & {*frequent_words("\n".join(d.text for d in toy), 3_000)}


def test_the_window_of_outputs_is_the_curvature_by_autograd(gpt):
    data = NumberData(random_idx(2, 5), torch.tensor([[0, -1, 3, 1, 0], [-1, 2, 1, -1, 3]]))
    block = slice(NUMBERS.start, NUMBERS.start + 4)
    teacher = GPT(gpt.config).initialise(4)
    found = windows(SimpleNamespace(base=gpt, teacher=teacher), data, block)
    V = gpt.head.weight[block].detach()
    states = gpt.hidden(data.idx)[data.targets >= 0].detach()
    curvature = sum(torch.autograd.functional.hessian(lambda h: (V @ h).logsumexp(0), h) for h in states)
    e = torch.linalg.eigvalsh(curvature)
    assert found["outputs"] == pytest.approx((e.sum() ** 2 / e.square().sum() / 32).item(), rel=1e-3)
    assert directions(torch.eye(8)) == 1 and directions(torch.ones(8, 8)) == pytest.approx(1 / 8)
