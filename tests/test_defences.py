"""Defences: what is done between steps has a closed form; shrinking lies on its parabola."""

import torch
import torch.nn.functional as F

from experiments.defences import after_step
from model import GPT, NUMBERS, GPTConfig, stream

CONFIG = GPTConfig(NUMBERS.stop + 9, n_aux=3, block_size=8, n_layer=1, n_head=2, n_embd=8)


def models():
    return (GPT(CONFIG).initialise(seed).double() for seed in range(2))


def test_low_rank_is_the_nearest_change_of_that_rank():
    """Eckart and Young: what is left out has the norm of the smaller singular values."""
    (start, model), (_, before) = models(), models()
    after_step(model.blocks, start.blocks, low_rank=2)
    for p, old, p_start in zip(model.parameters(), before.parameters(), start.parameters()):
        if p.dim() == 2 and not torch.equal(p, old):
            assert torch.linalg.matrix_rank(p - p_start, tol=1e-9) == 2
            left_out = torch.linalg.svdvals(old - p_start)[2:].norm()
            torch.testing.assert_close((p - old).norm(), left_out)
    assert torch.equal(model.head.weight, before.head.weight)
    assert not torch.equal(model.blocks[0].mlp.weight, before.blocks[0].mlp.weight)


def test_decay_alone_brings_a_model_back_geometrically():
    (start, model), (_, before) = models(), models()
    for factor in (0.1, 0.2, 0.5):
        after_step(model, start, decay=factor)
    for p, old, p_start in zip(model.parameters(), before.parameters(), start.parameters()):
        torch.testing.assert_close(p - p_start, 0.9 * 0.8 * 0.5 * (old - p_start))


def test_a_shrunk_shift_leaves_its_square_of_the_kl():
    base, shift = torch.randn(2, 1000, generator=stream(0, "test"), dtype=torch.float64)
    log_p = lambda a: (base + 1e-4 * a * shift).log_softmax(-1)
    kl = lambda a: F.kl_div(log_p(a), log_p(1), log_target=True, reduction="sum")
    for a in (0.2, 0.55, 0.9):
        assert abs(kl(a) / kl(0) - (1 - a) ** 2) < 1e-3
