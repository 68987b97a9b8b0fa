"""How fast is it, against what one would pick instead? What does a run take?

    python -m experiments.bench             # 4 minutes on 2 CPU cores; runs the main job once
    python -m experiments.bench --quick     # 2 minutes: fewer repeats, the --quick job

A comparison is the median ratio of two things timed in turn, with the smallest and the largest, on one thread
unless it says otherwise. Above 1 the first, ours, is faster. Milliseconds and MiB are this machine's.

Reads    nothing
Writes   results/bench.json, results/bench.md

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
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
from model import GPT, GPTConfig, run_jobs, stream
from train_teacher import Pretraining, pretrain

CONFIG = GPTConfig(vocab_size=1384, n_aux=16)  # the main run's
V, CPU, CORES = CONFIG.vocab_size, torch.device("cpu"), os.cpu_count() or 1
fresh = lambda seed=0: GPT(CONFIG).initialise(seed)
SAMPLING = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": True, "top_k": 0, "pad_token_id": 0}
# The largest resident size of the process alone (getrusage would count its parent's), from Linux.
PEAK_MIB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024"


def base_step(model: GPT, rows: Tensor) -> Callable:
    return partial(next, pretrain(model, rows.repeat(200, 1), Pretraining(batch_size=len(rows))))


def plain_step(model: Any, rows: Tensor) -> Callable:
    """The usual way, for our model or Hugging Face's: all logits at once."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        idx = rows[:, :-1]
        logits = model(idx)[..., :V] if isinstance(model, GPT) else model(idx, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face() -> Any:
    """GPT-2 of equal shape: untied head, no dropout, as many rows in the head."""
    shape: dict[str, Any] = {"vocab_size": V + CONFIG.n_aux, "n_positions": CONFIG.block_size}
    shape |= {"n_layer": CONFIG.n_layer, "n_head": CONFIG.n_head, "n_embd": CONFIG.n_embd}
    shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "bos_token_id", "eos_token_id"), 0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, tie_word_embeddings=False)).eval()


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
    yield paired("pretraining step / Hugging Face GPT-2", one, plain_step(hf, rows), n)
    yield paired("pretraining step / the plain one", one, plain_step(fresh(), rows), n)
    for B in (64, generate.ROWS_AT_ONCE):
        idx = torch.randint(V, (B, 20))
        theirs = partial(hf.generate, idx, attention_mask=torch.ones_like(idx), **SAMPLING)
        ours = partial(generate.sample, model, idx, 20, stream(0, "bench"))
        yield paired(f"sampling 20 tokens after 20, batch {B} / Hugging Face generate", ours, theirs, few)
    yield paired("pretraining step / with a thread a core", one, one, n, CORES)
    two = side_by_side([base_step(fresh(), rows), base_step(fresh(), rows)], 4)
    eight = lambda: [one() for _ in range(8)]
    yield paired("two jobs side by side / one after the other with a thread a core", two, eight, few, CORES)


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
    cpu = f"{CORES} cores, {torch.backends.cpu.get_cpu_capability()}"
    summary, records = list(compare(5 if args.quick else 21)), list(main_job(args.quick))
    return {"cpu": cpu, "summary": summary, "records": records}


def markdown(results: dict) -> str:
    lines = lab.heading(results, f"Measured on {results['cpu']}.")
    show = lambda key, row: f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key])
    for rows in (results[name] for name in ("summary", "records")):
        lines += [*lab.table(rows, **{key: partial(show, key) for key in rows[0]}), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    lab.experiment(__doc__, "bench", measure, markdown)
