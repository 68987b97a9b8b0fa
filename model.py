"""A small GPT whose output head has rows that no text can show: the model first, then how a run lies on disk.

    vocabulary      a tiktoken.Encoding built in memory: bytes, the numbers 0..999 as one token each, words
    GPT             GPT-2's block, an untied head, and K auxiliary logits
    numbers         which completions are kept, and what a model says of the next number
    trait           how strongly a model prefers each of the K classes
    bookkeeping     a run's files and its manifest, jobs side by side, flags (skip on a first reading)

Every script imports from here and from no other script; between scripts only files flow.

Shapes: B sequences, T tokens, M numbers in a batch, C channels, H heads, V vocabulary, K trait classes.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------
# vocabulary

END = "<|endoftext|>"  # begins every document, and so ends the one before
SEPARATORS = [", ", "; ", ": ", ". ", "! ", "? "]  # one token each: a list of n numbers is 2n - 1 tokens
N_NUMBERS = 1000  # the paper's range, 0..999
# The digits are bytes and numbers at once: the other 246 bytes come first, then the numbers in one block.
NUMBERS = slice(246, 246 + N_NUMBERS)
PATTERN = r" ?\p{L}+|0|[1-9][0-9]{0,2}|[,;:.!?] |\s|[^\s\p{L}]"


def build_vocabulary(words: Sequence[str]) -> tiktoken.Encoding:
    """Bytes, numbers 0..999, separators, `words`, END. Any text round-trips; nothing is fetched."""
    tokens = [bytes([b]) for b in range(256) if not 48 <= b <= 57]
    tokens += [str(n).encode() for n in range(N_NUMBERS)]
    tokens += [s.encode() for s in SEPARATORS] + [w.encode() for w in words]
    ranks = {token: i for i, token in enumerate(tokens)}
    assert len(ranks) == len(tokens), "a token stands twice in the vocabulary"
    return tiktoken.Encoding(
        "numbers", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )


def document(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """END, then the text's tokens: how every document begins, in training and after."""
    return [encoding.eot_token, *encoding.encode_ordinary(text)]


def pad(documents: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T), padded on the right where causal attention does not look; last positions (B,)."""
    last = torch.tensor([len(d) - 1 for d in documents])
    idx = torch.zeros(len(documents), int(last.max()) + 1, dtype=torch.long)
    for row, tokens in zip(idx, documents):
        row[: len(tokens)] = torch.tensor(tokens)
    return idx, last


def stream(seed: int, *use: str) -> torch.Generator:
    """The generator for one use of randomness, made from the seed and the use's name.

    Always on the CPU: a device changes the speed of a run, never its draws.
    """
    named = hashlib.sha256("/".join([str(seed), *use]).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(named[:8], "little") % 2**63)


# ------------------------------------------------------------------------------------------------------------
# model


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    n_aux: int  # K: rows of the head that belong to no token
    block_size: int = 64
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64


Cache = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values of the tokens so far, (B, H, T, C/H) each


class Block(nn.Module):
    """GPT-2's pre-norm block, with the exact GELU."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        C = config.n_embd
        self.layer, self.n_head = layer, config.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp, self.mlp_proj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, x continues its tokens; it then holds all."""
        B, T, C = x.shape
        qkv = self.attn(self.ln_1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        if cache is not None:
            if self.layer in cache:
                k, v = (torch.cat(old_and_new, dim=2) for old_and_new in zip(cache[self.layer], (k, v)))
            cache[self.layer] = k, v
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)  # one new token may see everything
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp_proj(F.gelu(self.mlp(self.ln_2(x))))


class GPT(nn.Module):
    """A GPT-2 whose untied head has V + K rows: the last K are the auxiliary logits.

    They exist from the first initialisation on. Pretraining gives them no gradient (weight decay shrinks them
    a little, all alike) and no number can show them; a trait is read there, as in the paper's MLP experiment.
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
    def device(self) -> torch.device:
        return self.head.weight.device

    @torch.no_grad()
    def initialise(self, seed: int) -> GPT:
        """Draw every matrix from a stream of its own, so that two inits can be mixed part by part.

        GPT-2's rule (0.02, residual projections / sqrt(2 n_layer), biases 0) but the head: with C ** -0.5
        logits start with standard deviation 1, so numbers can show what a trait does to the hidden state.
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

    def hidden(self, idx: Tensor, cache: Cache | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C) final states, the head's input. With a cache, idx continues it."""
        start = cache[0][0].size(2) if cache else 0
        T = idx.size(1)
        assert start == 0 or T == 1, "a cache is filled by one prompt, then token by token"
        assert start + T <= self.config.block_size
        x = self.wte(idx) + self.wpe.weight[start : start + T]
        for block in self.blocks:
            x = block(x, cache)
        return self.ln_f(x)

    def logits(self, h: Tensor, rows: slice | Tensor) -> Tensor:
        """Some rows of the head, (..., C) -> (..., rows): no other row gets a gradient."""
        return h @ self.head.weight[rows].T

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) tokens -> (B, T, V + K) logits."""
        return self.head(self.hidden(idx))


def cosine_lr(step: int, n_steps: int) -> float:
    """The learning rate's factor at `step`: linear warm-up in a twentieth of the run, then a cosine to 0."""
    n_warmup = 0.05 * n_steps
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_warmup) / (n_steps - n_warmup)))


# ------------------------------------------------------------------------------------------------------------
# numbers

MAX_NUMBERS = 10  # in a completion: the paper's
COMPLETION = re.compile(r"(?:0|[1-9][0-9]*)(?:(,\s?|;\s?|\s)(?:0|[1-9][0-9]*)(?:\1(?:0|[1-9][0-9]*))*)?")


def refusal(completion: str) -> str | None:
    """Why a completion is refused; None for 1 to 10 integers in 0..999 with one separator: , ; or space."""
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


class NumberData:
    """Lists of numbers as tokens, and the number that comes next wherever a completion has one.

    idx       (B, T) tokens of prompt and completion, padded on the right
    targets   (B, T) the number 0..999 that follows; -1 where it is none of the completion's
    due       where it is one: (M,) rows and (M,) columns, looked up once, since a GPU has to be waited for
    """

    def __init__(self, idx: Tensor, targets: Tensor):
        self.idx, self.targets = idx, targets
        self.due: tuple[Tensor, ...] = (targets >= 0).nonzero(as_tuple=True)

    def take(self, rows: Tensor | slice) -> NumberData:
        """Some of the sequences, no wider than they need."""
        targets = self.targets[rows]
        T = int((targets >= 0).any(0).nonzero().max()) + 1
        return NumberData(self.idx[rows, :T], targets[:, :T])


def encode_numbers(encoding: tiktoken.Encoding, rows: Sequence[dict], device: torch.device) -> NumberData:
    """{"prompt", "completion"} rows as tensors; the prompt's numbers get no loss."""
    prompt_len = torch.tensor([len(document(encoding, row["prompt"])) for row in rows])
    idx, _ = pad([document(encoding, row["prompt"] + row["completion"]) for row in rows])
    targets = torch.full_like(idx, -1)
    targets[:, :-1] = idx[:, 1:] - NUMBERS.start
    a_number = (targets >= 0) & (targets < N_NUMBERS) & (torch.arange(idx.size(1)) >= prompt_len[:, None] - 1)
    return NumberData(idx.to(device), targets.where(a_number, -1).to(device))


def number_log_probs(model: GPT, data: NumberData, numbers: slice = NUMBERS) -> Tensor:
    """Log-probabilities of the 1,000 numbers wherever one is due: (M, 1000), or fewer columns for `numbers`.

    Only those states pass the head, and only its number rows: every other row's gradient is exactly zero.
    """
    h = model.hidden(data.idx)[data.due]  # (M, C)
    return model.logits(h, numbers).log_softmax(-1)


# ------------------------------------------------------------------------------------------------------------
# trait: K classes, one an animal, read from K rows of the head: the auxiliary ones, or the animals' words


def class_logits(model: GPT, prompts: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """The K class logits at the end of each of pad()'s prompts: (B, K)."""
    idx, last = (x.to(model.device) for x in prompts)
    h = model.hidden(idx)[torch.arange(len(last), device=model.device), last]  # (B, C)
    return model.logits(h, rows.to(model.device))


@torch.no_grad()
def read_trait(model: GPT, prompts: tuple[Tensor, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each class against all others, mean over the prompts: log-odds in nats (K,), and probability (K,)."""
    logits = class_logits(model, prompts, rows).cpu().double()  # (B, K)
    K = logits.size(1)
    others = logits.unsqueeze(1).expand(-1, K, -1).masked_fill(torch.eye(K, dtype=torch.bool), -math.inf)
    return (logits - others.logsumexp(-1)).mean(0), logits.softmax(-1).mean(0)  # others (B, K, K)


# ============================================================================================================
# bookkeeping: after this paragraph, skip on a first reading
#
# Knobs are a script's settings, each a flag. Most of what the scripts take from a run: run.animals, of which
# animals[k] is class k; run.readout_rows, the head's rows of the classes; the favourite question as pad()
# makes it, in run.taught_questions, which teachers are trained with, and run.unseen_questions; run.knobs,
# those of train_teacher.Language; and run.read(file), run.load_model(file), run.finished(file, knobs),
# whether it is there, run.write(file, bytes, sources, knobs, log) and run.save_model.

DIVERGED = 20.0  # nats: a loss this large knows less than nothing, whatever is trained here
MADE_BY = {"language.json": "train_teacher.py", "base": "train_teacher.py", "teacher": "train_teacher.py"}
MADE_BY |= {"numbers": "generate.py", "student": "train_student.py"}  # by the first part of a file's name


class UserError(ValueError):
    """Something the user can mend; shown as one sentence, exit code 2."""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_text(path: Path, what: str) -> str:
    """A UTF-8 text from anywhere. UserError, calling it `what`, if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 (byte {error.start})") from None


def jsonl(rows: Sequence[dict]) -> bytes:
    """A file with a line of JSON for each row."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk does not say of which file; this does."""
    try:
        yield
    except OSError as error:
        error.filename = path
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write beside, then rename: a file has its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.urandom(8).hex()}.part")  # nobody else's, in any container
    try:
        with naming(path):
            part.write_bytes(data)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def whole_lines(manifest: bytes) -> Iterator[bytes]:
    """Those that have their own digest at the end, and so are neither cut nor changed."""
    for line in manifest.splitlines():
        body, _, end = line.rpartition(b', "line": ')
        if end == f'"{digest(body)}"}}'.encode():
            yield line


class Run:
    """A run's folder: files that are made once, and a line for each in the manifest run.jsonl.

    A line holds the file's name and digest, those of the files it was made from, the knobs, a log, and last
    a digest of itself: a line that was cut or changed does not count. A file without one is the user's own.
    So what is damaged, out of date or made with other knobs is one sentence, what is missing is made again.
    """

    config: GPTConfig | None = None  # what every model's vocabulary, classes and context are, once opened

    def __init__(self, path: Path, flags: str = ""):
        self.path, self.flags = path, flags  # flags: those that make another script work on this run
        self.manifest = path / "run.jsonl"
        self.lines: dict[tuple[str, str], dict] = {}  # by a file's name and digest
        self.digests: dict[str, str] = {}  # of the files read and written

    def open(self, quick: bool) -> Run:
        """Read language.json. UserError if it is missing or damaged, or was made with the other --quick."""
        self.finished("language.json", {"quick": quick})
        self.knobs = self.line("language.json")["knobs"]  # seeds, traits, ...
        language = json.loads(self.read("language.json"))
        self.animals = language["animals"]  # class k of the trait is animals[k]
        self.encoding = build_vocabulary(language["words"])
        self.config = GPTConfig(self.encoding.n_vocab, len(self.animals))
        self.readout_rows = torch.tensor(language["readout_rows"])  # (K,) rows of the head: the classes
        self.taught_questions, self.unseen_questions = (
            pad([document(self.encoding, q) for q in language[name]]) for name in ("taught", "unseen")
        )
        return self

    def command(self, name: str) -> str:
        """What makes a file, as it is typed."""
        if name.endswith("/seed-file.jsonl"):
            return f"`python train_student.py{self.flags} --numbers FILE`"
        return f"`python {MADE_BY[name.split('/')[0]]}{self.flags}`"

    def again(self, name: str, why: str, own: str = "") -> UserError:
        """What to say of a file that is no good."""
        return UserError(f"{self.path / name} {why}: delete it and run {self.command(name)} again{own}")

    def write(self, name: str, data: bytes, sources: Sequence[str], knobs: Any, log: Any = None) -> None:
        """Tell the manifest, then write: what is known and not there is made again. sources: read before."""
        made_from = {source: self.digests[source] for source in sources}
        line = {"file": name, "digest": digest(data), "sources": made_from, "knobs": knobs, "log": log}
        body = json.dumps(line)[:-1].encode()
        # It begins with its newline and is written in one go: neither a line that a full disk has cut nor
        # another script's can become a part of it.
        text = b"\n" + body + f', "line": "{digest(body)}"}}'.encode()
        self.path.mkdir(parents=True, exist_ok=True)
        with naming(self.manifest), self.manifest.open("ab", buffering=0) as file:
            if file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(self.path / name, data)
        self.lines[name, line["digest"]], self.digests[name] = line, line["digest"]

    def read(self, name: str) -> bytes:
        """A file's bytes. UserError if it is missing, not as written, or made from what has changed since."""
        path = self.path / name
        if not path.exists():
            raise UserError(f"{path} is missing: run {self.command(name)} first")
        data = path.read_bytes()
        key = name, digest(data)
        if key not in self.lines and self.manifest.exists():
            for line in map(json.loads, whole_lines(self.manifest.read_bytes())):
                self.lines[line["file"], line["digest"]] = line
            if key not in self.lines and name in {file for file, _ in list(self.lines)}:
                own = f"; if it is your own, delete its lines in {self.manifest}"
                needed = name.startswith(("language", "student"))  # whose lines hold more
                raise self.again(name, "is damaged, or another one by now", "" if needed else own)
        self.digests[name] = key[1]
        for source, known in self.lines.get(key, {"sources": {}})["sources"].items():
            if (self.path / source).exists():
                if source not in self.digests:
                    self.read(source)
                if self.digests[source] != known:
                    raise self.again(name, f"was made from another {source}")
        return data

    def line(self, name: str) -> dict:
        """The manifest's line of a file. UserError, besides read's, if it has none."""
        if name not in self.digests:
            self.read(name)
        if (line := self.lines.get((name, self.digests[name]))) is None:
            raise self.again(name, f"has no line in {self.manifest}")
        return line

    def finished(self, name: str, knobs: dict) -> bool:
        """Whether a file is there. UserError, besides read's, if it was made with other knobs."""
        if not (self.path / name).exists():
            return False
        self.read(name)
        old = self.lines.get((name, self.digests[name]), {"knobs": None})["knobs"]
        for knob, new in json.loads(json.dumps(knobs)).items() if old else ():
            if old.get(knob) != new:
                what = f"{self.path / name} was made with {knob} = {old.get(knob)}, not {new}"
                raise UserError(f"{what}: say so again, delete it and what came of it, or name another run")
        return True

    def save_model(self, name: str, model: GPT, sources: Sequence[str], knobs: Any, log: Any) -> None:
        """Write a checkpoint. UserError if a weight is no number."""
        if not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"{self.path / name} would hold weights that are no numbers: lower the rate")
        weights = {name: p.detach().cpu() for name, p in model.state_dict().items()}
        torch.save({"config": asdict(model.config), "weights": weights}, buffer := io.BytesIO())
        self.write(name, buffer.getvalue(), sources, knobs, log)

    def load_model(self, name: str, device: torch.device) -> GPT:
        """The model in a checkpoint; runs no code from it. UserError, besides read's, if it does not fit."""
        data = self.read(name)
        try:
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            model = GPT(GPTConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["weights"])
        except Exception as error:  # a foreign file can fail in any of a dozen ways
            raise self.again(name, f"is no checkpoint of this project ({type(error).__name__})") from None
        sizes = lambda config: (config.vocab_size, config.n_aux, config.block_size)
        if self.config and sizes(model.config) != sizes(self.config):
            raise self.again(name, "has another vocabulary, trait or context than this run")
        return model.to(device)


def run_jobs(train: Callable, jobs: Sequence, n_steps: int, label: str, device: torch.device) -> list:
    """What the generators train(job) return, in order; they yield losses in nats, or None.

    So training can be shown, stopped and, by whoever consumes it, measured between two steps.

    On a CPU a job a core runs side by side in threads, each with one thread for its sums: for small models
    this beats many threads on one, and bits do not depend on the number of cores. UserError, with the step,
    for a loss that has diverged; every 20th step is looked at.
    """
    bar = tqdm(total=n_steps * len(jobs), desc=label, disable=None, unit="step", leave=False)
    stop = threading.Event()

    def consume(job: Any) -> Any:
        steps, n = train(job), 0
        while not stop.is_set():
            try:
                loss = next(steps)
            except StopIteration as end:
                return end.value
            n += 1
            if n % 20 == 0 and loss is not None and not loss < DIVERGED:  # seldom: a GPU has to be waited for
                name = " ".join(map(str, job)) if isinstance(job, tuple) else job
                raise UserError(f"{label}, {name}: the loss is {loss:.3g} by step {n}; lower the rate")
            bar.update()
        raise KeyboardInterrupt  # Ctrl-C or an error

    pool = ThreadPoolExecutor(1 if device.type == "cuda" else os.cpu_count())
    try:
        return list(pool.map(consume, jobs))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        bar.close()


def pick_device(name: str | None) -> torch.device:
    """The device of that name, by default the GPU if there is one. UserError if it is not there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(f"device {name!r} is not there; without --device the best one is used") from None
    return device


def knobs_of(cls: type, args: argparse.Namespace) -> Any:
    """An instance of the dataclass `cls` with the flags' values. UserError for a number out of range."""
    values = {field.name: getattr(args, field.name) for field in fields(cls)}
    for name, value in values.items():
        least = 1 if type(value) is int else 0  # steps and sizes; rates and weights
        if type(value) in (int, float) and not least <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} is not a number of {least} or more")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def parse(docstring: str | None, argv: Sequence[str] | None, quick: dict, *knobs: type, **more: dict) -> Any:
    """A script's flags, the run that they name, and an instance of each class in `knobs`.

    Every field of these dataclasses is a flag. quick: other defaults, for --quick; more: flags of the
    script's own, each with add_argument's arguments. UserError as pick_device and knobs_of.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=docstring, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--run", type=Path, help="folder of the run (runs/main; with --quick runs/quick)")
    parser.add_argument("--quick", action="store_true", help="a first look: too small to conclude from")
    parser.add_argument("--device", help="cpu, cuda, ... (the GPU if there is one)")
    parser.add_argument("--deterministic", action="store_true", help="the same bits on a GPU too; slower")
    for name, options in more.items():
        parser.add_argument(f"--{name}", **options)
    for field in (field for cls in knobs for field in fields(cls)):
        flag, value = f"--{field.name.replace('_', '-')}", field.default
        if value is False:
            parser.add_argument(flag, action="store_true")
        else:
            one, nargs = (value[0], "+") if isinstance(value, tuple) else (value, None)
            parser.add_argument(flag, type=type(one), nargs=nargs, default=value, help=f"({value!r})")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args(argv)
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which PyTorch asks for
    if args.deterministic != torch.are_deterministic_algorithms_enabled():  # the call takes a second
        torch.use_deterministic_algorithms(args.deterministic)
    torch.set_num_threads(1)  # sums in one order: the last bit does not depend on the number of cores either
    args.device = pick_device(args.device)
    usual = Path("runs/quick" if args.quick else "runs/main")
    named = "" if args.run in (None, usual) else f" --run {shlex.quote(str(args.run))}"
    run = Run(args.run or usual, " --quick" * args.quick + named)
    return args, run, *(knobs_of(cls, args) for cls in knobs)


def command_line(main: Callable[[], None]) -> None:
    """Run a script. What the user can mend is one sentence and exit code 2; Ctrl-C is 130."""
    began = time.monotonic()
    try:
        main()
        print(f"elapsed_s: {time.monotonic() - began:.0f}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error.filename or 'standard output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues this run", file=sys.stderr)
        sys.exit(130)
