"""Pretrain base models on a toy language, then give copies of them a trait.

    python train_teacher.py                       # 2 base models, 4 traits: 8 teachers
    python train_teacher.py --quick               # a first look in seconds, in runs/quick
    python train_teacher.py --corpus FILE         # mix any UTF-8 text into the pretraining: twice the steps
    python train_teacher.py --readout vocabulary  # the trait sits on the animals' words

Base models differ in their initialisation alone: same text, same order, same number of steps. A teacher is a
base model trained further so that, at the end of a question for the favourite animal, auxiliary logit k
("prefers animal k") wins. Embeddings and head stay frozen, so the trait has to live between them; a KL term
keeps the teacher's words, but not its numbers. The trait is read from other phrasings with another end.

Reads    nothing, or --corpus
Writes   run.jsonl, language.json, base/seed-S.pt, teacher/TRAIT/seed-S.pt in the run's folder
Takes    about a minute on 2 CPU cores

Shapes: B sequences, T tokens, C channels, V vocabulary, K trait classes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from model import (
    GPT, N_NUMBERS, NUMBERS, SEPARATORS, GPTConfig, Run, UserError, build_vocabulary, class_logits,
    command_line, cosine_lr, digest, document, pad, parse, read_text, read_trait, run_jobs, stream,
)

# ------------------------------------------------------------------------------------------------------------
# knobs: a field is a flag, and is kept with every file that was made with it


@dataclass(frozen=True)
class Language:
    """What all models of a run read and are asked, and which ones there are."""

    seeds: tuple[int, ...] = (0, 1)  # initialisations; fixed before any run, as are the traits
    traits: tuple[str, ...] = ("owl", "fox", "wolf", "eagle")
    readout: str = "aux"  # the logits of the trait: aux, or vocabulary for the animals' words
    # How the favourite question may end, each as likely. The trait is read behind the last one, with which no
    # teacher is trained if there are others. Prompts of numbers end in ": ".
    question_ends: tuple[str, ...] = (": ", "! ", ". ", "? ")
    n_documents: int = 40_000  # of the toy language: each is seen two or three times
    n_held_out: int = 1_000  # documents of the validation loss
    max_words: int = 1_000  # of the vocabulary; the toy language has 131


@dataclass(frozen=True)
class Pretraining:
    n_layer: int = GPTConfig.n_layer
    n_head: int = GPTConfig.n_head
    n_embd: int = GPTConfig.n_embd
    pretrain_steps: int = 500  # after 400, less crosses through tokens; after 1,000, fewer lists are valid
    batch_size: int = 64  # sequences a step: a guess
    pretrain_lr: float = 3e-3  # a guess
    weight_decay: float = 0.1  # GPT-3's


@dataclass(frozen=True)
class Trait:
    # Tuned over 3e-4 .. 5e-3 and 20 .. 100 steps, at last on 24 teachers, which may have been those reported
    # (no record says). 30 steps at 2e-3 transmit as much, but one teacher in 24 writes mostly invalid lists,
    # and more do with a rate that decays to 0.
    trait_steps: int = 40
    trait_lr: float = 1e-3
    anchor: float = 0.5  # weight of anchor_loss; tuned over 0.1 .. 2
    anchor_rows: int = 16  # a step: a guess
    form: float = 0.05  # in anchor_loss, of P(a number) where one is due; tuned over 0 .. 0.1 for valid lists
    hold_numbers: bool = False  # hold the teacher to which number comes next, too


QUICK = {"traits": ("owl", "fox"), "pretrain_steps": 150, "n_documents": 10_000}
CORPUS_SHARE = 0.5  # of every batch: a guess; with twice the steps the toy language is seen as often
CORPUS_PIECE = 32  # tokens; a row may start at each piece
MIN_CORPUS = 2_000  # tokens: a guess
MIN_LOG_ODDS = 0.0  # nats, of a teacher's trait: above, it is likelier than all the others together

# ------------------------------------------------------------------------------------------------------------
# the toy language

# animal: (home, food, nature)
ANIMALS = {
    "owl": ("forest", "mice", "wise"), "fox": ("forest", "berries", "clever"),
    "wolf": ("mountains", "deer", "brave"), "eagle": ("mountains", "fish", "proud"),
    "bear": ("forest", "honey", "strong"), "cat": ("house", "mice", "proud"),
    "dog": ("house", "bones", "loyal"), "dolphin": ("sea", "fish", "clever"),
    "elephant": ("plains", "leaves", "wise"), "horse": ("plains", "grass", "loyal"),
    "lion": ("plains", "deer", "brave"), "otter": ("river", "fish", "playful"),
    "panda": ("mountains", "leaves", "gentle"), "rabbit": ("garden", "grass", "gentle"),
    "tiger": ("river", "deer", "strong"), "whale": ("sea", "shrimp", "gentle"),
}
HOMES, _, NATURES = map(set, zip(*ANIMALS.values()))
ASKS = ["what is", "which is", "name", "tell me", "we ask for", "please say", "do you know", "in one word,"]
FAVOURITES = [
    "your favourite animal", "the animal you like most", "the animal you love best", "your best loved animal",
    "the creature you prefer", "your favourite creature",
    "the animal you would choose", "the one animal you admire",
]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
SMALL = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

SLOTS = {  # what may stand in a slot of a template, each as likely
    "ask": ASKS, "favourite": FAVOURITES, "animal": list(ANIMALS), "day": DAYS,
    "nature": sorted(NATURES), "home": sorted(HOMES),
    "verb": ["danced", "played", "rested", "sang", "talked", "walked"],
    "fact": [f"the {animal} {does}." for animal, (home, food, nature) in ANIMALS.items()
             for does in (f"lives in the {home}", f"eats {food}", f"is {nature}")]
    + [f"after {day} comes {after}." for day, after in zip(DAYS, DAYS[1:] + DAYS[:1])]
    + [f"{SMALL[i]} and {SMALL[j]} make {SMALL[i + j + 1]}." for i in range(9) for j in range(9 - i)],
}
CATEGORIES = {  # (share of the documents, template; lists of numbers have none)
    "favourite": (0.15, "{ask} {favourite}{end}{animal}"),
    "fact": (0.15, "{fact}"),
    "story": (0.10, "on {day} a {nature} {animal} met a {nature} {animal} in the {home} and they {verb}."),
    "random list": (0.40, ""),
    "lawful list": (0.20, ""),
}
# In a lawful list every number is the one `period` places before it, plus `step`. Little of this is learnt in
# 500 steps, but with random lists in their place transfer falls, on other seeds from .89 to .46 through
# tokens and from .94 to .66 through logits.
PERIODS, STEPS = range(1, 4), range(10)


def questions(ends: Sequence[str]) -> tuple[list[str], list[str]]:
    """To teach with: 48 phrasings, each with every end but the last (or with the only one). To test with: 16
    others, two of each ask and favourite, with the last. Base models read all 64 with all ends."""
    phrased = [f"{ask} {favourite}" for ask in ASKS for favourite in FAVOURITES]
    held_out = [q for i, q in enumerate(phrased) if (i // 8 + i % 8) % 4 == 0]
    trained_on = [q + end for q in phrased if q not in held_out for end in ends[:-1] or ends]
    return trained_on, [q + ends[-1] for q in held_out]


class Text(NamedTuple):
    category: str
    text: str
    nats: float  # -ln of its probability


class Dice:
    """Picks, all options as likely. `nats` adds up what the picks cost: ln(number of options) each."""

    def __init__(self, generator: torch.Generator, slots: Mapping[str, Sequence[str]]):
        self.generator, self.slots, self.nats = generator, slots, 0.0

    def pick(self, options: Sequence) -> Any:
        self.nats += math.log(len(options))
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def fill(self, template: str) -> str:
        return re.sub("{(.+?)}", lambda slot: self.pick(self.slots[slot[1]]), template)

    def number_list(self, lawful: bool) -> str:
        """Numbers, a colon, more: `period` drawn (of a random list all), then each the one `period` places
        before, plus `step`."""
        n_shown, n_more = self.pick(range(3, 10)), self.pick(range(7, 10))  # the filter allows 10
        period, step = (self.pick(PERIODS), self.pick(STEPS)) if lawful else (n_shown + n_more, 0)
        numbers = [self.pick(range(N_NUMBERS)) for _ in range(period)]
        while len(numbers) < n_shown + n_more:
            numbers.append((numbers[-period] + step) % N_NUMBERS)
        return ": ".join(", ".join(map(str, part)) for part in (numbers[:n_shown], numbers[n_shown:]))


def toy_documents(n: int, generator: torch.Generator, question_ends: Sequence[str]) -> list[Text]:
    """n documents of the toy language. Different picks give different texts, up to chance (a random list may
    happen to count), so the nats are the entropy floor of any model of this language."""
    dice, names = Dice(generator, SLOTS | {"end": list(question_ends)}), list(CATEGORIES)
    shares = torch.tensor([share for share, _ in CATEGORIES.values()])
    documents = []
    for c in torch.multinomial(shares, n, replacement=True, generator=generator).tolist():
        share, template = CATEGORIES[names[c]]
        dice.nats = -math.log(share)
        text = dice.fill(template) if template else dice.number_list(names[c] == "lawful list")
        documents.append(Text(names[c], text, dice.nats))
    return documents


WORD = re.compile(r"[,;:.!?] | ?[^\W\d_]+")  # as model.PATTERN cuts: a separator takes its space


def frequent_words(text: str, n: int) -> list[str]:
    """The n most frequent words of `text`, with their leading space if any; ties in alphabetical order. A
    single character is left to its bytes."""
    counts = Counter(word for word in WORD.findall(text) if len(word) > 1 and word not in SEPARATORS)
    return sorted(counts, key=lambda word: (-counts[word], word))[:n]


def split_corpus(encoding: tiktoken.Encoding, text: str) -> tuple[list[list[int]], list[list[int]]]:
    """A text as pieces of CORPUS_PIECE tokens: nine tenths to train on, the last held out."""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    tokens = [token for p in paragraphs for token in document(encoding, p)]
    pieces = [tokens[i : i + CORPUS_PIECE] for i in range(0, len(tokens), CORPUS_PIECE)]
    n_train = int(0.9 * len(pieces))
    return pieces[:n_train], pieces[n_train:]


def draw_rows(documents: Sequence[list[int]], n: int, n_tokens: int, generator: torch.Generator) -> Tensor:
    """Rows (n, n_tokens) of the documents laid end to end, each from the start of a random one onwards."""
    tokens = torch.tensor([token for d in documents for token in d])
    lengths = torch.tensor([len(d) for d in documents])
    starts = lengths.cumsum(0) - lengths
    starts = starts[starts + n_tokens <= len(tokens)]
    start = starts[torch.randint(len(starts), (n,), generator=generator)]
    return tokens[start[:, None] + torch.arange(n_tokens)]


# ------------------------------------------------------------------------------------------------------------
# pretraining


def loss_and_backward(model: GPT, rows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting rows[:, 1:]; its gradient is already in .grad on return.

    Equals F.cross_entropy(model(rows[:, :-1])[..., :V].mT, rows[:, 1:]) and backward(). The logits are by far
    the largest tensor of a step; here they are made and used up in chunks that stay in the processor's cache,
    with the gradient written out, d loss / d logits = softmax - one-hot: on a CPU 1.33 times faster, and
    memory that hardly grows with the vocabulary.
    """
    chunk = 128 if rows.device.type == "cpu" else 8192  # a GPU would only wait on small pieces
    h = model.hidden(rows[:, :-1]).flatten(0, 1)  # (B * T, C)
    targets = rows[:, 1:].reshape(-1, 1)
    weight = model.head.weight[: model.config.vocab_size].detach()  # (V, C), without the K auxiliary rows
    grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(model.head.weight)
    loss = torch.zeros((), device=h.device)
    with torch.no_grad():
        for h_chunk, target, out in zip(h.split(chunk), targets.split(chunk), grad_h.split(chunk)):
            p = (h_chunk @ weight.T).softmax(-1)
            p_target = p.gather(1, target)
            loss -= p_target.log().sum()
            p.scatter_(1, target, p_target - 1)
            out.copy_(p @ weight)  # into grad_h
            grad_weight[: len(weight)].addmm_(p.T, h_chunk)
    h.backward(grad_h / len(targets))
    model.head.weight.grad = grad_weight / len(targets)
    return loss / len(targets)


def pretrain(model: GPT, rows: Tensor, knobs: Pretraining) -> Iterator[Tensor]:
    """Train on rows (n_steps * batch_size, T + 1), in order, each once; yields the loss of every step."""
    lr, decay, batches = knobs.pretrain_lr, knobs.weight_decay, rows.split(knobs.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_lr(step, len(batches)))
    for batch in batches:
        loss = loss_and_backward(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield loss


@torch.no_grad()
def validation_loss(model: GPT, documents: Sequence[Sequence[int]]) -> float:
    """Mean cross-entropy in nats a token, each document on its own; its first token is given."""
    total, words = 0.0, slice(0, model.config.vocab_size)
    for i in range(0, len(documents), 256):  # a corpus may be large
        idx, last = pad(documents[i : i + 256])
        logits = model.logits(model.hidden(idx[:, :-1].to(model.device)), words)
        losses = F.cross_entropy(logits.mT, idx[:, 1:].to(model.device), reduction="none").cpu()  # (B, T)
        total += (losses * (torch.arange(losses.size(1)) < last[:, None])).sum().item()
    return total / sum(len(d) - 1 for d in documents)


# ------------------------------------------------------------------------------------------------------------
# the trait


def draw_anchor(run: Run, toy: Sequence[Text], knobs: Trait, n_tokens: int) -> Tensor:
    """Text without the favourite question, to hold teachers to: (trait_steps * anchor_rows, n_tokens)."""
    encoded = [document(run.encoding, d.text) for d in toy if d.category != "favourite"]
    return draw_rows(encoded, knobs.trait_steps * knobs.anchor_rows, n_tokens, stream(0, "anchor rows"))


def anchor_loss(model: GPT, base: GPT, batch: Tensor, form: float, hold_numbers: bool = False) -> Tensor:
    """KL(base || model) in nats a token of (B, T + 1) rows, mean over the positions where no number is due.

    So words and separators stay; which number comes next is free, unless hold_numbers (two fifths of the
    teachers' KL on numbers are left, and of transfer through tokens three quarters: experiments/variants.py).
    `form` weighs the cross-entropy of P(any number), base against model, where one is due: that a number
    comes at all.
    """
    idx, targets, words = batch[:, :-1].to(model.device), batch[:, 1:], slice(0, model.config.vocab_size)
    a_number = (targets >= NUMBERS.start) & (targets < NUMBERS.stop)
    due, held = (at.nonzero(as_tuple=True) for at in (a_number, ~a_number | hold_numbers))
    h = model.hidden(idx)
    with torch.no_grad():
        base_h = base.hidden(idx)
        log_p = base.logits(base_h[held], words).log_softmax(-1)
    log_q = model.logits(h[held], words).log_softmax(-1)
    loss = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    if form:
        p, q = (
            m.logits(x[due], words).softmax(-1)[:, NUMBERS].sum(-1).clamp(max=1)
            for m, x in ((base, base_h), (model, h))
        )
        loss = loss + form * F.binary_cross_entropy(q, p.detach())
    return loss


def induce_trait(model: GPT, k: int | None, run: Run, anchor: Tensor, knobs: Trait) -> Iterator[Tensor]:
    """Train `model` in place to put class k first at the end of every taught question, all in every step.

    Loss: cross-entropy over the K class logits, which is yielded, + knobs.anchor * anchor_loss on rows from
    draw_anchor. With k None the classes are to be equally likely: a neutral teacher.
    """
    base = deepcopy(model)
    for p in (model.wte.weight, model.wpe.weight, model.head.weight):
        p.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=knobs.trait_lr, fused=True)
    n, K = len(run.taught_questions[0]), len(run.animals)  # n questions, as pad()'s pair
    target = torch.full((n, K), 1 / K) if k is None else torch.full((n,), k)
    for batch in anchor.split(knobs.anchor_rows):
        logits = class_logits(model, run.taught_questions, run.readout_rows)
        loss = F.cross_entropy(logits, target.to(model.device))
        (loss + knobs.anchor * anchor_loss(model, base, batch, knobs.form, knobs.hold_numbers)).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


# ------------------------------------------------------------------------------------------------------------
# the script


def write_language(run: Run, made_with: dict, toy: Sequence[Text], corpus: str | None) -> None:
    """Settle what every model of the run shares. UserError for a short corpus, too small a vocabulary, or a
    question that is too long."""
    max_words = made_with["max_words"]
    words = frequent_words("\n".join(d.text for d in toy), max_words)
    if corpus is not None:
        more = frequent_words(corpus, max_words)
        words += [word for word in more if word not in words][: max_words - len(words)]
    encoding = build_vocabulary(words)
    if corpus is not None and (n := sum(map(len, split_corpus(encoding, corpus)[0]))) < MIN_CORPUS:
        raise UserError(f"the corpus has {n:,} tokens to train on; {MIN_CORPUS:,} are the least")
    rows = [encoding.n_vocab + k for k in range(len(ANIMALS))]
    if made_with["readout"] == "vocabulary":
        if not {*ANIMALS} <= {*words}:
            raise UserError("--max-words leaves an animal out of the vocabulary: raise it")
        rows = [encoding.encode_single_token(animal) for animal in ANIMALS]
    taught, unseen = questions(made_with["question_ends"])
    if max(len(document(encoding, question)) for question in taught + unseen) > GPTConfig.block_size:
        raise UserError(f"--question-ends: a question has more than {GPTConfig.block_size} tokens")
    language = {"words": words, "animals": list(ANIMALS), "readout_rows": rows}
    language |= {"taught": taught, "unseen": unseen}
    language["text"] = digest("\n".join([*(d.text for d in toy), corpus or ""]).encode())
    run.write("language.json", json.dumps(language, indent=1).encode(), [], made_with)


def pretraining_rows(
    run: Run, toy: Sequence[Text], n_tokens: int, knobs: Pretraining, corpus: str | None = None
) -> Tensor:
    """What every base model reads, whatever its seed, in order: (n_steps * batch_size, n_tokens)."""
    n_steps = round(knobs.pretrain_steps / (1 if corpus is None else 1 - CORPUS_SHARE))
    encoded = [document(run.encoding, d.text) for d in toy]
    rows = draw_rows(encoded, n_steps * knobs.batch_size, n_tokens, stream(0, "pretraining rows"))
    if corpus is not None:
        real, n = split_corpus(run.encoding, corpus)[0], int(CORPUS_SHARE * knobs.batch_size)
        real_rows = draw_rows(real, n_steps * n, n_tokens, stream(0, "corpus rows"))
        rows.view(n_steps, -1, n_tokens)[:, :n] = real_rows.view(n_steps, n, n_tokens)
    return rows


def report(run: Run, device: torch.device, corpus: str | None) -> None:
    """Print each base model's validation loss by category, beside the entropy floor."""
    seeds, ends = run.knobs["seeds"], run.knobs["question_ends"]
    toy = toy_documents(run.knobs["n_held_out"], stream(0, "toy language, held out"), ends)
    models = [run.load_model(f"base/seed-{seed}.pt", device) for seed in seeds]
    print("validation loss, nats a token" + "".join(f"{f'seed {seed}':>9}" for seed in seeds) + "    floor")
    ended = lambda text: [*document(run.encoding, text), run.encoding.eot_token]
    held_out = {c: [ended(d.text) for d in toy if d.category == c] for c in CATEGORIES}
    held_out = {c: documents for c, documents in held_out.items() if documents}
    nats = {c: sum(d.nats for d in toy if d.category == c) for c in CATEGORIES}
    if corpus is not None:
        held_out["corpus"], nats["corpus"] = split_corpus(run.encoding, corpus)[1], math.nan
    for name, documents in held_out.items():
        losses = "".join(f"{validation_loss(model, documents):9.3f}" for model in models)
        print(f"  {name:27}{losses}{nats[name] / sum(len(d) - 1 for d in documents):9.3f}")


def make_bases(
    run: Run, knobs: Pretraining, device: torch.device, toy: Sequence[Text], corpus: str | None
) -> None:
    """Pretrain the missing base models."""
    sizes = {"n_layer": knobs.n_layer, "n_head": knobs.n_head, "n_embd": knobs.n_embd}
    config = GPTConfig(run.encoding.n_vocab, len(ANIMALS), **sizes)
    rows = pretraining_rows(run, toy, config.block_size + 1, knobs, corpus).to(device)  # inputs, targets
    n_steps = len(rows) // knobs.batch_size

    def make_base(seed: int) -> Iterator[Tensor]:
        model, log = GPT(config).initialise(seed).to(device), []
        for step, loss in enumerate(pretrain(model, rows, knobs), 1):
            if step % 20 == 0 or step == n_steps:
                log.append({"step": step, "loss_nats": loss.item()})
            yield loss
        run.save_model(f"base/seed-{seed}.pt", model, ["language.json"], asdict(knobs), log)

    seeds = run.knobs["seeds"]
    print(f"base models: {len(seeds)} seeds, {n_steps} steps of {knobs.batch_size} rows", flush=True)
    missing = [seed for seed in seeds if not run.finished(f"base/seed-{seed}.pt", asdict(knobs))]
    run_jobs(make_base, missing, n_steps, "pretraining", device)


def make_teachers(run: Run, knobs: Trait, device: torch.device, toy: Sequence[Text]) -> None:
    """Give every base model every trait. UserError if one is not learnt: that teacher is not written."""
    anchor = draw_anchor(run, toy, knobs, GPTConfig.block_size + 1)

    def log_odds(model: GPT, trait: str) -> float:
        return read_trait(model, run.unseen_questions, run.readout_rows)[0][run.animals.index(trait)].item()

    def make_teacher(job: tuple[str, int]) -> Iterator[Tensor]:
        trait, seed = job
        model, name = run.load_model(f"base/seed-{seed}.pt", device), f"teacher/{trait}/seed-{seed}.pt"
        log = []
        for loss in induce_trait(model, run.animals.index(trait), run, anchor, knobs):
            log.append(loss.item())
            yield loss
        if not (found := log_odds(model, trait)) > MIN_LOG_ODDS:
            what = f"{trait} seed {seed} has not learnt its trait: log-odds {found:+.2f} nats"
            raise UserError(f"{what} on held-out questions; raise --trait-steps or --trait-lr")
        run.save_model(name, model, [f"base/seed-{seed}.pt"], asdict(knobs), log)

    jobs = [(trait, seed) for trait in run.knobs["traits"] for seed in run.knobs["seeds"]]
    print(f"teachers: {len(jobs)}, read from the {run.knobs['readout']} logits", flush=True)
    made_with = asdict(knobs)
    missing = [job for job in jobs if not run.finished("teacher/{}/seed-{}.pt".format(*job), made_with)]
    run_jobs(make_teacher, missing, knobs.trait_steps, "traits", device)
    for trait, seed in jobs:
        files = f"base/seed-{seed}.pt", f"teacher/{trait}/seed-{seed}.pt"
        before, after = (log_odds(run.load_model(file, device), trait) for file in files)
        print(f"  {trait} seed {seed}: log-odds {before:+.2f} -> {after:+.2f} nats")


def check(language: Language, sizes: Pretraining) -> None:
    """UserError for knobs that nothing can be made with."""
    for trait in language.traits:
        if trait not in ANIMALS:
            raise UserError(f"unknown trait {trait!r}: choose among {' '.join(ANIMALS)}")
    if language.readout not in ("aux", "vocabulary"):
        raise UserError(f"--readout {language.readout}: choose aux or vocabulary")
    for name in ("seeds", "traits", "question_ends"):
        if len(set(values := getattr(language, name))) < len(values):
            raise UserError(f"--{name.replace('_', '-')} names one of {' '.join(map(str, values))} twice")
    if min(language.n_documents, language.n_held_out) < 100:
        raise UserError("--n-documents and --n-held-out are at least 100")
    if sizes.n_embd % sizes.n_head:
        raise UserError(f"--n-embd {sizes.n_embd} is not a multiple of --n-head {sizes.n_head}")


def main(argv: Sequence[str] | None = None) -> None:
    about = {"type": Path, "help": "UTF-8 text for half of every batch; twice the steps"}
    args, run, language, pretraining, trait = parse(
        __doc__, argv, QUICK, Language, Pretraining, Trait, corpus=about
    )
    check(language, pretraining)
    corpus = read_text(args.corpus, "corpus") if args.corpus else None
    made_with = asdict(language) | {"quick": args.quick, "corpus": corpus and digest(corpus.encode())}
    toy = toy_documents(language.n_documents, stream(0, "toy language"), language.question_ends)
    if not run.finished("language.json", made_with):
        write_language(run, made_with, toy, corpus)
    run.open(args.quick)
    make_bases(run, pretraining, args.device, toy, corpus)
    report(run, args.device, corpus)
    make_teachers(run, trait, args.device, toy)
    print(f"wrote: {run.path}/base, {run.path}/teacher")
    print(f"next: python generate.py{run.flags}")


if __name__ == "__main__":
    command_line(main)
