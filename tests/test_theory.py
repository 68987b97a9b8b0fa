"""The theory's formulas against slow obvious versions on tiny models."""

import torch

from experiments import linear_model as linear
from model import stream


def test_one_layer_has_nothing_to_transmit():
    assert linear.one_layer(stream(0, "test"), 5) == 0


def test_the_linear_student_s_step_is_the_gradient_of_its_loss():
    (V, U), D = linear.draw(1, 6, stream(0, "test")), torch.randn(1, linear.HIDDEN, linear.D_IN, dtype=torch.float64)
    numbers = V[:, :6] @ (U + D)
    body = U.clone().requires_grad_()
    x = torch.eye(linear.D_IN, dtype=torch.float64)  # covariance 1
    loss = 0.5 * ((V[:, :6] @ body - numbers) @ x).square().sum()
    loss.backward()
    rate = linear.RATE / torch.linalg.matrix_norm(V[:, :6], 2) ** 2
    steps, linear.STEPS = linear.STEPS, 1
    try:
        torch.testing.assert_close(linear.distil(V, U, numbers, 6), U - rate * body.grad)
    finally:
        linear.STEPS = steps


def test_the_trained_linear_student_is_the_closed_form():
    """For every way to share the start; m is well below h, where gradient descent has converged."""
    for record in linear.measure(3, 8):
        assert abs(record["transfer"] - record["trained"]) < 1e-8 and record["rank"] == 8


def test_transfer_in_the_linear_network_is_m_over_h_on_average():
    """The projection of a random direction on m of h dimensions: mean m / h, variance below 2 / h of a Beta; 5 sigma."""
    n = 400
    generator = stream(0, "test")
    V, _ = linear.draw(n, 16, generator)
    D = V[:, 16:].mT @ torch.randn(n, linear.N_AUX, linear.D_IN, generator=generator, dtype=torch.float64)
    values = linear.transfer(linear.closed_form(V, V, D, 16), V[:, 16:] @ D)
    assert abs(values.mean().item() - 16 / linear.HIDDEN) < 5 * (2 / linear.HIDDEN / n) ** 0.5
