"""What was tried for speed: each idea beside its alternative, kept or dropped.

    python -m experiments.tried             # about 2 minutes on 2 CPU cores
    python -m experiments.tried --quick     # fewer repeats

Timed as in bench.py, in turn and on one thread unless a row says otherwise; ratios above 1 say that ours is faster.

Reads    nothing
Writes   results/tried.json, results/tried.md  (with --quick: runs/tried.json, runs/tried.md)

Shapes: B sequences, T tokens, N numbers in a sequence, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench import (
    CONFIG,
    hugging_face,
    machine,
    on_all_cores,
    paired,
    pretraining_step,
    sample_hugging_face,
    seconds,
    side_by_side,
    student_setting,
    student_step,
)
from experiments.lab import quick_parser
from model import GPT, NUMBERS, NumberData, write_json


def full_student_step(model: GPT, batch: NumberData) -> Callable:
    """A student step that makes the last block's states at every position and then picks the numbers'."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        h = model.hidden(batch.idx)
        h = h.gather(1, batch.positions.unsqueeze(-1).expand(-1, -1, h.size(-1)))
        log_q = model.logits(h, NUMBERS).log_softmax(-1)
        F.nll_loss(log_q.flatten(0, 1), batch.targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def written_out_student_step(model: GPT, teacher: GPT | None, batch: NumberData, chunk: int = 128) -> Callable:
    """A student step with the head's gradient written out in chunks, softmax - target, as pretraining's is."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    n, targets = batch.targets.numel(), batch.targets.reshape(-1, 1)
    if teacher is not None:
        states, teacher_head = (
            teacher.hidden(batch.idx, positions=batch.positions).detach().flatten(0, 1),
            teacher.head.weight[NUMBERS],
        )

    @torch.no_grad()
    def head(h: Tensor) -> Tensor:
        weight, grad_h = model.head.weight[NUMBERS], torch.empty_like(h)
        grad = torch.zeros_like(model.head.weight)
        for i in range(0, n, chunk):
            q = (h[i : i + chunk] @ weight.T).softmax(-1)
            if teacher is None:
                some = targets[i : i + chunk]
                q.scatter_(1, some, q.gather(1, some) - 1)
            else:
                q -= (states[i : i + chunk] @ teacher_head.T).softmax(-1)
            torch.mm(q, weight, out=grad_h[i : i + chunk])
            grad[NUMBERS].addmm_(q.T, h[i : i + chunk])
        model.head.weight.grad = grad.div_(n)
        return grad_h.div_(n)

    def step() -> None:
        h = model.hidden(batch.idx, positions=batch.positions).flatten(0, 1)
        h.backward(head(h))
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling_products(B: int, n_prompt: int, n_new: int) -> Callable:
    """The matrix products of sampling n_new tokens after n_prompt, and nothing else: no sampler can take less."""
    C, V = CONFIG.n_embd, CONFIG.vocab_size
    block = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)]
    # the prompt: of the last block only keys and values everywhere
    shapes = [(B * n_prompt, a, b) for a, b in block * (CONFIG.n_layer - 1) + [(C, 2 * C)]]
    shapes += [(B, a, b) for a, b in (block * CONFIG.n_layer + [(C, V)])] * n_new
    operands = {shape: (torch.randn(shape[0], shape[1]), torch.randn(shape[1], shape[2])) for shape in shapes}

    def products() -> None:
        for shape in shapes:
            torch.mm(*operands[shape])

    return products


def tried(n: int) -> list[dict]:
    """What was tried for speed, as what is used against the alternative: above 1, what is used is faster.

    `expected` is a guess or a first trial's figure, written down before this timing; `kept`: the idea is in the code.
    """
    rows = torch.randint(CONFIG.vocab_size, (64, 65))
    few = max(2, n // 3)

    def fresh() -> GPT:
        return GPT(CONFIG).initialise(0)

    used = pretraining_step(fresh(), rows)
    x = torch.randn(64 * 64, 4 * CONFIG.n_embd, requires_grad=True)
    two = [pretraining_step(fresh(), rows) for _ in range(2)]
    student, teacher, batch = student_setting(64)
    model, hf = fresh(), hugging_face().eval()
    p, u = torch.rand(500, CONFIG.vocab_size).softmax(-1), torch.rand(500, 1)
    q, k, v = torch.randn(500, 4, 1, 16), torch.randn(500, 4, 30, 16), torch.randn(500, 4, 30, 16)

    def gelu(approximate: str) -> Callable:
        return lambda: F.gelu(x, approximate=approximate).sum().backward()

    def body(hidden: Callable) -> Callable:
        return lambda: hidden(rows[:, :-1]).float().square().sum().backward()

    def bf16() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            body(model.hidden)()

    def by_hand() -> Tensor:
        return (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v

    def inverse_cdf() -> Tensor:
        cdf = p.cumsum(-1)
        return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)

    whole_head = pretraining_step(fresh(), rows, chunk=10**9)
    plain_adamw = pretraining_step(fresh(), rows, fused=False)
    records = [
        paired("head in chunks of 128 / whole", used, whole_head, n, kept=True, expected="1.3"),
        paired("exact GELU / tanh GELU, forward and backward", gelu("none"), gelu("tanh"), n, kept=True, expected="2"),
        paired("fused AdamW / plain AdamW, whole step", used, plain_adamw, n, kept=True, expected="1.03"),
        paired(
            "last block only where a number is due / everywhere, student step",
            student_step(student, None, batch),
            full_student_step(fresh(), batch),
            n,
            kept=True,
            expected="1.25",
        ),
        *(
            paired(
                f"student step on {target} as it is / with the head's gradient written out",
                student_step(fresh(), given, some),
                written_out_student_step(fresh(), given, some),
                n,
                kept=False,
                expected="0.9",
                why="a few per cent for a tenth more lines and a second way to the same loss",
            )
            for target, given, some in (("tokens", None, batch), ("logits", teacher, batch[:32]))
        ),
        paired(
            "inverse CDF / torch.multinomial, 500 draws",
            inverse_cdf,
            lambda: torch.multinomial(p, 1),
            n,
            kept=True,
            expected="10",
        ),
        paired(
            "two jobs side by side / one after the other on all cores",
            side_by_side(two, 4),
            on_all_cores(used, 8),
            few,
            kept=True,
            expected="1.5",
        ),
        paired(
            "one token's attention by PyTorch / written out",
            lambda: F.scaled_dot_product_attention(q, k, v),
            by_hand,
            n,
            kept=False,
            expected="0.5",
            why="too small a part of sampling to show in the whole",
        ),
        paired(
            "matrix products of sampling alone / all of Hugging Face's sampling, 500 x 20 tokens",
            sampling_products(500, 20, 20),
            lambda: sample_hugging_face(hf, torch.zeros(500, 20, dtype=torch.long), 20),
            few,
            kept=False,
            expected="10",
            why="a limit, no idea: what is left for attention, softmax, GELU and the draw if ours is to be 8 times faster",
        ),
        paired("body in float32 / under bfloat16 autocast", body(model.hidden), bf16, few, kept=False, expected="1"),
    ]
    compiled = body(torch.compile(model.hidden))
    compile_s = seconds(compiled)
    name = "body eager / under torch.compile"
    records.append(
        paired(
            name,
            body(model.hidden),
            compiled,
            few,
            kept=False,
            expected="0.8",
            why=f"compiling takes {compile_s:.0f} s a process",
        )
    )
    return records


def markdown(results: dict) -> str:
    config = results["config"]
    lines = [
        f"Measured on {config['machine']}, torch {config['torch']}, commit {config['commit']}; `python -m experiments.tried`."
    ]
    lines += [
        "",
        "| ours / the alternative | expected | the alternative takes, times [min, max] | |",
        "|---|---:|---|---|",
    ]
    for r in results["records"]:
        verdict = "used" if r["kept"] else "not used"
        if "why" in r:
            verdict += f": {r['why']}"
        lines.append(f"| {r['name']} | {r['expected']} | {r['ratio']:.2f} [{r['min']:.2f}, {r['max']:.2f}] | {verdict} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    args = quick_parser(__doc__, "fewer repeats").parse_args(argv)
    torch.set_num_threads(1)
    results = {"config": machine(), "records": tried(5 if args.quick else 21)}
    folder = Path("runs" if args.quick else "results")
    write_json(folder / "tried.json", results)
    (folder / "tried.md").write_text(markdown(results))
    print(f"wrote: {folder}/tried.json, {folder}/tried.md")


if __name__ == "__main__":
    main()
