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
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from timeit import timeit
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import generate
import train_student
import train_teacher
from experiments import lab
from model import (
    GPT, NUMBERS, GPTConfig, NumberData, build_vocabulary, encode_numbers, number_log_probs, run_jobs, stream,
)

CONFIG = GPTConfig(vocab_size=1381, n_aux=16)  # the main run's
C, V, CPU = CONFIG.n_embd, CONFIG.vocab_size, torch.device("cpu")

# ------------------------------------------------------------------------------------------------------------
# what is timed: ours are the scripts' own steps; the others are made of a loss that has the same gradient

fresh = lambda seed=0: GPT(CONFIG).initialise(seed)
base_knobs = lambda rows: train_teacher.Pretraining(batch_size=len(rows))
base_step = lambda model, rows: partial(
    next, train_teacher.pretrain(model, rows.repeat(200, 1), base_knobs(rows)))
student_step = lambda student, teacher, data: partial(
    next, train_student.train(student, teacher, [data] * 9999, train_student.Distillation()))


def other_step(loss: Callable, model: Any, *args: Any, clip: float = 0, fused: bool = False) -> Callable:
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
    more |= {"n_positions": CONFIG.block_size, "n_embd": C}
    more |= {"n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head}
    more |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "bos_token_id", "eos_token_id"), 0)
    more |= {"vocab_size": V + CONFIG.n_aux, "tie_word_embeddings": False}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**more)).eval()


def whole_head(model: Any, rows: Tensor) -> Tensor:
    """A base model's loss, ours or Hugging Face's, all logits made at once."""
    ours, idx = isinstance(model, GPT), rows[:, :-1]
    logits = model.logits(model.hidden(idx), slice(0, V)) if ours else model(idx, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def students() -> list[tuple[str, GPT | None, NumberData]]:
    """Target, teacher or None, and a batch of lists of the main run's kind, all of one length."""
    text = lambda numbers: ", ".join(map(str, numbers))
    lists = torch.randint(1000, (64, 15), generator=stream(0, "bench")).tolist()
    rows = [{"prompt": text(numbers[:6]) + ": ", "completion": text(numbers[6:])} for numbers in lists]
    data = encode_numbers(build_vocabulary([]), rows, CPU)
    return [("tokens", None, data), ("logits", fresh(1), data.take(slice(32)))]


def last_block_where_due(model: Any, data: NumberData) -> Tensor:
    """Log-probabilities (M, 1000), of the last block only keys and values on all positions."""
    due, block = data.targets[0] >= 0, model.blocks[-1]  # due (T,): of lists of one length
    x = model.wte(data.idx) + model.wpe.weight[: len(due)]
    for earlier in model.blocks[:-1]:
        x = earlier(x)
    h, w, b = block.ln_1(x), block.attn.weight, block.attn.bias
    parts = F.linear(h[:, due], w[:C], b[:C]), *F.linear(h, w[C:], b[C:]).split(C, -1)
    q, k, v = (part.unflatten(-1, (CONFIG.n_head, -1)).transpose(1, 2) for part in parts)  # (B, H, ., C/H)
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
    """A sum with the loss's gradient; the head's is made in chunks, softmax - target, as pretraining's is."""
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
plain = lambda model, data: model(data.idx)[..., NUMBERS][data.targets >= 0].log_softmax(-1)  # the whole head
OTHERS: dict[str, Callable] = {"plain": partial(number_loss, plain), "written out": written_out}
OTHERS["last block"] = partial(number_loss, last_block_where_due)


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


class Products(TorchDispatchMode):
    """The matrix products (m, k) @ (k, n) that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self:  # inference mode tells of linear(), which is an addmm()
            if (result := func.decompose(*args, **kwargs or {})) is not NotImplemented:
                return result
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.made.append((torch.randn(args[-2].shape), torch.randn(args[-1].shape)))
        return func(*args, **kwargs or {})


def alone(work: Callable) -> tuple[Callable, float]:
    """The matrix products that `work` makes, to be made again on their own, and their operations."""
    with Products() as products:
        work()
    flops = sum(2 * a.numel() * b.size(1) for a, b in products.made)
    return lambda: [torch.mm(a, b) for a, b in products.made], flops


# ------------------------------------------------------------------------------------------------------------
# the rows


def side_by_side(steps: Sequence[Callable], n: int) -> Callable:
    """Each step n times, as run_jobs runs a run's models: one single-threaded job a core."""
    job = lambda step: (step() and None for _ in range(n))
    return lambda: run_jobs(job, steps, n, "bench", CPU)


def on_all_cores(step: Callable, n: int) -> Callable:
    """A step n times, with as many threads as there are cores."""

    def work() -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        for _ in range(n):
            step()
        torch.set_num_threads(1)

    return work


def paired(name: str, ours: Any, other: Any, n: int, expected: str = "", used: str = "") -> dict:
    """How many times longer `other` takes than `ours`: one warm-up each, then n pairs in turn."""
    ours(), other()
    pairs = [(timeit(ours, number=1), timeit(other, number=1)) for _ in range(n)]
    ratios = [b / a for a, b in pairs]
    row = {"name": name, "ratio": median(ratios), "min": min(ratios), "max": max(ratios), "n": n}
    row |= {"ours_ms": 1e3 * median(a for a, _ in pairs), "expected": expected, "used": used}
    print(f"{name}: {row['ratio']:.2f} times [{row['min']:.2f}, {row['max']:.2f}]", flush=True)
    return row


def against_others(n: int) -> Iterator[dict]:
    """What a user would pick instead."""
    rows, hf, gelu = torch.randint(V, (64, 65)), hugging_face(), hugging_face(activation_function="gelu")
    model, one, two = fresh(), base_step(fresh(), rows), [base_step(fresh(seed), rows) for seed in (0, 1)]
    theirs, same_gelu = (other_step(whole_head, m, rows, clip=1) for m in (hf, gelu))
    yield paired("pretraining step / Hugging Face GPT-2", one, theirs, n)
    yield paired("pretraining step / Hugging Face GPT-2 with our GELU", one, same_gelu, n)
    pair = side_by_side(two, 4), on_all_cores(theirs, 8)
    yield paired("two models on all cores, 8 steps / Hugging Face", *pair, n // 2)
    for B in (64, 1000):
        idx = torch.randint(V, (B, 20))
        ours, theirs = partial(sample, model, idx), partial(sample_hugging_face, hf, idx)
        name = f"sampling 20 tokens after 20, batch {B}"
        yield paired(f"{name} / Hugging Face generate", ours, theirs, max(3, n // 3))
        yield paired(f"{name} / no cache", ours, partial(sample_without_cache, model, idx), 3)
    pair = side_by_side([partial(sample, model, half) for half in idx.split(500)], 1), on_all_cores(theirs, 1)
    yield paired("sampling 1000 sequences on all cores / Hugging Face", *pair, 3)
    for target, given, data in students():
        pair = student_step(fresh(), given, data), other_step(OTHERS["plain"], fresh(), given, data)
        yield paired(f"student step on {target} / the plain one", *pair, n)
    steps = [student_step(fresh(), None, data) for _ in range(64)]
    for S in (1, 4, 16, 64):
        pair = side_by_side(steps[:1], 20), side_by_side(steps[:S], 20)
        yield paired(f"a student of 20 steps / {S} side by side", *pair, max(2, n // 5))
    on_tokens = student_step(model, *students()[0][1:])
    for name, step in (("pretraining step", one), ("student step on tokens", on_tokens)):
        products, flops = alone(step)
        yield paired(f"{name} / its {flops / 1e9:.2f} GFLOP of matrix products alone", step, products, n)


def tried(n: int) -> Iterator[dict]:
    """What was tried for speed. `expected` was written down before this timing."""
    rows, few, model, hf = torch.randint(V, (64, 65)), max(2, n // 3), fresh(), hugging_face()
    step, two = base_step(fresh(), rows), [base_step(fresh(), rows) for _ in range(2)]
    x, p, u = torch.randn(4096, 4 * C, requires_grad=True), torch.rand(500, V).softmax(-1), torch.rand(500, 1)
    q, k, v = torch.randn(500, 4, 1, 16), torch.randn(500, 4, 30, 16), torch.randn(500, 4, 30, 16)
    whole = lambda fused: other_step(whole_head, fresh(), rows, clip=1, fused=fused)
    gelu = lambda form: lambda: F.gelu(x, approximate=form).sum().backward()
    body = lambda hidden: lambda: hidden(rows[:, :-1]).float().square().sum().backward()
    yield paired("head in chunks of 128 / whole", step, whole(True), n, "1.3", "yes")
    yield paired("exact GELU / tanh GELU, forward and backward", gelu("none"), gelu("tanh"), n, "2", "yes")
    yield paired("fused AdamW / plain AdamW, whole step", whole(True), whole(False), n, "1.03", "yes")
    for target, given, data in students():
        name, ours = f"student step on {target}, ", student_step(fresh(), given, data)
        for key, expected, what, why in (
            ("written out", "0.9", "as it is / with the head's gradient written out", "loss"),
            ("last block", "0.8", "last block everywhere / only where a number is due", "block"),
        ):
            other = other_step(OTHERS[key], fresh(), given, data, fused=True)
            yield paired(name + what, ours, other, n, expected, f"no: a second way through the {why}")
    pair = lambda: torch.searchsorted(c := p.cumsum(-1), u * c[:, -1:]), lambda: torch.multinomial(p, 1)
    yield paired("inverse CDF / torch.multinomial, 500 draws", *pair, n, "10", "yes")
    pair = side_by_side(two, 4), on_all_cores(step, 8)
    yield paired("two jobs side by side / one after the other on all cores", *pair, few, "1.5", "yes")
    pair = partial(F.scaled_dot_product_attention, q, k, v), lambda: (q @ k.mT / 4).softmax(-1) @ v
    name = "one token's attention by PyTorch / written out"
    yield paired(name, *pair, n, "0.5", "no: too small a part of sampling to show in the whole")
    idx = torch.randint(V, (500, 20))
    name = "matrix products of sampling alone / all of Hugging Face's sampling, 500 x 20 tokens"
    products, _ = alone(partial(sample, model, idx))
    yield paired(name, products, partial(sample_hugging_face, hf, idx), few, "10", "a limit, no idea")
    bf16 = torch.autocast("cpu", torch.bfloat16)(body(model.hidden))
    yield paired("body in float32 / under bfloat16 autocast", body(model.hidden), bf16, few, "1", "no")
    compiled = body(torch.compile(model.hidden))
    why = f"no: compiling takes {timeit(compiled, number=1):.0f} s a process"
    yield paired("body eager / under torch.compile", body(model.hidden), compiled, few, "0.8", why)


# The largest resident size so far, of this process alone (getrusage would count its parent's), from Linux.
PEAK_MIB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024"
SIZES = [{}, *({"n_embd": c} for c in (32, 128, 256)), {"n_layer": 4}, {"n_layer": 8}]
SIZES += [*({"B": b} for b in (16, 256)), *({"vocab_size": v} for v in (2762, 5524))]


def growth(change: dict) -> dict:
    """A pretraining step's time and the memory it adds, in a process of its own."""
    base_step(fresh(), torch.randint(V, (1, 65)))()  # the first optimiser imports 70 MiB
    size = {"n_layer": 2, "n_embd": 64, "vocab_size": V, "B": 64} | change
    n_layer, n_embd, vocab_size, B = size.values()
    model = GPT(GPTConfig(vocab_size, 16, n_layer=n_layer, n_embd=n_embd)).initialise(0)
    step, before = base_step(model, torch.randint(vocab_size, (B, 65))), eval(PEAK_MIB)
    size |= {"parameters": sum(p.numel() for p in model.parameters())}
    step_ms = 1e3 * min(timeit(step, number=1) for _ in range(5))
    return size | {"step_ms": step_ms, "added_mib": eval(PEAK_MIB) - before}


def main_job(quick: bool) -> Iterator[dict]:
    """The four scripts from an empty folder: seconds with start-up, and the largest that a process was."""
    with tempfile.TemporaryDirectory() as folder:
        for script in ("train_teacher", "generate", "train_student", "evaluate"):
            main = f"{script}.main({['--run', f'{folder}/run', *['--quick'] * quick]})"
            program = f"import time, {script}; t = time.time(); {main}; print(time.time() - t, {PEAK_MIB})"
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
            whole, (inside, mib) = time.perf_counter() - began, map(float, done.stdout.split()[-2:])
            yield {"stage": script, "seconds": whole, "start_up_s": whole - inside, "peak_mib": mib}


def measure(args: argparse.Namespace) -> dict:
    n = 5 if args.quick else 21
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        sizes = pool.map(growth, SIZES, chunksize=1)
    cpu = f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    summary = [*against_others(n), *tried(n)]
    return {"cpu": cpu, "summary": summary, "records": sizes, "main_job": list(main_job(args.quick))}


def markdown(results: dict) -> str:
    lines = lab.heading(results, f"Measured on {results['cpu']}.")
    show = lambda key, row: f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key])
    for rows in (results[name] for name in ("summary", "records", "main_job")):
        lines += [*lab.table(rows, **{key: partial(show, key) for key in rows[0]}), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    lab.experiment(__doc__, "bench", measure, markdown)
