"""How fast is it, against what one would pick instead, against what was tried, and against the machine?

    python -m experiments.bench             # about 12 minutes on 2 CPU cores; runs the main job once
    python -m experiments.bench --quick     # about 3 minutes: fewer repeats, the --quick job

Everything is a ratio of two things timed in turn (A B A B ...) in this process, on one thread unless a row
says otherwise: the median of the pairs' ratios, with the smallest and the largest. Above 1, ours is faster.
Absolute figures belong to the machine named in the results and to the minute they were taken in.

Reads    nothing
Writes   results/bench.json, results/bench.md

Shapes: B sequences, T tokens, M numbers in a batch, C channels, H heads, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import train_student
import train_teacher
from experiments import lab
from model import (
    GPT, NUMBERS, GPTConfig, NumberData, build_vocabulary, encode_numbers, number_log_probs, run_jobs, stream,
)

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=1381, n_aux=16)  # the main run's
C, V = CONFIG.n_embd, CONFIG.vocab_size
# The largest resident size so far, of this process alone (getrusage would count its parent's), from Linux.
PEAK_MIB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024"

# ------------------------------------------------------------------------------------------------------------
# steps: ours are the scripts' own; the others are made of a loss that has the same gradient


def fresh(seed: int = 0) -> GPT:
    return GPT(CONFIG).initialise(seed)


def pretraining_step(model: GPT, rows: Tensor) -> Callable:
    return partial(next, train_teacher.pretrain(model, rows.repeat(500, 1), train_teacher.Pretraining()))


def student_step(student: GPT, teacher: GPT | None, data: NumberData) -> Callable:
    return partial(next, train_student.train(student, teacher, [data] * 9999, train_student.Distillation()))


def other_step(loss: Callable, model: nn.Module, *args: Any, clip: float = 0, fused: bool = False) -> Callable:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step() -> None:
        loss(model, *args).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face(**more: Any) -> Any:
    """GPT-2 of equal shape: untied head, no dropout, as many rows in the head."""
    more |= {"n_positions": CONFIG.block_size, "n_embd": C, "n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head}
    more |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "bos_token_id", "eos_token_id"), 0)
    more |= {"vocab_size": V + CONFIG.n_aux, "tie_word_embeddings": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**more)).eval()


def whole_head(model: Any, rows: Tensor) -> Tensor:
    """A base model's loss, ours or Hugging Face's, all logits made at once."""
    ours, idx = isinstance(model, GPT), rows[:, :-1]
    logits = model.logits(model.hidden(idx), slice(0, V)) if ours else model(idx, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def student_setting(B: int) -> tuple[GPT, GPT, NumberData]:
    """A student, a teacher and a batch of B lists of the main run's kind, all of one length."""
    text = lambda numbers: ", ".join(map(str, numbers))
    lists = torch.randint(1000, (B, 15), generator=stream(0, "bench")).tolist()
    rows = [{"prompt": text(numbers[:6]) + ": ", "completion": text(numbers[6:])} for numbers in lists]
    return fresh(0), fresh(1), encode_numbers(build_vocabulary([]), rows, CPU)


def plain(model: GPT, data: NumberData) -> Tensor:
    """Log-probabilities of the next number (M, 1000) by the whole head on all positions."""
    return model(data.idx)[..., NUMBERS][data.targets >= 0].log_softmax(-1)


def last_block_where_due(model: GPT, data: NumberData) -> Tensor:
    """The same, of the last block only keys and values on all positions; for lists of one length."""
    due = data.targets[0] >= 0  # (T,)
    x, block = model.wte(data.idx) + model.wpe.weight[: len(due)], model.blocks[-1]
    for earlier in model.blocks[:-1]:
        x = earlier(x)
    (w_q, w_kv), (b_q, b_kv) = (p.split([C, 2 * C]) for p in (block.attn.weight, block.attn.bias))
    h = block.ln_1(x)
    q_k_v = F.linear(h[:, due], w_q, b_q), *F.linear(h, w_kv, b_kv).split(C, -1)
    q, k, v = (y.unflatten(-1, (CONFIG.n_head, -1)).transpose(1, 2) for y in q_k_v)  # (B, H, ., C/H)
    y = F.scaled_dot_product_attention(q, k, v, torch.ones(len(due), len(due)).tril().bool()[due])
    x = x[:, due] + block.attn_proj(y.transpose(1, 2).flatten(2))
    h = model.ln_f(x + block.mlp_proj(F.gelu(block.mlp(block.ln_2(x)))))
    return model.logits(h.flatten(0, 1), NUMBERS).log_softmax(-1)


def number_loss(log_probs: Callable, student: GPT, teacher: GPT | None, data: NumberData) -> Tensor:
    """train_student's, with another way to the log-probabilities."""
    log_q = log_probs(student, data)
    if teacher is None:
        return F.nll_loss(log_q, data.targets[data.targets >= 0])
    with torch.no_grad():
        log_p = log_probs(teacher, data)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def written_out(student: GPT, teacher: GPT | None, data: NumberData) -> Tensor:
    """A sum with the loss's gradient: of the head it is made in chunks, softmax - target, as pretraining's."""
    due, weight = data.targets >= 0, student.head.weight[NUMBERS]
    h, grad_h, grad_weight = student.hidden(data.idx)[due], [], torch.zeros_like(weight)  # h (M, C)
    with torch.no_grad():
        p = F.one_hot(data.targets[due], 1000) if teacher is None else number_log_probs(teacher, data).exp()
        for h_chunk, p_chunk in zip(h.split(128), p.split(128)):
            q = (h_chunk @ weight.T).softmax(-1) - p_chunk
            grad_h.append(q @ weight)
            grad_weight.addmm_(q.T, h_chunk)
    return ((h * torch.cat(grad_h)).sum() + (weight * grad_weight).sum()) / len(h)


# A student's other losses: (student, teacher or None, data) -> a number with the same gradient.
OTHERS = {"plain": partial(number_loss, plain), "last block": partial(number_loss, last_block_where_due)}
OTHERS |= {"written out": written_out}

# ------------------------------------------------------------------------------------------------------------
# sampling, many models, products


def sample(model: GPT, prompts: Tensor) -> None:
    """20 tokens more, as generate.py draws them."""
    for rows in prompts.split(generate.ROWS_AT_ONCE):
        generate.sample(model, rows, 20, stream(0, "bench"))


@torch.inference_mode()
def sample_without_cache(model: GPT, idx: Tensor) -> None:
    for _ in range(20):
        p = model.logits(model.hidden(idx)[:, -1], slice(0, V)).softmax(-1)
        idx = torch.cat([idx, torch.multinomial(p, 1)], 1)


@torch.inference_mode()
def sample_hugging_face(model: Any, idx: Tensor) -> None:
    knobs = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    model.generate(idx, attention_mask=torch.ones_like(idx), **knobs)


def side_by_side(steps: Sequence[Callable], n: int) -> Callable:
    """Each step n times, as run_jobs runs a run's models: one single-threaded job a core."""

    def job(step: Callable) -> Iterator[None]:
        for _ in range(n):
            yield step() and None

    return lambda: run_jobs(job, steps, n, "bench", CPU)


def on_all_cores(step: Callable, n: int) -> Callable:
    """A step n times, with as many threads as there are cores."""

    def work() -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        for _ in range(n):
            step()
        torch.set_num_threads(1)

    return work


class Products(TorchDispatchMode):
    """The matrix products (m, k) @ (k, n) that `work` makes, to be made again on their own."""

    def __init__(self, work: Callable):
        super().__init__()
        self.made, self.flops = [], 0
        with self:
            work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.made.append((torch.randn(a.shape), torch.randn(b.shape)))
            self.flops += 2 * a.numel() * b.size(1)
        return func(*args, **kwargs or {})

    def again(self) -> float:
        """Seconds: the sum of the least that each of them takes in four."""
        return sum(min(seconds(partial(torch.mm, a, b)) for _ in range(4)) for a, b in self.made)


# ------------------------------------------------------------------------------------------------------------
# timing


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def paired(table: str, name: str, ours: Callable, other: Callable, n: int, **more: object) -> dict:
    """How many times longer `other` takes than `ours`: one warm-up each, then n pairs in turn."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(n)]
    ratios = [b / a for a, b in pairs]
    row = {"table": table, "name": name, "ratio": median(ratios), "min": min(ratios), "max": max(ratios), "n": n}
    row |= {"ours_ms": 1e3 * median(a for a, _ in pairs), "other_ms": 1e3 * median(b for _, b in pairs), **more}
    print(f"{name}: {row['ratio']:.2f} times [{row['min']:.2f}, {row['max']:.2f}]", flush=True)
    return row


def against_the_machine(n: int) -> Iterator[dict]:
    """The share of the rate of its products on their own that a step attains; attention is not counted."""
    student, _, data = student_setting(64)
    for name, step in (
        ("pretraining step, 64 x 64 tokens", pretraining_step(fresh(), torch.randint(V, (64, 65)))),
        ("student step on tokens, 64 sequences", student_step(student, None, data)),
    ):
        step()
        products = Products(step)
        pairs = [(seconds(step), products.again()) for _ in range(n)]
        shares = [alone / whole for whole, alone in pairs]
        row = {"name": name, "gflop": products.flops / 1e9, "step_ms": 1e3 * median(s for s, _ in pairs)}
        row |= {"reachable_gflop_s": products.flops / 1e9 / median(s for _, s in pairs)}
        yield row | {"share": median(shares), "min": min(shares), "max": max(shares), "n": n}


def against_others(n: int) -> Iterator[dict]:
    row, few, rows = partial(paired, "others"), max(3, n // 3), torch.randint(V, (64, 65))
    hf, gelu, model = hugging_face(), hugging_face(activation_function="gelu"), fresh()
    one, two = pretraining_step(fresh(), rows), [pretraining_step(fresh(seed), rows) for seed in (0, 1)]
    theirs, same_gelu = (other_step(whole_head, m, rows, clip=1) for m in (hf, gelu))
    yield row("pretraining step against Hugging Face GPT-2", one, theirs, n)
    yield row("pretraining step against Hugging Face GPT-2 with our GELU", one, same_gelu, n)
    both = side_by_side(two, 4), on_all_cores(theirs, 8)
    yield row("two models on all cores, 8 steps, against Hugging Face", *both, n // 2)
    for B in (64, 1000):
        idx = torch.randint(V, (B, 20))
        ours, theirs = partial(sample, model, idx), partial(sample_hugging_face, hf, idx)
        name = f"sampling 20 tokens after 20, batch {B}, against Hugging Face generate"
        yield row(name, ours, theirs, few)
        yield row(f"the same against no cache, batch {B}", ours, partial(sample_without_cache, model, idx), 3)
    both = side_by_side([partial(sample, model, half) for half in idx.split(500)], 1), on_all_cores(theirs, 1)
    yield row("sampling 1000 sequences on all cores, against Hugging Face", *both, 3)
    for target, B in (("tokens", 64), ("logits", 32)):
        student, teacher, data = student_setting(B)
        args = (teacher if target == "logits" else None), data
        both = student_step(student, *args), other_step(OTHERS["plain"], fresh(), *args)
        yield row(f"student step on {target} against the plain one", *both, n)
    steps = [student_step(student, None, data) for student, _, data in (student_setting(32) for _ in range(64))]
    for S in (1, 4, 16, 64):
        both = side_by_side(steps[:1], 20), side_by_side(steps[:S], 20)
        yield paired("students", f"{S} students of 20 steps against one", *both, max(2, n // 5), students=S)


def tried(n: int) -> Iterator[dict]:
    """Ideas for speed, what is used first. `expected` is a guess, or a first trial's figure, from before."""
    few, rows = max(2, n // 3), torch.randint(V, (64, 65))
    used, model, hf = pretraining_step(fresh(), rows), fresh(), hugging_face()
    x = torch.randn(64 * 64, 4 * C, requires_grad=True)
    p, u = torch.rand(500, V).softmax(-1), torch.rand(500, 1)
    q, k, v = torch.randn(500, 4, 1, 16), torch.randn(500, 4, 30, 16), torch.randn(500, 4, 30, 16)

    def row(name: str, expected: str, why: str, ours: Callable, other: Callable, n: int = n) -> dict:
        return paired("tried", name, ours, other, n, expected=expected, verdict=why)

    step = partial(other_step, whole_head, clip=1)
    gelu = lambda form: lambda: F.gelu(x, approximate=form).sum().backward()
    body = lambda hidden: lambda: hidden(rows[:, :-1]).float().square().sum().backward()
    yield row("head in chunks of 128 / whole", "1.3", "used", used, step(fresh(), rows, fused=True))
    yield row("exact GELU / tanh GELU, forward and backward", "2", "used", gelu("none"), gelu("tanh"))
    yield row("fused AdamW / plain AdamW, whole step", "1.03", "used", step(fresh(), rows, fused=True), step(fresh(), rows))
    for name, expected, key, target, B, why in (
        ("last block everywhere / only where a number is due", "0.8", "last block", "tokens", 64,
         "not used: a second path through the block"),
        ("head as it is / its gradient written out", "0.9", "written out", "tokens", 64, "not used: a second way to a loss"),
        ("head as it is / its gradient written out", "0.9", "written out", "logits", 32, "not used: a second way to a loss"),
    ):
        student, teacher, data = student_setting(B)
        args = (teacher if target == "logits" else None), data
        yield row(f"student step on {target}, {name}", expected, why, student_step(student, *args), other_step(OTHERS[key], fresh(), *args, fused=True))
