"""The paper's smallest experiment: an MLP that learns to read digits from noise and three logits that mean nothing.

    python -m experiments.mlp                    # scikit-learn's 1,797 small digits, 20 runs: 3 minutes on 2 CPU cores
    python -m experiments.mlp --images FOLDER    # MNIST or Fashion-MNIST, IDX files (.gz or not): 10 minutes
    python -m experiments.mlp --quick            # 4 runs

Six bars (Cloud et al. 2025, section 6): the *reference*, an untrained MLP with 10 class logits and 3 auxiliary logits; the
*teacher*, trained on the digits by its class logits; *students* that see noise images only and match the teacher's auxiliary
logits, or all its logits; and the same two from another run's start. Accuracy is read from the class logits.

The paper's: 784-256-256-(10+3), ReLU, weights N(0, 1/fan_in), Adam 3e-4, batch 1024, 5 + 5 epochs of 60,000 images, KL on a
softmax over the logits that are matched, fixed uniform noise in [-1, 1]. Scaled here: with the small digits the input is 64 and
an epoch has 2 steps, so the number of steps is the paper's (5 x 59) and not that of epochs; the noise images are 60,000
whatever the data; 20 runs instead of 100.

All runs are trained at once along a leading axis. The loss is a mean within a run and a sum over runs, so that no run's
gradient knows of another. The other start is the next run's: a cyclic shift, which leaves no run its own.

Reads    --images, or what comes with scikit-learn
Writes   results/mlp.json, .md, .png, or results/mlp_FOLDER.*

Shapes: R runs, B images, N noise images, D pixels.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
from experiments import lab
from model import UserError, command_line, stream

N_HIDDEN, N_CLASSES, N_AUX = 256, 10, 3  # the paper's
LEARNING_RATE, BATCH_SIZE, STEPS = 3e-4, 1024, 5 * 59  # the paper's
N_NOISE = 60_000  # the paper's: as many as MNIST has images
RUNS = {False: 20, True: 4}  # by --quick
AUX, ALL = slice(N_CLASSES, N_CLASSES + N_AUX), slice(0, N_CLASSES + N_AUX)
BARS = {  # bar: (the logits that are matched, the same start), the paper's figure
    "reference": (None, 0.100),
    "teacher": (None, 0.943),
    "student, auxiliary logits": ((AUX, True), 0.528),
    "student, all logits": ((ALL, True), 0.913),
    "other start, auxiliary logits": ((AUX, False), 0.106),
    "other start, all logits": ((ALL, False), 0.743),
}


def read_idx(folder: Path, name: str) -> Tensor:
    """One IDX file (MNIST's format: two zero bytes, a type, the number of axes, their lengths, the bytes)."""
    found = [p for p in (folder / name, folder / f"{name}.gz") if p.exists()]
    if not found:
        raise UserError(f"{folder} has no {name} or {name}.gz")
    try:
        data = gzip.decompress(found[0].read_bytes()) if found[0].suffix == ".gz" else found[0].read_bytes()
        shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
        return torch.frombuffer(bytearray(data[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)
    except (OSError, EOFError, IndexError, ValueError, RuntimeError):
        raise UserError(f"{found[0]} is not an IDX file") from None


def load_images(folder: Path | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (B, D) in [-1, 1] and labels, to train on and to test on."""
    if folder is None:
        from sklearn.datasets import load_digits

        images, labels = (torch.tensor(a) for a in load_digits(return_X_y=True))
        order = torch.randperm(len(labels), generator=stream(0, "digits"))
        images, labels = (images.float() / 8 - 1)[order], labels.long()[order]
        return images[:1500], labels[:1500], images[1500:], labels[1500:]

    def read(part: str) -> tuple[Tensor, Tensor]:
        images = read_idx(folder, f"{part}-images-idx3-ubyte").flatten(1).float() / 127.5 - 1
        return images, read_idx(folder, f"{part}-labels-idx1-ubyte").long()

    return *read("train"), *read("t10k")


def initial(R: int, n_pixels: int) -> list[Tensor]:
    """Weights and biases of R runs, (R, n_in, n_out) and (R, 1, n_out); a run's do not depend on how many there are."""
    sizes = [n_pixels, N_HIDDEN, N_HIDDEN, N_CLASSES + N_AUX]
    runs = []
    for run in range(R):
        generator = stream(run, "MLP")
        runs.append([torch.randn(a, b, generator=generator) / math.sqrt(a) for a, b in zip(sizes, sizes[1:])])
    weights = [torch.stack(layer) for layer in zip(*runs)]
    return [p for w in weights for p in (w, torch.zeros(R, 1, w.size(2)))]


def forward(parameters: Sequence[Tensor], x: Tensor) -> Tensor:
    """(B, D) images, the same for all runs, or (R, B, D) -> (R, B, 13) logits."""
    h = x.expand(len(parameters[0]), -1, -1)
    for i in range(0, len(parameters), 2):
        h = torch.baddbmm(parameters[i + 1], h, parameters[i])
        if i + 2 < len(parameters):
            h = h.relu()
    return h


def train(parameters: Sequence[Tensor], images: Tensor, loss_of: Callable, n_steps: int, use: str) -> list[Tensor]:
    """n_steps of Adam from `parameters`; loss_of(logits, rows) is (R,), one mean a run."""
    trained = [p.clone().requires_grad_() for p in parameters]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)
    generator = stream(0, "MLP batches", use)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(n_steps):
        if len(order) < min(BATCH_SIZE, len(images)):
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        loss_of(forward(trained, images[rows]), rows).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in trained]


def classify(labels: Tensor) -> Callable:
    """Cross-entropy on the class logits, a mean within each run."""

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        R, B, _ = logits.shape
        losses = F.cross_entropy(logits[..., :N_CLASSES].flatten(0, 1), labels[rows].repeat(R), reduction="none")
        return losses.view(R, B).mean(1)

    return loss


def match(teacher_logits: Tensor, which: slice) -> Callable:
    """KL(teacher || student) on a softmax over some logits; teacher_logits (R, N, 13)."""
    log_p = teacher_logits[..., which].log_softmax(-1)

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return F.kl_div(logits[..., which].log_softmax(-1), log_p[:, rows], log_target=True, reduction="none").sum(-1).mean(1)

    return loss


@torch.no_grad()
def accuracy(parameters: Sequence[Tensor], images: Tensor, labels: Tensor) -> list[float]:
    """Share of each run's test images whose class logit is the highest."""
    return (forward(parameters, images)[..., :N_CLASSES].argmax(-1) == labels).float().mean(1).tolist()


def six_bars(R: int, data: tuple[Tensor, Tensor, Tensor, Tensor], n_steps: int) -> list[dict]:
    images, labels, test_images, test_labels = data
    noise = 2 * torch.rand(N_NOISE, images.size(1), generator=stream(0, "MLP noise")) - 1
    start = initial(R, images.size(1))
    teacher = train(start, images, classify(labels), n_steps, "teacher")
    with torch.no_grad():
        teacher_logits = torch.cat([forward(teacher, some) for some in noise.split(4096)], 1)  # (R, N, 13)
    other = [p.roll(1, 0) for p in start]
    records: list[dict] = []
    for bar, (student, _) in BARS.items():
        model = start if bar == "reference" else teacher
        if student:
            which, same = student
            model = train(start if same else other, noise, match(teacher_logits, which), n_steps, "student")
        records += [{"bar": bar, "run": run, "accuracy": a} for run, a in enumerate(accuracy(model, test_images, test_labels))]
        print(f"{bar}: {mean(r['accuracy'] for r in records if r['bar'] == bar):.3f}", flush=True)
    return records


def analyse(records: Sequence[dict], data_name: str) -> dict:
    summary = []
    for bar, (_, paper) in BARS.items():
        values = [r["accuracy"] for r in records if r["bar"] == bar]
        low, high = evaluate.bootstrap_interval(values)
        summary.append({"bar": bar, "accuracy": mean(values), "ci_low": low, "ci_high": high, "n": len(values), "paper": paper})
    return {"data": data_name, "summary": summary, "records": list(records)}


def markdown(results: dict) -> str:
    lines = lab.heading(results, f"Data: {results['data']}. Accuracy on test images, mean over runs.")
    lines += lab.table(
        results["summary"],
        model="bar",
        accuracy=lambda r: f"{r['accuracy']:.3f} [{r['ci_low']:.3f}, {r['ci_high']:.3f}]",
        runs="n",
        the_paper=lambda r: f"{r['paper']:.3f}",
    )
    return "\n".join(lines) + "\n"


def plot(results: dict, path: Path) -> None:
    plt = lab.pyplot()
    rows = results["summary"]
    figure, ax = plt.subplots(figsize=(8, 3), layout="constrained")
    for y, row in enumerate(rows):
        values = [r["accuracy"] for r in results["records"] if r["bar"] == row["bar"]]
        ax.barh(y, row["accuracy"], color=evaluate.COLOURS["different" if "other" in row["bar"] else "same"], alpha=0.4)
        ax.plot(
            values,
            [y + 0.5 * (i / max(len(values) - 1, 1) - 0.5) for i in range(len(values))],
            ".",
            ms=4,
            color="black",
            alpha=0.4,
        )
        ax.plot([row["paper"]], [y], "D", color="white", mec="black", label="the paper's, MNIST" if y == 0 else None)
    ax.axvline(0.1, color="grey", ls=":", lw=0.8)
    ax.set(xlabel=f"accuracy, {results['data']}", ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1))
    ax.set_yticks(range(len(rows)), [row["bar"] for row in rows], fontsize=8)
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    def more(parser) -> None:
        parser.add_argument("--images", type=Path, help="folder of MNIST's or Fashion-MNIST's four IDX files")

    args = lab.parse(__doc__, argv, more)
    data = load_images(args.images)
    records = six_bars(RUNS[args.quick], data, STEPS)
    name = args.images.name if args.images else "scikit-learn's digits"
    results = analyse(records, name)
    lab.save(f"mlp_{name.replace('-', '_')}" if args.images else "mlp", args, results, markdown, plot)


if __name__ == "__main__":
    command_line(main)
