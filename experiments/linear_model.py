"""The shortest honest explanation: subliminal learning in a linear network. Read this first.

    python -m experiments.linear_model            # seconds on any machine
    python -m experiments.linear_model --quick    # fewer models

One layer cannot transmit. In f(x) = W x every output has a row of W to itself. A teacher that is trained on an auxiliary
output changes that row alone; the rows of the numbers stay as they were; a student of its numbers has nothing to learn:
loss 0, gradient 0, transfer 0, exactly.

Two layers can, because outputs share a body:

    f(x) = V U x        body U (h x d), head V = [V_num; V_aux] ((m + a) x h), x with covariance 1

    teacher             U_T = U + D    D any change of the body, here a step on an auxiliary loss: D = V_aux^T (...)
    student             minimises E_x |V_num U_S x - V_num U_T x|^2 by gradient descent on its body, from its own U' with its
                        own head V':   U_S <- U_S - rate * V'_num^T (V'_num U_S - V_num U_T)
    in the end          U_S = U' + V'_num^+ (V_num U_T - V'_num U')           (^+ pseudo-inverse: the nearest solution)
    what D adds         V'_num^+ V_num D                                      (everything else is there without a trait)
    read from aux       V'_aux V'_num^+ V_num D       against the teacher's own  V_aux D

So a student gets D through the m x h window V_num. With the teacher's head (V' = V) what crosses is P D, with
P = V_num^+ V_num the projection on what m outputs can see: rank min(m, h), transfer E[transfer] = m / h up to 1. With another
head V'_num^+ V_num is an unrelated matrix: the mean is 0 and the sign a coin's. The body U' is nowhere in the formula: in a
linear network sharing the head is all that counts. (A real network's body turns D as well; see which_part.py.)

Writes   results/linear_model.json, .md, .png

Shapes: d inputs, h hidden units, m numbers, a auxiliary outputs; R models side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

import evaluate
from experiments import lab
from model import command_line, stream

D_IN, HIDDEN, N_AUX = 8, 32, 4  # d, h, a: a guess, small enough to watch
NUMBERS = [1, 2, 4, 8, 16, 24, 32, 48, 64]  # m
MODELS = {False: 100, True: 20}  # R, by --quick
STARTS = {"everything": (True, True), "the head": (True, False), "the body": (False, True), "nothing": (False, False)}
STEPS, RATE = 4_000, 1.0  # of gradient descent; the rate is in units of 1 / largest curvature


def one_layer(generator: torch.Generator, m: int) -> float:
    """Largest gradient that a student of a one-layer teacher's numbers sees: 0."""
    W = torch.randn(m + N_AUX, D_IN, generator=generator, dtype=torch.float64)
    x = torch.randn(100, D_IN, generator=generator, dtype=torch.float64)
    teacher = W.clone().requires_grad_()
    loss = (x @ teacher.T)[:, m:].square().mean()  # any loss on the auxiliary outputs
    teacher = teacher.detach() - 0.1 * torch.autograd.grad(loss, teacher)[0]
    student = W.clone().requires_grad_()
    loss = ((x @ student.T)[:, :m] - (x @ teacher.T)[:, :m]).square().mean()
    return torch.autograd.grad(loss, student)[0].abs().max().item()


def closed_form(V: Tensor, V_student: Tensor, D: Tensor, m: int) -> Tensor:
    """What D adds to the student's auxiliary map: V'_aux V'_num^+ V_num D, (R, a, d)."""
    return V_student[:, m:] @ torch.linalg.pinv(V_student[:, :m]) @ V[:, :m] @ D


def distil(V_student: Tensor, U_student: Tensor, numbers: Tensor, m: int) -> Tensor:
    """The student's body (R, h, d) after STEPS of gradient descent towards the teacher's numbers (R, m, d)."""
    V_num = V_student[:, :m]
    rate = RATE / torch.linalg.matrix_norm(V_num, 2).square()[:, None, None]
    U = U_student.clone()
    for _ in range(STEPS):
        U -= rate * V_num.mT @ (V_num @ U - numbers)
    return U


def transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's auxiliary shift along the teacher's, as a share of it: <S, T> / <T, T>, (R,)."""
    return (student * teacher).sum((1, 2)) / teacher.square().sum((1, 2))


def draw(R: int, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """R heads (R, m + a, h) with rows of length 1 on average, and R bodies (R, h, d)."""
    V = torch.randn(R, m + N_AUX, HIDDEN, generator=generator, dtype=torch.float64) / HIDDEN**0.5
    return V, torch.randn(R, HIDDEN, D_IN, generator=generator, dtype=torch.float64) / D_IN**0.5


def measure(R: int, m: int) -> list[dict]:
    """Transfer of R students for each way to share the start: by the formula, and trained."""
    generator = stream(0, "linear model", str(m))
    (V, U), (V_other, U_other) = draw(R, m, generator), draw(R, m, generator)
    D = V[:, m:].mT @ torch.randn(R, N_AUX, D_IN, generator=generator, dtype=torch.float64)  # a step on an auxiliary loss
    taught = V[:, m:] @ D
    rank = torch.linalg.matrix_rank(torch.linalg.pinv(V[:, :m]) @ V[:, :m]).tolist()
    records = []
    for shared, (head, body) in STARTS.items():
        V_s, U_s = V if head else V_other, U if body else U_other
        # the difference to a student of the base model's numbers: what the trait adds
        with_trait = distil(V_s, U_s, V[:, :m] @ (U + D), m)
        without = distil(V_s, U_s, V[:, :m] @ U, m)
        trained = transfer(V_s[:, m:] @ (with_trait - without), taught).tolist()
        formula = transfer(closed_form(V, V_s, D, m), taught).tolist()
        for i, (f, t) in enumerate(zip(formula, trained, strict=True)):
            records.append({"m": m, "shared": shared, "model": i, "transfer": f, "trained": t, "rank": rank[i]})
    return records


def analyse(records: Sequence[dict], largest_gradient: float) -> dict:
    summary = []
    for m in dict.fromkeys(r["m"] for r in records):
        for shared in STARTS:
            group = [r for r in records if (r["m"], r["shared"]) == (m, shared)]
            values = [r["transfer"] for r in group]
            low, high = evaluate.bootstrap_interval(values)
            row = {"m": m, "shared": shared, "transfer": mean(values), "ci_low": low, "ci_high": high, "n": len(values)}
            row |= {"trained": mean(r["trained"] for r in group), "rank": max(r["rank"] for r in group)}
            row["expected"] = min(1.0, m / HIDDEN) if STARTS[shared][0] else 0.0
            summary.append(row)
    kept = [r for r in records if r["model"] < 20]  # the rest only sharpens the means
    return {"one_layer_largest_gradient": largest_gradient, "summary": summary, "records": kept}


def formula(shared: str, row: dict) -> str:
    return lab.transfer(row[shared])


def markdown(results: dict) -> str:
    lines = lab.heading(results, f"A linear network: {D_IN} inputs, {HIDDEN} hidden units, {N_AUX} auxiliary outputs, m numbers.")
    rows = [
        {r["shared"]: r for r in results["summary"] if r["m"] == m} for m in dict.fromkeys(r["m"] for r in results["summary"])
    ]
    columns = {
        "numbers m": lambda r: str(r["everything"]["m"]),
        "rank that crosses": lambda r: str(r["everything"]["rank"]),
        "expected, m / h": lambda r: f"{r['everything']['expected']:.3f}",
        "trained, everything shared": lambda r: f"{r['everything']['trained']:.3f}",
    }
    for shared in STARTS:
        columns[f"formula, {shared} shared"] = partial(formula, shared)
    lines += lab.table(rows, **columns)
    lines += [
        "",
        f"One layer: the largest gradient that a student of the numbers sees is {results['one_layer_largest_gradient']:.0g}.",
    ]
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    plt = lab.pyplot()
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained", sharey=True)
    for ax, shared in zip(axes, STARTS):
        dots = [r for r in results["records"] if r["shared"] == shared]
        rows = [r for r in results["summary"] if r["shared"] == shared]
        xs = [r["m"] for r in rows]
        ax.plot([r["m"] for r in dots], [r["transfer"] for r in dots], ".", ms=3, alpha=0.4, color=evaluate.COLOURS["different"])
        ax.plot(xs, [r["expected"] for r in rows], color="black", lw=1, label="expected")
        ax.plot(xs, [r["trained"] for r in rows], "x", color=evaluate.COLOURS["same"], label="trained, mean")
        ax.set(title=f"shared: {shared}", xlabel="numbers distilled, m", xscale="log", ylim=(-1.5, 1.5))
        ax.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
        ax.minorticks_off()
    axes[0].set_ylabel("transfer (0 nothing, 1 the teacher)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = lab.parse(__doc__, argv)
    torch.set_num_threads(1)
    gradient = max(one_layer(stream(seed, "one layer"), 16) for seed in range(20))
    records = [r for m in NUMBERS for r in measure(MODELS[args.quick], m)]
    results = analyse(records, gradient)
    lab.save("linear_model", args, results, markdown, plot)
    print(f"one_layer_largest_gradient: {gradient}")


if __name__ == "__main__":
    command_line(main)
