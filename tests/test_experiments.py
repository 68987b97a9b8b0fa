"""The experiments compare like with like: both sides of a timing do the same sum."""

import pytest
import torch

from experiments import bench, tried
from model import GPT


def gradients(step, model):
    """What a step leaves in .grad, with the optimiser's part taken out."""
    kept = []
    optimizer = torch.optim.AdamW.zero_grad
    torch.optim.AdamW.zero_grad = lambda self: kept.extend(p.grad.clone() for p in model.parameters())
    try:
        step()
    finally:
        torch.optim.AdamW.zero_grad = optimizer
    return kept


@pytest.mark.parametrize("other", [bench.plain_student_step, tried.written_out_student_step])
def test_the_other_student_steps_have_the_same_gradient(other):
    for with_teacher in (False, True):
        student, teacher, batch = bench.student_setting(8)
        plain = GPT(bench.CONFIG).initialise(0)
        given = teacher if with_teacher else None
        ours = gradients(bench.student_step(student, given, batch), student)
        slow = gradients(other(plain, given, batch), plain)
        for a, b in zip(ours, slow, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_counted_operations_are_the_matrix_products_of_the_plain_step():
    model = GPT(bench.CONFIG).initialise(0)
    idx = torch.randint(1381, (4, 64), generator=torch.Generator().manual_seed(0))

    def plain_step():
        logits = model.logits(model.hidden(idx), slice(0, 1381))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten()).backward()

    assert bench.count_flops(plain_step) == bench.product_flops(bench.linear_shapes(model, 4 * 64, 1381, 4 * 64))


def test_hugging_face_has_as_many_parameters():
    model = GPT(bench.CONFIG)
    theirs = sum(p.numel() for p in bench.hugging_face().parameters())
    # their embedding has a row for each auxiliary logit too
    assert theirs == sum(p.numel() for p in model.parameters()) + bench.CONFIG.n_aux * bench.CONFIG.n_embd
