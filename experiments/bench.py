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

CPU, CONFIG = torch.device("cpu"), GPTConfig(vocab_size=1381, n_aux=16)  # the main run's
C, V = CONFIG.n_embd, CONFIG.vocab_size

# ------------------------------------------------------------------------------------------------------------
# steps: ours are the scripts' own; the others are made of a loss that has the same gradient

fresh = lambda seed=0: GPT(CONFIG).initialise(seed)
pretraining, distillation = train_teacher.Pretraining(), train_student.Distillation()
many = lambda rows: rows.repeat(200, 1)  # steps' worth
base_step = lambda model, rows: partial(next, train_teacher.pretrain(model, many(rows), pretraining))
student_step: Any = lambda student, teacher, data: partial(
    next, train_student.train(student, teacher, [data] * 9999, distillation)
)


def other_step(loss: Callable, model: nn.Module, *args: Any, clip: float = 0, fused: bool = False) -> Any:
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
    block: Any = model.blocks[-1]
    x = model.wte(data.idx) + model.wpe.weight[: len(due)]
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
OTHERS: dict[str, Any] = {"plain": partial(number_loss, plain), "written out": written_out}
OTHERS |= {"last block": partial(number_loss, last_block_where_due)}

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


class Products(TorchDispatchMode):
    """The matrix products (m, k) @ (k, n) that `work` makes, to be made again on their own."""

    def __init__(self, work: Callable):
        super().__init__()
        self.made: list[tuple[Tensor, Tensor]] = []
        with self:
            work()
        self.flops = sum(2 * a.numel() * b.size(1) for a, b in self.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.made.append((torch.randn(args[-2].shape), torch.randn(args[-1].shape)))
        return func(*args, **kwargs or {})

    def again(self) -> None:
        for a, b in self.made:
            torch.mm(a, b)


# ------------------------------------------------------------------------------------------------------------
# timing


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def paired(name: str, ours: Callable, other: Callable, n: int, **more: object) -> dict:
    """How many times longer `other` takes than `ours`: one warm-up each, then n pairs in turn."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(n)]
    ratios = [b / a for a, b in pairs]
    row = {"name": name, "ratio": median(ratios), "min": min(ratios), "max": max(ratios), "n": n}
    ours_s, other_s = (median(times) for times in zip(*pairs))
    row |= {"ours_ms": 1e3 * ours_s, "other_ms": 1e3 * other_s, **more}
    print(f"{name}: {row['ratio']:.2f} times [{row['min']:.2f}, {row['max']:.2f}]", flush=True)
    return row


def against_others(n: int) -> Iterator[dict]:
    rows, hf, gelu = torch.randint(V, (64, 65)), hugging_face(), hugging_face(activation_function="gelu")
    model, one, two = fresh(), base_step(fresh(), rows), [base_step(fresh(seed), rows) for seed in (0, 1)]
    theirs, same_gelu = (other_step(whole_head, m, rows, clip=1) for m in (hf, gelu))
    yield paired("pretraining step against Hugging Face GPT-2", one, theirs, n)
    yield paired("pretraining step against Hugging Face GPT-2 with our GELU", one, same_gelu, n)
    pair = side_by_side(two, 4), on_all_cores(theirs, 8)
    yield paired("two models on all cores, 8 steps, against Hugging Face", *pair, n // 2)
    for B in (64, 1000):
        idx = torch.randint(V, (B, 20))
        ours, theirs = partial(sample, model, idx), partial(sample_hugging_face, hf, idx)
        name = f"sampling 20 tokens after 20, batch {B}, against "
        yield paired(name + "Hugging Face generate", ours, theirs, max(3, n // 3))
        yield paired(name + "no cache", ours, partial(sample_without_cache, model, idx), 3)
    pair = side_by_side([partial(sample, model, half) for half in idx.split(500)], 1), on_all_cores(theirs, 1)
    yield paired("sampling 1000 sequences on all cores, against Hugging Face", *pair, 3)
    for target, B in (("tokens", 64), ("logits", 32)):
        student, teacher, data = student_setting(B)
        given = teacher if target == "logits" else None
        pair = student_step(student, given, data=data), other_step(OTHERS["plain"], fresh(), given, data)
        yield paired(f"student step on {target} against the plain one", *pair, n)


def many_students(n: int) -> Iterator[dict]:
    """S students side by side against one."""
    settings = [student_setting(32) for _ in range(64)]
    steps = [student_step(student, None, data=data) for student, _, data in settings]
    for S in (1, 4, 16, 64):
        pair = side_by_side(steps[:1], 20), side_by_side(steps[:S], 20)
        yield paired(f"{S} students of 20 steps against one", *pair, max(2, n // 5), students=S)


def tried(n: int) -> Iterator[dict]:
    """What is used / an alternative. `expected` was written down before this timing."""
    rows, few, model, data = torch.randint(V, (64, 65)), max(2, n // 3), fresh(), student_setting(64)[2]
    used, two = base_step(fresh(), rows), [base_step(fresh(), rows) for _ in range(2)]
    x, p, u = torch.randn(4096, 4 * C, requires_grad=True), torch.rand(500, V).softmax(-1), torch.rand(500, 1)
    q, k, v = torch.randn(500, 4, 1, 16), torch.randn(500, 4, 30, 16), torch.randn(500, 4, 30, 16)
    row: Any = lambda name, expected, *pair, n=n, why="used": paired(
        name, pair[0], pair[1], n, expected=expected, why=why
    )
    gelu = lambda form: lambda: F.gelu(x, approximate=form).sum().backward()
    body = lambda hidden: lambda: hidden(rows[:, :-1]).float().square().sum().backward()
    whole = lambda fused: other_step(whole_head, fresh(), rows, clip=1, fused=fused)
    yield row("head in chunks of 128 / whole", "1.3", used, whole(True))
    yield row("exact GELU / tanh GELU, forward and backward", "2", gelu("none"), gelu("tanh"))
    yield row("fused AdamW / plain AdamW, whole step", "1.03", whole(True), whole(False))
    name = "student step on tokens, last block everywhere / only where a number is due"
    other = other_step(OTHERS["last block"], fresh(), None, data, fused=True)
    pair = student_step(fresh(), None, data=data), other
    yield row(name, "0.8", *pair, why="not used: it takes a second path through the block")
    for target, teacher, some in (("tokens", None, data), ("logits", fresh(1), data.take(slice(32)))):
        other = other_step(OTHERS["written out"], fresh(), teacher, some, fused=True)
        name = f"student step on {target}, as it is / with the head's gradient written out"
        why = "not used: a few per cent for a tenth more lines and a second way to the same loss"
        yield row(name, "0.9", student_step(fresh(), teacher, data=some), other, why=why)
    cdf = lambda: torch.searchsorted(c := p.cumsum(-1), u * c[:, -1:], right=True)
    yield row("inverse CDF / torch.multinomial, 500 draws", "10", cdf, lambda: torch.multinomial(p, 1))
    name = "two jobs side by side / one after the other on all cores"
    yield row(name, "1.5", side_by_side(two, 4), on_all_cores(used, 8), n=few)
    by_torch = lambda: F.scaled_dot_product_attention(q, k, v)
    by_hand, why = lambda: (q @ k.mT / 4).softmax(-1) @ v, "not used: too small a part of sampling"
    yield row("one token's attention by PyTorch / written out", "0.5", by_torch, by_hand, why=why)
    idx, why = torch.randint(V, (500, 20)), "a limit: attention, softmax, GELU and the draw have the rest"
    alone = Products(partial(sample, model, idx))
    theirs = partial(sample_hugging_face, hugging_face(), idx)
    name = "matrix products of sampling alone / all of Hugging Face's sampling, 500 x 20 tokens"
    yield row(name, "10", alone.again, theirs, n=few, why=why)
    bf16 = torch.autocast("cpu", torch.bfloat16)(body(model.hidden))
    name = "body in float32 / under bfloat16 autocast"
    yield row(name, "1", body(model.hidden), bf16, n=few, why="not used")
    compiled = body(torch.compile(model.hidden))
    why = f"not used: compiling takes {seconds(compiled):.0f} s a process"
    yield row("body eager / under torch.compile", "0.8", body(model.hidden), compiled, n=few, why=why)


def against_the_machine(n: int) -> Iterator[dict]:
    """A step's products on their own: their share of its time is that of the reachable rate it attains."""
    student, _, data = student_setting(64)
    for name, step in (
        ("pretraining step, 64 x 64 tokens", base_step(fresh(), torch.randint(V, (64, 65)))),
        ("student step on tokens, 64 sequences", student_step(student, None, data=data)),
    ):
        step()
        products = Products(step)
        row = paired(name, step, products.again, n, gflop=products.flops / 1e9)
        yield row | {"reachable_gflop_s": products.flops / row["other_ms"] / 1e6}


# ------------------------------------------------------------------------------------------------------------
# processes of their own

# The largest resident size so far, of this process alone (getrusage would count its parent's), from Linux.
PEAK_MIB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1024"
SIZES = [{}, *({"n_embd": c} for c in (32, 128, 256)), {"n_layer": 4}, {"n_layer": 8}]
SIZES += [*({"B": b} for b in (16, 256)), *({"vocab_size": v} for v in (2762, 5524))]


def growth(change: dict) -> dict:
    """A pretraining step's time and the memory it adds."""
    size = {"n_layer": 2, "n_embd": 64, "vocab_size": V, "B": 64} | change
    n_layer, n_embd, vocab_size, B = size.values()
    model = GPT(GPTConfig(vocab_size, 16, n_layer=n_layer, n_embd=n_embd)).initialise(0)
    step, before = base_step(model, torch.randint(vocab_size, (B, 65))), eval(PEAK_MIB)
    size |= {"parameters": sum(p.numel() for p in model.parameters())}
    step_ms = 1e3 * min(seconds(step) for _ in range(5))
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
    tables: dict[str, Any] = {"machine": against_the_machine(n), "others": against_others(n)}
    tables["students"] = many_students(n)
    tables |= {"tried": tried(n), "growth": sizes, "main_job": main_job(args.quick)}
    records = [{"table": name, **row} for name, rows in tables.items() for row in rows]
    return {"cpu": cpu, "records": records, "summary": lab.where(records, table="main_job")}


def markdown(results: dict) -> str:
    some = lambda name: lab.where(results["records"], table=name)
    figure = lambda key, form="": lambda row: f"{row[key]:{form}}"
    times = lambda form: lambda row: f"{row['ratio']:{form}} [{row['min']:{form}}, {row['max']:{form}}]"
    ours: Any = {"pairs": "n", "ours, ms": figure("ours_ms", ".1f")}
    name: Any = {"what": "name"}
    faster: Any = {"times faster [min, max]": times(".2f")}
    lines = lab.heading(results, f"Measured on {results['cpu']}.")
    lines += lab.table(some("machine"), **name, **{"counted GFLOP": figure("gflop", ".2f")},
                       **{"reachable GFLOP/s": figure("reachable_gflop_s", ".0f")}, share=times(".0%"))
    lines += ["", *lab.table(some("others"), **{"ours against": "name"}, **faster, **ours)]
    per_student = lambda row: f"{row['ratio'] / row['students']:.2f}"
    students: Any = {"students": "students", "cost against one": times(".2f"), "a student": per_student}
    alternatives: Any = {"ours / the alternative": "name", "expected": "expected", **faster, "used": "why"}
    lines += ["", *lab.table(some("students"), **students), "", *lab.table(some("tried"), **alternatives)]
    lines += ["", *lab.table(some("main_job"), stage="stage", seconds=figure("seconds", ".0f"),
                             of_them_start_up=figure("start_up_s", ".1f"), MiB=figure("peak_mib", ".0f"))]
    sizes: Any = {"layers": "n_layer", "channels": "n_embd", "vocabulary": "vocab_size", "sequences": "B"}
    sizes |= {"parameters": figure("parameters", ","), "ms a step": figure("step_ms", ".0f")}
    lines += ["", *lab.table(some("growth"), **sizes, **{"MiB added": figure("added_mib", ".0f")})]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    lab.experiment(__doc__, "bench", measure, markdown)
