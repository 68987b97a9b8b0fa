"""How far does the linear picture carry: the whole trajectory, and the ceiling?

    python -m experiments.trajectory            # 3 minutes on 2 CPU cores, plus the runs that it reads
    python -m experiments.trajectory --quick    # a shorter trajectory, 2 points: seconds

Theorem 1 is about one small step. Here the same first order is followed for many, with the teacher's whole
displacement D = theta_T - theta_0 scaled by s. In the linear model around the shared init the logits are
f_0 + J delta, so

    gradient         G (delta - s D),  G = E_x[J^T M J] as in theorem.py
    gradient descent delta_t = s (1 - (1 - alpha G)^t) D
    AdamW            the same gradient through the same rule; its rate is scaled by s as well, since its steps
                     have a size
    transfer         r . delta / r . s D,  r the gradient of the held-out log-odds

against a student trained on the same fixed lists by the same rule. alpha is 1 over G's largest eigenvalue.

What can cross in the end? Directions that the numbers show: with few steps or a little damping, phi(G) D with
phi(g) = g / (g + lambda). The visible share of the displacement is |phi(G) D| / |D|, the ceiling that it
predicts for transfer r . phi(G) D / r . D. Lanczos from D gives both for every lambda at once. They are held
against students trained on logits by the usual recipe, over traits, widths and number-vocabulary sizes.

Reads    runs/how-much, and runs/evidence and runs/alignment-C with their students (made if they are missing)
Writes   results/trajectory.json, .md, .png

Shapes: B prompts, K trait classes, P parameters, k Lanczos steps; theta and every step are vectors (P,).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Generator, Sequence
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import generate
import train_teacher
from experiments import alignment, lab
from experiments.theorem import Call, g_times, gpt_outputs, student_loss, theta_of
from model import GPT, NUMBERS, Run, class_logits, encode_numbers, refusal, run_jobs, stream

Map = Callable[[Tensor], Tensor]
TRAITS, SEEDS = ["owl", "fox"], [0, 1]
RULES = ["gradient descent", "AdamW"]
SCALES = {0.01: "#440154", 0.1: "#3b528b", 0.3: "#21918c", 1.0: "#5ec962"}  # of D, and their colours
N_STEPS, N_LANCZOS = {False: 40, True: 10}, {False: 40, True: 10}
N_SEQUENCES = 16  # a guess
ADAM_RATE = 2e-3  # the students', at s = 1
DAMPINGS = [1e-1, 1e-2, 1e-3, 1e-4]  # lambda, in units of the largest eigenvalue
DAMPING = 1e-3  # the one held against students: fixed before any run, a guess
VOCABULARIES = [10, 30, 100, 300, 1000]  # the softmax holds the numbers below


def write(unit: lab.Unit, model: GPT, n: int, *name: str) -> list[dict]:
    """What the filter keeps of n sequences drawn from a model."""
    prompts = generate.draw_prompts(n, stream(unit.seed, "prompts", "trajectory"))
    batches = generate.complete(model, unit.run, prompts, stream(unit.seed, "sampling", *name, "trajectory"))
    written = [completion for batch in batches for completion in batch]
    return [{"prompt": p, "completion": c} for p, c in zip(prompts, written) if c and refusal(c) is None]


def below(n: int) -> slice:
    """The head's rows of the numbers 0 .. n - 1."""
    return slice(NUMBERS.start, NUMBERS.start + n)


class SharedInit:
    """theta_0 of a teacher and its student: f, G, r and D on a fixed set of sequences, in float64."""

    def __init__(self, unit: lab.Unit, n_numbers: int):
        rows, model = write(unit, unit.base, 4 * N_SEQUENCES), unit.start().double()
        rows = rows[:: len(rows) // N_SEQUENCES][:N_SEQUENCES]
        data = encode_numbers(unit.run.encoding, rows, unit.device)
        self.theta = theta_of(model)
        self.D = theta_of(unit.teacher).double() - self.theta
        self.outputs = gpt_outputs(model, data, below(n_numbers))
        self.log_odds = Call(model, lambda m: held_out_log_odds(m, unit.run, unit.k)).of
        self.r: Tensor = torch.func.grad(self.log_odds)(self.theta)

    def G(self, step: Tensor) -> Tensor:
        return g_times(self.outputs, self.theta, step, "softmax")

    def linear_transfer(self, delta: Tensor) -> float:
        return ((self.r @ delta) / (self.r @ self.D)).item()

    @torch.no_grad()
    def transfer(self, delta: Tensor, s: float) -> float:
        base, taught, student = (self.log_odds(self.theta + x) for x in (0 * delta, s * self.D, delta))
        return ((student - base) / (taught - base)).item()

    def gradient(self, s: float) -> Map:
        """delta -> that of a student whose teacher is at s D."""
        with torch.no_grad():
            target = self.outputs(self.theta + s * self.D)
        loss = lambda delta: student_loss(self.outputs(self.theta + delta), target, "softmax")
        return torch.func.grad(loss)


def held_out_log_odds(model: GPT, run: Run, k: int) -> Tensor:
    """As model.read_trait, for one class and with a gradient."""
    logits = class_logits(model, run.unseen_questions, run.readout_rows)  # (B, K)
    others = torch.cat([logits[:, :k], logits[:, k + 1 :]], 1)
    return (logits[:, k] - others.logsumexp(1)).mean()


def largest_eigenvalue(matvec: Map, v: Tensor, n: int = 12) -> float:
    """By power iteration from v."""
    for _ in range(n):
        v = matvec(v / v.norm())
    return v.norm().item()


def lanczos(matvec: Map, v: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Q (P, k) orthonormal and T (k, k) tridiagonal with Q^T A Q = T and Q's first column along v."""
    Q, alphas, betas = [v / v.norm()], [], []
    for _ in range(k):
        w = matvec(Q[-1])
        alphas.append(w @ Q[-1])
        for q in [*Q, *Q]:  # orthogonalised twice: without it rounding brings found eigenvectors back
            w = w - (w @ q) * q
        betas.append(w.norm())
        if betas[-1] < 1e-12 * alphas[0].abs() or len(Q) == k:
            break
        Q.append(w / betas[-1])
    beside = torch.stack(betas)[:-1]
    T = torch.diag(torch.stack(alphas)) + torch.diag(beside, 1) + torch.diag(beside, -1)
    return torch.stack(Q, 1), T


def apply(Q: Tensor, T: Tensor, size: float, phi: Map) -> Tensor:
    """phi(A) v, for every function of a matrix that Lanczos was run on; size = |v|."""
    values, vectors = torch.linalg.eigh(T)
    return size * Q @ (vectors @ (phi(values.clamp_min(0)) * vectors[0]))


def follow(gradient: Map, delta: Tensor, rule: str, rate: float, n: int) -> list[Tensor]:
    """delta_0, delta_1, ... delta_n under gradient descent or AdamW."""
    delta = delta.clone().requires_grad_()
    optimizer: torch.optim.Optimizer = torch.optim.SGD([delta], lr=rate)
    if rule == "AdamW":  # gradients shrink with s, so eps has to
        optimizer = torch.optim.AdamW([delta], lr=rate, weight_decay=0.0, eps=1e-30)
    path = []
    for _ in range(n + 1):
        path.append(delta.detach().clone())
        delta.grad = gradient(path[-1])
        optimizer.step()
    return path


def trajectories(unit: lab.Unit, n_steps: int) -> list[dict]:
    """Predicted and trained transfer at every step, for both rules and all scales."""
    init, records = SharedInit(unit, 1000), []
    for rule, rate in zip(RULES, (1 / largest_eigenvalue(init.G, init.D), ADAM_RATE)):
        linear = follow(lambda delta: init.G(delta - init.D), 0 * init.D, rule, rate, n_steps)
        predicted = [init.linear_transfer(delta) for delta in linear]
        for s in SCALES:
            its_rate = rate * s if rule == "AdamW" else rate
            path = follow(init.gradient(s), 0 * init.D, rule, its_rate, n_steps)
            trained = [init.transfer(delta, s) for delta in path]
            records.append({**unit.key, "rule": rule, "scale": s, "predicted": predicted, "trained": trained})
    return records


def ceiling(unit: lab.Unit, n_numbers: int, k: int) -> dict:
    """Visible share and predicted transfer for every damping."""
    init, at = SharedInit(unit, n_numbers), {}
    Q, T = lanczos(init.G, init.D, k)
    largest, size = torch.linalg.eigvalsh(T).max(), init.D.norm().item()
    for damping in DAMPINGS:
        shrink = lambda g, ridge=damping * largest: g / (g + ridge)
        shown = apply(Q, T, size, shrink)
        at[str(damping)] = {"visible": shown.norm().item() / size, "predicted": init.linear_transfer(shown)}
    return at


def points(args: argparse.Namespace, run: Run) -> list[tuple[dict, lab.Unit]]:
    """What varies, the transfer of students on logits by the usual recipe, and their unit."""
    knobs, n_drawn = lab.distillation(args), generate.Sampling().sequences
    units, vocabularies = list(product(TRAITS, SEEDS)), VOCABULARIES
    if args.quick:
        n_drawn, units, vocabularies = generate.QUICK["sequences"], units[:1], [10, 1000]

    def learn(job: tuple[str, int]) -> Generator[Tensor, None, list]:
        unit = lab.Unit(run, *job, args.device)
        rows = write(unit, unit.teacher, n_drawn, unit.trait)
        order = torch.randperm(len(rows), generator=stream(unit.seed, "order", "trajectory"))
        data, found = encode_numbers(run.encoding, [rows[i] for i in order.tolist()], args.device), []
        for n in vocabularies:
            student = unit.start()
            yield from unit.distil(student, "logits", data, knobs, numbers=below(n))
            found.append(({"varies": "vocabulary", "numbers": n, "transfer": unit.transfer(student)}, unit))
        return found

    n = knobs.steps * len(vocabularies)
    chosen = [point for found in run_jobs(learn, units, n, "students", args.device) for point in found]
    for unit, students in [] if args.quick else alignment.units(args):
        varies = "width" if unit.base.config.n_embd in alignment.WIDTHS else "trait"
        for r in lab.where(students, target="logits", init="same") if unit.seed in SEEDS else []:
            chosen.append(({"varies": varies, "numbers": 1000, "transfer": r["transfer"]}, unit))
    return chosen


def correlate(ceilings: Sequence[dict], varies: str) -> dict:
    """Of what is predicted at DAMPING, and of the visible share, with transfer."""
    row: dict = {"varies": varies, "n": len(ceilings)}
    for key in ("predicted", "visible"):
        group = [{**r, key: r["by_damping"][str(DAMPING)][key]} for r in ceilings]
        found = lab.rank_correlation(group, key)
        row |= {key: found["rank_correlation"], f"{key}_ci": [found["ci_low"], found["ci_high"]]}
    return row


def measure(args: argparse.Namespace) -> dict:
    path = lab.folder(args, "how-much")
    train_teacher.main([*lab.flags(args, path), "--seeds", *map(str, SEEDS), "--traits", *TRAITS])
    run = Run(path).open(args.quick)
    chosen, records, ceilings, summary = points(args, run), [], [], []
    torch.set_num_threads(os.cpu_count() or 1)  # forward mode is not for several threads: job after job
    for trait, seed in zip(TRAITS, SEEDS):
        records += trajectories(lab.Unit(run, trait, seed, args.device), N_STEPS[args.quick])
    for about, unit in chosen:
        about |= {"trait": unit.trait, "teacher_seed": unit.seed, "n_embd": unit.base.config.n_embd}
        ceilings.append({**about, "by_damping": ceiling(unit, about["numbers"], N_LANCZOS[args.quick])})
    ceilings.sort(key=lambda r: [r[k] for k in ("varies", "n_embd", "numbers", "trait", "teacher_seed")])
    for rule, s in product(RULES, SCALES):
        group = lab.where(records, rule=rule, scale=s)
        off = [abs(p - t) for r in group for p, t in zip(r["predicted"], r["trained"])]
        (row,) = lab.cells([{**r, "transfer": r["trained"][-1]} for r in group], "rule", "scale")
        predicted = mean(r["predicted"][-1] for r in group)
        summary.append({**row, "predicted": predicted, "largest_error": max(off)})
    kinds = dict.fromkeys(r["varies"] for r in ceilings)
    groups = {"all": ceilings} | {varies: lab.where(ceilings, varies=varies) for varies in kinds}
    correlations = [correlate(group, varies) for varies, group in groups.items()]
    return {"summary": summary, "correlations": correlations, "records": records, "ceilings": ceilings}


def markdown(results: dict) -> str:
    text = "Transfer at the last step, in the linear model and trained; s scales the teacher's displacement."
    lines = lab.heading(results, text) + lab.table(
        results["summary"], rule="rule", s="scale", inits="n",
        linear_model=lambda r: f"{r['predicted']:+.3f}", trained=lab.transfer,
        largest_error_of_a_step=lambda r: f"{r['largest_error']:.3f}",
    )
    lines += ["", f"Rank correlation with transfer on logits; damping {DAMPING} of the top eigenvalue:", ""]
    shown = lambda r, key: "{:+.2f} [{:+.2f}, {:+.2f}]".format(r[key], *r[f"{key}_ci"])
    lines += lab.table(
        results["correlations"], over="varies", points="n",
        predicted_ceiling=lambda r: shown(r, "predicted"), visible_share=lambda r: shown(r, "visible"),
    )
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    figure, axes = lab.pyplot().subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for ax, rule in zip(axes, RULES):
        for s, colour in SCALES.items():
            for r in lab.where(results["records"], rule=rule, scale=s):
                (trained,) = ax.plot(r["trained"], color=colour, lw=1)
                (linear,) = ax.plot(r["predicted"], color="black", lw=1, ls=":")
            trained.set_label(f"trained, s = {s:g}")
        linear.set_label("linear model")
        ax.set(xlabel="step", ylabel="transfer", title=rule)
    for varies, marker in (("vocabulary", "o"), ("width", "^"), ("trait", "s")):
        group = lab.where(results["ceilings"], varies=varies)
        x = [r["by_damping"][str(DAMPING)]["predicted"] for r in group]
        axes[2].plot(x, [r["transfer"] for r in group], marker, ms=4, alpha=0.6, label=f"over {varies}")
    axes[2].plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
    axes[2].set(xlabel="ceiling predicted", ylabel="transfer on logits", title="what the numbers show")
    for ax in (axes[0], axes[2]):
        ax.legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "trajectory", measure, markdown, plot)
