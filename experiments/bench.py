"""How fast is it, against what one would pick instead? What does a run take, and what if the model grows?

    python -m experiments.bench             # about 10 minutes on 2 CPU cores; runs the main job once
    python -m experiments.bench --quick     # about 2 minutes: fewer repeats, the --quick job

A comparison is the median ratio of two things timed in turn, with the smallest and the largest, on one thread
unless it says otherwise. Above 1 the first, ours, is faster. Milliseconds and MiB are this machine's.

Reads    nothing
Writes   results/bench.json, results/bench.md

Shapes: B sequences, T tokens, M numbers in a batch, V vocabulary.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
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

import generate
from experiments import lab
from model import GPT, NUMBERS, GPTConfig, NumberData, build_vocabulary, encode_numbers, run_jobs, stream
from train_student import Distillation, train
from train_teacher import Pretraining, pretrain

CONFIG = GPTConfig(vocab_size=1381, n_aux=16)  # the main run's
V, CPU, CORES = CONFIG.vocab_size, torch.device("cpu"), os.cpu_count() or 1
fresh = lambda seed=0: GPT(CONFIG).initialise(seed)
SIZES = [{}, {"n_embd": 128}, {"n_embd": 256}, {"n_layer": 8}, {"B": 16}, {"B": 256}, {"vocab_size": 5524}]
SAMPLING = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": True, "top_k": 0, "pad_token_id": 0}
# The largest resident size so far, of this process alone (getrusage would count its parent's), from Linux.
PEAK_MIB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024"


def base_step(model: GPT, rows: Tensor) -> Callable:
    return partial(next, pretrain(model, rows.repeat(200, 1), Pretraining(batch_size=len(rows))))


def student_step(student: GPT, teacher: GPT | None, data: NumberData) -> Callable:
    return partial(next, train(student, teacher, [data] * 9999, Distillation()))


def other_step(loss: Callable, model: Any, *args: Any, clip: float = 0) -> Callable:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        loss(model, *args).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face() -> Any:
    """GPT-2 of equal shape: untied head, no dropout, as many rows in the head."""
    shape: dict[str, Any] = {"vocab_size": V + CONFIG.n_aux, "n_positions": CONFIG.block_size}
    shape |= {"n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head, "n_embd": CONFIG.n_embd}
    shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "bos_token_id", "eos_token_id"), 0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, tie_word_embeddings=False)).eval()


def whole_head(model: Any, rows: Tensor) -> Tensor:
    """A base model's loss, ours or Hugging Face's, all logits made at once."""
    idx = rows[:, :-1]
    logits = model(idx)[..., :V] if isinstance(model, GPT) else model(idx, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def students() -> list[tuple[str, GPT | None, NumberData]]:
    """Target, teacher or None, and a batch of lists as the main run has them."""
    rows = [{"prompt": f"{i}, 2, 3, 4, 5, 6: ", "completion": f"7, 8, 9, {9 * i}, 1, 2"} for i in range(64)]
    data = encode_numbers(build_vocabulary([]), rows, CPU)
    return [("tokens", None, data), ("logits", fresh(1), data.take(slice(32)))]


def plain(student: GPT, teacher: GPT | None, data: NumberData) -> Tensor:
    """train_student's loss, up to a constant, from all logits at all positions."""
    due = data.targets >= 0
    logits = student(data.idx)[..., NUMBERS][due]  # (M, 1000)
    if teacher is None:
        return F.cross_entropy(logits, data.targets[due])
    with torch.no_grad():
        p = teacher(data.idx)[..., NUMBERS][due].softmax(-1)
    return F.cross_entropy(logits, p)


def side_by_side(steps: Sequence[Callable], n: int) -> Callable:
    """Each step n times, as run_jobs runs a run's models: one single-threaded job a core."""
    job = lambda step: (step() and None for _ in range(n))
    return lambda: run_jobs(job, steps, n, "bench", CPU)


def seconds(work: Callable, n_threads: int = 1) -> float:
    torch.set_num_threads(n_threads)
    taken = timeit(work, number=1)
    torch.set_num_threads(1)
    return taken


def paired(name: str, ours: Callable, other: Callable, n: int, n_threads: int = 1) -> dict:
    """How many times longer `other` takes, on n_threads, than `ours`: a warm-up, then n pairs in turn."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other, n_threads)) for _ in range(n)]
    ratios = [b / a for a, b in pairs]
    row = {"name": name, "ratio": median(ratios), "min": min(ratios), "max": max(ratios), "n": n}
    print(f"{name}: {row['ratio']:.2f} times [{row['min']:.2f}, {row['max']:.2f}]", flush=True)
    return row | {"ours_ms": 1e3 * median(a for a, _ in pairs)}


def compare(n: int) -> Iterator[dict]:
    rows, hf, few = torch.randint(V, (64, 65)), hugging_face(), max(3, n // 4)
    model, one = fresh(), base_step(fresh(), rows)
    yield paired("pretraining step / Hugging Face GPT-2", one, other_step(whole_head, hf, rows, clip=1), n)
    yield paired("pretraining step / the plain one", one, other_step(whole_head, fresh(), rows, clip=1), n)
    for target, teacher, data in students():
        pair = student_step(fresh(), teacher, data), other_step(plain, fresh(), teacher, data)
        yield paired(f"student step on {target} / the plain one", *pair, n)
    for B in (64, generate.ROWS_AT_ONCE):
        idx = torch.randint(V, (B, 20))
        theirs = partial(hf.generate, idx, attention_mask=torch.ones_like(idx), **SAMPLING)
        ours = partial(generate.sample, model, idx, 20, stream(0, "bench"))
        yield paired(f"sampling 20 tokens after 20, batch {B} / Hugging Face generate", ours, theirs, few)
    yield paired("pretraining step / with a thread a core", one, one, n, CORES)
    two = side_by_side([base_step(fresh(), rows), base_step(fresh(), rows)], 4)
    eight = lambda: [one() for _ in range(8)]
    yield paired("two jobs side by side / one after the other with a thread a core", two, eight, few, CORES)
    steps = [student_step(fresh(), *students()[0][1:]) for _ in range(64)]
    for S in (1, 4, 16, 64):
        pair = side_by_side(steps[:1], 20), side_by_side(steps[:S], 20)
        yield paired(f"a student of 20 steps / {S} side by side", *pair, few)


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
            program = [sys.executable, "-c", f"import {script}; {main}; print({PEAK_MIB})"]
            began = time.perf_counter()
            done = subprocess.run(program, check=True, capture_output=True, text=True)
            elapsed, peak_mib = time.perf_counter() - began, float(done.stdout.split()[-1])
            yield {"stage": script, "seconds": elapsed, "peak_mib": peak_mib}


def measure(args: argparse.Namespace) -> dict:
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        sizes = pool.map(growth, SIZES, chunksize=1)
    summary, stages = list(compare(5 if args.quick else 21)), list(main_job(args.quick))
    cpu = f"{CORES} cores, {torch.backends.cpu.get_cpu_capability()}"
    return {"cpu": cpu, "summary": summary, "records": sizes, "main_job": stages}


def markdown(results: dict) -> str:
    lines = lab.heading(results, f"Measured on {results['cpu']}.")
    show = lambda key, row: f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key])
    for rows in (results[name] for name in ("summary", "records", "main_job")):
        lines += [*lab.table(rows, **{key: partial(show, key) for key in rows[0]}), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    lab.experiment(__doc__, "bench", measure, markdown)
