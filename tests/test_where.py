"""where.py and how_close.py against slow obvious versions."""

from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, random_idx

from experiments import how_close, where
from model import GPT, NUMBERS, NumberData


@pytest.fixture
def unit(gpt):
    return SimpleNamespace(teacher=GPT(gpt.config).initialise(4), base=gpt, seed=0, trait="owl", device=CPU)


def lists():
    numbers, due = random_idx(30, 12, high=1000), random_idx(30, 12, high=2, seed=1) == 1
    return NumberData(NUMBERS.start + random_idx(30, 12, high=1000, seed=2), numbers.where(due, -1))


@torch.no_grad()
def test_what_is_known_of_the_numbers(unit):
    data = lists()
    steps = where.facts(unit, data)
    with pytest.raises(StopIteration) as end:
        while True:
            next(steps)
    known = end.value.value
    logits = [model(data.idx)[..., NUMBERS] for model in (unit.teacher, unit.base)]
    ratio = logits[0].log_softmax(-1) - logits[1].log_softmax(-1)  # (B, T, 1000)
    places = (data.targets >= 0).nonzero().tolist()
    says = torch.stack([ratio[b, t, data.targets[b, t]] for b, t in places])
    torch.testing.assert_close(known.says, says, atol=1e-5, rtol=1e-5)
    assert known.cooled["0"].tolist() == [logits[0][b, t].argmax().item() for b, t in places]
    top = where.tenth(unit, data, known, "top: left out").targets
    gone = [says[i].item() for i, (b, t) in enumerate(places) if top[b, t] < 0]
    assert sorted(gone) == sorted(says.tolist())[-(len(places) // 10) :]
    alone = where.tenth(unit, data, known, "top: alone").targets
    rest = [row[before != row].tolist() for row, before in zip(data.targets, top)]
    assert [row[row >= 0].tolist() for row in alone] == [row for row in rest if row]


def test_only_one_place_counts():
    data = lists()
    slow = [[y for y in row.tolist() if y >= 0] for row in data.targets]
    found = where.count(data, 2).targets
    assert [row[row >= 0].tolist() for row in found] == [[row[1]] for row in slow if len(row) >= 7]


@pytest.mark.parametrize("keep, add, angle", [(1.0, 0.0, 0.0), (0.0, 1.0, 90.0), (0.5, 0.5, 45.0)])
def test_a_blend_of_two_inits_has_the_angle_and_the_norm(gpt, keep, add, angle):
    """Two random matrices are orthogonal, up to one in the square root of their size."""
    other, before = GPT(gpt.config).initialise(9), gpt.head.weight.detach().clone()
    how_close.blend(gpt, dict(other.named_parameters()), keep, add)
    cosine = torch.cosine_similarity(gpt.head.weight.flatten(), before.flatten(), dim=0)
    assert torch.rad2deg(cosine.clamp(-1, 1).acos()).item() == pytest.approx(angle, abs=3)
    torch.testing.assert_close(gpt.head.weight.norm(), before.norm())
