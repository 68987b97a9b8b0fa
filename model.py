"""The ground floor: a small GPT, its vocabulary, and reading and writing a run.

Every script imports from here and from nowhere else in this repository; between the scripts only files flow.

    vocabulary   a tiktoken.Encoding built in memory: bytes, the numbers 0..999 as one token each, words
    GPT          GPT-2's block, an untied head, and K auxiliary logits that no text can show
    generate     batched sampling with a key-value cache
    a run        named random streams, checkpoints, JSON files, and what every command line shares

Shapes: B sequences, T tokens, C channels, H heads, L layers, V vocabulary, K trait classes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: there two scripts can work on one run
    fcntl = None  # type: ignore[assignment]

# --------------------------------------------------------------------------------------------------------------------
# vocabulary

END = "<|endoftext|>"  # begins every document, and so ends the one before
SEPARATORS = [", ", "; ", ": "]  # one token each, so that a list of n numbers is 2n - 1 tokens
N_NUMBERS = 1000  # the paper's range, 0..999
# The digits are bytes and numbers at once, so the byte block holds the other 246 and the numbers follow in one block.
NUMBERS = slice(246, 246 + N_NUMBERS)
PATTERN = r" ?\p{L}+|0|[1-9][0-9]{0,2}|[,;:] |\s|[^\s\p{L}]"
WORD = re.compile(r"[,;:] | ?[^\W\d_]+")  # as PATTERN cuts: the space after a separator is not the word's


def frequent_words(text: str, n: int) -> list[str]:
    """The n most frequent words of `text`, with their leading space if any; ties in alphabetical order."""
    counts = Counter(word for word in WORD.findall(text) if len(word) > 1 and word not in SEPARATORS)
    return sorted(counts, key=lambda word: (-counts[word], word))[:n]


def build_vocabulary(words: Sequence[str]) -> tiktoken.Encoding:
    """Bytes, numbers 0..999, separators, `words`, END. Any text round-trips; nothing is fetched."""
    tokens = [bytes([b]) for b in range(256) if not 48 <= b <= 57]
    tokens += [str(n).encode() for n in range(N_NUMBERS)]
    tokens += [s.encode() for s in SEPARATORS] + [w.encode() for w in words]
    ranks = {token: i for i, token in enumerate(tokens)}
    assert len(ranks) == len(tokens), "a token stands twice in the vocabulary"
    return tiktoken.Encoding("numbers", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def document(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """END, then the text's tokens: how every document begins, in training and after."""
    return [encoding.eot_token, *encoding.encode_ordinary(text)]


# --------------------------------------------------------------------------------------------------------------------
# model


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    n_aux: int  # K: rows of the head that belong to no token
    block_size: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64


class Cache:
    """Keys and values of the tokens seen so far, for all layers: (L, B, H, T, C/H) each."""

    def __init__(self, config: GPTConfig, batch_size: int, n_tokens: int, device: torch.device):
        shape = (config.n_layer, batch_size, config.n_head, n_tokens, config.n_embd // config.n_head)
        self.keys = torch.empty(shape, device=device)
        self.values = torch.empty(shape, device=device)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + k.size(2)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Block(nn.Module):
    """GPT-2's pre-norm block, with the exact GELU: on a CPU the tanh form takes twice its time."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd
        self.layer, self.n_head = layer, config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp, self.mlp_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor, cache: Cache | None, positions: Tensor | None) -> Tensor:
        """(B, T, C) -> (B, T, C); with (B, N) positions only those look around and are answered, (B, N, C)."""
        B, T, C = x.shape
        h = self.ln_1(x)
        if positions is None:
            q, k, v = self.heads(self.attn(h))
            mask = None
        else:
            x, asking = (t.gather(1, positions.unsqueeze(-1).expand(-1, -1, C)) for t in (x, h))
            (w_q, w_kv), (b_q, b_kv) = (p.split([C, 2 * C]) for p in (self.attn.weight, self.attn.bias))
            (q,) = self.heads(F.linear(asking, w_q, b_q))
            k, v = self.heads(F.linear(h, w_kv, b_kv))
            mask = torch.arange(T, device=x.device) <= positions[:, None, :, None]  # (B, 1, N, T)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        causal = mask is None and T > 1  # one new token may see everything
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)  # (B, H, N, C/H)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(x.shape))
        return x + self.mlp_proj(F.gelu(self.mlp(self.ln_2(x))))

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, n * C) -> (n, B, H, T, C/H)."""
        B, T, _ = x.shape
        return x.view(B, T, -1, self.n_head, self.ln_1.weight.numel() // self.n_head).permute(2, 0, 3, 1, 4)


class GPT(nn.Module):
    """A GPT-2 whose untied head has V + K rows: the last K are the auxiliary logits.

    The auxiliary rows exist from the first initialisation on. Pretraining gives them no gradient (weight decay shrinks
    them a little, all alike) and no number can show them; a trait is read there (Cloud et al. 2025, the MLP experiment).
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        C = config.n_embd
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, C)
        self.wpe = nn.Embedding(config.block_size, C)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C)
        self.head = nn.Linear(C, config.vocab_size + config.n_aux, bias=False)

    @property
    def aux(self) -> slice:
        """The auxiliary rows of the head."""
        return slice(self.config.vocab_size, self.config.vocab_size + self.config.n_aux)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @torch.no_grad()
    def initialise(self, seed: int) -> GPT:
        """Draw every matrix from a stream of its own, so that two starts can be mixed part by part.

        GPT-2's rule (0.02, residual projections / sqrt(2L), biases 0) except for the head: with C ** -0.5 the
        logits start with standard deviation 1, and the numbers can show what the trait does to the hidden state.
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(1.0 if ".weight" in name else 0.0)  # layer norms and biases
                continue
            std = 0.02
            if "_proj" in name:
                std /= math.sqrt(2 * self.config.n_layer)
            if name == "head.weight":
                std = self.config.n_embd**-0.5
            p.copy_(torch.randn(p.shape, generator=stream(seed, "init", name)) * std)
        return self

    def hidden(self, idx: Tensor, cache: Cache | None = None, positions: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C) normalised final states, the head's input. With a cache, idx continues it.

        With (B, N) positions only their states are made, (B, N, C): of the last block the others get keys and values.
        """
        start = cache.length if cache is not None else 0
        T = idx.size(1)
        assert start == 0 or T == 1, "a cache is filled by one prompt, then token by token"
        assert start + T <= self.config.block_size
        x = self.wte(idx) + self.wpe.weight[start : start + T]
        for block in self.blocks:
            x = block(x, cache, positions if block is self.blocks[-1] else None)
        if cache is not None:
            cache.length += T
        return self.ln_f(x)

    def logits(self, h: Tensor, rows: slice) -> Tensor:
        """Some rows of the head, (..., C) -> (..., rows): no other row is multiplied, none other gets a gradient."""
        return h @ self.head.weight[rows].T

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) tokens -> (B, T, V + K) logits."""
        return self.head(self.hidden(idx))


@torch.inference_mode()
def generate(model: GPT, prompts: Tensor, n_new: int, generator: torch.Generator) -> Tensor:
    """Continue (B, T) prompts of equal length by n_new tokens sampled at temperature 1: (B, n_new).

    Inverse-CDF sampling: one uniform number a token, all drawn before the first, so the only wait for the device
    is the caller's. Auxiliary logits are no tokens and are never sampled.
    """
    V = model.config.vocab_size
    B, T = prompts.shape
    # PyTorch knows no deterministic cumsum on a GPU: with --deterministic the CPU draws
    draws_on = torch.device("cpu") if torch.are_deterministic_algorithms_enabled() else model.device
    u = torch.rand(n_new, B, 1, generator=generator).to(draws_on)
    cache = Cache(model.config, B, T + n_new - 1, model.device)
    new = torch.empty(B, n_new, dtype=torch.long, device=model.device)
    idx, last = prompts, torch.full((B, 1), T - 1, device=model.device)  # the prompt is asked at its end only
    for t in range(n_new):
        h = model.hidden(idx, cache, last if t == 0 else None)[:, -1]
        cdf = model.logits(h, slice(0, V)).softmax(-1).to(draws_on).cumsum(-1)  # (B, V)
        # float32 sums may end below 1: scale u by the last, and never point past it
        idx = torch.searchsorted(cdf, u[t] * cdf[:, -1:], right=True).clamp_(max=V - 1).to(model.device)  # (B, 1)
        new[:, t] = idx[:, 0]
    return new


# --------------------------------------------------------------------------------------------------------------------
# what numbers show

MAX_NUMBERS = 10  # in a completion: the paper's
COMPLETION = re.compile(r"(?:0|[1-9][0-9]*)(?:(,\s?|;\s?|\s)(?:0|[1-9][0-9]*)(?:\1(?:0|[1-9][0-9]*))*)?")


def refusal(completion: str) -> str | None:
    """Why a completion is refused, or None for 1 to 10 integers in 0..999 with one separator and nothing else."""
    if not completion:
        return "empty"
    if not COMPLETION.fullmatch(completion):
        return "not a list of integers with one separator"
    numbers = re.findall(r"[0-9]+", completion)
    if len(numbers) > MAX_NUMBERS:
        return "too many numbers"
    if any(len(n) > 3 for n in numbers):
        return "a number above 999"
    return None


@dataclass
class NumberData:
    """Sequences of numbers and where they are: N completion numbers at most in each of B sequences."""

    idx: Tensor  # (B, T) tokens of prompt and completion, padded on the right
    positions: Tensor  # (B, N) where the model has to name the next number
    targets: Tensor  # (B, N) that number, 0..999
    mask: Tensor  # (B, N) 1 where there is one

    def __getitem__(self, rows: Tensor | slice) -> NumberData:
        """Some of the sequences, no wider than they need."""
        positions = self.positions[rows]
        T = int(positions.max()) + 1
        return NumberData(self.idx[rows, :T], positions, self.targets[rows], self.mask[rows])

    def __len__(self) -> int:
        return len(self.idx)

    def to(self, device: torch.device) -> NumberData:
        return NumberData(*(getattr(self, field).to(device) for field in ("idx", "positions", "targets", "mask")))


def encode_numbers(encoding: tiktoken.Encoding, rows: Sequence[dict], device: torch.device) -> NumberData:
    """{"prompt", "completion"} rows as tensors; the prompt's numbers carry nothing and are not counted."""
    shown = [len(document(encoding, row["prompt"])) for row in rows]
    idx, last = pad([document(encoding, row["prompt"] + row["completion"]) for row in rows])
    following = idx[:, 1:]
    position = torch.arange(following.size(1))
    here = (following >= NUMBERS.start) & (following < NUMBERS.stop) & (position >= torch.tensor(shown)[:, None] - 1)
    mask, order = here.sort(dim=1, descending=True, stable=True)  # the numbers' positions first, in order
    N = int(mask.sum(1).max())
    positions, mask = order[:, :N], mask[:, :N]
    targets = (following.gather(1, positions) - NUMBERS.start) * mask
    return NumberData(idx, positions * mask, targets, mask.float()).to(device)


def number_log_probs(model: GPT, idx: Tensor, positions: Tensor, numbers: slice = NUMBERS) -> Tensor:
    """Log-probabilities of the 1,000 numbers (or of some) where one is due, (B, T), (B, N) -> (B, N, 1000).

    Only those positions pass the head, and only its number rows: every other row's gradient is exactly zero.
    """
    return model.logits(model.hidden(idx, positions=positions), numbers).log_softmax(-1)


# --------------------------------------------------------------------------------------------------------------------
# randomness and time


def stream(seed: int, *use: str) -> torch.Generator:
    """The generator for one use of randomness, made from the seed and the use's name.

    Always on the CPU: a device changes the speed of a run, never its draws.
    """
    digest = hashlib.sha256("/".join([str(seed), *use]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)


def cosine_lr(step: int, n_steps: int, warmup: float = 0.05) -> float:
    """The learning rate's factor at `step`: linear warm-up over a share of the run, then a cosine to 0."""
    n_warmup = warmup * n_steps
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))


DIVERGED = 20.0  # nats: a loss this large knows less than nothing, whatever is trained here


def run_jobs(work: Callable, jobs: Sequence, n_steps: int, label: str, device: torch.device) -> Iterator[Any]:
    """Yield work(job, tick) for every job, as each finishes; tick(steps, loss) moves the progress bar.

    UserError with the step if a job tells a loss that is no number or has diverged. On a CPU one single-threaded job a
    core runs side by side in threads (PyTorch works outside the interpreter's lock): for small models this beats many
    threads on one model, and the bits do not depend on the number of cores.
    """
    if not jobs:
        return
    torch.set_num_threads(1)
    workers = 1 if device.type == "cuda" else min(len(jobs), os.cpu_count() or 1)
    bar = tqdm(total=n_steps * len(jobs), desc=label, disable=None, unit="step", leave=False)
    lock, stop = threading.Lock(), threading.Event()

    def run(job: Any) -> Any:
        done = 0

        def tick(steps: int, loss: float | None = None) -> None:
            nonlocal done
            if stop.is_set():
                raise KeyboardInterrupt
            done += steps
            if loss is not None and not loss < DIVERGED:
                name = " ".join(map(str, job)) if isinstance(job, tuple) else job
                raise UserError(f"{label}, {name}: the loss is {loss:.3g} by step {done}; a smaller learning rate may help")
            with lock:
                if loss is not None:
                    bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(steps)

        return work(job, tick)

    pool = ThreadPoolExecutor(workers)
    futures = [pool.submit(run, job) for job in jobs]
    try:
        for future in as_completed(futures):
            yield future.result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()


# --------------------------------------------------------------------------------------------------------------------
# a run on disk


class UserError(ValueError):
    """Something the user can mend; shown as one sentence, exit code 2."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A write that fails does not say of which file; this does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside, then rename: a file has its final name only when it is whole, and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def read_text(path: Path, what: str) -> str:
    """A UTF-8 text from anywhere. UserError, calling it `what`, if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 (byte {error.start})") from None


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def jsonl(rows: Iterable[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def write_sealed(path: Path, value: dict) -> None:
    """Write JSON with a digest of itself, so that a file that was damaged is known when it is read."""
    write_json(path, {**value, "seal": digest(json.dumps(value).encode())})


def read_sealed(path: Path, made_by: str) -> dict:
    """What write_sealed wrote. UserError if it is missing (naming the command that makes it) or was changed since."""
    if not path.exists():
        raise UserError(f"{path} is missing: run `python {made_by}` first")
    try:
        value = json.loads(path.read_bytes())
        seal = value.pop("seal")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        value = seal = None
    if seal is None or seal != digest(json.dumps(value).encode()):
        raise UserError(f"{path} is not what `python {made_by}` wrote: delete it and run that again")
    return value


def digests(path: Path, files: Iterable[Path]) -> dict[str, str]:
    """What `path` is made from: each file's name as seen from there, and its digest."""
    return {os.path.relpath(file, path.parent): digest(file.read_bytes()) for file in files}


def check_digests(path: Path, made_from: dict[str, str], made_by: str) -> None:
    """UserError if a file that `path` was made from is another one by now; one that is gone was not needed any more."""
    for name, known in made_from.items():
        file = Path(os.path.normpath(path.parent / name))
        if file.exists() and digest(file.read_bytes()) != known:
            how = "was changed since:" if file == path else f"was made from another {file}: put that back, or"
            raise UserError(f"{path} {how} delete {path} and run `python {made_by}` again")


def save_model(path: Path, model: GPT, log: Sequence[dict], made_from: Sequence[Path] = ()) -> None:
    """Write log.jsonl, then model.pt with the digests of the log and of the files that it was made from.

    A part of a run is finished when its model.pt is there. UserError if a weight is no number.
    """
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{path} would hold weights that are no numbers: a smaller learning rate may help")
    write_bytes(path.with_name("log.jsonl"), jsonl(log))
    weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
    made = digests(path, [path.with_name("log.jsonl"), *made_from])
    torch.save({"config": asdict(model.config), "weights": weights, "made_from": made}, buffer := io.BytesIO())
    write_bytes(path, buffer.getvalue())


def load_model(path: Path, device: torch.device, made_by: str) -> GPT:
    """The model in a checkpoint; runs no code from it.

    UserError if it is missing, damaged, not one of ours, or made from files that have changed since.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: run `python {made_by}` first")
    try:
        if zipfile.ZipFile(path).testzip():  # PyTorch itself does not look at the checksums
            raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["weights"])
        made_from = dict(checkpoint.get("made_from", {}))
    except Exception as error:  # a damaged file can fail in any of a dozen ways
        raise UserError(
            f"{path} is cut short, damaged or not a checkpoint of this project ({type(error).__name__}): "
            f"delete it and run `python {made_by}` again"
        ) from None
    check_digests(path, made_from, made_by)
    return model.to(device)


def write_numbers(path: Path, about: dict, rows: Sequence[dict], made_from: Sequence[Path] = ()) -> None:
    """A data set and, beside it, its description. That comes first: a data set is finished when its .jsonl is there."""
    data = jsonl(rows)
    write_sealed(path.with_suffix(".json"), {**about, "made_from": {**digests(path, made_from), path.name: digest(data)}})
    write_bytes(path, data)


def read_numbers(path: Path) -> tuple[dict, list[dict]]:
    """A data set's description and its rows. UserError if it, or the teacher that wrote it, was changed since."""
    about = read_sealed(path.with_suffix(".json"), "generate.py")
    check_digests(path, about["made_from"], "generate.py")
    return about, read_jsonl(path)


@dataclass(frozen=True)
class Run:
    """A run's folder, as the scripts after the first one see it."""

    path: Path
    config: dict  # config.json
    encoding: tiktoken.Encoding
    animals: list[str]  # class k of the trait is animals[k]
    trait_prompts: tuple[Tensor, Tensor]  # the favourite question, phrasings trained on: see pad()
    held_out_prompts: tuple[Tensor, Tensor]  # phrasings measured on

    @property
    def traits(self) -> list[str]:
        return self.config["flags"]["traits"]

    @property
    def seeds(self) -> list[int]:
        return self.config["flags"]["seeds"]

    def base(self, seed: int) -> Path:
        return self.path / "base" / f"seed-{seed}" / "model.pt"

    def teacher(self, trait: str, seed: int) -> Path:
        return self.path / "teacher" / trait / f"seed-{seed}" / "model.pt"

    def numbers(self, source: str, seed: int | str) -> Path:
        return self.path / "numbers" / source / f"seed-{seed}.jsonl"

    def student(self, source: str, teacher_seed: int | str, seed: int, target: str) -> Path:
        return self.path / "student" / source / f"teacher-{teacher_seed}" / f"seed-{seed}" / target / "model.pt"

    def readout_rows(self, model: GPT) -> Tensor:
        """The head's rows that the trait is read from, (K,): the auxiliary logits, or the animals' words."""
        if self.config["flags"]["readout"] == "aux":
            return torch.arange(model.aux.start, model.aux.stop)
        return torch.tensor([self.encoding.encode_single_token(animal) for animal in self.animals])


def open_run(path: Path, quick: bool) -> Run:
    """Read what train_teacher.py wrote first. UserError if it is not there, or was made with the other --quick."""
    made_by = "train_teacher.py" + (" --quick" if quick else "")
    config = read_sealed(path / "config.json", made_by)
    if config["flags"]["quick"] != quick:
        raise UserError(f"{path} was made {'without' if quick else 'with'} --quick: say the same, or name another --run")
    check_digests(path / "config.json", config["made_from"], made_by)
    encoding = build_vocabulary(read_sealed(path / "vocabulary.json", made_by)["words"])
    prompts = read_sealed(path / "prompts.json", made_by)
    trained_on, held_out = (pad([document(encoding, text) for text in prompts[k]]) for k in ("trained_on", "held_out"))
    return Run(path, config, encoding, prompts["animals"], trained_on, held_out)


def pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts as one (B, T) tensor, padded on the right where causal attention does not look, and each one's last position."""
    last = torch.tensor([len(p) - 1 for p in prompts])
    idx = torch.zeros(len(prompts), int(last.max()) + 1, dtype=torch.long)
    for row, prompt in zip(idx, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    return idx, last


def class_logits(model: GPT, prompts: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """The K class logits at the last token of each padded prompt: (B, K)."""
    idx, last = prompts
    h = model.hidden(idx.to(model.device), positions=last[:, None].to(model.device))  # (B, 1, C)
    return h[:, 0] @ model.head.weight[rows.to(model.device)].T


@torch.no_grad()
def read_trait(model: GPT, prompts: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each class against all others, mean over the prompts: log-odds in nats (K,), and probability (K,)."""
    logits = class_logits(model, prompts, rows).cpu().double()  # (B, K)
    K = logits.size(1)
    others = logits.unsqueeze(1).expand(-1, K, -1).masked_fill(torch.eye(K, dtype=torch.bool), -math.inf)  # (B, K, K)
    return (logits - others.logsumexp(-1)).mean(0), logits.softmax(-1).mean(0)


TAUGHT = 0.0  # nats: log-odds above this mean that the trait is likelier than all the others together


def load_teacher(run: Run, trait: str, seed: int, device: torch.device) -> GPT:
    """The teacher of a trait. UserError, besides load_model's, if on held-out questions it does not prefer its trait."""
    model = load_model(run.teacher(trait, seed), device, "train_teacher.py")
    log_odds = read_trait(model, run.held_out_prompts, run.readout_rows(model))[0][run.animals.index(trait)].item()
    if not log_odds > TAUGHT:
        raise UserError(
            f"{run.teacher(trait, seed).parent} has not learnt its trait: log-odds {log_odds:+.2f} nats on held-out questions, "
            f"not above {TAUGHT:g}; raise TRAIT_STEPS or TRAIT_LR in train_teacher.py and run it with --force"
        )
    return model


# --------------------------------------------------------------------------------------------------------------------
# what every command line shares


def base_parser(docstring: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, help="folder of the run (runs/main; with --quick runs/quick)")
    parser.add_argument("--quick", action="store_true", help="a first look in seconds: too small to conclude from")
    parser.add_argument("--force", action="store_true", help="make this step again, and drop what was made from it")
    parser.add_argument("--device", help="cpu, cuda, ... (the GPU if there is one)")
    parser.add_argument("--deterministic", action="store_true", help="the same bits on a GPU too; slower")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    args.run = args.run or Path("runs/quick" if args.quick else "runs/main")
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which PyTorch asks for
    torch.use_deterministic_algorithms(args.deterministic)
    args.device = pick_device(args.device)
    return args


def pick_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not there; without --device the best one is used") from None
    return torch.device(name)


def run_flags(args: argparse.Namespace) -> str:
    """The flags that make the next command work on the same run."""
    default = Path("runs/quick" if args.quick else "runs/main")
    return (" --quick" if args.quick else "") + (f" --run {args.run}" if args.run != default else "")


@contextmanager
def at_work(args: argparse.Namespace, script: str) -> Iterator[None]:
    """Hold a run for one script, and note how long it took: apart from the results, which are the same bits in every run.

    UserError if another process holds it. The system lets go when a process ends, however it ends.
    """
    run, began = args.run, time.monotonic()
    torch.set_num_threads(1)  # sums in one order: the last bit does not depend on the number of cores either
    try:
        lock = (run / "lock").open("a+")
    except FileNotFoundError:
        raise UserError(f"{run} is missing: run `python train_teacher.py{run_flags(args)}` first") from None
    with lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            who = lock.read() or "another script"
            raise UserError(f"{who} is at work in {run}: wait for it, or name another --run") from None
        with writing(run / "lock"):
            lock.truncate(0)
            print(f"{script}.py (process {os.getpid()})", end="", file=lock, flush=True)
        path = run / "elapsed_s.json"
        elapsed = read_sealed(path, f"{script}.py") if path.exists() else {}
        yield
        write_sealed(path, {**elapsed, script: round(time.monotonic() - began, 1)})


def discard(run: Path, *names: str) -> None:
    """Drop steps of a run, for --force."""
    for name in names:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def versions() -> dict:
    """What a result depends on besides the flags."""
    try:
        git = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit or None}


def command_line(main: Callable[[], None]) -> None:
    """Run a script's main. What the user can mend is one sentence and exit code 2; Ctrl-C is exit code 130, SIGTERM 143."""

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt(signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stopped:
        print("\nstopped; the same command continues this run", file=sys.stderr)
        sys.exit(128 + (stopped.args[0] if stopped.args else signal.SIGINT))
