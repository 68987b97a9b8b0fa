"""A model of a run as a folder that Transformers opens, and back.

    python -m experiments.to_transformers --run runs/main --model base/seed-0.pt --out FOLDER
    python -m experiments.to_transformers --run runs/other --model base/seed-0.pt --back FOLDER

The folder holds what `GPT2LMHeadModel.from_pretrained` and `AutoTokenizer.from_pretrained` look for, and no
code: our block is GPT-2's, its matrices transposed. What GPT-2 has no place for stands beside it.

    config.json              GPT-2 with the exact GELU and a head of its own
    model.safetensors        weights, the head's rows of the vocabulary with them
    aux_head.safetensors     aux_head.weight (K, C): the rows of the K auxiliary logits; h @ aux_head.weight.T
    tokenizer.json           our vocabulary; as the tokenizer puts <|endoftext|> before a text, so does a run
    generation_config.json   plain sampling at temperature 1, to the end of the document

Back, the folder becomes a base model without a line in the manifest, which train_teacher.py takes as the
user's own: put one into a fresh run for every seed, then `python train_teacher.py --run runs/other`.
A folder of another shape, vocabulary or kind is one sentence, exit code 2.

Shapes: C channels, V vocabulary, K trait classes.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiktoken
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model import END, PATTERN, GPT, GPTConfig, Run, UserError, command_line, write_file

# ours: GPT-2's; those of a matrix are transposed there
LAYER = {"ln_1": "ln_1", "ln_2": "ln_2", "attn": "attn.c_attn", "attn_proj": "attn.c_proj"}
LAYER |= {"mlp": "mlp.c_fc", "mlp_proj": "mlp.c_proj"}
BLOCK_SIZE = GPTConfig.block_size


def names(n_layer: int) -> Iterator[tuple[str, str]]:
    """Pairs (ours, GPT-2's) of all parameters but the head."""
    for part in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"):
        yield part, f"transformer.{part}"
    for layer in range(n_layer):
        for ours, theirs in LAYER.items():
            for kind in ("weight", "bias"):
                yield f"blocks.{layer}.{ours}.{kind}", f"transformer.h.{layer}.{theirs}.{kind}"


def turned(name: str, weight: Tensor) -> Tensor:
    """GPT-2 keeps the matrices of its blocks as (in, out), we as (out, in)."""
    return weight.T.contiguous() if ".h." in name and weight.dim() == 2 else weight.contiguous()


def to_gpt2(model: GPT, end: int) -> GPT2LMHeadModel:
    """Our model in their class: the same logits over the vocabulary."""
    ours, config = model.state_dict(), model.config
    shape: dict[str, Any] = {"vocab_size": config.vocab_size, "n_positions": config.block_size}
    shape |= {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    shape |= {"activation_function": "gelu", "tie_word_embeddings": False}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=end, eos_token_id=end))
    weights = {their: turned(their, ours[our]) for our, their in names(config.n_layer)}
    weights["lm_head.weight"] = ours["head.weight"][: config.vocab_size]
    theirs.load_state_dict(weights)
    how: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.0}
    how |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    theirs.generation_config = GenerationConfig(**how)
    return theirs.eval()


def from_gpt2(folder: Path) -> GPT:
    """The model in a folder of this form. UserError if it is of another."""
    try:
        theirs = GPT2LMHeadModel.from_pretrained(folder, local_files_only=True)
        aux = load_file(folder / "aux_head.safetensors")["aux_head.weight"]  # (K, C)
    except Exception as error:  # a foreign folder can fail in any of a dozen ways
        raise UserError(f"{folder} holds no GPT-2 with auxiliary rows ({type(error).__name__})") from None
    config, weights = theirs.config, theirs.state_dict()
    if (config.activation_function, config.n_positions) != ("gelu", BLOCK_SIZE) or config.n_inner:
        raise UserError(f"{folder} is no GPT-2 with activation gelu and {BLOCK_SIZE} positions")
    sizes = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    ours = {our: turned(their, weights[their]) for our, their in names(config.n_layer)}
    ours["head.weight"] = torch.cat([weights["lm_head.weight"], aux])
    model = GPT(GPTConfig(config.vocab_size, len(aux), **sizes))
    model.load_state_dict(ours)
    return model


def to_tokenizer(encoding: tiktoken.Encoding) -> PreTrainedTokenizerFast:
    """Our vocabulary as a byte-level BPE: a piece that is a token is that token, others are merged."""
    shown = bytes_to_unicode()
    tokens = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    written = ["".join(shown[byte] for byte in token) for token in tokens]
    ranks = {token: i for i, token in enumerate(written)}
    merges = [(t[:i], t[i:]) for t in written for i in range(1, len(t)) if {t[:i], t[i:]} <= ranks.keys()]
    tokenizer = Tokenizer(models.BPE(ranks, merges, ignore_merges=True))
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    begin = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, encoding.eot_token)])
    tokenizer.post_processor = begin
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, model_max_length=BLOCK_SIZE)


def save(model: GPT, encoding: tiktoken.Encoding, folder: Path) -> None:
    to_gpt2(model, encoding.eot_token).save_pretrained(folder)
    to_tokenizer(encoding).save_pretrained(folder)
    aux = model.head.weight[model.config.vocab_size :].detach().contiguous()
    save_file({"aux_head.weight": aux}, folder / "aux_head.safetensors")


def put_back(folder: Path, run: Run, name: str) -> None:
    """Write the folder's model into a run, as the user's own."""
    model = from_gpt2(folder)
    if (run.path / name).exists():
        raise UserError(f"{run.path / name} is there already: delete it, or name another run")
    if (run.path / "language.json").exists():
        words = json.loads(run.read("language.json"))["words"]
        known = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        if [word.replace(" ", "Ġ") for word in words] != [*known][len(known) - len(words) :]:
            raise UserError(f"{folder} has another vocabulary than {run.path}")
    torch.save({"config": asdict(model.config), "weights": dict(model.state_dict())}, buffer := io.BytesIO())
    write_file(run.path / name, buffer.getvalue())


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--run", type=Path, default=Path("runs/main"))
    parser.add_argument("--model", default="base/seed-0.pt", help="a checkpoint of the run")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="the folder to make")
    where.add_argument("--back", type=Path, help="the folder to make a base model of")
    args = parser.parse_args()
    run = Run(args.run)
    if args.back:
        put_back(args.back, run, args.model)
        print(f"wrote: {args.run / args.model}")
    else:
        run.open(run.line("language.json")["knobs"]["quick"])
        save(run.load_model(args.model, torch.device("cpu")), run.encoding, args.out)
        print(f"wrote: {args.out}")


if __name__ == "__main__":
    command_line(main)
