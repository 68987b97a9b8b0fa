"""Optimisers: Signum by hand, a curve read where a share is learnt, and what a teacher's KL is made of."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_idx

from experiments import muon, optimisers
from model import NUMBERS, GPT, GPTConfig, NumberData, pad, stream


def test_signum_moves_by_the_sign_of_torchs_momentum():
    grads = torch.randn(20, 7, generator=stream(0, "test"), dtype=torch.float64)
    mine, theirs = (torch.zeros(7, dtype=torch.float64) for _ in range(2))
    signum, sgd = optimisers.Signum([mine], lr=0.1), torch.optim.SGD([theirs], momentum=0.9)
    expected = torch.zeros(7, dtype=torch.float64)
    for g in grads:
        mine.grad, theirs.grad = g, g.clone()
        signum.step(), sgd.step()
        expected -= 0.1 * sgd.state[theirs]["momentum_buffer"].sign()
    torch.testing.assert_close(mine, expected)


def test_where_a_share_is_learnt():
    curve = {"learnt": [0.0, 0.4, 0.2, 0.8, 0.3], "transfer": [0.0, 1.0, 2.0, 5.0, 7.0]}
    found = optimisers.on_the_way(curve)
    assert found["at 0.5"]["transfer"] == pytest.approx(3.5)  # half-way from .2 to .8
    assert found["all steps"]["transfer"] == 7 and "at 0.9" not in found


def test_a_small_kl_is_head_times_change_times_shown():
    """With a head so small that all numbers are about as likely, and a teacher close to its base."""
    config = GPTConfig(NUMBERS.stop + 9, n_aux=3, block_size=8, n_layer=1, n_head=2, n_embd=8)
    base, teacher = (GPT(config).initialise(0).double() for _ in range(2))
    with torch.no_grad():
        for m in (base, teacher):
            m.head.weight *= 1e-2
        teacher.ln_f.bias += torch.randn(8, generator=stream(1, "test"))
    idx = random_idx(81, 6, high=config.vocab_size)
    run = SimpleNamespace(unseen_questions=pad([[1, 2, 3]]))
    data = NumberData(idx, random_idx(81, 6, high=1000))
    found = muon.anatomy(SimpleNamespace(base=base, teacher=teacher, run=run, numbers=lambda: data))
    assert found["product"] == pytest.approx(found["kl"], rel=0.02) and found["kl"] > 0
