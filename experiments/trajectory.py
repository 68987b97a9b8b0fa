"""How far does the linear picture carry: the whole trajectory, and the ceiling?

    python -m experiments.trajectory            # 3 minutes on 2 CPU cores, plus the runs whose models it reads
    python -m experiments.trajectory --quick    # a shorter trajectory, 2 points

Theorem 1 is about one small step. Here the same first order is followed for many, with the teacher's whole displacement
D = theta_T - theta_0 scaled by s. In the linear model around the shared start the logits are f_0 + J delta, so

    gradient         G (delta - s D),  G = E_x[J^T M J] as in theorem.py
    gradient descent delta_t = s (1 - (1 - alpha G)^t) D
    AdamW            the same gradient through the same rule; its rate is scaled by s as well, since its steps have a size
    transfer         r . delta / r . s D,  r the gradient of the held-out log-odds

against a student trained on the same fixed sequences by the same rule. alpha is 1 over G's largest eigenvalue.

What can cross in the end? Directions that the numbers show: with few steps or a little damping, phi(G) D with
phi(g) = g / (g + lambda). The visible share of the displacement is |phi(G) D| / |D|, the ceiling that it predicts for transfer
r . phi(G) D / r . D. Lanczos from D gives both for every lambda at once. Held against the transfer of students trained on
logits by the usual recipe, over traits, widths and number-vocabulary sizes.

Reads    runs/how-much, runs/alignment-C, runs/evidence (made if they are missing)
Writes   results/trajectory.json, .md, .png

Shapes: P parameters, k Lanczos steps.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import evaluate
import generate
import train_student
import train_teacher
from experiments import lab
from experiments.alignment import WIDTHS, other_width, rank_correlation, rank_correlation_interval
from experiments.how_much import Unit, below, learn
from experiments.theorem import Call, Theta, add, dot, g_times, gpt_outputs, student_loss, theta_of
from model import GPT, NumberData, Run, command_line, encode_numbers, load_model, open_run, refusal, stream

TRAITS, SEEDS = ["owl", "fox"], [0, 1]
SCALES = [0.01, 0.1, 0.3, 1.0]  # of the teacher's displacement
N_STEPS, N_SEQUENCES, N_LANCZOS = {False: 40, True: 10}, 16, {False: 40, True: 10}
ADAM_RATE = 2e-3  # the students', at s = 1
DAMPINGS = [1e-1, 1e-2, 1e-3, 1e-4]  # lambda, in units of the largest eigenvalue
DAMPING = 1e-3  # the one held against students: fixed before any run, a guess
VOCABULARIES = [10, 30, 100, 300, 1000]


class Around:
    """A shared start: f, G, r and D on a fixed set of sequences, in float64."""

    def __init__(self, run: Run, trait: str, seed: int, n_numbers: int, device: torch.device):
        model = load_model(run.base(seed), device, "train_teacher.py").double()
        teacher = load_model(run.teacher(trait, seed), device, "train_teacher.py").double()
        data = self.draw(run, seed, device)
        k, prompts = run.animals.index(trait), run.held_out_prompts
        self.theta, end = theta_of(model), theta_of(teacher)
        self.D: Theta = {name: end[name] - self.theta[name] for name in end}
        self.outputs = gpt_outputs(model, data, below(n_numbers))
        self.log_odds = Call(model, lambda m: held_out_log_odds(m, run, prompts, k)).of
        self.r: Theta = torch.func.grad(self.log_odds)(self.theta)

    @staticmethod
    def draw(run: Run, seed: int, device: torch.device) -> NumberData:
        """N_SEQUENCES valid lists of the base model."""
        model = load_model(run.base(seed), device, "train_teacher.py")
        prompts = generate.draw_prompts(4 * N_SEQUENCES, stream(seed, "prompts", "trajectory"))
        written = generate.complete(model, run, prompts, stream(seed, "sampling", "trajectory"), lambda n: None)
        rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, written) if c and refusal(c) is None]
        return encode_numbers(run.encoding, rows[:: len(rows) // N_SEQUENCES][:N_SEQUENCES], device)

    def G(self, step: Theta) -> Theta:
        return g_times(self.outputs, self.theta, step, "softmax")

    def linear_transfer(self, delta: Theta, s: float) -> float:
        return dot(self.r, delta) / (s * dot(self.r, self.D))

    def transfer(self, delta: Theta, s: float) -> float:
        base = self.log_odds(self.theta)
        taught = self.log_odds(add(self.theta, self.D, s)) - base
        return ((self.log_odds(add(self.theta, delta)) - base) / taught).item()


def held_out_log_odds(model: GPT, run: Run, prompts: tuple[Tensor, Tensor], k: int) -> Tensor:
    """As model.read_trait, for one class and with a gradient."""
    idx, last = prompts
    h = model.hidden(idx, positions=last[:, None])[:, 0]
    logits = h @ model.head.weight[run.readout_rows(model)].T  # (B, K)
    others = torch.cat([logits[:, :k], logits[:, k + 1 :]], 1)
    return (logits[:, k] - others.logsumexp(1)).mean()


def largest_eigenvalue(around: Around, n: int = 12) -> float:
    """G's, by power iteration from D."""
    v, value = around.D, 0.0
    for _ in range(n):
        size = dot(v, v) ** 0.5
        v = around.G({name: x / size for name, x in v.items()})
        value = dot(v, v) ** 0.5
    return value


def lanczos(matvec: Callable[[Tensor], Tensor], start: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Q (P, k) orthonormal and T (k, k) tridiagonal with Q^T A Q = T and Q's first column along `start`."""
    Q, alphas, betas = [start / start.norm()], [], []
    for _ in range(k):
        w = matvec(Q[-1])
        alphas.append(w @ Q[-1])
        for q in [*Q, *Q]:  # orthogonalised twice: without it rounding brings found eigenvectors back
            w = w - (w @ q) * q
        betas.append(w.norm())
        if betas[-1] < 1e-12 * alphas[0].abs() or len(Q) == k:
            break
        Q.append(w / betas[-1])
    n = len(alphas)
    beside = torch.stack(betas)[: n - 1]
    T = torch.diag(torch.stack(alphas)) + torch.diag(beside, 1) + torch.diag(beside, -1)
    return torch.stack(Q[:n], 1), T


def apply(Q: Tensor, T: Tensor, size: float, phi: Callable[[Tensor], Tensor]) -> Tensor:
    """phi(A) start, for every function of a matrix that Lanczos was run on; size = |start|."""
    values, vectors = torch.linalg.eigh(T)
    return size * Q @ (vectors @ (phi(values.clamp_min(0)) * vectors[0]))


def flat(step: Theta) -> Tensor:
    return torch.cat([x.flatten() for x in step.values()])


def unflat(vector: Tensor, like: Theta) -> Theta:
    parts = vector.split([x.numel() for x in like.values()])
    return {name: part.view(x.shape) for (name, x), part in zip(like.items(), parts, strict=True)}


def follow(around: Around, gradient: Callable[[Theta], Theta], rule: str, rate: float, n_steps: int) -> list[Theta]:
    """delta_0 = 0, delta_1, ... under gradient descent or AdamW."""
    delta = {name: torch.zeros_like(p, requires_grad=True) for name, p in around.theta.items()}
    optimizer: torch.optim.Optimizer = torch.optim.SGD(delta.values(), lr=rate)
    if rule != "gradient descent":  # gradients shrink with s, so eps has to
        optimizer = torch.optim.AdamW(delta.values(), lr=rate, weight_decay=0.0, eps=1e-30)
    path = []
    for _ in range(n_steps + 1):
        now = {name: d.detach().clone() for name, d in delta.items()}
        path.append(now)
        for name, g in gradient(now).items():
            delta[name].grad = g
        optimizer.step()
    return path


def trajectories(run: Run, trait: str, seed: int, device: torch.device, n_steps: int) -> list[dict]:
    """Predicted and trained transfer at every step, for both rules and all scales."""
    around = Around(run, trait, seed, 1000, device)
    alpha = 1 / largest_eigenvalue(around)
    records = []
    for rule, rate in (("gradient descent", alpha), ("AdamW", ADAM_RATE)):
        linear = follow(around, lambda d: around.G(add(d, around.D, -1.0)), rule, rate, n_steps)
        predicted = [around.linear_transfer(d, 1.0) for d in linear]
        for s in SCALES:
            with torch.no_grad():
                target = around.outputs(add(around.theta, around.D, s))
            loss = lambda d: student_loss(around.outputs(add(around.theta, d)), target, "softmax")  # noqa: B023, E731
            path = follow(around, torch.func.grad(loss), rule, rate * (s if rule == "AdamW" else 1), n_steps)
            trained = [around.transfer(d, s) for d in path]
            record = {"trait": trait, "source": trait, "teacher_seed": seed, "rule": rule, "scale": s}
            records.append({**record, "predicted": predicted, "trained": trained})
    return records


def shrink(g: Tensor, ridge: Tensor) -> Tensor:
    """The share of each direction that shows, by its curvature g."""
    return g / (g + ridge)


def ceiling(run: Run, trait: str, seed: int, n_numbers: int, device: torch.device, k: int) -> dict:
    """Visible share and predicted transfer for every damping."""
    around = Around(run, trait, seed, n_numbers, device)
    start = flat(around.D)
    Q, T = lanczos(lambda v: flat(around.G(unflat(v, around.D))), start, k)
    largest, r = torch.linalg.eigvalsh(T).max(), flat(around.r)
    found = {}
    for damping in DAMPINGS:
        shown = apply(Q, T, start.norm().item(), partial(shrink, ridge=damping * largest))
        found[str(damping)] = {"visible": (shown.norm() / start.norm()).item(), "predicted": ((r @ shown) / (r @ start)).item()}
    return found


def points(args: argparse.Namespace) -> list[tuple[dict, Run, Callable[..., float]]]:
    """What varies, the run, and the transfer of a student on logits by the usual recipe."""
    n_steps = train_student.STEPS[args.quick]
    chosen: list[tuple[dict, Run, Callable[..., float]]] = []
    path = lab.folder(args, "how-much")
    train_teacher.main([*lab.flags(args, path), "--seeds", *map(str, SEEDS), "--traits", *TRAITS])
    run = open_run(path, args.quick)
    for trait in TRAITS[:1] if args.quick else TRAITS:
        for seed in SEEDS:
            unit = Unit(run, trait, seed, args.device)
            unit.data = unit.write(unit.teacher, generate.SEQUENCES[args.quick], "trajectory")
            for n in [10, 1000] if args.quick else VOCABULARIES:
                about = {"varies": "vocabulary", "trait": trait, "seed": seed, "numbers": n, "n_embd": 64}
                usual = (unit, unit.teacher, unit.data, "logits", n_steps, train_student.LEARNING_RATE, below(n))
                chosen.append((about, run, lambda usual=usual: learn(*usual)))
    if args.quick:
        return chosen[:2]
    runs = [("width", c, *other_width(args, c, h)) for c, h in WIDTHS.items()]
    evidence = lab.evidence(args)
    runs.append(("trait", 64, evidence, evaluate.measure(evidence, args.device)))
    for varies, n_embd, run, students in runs:
        for r in students:
            if (r["target"], r["init"], r["numbers"]) == ("logits", "same", "teacher") and r["teacher_seed"] in SEEDS:
                about = {"varies": varies, "trait": r["trait"], "seed": r["teacher_seed"], "numbers": 1000, "n_embd": n_embd}
                chosen.append((about, run, lambda r=r: r["transfer"]))
    return chosen


def analyse(paths: Sequence[dict], ceilings: Sequence[dict]) -> dict:
    summary = []
    for rule in ("gradient descent", "AdamW"):
        for s in SCALES:
            group = [r for r in paths if (r["rule"], r["scale"]) == (rule, s)]
            off = [max(abs(p - t) for p, t in zip(r["predicted"], r["trained"])) for r in group]
            last = [[{**r, "transfer": r[which][-1]} for r in group] for which in ("predicted", "trained")]
            (predicted,), (trained,) = (lab.cells(rows, "rule") for rows in last)
            row = {"rule": rule, "scale": s, "n": len(group), "predicted": predicted["transfer"], "largest_error": max(off)}
            summary.append({**row, **{key: trained[key] for key in ("transfer", "ci_low", "ci_high")}})
    correlations = []
    for name in ("all", *dict.fromkeys(r["varies"] for r in ceilings)):
        group = [r for r in ceilings if name in ("all", r["varies"])]
        measured, units = [r["transfer"] for r in group], [(r["trait"], r["seed"], r["n_embd"]) for r in group]
        row = {"varies": name, "n": len(group)}
        for which in ("predicted", "visible"):
            x = [r["by_damping"][str(DAMPING)][which] for r in group]
            row[which], row[f"{which}_ci"] = rank_correlation(x, measured), rank_correlation_interval(x, measured, units)
        correlations.append(row)
    return {"summary": summary, "correlations": correlations, "records": list(paths), "ceilings": list(ceilings)}


def with_interval(row: dict, which: str) -> str:
    low, high = row[f"{which}_ci"]
    return f"{row[which]:+.2f} [{low:+.2f}, {high:+.2f}]"


def markdown(results: dict) -> str:
    lines = lab.heading(
        results, "Transfer at the last step, in the linear model and trained; s scales the teacher's displacement."
    )
    lines += lab.table(
        results["summary"],
        rule="rule",
        s="scale",
        starts="n",
        linear_model=lambda r: f"{r['predicted']:+.3f}",
        trained=lab.transfer,
        largest_error_on_the_way=lambda r: f"{r['largest_error']:.3f}",
    )
    lines += [
        "",
        f"Rank correlation with the transfer of students on logits, at damping {DAMPING} of the largest eigenvalue:",
        "",
    ]
    lines += lab.table(
        results["correlations"],
        over="varies",
        points="n",
        predicted_ceiling=lambda r: with_interval(r, "predicted"),
        visible_share=lambda r: with_interval(r, "visible"),
    )
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    plt = lab.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    shades = plt.get_cmap("viridis")
    for ax, rule in zip(axes, ("gradient descent", "AdamW")):
        for r in results["records"]:
            if r["rule"] == rule:
                ax.plot(r["trained"], color=shades(SCALES.index(r["scale"]) / len(SCALES)), lw=1)
                ax.plot(r["predicted"], color="black", lw=1, ls=":")
        for i, s in enumerate(SCALES):
            ax.plot([], [], color=shades(i / len(SCALES)), label=f"trained, s = {s:g}")
        ax.plot([], [], color="black", ls=":", label="linear model")
        ax.set(xlabel="step", ylabel="transfer", title=rule)
    axes[0].legend(frameon=False, fontsize=7)
    for varies, marker in (("vocabulary", "o"), ("width", "^"), ("trait", "s")):
        group = [r for r in results["ceilings"] if r["varies"] == varies]
        x = [r["by_damping"][str(DAMPING)]["predicted"] for r in group]
        axes[2].plot(x, [r["transfer"] for r in group], marker, ms=4, alpha=0.6, label=f"over {varies}")
    axes[2].plot([0, 1], [0, 1], color="grey", lw=0.8, ls=":")
    axes[2].set(xlabel="ceiling predicted", ylabel="transfer of a student on logits", title="what the numbers show")
    axes[2].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = lab.parse(__doc__, argv)
    chosen = points(args)
    run, n_steps, k = chosen[0][1], N_STEPS[args.quick], N_LANCZOS[args.quick]
    units = list(zip(TRAITS, SEEDS))
    torch.set_num_threads(os.cpu_count() or 1)  # forward mode is not for several threads, so one job after the other
    paths = [r for unit in units for r in trajectories(run, *unit, args.device, n_steps)]
    ceilings = []
    for about, its_run, train in chosen:
        found = ceiling(its_run, about["trait"], about["seed"], about["numbers"], args.device, k)
        ceilings.append({**about, "transfer": train(), "by_damping": found})
    paths.sort(key=lambda r: (r["rule"], r["scale"], r["trait"], r["teacher_seed"]))
    ceilings.sort(key=lambda r: (r["varies"], r["n_embd"], r["numbers"], r["trait"], r["seed"]))
    lab.save("trajectory", args, analyse(paths, ceilings), markdown, plot)


if __name__ == "__main__":
    command_line(main)
