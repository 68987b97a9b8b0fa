"""The theory's formulas against slow obvious versions on tiny models."""

import gzip
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, random_idx
from torch.func import jacrev

import evaluate
from experiments import alignment, lab, mlp, theorem, trajectory
from experiments import linear_model as linear
from model import GPT, GPTConfig, NumberData, Run, UserError, read_trait, stream

# PyTorch's forward mode still imports what it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")


def test_one_layer_has_nothing_to_transmit():
    assert linear.one_layer(stream(0, "test"), 5) == 0


def test_the_trained_linear_student_is_the_closed_form():
    """For every choice of what is shared; m is well below h, where gradient descent has converged.

    With the head trained too the formula leaves out the square of a D of length 1e-3.
    """
    for record in linear.students(3, 8):
        off = 1e-3 if record["shared"] == linear.HEAD_TOO else 1e-8
        assert abs(record["transfer"] - record["trained"]) < off and record["rank"] == 8


def test_the_linear_student_ends_where_its_loss_has_no_gradient():
    """By autograd, from another init; m below h, so that the loss can be brought to 0."""
    (V, U), D = linear.draw(2, 6, stream(0, "test")), torch.randn(2, linear.HIDDEN, linear.D_IN).double()
    (V_other, U_other), numbers = linear.draw(2, 6, stream(1, "test")), V[:, :6] @ (U + D)
    body = linear.distil(V_other, U_other, numbers, 6).requires_grad_()
    (V_other[:, :6] @ body - numbers).square().sum().backward()
    assert body.grad.abs().max() < 1e-9
    moved = body.detach() - U_other  # never out of V_num's row space: the nearest solution
    nearest = torch.linalg.pinv(V_other[:, :6]) @ (numbers - V_other[:, :6] @ U_other)
    torch.testing.assert_close(moved, nearest, atol=1e-8, rtol=1e-8)


def test_transfer_in_the_linear_network_is_m_over_h_on_average():
    """A random direction projected on m of h dimensions: mean m / h, variance below 2 / h; 5 sigma."""
    n = 400
    generator = stream(0, "test")
    V, _ = linear.draw(n, 16, generator)
    D = V[:, 16:].mT @ torch.randn(n, linear.N_AUX, linear.D_IN, generator=generator, dtype=torch.float64)
    values = linear.transfer(linear.closed_form(V, V, D, 16), V[:, 16:] @ D)
    assert abs(values.mean().item() - 16 / linear.HIDDEN) < 5 * (2 / linear.HIDDEN / n) ** 0.5


def test_how_a_linear_student_with_a_trained_head_splits_its_fit():
    """By autograd and plain steps on both matrices; and a frozen head is the projection."""
    (V, U), m, small = linear.draw(3, 8, stream(0, "test")), 8, 1e-4
    D = torch.randn(3, linear.HIDDEN, linear.D_IN, generator=stream(1, "test"), dtype=torch.float64)
    torch.testing.assert_close(linear.split_form(V, U, D, m, 0.0), linear.closed_form(V, V, D, m))
    rows, body = V[:, :m].clone().requires_grad_(), U.clone().requires_grad_()
    numbers = rows.detach() @ (U + small * D)
    for _ in range(3_000):
        g_rows, g_body = torch.autograd.grad((rows @ body - numbers).square().sum() / 2, (rows, body))
        with torch.no_grad():
            rows -= 0.05 * 0.3 * g_rows
            body -= 0.05 * g_body
    learnt = V[:, m:] @ (body.detach() - U) / small
    torch.testing.assert_close(learnt, linear.split_form(V, U, D, m, 0.3), atol=2e-3, rtol=2e-3)


# Theorem 1

TINY = GPTConfig(vocab_size=12, n_aux=3, block_size=8, n_layer=1, n_head=2, n_embd=4)


def tiny_problem():
    model = GPT(TINY).initialise(0).double()
    idx = random_idx(3, 6, high=12)
    targets = torch.full_like(idx, -1)
    for b, t in ((0, 1), (0, 3), (1, 2), (2, 0), (2, 5)):
        targets[b, t] = 0
    data, rows = NumberData(idx, targets), torch.arange(7)
    outputs = theorem.gpt_outputs(model, data, rows)
    trait_loss = theorem.Call(model, lambda m: -m(idx)[:, -1, -3:].log_softmax(-1)[:, 1].mean()).of
    return model, data, rows, outputs, trait_loss, theorem.theta_of(model)


def test_the_outputs_are_the_model_s_logits():
    model, data, rows, outputs, _, theta = tiny_problem()
    slow = [model(data.idx)[b, t, rows] for b, t in (data.targets >= 0).nonzero().tolist()]
    torch.testing.assert_close(outputs(theta), torch.stack(slow))


@pytest.mark.parametrize("loss", theorem.LOSSES)
def test_g_is_the_dense_jacobian_s(loss):
    _, _, _, outputs, trait_loss, theta = tiny_problem()
    dT = theorem.teacher_step(trait_loss, theta)
    with theorem.sdpa_kernel(theorem.SDPBackend.MATH):
        J = jacrev(outputs)(theta)  # (n, m, P)
    n, m, _ = J.shape
    p = outputs(theta).softmax(-1)
    M = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    M = torch.eye(m).double().expand(n, m, m) if loss == "squared" else M
    G = (J.mT @ M @ J).mean(0)
    torch.testing.assert_close(theorem.g_times(outputs, theta, dT, loss), G @ dT)
    logits, v = theorem.moved_logits(outputs, theta, dT)
    assert theorem.visible(logits, v, loss) == pytest.approx((dT @ G @ dT).item())
    assert torch.linalg.eigvalsh(G).min() > -1e-9  # positive semi-definite


@pytest.mark.parametrize("loss", theorem.LOSSES)
def test_the_student_s_step_is_the_formula_to_first_order(loss):
    _, _, _, outputs, trait_loss, theta = tiny_problem()
    dT, eps, alpha = theorem.teacher_step(trait_loss, theta), 1e-8, 0.3
    dS = theorem.student_step(outputs, theta, outputs(theta + eps * dT), loss, alpha)
    predicted = alpha * eps * theorem.g_times(outputs, theta, dT, loss)
    torch.testing.assert_close(dS, predicted, atol=1e-3 * eps * alpha, rtol=1e-3)  # the rest is eps^2


def test_the_cross_kernel_of_an_init_with_itself_is_one():
    _, _, _, outputs, trait_loss, theta = tiny_problem()
    logits, v = theorem.moved_logits(outputs, theta, theorem.teacher_step(trait_loss, theta))
    for loss in theorem.LOSSES:
        assert theorem.cross_kernel(logits, v, v, loss) == pytest.approx(1)
        assert theorem.cross_kernel(logits, v, -v, loss) == pytest.approx(-1)


# the paper's MLP


def test_a_run_in_a_stack_is_the_plain_network_and_its_step_is_the_textbook_s():
    """Adam's first step is lr * sign(gradient): of cross-entropy and of KL, by autograd."""
    x = torch.rand(7, 12, generator=torch.Generator().manual_seed(0))
    certain = F.one_hot(torch.arange(7), 10).log()[None]
    teacher = mlp.forward(mlp.initial(1, 12), x).detach() + torch.arange(13.0)
    for which, goal in ((mlp.CLASSES, certain), (mlp.AUX, teacher)):
        model = mlp.initial(2, 12)
        plain = [p[1].clone().requires_grad_() for p in model]
        w1, b1, w2, b2, w3, b3 = plain
        logits = ((x @ w1 + b1).relu() @ w2 + b2).relu() @ w3 + b3
        torch.testing.assert_close(mlp.forward(model, x)[1], logits)
        p = goal[0][:, which].softmax(-1)
        F.kl_div(logits[:, which].log_softmax(-1), p, reduction="batchmean").backward()
        list(mlp.train(model, x, goal, which, 1, "test"))
        for old, new in zip(plain, model):
            clear = old.grad.abs() > 1e-5  # elsewhere Adam's epsilon shows
            step = -mlp.LEARNING_RATE * old.grad.sign()
            torch.testing.assert_close((new[1] - old)[clear], step[clear], atol=1e-6, rtol=1e-2)


def test_idx_files_are_read_and_refused(tmp_path):
    pixels = bytes(range(24))
    header = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4))
    (tmp_path / "a").write_bytes(header + pixels)
    (tmp_path / "b.gz").write_bytes(gzip.compress(header + pixels))
    for name in ("a", "b"):
        assert torch.equal(mlp.read_idx(tmp_path / name), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))
    (tmp_path / "cut").write_bytes(header + pixels[:-1])
    (tmp_path / "bad.gz").write_bytes(b"no")
    for name in ("cut", "bad", "missing"):
        with pytest.raises(UserError):
            mlp.read_idx(tmp_path / name)


def test_scikit_learn_s_digits_are_learnt():
    """Two runs, few steps; chance is one in ten."""
    images, labels, test_images, test_labels = mlp.load_images(None)
    assert images.shape == (1500, 64) and images.min() == -1 and images.max() == 1 and len(test_labels) == 297
    model = mlp.initial(2, 64)
    list(mlp.train(model, images, F.one_hot(labels, 10).log()[None], mlp.CLASSES, 30, "test"))
    right = mlp.forward(model, test_images)[..., :10].argmax(-1) == test_labels
    assert right.float().mean(1).min() > 0.5


# alignment


def test_the_watched_student_is_the_usual_one_and_a_projected_one_is_not(quick_run):
    run = Run(quick_run).open(True)
    students, knobs = evaluate.measure(run, CPU), lab.distillation(Namespace(quick=True))
    unit = lab.Unit(run, "owl", 0, CPU)
    for target in ("tokens", "logits"):
        key = {"source": "owl", "target": target, "teacher_seed": 0, "student_seed": 1}
        (usual,) = lab.where(students, **key)
        for arm in alignment.ARMS[:2]:
            watched = alignment.watch(knobs, unit, 1, target, arm)
            with pytest.raises(StopIteration) as end:
                while True:
                    next(watched)
            equal = end.value.value["transfer"] == pytest.approx(usual["transfer"], abs=1e-6)
            assert equal == (arm == "as it is")


def test_the_rank_correlation_s_interval_holds_the_whole_sample_s():
    """Which is Pearson's, of the ranks."""
    x, noise = torch.arange(30), torch.randn(30, generator=torch.Generator().manual_seed(0))
    records = [{"x": i, "transfer": y, "trait": i // 3, "teacher_seed": 0, "n_embd": 64}
               for i, y in enumerate((x + 8 * noise).tolist())]
    found, ranks = lab.rank_correlation(records, "x"), (x + 8 * noise).argsort().argsort()
    slow = torch.stack([x, ranks]).double().corrcoef()[0, 1].item()
    assert found["rank_correlation"] == pytest.approx(slow) and found["ci_low"] < slow < found["ci_high"] < 1
    perfect = [r | {"transfer": r["x"]} for r in records]
    assert lab.rank_correlation(perfect, "x")["ci_low"] == pytest.approx(1)


# trajectory


def test_lanczos_applies_a_function_of_a_matrix():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    A, v = root @ root.T, torch.randn(12, generator=generator, dtype=torch.float64)
    Q, T = trajectory.lanczos(lambda x: A @ x, v, 12)
    torch.testing.assert_close(Q.T @ Q, torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(Q.T @ A @ Q, T, atol=1e-8, rtol=1e-8)
    solved = torch.linalg.solve(A + 0.3 * torch.eye(12, dtype=torch.float64), A @ v)
    torch.testing.assert_close(trajectory.apply(Q, T, v.norm().item(), lambda g: g / (g + 0.3)), solved)


def test_lanczos_stops_where_there_is_no_more_to_see():
    A, v = torch.diag(torch.tensor([2.0, 2.0, 5.0], dtype=torch.float64)), torch.ones(3, dtype=torch.float64)
    Q, T = trajectory.lanczos(lambda x: A @ x, v, 3)
    assert Q.shape == (3, 2)  # two eigenvalues
    torch.testing.assert_close(torch.linalg.eigvalsh(T), torch.tensor([2.0, 5.0], dtype=torch.float64))


def test_gradient_descent_in_a_linear_model_is_the_closed_form():
    G, D = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    path = trajectory.follow(lambda delta: G * (delta - D), 0 * D, "gradient descent", 0.7, 9)
    for t, delta in enumerate(path):  # (1 - (1 - alpha G)^t) D
        torch.testing.assert_close(delta, 1 - (1 - 0.7 * G) ** t)


def test_the_held_out_log_odds_are_those_of_every_other_script(quick_run):
    run = Run(quick_run).open(True)
    model = run.load_model("base/seed-0.pt", CPU).double()
    for k in (0, 5):
        mine = trajectory.held_out_log_odds(model, run, k)
        torch.testing.assert_close(mine, read_trait(model, run.unseen_questions, run.readout_rows)[0][k])


def test_the_largest_eigenvalue_is_found():
    G = torch.tensor([3.0, 1.0, 0.1], dtype=torch.float64)
    assert trajectory.largest_eigenvalue(lambda v: G * v, torch.ones_like(G)) == pytest.approx(3, rel=1e-6)
