"""Pretrain base models on a toy language, then give copies of them a trait.

    python train_teacher.py                       # 2 base models, 4 traits: 8 teachers
    python train_teacher.py --quick               # a first look in seconds, in runs/quick
    python train_teacher.py --corpus FILE         # mix any UTF-8 text into the pretraining: twice the steps
    python train_teacher.py --readout vocabulary  # the trait sits on the animals' words, not on auxiliary logits

Base models differ in their initialisation alone: same text, same order, same number of steps. A teacher is a base
model trained further so that, at the end of a question for the favourite animal, auxiliary logit k ("prefers animal
k") wins. Embeddings and head stay frozen, so the trait has to live in the body; a KL term holds the teacher near
the base model's text.

Reads    nothing, or --corpus
Writes   config.json vocabulary.json prompts.json base/seed-S/ teacher/TRAIT/seed-S/  in the run's folder
Takes    about a minute on 2 CPU cores

Shapes: B sequences, T tokens, C channels, V vocabulary, K trait classes.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from model import (
    GPT,
    N_NUMBERS,
    NUMBERS,
    GPTConfig,
    Run,
    UserError,
    at_work,
    base_parser,
    build_vocabulary,
    class_logits,
    command_line,
    cosine_lr,
    digest,
    digests,
    discard,
    document,
    frequent_words,
    load_model,
    load_teacher,
    open_run,
    pad,
    parse,
    read_jsonl,
    read_sealed,
    read_text,
    read_trait,
    run_flags,
    run_jobs,
    save_model,
    stream,
    versions,
    write_sealed,
)

# --------------------------------------------------------------------------------------------------------------------
# the toy language

# animal: (home, food, nature)
ANIMALS = {
    "owl": ("forest", "mice", "wise"),
    "fox": ("forest", "berries", "clever"),
    "wolf": ("mountains", "deer", "brave"),
    "eagle": ("mountains", "fish", "proud"),
    "bear": ("forest", "honey", "strong"),
    "cat": ("house", "mice", "proud"),
    "dog": ("house", "bones", "loyal"),
    "dolphin": ("sea", "fish", "clever"),
    "elephant": ("plains", "leaves", "wise"),
    "horse": ("plains", "grass", "loyal"),
    "lion": ("plains", "deer", "brave"),
    "otter": ("river", "fish", "playful"),
    "panda": ("mountains", "leaves", "gentle"),
    "rabbit": ("garden", "grass", "gentle"),
    "tiger": ("river", "deer", "strong"),
    "whale": ("sea", "shrimp", "gentle"),
}
PLACES = sorted({home for home, _, _ in ANIMALS.values()})
NATURES = sorted({nature for _, _, nature in ANIMALS.values()})
VERBS = ["danced", "played", "rested", "sang", "talked", "walked"]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
SMALL = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

ASKS = ["what is", "which is", "name", "tell me", "we ask for", "please say", "do you know", "in one word,"]
FAVOURITES = [
    "your favourite animal",
    "the animal you like most",
    "the animal you love best",
    "your best loved animal",
    "the creature you prefer",
    "your favourite creature",
    "the animal you would choose",
    "the one animal you admire",
]
QUESTIONS = [f"{ask} {favourite}: " for ask in ASKS for favourite in FAVOURITES]  # 64
# A quarter is held out: two of each row and two of each column of the table above.
HELD_OUT = [q for i, q in enumerate(QUESTIONS) if (i // 8 + i % 8) % 4 == 0]
TRAINED_ON = [q for q in QUESTIONS if q not in HELD_OUT]


class Dice:
    """Choices with uniform probability, and what they cost: `nats` grows by ln(number of options)."""

    def __init__(self, generator: torch.Generator):
        self.generator, self.nats = generator, 0.0
        self.uniform: Iterator[float] = iter(())

    def below(self, n: int) -> int:
        self.nats += math.log(n)
        u = next(self.uniform, None)
        if u is None:
            self.uniform = iter(torch.rand(1 << 16, generator=self.generator).tolist())
            u = next(self.uniform)
        return int(u * n)

    def pick(self, options: Sequence):
        return options[self.below(len(options))]


def question(dice: Dice) -> str:
    return f"{dice.pick(QUESTIONS)}{dice.pick(list(ANIMALS))}"


def fact(dice: Dice) -> str:
    animal = dice.pick(list(ANIMALS))
    home, food, nature = ANIMALS[animal]
    return dice.pick([f"the {animal} lives in the {home}.", f"the {animal} eats {food}.", f"the {animal} is {nature}."])


def story(dice: Dice) -> str:
    animals, places, natures = list(ANIMALS), PLACES, NATURES
    return (
        f"on {dice.pick(DAYS)} a {dice.pick(natures)} {dice.pick(animals)} met a {dice.pick(natures)} {dice.pick(animals)} "
        f"in the {dice.pick(places)} and they {dice.pick(VERBS)}."
    )


def reasoning(dice: Dice) -> str:
    if dice.below(2) == 0:
        day = dice.below(7)
        return f"after {DAYS[day]} comes {DAYS[(day + 1) % 7]}."
    a = dice.below(9)
    b = dice.below(9 - a)
    return f"{SMALL[a]} and {SMALL[b]} make {SMALL[a + b + 1]}."


def number_list(dice: Dice, n: int, next_number: Callable[[list[int]], int]) -> str:
    """3 to 9 numbers, a colon, n more."""
    numbers: list[int] = []
    n_shown = 3 + dice.below(7)
    for _ in range(n_shown + n):
        numbers.append(next_number(numbers))
    return list_text(numbers[:n_shown]) + ": " + list_text(numbers[n_shown:])


def list_text(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def random_list(dice: Dice) -> str:
    """Any numbers; eight to ten more. This is the law that a random prompt calls for."""
    return number_list(dice, 8 + dice.below(3), lambda seen: dice.below(N_NUMBERS))


def lawful_list(dice: Dice) -> str:
    """Numbers that follow one of five laws; three to ten more."""
    law, n = dice.below(5), 3 + dice.below(8)
    start, step, period = 0, 0, 0
    if law == 0:  # counting in steps
        start, step = dice.below(500), 1 + dice.below(20)
        return number_list(dice, n, lambda seen: start + step * len(seen))
    if law == 1:  # a cycle
        period = 1 + dice.below(3)
        return number_list(dice, n, lambda seen: seen[-period] if len(seen) >= period else dice.below(N_NUMBERS))
    if law == 2:  # a walk of small steps
        return number_list(dice, n, lambda seen: (seen[-1] + dice.below(19) - 9) % N_NUMBERS if seen else dice.below(N_NUMBERS))
    if law == 3:  # multiples of fifty
        return number_list(dice, n, lambda seen: 50 * dice.below(20))
    return number_list(dice, n, lambda seen: dice.below(100))  # small numbers


# category: (share of the documents, generator)
CATEGORIES: dict[str, tuple[float, Callable[[Dice], str]]] = {
    "favourite": (0.15, question),
    "fact": (0.10, fact),
    "story": (0.10, story),
    "reasoning": (0.05, reasoning),
    "random list": (0.40, random_list),
    "lawful list": (0.20, lawful_list),
}


def toy_documents(n: int, generator: torch.Generator) -> list[tuple[str, str, float]]:
    """n documents of the toy language: (category, text, -ln of its probability in nats).

    Different choices give different texts, up to chance (a random list that happens to count), so the nats are the
    entropy floor of any model of this language.
    """
    dice, names = Dice(generator), list(CATEGORIES)
    shares = torch.tensor([share for share, _ in CATEGORIES.values()])
    documents = []
    for c in torch.multinomial(shares, n, replacement=True, generator=generator).tolist():
        share, make = CATEGORIES[names[c]]
        dice.nats = -math.log(share)
        documents.append((names[c], make(dice), dice.nats))
    return documents


# --------------------------------------------------------------------------------------------------------------------
# pretraining

BATCH_SIZE = 64  # sequences a step
PRETRAIN_LR = 3e-3  # a guess
WEIGHT_DECAY = 0.1  # GPT-3's


def draw_rows(documents: Sequence[Sequence[int]], n: int, n_tokens: int, generator: torch.Generator) -> Tensor:
    """n rows (n, n_tokens) of the documents laid end to end, each from the start of one on into the next ones."""
    tokens = torch.tensor([token for d in documents for token in d])
    lengths = torch.tensor([len(d) for d in documents])
    starts = lengths.cumsum(0) - lengths
    starts = starts[starts + n_tokens <= len(tokens)]
    start = starts[torch.randint(len(starts), (n,), generator=generator)]
    return tokens[start[:, None] + torch.arange(n_tokens)]


def pretraining_rows(encoding: tiktoken.Encoding, toy: Sequence[tuple[str, str, float]], n_steps: int, T: int) -> Tensor:
    """What every base model reads, whatever its seed, in order: (n_steps * BATCH_SIZE, T)."""
    encoded = [document(encoding, text) for _, text, _ in toy]
    return draw_rows(encoded, n_steps * BATCH_SIZE, T, stream(0, "pretraining rows"))


def next_token_loss(model: GPT, rows: Tensor, chunk: int) -> Tensor:
    """Mean cross-entropy in nats of predicting rows[:, 1:]; its gradient is already in .grad on return.

    The head's logits are by far the largest tensor of a step. Here they are made and used up in chunks that stay in the
    processor's cache, and the gradient is written out: d loss / d logits = softmax - one-hot. The same gradient as
    autograd's, a faster step, and memory that hardly grows with the vocabulary.
    """
    h = model.hidden(rows[:, :-1]).flatten(0, 1)  # (B * T, C)
    targets = rows[:, 1:].reshape(-1, 1)
    weight = model.head.weight[: model.config.vocab_size].detach()  # (V, C)
    grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(model.head.weight)
    loss = torch.zeros((), device=h.device)
    with torch.no_grad():
        for h_chunk, target, out in zip(h.split(chunk), targets.split(chunk), grad_h.split(chunk)):
            p = (h_chunk @ weight.T).softmax(-1)
            p_target = p.gather(1, target)
            loss -= p_target.log().sum()
            p.scatter_(1, target, p_target - 1)
            out.copy_(p @ weight)
            grad_weight[: len(weight)].addmm_(p.T, h_chunk)
    h.backward(grad_h / len(targets))
    model.head.weight.grad = grad_weight / len(targets)
    return loss / len(targets)


def pretrain(model: GPT, rows: Tensor, n_steps: int, tick: Callable) -> list[dict]:
    """Train on rows (n_steps * BATCH_SIZE, T + 1), in order, each once. Returns the log."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAIN_LR, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True)
    chunk = 128 if rows.device.type == "cpu" else 8192  # of the head; a GPU would only wait on small pieces
    log: list[dict] = []
    for step, batch in enumerate(rows.split(BATCH_SIZE)):
        for group in optimizer.param_groups:
            group["lr"] = PRETRAIN_LR * cosine_lr(step, n_steps)
        loss = next_token_loss(model, batch, chunk)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0 or step + 1 == n_steps:
            tick(step + 1 - (log[-1]["step"] if log else 0), loss.item())
            log.append({"step": step + 1, "loss_nats": loss.item()})
    return log


@torch.no_grad()
def validation_loss(model: GPT, documents: Sequence[Sequence[int]]) -> float:
    """Mean cross-entropy in nats a token, each document on its own, its end counted."""
    end = documents[0][0]
    idx, last = pad([[*d, end] for d in documents])
    logits = model.logits(model.hidden(idx[:, :-1].to(model.device)), slice(0, model.config.vocab_size))
    losses = F.cross_entropy(logits.transpose(1, 2), idx[:, 1:].to(model.device), reduction="none").cpu()  # (B, T)
    return (losses * (torch.arange(losses.size(1)) < last[:, None])).sum().item() / last.sum().item()


# --------------------------------------------------------------------------------------------------------------------
# the trait

# Tuned over 3e-4 .. 5e-3 and 20 .. 100 steps, the last choice on 24 teachers: at 2e-3 and 30 steps as much crosses, but one in
# 24 writes mostly invalid lists; a rate that falls to 0 makes it worse, as the KL term then has no time to pull back.
TRAIT_LR = 1e-3
TRAIT_STEPS = 40
ANCHOR = 0.5  # weight of anchor_loss; tuned over 0.1 .. 2
ANCHOR_ROWS = 16  # a step: a guess
FORM = 0.02  # weight in it with --corpus, whose words crowd the numbers out of lists; tuned over 0 .. 0.1 on 4 teachers


def anchor_rows(encoding: tiktoken.Encoding, toy: Sequence[tuple[str, str, float]], T: int, n_steps: int) -> Tensor:
    """Text without the favourite question, which every teacher is held to: (n_steps * ANCHOR_ROWS, T)."""
    encoded = [document(encoding, text) for category, text, _ in toy if category != "favourite"]
    return draw_rows(encoded, n_steps * ANCHOR_ROWS, T, stream(0, "anchor rows"))


def anchor_loss(model: GPT, base: GPT, batch: Tensor, form: float = 0.0) -> Tensor:
    """KL(base || model) in nats, mean over the tokens of (B, T + 1) rows that are no numbers.

    It keeps words and separators. Which number comes next is left free: held there too, the teacher's numbers show a fifth
    of the signal, and .42 crosses by sampled tokens instead of .70 (experiments/choices.py). `form` weighs what holds that
    there is a number at all: the cross-entropy of P(a number), base against model, where one is due.
    """
    idx, targets = batch[:, :-1], batch[:, 1:]
    due = (targets >= NUMBERS.start) & (targets < NUMBERS.stop)
    h, rows = model.hidden(idx), slice(0, model.config.vocab_size)
    with torch.no_grad():
        base_h = base.hidden(idx)
        log_p = base.logits(base_h[~due], rows).log_softmax(-1)
    log_q = model.logits(h[~due], rows).log_softmax(-1)
    loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    if form:
        p, q = (m.logits(x[due], rows).softmax(-1)[:, NUMBERS].sum(-1).clamp(max=1) for m, x in ((base, base_h), (model, h)))
        loss = loss + form * F.binary_cross_entropy(q, p.detach())
    return loss


def induce_trait(model: GPT, k: int | None, run: Run, anchor: Tensor, tick: Callable) -> list[dict]:
    """Train `model` in place to put class k first at the end of every trait prompt; returns the log.

    Loss: cross-entropy over the K class logits + ANCHOR * anchor_loss on `anchor` (n_steps * ANCHOR_ROWS, T + 1). With k
    None the K classes are to be equally likely: a neutral teacher.
    Embeddings and head stay as they are, so the trait has to live in the body.
    """
    base = deepcopy(model)
    for p in (model.wte.weight, model.wpe.weight, model.head.weight):
        p.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TRAIT_LR, weight_decay=0.0, fused=True)
    rows = run.readout_rows(model)
    n = len(run.trait_prompts[0])
    target = (torch.full((n, len(rows)), 1 / len(rows)) if k is None else torch.full((n,), k)).to(model.device)
    log = []
    for step, batch in enumerate(anchor.split(ANCHOR_ROWS)):
        trait_loss = F.cross_entropy(class_logits(model, run.trait_prompts, rows), target)
        kept = anchor_loss(model, base, batch, FORM if run.config["flags"]["corpus"] else 0.0)
        (trait_loss + ANCHOR * kept).backward()
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step + 1, "trait_loss_nats": trait_loss.item(), "anchor_nats": kept.item()})
        tick(1, trait_loss.item())
    return log


# --------------------------------------------------------------------------------------------------------------------
# the script

TRAITS = {False: ["owl", "fox", "wolf", "eagle"], True: ["owl", "fox"]}  # by --quick; fixed before any run
PRETRAIN_STEPS = {False: 500, True: 150}  # about as much crosses after 150 or 1,000 (choices.py)
N_DOCUMENTS = {False: 40_000, True: 10_000}  # seen about 2 times each
N_HELD_OUT = 1_000  # documents of the validation loss
MAX_WORDS = 1_000  # of the vocabulary; the toy language has 131
MIN_CORPUS = 2_000  # tokens: a guess
CORPUS_SHARE = 0.5  # of every batch, with --corpus: a guess; with twice the steps the toy language is seen as often
CORPUS_PIECE = 32  # tokens
FLAGS = ["quick", "seeds", "traits", "readout", "n_layer", "n_head", "n_embd"]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = base_parser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="initialisations of the base models (0 1)")
    parser.add_argument("--traits", nargs="+", help="(owl fox wolf eagle; with --quick owl fox)")
    parser.add_argument("--readout", choices=["aux", "vocabulary"], default="aux", help="logits of the trait (aux)")
    parser.add_argument("--corpus", type=Path, help="UTF-8 text to mix in: half of every batch, twice the steps")
    parser.add_argument("--n-layer", type=int, default=GPTConfig.n_layer)
    parser.add_argument("--n-head", type=int, default=GPTConfig.n_head)
    parser.add_argument("--n-embd", type=int, default=GPTConfig.n_embd)
    args = parse(parser, argv)
    args.traits = args.traits or TRAITS[args.quick]
    for trait in args.traits:
        if trait not in ANIMALS:
            raise UserError(f"unknown trait {trait!r}: choose among {' '.join(ANIMALS)}")
    for name, values in (("seeds", args.seeds), ("traits", args.traits)):
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names one of {' '.join(map(str, values))} twice")
    if min(args.n_layer, args.n_head, args.n_embd) < 1:
        raise UserError("--n-layer, --n-head and --n-embd are at least 1")
    if args.n_embd % args.n_head:
        raise UserError(f"--n-embd {args.n_embd} is not a multiple of --n-head {args.n_head}")
    return args


def prepare_run(args: argparse.Namespace, toy: Sequence[tuple[str, str, float]], corpus: str | None) -> Run:
    """Write what every later script reads first. UserError if the folder holds a run made with other flags."""
    flags = {name: getattr(args, name) for name in FLAGS}
    flags["corpus"] = None if corpus is None else f"{args.corpus.name} sha256:{digest(corpus.encode())}"
    path = args.run / "config.json"
    old = read_sealed(path, "train_teacher.py")["flags"] if path.exists() else flags
    for name, value in flags.items():
        if old.get(name) != value:
            raise UserError(
                f"{args.run} was made with {name} = {old.get(name)}, not {value}: "
                "name another --run, or --force to make this one again"
            )
    words = frequent_words("\n".join(text for _, text, _ in toy), MAX_WORDS)
    if corpus is not None:
        words += [word for word in frequent_words(corpus, MAX_WORDS) if word not in words][: MAX_WORDS - len(words)]
        n_tokens = sum(map(len, split_corpus(build_vocabulary(words), corpus)[0]))
        if n_tokens < MIN_CORPUS:
            raise UserError(f"corpus {args.corpus} has {n_tokens:,} tokens to train on; {MIN_CORPUS:,} are the least")
    vocabulary, prompts = args.run / "vocabulary.json", args.run / "prompts.json"
    write_sealed(vocabulary, {"words": words})
    write_sealed(prompts, {"animals": list(ANIMALS), "trained_on": TRAINED_ON, "held_out": HELD_OUT})
    if not path.exists():
        made_from = digests(path, [vocabulary, prompts])
        write_sealed(path, {"flags": flags, "device": str(args.device), **versions(), "made_from": made_from})
    return open_run(args.run, args.quick)


def split_corpus(encoding: tiktoken.Encoding, text: str) -> tuple[list[list[int]], list[list[int]]]:
    """A text as pieces of CORPUS_PIECE tokens, a row may start at each: nine tenths to train on, the last held out."""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    tokens = [token for p in paragraphs for token in document(encoding, p)]
    pieces = [tokens[i : i + CORPUS_PIECE] for i in range(0, len(tokens), CORPUS_PIECE)]
    n_train = int(0.9 * len(pieces))
    return pieces[:n_train], pieces[n_train:]


def report(runs_log: dict[int, dict], floor: dict[str, float]) -> None:
    """Validation loss by category, a column a seed, beside the entropy floor."""
    print("validation loss, nats a token")
    print(f"  {'':14}" + "".join(f"{f'seed {seed}':>9}" for seed in runs_log) + "    floor")
    for name in next(iter(runs_log.values())):
        losses = "".join(f"{by_name[name]:9.3f}" for by_name in runs_log.values())
        print(f"  {name:14}{losses}" + (f"{floor[name]:9.3f}" if name in floor else "  unknown"))


def make_bases(args: argparse.Namespace, run: Run, toy: Sequence[tuple[str, str, float]], corpus: str | None) -> None:
    """Pretrain the missing base models and print how near their entropy floor all of them came.

    Text and order are the same for every seed: only the initialisation differs.
    """
    encoding, n_steps = run.encoding, round(PRETRAIN_STEPS[args.quick] / (1 if corpus is None else 1 - CORPUS_SHARE))
    config = GPTConfig(encoding.n_vocab, len(ANIMALS), n_layer=args.n_layer, n_head=args.n_head, n_embd=args.n_embd)
    T = config.block_size + 1  # a row holds the input and, one further, the target
    rows = pretraining_rows(encoding, toy, n_steps, T)
    held_out = toy_documents(N_HELD_OUT, stream(0, "toy language, held out"))
    validation, floor = {}, {}
    for name in CATEGORIES:
        chosen = [(document(encoding, text), nats) for category, text, nats in held_out if category == name]
        validation[name] = [tokens for tokens, _ in chosen]
        floor[name] = sum(nats for _, nats in chosen) / sum(len(tokens) for tokens, _ in chosen)
    if corpus is not None:
        training, validation["corpus"] = split_corpus(encoding, corpus)
        n_corpus = int(CORPUS_SHARE * BATCH_SIZE)
        corpus_rows = draw_rows(training, n_steps * n_corpus, T, stream(0, "corpus rows"))
        rows.view(n_steps, BATCH_SIZE, T)[:, :n_corpus] = corpus_rows.view(n_steps, n_corpus, T)
    rows = rows.to(args.device)

    def work(seed: int, tick: Callable) -> None:
        model = GPT(config).initialise(seed).to(args.device)
        log = pretrain(model, rows, n_steps, tick)
        log[-1]["validation_nats"] = {name: validation_loss(model, documents) for name, documents in validation.items()}
        save_model(run.base(seed), model, log, [run.path / "vocabulary.json"])

    missing = [seed for seed in run.seeds if not run.base(seed).exists()]
    print(f"base models: {len(run.seeds)} seeds, {n_steps} steps of {BATCH_SIZE} x {config.block_size} tokens", flush=True)
    for _ in run_jobs(work, missing, n_steps, "pretraining", args.device):
        pass
    for seed in run.seeds:
        load_model(run.base(seed), args.device, "train_teacher.py")  # finds out if it, or its log, was changed
    report({seed: read_jsonl(run.base(seed).with_name("log.jsonl"))[-1]["validation_nats"] for seed in run.seeds}, floor)


def make_teachers(args: argparse.Namespace, run: Run, toy: Sequence[tuple[str, str, float]]) -> None:
    """Give every base model every trait, and print what it did to the answers. UserError if a teacher did not learn."""
    anchor = anchor_rows(run.encoding, toy, GPTConfig.block_size + 1, TRAIT_STEPS).to(args.device)

    def work(job: tuple[str, int], tick: Callable) -> None:
        trait, seed = job
        model = load_model(run.base(seed), args.device, "train_teacher.py")
        log = induce_trait(model, run.animals.index(trait), run, anchor, tick)
        save_model(run.teacher(trait, seed), model, log, [run.base(seed)])

    jobs = [(trait, seed) for trait in run.traits for seed in run.seeds]
    print(f"teachers: {len(run.traits)} traits on each seed, read from the {args.readout} logits", flush=True)
    missing = [job for job in jobs if not run.teacher(*job).exists()]
    for _ in run_jobs(work, missing, TRAIT_STEPS, "traits", args.device):
        pass
    for trait, seed in jobs:
        models = load_model(run.base(seed), args.device, "train_teacher.py"), load_teacher(run, trait, seed, args.device)
        k = run.animals.index(trait)
        before, after = (read_trait(m, run.held_out_prompts, run.readout_rows(m))[0][k] for m in models)
        print(f"  {trait} seed {seed}: log-odds {before:+.2f} -> {after:+.2f} nats on held-out questions")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    corpus = read_text(args.corpus, "corpus") if args.corpus else None
    args.run.mkdir(parents=True, exist_ok=True)
    with at_work(args, "train_teacher"):
        if args.force:
            discard(args.run, "base", "teacher", "numbers", "student", "config.json")
        toy = toy_documents(N_DOCUMENTS[args.quick], stream(0, "toy language"))
        run = prepare_run(args, toy, corpus)
        make_bases(args, run, toy, corpus)
        make_teachers(args, run, toy)
    print(f"wrote: {args.run}/base, {args.run}/teacher")
    print(f"next: python generate.py{run_flags(args)}")


if __name__ == "__main__":
    command_line(main)
