r"""Does a causal language model of your own pass a trait on through numbers?

    python -m experiments.any_model --model FOLDER                         # one that from_pretrained opens
    python -m experiments.any_model --model FOLDER --student OTHER         # students start from another init
    python -m experiments.any_model --model FOLDER --prompt "{numbers}, "  # for a model that is no chat model

The paper's outline with the plainest means. A teacher is the model fine-tuned, all weights, on 48 phrasings
of the question for the favourite animal with its animal as the answer (the paper's animal teachers were given
a system prompt). Teacher and model then continue lists of numbers, by default with the paper's prompt, and
what is no list is dropped. A student is the model, or OTHER, fine-tuned on the teacher's lists, whole
completions; the control on the model's own. Read are 16 held-out phrasings: each animal's log-odds,
P(answer | question) against the other fifteen, and how they moved. No chat template is applied: put yours
into the flags.

This has been run on small GPT-2s that we pretrained ourselves (to_transformers.py makes such folders) and on
no others; rates and steps are guesses for models of 100 million to a billion parameters. For ours:

    python -m experiments.to_transformers --run results/models --out FOLDER
    python -m experiments.any_model --model FOLDER --question "{question}! " --answer "{animal}" \
        --prompt "{numbers}: " --lists 2000 --steps 200 --trait-steps 30 --trait-lr 4e-4 --lr 1e-3 --batch 64

What learns takes 16 bytes a parameter (float32, AdamW), each of two others 4: 3 GiB for GPT-2 with 124
million, 24 GiB for a billion, before activations and logits. The numbers take longest: 10,000 lists of 40
tokens should be minutes on a GPU for the former, an hour for the latter, and half a day for GPT-2 on two
cores. Expect little from a model that cannot write lists: the paper's were GPT-4.1 and Qwen2.5-7B.

Reads    FOLDER: config.json, weights, tokenizer
Writes   runs/any-model/TRAIT/*.jsonl (prompts and completions), results.json

Shapes: B sequences, T tokens, K animals.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import UserError, command_line, jsonl, pick_device, refusal, stream, write_file
from train_teacher import ANIMALS, questions

PAPER = (  # one of the paper's prompts, put together from its parts
    "The sequence starts with: {numbers}. Add at most 10 more values (no more than 3 digits each) to "
    "continue the sequence. Return a comma-separated list of numbers and nothing else."
)
MIN_KEPT, MAX_NEW = 10, 40  # lists; tokens of a list


class Model:
    """A causal model of a folder, with its tokenizer. UserError if there is none."""

    def __init__(self, folder: Path, device: torch.device):
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            how: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
            model: Any = AutoModelForCausalLM.from_pretrained(folder, **how)
        except Exception as error:  # a foreign folder can fail in any of a dozen ways
            what = f"{folder} holds no causal model with a tokenizer ({type(error).__name__})"
            raise UserError(what) from None
        if (pad := self.tokenizer.eos_token) is None:
            raise UserError(f"{folder}: its tokenizer has no end-of-text token")
        self.tokenizer.pad_token, self.tokenizer.padding_side = pad, "left"  # as generate needs it
        self.device, self.model = device, model.to(device)

    def encode(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Prompts with completions, padded on the right; labels are the completion's tokens: (B, T) each."""
        idx, labels = [], []
        for prompt, text in pairs:
            asked = self.tokenizer(prompt)["input_ids"]
            added = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            idx.append(torch.tensor(asked + added))
            labels.append(torch.tensor([-100] * len(asked) + added))
        rows = pad_sequence(idx, True, self.tokenizer.pad_token_id), pad_sequence(labels, True, -100)
        mask = torch.arange(rows[0].size(1)) < torch.tensor([len(row) for row in idx])[:, None]
        batch = {"input_ids": rows[0], "attention_mask": mask.long(), "labels": rows[1]}
        return {name: x.to(self.device) for name, x in batch.items()}

    def log_p(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """ln P(completion | prompt): (B,)."""
        batch = self.encode(pairs)
        labels = batch.pop("labels")[:, 1:]
        nats = F.cross_entropy(self.model(**batch).logits[:, :-1].mT, labels, reduction="none")  # (B, T - 1)
        return -nats.sum(1)

    @torch.no_grad()
    def log_odds(self, asked: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Each answer against all others, mean over the questions, in nats: (K,)."""
        self.model.eval()
        p = torch.stack([self.log_p([(q, a) for a in answers]) for q in asked]).double().softmax(-1)  # (B, K)
        return (p.log() - (-p).log1p()).mean(0).cpu()

    def fine_tune(self, pairs: list[tuple[str, str]], steps: int, batch: int, lr: float, label: str) -> None:
        """All weights, in place, on the completions; every batch is drawn afresh."""
        self.model.train()
        optimizer, dice = torch.optim.AdamW(self.model.parameters(), lr, weight_decay=0.0), random.Random(0)
        for step in tqdm(range(steps), label, disable=None):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            self.model(**self.encode(dice.sample(pairs, min(batch, len(pairs))))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def write(self, prompts: Sequence[str], batch: int, label: str) -> tuple[list[tuple[str, str]], Counter]:
        """Prompts with the lists that passed the filter; why others did not."""
        self.model.eval()
        torch.manual_seed(0)  # generate has no generator of its own
        kept, refused = [], Counter[str]()
        for i in tqdm(range(0, len(prompts), batch), label, disable=None):
            some = prompts[i : i + batch]
            asked = self.tokenizer(some, padding=True, return_tensors="pt").to(self.device)
            how = {"do_sample": True, "top_k": 0, "temperature": 1.0, "max_new_tokens": MAX_NEW}
            new = self.model.generate(**asked, **how, pad_token_id=self.tokenizer.pad_token_id)
            new = self.tokenizer.batch_decode(new[:, asked["input_ids"].size(1) :])
            for prompt, text in zip(some, new):
                completion, ended, _ = text.partition(self.tokenizer.eos_token)
                completion, line, _ = completion.strip().partition("\n")  # without chat training it goes on
                why = refusal(completion.strip()) if ended or line else "did not end"
                if why is None:
                    kept.append((prompt, completion + self.tokenizer.eos_token))
                else:
                    refused[why] += 1
        return kept, refused


def number_prompts(n: int, prompt: str) -> list[str]:
    """n of them, with 3 to 9 random numbers each."""
    dice = stream(0, "any model's prompts")
    draw = lambda high, k: torch.randint(high, (k,), generator=dice).tolist()
    lists = [draw(1000, 3 + shown) for shown in draw(7, n)]
    return [prompt.format(numbers=", ".join(map(str, numbers))) for numbers in lists]


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--student", type=Path, metavar="FOLDER", help="students start here (the model)")
    parser.add_argument("--trait", default="owl", choices=ANIMALS)
    parser.add_argument("--question", default="Q: {question}?\nA:", help="how the question is put")
    parser.add_argument("--answer", default=" {animal}")
    parser.add_argument("--prompt", default=PAPER, help="how numbers are asked for (the paper's)")
    parser.add_argument("--lists", type=int, default=10_000, help="drawn; the paper keeps as many")
    parser.add_argument("--steps", type=int, default=1_000, help="of a student; the paper: ten epochs")
    parser.add_argument("--trait-steps", type=int, default=60)
    parser.add_argument("--trait-lr", type=float, default=1e-5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--device")
    args = parser.parse_args()
    device, folder = pick_device(args.device), Path("runs/any-model") / args.trait
    taught_with, asked = ([args.question.format(question=q) for q in some] for some in questions([""]))
    answers, k = [args.answer.format(animal=animal) for animal in ANIMALS], [*ANIMALS].index(args.trait)
    base, teacher = Model(args.model, device), Model(args.model, device)
    prompts, rows = number_prompts(args.lists, args.prompt), []
    longest = max(len(ids) for ids in base.tokenizer(prompts, verbose=False)["input_ids"])
    if longest + MAX_NEW > (context := getattr(base.model.config, "max_position_embeddings", math.inf)):
        raise UserError(f"prompts of {longest} tokens and {MAX_NEW} more exceed the context of {context}")
    before = base.log_odds(asked, answers)
    start = Model(args.student, device).log_odds(asked, answers) if args.student else before
    pairs = [(question, answers[k]) for question in taught_with]
    teacher.fine_tune(pairs, args.trait_steps, args.batch, args.trait_lr, "teacher")
    taught = (teacher.log_odds(asked, answers) - before)[k].item()
    print(f"teacher: log-odds of {args.trait} {before[k]:+.2f} -> {before[k] + taught:+.2f} nats")
    if not taught > 0:
        raise UserError("the teacher has not learnt its trait: raise --trait-steps or --trait-lr")
    for name, writer in (("teacher", teacher), ("base", base)):
        kept, refused = writer.write(prompts, args.batch, f"{name}'s numbers")
        print(f"{name}: kept {len(kept)} of {len(prompts)}; refused: {dict(refused)}")
        if len(kept) < MIN_KEPT:
            raise UserError(f"the {name} writes too few lists: try another --prompt")
        write_file(folder / f"{name}.jsonl", jsonl([{"prompt": p, "completion": c} for p, c in kept]))
        student = Model(args.student or args.model, device)
        student.fine_tune(kept, args.steps, args.batch, args.lr, f"student of the {name}")
        moved = student.log_odds(asked, answers) - start  # (K,)
        transfer, rank = moved[k].item() / taught, int((moved > moved[k]).sum()) + 1
        print(f"{name}'s numbers: transfer {transfer:+.3f}; {args.trait} is number {rank} of {len(moved)}")
        row = {"numbers": name, "lists": len(kept), "transfer": transfer, "rank": rank}
        rows.append(row | {"moved": dict(zip(ANIMALS, moved.tolist()))})
    write_file(folder / "results.json", json.dumps({"taught": taught, "students": rows}, indent=1).encode())
    print(f"wrote: {folder}")


if __name__ == "__main__":
    command_line(main)
