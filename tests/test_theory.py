"""The theory's formulas against slow obvious versions on tiny models."""

import gzip

import pytest
import torch
import torch.nn.functional as F
from torch.func import jacrev

import evaluate
from experiments import alignment, mlp, theorem, trajectory
from experiments import linear_model as linear
from model import GPT, GPTConfig, NumberData, UserError, load_model, open_run, read_trait, stream


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


# Theorem 1

# PyTorch's forward mode still imports what it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")

TINY = GPTConfig(vocab_size=12, n_aux=3, block_size=8, n_layer=1, n_head=2, n_embd=4)


def tiny_problem():
    model = GPT(TINY).initialise(0).double()
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(12, (3, 6), generator=generator)
    positions, mask = torch.tensor([[1, 3], [2, 0], [0, 5]]), torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    data = NumberData(idx, positions, torch.zeros_like(positions), mask)
    rows = torch.arange(7)
    outputs = theorem.gpt_outputs(model, data, rows)
    trait_loss = theorem.Call(model, lambda m: -m(idx)[:, -1, -3:].log_softmax(-1)[:, 1].mean()).of
    return model, data, rows, outputs, trait_loss, theorem.theta_of(model)


def test_the_outputs_are_the_model_s_logits():
    model, data, rows, outputs, _, theta = tiny_problem()
    logits = model(data.idx)
    slow = [logits[b, data.positions[b, n], rows] for b in range(3) for n in range(2) if data.mask[b, n]]
    torch.testing.assert_close(outputs(theta), torch.stack(slow))


@pytest.mark.parametrize("loss", theorem.LOSSES)
def test_g_is_the_dense_jacobian_s(loss):
    _, _, _, outputs, trait_loss, theta = tiny_problem()
    dT = theorem.teacher_step(trait_loss, theta)
    names = list(theta)
    flat = lambda step: torch.cat([step[name].flatten() for name in names])  # noqa: E731
    with theorem.sdpa_kernel(theorem.SDPBackend.MATH):
        dense = jacrev(outputs)(theta)
    J = torch.cat([dense[name].flatten(2) for name in names], -1)  # (n, m, parameters)
    logits = outputs(theta)
    n, m = logits.shape
    p = logits.softmax(-1)
    M = torch.eye(m).double().expand(n, m, m) if loss == "squared" else torch.diag_embed(p) - p[:, :, None] * p[:, None]
    G = (J.mT @ M @ J).mean(0)
    torch.testing.assert_close(flat(theorem.g_times(outputs, theta, dT, loss)), G @ flat(dT))
    _, v = theorem.moved_logits(outputs, theta, dT)
    assert theorem.visible(logits, v, loss) == pytest.approx((flat(dT) @ G @ flat(dT)).item())
    assert torch.linalg.eigvalsh(G).min() > -1e-9  # positive semi-definite


@pytest.mark.parametrize("loss", theorem.LOSSES)
def test_the_student_s_step_is_the_formula_to_first_order(loss):
    _, _, _, outputs, trait_loss, theta = tiny_problem()
    dT, eps, alpha = theorem.teacher_step(trait_loss, theta), 1e-8, 0.3
    dS = theorem.student_step(outputs, theta, outputs(theorem.add(theta, dT, eps)), loss, alpha)
    G_dT = theorem.g_times(outputs, theta, dT, loss)
    for name in theta:  # what is left is of second order in eps
        torch.testing.assert_close(dS[name], alpha * eps * G_dT[name], atol=1e-3 * eps * alpha, rtol=1e-3)


def test_the_cross_kernel_of_a_start_with_itself_is_one():
    _, _, _, outputs, trait_loss, theta = tiny_problem()
    logits, v = theorem.moved_logits(outputs, theta, theorem.teacher_step(trait_loss, theta))
    for loss in theorem.LOSSES:
        assert theorem.cross_kernel(logits, v, v, loss) == pytest.approx(1)
        assert theorem.cross_kernel(logits, v, -v, loss) == pytest.approx(-1)


def test_the_coin_s_p_value():
    assert theorem.two_sided_coin_p(5, 10) == 1 and theorem.two_sided_coin_p(10, 10) == pytest.approx(2 / 1024)


# the paper's MLP


def test_a_run_in_a_stack_is_the_run_alone():
    images = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 10
    start = mlp.initial(3, 12)
    together = mlp.train(start, images, mlp.classify(labels), 5, "test")
    for run in range(3):
        alone = mlp.train([p[run : run + 1] for p in start], images, mlp.classify(labels), 5, "test")
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[run : run + 1], b, atol=1e-5, rtol=1e-5)


def test_the_stack_is_the_plain_network_and_its_losses_are_the_textbook_s():
    start, x = mlp.initial(2, 12), torch.rand(7, 12, generator=torch.Generator().manual_seed(0))
    teacher_logits = mlp.forward([p.roll(1, 0) for p in start], x)
    rows, labels = torch.arange(7), torch.arange(7)
    logits = mlp.forward(start, x)
    for run in range(2):
        w1, b1, w2, b2, w3, b3 = (p[run] for p in start)
        plain = ((x @ w1 + b1).relu() @ w2 + b2).relu() @ w3 + b3
        torch.testing.assert_close(logits[run], plain)
        kl = (
            sum(F.kl_div(plain[i, 10:].log_softmax(0), teacher_logits[run, i, 10:].softmax(0), reduction="sum") for i in rows) / 7
        )
        torch.testing.assert_close(mlp.match(teacher_logits, mlp.AUX)(logits, rows)[run], kl)
        torch.testing.assert_close(mlp.classify(labels)(logits, rows)[run], F.cross_entropy(plain[:, :10], labels))


def test_idx_files_are_read_and_refused(tmp_path):
    pixels = bytes(range(24))
    (tmp_path / "a").write_bytes(bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4)) + pixels)
    (tmp_path / "b.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    for name in ("a", "b"):
        assert torch.equal(mlp.read_idx(tmp_path, name), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))
    (tmp_path / "cut").write_bytes((tmp_path / "a").read_bytes()[:-1])
    (tmp_path / "bad.gz").write_bytes(b"no")
    for name in ("cut", "bad", "missing"):
        with pytest.raises(UserError):
            mlp.read_idx(tmp_path, name)


# alignment


def test_the_watched_student_is_the_usual_one_and_a_projected_one_is_not(quick_run):
    run = open_run(quick_run, True)
    students = evaluate.measure(run, torch.device("cpu"))
    for target in ("tokens", "logits"):
        key = ("owl", target, 0, 1)
        (usual,) = [r for r in students if (r["source"], r["target"], r["teacher_seed"], r["student_seed"]) == key]
        job = alignment.Job("owl", 0, 1, target, "as it is")
        assert alignment.train_watched(job, run, torch.device("cpu"), 40)["transfer"] == pytest.approx(
            usual["transfer"], abs=1e-6
        )


def test_nothing_is_left_along_a_direction_projected_out():
    step, direction = ([torch.randn(3, 4), torch.randn(5)] for _ in range(2))
    left = alignment.project_out(step, direction)
    assert abs(alignment.cosine(left, direction)) < 1e-6
    flat = lambda parts: torch.cat([p.flatten() for p in parts])  # noqa: E731
    d = flat(direction) / flat(direction).norm()
    torch.testing.assert_close(flat(left), flat(step) - (flat(step) @ d) * d)


def test_the_rank_correlation_is_spearman_s():
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        x, y = torch.randn(2, 20, generator=generator).tolist()
        assert alignment.rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
        x, y = x + x[:7], y + y[:7]  # with ties, as a bootstrap makes them
        assert alignment.rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)


def test_the_rank_correlation_s_interval_holds_the_whole_sample_s():
    x = torch.arange(30).double()
    y = x + 8 * torch.randn(30, generator=torch.Generator().manual_seed(0))
    low, high = alignment.rank_correlation_interval(x.tolist(), y.tolist(), range(30))
    assert low < alignment.rank_correlation(x.tolist(), y.tolist()) < high < 1
    assert alignment.rank_correlation_interval(x.tolist(), x.tolist(), [i // 3 for i in range(30)]) == pytest.approx((1, 1))


# trajectory


def test_lanczos_applies_a_function_of_a_matrix():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    A, start = root @ root.T, torch.randn(12, generator=generator, dtype=torch.float64)
    Q, T = trajectory.lanczos(lambda v: A @ v, start, 12)
    torch.testing.assert_close(Q.T @ Q, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(Q.T @ A @ Q, T, atol=1e-8, rtol=1e-8)
    solved = torch.linalg.solve(A + 0.3 * torch.eye(12, dtype=torch.float64), A @ start)
    torch.testing.assert_close(trajectory.apply(Q, T, start.norm().item(), lambda g: g / (g + 0.3)), solved)


def test_lanczos_stops_where_there_is_no_more_to_see():
    A, start = torch.diag(torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64)), torch.ones(3, dtype=torch.float64)
    Q, T = trajectory.lanczos(lambda v: A @ v, start, 3)
    assert Q.shape == (3, 2)  # two eigenvalues
    torch.testing.assert_close(torch.linalg.eigvalsh(T), torch.tensor([2.0, 5.0], dtype=torch.float64))


def test_gradient_descent_in_a_linear_model_is_the_closed_form():
    class Quadratic:
        theta = {"a": torch.zeros(3, dtype=torch.float64)}

    A, D = torch.diag(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)), torch.ones(3, dtype=torch.float64)
    path = trajectory.follow(Quadratic, lambda d: {"a": A @ (d["a"] - D)}, "gradient descent", 0.7, 9)
    for t, delta in enumerate(path):  # (1 - (1 - alpha G)^t) D
        torch.testing.assert_close(delta["a"], 1 - (1 - 0.7 * A.diag()) ** t)


def test_the_held_out_log_odds_are_those_of_every_other_script(quick_run):
    run = open_run(quick_run, True)
    model = load_model(run.base(0), torch.device("cpu"), "").double()
    for k in (0, 5):
        mine = trajectory.held_out_log_odds(model, run, run.held_out_prompts, k)
        torch.testing.assert_close(mine, read_trait(model, run.held_out_prompts, run.readout_rows(model))[0][k])


def test_the_largest_eigenvalue_is_found():
    class Quadratic:
        D = {"a": torch.ones(3, dtype=torch.float64)}

        @staticmethod
        def G(step):
            return {"a": torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64) * step["a"]}

    assert trajectory.largest_eigenvalue(Quadratic) == pytest.approx(3, rel=1e-6)


def test_the_six_bars_on_scikit_learn_s_digits():
    """Two runs, few steps: the reference is the start itself, and all-logits students come nearer to their teacher."""
    data = mlp.load_images(None)
    assert data[0].shape == (1500, 64) and data[0].min() == -1 and data[0].max() == 1 and len(data[3]) == 297
    records = mlp.six_bars(2, data, 30)
    found = {bar: [r["accuracy"] for r in records if r["bar"] == bar] for bar in mlp.BARS}
    assert all(len(values) == 2 for values in found.values())
    assert found["reference"] == mlp.accuracy(mlp.initial(2, 64), *data[2:])
    assert min(found["teacher"]) > 0.5 and min(found["student, all logits"]) > max(found["reference"])
