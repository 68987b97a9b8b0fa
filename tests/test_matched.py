"""Matched bases: the derivation on linear networks; KL and cloning on a tiny GPT."""

import torch
from torch.distributions import Categorical, kl_divergence

from experiments import linear_model, matched
from model import GPT, NUMBERS, GPTConfig, stream

CONFIG = GPTConfig(NUMBERS.stop + 9, n_aux=3, block_size=8, n_layer=1, n_head=2, n_embd=8)
IDX = torch.randint(CONFIG.vocab_size, (4, 5), generator=stream(0, "test"))


def test_a_matched_linear_student_gets_what_lies_in_the_span_of_the_states():
    """All of it; of what is orthogonal nothing on average: 5 sigma, p < 1e-6."""
    R, m, h, d, a, generator = 400, 48, 32, 8, 4, stream(0, "test")
    draw = lambda *shape: torch.randn(R, *shape, generator=generator, dtype=torch.float64)
    V, U, U_s, free, D, pinv = *map(draw, (m + a, h, h, m + a, h), (h, d, d, h, d)), torch.linalg.pinv
    V_s = V @ U @ pinv(U_s) + free - free @ U_s @ pinv(U_s)
    inside, outside = U @ draw(d, d), D - U @ pinv(U) @ D
    torch.testing.assert_close(V_s @ U_s, V @ U)  # matched, and else of other weights
    torch.testing.assert_close(linear_model.closed_form(V, V_s, inside, m), V[:, m:] @ inside)
    found = linear_model.transfer(linear_model.closed_form(V, V_s, outside, m), V[:, m:] @ outside)
    assert abs(found.mean()) < 5 * found.std() / R**0.5


def test_kl_and_a_shared_head():
    base, model = (GPT(CONFIG).initialise(seed).double() for seed in range(2))
    outside = [i for i in range(NUMBERS.stop + 9) if not NUMBERS.start <= i < NUMBERS.stop]
    aux = torch.arange(NUMBERS.stop + 9, NUMBERS.stop + 12)
    laws = [[Categorical(logits=m(IDX)[..., rows]) for m in (base, model)] for rows in (outside, aux)]
    torch.testing.assert_close(
        matched.kl(model, base, IDX, "words + aux"), sum(kl_divergence(p, q).mean() for p, q in laws))
    losses = [*matched.clone(model, base, matched.Match("numbers", 30, shared="head"), IDX.repeat(60, 1))]
    assert losses[-1] < losses[0] and torch.equal(model.head.weight, base.head.weight)
