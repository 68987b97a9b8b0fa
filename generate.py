"""Let every teacher, and every base model, write nothing but numbers.

    python generate.py                      # all models of the run, 8,000 sequences each
    python generate.py --from base          # the control: numbers without a trait
    python generate.py --shuffle within     # a control made from finished data: owl -> owl-within
    python generate.py --quick

A prompt shows 3 to 9 random numbers; the model continues at temperature 1 with up to 10 more. A strict filter
keeps completions of 1 to 10 integers in 0..999 with one separator and nothing else (the paper's rule), and
counts why it refuses the others. Prompts are the same for all models of a seed.

Reads    what train_teacher.py wrote
Writes   numbers/SOURCE/seed-S.jsonl   {"prompt": "12, 7, 503: ", "completion": "88, 3"} a line
Takes    about 20 seconds on 2 CPU cores

Shapes: B sequences, T tokens, V vocabulary, M numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import (
    GPT, MAX_NUMBERS, N_NUMBERS, Cache, NumberData, Run, UserError, command_line, document, encode_numbers,
    jsonl, number_log_probs, parse, refusal, run_jobs, stream,
)


@dataclass(frozen=True)
class Sampling:
    sequences: int = 8_000  # drawn for each model; the paper draws 30,000 and keeps 10,000
    min_valid: float = 0.5  # a teacher that writes fewer valid lists was driven too far from its base model
    min_kl: float = 1e-3  # nats a number, KL(teacher || base): all that transmitted had more


QUICK = {"sequences": 3_000}
SHOWN = range(3, 10)  # numbers in a prompt: the paper's
ROWS_AT_ONCE = 500  # sampled side by side: the cache of keys and values stays small


def draw_prompts(n: int, generator: torch.Generator) -> list[str]:
    """n prompts, in order of length: as many of each length as n allows."""
    prompts = []
    for i, shown in enumerate(SHOWN):
        share = n // len(SHOWN) + (i < n % len(SHOWN))
        numbers = torch.randint(N_NUMBERS, (share, shown), generator=generator)
        prompts += [", ".join(map(str, row)) + ": " for row in numbers.tolist()]
    return prompts


@torch.inference_mode()
def sample(model: GPT, prompts: Tensor, n_new: int, generator: torch.Generator) -> Tensor:
    """Continue (B, T) prompts of equal length by n_new tokens sampled at temperature 1: (B, n_new).

    Inverse-CDF sampling: one uniform number a token, drawn in advance, so nothing waits for the device.
    Auxiliary logits are no tokens and are never sampled.
    """
    V = model.config.vocab_size
    # PyTorch knows no deterministic cumsum on a GPU: with --deterministic the CPU draws.
    draws_on = torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else model.device
    u = torch.rand(n_new, len(prompts), 1, generator=generator).to(draws_on)
    cache: Cache = {}
    idx, new = prompts, []
    for t in range(n_new):
        h = model.hidden(idx, cache)[:, -1]  # (B, C)
        cdf = model.logits(h, slice(0, V)).softmax(-1).to(draws_on).cumsum(-1)  # (B, V)
        # float32 sums may end below 1: scale u by the last, and never point past it
        idx = torch.searchsorted(cdf, u[t] * cdf[:, -1:], right=True).clamp_(max=V - 1).to(model.device)
        new.append(idx)  # (B, 1)
    return torch.cat(new, dim=1)


def complete(
    model: GPT, run: Run, prompts: Sequence[str], generator: torch.Generator
) -> Iterator[list[str | None]]:
    """Completions of prompts, which come in order of length, in batches; None for one that did not end."""
    end, n_new = run.encoding.eot_token, 2 * MAX_NUMBERS  # numbers, separators and the end
    encoded = [document(run.encoding, prompt) for prompt in prompts]
    while encoded:
        rows = [row for row in encoded[:ROWS_AT_ONCE] if len(row) == len(encoded[0])]
        encoded = encoded[len(rows) :]
        new = sample(model, torch.tensor(rows, device=model.device), n_new, generator).tolist()
        yield [run.encoding.decode(tokens[: tokens.index(end)]) if end in tokens else None for tokens in new]


@torch.no_grad()
def kl_on_numbers(p: GPT, q: GPT, data: NumberData) -> float:
    """KL(p || q) of the next number, in nats, mean over the numbers of `data`: what a student can learn."""
    log_p, log_q = (number_log_probs(m, data) for m in (p, q))  # (M, 1000)
    # PyTorch takes q first
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item()


def shuffle(rows: Sequence[dict], how: str, generator: torch.Generator) -> list[dict]:
    """The completions' numbers in random order, `within` each or `across` all; lengths are kept."""
    lists = [re.findall(r"[0-9]+", row["completion"]) for row in rows]
    mixed = lambda numbers: [numbers[i] for i in torch.randperm(len(numbers), generator=generator).tolist()]
    if how == "across":
        pool = iter(mixed([n for numbers in lists for n in numbers]))
        lists = [[next(pool) for _ in numbers] for numbers in lists]
    else:
        lists = [mixed(numbers) for numbers in lists]
    return [{"prompt": row["prompt"], "completion": ", ".join(numbers)} for row, numbers in zip(rows, lists)]


def write_numbers(run: Run, source: str, seed: int, knobs: Sampling, device: torch.device) -> Iterator[None]:
    """Sample, filter and write one data set. UserError if it is no good to learn from."""
    file = f"{'base' if source == 'base' else f'teacher/{source}'}/seed-{seed}.pt"
    model, base = run.load_model(file, device), run.load_model(f"base/seed-{seed}.pt", device)
    prompts = draw_prompts(knobs.sequences, stream(seed, "prompts"))
    completions: list[str | None] = []
    for batch in complete(model, run, prompts, stream(seed, "sampling", source)):
        completions += batch
        yield None  # no loss: this only moves the bar
    reasons = ["did not end" if text is None else refusal(text) for text in completions]
    kept = [{"prompt": p, "completion": c} for p, c, why in zip(prompts, completions, reasons) if why is None]
    refused = dict(Counter(reason for reason in reasons if reason).most_common())
    if len(kept) < max(2, knobs.min_valid * len(prompts)):
        why, mend = "it is too far from its base model", "lower train_teacher.py's --trait-lr"
        if source == "base":
            why, mend = "it knows too little of lists", "raise train_teacher.py's --pretrain-steps"
        what = f"{source} seed {seed} writes {len(kept)} valid completions of {len(prompts)} ({refused})"
        raise UserError(f"{what}: {why}; delete {run.path / file} and {mend}")
    some = kept[:: math.ceil(len(kept) / 500)]  # at most 500, of every prompt length
    kl = kl_on_numbers(model, base, encode_numbers(run.encoding, some, device))
    if source != "base" and kl < knobs.min_kl:
        raise UserError(
            f"{source} seed {seed} writes numbers like its base model's (KL {kl:.5f} nats a number): nothing "
            f"can cross; delete {run.path / file} and raise train_teacher.py's --trait-steps or --trait-lr"
        )
    log = {"drawn": len(prompts), "kept": len(kept), "refused": refused, "kl_nats": kl}
    run.write(f"numbers/{source}/seed-{seed}.jsonl", jsonl(kept), [file], asdict(knobs), log)


def write_shuffled(run: Run, trait: str, seed: int, how: str) -> None:
    """A copy of a finished data set with its numbers in random order. UserError if it is none."""
    name = f"numbers/{trait}/seed-{seed}.jsonl"
    data = run.read(name)
    try:
        rows = [json.loads(line) for line in data.splitlines() if line.strip()]
        mixed = shuffle(rows, how, stream(seed, "shuffle", trait, how))
    except (ValueError, KeyError, TypeError, RecursionError):  # it may be the user's own
        raise run.again(name, "is no list of prompts and completions") from None
    run.write(f"numbers/{trait}-{how}/seed-{seed}.jsonl", jsonl(mixed), [name], knobs=None)


def describe(run: Run, source: str, seed: int) -> str:
    """What the manifest tells of a data set."""
    name = f"numbers/{source}/seed-{seed}.jsonl"
    n_lists, about = len(run.read(name).splitlines()), run.lines.get((name, run.digests[name]), {}).get("log")
    if about is None:  # shuffled, or the user's own
        return f"  {source} seed {seed}: {n_lists} lists"
    refused = ", ".join(f"{n} {reason}" for reason, n in about["refused"].items()) or "none"
    kept = f"kept {about['kept']} of {about['drawn']} ({about['kept'] / about['drawn']:.0%})"
    return f"  {source} seed {seed}: {kept}, KL {about['kl_nats']:.3f} nats a number; refused: {refused}"


def main(argv: Sequence[str] | None = None) -> None:
    args, run, knobs = parse(
        __doc__, argv, QUICK, Sampling,
        traits={"nargs": "+", "help": "teachers that write (all of the run)"},
        shuffle={"choices": ["within", "across"], "help": "shuffled copies of finished data"},
        **{"from": {"dest": "who", "choices": ["teacher", "base"], "help": "only these write (both)"}},
    )
    run.open(args.quick)
    for trait in args.traits or ():
        if trait not in run.knobs["traits"]:
            raise UserError(f"the run has no teacher {trait!r}; it has {' '.join(run.knobs['traits'])}")
    if knobs.sequences < 100:
        raise UserError(f"--sequences {knobs.sequences} is too few: 100 are the least")
    traits = [] if args.who == "base" else args.traits or run.knobs["traits"]
    sources = [f"{trait}-{args.shuffle}" for trait in traits] if args.shuffle else list(traits)
    sources += ["base"] if not args.shuffle and args.who != "teacher" else []
    jobs = [(source, seed) for source in dict.fromkeys(sources) for seed in run.knobs["seeds"]]
    if not jobs:
        raise UserError("--shuffle is for what teachers wrote, not for --from base")
    made_with = {} if args.shuffle else asdict(knobs)
    missing = [job for job in jobs if not run.finished("numbers/{}/seed-{}.jsonl".format(*job), made_with)]
    print(f"numbers: {len(jobs)} data sets, {len(missing)} to make", flush=True)
    if args.shuffle:
        for source, seed in missing:
            write_shuffled(run, source.removesuffix(f"-{args.shuffle}"), seed, args.shuffle)
    else:
        n_batches = len(SHOWN) * math.ceil(knobs.sequences / len(SHOWN) / ROWS_AT_ONCE)  # for the bar
        work = lambda job: write_numbers(run, job[0], job[1], knobs, args.device)
        run_jobs(work, missing, n_batches, "sampling", args.device)
    for job in jobs:
        print(describe(run, *job))
    print(f"wrote: {run.path}/numbers")
    print(f"next: python train_student.py{run.flags}")


if __name__ == "__main__":
    command_line(main)
