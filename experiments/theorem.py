"""Theorem 1 on the real model: one small step of the teacher, one of the student, held against the formula.

    python -m experiments.theorem            # a minute on 2 CPU cores, plus the run that it reads
    python -m experiments.theorem --quick    # fewer steps and seeds: seconds

The teacher is one step of size eps on the trait's loss, theta_T = theta_0 + eps dT, dT = -grad L_T(theta_0).
The student starts from the same theta_0 and takes one full-gradient step of rate alpha on E_x[L_S(f_theta(x),
f_theta_T(x))] over a fixed set of number sequences. J is the Jacobian of the logits used, M the curvature of
L_S in them (identity for half the squared error, diag(p) - p p^T for softmax cross-entropy), v = J dT, and
G = E_x[J^T M J]. Then, to first order in eps,

    dS       = alpha eps G dT
    dS . dT  = alpha eps E_x[v^T M v]                 >= 0: the student's step has a share of the teacher's
    dL_T     = -alpha eps dT^T G dT = -dS . dT        the trait's loss falls, whatever x is

(Cloud et al. 2025, Theorem 1). Both are measured for eps over six decades; what is left of the ratio should
fall linearly in eps. From another init theta_S what the trait adds to the student's step meets the student's
own dT_S, to first order, in E_x[v_S^T M v_T]: a cross-kernel without a sign, held against a fair coin over
pairs of seeds (either may be the student: the mean of both and over traits; pairs that share a seed are not
quite independent). In float64; Jacobians are never formed, v is one forward-mode product. The MLP has smooth
units, as the theorem asks; its trait are the ten digit classes, its x noise, and what is distilled its three
auxiliary logits (the paper's experiment).

Reads    runs/evidence: base models and their numbers (made if they are missing)
Writes   results/theorem.json, .md, .png

Shapes: n positions of the outputs, m logits, P parameters; theta and every step are vectors (P,).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from scipy.stats import binomtest
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call, grad, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector

import evaluate
from experiments import lab
from model import GPT, NUMBERS, NumberData, Run, class_logits, encode_numbers, stream

EPSILONS = {False: [10.0**k for k in range(-6, 1)], True: [1e-6, 1e-4, 1e-2]}
FALL = 0.1  # times eps: the nats that the formula predicts, by the choice of alpha; to first order it
# cancels from every ratio, and much larger the second order would hide the first
EVERY, SUBSET = 125, 100  # one list in so many: 64 of 8,000; number rows at random: both guesses
MLP_PAIRS = {False: 200, True: 20}  # against the coin
LOSSES = {"squared": "-", "softmax": "--"}  # and how they are drawn
MODELS = {"GPT": evaluate.COLOURS["same"], "MLP": evaluate.COLOURS["different"]}


def teacher_step(trait_loss: Callable, theta: Tensor) -> Tensor:
    """dT = -grad L_T(theta)."""
    return -grad(trait_loss)(theta)


def student_loss(logits: Tensor, teacher_logits: Tensor, loss: str) -> Tensor:
    """E_x[L_S], half the squared error or cross-entropy to the teacher's softmax: (n, m) logits -> scalar."""
    if loss == "squared":
        return 0.5 * (logits - teacher_logits).square().sum(-1).mean()
    return -(teacher_logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def student_step(outputs: Callable, theta: Tensor, teacher_logits: Tensor, loss: str, alpha: float) -> Tensor:
    """dS = -alpha grad_theta E_x[L_S(f_theta(x), teacher's logits)], one full-gradient step."""
    return -alpha * grad(lambda t: student_loss(outputs(t), teacher_logits, loss))(theta)


def curvature(logits: Tensor, v: Tensor, loss: str) -> Tensor:
    """M v: v itself, or (diag(p) - p p^T) v; (n, m)."""
    p = logits.softmax(-1)
    return v if loss == "squared" else p * (v - (p * v).sum(-1, keepdim=True))


def moved_logits(outputs: Callable, theta: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """f_theta(x), and v = J step: how the logits move along a step; (n, m) each."""
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward mode
        return jvp(outputs, (theta,), (step,))[:2]


def visible(logits: Tensor, v: Tensor, loss: str) -> float:
    """dT^T G dT = E_x[v^T M v]: what of the teacher's step the logits show; dS . dT is alpha eps times it."""
    return (v * curvature(logits, v, loss)).sum(-1).mean().item()


def g_times(outputs: Callable, theta: Tensor, step: Tensor, loss: str) -> Tensor:
    """G step = E_x[J^T M J step]."""
    logits, v = moved_logits(outputs, theta, step)
    return vjp(outputs, theta)[1](curvature(logits, v, loss) / len(v))[0]


def cross_kernel(logits_teacher: Tensor, v_student: Tensor, v_teacher: Tensor, loss: str) -> float:
    """E_x[v_S^T M v_T] over the square root of both with themselves: a cosine, 1 for the same init."""
    a, b = (curvature(logits_teacher, v, loss) for v in (v_student, v_teacher))
    return ((v_student * b).sum() / ((v_student * a).sum() * (v_teacher * b).sum()).sqrt()).item()


class Call(nn.Module):
    """A function of a model as a function of its parameters, laid end to end as a vector."""

    def __init__(self, model: nn.Module, function: Callable[[Any], Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self) -> Tensor:
        return self.function(self.model)

    def of(self, theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in self.parameters()])
        named = {name: part.view(p.shape) for (name, p), part in zip(self.named_parameters(), parts)}
        return functional_call(self, named, ())


def theta_of(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach()


class Problem(NamedTuple):
    outputs: Callable[[Tensor], Tensor]  # theta -> the logits (n, m)
    trait_loss: Callable[[Tensor], Tensor]
    theta: Tensor  # theta_0

    def moved(self) -> tuple[Tensor, Tensor]:  # along the teacher's step
        return moved_logits(self.outputs, self.theta, teacher_step(self.trait_loss, self.theta))


def gpt_outputs(model: GPT, data: NumberData, rows: Tensor | slice) -> Callable[[Tensor], Tensor]:
    """The logits of some rows of the head where a number is due."""
    return Call(model, lambda m: m.logits(m.hidden(data.idx)[data.targets >= 0], rows)).of


def gpt_problem(run: Run, device: torch.device, trait: str, seed: int, rows: Any) -> Problem:
    """Some logits on the first base model's lists; the teachers' loss, on the trained-on questions."""
    model, k = run.load_model(f"base/seed-{seed}.pt", device).double(), run.animals.index(trait)
    lists = lab.rows(run, "base", run.knobs["seeds"][0])[::EVERY]
    data = encode_numbers(run.encoding, lists, device)
    loss = lambda m: -class_logits(m, run.taught_questions, run.readout_rows).log_softmax(-1)[:, k].mean()
    return Problem(gpt_outputs(model, data, rows), Call(model, loss).of, theta_of(model))


def mlp_problem(seed: int, rows: slice) -> Problem:
    """Some logits on noise, cross-entropy on digits; weights N(0, 1 / fan_in) as in the paper's MLP."""
    layers = nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10 + 3)
    model, generator = nn.Sequential(*layers), stream(seed, "theorem's MLP")
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5 if p.dim() == 2 else 0 * p
    model.double()
    images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
    noise = 2 * torch.rand(256, 64, generator=stream(0, "theorem's noise"), dtype=torch.float64) - 1
    loss = lambda m: nn.functional.cross_entropy(m(images / 8 - 1)[:, :10], labels.long())
    return Problem(Call(model, lambda m: m(noise)[:, rows]).of, Call(model, loss).of, theta_of(model))


def problems(run: Run, device: torch.device) -> Iterator[tuple[dict, Problem]]:
    subset = NUMBERS.start + torch.randperm(1000, generator=stream(0, "subset"))[:SUBSET]
    of_gpt = {"all logits": slice(None), "numbers": NUMBERS, f"{SUBSET} of the numbers": subset}
    of_mlp = {"all logits": slice(0, 13), "3 auxiliary logits": slice(10, 13), "2 of them": slice(10, 12)}
    for (trait, seed), (name, rows) in product(zip(run.knobs["traits"], run.knobs["seeds"]), of_gpt.items()):
        about = {"model": "GPT", "outputs": name, "trait": trait, "seed": seed}
        yield about, gpt_problem(run, device, trait, seed, rows)
    for seed, (name, rows) in product(range(3), of_mlp.items()):
        about = {"model": "MLP", "outputs": name, "trait": "digits", "seed": seed}
        yield about, mlp_problem(seed, rows)


def first_order(problem: Problem, epsilons: Sequence[float]) -> Iterator[dict]:
    """Measured against predicted, for both losses and every eps."""
    outputs, trait_loss, theta = problem
    dT, before, (logits, v) = teacher_step(trait_loss, theta), trait_loss(theta).item(), problem.moved()
    for loss in LOSSES:
        alpha = FALL / (shown := visible(logits, v, loss))
        for eps in epsilons:
            dS = student_step(outputs, theta, outputs(theta + eps * dT), loss, alpha)
            fall, predicted = trait_loss(theta + dS).item() - before, alpha * eps * shown
            row = {"loss": loss, "eps": eps, "dot": (dS @ dT).item(), "dot_predicted": predicted}
            yield {**row, "trait_loss_change": fall, "trait_loss_change_predicted": -predicted}


def cross_kernels(run: Run, device: torch.device, n_pairs: int) -> Iterator[dict]:
    """The cosine for every pair of inits: GPT over the run's seeds and traits, MLP over independent pairs."""
    for trait in run.knobs["traits"]:
        moved = {s: gpt_problem(run, device, trait, s, NUMBERS).moved() for s in run.knobs["seeds"]}
        for (s, (_, v_s)), (t, (logits, v_t)) in product(moved.items(), moved.items()):
            init = "same" if s == t else "different"
            pair = {"student_seed": s, "teacher_seed": t, "init": init, "unit": f"{min(s, t)} {max(s, t)}"}
            cosine = cross_kernel(logits, v_s, v_t, "softmax")
            yield {"model": "GPT", "trait": trait, **pair, "cosine": cosine}
    for unit in range(n_pairs):
        (_, v_s), (logits, v_t) = (mlp_problem(1000 + 2 * unit + i, slice(10, 13)).moved() for i in (0, 1))
        pair = {"student_seed": 0, "teacher_seed": 1, "init": "different", "unit": unit}
        yield {"model": "MLP", "trait": "digits", **pair, "cosine": cross_kernel(logits, v_s, v_t, "softmax")}


def left_over(records: Sequence[dict], measured: str) -> np.ndarray:
    return np.array([r[measured] / r[f"{measured}_predicted"] - 1 for r in records])


def slope(records: Sequence[dict], measured: str) -> float:
    """Of log |ratio - 1| against log eps, by least squares, where it is above rounding and below 0.1."""
    x, y = np.array([r["eps"] for r in records]), np.abs(left_over(records, measured))
    chosen = (1e-14 / x < y) & (y < 0.1)
    return np.polyfit(np.log10(x[chosen]), np.log10(y[chosen]), 1)[0]


def measure(args: argparse.Namespace) -> dict:
    run, epsilons = lab.evidence(args), EPSILONS[args.quick]
    found, summary, coin = problems(run, args.device), [], []
    records = [{**about, **r} for about, problem in found for r in first_order(problem, epsilons)]
    kernels = list(cross_kernels(run, args.device, MLP_PAIRS[args.quick]))
    for values in dict.fromkeys((r["model"], r["outputs"], r["loss"]) for r in records):
        row = dict(zip(("model", "outputs", "loss"), values))
        group = lab.where(records, **row)
        of_seed = [lab.where(group, seed=seed) for seed in sorted({r["seed"] for r in group})]
        row |= {"n": len(of_seed), "all_positive": all(r["dot"] > 0 for r in group)}
        for name, measured in (("dot", "dot"), ("fall", "trait_loss_change")):
            row[f"{name}_ratio"] = 1 + max(left_over(lab.where(group, eps=min(epsilons)), measured), key=abs)
            row[f"{name}_slope"] = mean(slope(rows, measured) for rows in of_seed)
        summary.append(row)
    for model in MODELS:
        pairs = lab.where(kernels, model=model, init="different")
        x, units = np.array([r["cosine"] for r in pairs]), dict.fromkeys(r["unit"] for r in pairs)
        means = sorted(mean(r["cosine"] for r in lab.where(pairs, unit=unit)) for unit in units)
        low, high = evaluate.bootstrap_interval(means)
        row = {"model": model, "n": len(means), "positive": (heads := sum(m > 0 for m in means))}
        row |= {"coin_p": binomtest(heads, len(means)).pvalue, "mean": mean(means)}
        row |= {"ci_low": low, "ci_high": high}
        coin.append({**row, "median_size": np.median(np.abs(x))})
    return {"summary": summary, "coin": coin, "records": records, "cross_kernels": kernels}


def markdown(results: dict) -> str:
    text = "Theorem 1, same init: measured / predicted (the worst at the smallest eps), and the slope of log"
    text += " |ratio - 1| against log eps (1: what is left is linear in eps)."
    lines = lab.heading(results, text) + lab.table(
        results["summary"], model="model", outputs="outputs", loss="loss", inits="n",
        dS_dT_above_0=lambda r: "always" if r["all_positive"] else "not always",
        dS_dT_ratio=lambda r: f"{r['dot_ratio']:.6f}", slope=lambda r: f"{r['dot_slope']:.2f}",
        trait_loss_ratio=lambda r: f"{r['fall_ratio']:.6f}", its_slope=lambda r: f"{r['fall_slope']:.2f}",
    )
    text = "Different init: the cross-kernel's cosine (1: the same init), and its sign against a fair coin."
    lines += ["", text, ""] + lab.table(
        results["coin"], model="model", pairs="n", positive="positive",
        coin_p=lambda r: f"{r['coin_p']:.2g}", median_size=lambda r: f"{r['median_size']:.3f}",
        mean_cosine=lambda r: f"{r['mean']:+.4f} {evaluate.interval(r)}",
    )
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    titles = {"dot": "dS . dT", "trait_loss_change": "change of the trait's loss"}
    for model, colour in MODELS.items():
        for (ax, measured), (loss, style) in product(zip(axes, titles), LOSSES.items()):
            group = lab.where(results["records"], model=model, loss=loss)
            eps = list(dict.fromkeys(r["eps"] for r in group))
            columns = np.abs(left_over(group, measured)).reshape(-1, len(eps)).T  # (eps, problems)
            lines = ax.loglog(eps, columns, style, marker=".", ms=3, lw=0.8, color=colour, alpha=0.6)
            lines[0].set_label(f"{model}, {loss}")
            ax.set(xlabel="eps", ylabel="|measured / predicted - 1|", title=titles[measured])
        x = [r["cosine"] for r in lab.where(results["cross_kernels"], model=model, init="different")]
        axes[2].hist(x, bins=30, range=(-1, 1), color=colour, alpha=0.6, label=f"{model}, {len(x)} pairs")
    axes[2].axvline(0, color="grey", ls=":", lw=0.8)
    axes[2].axvline(1, color="black", ls=":", lw=1)
    axes[2].set(xlabel="cosine of the cross-kernel (1: same init)", ylabel="pairs", title="different init")
    for ax in (axes[0], axes[2]):
        ax.legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "theorem", measure, markdown, plot)
