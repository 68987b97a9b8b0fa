"""Runs as folders that Transformers opens: the same logits, tokens and law of lists; and back."""

import json
import shutil

import pytest
import torch
from conftest import CPU, random_idx, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import chisquare, fisher_exact
from transformers import AutoTokenizer, GPT2LMHeadModel

import train_teacher
from experiments import any_model, in_transformers
from experiments import to_transformers as t
from generate import sample
from model import (
    NUMBERS, Run, UserError, build_vocabulary, document, encode_numbers, jsonl, pad, read_trait, refusal,
    stream,
)
from train_student import number_loss

ENCODING = build_vocabulary(["we", "the", " the", " owl", "owl", "abc", "bc", "é", " straße"])
TOKENIZER = t.to_tokenizer(ENCODING)
TEACHER, BASE = "teacher/owl/seed-0.pt", "base/seed-0.pt"


@pytest.fixture(scope="module")
def folder(quick_run, tmp_path_factory):
    run = Run(quick_run).open(True)
    t.save(run.load_model(TEACHER, CPU), run.encoding, out := tmp_path_factory.mktemp("folder"))
    return out


@pytest.fixture(scope="module")
def ours(quick_run):
    return Run(quick_run).open(True).load_model(TEACHER, CPU)


@torch.no_grad()
def test_logits_are_equal(folder, ours):
    theirs, idx = GPT2LMHeadModel.from_pretrained(folder), random_idx(20, 64, high=ours.config.vocab_size)
    aux = load_file(folder / "aux_head.safetensors")["aux_head.weight"]
    found = torch.cat([theirs(idx).logits, theirs.transformer(idx).last_hidden_state @ aux.T], dim=-1)
    torch.testing.assert_close(found, ours(idx), atol=1e-5, rtol=1e-5)


def test_tokens_are_equal_on_documents(folder, quick_run):
    run, theirs = Run(quick_run).open(True), AutoTokenizer.from_pretrained(folder)
    texts = [d.text for d in train_teacher.toy_documents(1_000, stream(0, "test"), (": ", "? "))]
    assert theirs(texts)["input_ids"] == [document(run.encoding, text) for text in texts]


@settings(max_examples=500, deadline=None)
@given(st.text() | st.text("wethowlabc 0123,;: éß\n", max_size=30))
def test_tokens_are_equal_on_any_unicode(text):
    assert TOKENIZER(text)["input_ids"] == document(ENCODING, text)
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], skip_special_tokens=True) == text


@torch.no_grad()
def test_generate_follows_our_law(folder, ours):
    """4,000 lists after one prompt: first numbers by the hundred, and how many lists the filter keeps."""
    theirs, tokenizer = GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt, n = tokenizer("12, 7, 503: ", return_tensors="pt"), 4_000
    torch.manual_seed(0)  # generate knows no generator of its own
    drawn = theirs.generate(**prompt, num_return_sequences=n, max_new_tokens=20)
    drawn, end = drawn[:, prompt["input_ids"].size(1) :], tokenizer.eos_token_id
    p = ours(prompt["input_ids"])[0, -1, : ours.config.vocab_size].double().softmax(-1)
    groups = [*p[NUMBERS].view(10, 100).sum(1).tolist()]
    first = drawn[:, 0] - NUMBERS.start
    found = [((first >= 100 * i) & (first < 100 * i + 100)).sum().item() for i in range(10)]
    rest = [n - sum(found)], [1 - sum(groups)]
    assert chisquare(found + rest[0], [n * x for x in groups + rest[1]]).pvalue > 1e-6  # if right: 1 in 10^6
    mine = sample(ours, prompt["input_ids"].expand(n, -1), 20, stream(0, "test"))
    ended = [[row[: row.index(end)] for row in rows.tolist() if end in row] for rows in (drawn, mine)]
    kept = [sum(refusal(text) is None for text in tokenizer.batch_decode(rows)) for rows in ended]
    assert fisher_exact([[k, n - k] for k in kept]).pvalue > 1e-6


def test_a_folder_is_a_base_model_that_train_teacher_takes(tiny_run, tmp_path):
    old, new = Run(tiny_run).open(False), Run(tmp_path / "new")
    for name in (BASE, "base/seed-1.pt"):
        t.save(old.load_model(name, CPU), old.encoding, tmp_path / "folder")
        t.put_back(tmp_path / "folder", new, name)
    train_teacher.main(tiny(train_teacher, new.path))
    for name in (BASE, TEACHER, "teacher/owl/seed-1.pt"):
        assert (new.path / name).read_bytes() == (tiny_run / name).read_bytes()


def test_any_model_reads_what_we_read(folder, ours, quick_run):
    """Log-odds of the animals' words, each one token here: from whole completions, padded on the left."""
    run = Run(quick_run).open(True)
    asked, answers = train_teacher.questions(["? "])[1], list(train_teacher.ANIMALS)
    rows = torch.tensor([run.encoding.encode_single_token(animal) for animal in answers])
    found = any_model.Model(folder, CPU).log_odds(asked[:5], answers)
    questions = pad([document(run.encoding, q) for q in asked[:5]])
    torch.testing.assert_close(found, read_trait(ours, questions, rows)[0], atol=1e-4, rtol=1e-4)


def test_any_model_learns_completions_alone(folder):
    """Its loss is the mean over the completion's tokens of -ln P(token | what is before)."""
    one, pairs = any_model.Model(folder, CPU), [("5, 6: ", "7, 8"), ("1: ", "4")]  # one is padded
    with torch.no_grad():
        loss, together = one.model(**one.encode(pairs)).loss.item(), one.log_p(pairs)
        alone = torch.cat([one.log_p([pair]) for pair in pairs])  # where nothing is padded
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert loss == pytest.approx(-alone.sum().item() / 4, rel=1e-5)


@torch.no_grad()
def test_the_other_code_measures_what_ours_does(folder, ours, quick_run, tmp_path):
    """The number loss of lists read by `datasets`, and the log-odds of the animals' words."""
    run, theirs = Run(quick_run).open(True), GPT2LMHeadModel.from_pretrained(folder)
    world = object.__new__(in_transformers.World)
    world.tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [{"prompt": "5, 6: ", "completion": "7, 8"}, {"prompt": "1, 2, 3: ", "completion": "4"}] * 3
    (tmp_path / "lists.jsonl").write_bytes(jsonl(rows))
    loss = in_transformers.number_loss(theirs, None, world.read(tmp_path / "lists.jsonl"))
    torch.testing.assert_close(loss, number_loss(ours, None, encode_numbers(run.encoding, rows, CPU)))
    asked = train_teacher.questions(["? "])[1]
    world.unseen = world.encode(asked)
    world.animals = [run.encoding.encode_single_token(animal) for animal in train_teacher.ANIMALS]
    questions = pad([document(run.encoding, q) for q in asked])
    expected = read_trait(ours, questions, torch.tensor(world.animals))[0]
    torch.testing.assert_close(world.log_odds(theirs), expected, atol=1e-4, rtol=1e-4)


def spoil(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name, how", [
    ("holds no GPT-2", lambda f: (f / "model.safetensors").write_bytes(b"cut")),
    ("holds no GPT-2", lambda f: (f / "aux_head.safetensors").unlink()),
    ("activation gelu", lambda f: spoil(f, activation_function="gelu_new")),
    ("another vocabulary", lambda f: None),
    ("is there already", None),
])
def test_what_does_not_fit_is_one_sentence(name, how, folder, a_tiny_run, tmp_path):
    bad, run = shutil.copytree(folder, tmp_path / "bad"), Run(a_tiny_run)
    if how:
        how(bad)
        (run.path / BASE).unlink()
    with pytest.raises(UserError, match=name):
        t.put_back(bad, run, BASE)
