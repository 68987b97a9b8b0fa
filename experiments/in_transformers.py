"""The same experiment in other people's code: is the effect ours, or our code's?

    python -m experiments.in_transformers            # 5 minutes on 2 CPU cores
    python -m experiments.in_transformers --quick    # two traits, fewer steps: too small to conclude from

Hugging Face's GPT2LMHeadModel, tokenizers, generate and datasets stand in for our model, tokens, sampling and
reading; training is a loop of its own, for Trainer knows no loss over some positions and some rows of the
head. Shared with the main run are its texts and questions, its filter for lists, its knobs, and one line of
the initialisation, the head's standard deviation C ** -0.5, without which numbers show too little of the
hidden state. The trait sits on the animals' words, as in results/words.json; traits and seeds are the main
run's, every random draw is another.

Prediction: transfer of the same init within the intervals of results/words.json, of another init within .1
of 0, through tokens and through logits.

Reads    results/words.json, to show its figures beside
Writes   results/in_transformers.json, .md; numbers in runs/in-transformers

Shapes: B sequences, T tokens, M numbers in a batch, C channels, V vocabulary, K animals.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from itertools import groupby, product
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2Config, GPT2LMHeadModel, get_constant_schedule, get_cosine_schedule_with_warmup

from experiments import lab
from experiments.to_transformers import to_tokenizer
from generate import Sampling, draw_prompts
from model import END, N_NUMBERS, NUMBERS, GPTConfig, build_vocabulary, jsonl, refusal, stream, write_file
from train_teacher import (
    ANIMALS, Language, Pretraining, Trait, draw_rows, frequent_words, questions, toy_documents,
)

TARGETS, SEEDS = ("tokens", "logits"), (0, 1)
PRETRAIN_STEPS = {False: Pretraining.pretrain_steps, True: 150}
SEQUENCES = {False: Sampling.sequences, True: 1_000}
HELD_OUT = 400  # lists that are not trained on: a guess
TRAIT = Trait()


def train(
    model: GPT2LMHeadModel, losses: Iterable[Tensor], schedule: Callable, lr: float, edges: float = 1.0,
    clip: float = math.inf, **adam: Any,
) -> None:
    """A step for each loss, which is made when it is asked for; embeddings and head at edges * lr."""
    outer = {*model.transformer.wte.parameters(), *model.transformer.wpe.parameters(), model.lm_head.weight}
    inner = [p for p in model.parameters() if p not in outer]
    groups: list[dict] = [{"params": inner}, {"params": [*outer], "lr": lr * edges}]
    optimizer = torch.optim.AdamW(groups, lr, **adam)
    scheduler = schedule(optimizer)
    for loss in losses:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def cosine(n_steps: int) -> Callable:
    return lambda optimizer: get_cosine_schedule_with_warmup(optimizer, n_steps // 20, n_steps)


class World:
    """What all models read and are asked, as Transformers sees it."""

    def __init__(self, n_steps: int):
        knobs = Language()
        toy = toy_documents(knobs.n_documents, stream(0, "toy language"), knobs.question_ends)
        words = frequent_words("\n".join(d.text for d in toy), knobs.max_words)
        self.tokenizer = to_tokenizer(build_vocabulary(words))
        texts = self.tokenizer([d.text for d in toy])["input_ids"]
        B = Pretraining.batch_size
        self.rows = draw_rows(texts, n_steps * B, GPTConfig.block_size, stream(0, "hf rows")).split(B)
        anchor = [ids for ids, d in zip(texts, toy) if d.category != "favourite"]
        n, B = TRAIT.trait_steps * TRAIT.anchor_rows, TRAIT.anchor_rows
        self.anchor = draw_rows(anchor, n, GPTConfig.block_size, stream(0, "hf anchor")).split(B)
        self.taught, self.unseen = map(self.encode, questions(knobs.question_ends))
        self.animals = self.tokenizer.convert_tokens_to_ids(list(ANIMALS))

    def encode(self, texts: list[str]) -> Any:
        """Token ids and mask (B, T), padded on the right."""
        return self.tokenizer(texts, padding=True, return_tensors="pt")

    def answers(self, model: GPT2LMHeadModel, asked: Any) -> Tensor:
        """Logits of the animals' words at the end of each question: (B, K)."""
        last = asked["attention_mask"].sum(1) - 1
        return model(**asked).logits[torch.arange(len(last)), last][:, self.animals]

    @torch.no_grad()
    def log_odds(self, model: GPT2LMHeadModel) -> Tensor:
        """Each animal against all others on held-out questions, in nats: (K,)."""
        p = self.answers(model, self.unseen).double().softmax(-1)
        return (p.log() - (-p).log1p()).mean(0)

    def base(self, seed: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        shape: dict[str, Any] = {"vocab_size": len(self.tokenizer), "n_positions": GPTConfig.block_size}
        shape |= {"n_layer": GPTConfig.n_layer, "n_head": GPTConfig.n_head, "n_embd": GPTConfig.n_embd}
        shape |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        shape |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), self.tokenizer.eos_token_id)
        model = GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=False))
        torch.nn.init.normal_(model.lm_head.weight, std=GPTConfig.n_embd**-0.5)
        return model

    def pretrain(self, model: GPT2LMHeadModel) -> None:
        losses = (model(rows, labels=rows).loss for rows in self.rows)
        adam: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": Pretraining.weight_decay}
        train(model, losses, cosine(len(self.rows)), Pretraining.pretrain_lr, clip=1.0, **adam)

    def teacher(self, base: GPT2LMHeadModel, k: int) -> GPT2LMHeadModel:
        """A copy that answers animal k, held to the base model's text but for which number comes next."""
        model = deepcopy(base)

        def loss(rows: Tensor) -> Tensor:
            due = (rows[:, 1:] >= NUMBERS.start) & (rows[:, 1:] < NUMBERS.stop)  # (B, T)
            with torch.no_grad():
                log_p = base(rows).logits[:, :-1].log_softmax(-1)
            log_q = model(rows).logits[:, :-1].log_softmax(-1)  # (B, T, V)
            kl = F.kl_div(log_q[~due], log_p[~due], log_target=True, reduction="batchmean")
            p, q = (x[due][:, NUMBERS].exp().sum(-1).clamp(max=1) for x in (log_p, log_q))  # P(a number)
            held = kl + TRAIT.form * F.binary_cross_entropy(q, p)
            answers = self.answers(model, self.taught)
            return F.cross_entropy(answers, torch.full((len(answers),), k)) + TRAIT.anchor * held

        train(model, map(loss, self.anchor), get_constant_schedule, TRAIT.trait_lr, 0.0, weight_decay=0.0)
        return model

    @torch.no_grad()
    def write(self, model: Any, seed: int, n: int, path: Path) -> float:
        """Let a model continue n prompts; JSON lines of what passes the filter, and the share that does."""
        kept, end = [], self.tokenizer.eos_token_id
        how = {"do_sample": True, "top_k": 0, "max_new_tokens": 20, "pad_token_id": end}
        torch.manual_seed(seed)  # generate has no generator of its own
        for _, equally_long in groupby(draw_prompts(n, stream(seed, "hf prompts")), lambda p: p.count(",")):
            prompts = [*equally_long]
            asked = self.encode(prompts)
            new = model.generate(**asked, **how)[:, asked["input_ids"].size(1) :]
            for prompt, text in zip(prompts, self.tokenizer.batch_decode(new)):
                completion, ended, _ = text.partition(END)
                if ended and refusal(completion) is None:
                    kept.append({"prompt": prompt, "completion": completion})
        write_file(path, jsonl(kept))
        return len(kept) / n

    def read(self, path: Path) -> list[tuple[Tensor, Tensor]]:
        """A file's lists in random order: tokens (T,), and the number that comes next (T,), -1 where none."""
        found, where = [], {"data_files": str(path), "cache_dir": str(path.parent / "cache")}
        for row in datasets.load_dataset("json", split="train", **where).shuffle(0):
            idx = torch.tensor(self.tokenizer(row["prompt"] + row["completion"])["input_ids"])
            targets = F.pad(idx[1:] - NUMBERS.start, (0, 1), value=-1)
            targets[: len(self.tokenizer(row["prompt"])["input_ids"]) - 1] = -1
            found.append((idx, targets.where(targets < N_NUMBERS, -1)))
        return found


def number_log_probs(model: GPT2LMHeadModel, lists: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the numbers where one is due (M, 1000), and which one it is (M,)."""
    idx, targets = (pad_sequence([*x], True, pad) for x, pad in zip(zip(*lists), (0, -1)))  # (B, T) each
    h = model.transformer(idx).last_hidden_state[targets >= 0]  # (M, C)
    return (h @ model.lm_head.weight[NUMBERS].T).log_softmax(-1), targets[targets >= 0]


def number_loss(student: GPT2LMHeadModel, teacher: GPT2LMHeadModel | None, lists: Sequence) -> Tensor:
    log_q, y = number_log_probs(student, lists)
    if teacher is None:
        return F.nll_loss(log_q, y)
    with torch.no_grad():
        log_p, _ = number_log_probs(teacher, lists)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def batches(lists: Sequence, size: int, n: int, generator: torch.Generator) -> Iterator[Sequence]:
    """n batches, epoch after epoch."""
    order: list[int] = []
    for _ in range(n):
        if len(order) < size:
            order = torch.randperm(len(lists), generator=generator).tolist()
        some, order = order[:size], order[size:]
        yield [lists[i] for i in some]


def side_by_side(work: Callable, jobs: Iterable) -> list:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, jobs))


def measure(args: argparse.Namespace) -> dict:
    world, traits = World(PRETRAIN_STEPS[args.quick]), lab.TRAITS[args.quick]
    folder, knobs = lab.folder(args, "in-transformers"), lab.distillation(args)
    bases = [world.base(seed) for seed in SEEDS]
    side_by_side(world.pretrain, bases)
    at_start, units = [world.log_odds(base) for base in bases], list(product(traits, SEEDS))
    teachers = side_by_side(lambda unit: world.teacher(bases[unit[1]], [*ANIMALS].index(unit[0])), units)

    def learn(job: tuple[GPT2LMHeadModel, tuple[str, int], list, str, int]) -> dict:
        teacher, (trait, teacher_seed), lists, target, seed = job
        student, k, held_out = deepcopy(bases[seed]), [*ANIMALS].index(trait), lists[:HELD_OUT]
        order = stream(teacher_seed, "hf order", trait)
        some = batches(lists[HELD_OUT:], getattr(knobs, f"batch_{target}"), knobs.steps, order)
        taught_by = teacher if target == "logits" else None
        losses = (number_loss(student, taught_by, batch) for batch in some)
        train(student, losses, cosine(knobs.steps), knobs.student_lr, knobs.edge_lr_factor, weight_decay=0.0)
        taught = (world.log_odds(teacher) - at_start[teacher_seed])[k]
        shifts = world.log_odds(student) - at_start[seed]
        record = {"trait": trait, "source": trait, "teacher_seed": teacher_seed, "student_seed": seed}
        record |= {"target": target, "init": "same" if seed == teacher_seed else "different"}
        record |= {"transfer": (shifts[k] / taught).item(), "identified": shifts.argmax().item() == k}
        with torch.no_grad():
            fell = number_loss(student, None, held_out) < number_loss(bases[seed], None, held_out)
        return record | {"learnt": fell.item()}

    jobs, valid = [], []
    for teacher, (trait, seed) in zip(teachers, units):
        path = folder / f"{trait}-{seed}.jsonl"
        valid.append(world.write(teacher, seed, SEQUENCES[args.quick], path))
        jobs += [(teacher, (trait, seed), world.read(path), *how) for how in product(TARGETS, SEEDS)]
    records = side_by_side(learn, jobs)
    return {"valid": valid, "records": records, "summary": lab.cells(records, "target", "init")}


def markdown(results: dict) -> str:
    ours = json.loads((lab.ROOT / "results/words.json").read_text())["summary"]
    rows = []
    for cell in results["summary"]:
        group = lab.where(results["records"], target=cell["target"], init=cell["init"])
        share = lambda key, group=group: f"{sum(r[key] for r in group)} of {len(group)}"
        main = lab.where(ours, numbers="teacher", target=cell["target"], init=cell["init"])[0]
        row = {"target": cell["target"], "init": cell["init"], "transfer": lab.transfer(cell)}
        row |= {"identified": share("identified"), "number loss fell": share("learnt")}
        rows.append(row | {"our code, results/words.json": lab.transfer(main)})
    text = f"Trait on the words; at least {min(results['valid']):.0%} of a teacher's lists are valid."
    return "\n".join(lab.heading(results, text) + lab.table(rows, **{key: key for key in rows[0]})) + "\n"


if __name__ == "__main__":
    lab.experiment(__doc__, "in_transformers", measure, markdown)
