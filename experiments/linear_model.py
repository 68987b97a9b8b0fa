"""The shortest honest explanation: subliminal learning in a linear network. Read this first.

    python -m experiments.linear_model            # a minute on 2 CPU cores
    python -m experiments.linear_model --quick    # fewer models

One layer cannot transmit. In f(x) = W x every output has a row of W to itself. A teacher that is trained on
an auxiliary output changes that row alone; the rows of the numbers stay as they were; a student of its
numbers has nothing to learn: loss 0, gradient 0, transfer 0, exactly.

Two layers can, because outputs share a body:

    f(x) = V U x    body U (h x d), head V = [V_num; V_aux] ((m + a) x h), x with covariance 1
    teacher         U_T = U + D  D any change of the body, here a step on an auxiliary loss: D = V_aux^T (...)
    student         minimises E_x |V_num U_S x - V_num U_T x|^2 by gradient descent on its body, from its own
                    U' with its own head V':    U_S <- U_S - rate * V'_num^T (V'_num U_S - V_num U_T)
    in the end      U_S = U' + V'_num^+ (V_num U_T - V'_num U')     (^+ pseudo-inverse: the nearest solution)
    what D adds     V'_num^+ V_num D                                (all the rest is there without a trait)
    read from aux   V'_aux V'_num^+ V_num D                         against the teacher's own V_aux D

So a student gets D through the m x h window V_num. With the teacher's head (V' = V) what crosses is P D, with
P = V_num^+ V_num the projection on what m outputs can see: rank min(m, h), and E[transfer] = m / h up to 1.
With another head V'_num^+ V_num is an unrelated matrix: the mean is 0 and the sign a coin's. The body U' is
nowhere in the formula: in a linear network sharing the head is all that counts. (A real network's body turns
D as well; see which_part.py.) Or sharing what it does: if V' U' = V U on all outputs, then V'_num^+ V_num U
is P' U', so V'_aux V'_num^+ acts as V_aux V_num^+ on the states U x, which span the share d / h of D; on the
rest it is unrelated: E[transfer] = m / h * d / h (see matched.py).

A student that trains its number rows too splits the fit. From the same init and to first order in D, at rates
r_U of the body and r_V of the head, its error E = V'_num U' - V_num (U + D) obeys

    dE/dt = -r_U V_num V_num^T E - r_V E U^T U    V_num = A S B^T, U = P L Q^T: mode (i, j) of A^T E Q decays
                                                  as r_U S_i^2 + r_V L_j^2, of which the body has the share
    body's share         S_i^2 / (S_i^2 + (r_V / r_U) L_j^2)
    read from aux        V_aux B (share * B^T D Q) Q^T, * mode by mode: P D, less what the number rows learnt

since aux rows have no gradient. With rows of length 1 S^2 is near max(1, m / h), and L^2 near h / d, so about
E[transfer] = min(1, m / h) / (1 + (r_V / r_U) (h / d) / max(1, m / h)): at equal rates it falls with the
width h, and a slow head brings it back (see growth.py). Prediction, written before any run of this student:
at equal rates .43 at m = h and .6 at m = 2 h within .1; formula and training within .01 at every m.

Writes   results/linear_model.json, .md, .png

Shapes: d inputs, h hidden units, m numbers, a auxiliary outputs; R models side by side.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import evaluate
from experiments import lab
from model import stream

D_IN, HIDDEN, N_AUX = 24, 32, 4  # d, h, a: a guess, small enough to watch
NUMBERS = [1, 2, 4, 8, 16, 24, 32, 48, 64]  # m
MODELS, QUICK_MODELS = 100, 20  # R
# What the two inits share, and the transfer that the formula expects of m >= h numbers
SHARED = {"everything": 1.0, "the head": 1, "the behaviour": D_IN / HIDDEN, "the body": 0, "nothing": 0}
HEAD_TOO = "everything; head trained too"
HEAD_RATE, SMALL = 1.0, 1e-3  # r_V / r_U; the length of D where its square must not count
STEPS, RATE = 4_000, 1.0  # of gradient descent; the rate is in units of 1 / largest curvature


def one_layer(generator: torch.Generator, m: int) -> float:
    """Largest gradient that a student of a one-layer teacher's numbers sees: 0."""
    W, x = (torch.randn(n, D_IN, generator=generator, dtype=torch.float64) for n in (m + N_AUX, 100))
    loss = (x @ W.requires_grad_().T)[:, m:].square().mean()  # any loss on the auxiliary outputs
    teacher = W.detach() - 0.1 * torch.autograd.grad(loss, W)[0]
    loss = (x @ (W - teacher).T)[:, :m].square().mean()  # the student is W again
    return torch.autograd.grad(loss, W)[0].abs().max().item()


def closed_form(V: Tensor, V_student: Tensor, D: Tensor, m: int) -> Tensor:
    """What D adds to the student's auxiliary map: V'_aux V'_num^+ V_num D, (R, a, d)."""
    return V_student[:, m:] @ torch.linalg.pinv(V_student[:, :m]) @ V[:, :m] @ D


def split_form(V: Tensor, U: Tensor, D: Tensor, m: int, head_rate: float) -> Tensor:
    """What a small D adds to the auxiliary map of a student that trains its number rows too, (R, a, d)."""
    _, s, Bt = torch.linalg.svd(V[:, :m], full_matrices=False)  # s (R, min(m, h)), Bt (R, min(m, h), h)
    _, scale, Qt = torch.linalg.svd(U, full_matrices=False)  # scale (R, d), Qt (R, d, d)
    body, head = s.square()[:, :, None], head_rate * scale.square()[:, None]
    return V[:, m:] @ Bt.mT @ (body / (body + head) * (Bt @ D @ Qt.mT)) @ Qt


def distil(
    V_student: Tensor, U_student: Tensor, numbers: Tensor, m: int, head_rate: float = 0.0
) -> Tensor:
    """The student's body (R, h, d) after STEPS of gradient descent to the teacher's numbers (R, m, d).

    Its number rows learn as well, at head_rate times the body's rate.
    """
    V_num, U = V_student[:, :m].clone(), U_student.clone()
    curvature = [torch.linalg.matrix_norm(W, 2).square() for W in (V_num, U)]
    rate = RATE / (curvature[0] + head_rate * curvature[1])[:, None, None]
    for _ in range(STEPS):
        error = V_num @ U - numbers
        step = V_num.mT @ error
        if head_rate:
            V_num -= head_rate * rate * error @ U.mT
        U -= rate * step
    return U


def transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's auxiliary shift along the teacher's, as a share of it: <S, T> / <T, T>, (R,)."""
    return (student * teacher).sum((1, 2)) / teacher.square().sum((1, 2))


def draw(R: int, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """R heads (R, m + a, h) with rows of length 1 on average, and R bodies (R, h, d)."""
    V = torch.randn(R, m + N_AUX, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    return V, torch.randn(R, HIDDEN, D_IN, generator=generator, dtype=torch.float64) / D_IN**0.5


def students(R: int, m: int) -> list[dict]:
    """Transfer of R students for each choice of what the init shares: by the formula, and trained."""
    generator = stream(0, "linear model", str(m))
    (V, U), (V_other, U_other) = draw(R, m, generator), draw(R, m, generator)
    D = V[:, m:].mT @ torch.randn(R, N_AUX, D_IN, generator=generator, dtype=torch.float64)
    taught = V[:, m:] @ D  # D: a step on an auxiliary loss
    rank = torch.linalg.matrix_rank(torch.linalg.pinv(V[:, :m]) @ V[:, :m]).tolist()
    # of all heads with V_matched U_other = V U the nearest to V_other
    V_matched = V_other + (V @ U - V_other @ U_other) @ torch.linalg.pinv(U_other)
    starts = (V, U), (V, U_other), (V_matched, U_other), (V_other, U), (V_other, U_other)
    records = []
    for shared, (V_s, U_s) in zip(SHARED, starts):
        # the difference to a student of the base model's numbers: what the trait adds
        with_trait, without = (distil(V_s, U_s, V[:, :m] @ teacher, m) for teacher in (U + D, U))
        trained = transfer(V_s[:, m:] @ (with_trait - without), taught).tolist()
        formula = transfer(closed_form(V, V_s, D, m), taught).tolist()
        for i, (f, t, r) in enumerate(zip(formula, trained, rank)):
            records.append({"m": m, "shared": shared, "model": i, "transfer": f, "trained": t, "rank": r})
    body = distil(V, U, V[:, :m] @ (U + SMALL * D), m, HEAD_RATE)
    trained = transfer(V[:, m:] @ (body - U) / SMALL, taught).tolist()
    formula = transfer(split_form(V, U, D, m, HEAD_RATE), taught).tolist()
    for i, (f, t, r) in enumerate(zip(formula, trained, rank)):
        records.append({"m": m, "shared": HEAD_TOO, "model": i, "transfer": f, "trained": t, "rank": r})
    return records


def measure(args: argparse.Namespace) -> dict:
    args.device = torch.device("cpu")  # matrices this small keep no GPU busy
    records = [r for m in NUMBERS for r in students(QUICK_MODELS if args.quick else MODELS, m)]
    summary = []
    for m in NUMBERS:
        split = 1 / (1 + HEAD_RATE * HIDDEN / D_IN / max(1, m / HIDDEN))
        for shared, expected in (SHARED | {HEAD_TOO: split}).items():
            group = lab.where(records, m=m, shared=shared)
            low, high = evaluate.bootstrap_interval([r["transfer"] for r in group])
            row = {"m": m, "shared": shared, "ci_low": low, "ci_high": high, "n": len(group)}
            row |= {key: mean(r[key] for r in group) for key in ("transfer", "trained", "rank")}
            summary.append(row | {"expected": min(1.0, m / HIDDEN) * expected})
    gradient = max(one_layer(stream(seed, "one layer"), 16) for seed in range(20))
    kept = [r for r in records if r["model"] < 20]  # the rest only sharpens the means
    return {"one_layer_largest_gradient": gradient, "summary": summary, "records": kept}


def markdown(results: dict) -> str:
    about = f"{D_IN} inputs, {HIDDEN} hidden units, {N_AUX} auxiliary outputs, m numbers"
    lines = lab.heading(results, f"A linear network: {about}. Expected is m / h; trained shares everything.")
    shown = lambda group: {f"formula, {r['shared']} shared": lab.transfer(r) for r in group}
    rows = [group[0] | shown(group) for group in (lab.where(results["summary"], m=m) for m in NUMBERS)]
    lines += lab.table(
        rows, numbers_m="m", rank_that_crosses="rank", expected=lambda r: f"{r['expected']:.3f}",
        trained=lambda r: f"{r['trained']:.3f}", **{key: key for key in rows[0] if "formula" in key},
    )
    lines += ["", f"One layer: a student's largest gradient is {results['one_layer_largest_gradient']:.0g}."]
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 6, figsize=(16, 3), layout="constrained", sharey=True)
    at = lambda rows, key: ([r["m"] for r in rows], [r[key] for r in rows])
    for ax, shared in zip(axes, [*SHARED, HEAD_TOO]):
        dots, rows = (lab.where(results[name], shared=shared) for name in ("records", "summary"))
        ax.plot(*at(dots, "transfer"), ".", ms=3, alpha=0.4, color=evaluate.COLOURS["different"])
        ax.plot(*at(rows, "expected"), color="black", lw=1, label="expected")
        ax.plot(*at(rows, "trained"), "x", color=evaluate.COLOURS["same"], label="trained, mean")
        ax.set_title(f"shared: {shared}", fontsize=9)
        ax.set(xlabel="numbers distilled, m", xscale="log", ylim=(-1.5, 1.5))
        ax.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        ax.minorticks_off()
    axes[0].set_ylabel("transfer (0 nothing, 1 the teacher)")
    axes[0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "linear_model", measure, markdown, plot)
