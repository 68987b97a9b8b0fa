"""The paper's smallest experiment: digits learnt from noise images and three logits that mean nothing.

    python -m experiments.mlp                    # scikit-learn's digits, 20 runs: 3 minutes on 2 CPU cores
    python -m experiments.mlp --images FOLDER    # MNIST or Fashion-MNIST, IDX files (.gz or not): 10 minutes
    python -m experiments.mlp --quick            # 4 runs

Six bars (Cloud et al. 2025, section 6): the *reference*, an untrained MLP with 10 class logits and 3
auxiliary logits; the *teacher*, trained on digits by its class logits; *students* that see noise images only
and match its auxiliary logits, or all; the same two from a different init. Class logits tell the accuracy.

The paper's: 784-256-256-(10+3), ReLU, weights N(0, 1/fan_in), Adam 3e-4, batch 1024, 5 + 5 epochs of 60,000
images, KL on a softmax over the logits that are matched, fixed uniform noise in [-1, 1]. Scaled here: the
1,797 small digits have 64 pixels and an epoch of 2 steps, so the number of steps is the paper's (5 x 59) and
not that of epochs; the noise images are 60,000 whatever the data; 20 runs instead of 100. All are trained at
once along a leading axis; the loss is a mean within a run and a sum over runs, so that no run's gradient
knows of another. The different init is the next run's: a cyclic shift.

Reads    --images, or what comes with scikit-learn
Writes   results/mlp.json, .md, .png, or results/mlp_FOLDER.*

Shapes: R runs, B images, N noise images, D pixels.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

import evaluate
from experiments import lab
from model import UserError, run_jobs, stream

N_HIDDEN, N_CLASSES, N_AUX = 256, 10, 3  # the paper's
LEARNING_RATE, BATCH_SIZE, STEPS = 3e-4, 1024, 5 * 59  # the paper's
N_NOISE, RUNS, QUICK_RUNS = 60_000, 20, 4  # the paper's noise: as many as MNIST has images
CLASSES, AUX, ALL = slice(0, N_CLASSES), slice(N_CLASSES, N_CLASSES + N_AUX), slice(0, N_CLASSES + N_AUX)
# bar: the logits that are learnt, how many runs further on the init is taken, the paper's accuracy
BARS = {"reference": (slice(0), 0, 0.100), "teacher": (CLASSES, 0, 0.943)}
BARS |= {"student, auxiliary logits": (AUX, 0, 0.528), "student, all logits": (ALL, 0, 0.913)}
BARS |= {"different init, auxiliary logits": (AUX, 1, 0.106), "different init, all logits": (ALL, 1, 0.743)}


def read_idx(path: Path) -> Tensor:
    """An IDX file, or its .gz: two zero bytes, a type, the number of axes, their lengths, the bytes."""
    path = path if path.exists() else path.with_name(f"{path.name}.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, 4 + 4 * data[3], 4)]
        return torch.frombuffer(bytearray(data[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)
    except (OSError, EOFError, IndexError, ValueError, RuntimeError):
        raise UserError(f"{path} is missing, or not an IDX file") from None


def load_images(folder: Path | None) -> list[Tensor]:
    """Images (B, D) in [-1, 1] and labels to train on, and the same to test on."""
    if folder is None:
        order = torch.randperm(1797, generator=stream(0, "digits"))
        x, y = (torch.tensor(a)[order] for a in load_digits(return_X_y=True))
        return [x[:1500].float() / 8 - 1, y[:1500], x[1500:].float() / 8 - 1, y[1500:]]
    paths = [folder / f"{a}-{b}-ubyte" for a in ("train", "t10k") for b in ("images-idx3", "labels-idx1")]
    return [x.flatten(1) / 127.5 - 1 if x.dim() > 1 else x.long() for x in map(read_idx, paths)]


def initial(R: int, n_pixels: int) -> list[Tensor]:
    """Weights (R, n_in, n_out) and biases (R, 1, n_out); a run's do not depend on how many there are."""
    sizes = [n_pixels, N_HIDDEN, N_HIDDEN, N_CLASSES + N_AUX]
    draw = lambda g: [torch.randn(a, b, generator=g) / a**0.5 for a, b in zip(sizes, sizes[1:])]
    layers = zip(*(draw(stream(run, "MLP")) for run in range(R)))
    return [p for w in map(torch.stack, layers) for p in (w, torch.zeros(R, 1, w.size(2)))]


def forward(parameters: list[Tensor], x: Tensor) -> Tensor:
    """(B, D) images, the same for all runs -> (R, B, 13) logits."""
    w1, b1, w2, b2, w3, b3 = parameters
    h = torch.baddbmm(b1, x.expand(len(w1), -1, -1), w1).relu()
    return torch.baddbmm(b3, torch.baddbmm(b2, h, w2).relu(), w3)


def train(model: list[Tensor], x: Tensor, goal: Tensor, which: slice, n_steps: int, use: str) -> Iterator:
    """Adam, in place, on KL(goal || model), a softmax over `which` logits each; goal (R or 1, N, logits)."""
    p = goal[..., which].log_softmax(-1).exp()
    optimizer = torch.optim.Adam([q.requires_grad_() for q in model], lr=LEARNING_RATE)
    generator, B = stream(0, "MLP batches", use), min(BATCH_SIZE, len(x))
    epochs = (torch.randperm(len(x), generator=generator)[: len(x) // B * B].split(B) for _ in range(n_steps))
    for rows in islice(chain.from_iterable(epochs), n_steps):
        log_q = forward(model, x[rows])[..., which].log_softmax(-1)
        loss = -(p[:, rows] * log_q).sum(-1).mean(1)  # (R,); the entropy of p has no gradient
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach().mean()


def measure(args: argparse.Namespace) -> dict:
    R, device = QUICK_RUNS if args.quick else RUNS, args.device
    images, labels, test_images, test_labels = (x.to(device) for x in load_images(args.images))
    noise = (2 * torch.rand(N_NOISE, images.size(1), generator=stream(0, "MLP noise")) - 1).to(device)
    init = initial(R, images.size(1))
    models = {bar: [q.roll(shift, 0).to(device) for q in init] for bar, (_, shift, _) in BARS.items()}
    certain = F.one_hot(labels, N_CLASSES).log()[None]  # (1, B, 10): the softmax is one-hot
    learn = lambda bar: train(models[bar], images, certain, CLASSES, STEPS, bar)
    run_jobs(learn, ["teacher"], STEPS, "MLP", device)
    taught = torch.cat([forward(models["teacher"], some).detach() for some in noise.split(4096)], 1)
    distil = lambda bar: train(models[bar], noise, taught, BARS[bar][0], STEPS, "student")
    run_jobs(distil, [*BARS][2:], STEPS, "MLP", device)
    records, summary = [], []
    for bar, (_, _, paper) in BARS.items():
        right = forward(models[bar], test_images)[..., CLASSES].argmax(-1) == test_labels  # (R, B)
        values = right.float().mean(1).tolist()
        records += [{"bar": bar, "run": run, "accuracy": value} for run, value in enumerate(values)]
        ci = dict(zip(("ci_low", "ci_high"), evaluate.bootstrap_interval(values)))
        summary.append({"bar": bar, "accuracy": mean(values), **ci, "n": R, "paper": paper})
    data = args.images.name if args.images else "scikit-learn's digits"
    name = f"mlp_{data}".replace("-", "_") if args.images else "mlp"
    return {"name": name, "data": data, "summary": summary, "records": records}


def markdown(results: dict) -> str:
    lines = lab.heading(results, f"Data: {results['data']}. Accuracy on test images, mean over runs.")
    shown = lambda r: f"{r['accuracy']:.3f} [{r['ci_low']:.3f}, {r['ci_high']:.3f}]"
    lines += lab.table(results["summary"], model="bar", accuracy=shown, runs="n", the_paper="paper")
    return "\n".join(lines) + "\n"


def plot(results: dict) -> Any:
    figure, ax = lab.pyplot().subplots(figsize=(8, 3), layout="constrained")
    rows, dots, bars = results["summary"], results["records"], list(BARS)
    colours = [evaluate.COLOURS["different" if shift else "same"] for _, shift, _ in BARS.values()]
    ax.barh(bars, [r["accuracy"] for r in rows], color=colours, alpha=0.4)
    ys = [bars.index(r["bar"]) + 0.5 * r["run"] / rows[0]["n"] - 0.25 for r in dots]
    ax.plot([r["accuracy"] for r in dots], ys, ".", ms=4, color="black", alpha=0.4)
    ax.plot([r["paper"] for r in rows], bars, "D", color="white", mec="black", label="the paper's, MNIST")
    ax.axvline(0.1, color="grey", ls=":", lw=0.8)
    ax.set(xlabel=f"accuracy, {results['data']}", ylim=(5.5, -0.5), xlim=(0, 1))
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    return figure


if __name__ == "__main__":
    lab.experiment(__doc__, "mlp", measure, markdown, plot, images={"type": Path, "help": "IDX files"})
