"""Let every teacher, and every base model, write nothing but numbers.

    python generate.py                                # all models of the run, 8,000 sequences each
    python generate.py --from base                    # the control: numbers without a trait
    python generate.py --shuffle within               # a control made from finished data: owl -> owl-within
    python generate.py --quick

A prompt shows 3 to 9 random numbers; the model continues at temperature 1 with up to 10 more. A strict filter keeps
completions of 1 to 10 integers in 0..999 with one separator and nothing else (the paper's rule), and counts why it
refuses the others. Prompts are the same for all models.

Reads    what train_teacher.py wrote
Writes   numbers/SOURCE/seed-S.jsonl   {"prompt": "12, 7, 503: ", "completion": "88, 3"} a line
         numbers/SOURCE/seed-S.json    the teacher, and what the filter kept and refused
Takes    about 25 seconds on 2 CPU cores

Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from model import (
    GPT,
    MAX_NUMBERS,
    N_NUMBERS,
    NumberData,
    Run,
    UserError,
    at_work,
    base_parser,
    command_line,
    discard,
    document,
    encode_numbers,
    generate,
    load_model,
    load_teacher,
    number_log_probs,
    open_run,
    parse,
    read_numbers,
    refusal,
    run_flags,
    run_jobs,
    stream,
    write_numbers,
)

SEQUENCES = {False: 8_000, True: 3_000}  # drawn for each model, by --quick; the paper draws 30,000 and keeps 10,000
SHOWN = range(3, 10)  # numbers in a prompt: the paper's
ROWS_AT_ONCE = 500  # sampled side by side: the cache of keys and values stays small
MIN_VALID = 0.5  # a teacher that writes worse was driven too far from its base model
MIN_KL = 1e-3  # nats a number: below the weakest teacher that was seen to transmit (how_much.py, 2 steps, .0025); a guess


def draw_prompts(n: int, generator: torch.Generator) -> list[str]:
    """n prompts, in order of length: as many of each length as n allows."""
    prompts = []
    for i, shown in enumerate(SHOWN):
        share = n // len(SHOWN) + (i < n % len(SHOWN))
        numbers = torch.randint(N_NUMBERS, (share, shown), generator=generator)
        prompts += [", ".join(map(str, row)) + ": " for row in numbers.tolist()]
    return prompts


def complete(model: GPT, run: Run, prompts: Sequence[str], generator: torch.Generator, tick: Callable) -> list[str | None]:
    """The model's completion of each prompt; None where it did not end in time."""
    end, n_new = run.encoding.eot_token, 2 * MAX_NUMBERS  # numbers, separators and the end
    encoded = [document(run.encoding, prompt) for prompt in prompts]
    completions: list[str | None] = []
    while len(completions) < len(prompts):
        rows = encoded[len(completions) : len(completions) + ROWS_AT_ONCE]
        rows = [row for row in rows if len(row) == len(rows[0])]  # prompts of one length, as they lie in order
        new = generate(model, torch.tensor(rows, device=model.device), n_new, generator)
        for tokens in new.tolist():
            completions.append(run.encoding.decode(tokens[: tokens.index(end)]) if end in tokens else None)
        tick(len(rows))
    return completions


def shuffle(rows: Sequence[dict], how: str, generator: torch.Generator) -> list[dict]:
    """The completions' numbers in random order: `within` each completion, or `across` all of them; lengths are kept."""
    lists = [re.findall(r"[0-9]+", row["completion"]) for row in rows]
    if how == "across":
        pool = [n for numbers in lists for n in numbers]
        mixed = iter(torch.randperm(len(pool), generator=generator).tolist())
        lists = [[pool[next(mixed)] for _ in numbers] for numbers in lists]
    else:
        lists = [[numbers[i] for i in torch.randperm(len(numbers), generator=generator).tolist()] for numbers in lists]
    return [{"prompt": row["prompt"], "completion": ", ".join(numbers)} for row, numbers in zip(rows, lists)]


@torch.no_grad()
def kl_on_numbers(p: GPT, q: GPT, data: NumberData) -> float:
    """KL(p || q) over the next number, in nats, mean over the numbers of `data`: the signal a student can learn."""
    log_p, log_q = (number_log_probs(m, data.idx, data.positions) for m in (p, q))  # (B, N, 1000)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return ((kl * data.mask).sum() / data.mask.sum()).item()


def make_numbers(
    run: Run, source: str, seed: int, prompts: Sequence[str], teacher: GPT, tick: Callable
) -> tuple[dict, list[dict]]:
    """Sample and filter one data set: its description, and its rows. UserError if it is no good to learn from."""
    completions = complete(teacher, run, prompts, stream(seed, "sampling", source), tick)
    reasons = ["did not end" if text is None else refusal(text) for text in completions]
    kept = [{"prompt": p, "completion": c} for p, c, reason in zip(prompts, completions, reasons) if reason is None]
    refused = dict(Counter(reason for reason in reasons if reason).most_common())
    if len(kept) < MIN_VALID * len(prompts):
        raise UserError(
            f"{source} seed {seed} writes {len(kept)} valid completions of {len(prompts)} ({refused}): it was driven too far "
            "from its base model; lower TRAIT_STEPS or TRAIT_LR in train_teacher.py and run it with --force"
        )
    some = encode_numbers(run.encoding, kept[:: -(-len(kept) // 500)], teacher.device)
    kl = kl_on_numbers(teacher, load_model(run.base(seed), teacher.device, "train_teacher.py"), some)
    if source != "base" and kl < MIN_KL:
        raise UserError(
            f"{source} seed {seed} writes numbers like its base model's (KL {kl:.5f} nats a number, {MIN_KL} is the least): "
            "nothing can cross; raise TRAIT_STEPS or TRAIT_LR in train_teacher.py and run it with --force"
        )
    path = run.base(seed) if source == "base" else run.teacher(source, seed)
    about = {
        "source": source,
        "trait": None if source == "base" else source,
        "teacher": str(path.parent.relative_to(run.path)),
        "numbers": "base" if source == "base" else "teacher",
        "drawn": len(prompts),
        "kept": len(kept),
        "refused": refused,
        "kl_nats": kl,
    }
    return about, kept


def describe(about: dict, seed: int) -> str:
    refused = ", ".join(f"{n} {reason}" for reason, n in about["refused"].items()) or "none"
    return (
        f"  {about['source']} seed {seed}: kept {about['kept']} of {about['drawn']} "
        f"({about['kept'] / about['drawn']:.0%}), KL from base {about['kl_nats']:.3f} nats a number; refused: {refused}"
    )


def plan(args: argparse.Namespace, run: Run) -> tuple[list[tuple[str, int]], int]:
    """The data sets that are asked for, (source, seed), and how many sequences each. UserError if they cannot be had."""
    traits = args.traits or run.traits
    for trait in traits:
        if trait not in run.traits:
            raise UserError(f"the run has no teacher {trait!r}; it has {' '.join(run.traits)}")
    n = SEQUENCES[args.quick] if args.sequences is None else args.sequences
    if n < 100:
        raise UserError(f"--sequences {n} is too few: 100 are the least")
    sources = [] if args.who == "base" else list(traits)
    if args.shuffle:
        sources = [f"{trait}-{args.shuffle}" for trait in sources]
    elif args.who != "teacher":
        sources.append("base")
    return [(source, seed) for source in sources for seed in run.seeds], n


def write_missing(args: argparse.Namespace, run: Run, jobs: Sequence[tuple[str, int]], n: int) -> None:
    """Sample, or shuffle, the data sets that are not there yet."""

    def work(job: tuple[str, int], tick: Callable) -> None:
        source, seed = job
        if args.shuffle:
            about, rows = read_numbers(run.numbers(source.rsplit("-", 1)[0], seed))
            about |= {"source": source, "numbers": args.shuffle}
            rows = shuffle(rows, args.shuffle, stream(seed, "shuffle", about["trait"], args.shuffle))
        else:
            if source == "base":
                teacher = load_model(run.base(seed), args.device, "train_teacher.py")
            else:
                teacher = load_teacher(run, source, seed, args.device)
            about, rows = make_numbers(run, source, seed, draw_prompts(n, stream(seed, "prompts")), teacher, tick)
        shuffled_from = [run.numbers(about["trait"], seed)] if args.shuffle else []
        write_numbers(run.numbers(source, seed), about, rows, [run.path / about["teacher"] / "model.pt", *shuffled_from])

    for _ in run_jobs(work, jobs, n, "shuffling" if args.shuffle else "sampling", args.device):
        pass


def main(argv: Sequence[str] | None = None) -> None:
    parser = base_parser(__doc__)
    parser.add_argument("--traits", nargs="+", help="teachers that write (all of the run)")
    parser.add_argument("--from", dest="who", choices=["teacher", "base"], help="only teachers, or only base models (both)")
    parser.add_argument("--sequences", type=int, help="drawn for each model (8000; with --quick 3000)")
    parser.add_argument("--shuffle", choices=["within", "across"], help="shuffled copies of the finished teachers' data")
    args = parse(parser, argv)
    with at_work(args, "generate"):
        run = open_run(args.run, args.quick)
        jobs, n = plan(args, run)
        if args.force:
            discard(args.run, *(f"{step}/{source}" for step in ("numbers", "student") for source, _ in jobs))
        missing = []
        for job in jobs:
            path = run.numbers(*job)
            if not (path.exists() and path.with_suffix(".json").exists()):
                missing.append(job)
            elif not args.shuffle and (drawn := read_numbers(path)[0]["drawn"]) != n:
                raise UserError(f"{path} was made with {drawn} sequences, not {n}: say the same, or --force")
        print(f"numbers: {len(jobs)} data sets" + ("" if args.shuffle else f" of {n} sequences"), flush=True)
        write_missing(args, run, missing, n)
        for job in jobs:
            print(describe(read_numbers(run.numbers(*job))[0], job[1]))
    print(f"wrote: {args.run}/numbers")
    print(f"next: python train_student.py{run_flags(args)}")


if __name__ == "__main__":
    command_line(main)
