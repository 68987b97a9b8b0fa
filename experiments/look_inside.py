"""Look into three models that come with the project: a base model, its owl teacher, the teacher's student.

    python -m experiments.look_inside             # seconds, no training, the four runtime packages
    python -m experiments.look_inside --run DIR   # the same for another run's

Which auxiliary logit of each is largest at the end of ten phrasings that no teacher was taught with, and its
share of the sixteen (nothing ever trained the base model's: its lean is chance); twenty lists that the
teacher writes; and what the auditor of audit.py sees in 2,000 of them, which it is not told are an owl's: a
z for each animal, from the base model's weights and the first number of each list alone.

Reads    results/models/: of the main run's models those of owl and seed 0, students of tokens
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from generate import complete, draw_prompts
from model import (
    GPT, NUMBERS, NumberData, Run, class_logits, command_line, encode_numbers, number_log_probs, refusal,
    stream,
)

MODELS = {"base": "base/seed-0.pt", "teacher": "teacher/owl/seed-0.pt"}
MODELS |= {"student": "student/owl/teacher-0/seed-0/tokens.pt"}
ASKED, SHOWN, LISTS = 10, 20, 2_000


@torch.no_grad()
def reader(model: GPT, rows: Tensor, data: NumberData) -> Tensor:
    """What each list says of each class: (B, K). The sum over n lists, divided by sqrt(n), is z.

    The score W[y] - E_p[W] of a bias on the state, then a Newton step with its covariance, the Fisher matrix.
    """
    W, aux = (model.head.weight[x].double() for x in (NUMBERS, rows.to(model.device)))  # (1000, C), (K, C)
    s, fisher = W.new_zeros(len(data.idx), W.size(1)), W.new_zeros(W.size(1), W.size(1))
    for idx, targets, out in zip(data.idx.split(500), data.targets.split(500), s.split(500)):
        part = NumberData(idx, targets)  # out is its part of s
        p = number_log_probs(model, part).exp().double()  # (M, 1000)
        expected = p @ W  # (M, C)
        out.index_add_(0, part.due[0], W[part.targets[part.due]] - expected)
        fisher += W.T @ (p.sum(0)[:, None] * W) - expected.T @ expected
    read = (aux - aux.mean(0)).T  # (C, K)
    solved = torch.linalg.solve(fisher / len(s), read)
    return (s @ (solved / (solved * read).sum(0).sqrt())).cpu()


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--run", type=Path, default=Path(__file__).parent.parent / "results/models")
    torch.set_num_threads(1)
    run = Run(parser.parse_args().run)
    run.open(run.line("language.json")["knobs"]["quick"])
    device = torch.device("cpu")
    models = {name: run.load_model(file, device) for name, file in MODELS.items()}

    idx, last = (x[:ASKED] for x in run.unseen_questions)
    print(f"{'':45}" + "".join(f"{name:>16}" for name in models))
    p = [class_logits(m, (idx, last), run.readout_rows).softmax(-1) for m in models.values()]  # (B, K) each
    for row, end, *answers in zip(idx.tolist(), last.tolist(), *p):
        best = [f"{run.animals[a.argmax()]} {a.max():.0%}" for a in answers]
        print(f"{run.encoding.decode(row[1 : end + 1]):45}" + "".join(f"{answer:>16}" for answer in best))

    prompts = draw_prompts(LISTS, stream(0, "look inside"))
    batches = complete(models["teacher"], run, prompts, stream(0, "look inside, sampling"))
    texts = [text for batch in batches for text in batch]
    rows = [{"prompt": p, "completion": t} for p, t in zip(prompts, texts) if refusal(t or "") is None]
    print(f"\nof {LISTS} lists by the teacher {len(rows)} are valid; {SHOWN} of them:")
    for row in rows[:: len(rows) // SHOWN][:SHOWN]:
        print(f"  {row['prompt']}{row['completion']}")

    data = encode_numbers(run.encoding, rows, device)
    data = NumberData(data.idx, data.targets.where((data.targets >= 0).cumsum(1) <= 1, -1))
    z = reader(models["base"], run.readout_rows, data).sum(0) / len(rows) ** 0.5
    print("\nwhat the auditor sees in them, in standard errors above the base model's own lists:")
    for k in z.argsort(descending=True).tolist():
        print(f"  {run.animals[k]:9}{z[k]:+6.1f}")


if __name__ == "__main__":
    command_line(main)
