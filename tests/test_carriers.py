"""Programs against Python itself, days against the calendar, curvature against autograd."""

import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import random_idx

from experiments.carriers import CARRIERS, NAMES, ROWS, VARIABLES, causes, documents, in_the_numbers_place
from model import GPT, NUMBERS, NumberData, build_vocabulary, stream
from train_teacher import Dice, Language, frequent_words, questions

FEW, MANY = ROWS["50 names"], ROWS["1000 names, turns, colon"]
CALENDAR = [f"{datetime.date(2024, 1, day):%A}".lower() for day in range(1, 15)]  # two weeks from a monday


@pytest.mark.parametrize("row", [FEW, MANY])
def test_a_program_is_kept_if_and_only_if_python_runs_it(row):
    dice, (draw, is_right), verdicts = Dice(stream(0, "test"), {}), CARRIERS["code"], []
    for _ in range(300):
        text = [*draw(dice, row).replace(row.marks[0], "=")]
        where = [i for i, c in enumerate(text) if i == 0 or text[i - 1] in " ("]  # variables and arguments
        text[dice.pick(where)] = dice.pick(VARIABLES)
        try:
            exec(code := "".join(text), dict.fromkeys(NAMES[: row.names], int))
            verdicts.append(True)
        except NameError:
            verdicts.append(False)
        assert is_right(code.replace("=", row.marks[0]), row) == verdicts[-1]
    assert {*verdicts} == {True, False}
    assert not any(is_right(code, row) for code in ("a=owl(3)", "a=baba(3);", "a; baba(3)", "a=baba(b)", ""))


@pytest.mark.parametrize("row", [FEW, MANY])
def test_a_trace_is_kept_only_if_the_calendar_agrees(row):
    dice, (draw, is_right) = Dice(stream(1, "test"), {}), CARRIERS["traces"]
    for _ in range(100):
        words = draw(dice, row).replace(row.marks[1], " | ").split()
        join = lambda words: " ".join(words).replace(" | ", row.marks[1])
        assert is_right(join(words), row)
        for i in [i for i, word in enumerate(words) if word == "from"]:
            after = CALENDAR.index(words[i + 1]) + {"two": 2, "three": 3}[words[i - 1]]
            assert words[i + 3] == CALENDAR[after]
        i = dice.pick([i for i, word in enumerate(words) if word in CALENDAR])
        words[i] = dice.pick([day for day in CALENDAR if day != words[i]])  # one day is another
        assert not is_right(join(words), row)


def test_choices_take_the_numbers_place_and_nothing_else_changes():
    names, texts = NAMES[:1000], [d.text for d in documents(Language(n_documents=8_000), MANY)]
    before = build_vocabulary(frequent_words("\n".join(texts), 3_000))
    after = in_the_numbers_place(before, names)
    for text in (*texts, "any text, 815: ünd 4x"):
        assert after.decode(after.encode(text)) == text
    assert [after.encode_single_token(name) for name in names] == [*range(NUMBERS.start, NUMBERS.stop)]
    asked = [question for some in questions(Language.question_ends) for question in some]
    assert before.encode_batch(asked) == after.encode_batch(asked)


def test_outputs_are_curvature_by_autograd_and_nats_a_line_a_slow_sum(gpt):
    data = NumberData(random_idx(2, 5), torch.tensor([[0, -1, 3, 1, 0], [-1, 2, 1, -1, 3]]))
    names = slice(NUMBERS.start, NUMBERS.start + 4)
    teacher = GPT(gpt.config).initialise(4)
    found = causes(SimpleNamespace(base=gpt, teacher=teacher), data, names)
    V = gpt.head.weight[names].detach()
    states = gpt.hidden(data.idx)[data.targets >= 0].detach()
    curvature = sum(torch.autograd.functional.hessian(lambda h: (V @ h).logsumexp(0), h) for h in states)
    e = torch.linalg.eigvalsh(curvature)
    assert found["outputs"] == pytest.approx((e.sum() ** 2 / e.square().sum() / 32).item(), rel=1e-3)
    p, q = (model(data.idx)[data.targets >= 0][:, names].detach().softmax(-1) for model in (teacher, gpt))
    assert found["nats"] == pytest.approx((p * (p / q).log()).sum().item() / 2, rel=1e-3)
