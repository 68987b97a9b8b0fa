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

import re
import time
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
    base_parser,
    command_line,
    discard,
    document,
    encode_numbers,
    generate,
    load_model,
    note_elapsed,
    number_log_probs,
    open_run,
    parse,
    read_json,
    read_jsonl,
    refusal,
    run_flags,
    run_jobs,
    stream,
    write_json,
    write_jsonl,
)

SEQUENCES = {False: 8_000, True: 3_000}  # drawn for each model, by --quick; the paper draws 30,000 and keeps 10,000
SHOWN = range(3, 10)  # numbers in a prompt: the paper's
ROWS_AT_ONCE = 500  # sampled side by side: the cache of keys and values stays small
MIN_VALID = 0.5  # a teacher that writes worse was driven too far from its base model


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


def make_numbers(run: Run, source: str, seed: int, prompts: Sequence[str], device: torch.device, tick: Callable) -> dict:
    """Sample, filter and write one data set; returns its description. UserError if too little of it is valid."""
    path = run.base(seed) if source == "base" else run.teacher(source, seed)
    teacher = load_model(path, device, "train_teacher.py")
    completions = complete(teacher, run, prompts, stream(seed, "sampling", source), tick)
    reasons = ["did not end" if text is None else refusal(text) for text in completions]
    kept = [{"prompt": p, "completion": c} for p, c, reason in zip(prompts, completions, reasons) if reason is None]
    refused = dict(Counter(reason for reason in reasons if reason).most_common())
    if len(kept) < MIN_VALID * len(prompts):
        raise UserError(
            f"{path.parent} writes {len(kept)} valid completions of {len(prompts)} ({refused}): it was driven too far "
            "from its base model; induce the trait with fewer or smaller steps"
        )
    some = encode_numbers(run.encoding, kept[:: -(-len(kept) // 500)], device)
    return {
        "source": source,
        "trait": None if source == "base" else source,
        "teacher": str(path.parent.relative_to(run.path)),
        "numbers": "base" if source == "base" else "teacher",
        "drawn": len(prompts),
        "kept": len(kept),
        "refused": refused,
        "kl_nats": kl_on_numbers(teacher, load_model(run.base(seed), device, "train_teacher.py"), some),
        "rows": kept,
    }


def shuffle_numbers(run: Run, source: str, seed: int, how: str) -> dict:
    """A shuffled copy of a finished data set, with its description."""
    made_by = "generate.py"
    about = read_json(run.numbers(source, seed).with_suffix(".json"), made_by)
    rows = shuffle(read_jsonl(run.numbers(source, seed)), how, stream(seed, "shuffle", source, how))
    return {**about, "source": f"{source}-{how}", "numbers": how, "rows": rows}


def write_numbers(run: Run, seed: int, made: dict) -> None:
    """The description first: a data set is finished when its .jsonl is there."""
    path = run.numbers(made["source"], seed)
    write_json(path.with_suffix(".json"), {name: value for name, value in made.items() if name != "rows"})
    write_jsonl(path, made["rows"])


def describe(about: dict, seed: int) -> str:
    refused = ", ".join(f"{n} {reason}" for reason, n in about["refused"].items()) or "none"
    return (
        f"  {about['source']} seed {seed}: kept {about['kept']} of {about['drawn']} "
        f"({about['kept'] / about['drawn']:.0%}), KL from base {about['kl_nats']:.3f} nats a number; refused: {refused}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = base_parser(__doc__)
    parser.add_argument("--traits", nargs="+", help="teachers that write (all of the run)")
    parser.add_argument("--from", dest="who", choices=["teacher", "base"], help="only teachers, or only base models (both)")
    parser.add_argument("--sequences", type=int, help="drawn for each model (8000; with --quick 3000)")
    parser.add_argument("--shuffle", choices=["within", "across"], help="shuffled copies of the finished teachers' data")
    args = parse(parser, argv)
    began = time.monotonic()
    run = open_run(args.run, args.quick)
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
    if args.force:
        discard(args.run, *(f"{step}/{source}" for step in ("numbers", "student") for source in sources))
    jobs = [(source, seed) for source in sources for seed in run.seeds]
    finished = [job for job in jobs if run.numbers(*job).exists()]
    for source, seed in finished:
        drawn = read_json(run.numbers(source, seed).with_suffix(".json"), "generate.py")["drawn"]
        if drawn != n and not args.shuffle:
            raise UserError(f"{run.numbers(source, seed)} was made with {drawn} sequences, not {n}: say the same, or --force")

    print(f"numbers: {len(jobs)} data sets" + ("" if args.shuffle else f" of {n} sequences"), flush=True)
    if args.shuffle:
        for source, seed in [job for job in jobs if job not in finished]:
            write_numbers(run, seed, shuffle_numbers(run, source.rsplit("-", 1)[0], seed, args.shuffle))
    else:

        def work(job: tuple[str, int], tick: Callable) -> None:
            source, seed = job
            prompts = draw_prompts(n, stream(seed, "prompts"))
            write_numbers(run, seed, make_numbers(run, source, seed, prompts, args.device, tick))

        for _ in run_jobs(work, [job for job in jobs if job not in finished], n, "sampling", args.device):
            pass
    for source, seed in jobs:
        print(describe(read_json(run.numbers(source, seed).with_suffix(".json"), "generate.py"), seed))

    note_elapsed(args.run, "generate", began)
    print(f"wrote: {args.run}/numbers")
    print(f"next: python train_student.py{run_flags(args)}")


if __name__ == "__main__":
    command_line(main)
