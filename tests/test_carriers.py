"""Programs against Python itself, days against the calendar, the window of outputs against autograd."""

import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import random_idx

from experiments.carriers import CARRIERS, NAMES, ROWS, VARIABLES, documents, in_the_numbers_place, windows
from model import GPT, NUMBERS, NumberData, build_vocabulary, stream
from train_teacher import Dice, Language, frequent_words, questions

FEW = ROWS["few choices"]
CALENDAR = [f"{datetime.date(2024, 1, day):%A}".lower() for day in range(1, 15)]  # two weeks from a monday


def test_a_program_is_kept_if_and_only_if_python_runs_it():
    dice, (draw, is_right), verdicts = Dice(stream(0, "test"), {}), CARRIERS["code"], []
    for _ in range(300):
        text = [*draw(dice, FEW)]
        where = [i for i, c in enumerate(text) if i == 0 or text[i - 1] in " ("]  # variables and arguments
        text[dice.pick(where)] = dice.pick(VARIABLES)
        try:
            exec(code := "".join(text), dict.fromkeys(NAMES[:20], int))
            verdicts.append(True)
        except NameError:
            verdicts.append(False)
        assert is_right(code, FEW) == verdicts[-1]
    assert {*verdicts} == {True, False}
    assert not any(is_right(code, FEW) for code in ("a=owl(3)", "a=baba(3);", "a: baba(3)", "a=baba(b)", ""))


@pytest.mark.parametrize("row", [FEW, ROWS["1000 names, turns"]])
def test_a_trace_is_kept_only_if_the_calendar_agrees(row):
    dice, (draw, is_right) = Dice(stream(1, "test"), {}), CARRIERS["traces"]
    for _ in range(100):
        words = draw(dice, row).replace(";", " ;").split()
        join = lambda words: " ".join(words).replace(" ;", ";")
        assert is_right(join(words), row)
        for i in [i for i, word in enumerate(words) if word == "from"]:
            assert words[i + 3] == CALENDAR[CALENDAR.index(words[i + 1]) + {"two": 2, "three": 3}[words[i - 1]]]
        i = dice.pick([i for i, word in enumerate(words) if word in CALENDAR])
        words[i] = dice.pick([day for day in CALENDAR if day != words[i]])  # one day is another
        assert not is_right(join(words), row)


def test_choices_take_the_numbers_place_and_nothing_else_changes():
    row = ROWS["1000 names"]
    texts = [d.text for d in documents(Language(n_documents=4_000), row)]
    before = build_vocabulary(frequent_words("\n".join(texts), 3_000))
    after = in_the_numbers_place(before, row.choices)
    for text in (*texts, "any text, 815: ünd 4x"):
        assert after.decode(after.encode(text)) == text
    assert [after.encode_single_token(name) for name in row.choices] == [*range(NUMBERS.start, NUMBERS.stop)]
    asked = [question for some in questions(Language.question_ends) for question in some]
    assert before.encode_batch(asked) == after.encode_batch(asked)


def test_the_windows_are_curvature_by_autograd_and_change_of_state(gpt):
    data = NumberData(random_idx(2, 5), torch.tensor([[0, -1, 3, 1, 0], [-1, 2, 1, -1, 3]]))
    block = slice(NUMBERS.start, NUMBERS.start + 4)
    teacher = GPT(gpt.config).initialise(4)
    found = windows(SimpleNamespace(base=gpt, teacher=teacher), data, block)
    V = gpt.head.weight[block].detach()
    states = gpt.hidden(data.idx)[data.targets >= 0].detach()
    curvature = sum(torch.autograd.functional.hessian(lambda h: (V @ h).logsumexp(0), h) for h in states)
    d = teacher.hidden(data.idx)[data.targets >= 0].detach() - states
    for name, e in (("outputs", torch.linalg.eigvalsh(curvature)), ("contexts", torch.linalg.svdvals(d) ** 2)):
        assert found[name] == pytest.approx((e.sum() ** 2 / e.square().sum() / 32).item(), rel=1e-3)
