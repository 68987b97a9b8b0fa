"""Theorem 1 on the real model: one small step of the teacher, one step of the student, measured against the formula.

    python -m experiments.theorem            # 3 minutes on 2 CPU cores, plus the run whose base models it reads
    python -m experiments.theorem --quick    # fewer steps and seeds

The teacher is one step of size eps on the trait's loss, theta_T = theta_0 + eps dT with dT = -grad L_T(theta_0). The student
starts from the same theta_0 and takes one full-gradient step of rate alpha on E_x[L_S(f_theta(x), f_theta_T(x))] over a fixed set
of number sequences. With J the Jacobian of the logits used, M the curvature of L_S in the logits (identity for half the squared
error, diag(p) - p p^T for softmax cross-entropy), v = J dT and G = E_x[J^T M J], the first order in eps is

    dS       = alpha eps G dT
    dS . dT  = alpha eps E_x[v^T M v]                 >= 0: the student's step has a share of the teacher's
    dL_T     = -alpha eps dT^T G dT = -dS . dT        the trait's loss falls, whatever x is

(Cloud et al. 2025, Theorem 1.) Both are measured for eps over six decades; what is left of the ratio should fall linearly
in eps. From another start theta_S the part of the student's step that is due to the trait, to first order in eps, meets the
student's own dT_S in E_x[v_S^T M v_T]: a cross-kernel without a sign, held against a fair coin over seed pairs.

In float64. Jacobians are never formed: v is one forward-mode product. The MLP has smooth units, as the theorem asks; its trait
are the ten digit classes, its x noise, and what is distilled its three auxiliary logits (the paper's experiment).

Reads    runs/evidence: base models (made if they are missing)
Writes   results/theorem.json, .md, .png

Shapes: n outputs' positions, m logits; theta and every step a dict of tensors, named as the model's parameters.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import evaluate
from experiments import lab
from model import GPT, NUMBERS, NumberData, Run, class_logits, command_line, encode_numbers, load_model, read_jsonl, stream

Theta = dict[str, Tensor]
EPSILONS = {False: [10.0**k for k in range(-6, 1)], True: [1e-6, 1e-4, 1e-2]}
# The student's rate alpha is chosen so that the formula predicts a fall of FALL * eps nats; to first order it cancels from
# every ratio, and much larger the second order would hide the first.
FALL = 0.1
N_SEQUENCES = 64
SUBSET = 100  # random number rows: m
MLP_SEEDS = {False: 200, True: 20}  # pairs against the coin
LOSSES = ["squared", "softmax"]


# --------------------------------------------------------------------------------------------------------------------
# the theorem, each quantity once


def add(theta: Theta, step: Theta, scale: float = 1.0) -> Theta:
    return {name: p + scale * step[name] for name, p in theta.items()}


def dot(a: Theta, b: Theta) -> float:
    return sum((a[name] * b[name]).sum().item() for name in a)


def teacher_step(trait_loss: Callable, theta: Theta) -> Theta:
    """dT = -grad L_T(theta)."""
    return {name: -g for name, g in grad(trait_loss)(theta).items()}


def student_loss(logits: Tensor, teacher_logits: Tensor, loss: str) -> Tensor:
    """E_x[L_S]: half the squared error, or the cross-entropy of the teacher's softmax; (n, m) logits -> scalar."""
    if loss == "squared":
        return 0.5 * (logits - teacher_logits).square().sum(-1).mean()
    return -(teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def student_step(outputs: Callable, theta: Theta, teacher_logits: Tensor, loss: str, alpha: float) -> Theta:
    """dS = -alpha grad_theta E_x[L_S(f_theta(x), teacher's logits)], one full-gradient step."""
    g = grad(lambda t: student_loss(outputs(t), teacher_logits, loss))(theta)
    return {name: -alpha * value for name, value in g.items()}


def curvature(logits: Tensor, v: Tensor, loss: str) -> Tensor:
    """M v: v itself, or (diag(p) - p p^T) v; (n, m)."""
    if loss == "squared":
        return v
    p = logits.softmax(-1)
    return p * (v - (p * v).sum(-1, keepdim=True))


def moved_logits(outputs: Callable, theta: Theta, step: Theta) -> tuple[Tensor, Tensor]:
    """f_theta(x), and v = J step: how the logits move along a step; (n, m) each."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        logits, v = jvp(outputs, (theta,), (step,))[:2]
    return logits, v


def visible(logits: Tensor, v: Tensor, loss: str) -> float:
    """dT^T G dT = E_x[v^T M v]: what of the teacher's step the logits show; dS . dT is alpha eps times this."""
    return (v * curvature(logits, v, loss)).sum(-1).mean().item()


def g_times(outputs: Callable, theta: Theta, step: Theta, loss: str) -> Theta:
    """G step = E_x[J^T M J step]."""
    logits, v = moved_logits(outputs, theta, step)
    return vjp(outputs, theta)[1](curvature(logits, v, loss) / len(v))[0]


def cross_kernel(logits_teacher: Tensor, v_student: Tensor, v_teacher: Tensor, loss: str) -> float:
    """E_x[v_S^T M v_T] over the square root of both with themselves: a cosine, 1 for the same start."""
    a, b = (curvature(logits_teacher, v, loss) for v in (v_student, v_teacher))
    return ((v_student * b).sum() / ((v_student * a).sum() * (v_teacher * b).sum()).sqrt()).item()


def one_problem(outputs: Callable, trait_loss: Callable, theta: Theta, epsilons: Sequence[float]) -> list[dict]:
    """Measured against predicted, for both losses and every eps."""
    dT = teacher_step(trait_loss, theta)
    logits, v = moved_logits(outputs, theta, dT)
    before, records = trait_loss(theta).item(), []
    for loss in LOSSES:
        shown = visible(logits, v, loss)
        alpha = FALL / shown
        for eps in epsilons:
            dS = student_step(outputs, theta, outputs(add(theta, dT, eps)), loss, alpha)
            predicted = alpha * eps * shown
            row = {"loss": loss, "eps": eps, "dot": dot(dS, dT), "dot_predicted": predicted}
            fall = trait_loss(add(theta, dS)).item() - before
            records.append({**row, "trait_loss_change": fall, "trait_loss_change_predicted": -predicted})
    return records


# --------------------------------------------------------------------------------------------------------------------
# the two models


def theta_of(model: nn.Module) -> Theta:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Call(nn.Module):
    """A function of a model as a function of its parameters."""

    def __init__(self, model: nn.Module, function: Callable[[Any], Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Tensor:
        return self.function(self.model)

    def of(self, theta: Theta) -> Tensor:
        return functional_call(self, {f"model.{name}": p for name, p in theta.items()}, ())


def gpt_outputs(model: GPT, data: NumberData, rows: Tensor | slice) -> Callable:
    """theta -> the logits (n, m) of some rows of the head where a number is due."""
    where = data.mask.bool()
    return Call(model, lambda m: m.hidden(data.idx, positions=data.positions)[where] @ m.head.weight[rows].T).of


def gpt_trait_loss(model: GPT, run: Run, k: int) -> Callable:
    """theta -> the teachers' loss: cross-entropy of class k at the end of the trained-on questions."""
    rows, target = run.readout_rows(model), torch.full((len(run.trait_prompts[0]),), k)
    return Call(model, lambda m: F.cross_entropy(class_logits(m, run.trait_prompts, rows), target)).of


class MLP(nn.Module):
    """64 - 128 - 128 - (10 + 3), tanh; weights N(0, 1 / fan_in) as in the paper's."""

    def __init__(self, seed: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 13))
        generator = stream(seed, "theorem's MLP")
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5 if p.dim() == 2 else torch.zeros_like(p)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def mlp_problem(model: MLP, rows: slice) -> tuple[Callable, Callable]:
    """theta -> some logits on noise; theta -> cross-entropy on digits."""
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    noise = 2 * torch.rand(256, 64, generator=stream(0, "theorem's noise"), dtype=torch.float64) - 1
    outputs = Call(model, lambda m: m(noise)[:, rows]).of
    return outputs, Call(model, lambda m: F.cross_entropy(m(images / 8 - 1)[:, :10], labels.long())).of


# --------------------------------------------------------------------------------------------------------------------
# what is measured


def gpt_problems(args: argparse.Namespace, run: Run) -> Iterator[tuple[dict, Callable, Callable, Theta]]:
    for trait, seed in zip(run.traits, run.seeds):
        model = load_model(run.base(seed), args.device, "").double()
        data = encode_numbers(run.encoding, read_jsonl(run.numbers("base", run.seeds[0]))[:: 8_000 // N_SEQUENCES], args.device)
        subset = NUMBERS.start + torch.randperm(1000, generator=stream(0, "subset"))[:SUBSET]
        trait_loss = gpt_trait_loss(model, run, run.animals.index(trait))
        for name, rows in (("all logits", slice(None)), ("numbers", NUMBERS), (f"{SUBSET} of the numbers", subset)):
            yield (
                {"model": "GPT", "outputs": name, "trait": trait, "seed": seed},
                gpt_outputs(model, data, rows),
                trait_loss,
                theta_of(model),
            )


def mlp_problems() -> Iterator[tuple[dict, Callable, Callable, Theta]]:
    for seed in range(3):
        model = MLP(seed)
        for name, rows in (("all logits", slice(0, 13)), ("3 auxiliary logits", slice(10, 13)), ("2 of them", slice(10, 12))):
            yield {"model": "MLP", "outputs": name, "trait": "digits", "seed": seed}, *mlp_problem(model, rows), theta_of(model)


def cross_kernels(args: argparse.Namespace, run: Run) -> list[dict]:
    """The cross-kernel's cosine of every pair of starts: GPT over the run's seeds and traits, MLP over independent pairs."""
    records = []
    data = encode_numbers(run.encoding, read_jsonl(run.numbers("base", run.seeds[0]))[:: 8_000 // N_SEQUENCES], args.device)
    for trait in run.traits:
        moved = {}
        for seed in run.seeds:
            model = load_model(run.base(seed), args.device, "").double()
            dT = teacher_step(gpt_trait_loss(model, run, run.animals.index(trait)), theta_of(model))
            moved[seed] = moved_logits(gpt_outputs(model, data, NUMBERS), theta_of(model), dT)
        for s, (_, v_s) in moved.items():
            for t, (logits, v_t) in moved.items():
                cosine = cross_kernel(logits, v_s, v_t, "softmax")
                records.append(
                    {"model": "GPT", "trait": trait, "student_seed": s, "teacher_seed": t, "unit": trait, "cosine": cosine}
                )
    for pair in range(MLP_SEEDS[args.quick]):
        both = []
        for seed in (2 * pair, 2 * pair + 1):
            mlp = MLP(1000 + seed)
            outputs, trait_loss = mlp_problem(mlp, slice(10, 13))
            both.append(moved_logits(outputs, theta_of(mlp), teacher_step(trait_loss, theta_of(mlp))))
        (_, v_s), (logits, v_t) = both
        cosine = cross_kernel(logits, v_s, v_t, "softmax")
        records.append({"model": "MLP", "trait": "digits", "student_seed": 0, "teacher_seed": 1, "unit": pair, "cosine": cosine})
    return records


def two_sided_coin_p(heads: int, n: int) -> float:
    return min(1.0, 2 * lab.binomial_p(max(heads, n - heads), n, 0.5))


def slope(records: Sequence[dict], measured: str, predicted: str) -> float:
    """Least-squares slope of log |ratio - 1| against log eps, where it is above rounding and below 0.1; NaN if nowhere."""
    left = [(r["eps"], abs(r[measured] / r[predicted] - 1), 1e-14 / r["eps"]) for r in records]
    points = [(math.log10(eps), math.log10(x)) for eps, x, rounding in left if rounding < x < 0.1]
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*points, strict=True))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def analyse(records: Sequence[dict], kernels: Sequence[dict]) -> dict:
    groups: dict[tuple, list[dict]] = {}
    for r in records:
        groups.setdefault((r["model"], r["outputs"], r["loss"]), []).append(r)
    summary = []
    for (model, outputs, loss), group in groups.items():
        row = {"model": model, "outputs": outputs, "loss": loss, "n": len({r["seed"] for r in group})}
        row["all_positive"] = all(r["dot"] > 0 for r in group)
        for name, measured in (("dot", "dot"), ("fall", "trait_loss_change")):
            smallest = [r[measured] / r[f"{measured}_predicted"] for r in group if r["eps"] == min(x["eps"] for x in group)]
            row[f"{name}_ratio"] = max(smallest, key=lambda x: abs(x - 1))
            by_seed = [[r for r in group if r["seed"] == seed] for seed in {r["seed"] for r in group}]
            row[f"{name}_slope"] = mean(slope(g, measured, f"{measured}_predicted") for g in by_seed)
        summary.append(row)
    coin = []
    for model in ("GPT", "MLP"):
        pairs = [r for r in kernels if r["model"] == model and r["student_seed"] != r["teacher_seed"]]
        cosines = [r["cosine"] for r in pairs]
        units = [mean(r["cosine"] for r in pairs if r["unit"] == unit) for unit in {r["unit"] for r in pairs}]
        low, high = evaluate.bootstrap_interval(sorted(units))
        positive = sum(c > 0 for c in cosines)
        row = {"model": model, "n": len(cosines), "positive": positive, "coin_p": two_sided_coin_p(positive, len(cosines))}
        coin.append({**row, "mean": mean(cosines), "ci_low": low, "ci_high": high, "median_size": median(map(abs, cosines))})
    return {"summary": summary, "coin": coin, "records": list(records), "cross_kernels": list(kernels)}


def markdown(results: dict) -> str:
    lines = lab.heading(results, "Theorem 1, same start: measured / predicted (the worst at the smallest eps), and the slope of")
    lines[0] += " log |ratio - 1| against log eps (1: what is left is linear in eps)."
    lines += lab.table(
        results["summary"],
        model="model",
        outputs="outputs",
        loss="loss",
        starts="n",
        dS_dT_above_0=lambda r: "always" if r["all_positive"] else "not always",
        dS_dT_ratio=lambda r: f"{r['dot_ratio']:.6f}",
        slope=lambda r: f"{r['dot_slope']:.2f}",
        trait_loss_ratio=lambda r: f"{r['fall_ratio']:.6f}",
        its_slope=lambda r: f"{r['fall_slope']:.2f}",
    )
    lines += ["", "Another start: the cross-kernel's cosine (1 for the same start), and its sign against a fair coin.", ""]
    lines += lab.table(
        results["coin"],
        model="model",
        pairs="n",
        positive="positive",
        coin_p=lambda r: f"{r['coin_p']:.2g}",
        mean_cosine=lambda r: f"{r['mean']:+.4f} {evaluate.interval(r)}",
        median_size=lambda r: f"{r['median_size']:.3f}",
    )
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    plt = lab.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for ax, measured, title in ((left, "dot", "dS . dT"), (middle, "trait_loss_change", "change of the trait's loss")):
        for model, colour in (("GPT", evaluate.COLOURS["same"]), ("MLP", evaluate.COLOURS["different"])):
            for loss, style in (("squared", "-"), ("softmax", "--")):
                for key in {(r["outputs"], r["seed"]) for r in results["records"] if r["model"] == model}:
                    rows = [
                        r for r in results["records"] if (r["model"], r["loss"], (r["outputs"], r["seed"])) == (model, loss, key)
                    ]
                    left_over = [abs(r[measured] / r[f"{measured}_predicted"] - 1) for r in rows]
                    ax.loglog([r["eps"] for r in rows], left_over, style, marker=".", ms=3, lw=0.8, color=colour, alpha=0.6)
                ax.plot([], [], style, color=colour, label=f"{model}, {loss}")
        ax.set(xlabel="eps, the teacher's step", ylabel="|measured / predicted - 1|", title=title)
    left.legend(frameon=False, fontsize=7)
    for model, colour in (("GPT", evaluate.COLOURS["same"]), ("MLP", evaluate.COLOURS["different"])):
        cosines = [
            r["cosine"] for r in results["cross_kernels"] if r["model"] == model and r["student_seed"] != r["teacher_seed"]
        ]
        right.hist(cosines, bins=30, range=(-1, 1), color=colour, alpha=0.6, label=f"{model}, {len(cosines)} pairs")
    right.axvline(1, color="black", ls=":", lw=1)
    right.axvline(0, color="grey", ls=":", lw=0.8)
    right.set(xlabel="cosine of the cross-kernel (1: the same start)", ylabel="pairs of starts", title="another start")
    right.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = lab.parse(__doc__, argv)
    run = lab.evidence(args)
    records = []
    for problems in (gpt_problems(args, run), mlp_problems()):
        for about, outputs, trait_loss, theta in problems:
            records += [{**about, **r} for r in one_problem(outputs, trait_loss, theta, EPSILONS[args.quick])]
    results = analyse(records, cross_kernels(args, run))
    lab.save("theorem", args, results, markdown, plot)


if __name__ == "__main__":
    command_line(main)
