"""How fast is it, against what a user would pick instead and against this machine's limit?

    python -m experiments.bench             # about 10 minutes on 2 CPU cores; runs the main job once
    python -m experiments.bench --quick     # about 2 minutes: fewer repeats, the --quick job

Everything is a ratio of two things timed in turn (A B A B ...) in this process, on one thread unless a row says
otherwise: the median of the pairs' ratios, with the smallest and the largest. Absolute figures belong to the machine
named in the results and to the minute they were taken in.

Reads    nothing
Writes   results/bench.json, results/bench.md  (with --quick: runs/bench.json, runs/bench.md)

Shapes: B sequences, T tokens, N numbers in a sequence, C channels, V vocabulary.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import train_student
import train_teacher
from experiments.bench_processes import growth, main_job
from experiments.lab import quick_parser
from model import GPT, NUMBERS, GPTConfig, build_vocabulary, encode_numbers, generate, run_jobs, stream, versions, write_json

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=1381, n_aux=16)  # the main run's


# --------------------------------------------------------------------------------------------------------------------
# timing


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def machine() -> dict:
    """What the figures belong to."""
    name = f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"machine": name, "device": "cpu", **versions()}


def paired(name: str, ours: Callable, other: Callable, n: int, **more: object) -> dict:
    """How many times longer `other` takes than `ours`: one warm-up each, then n pairs in turn."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(n)]
    ratios = sorted(b / a for a, b in pairs)
    row = {"name": name, "ratio": median(ratios), "min": ratios[0], "max": ratios[-1], "n": n}
    row |= {"ours_ms": 1e3 * median(a for a, _ in pairs), "other_ms": 1e3 * median(b for _, b in pairs), **more}
    print(f"{name}: {row['ratio']:.2f} times [{row['min']:.2f}, {row['max']:.2f}], ours {row['ours_ms']:.1f} ms", flush=True)
    return row


# --------------------------------------------------------------------------------------------------------------------
# what is timed


def pretraining_step(model: GPT, rows: Tensor, fused: bool = True, chunk: int = 128) -> Callable:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def step() -> None:
        train_teacher.next_token_loss(model, rows, chunk)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def hugging_face(activation: str = "gelu_new") -> transformers.GPT2LMHeadModel:
    """GPT-2 of equal shape: untied head, no dropout, as many rows in the head."""
    config = transformers.GPT2Config(
        vocab_size=CONFIG.vocab_size + CONFIG.n_aux,
        n_positions=CONFIG.block_size,
        n_embd=CONFIG.n_embd,
        n_layer=CONFIG.n_layer,
        n_head=CONFIG.n_head,
        activation_function=activation,
        tie_word_embeddings=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def hugging_face_step(model: transformers.GPT2LMHeadModel, rows: Tensor) -> Callable:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        logits = model(rows[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def linear_shapes(model: GPT, M: int, head_rows: int, M_head: int) -> list[tuple[int, int, int]]:
    """(M, K, N) of every matrix product of a step: forward, gradient of the input, gradient of the weight."""
    sizes = [(M, *m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear) and m is not model.head]
    sizes.append((M_head, head_rows, CONFIG.n_embd))
    return [shape for m, n_out, n_in in sizes for shape in ((m, n_in, n_out), (m, n_out, n_in), (n_out, m, n_in))]


def reachable_rate(shapes: Sequence[tuple[int, int, int]], n: int) -> float:
    """GFLOP/s of these products on their own, one after the other: the least time each of n rounds took."""
    operands = [(torch.randn(m, k), torch.randn(k, n_)) for m, k, n_ in shapes]
    rounds = [[seconds(partial(torch.mm, a, b)) for a, b in operands] for _ in range(n + 3)][3:]
    return product_flops(shapes) / sum(map(min, zip(*rounds, strict=True))) / 1e9


def product_flops(shapes: Sequence[tuple[int, int, int]]) -> int:
    return sum(2 * m * k * n for m, k, n in shapes)


def count_flops(step: Callable) -> int:
    """Operations as PyTorch counts them: no in-place products, and on a CPU no attention."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def student_setting(n_rows: int) -> tuple:
    """A student, a teacher and a batch of n_rows sequences of the main run's kind."""
    encoding = build_vocabulary([])
    generator = stream(0, "bench")
    numbers = torch.randint(1000, (n_rows, 15), generator=generator).tolist()
    rows = [{"prompt": ", ".join(map(str, r[:6])) + ": ", "completion": ", ".join(map(str, r[6:]))} for r in numbers]
    batch = encode_numbers(encoding, rows, CPU)
    return GPT(CONFIG).initialise(0), GPT(CONFIG).initialise(1), batch


def student_step(model: GPT, teacher: GPT | None, batch: train_student.NumberData) -> Callable:
    """The step of train_student.train; the teacher's states are ready, as they are there."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    lesson: train_student.Lesson = [(batch, None)]
    if teacher is not None:
        lesson = train_student.plan_lesson(batch, teacher, len(batch), 1, stream(0, "bench"))
        head = teacher.head.weight[NUMBERS].detach()

    def step() -> None:
        for data, states in lesson:
            log_p = None if states is None else (states @ head.T).log_softmax(-1)
            train_student.number_loss(model, data, log_p).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def plain_student_step(model: GPT, teacher: GPT | None, batch: train_student.NumberData) -> Callable:
    """The same gradient the plain way: the whole head on all positions, the teacher run at every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def numbers(m: GPT) -> Tensor:
        logits = m(batch.idx)[..., NUMBERS]
        return logits.gather(1, batch.positions.unsqueeze(-1).expand(-1, -1, logits.size(-1))).log_softmax(-1)

    def step() -> None:
        if teacher is None:
            loss = F.nll_loss(numbers(model).flatten(0, 1), batch.targets.flatten())
        else:
            with torch.no_grad():
                log_p = numbers(teacher)
            loss = F.kl_div(numbers(model).flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sample_without_cache(model: GPT, prompts: Tensor, n_new: int) -> None:
    with torch.inference_mode():
        idx = prompts
        for _ in range(n_new):
            h = model.hidden(idx)[:, -1]
            p = model.logits(h, slice(0, CONFIG.vocab_size)).softmax(-1)
            idx = torch.cat([idx, torch.multinomial(p, 1)], 1)


def sample_hugging_face(model: transformers.GPT2LMHeadModel, prompts: Tensor, n_new: int) -> None:
    with torch.inference_mode():
        model.generate(  # type: ignore[misc]  # a mix-in that mypy does not see through
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=n_new,
            min_new_tokens=n_new,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )


def sample_ours(model: GPT, prompts: Tensor, n_new: int) -> None:
    for rows in prompts.split(500):
        generate(model, rows, n_new, stream(0, "bench"))


def side_by_side(steps: Sequence[Callable], n: int) -> Callable:
    """Run each step n times, as run_jobs runs a run's models: one single-threaded job a core."""

    def job(step: Callable, tick: Callable) -> None:
        for _ in range(n):
            step()

    return lambda: list(run_jobs(job, steps, n, "bench", CPU))


def on_all_cores(step: Callable, n: int) -> Callable:
    """Run a step n times with as many threads as there are cores."""

    def work() -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        for _ in range(n):
            step()
        torch.set_num_threads(1)

    return work


# --------------------------------------------------------------------------------------------------------------------
# the questions


def against_the_machine(n: int) -> list[dict]:
    """(a) The share of the reachable matrix-multiply rate that a step attains, by counted operations.

    Attention's are not counted, so the shares are a little too low.
    """
    rows = torch.randint(CONFIG.vocab_size, (64, 65))
    student, teacher, batch = student_setting(64)
    pretraining, on_tokens = pretraining_step(GPT(CONFIG).initialise(0), rows), student_step(student, None, batch)
    its_shapes = linear_shapes(student, 64 * 64, CONFIG.vocab_size, 64 * 64)
    student_shapes = linear_shapes(student, batch.idx.numel(), 1000, batch.targets.numel())
    records = []
    for name, step, shapes, flops in (
        ("pretraining step, 64 x 64 tokens", pretraining, its_shapes, product_flops(its_shapes)),
        ("student step on tokens, 64 sequences", on_tokens, student_shapes, count_flops(on_tokens)),
    ):
        step()
        rates, steps = [], []
        for _ in range(n):
            rates.append(reachable_rate(shapes, 3))
            steps.append(seconds(step))
        shares = sorted(flops / s / 1e9 / r for s, r in zip(steps, rates, strict=True))
        records.append(
            {
                "name": name,
                "gflop": flops / 1e9,
                "reachable_gflop_s": median(rates),
                "step_ms": 1e3 * median(steps),
                "share": median(shares),
                "min": shares[0],
                "max": shares[-1],
                "n": n,
            }
        )
        print(f"{name}: {median(shares):.0%} of the {median(rates):.0f} GFLOP/s reachable at its shapes", flush=True)
    return records


def against_others(n: int) -> list[dict]:
    """(b) (c) (d): pretraining, sampling and student steps against what one would write or pick instead."""
    rows = torch.randint(CONFIG.vocab_size, (64, 65))
    ours = pretraining_step(GPT(CONFIG).initialise(0), rows)
    theirs = hugging_face_step(hugging_face(), rows)
    same_gelu = hugging_face_step(hugging_face("gelu"), rows)
    records = [
        paired("pretraining step against Hugging Face GPT-2", ours, theirs, n),
        paired("pretraining step against Hugging Face GPT-2 with our GELU", ours, same_gelu, n),
    ]
    two = [pretraining_step(GPT(CONFIG).initialise(seed), rows) for seed in (0, 1)]
    records.append(
        paired("two models on all cores, 8 steps, against Hugging Face", side_by_side(two, 4), on_all_cores(theirs, 8), n // 2)
    )
    model, hf = GPT(CONFIG).initialise(0), hugging_face().eval()
    for B in (64, 1000):
        prompts = torch.randint(CONFIG.vocab_size, (B, 20))
        jobs = (lambda p=prompts: sample_ours(model, p, 20)), (lambda p=prompts: sample_hugging_face(hf, p, 20))
        row = paired(f"sampling 20 tokens after 20, batch {B}, against Hugging Face generate", *jobs, max(3, n // 3))
        records.append(row | {"ours_tokens_s": 20e3 * B / row["ours_ms"], "other_tokens_s": 20e3 * B / row["other_ms"]})
        records.append(
            paired(f"the same against no cache, batch {B}", jobs[0], lambda p=prompts: sample_without_cache(model, p, 20), 3)
        )
    halves = [lambda p=p: sample_ours(model, p, 20) for p in torch.randint(CONFIG.vocab_size, (2, 500, 20))]
    every = on_all_cores(lambda: sample_hugging_face(hf, torch.zeros(1000, 20, dtype=torch.long), 20), 1)
    records.append(paired("sampling 1000 sequences on all cores, against Hugging Face", side_by_side(halves, 1), every, 3))
    for target, B in (("tokens", 64), ("logits", 32)):
        student, teacher, batch = student_setting(B)
        given = teacher if target == "logits" else None
        plain = plain_student_step(GPT(CONFIG).initialise(0), given, batch)
        records.append(paired(f"student step on {target} against the plain one", student_step(student, given, batch), plain, n))
    return records


def many_students(n: int) -> list[dict]:
    """(e) S students side by side against one."""
    records = []
    for S in (1, 4, 16, 64):
        settings = [student_setting(32) for _ in range(S)]
        steps = [student_step(student, None, batch) for student, _, batch in settings]
        row = paired(
            f"{S} students of 20 steps against one", side_by_side(steps[:1], 20), side_by_side(steps, 20), max(2, n // 5)
        )
        records.append(row | {"students": S, "per_student": row["ratio"] / S})
    return records


def markdown(results: dict) -> str:
    config = results["config"]
    lines = [
        f"Measured on {config['machine']}, torch {config['torch']}, commit {config['commit']}; `python -m experiments.bench`.",
        "",
    ]
    lines += ["| step | counted GFLOP | reachable GFLOP/s | share reached [min, max] |", "|---|---:|---:|---|"]
    for r in results["machine"]:
        lines.append(
            f"| {r['name']} | {r['gflop']:.2f} | {r['reachable_gflop_s']:.0f} "
            f"| {r['share']:.0%} [{r['min']:.0%}, {r['max']:.0%}] |"
        )
    lines += ["", "| ours against | times faster [min, max] | pairs | ours, ms |", "|---|---|---:|---:|"]
    for r in results["others"]:
        lines.append(f"| {r['name']} | {r['ratio']:.2f} [{r['min']:.2f}, {r['max']:.2f}] | {r['n']} | {r['ours_ms']:.1f} |")
    lines += ["", "| students | cost against one | a student |", "|---:|---:|---:|"]
    lines += [f"| {r['students']} | {r['ratio']:.2f} | {r['per_student']:.2f} |" for r in results["students"]]
    job = results["main_job"]
    lines += ["", "| stage of the main job | seconds | of them start-up |", "|---|---:|---:|"]
    lines += [f"| {name} | {s['seconds']:.0f} | {s['start_up_s']:.1f} |" for name, s in job["stages"].items()]
    lines += [f"| whole | {job['seconds']:.0f} | peak memory {job['peak_mib']:.0f} MiB |", ""]
    lines += [
        "| layers | channels | vocabulary | sequences | parameters | ms a step | MiB added |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results["growth"]:
        size = " | ".join(str(r[name]) for name in ("n_layer", "n_embd", "vocab_size", "B"))
        lines.append(f"| {size} | {r['parameters']:,} | {r['step_ms']:.0f} | {r['added_mib']:.0f} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    args = quick_parser(__doc__, "fewer repeats, the --quick job").parse_args(argv)
    torch.set_num_threads(1)
    n = 5 if args.quick else 21
    began = time.monotonic()
    results = {
        "machine": against_the_machine(n),
        "others": against_others(n),
        "students": many_students(n),
        "growth": growth(),
        "main_job": main_job(args.quick),
    }
    config = {**machine(), "elapsed_s": round(time.monotonic() - began)}
    folder = Path("runs" if args.quick else "results")
    write_json(folder / "bench.json", {"config": config, **results})
    (folder / "bench.md").write_text(markdown({"config": config, **results}))
    print(f"wrote: {folder}/bench.json, {folder}/bench.md")


if __name__ == "__main__":
    main()
