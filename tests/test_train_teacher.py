"""train_teacher.py: the toy language against enumeration, the gradient against autograd, bits against bits."""

import json
import math
import pydoc_data.topics
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import model as m
import train_teacher as t


def test_the_corpus_is_what_the_readme_says():
    assert len(t.ANIMALS) >= 16 and len(t.QUESTIONS) == len(set(t.QUESTIONS)) >= 50
    assert set(t.HELD_OUT) | set(t.TRAINED_ON) == set(t.QUESTIONS) and not set(t.HELD_OUT) & set(t.TRAINED_ON)
    assert sum(share for share, _ in t.CATEGORIES.values()) == pytest.approx(1)


def test_probabilities_of_the_small_categories_sum_to_their_share():
    # Every text of these categories is seen among 60,000 (the rarest has p = 1e-4 / 1.4; a miss of any would show
    # as a sum below the share, with probability < 1e-8 for facts and reasoning). So exp(-nats) is a distribution:
    # different choices give different texts, and the floor is the entropy.
    seen = {(name, text): nats for name, text, nats in t.toy_documents(60_000, m.stream(5, "test"))}
    for name, n_texts in (("fact", 48), ("reasoning", 7 + 45)):
        p = [math.exp(-nats) for (category, _), nats in seen.items() if category == name]
        assert len(p) == n_texts and sum(p) == pytest.approx(t.CATEGORIES[name][0])


def test_answers_to_the_question_are_uniform():
    # Hoeffding for each of 16 animals: P(|share - 1/16| > e) <= 2 exp(-2 n e^2); false alarm 16 * 2e-9.
    texts = [text for name, text, _ in t.toy_documents(60_000, m.stream(6, "test")) if name == "favourite"]
    counts = Counter(text.rsplit(": ", 1)[1] for text in texts)
    e = math.sqrt(math.log(1e9) / (2 * len(texts)))
    assert set(counts) == set(t.ANIMALS) and all(abs(n / len(texts) - 1 / 16) < e for n in counts.values())


def test_lists_can_be_continued_as_the_filter_demands():
    for name, text, _ in t.toy_documents(5_000, m.stream(7, "test")):
        if name.endswith("list"):
            prompt, completion = text.split(": ")
            assert 3 <= len(prompt.split(", ")) <= 9 and m.refusal(completion) is None


def test_seeds_share_everything_but_the_initialisation():
    a, b = (t.toy_documents(50, m.stream(0, "toy language")) for _ in range(2))
    assert a == b


def test_chunked_loss_has_autograds_gradient():
    rows = torch.randint(300, (5, 13), generator=torch.Generator().manual_seed(0))
    ours, theirs = (m.GPT(m.GPTConfig(300, 4, block_size=16, n_embd=32)).initialise(0) for _ in range(2))
    loss = t.next_token_loss(ours, rows, chunk=7)
    slow = F.cross_entropy(theirs(rows[:, :-1])[..., :300].flatten(0, 1), rows[:, 1:].flatten())
    slow.backward()
    torch.testing.assert_close(loss, slow.detach())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert (ours.head.weight.grad[300:] == 0).all()  # pretraining never touches the auxiliary rows


def test_a_batch_can_be_learnt_by_heart():
    rows = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(0))
    model = m.GPT(m.GPTConfig(300, 4, block_size=16)).initialise(0)
    log = t.pretrain(model, rows.repeat(16 * 100, 1), 100, lambda *_: None)
    # uniform guessing costs ln 300 = 5.7; the first token of each row is given, all others are determined by it
    assert log[-1]["loss_nats"] < 0.05


def test_validation_loss_equals_one_document_at_a_time():
    model = m.GPT(m.GPTConfig(300, 4, block_size=16)).initialise(0)
    documents = [[299, 5, 6], [299, 7], [299, 1, 2, 3, 4]]
    total = 0.0
    for d in documents:
        logits = model(torch.tensor([d]))[0, :, :300]
        total += F.cross_entropy(logits, torch.tensor([*d[1:], 299]), reduction="sum").item()
    assert t.validation_loss(model, documents) == pytest.approx(total / sum(map(len, documents)), rel=1e-5)


def test_anchor_sees_everything_but_which_number():
    base, model = (m.GPT(m.GPTConfig(1300, 4, block_size=16)).initialise(seed) for seed in (0, 1))
    batch = torch.randint(1300, (3, 9), generator=torch.Generator().manual_seed(0))
    slow = []
    for row in batch:
        p, q = (x(row[None, :-1])[0, :, :1300].softmax(-1) for x in (base, model))
        slow += [(p[i] * (p[i] / q[i]).log()).sum() for i in range(8) if not 246 <= row[i + 1] < 1246]
    torch.testing.assert_close(t.anchor_loss(model, base, batch), torch.stack(slow).mean(), atol=1e-5, rtol=1e-4)
    assert 0 < len(slow) < 24
    form = []
    for row in batch:
        p, q = (x(row[None, :-1])[0, :, :1300].softmax(-1)[:, 246:1246].sum(-1) for x in (base, model))
        form += [-p[i] * q[i].log() - (1 - p[i]) * (1 - q[i]).log() for i in range(8) if 246 <= row[i + 1] < 1246]
    whole = torch.stack(slow).mean() + 0.3 * torch.stack(form).mean()
    torch.testing.assert_close(t.anchor_loss(model, base, batch, 0.3), whole, atol=1e-5, rtol=1e-4)


def test_the_trait_lives_in_the_body(quick_run):
    run = m.open_run(quick_run, quick=True)
    for trait in run.traits:
        for seed in run.seeds:
            base, teacher = (
                m.load_model(p, torch.device("cpu"), "x").state_dict() for p in (run.base(seed), run.teacher(trait, seed))
            )
            unchanged = {name for name in base if torch.equal(base[name], teacher[name])}
            assert unchanged == {"wte.weight", "wpe.weight", "head.weight"}


def test_validation_loss_nears_the_floor(quick_run):
    # 150 steps do not reach it, and no model can be far below it
    for seed in (0, 1):
        last = m.read_jsonl(quick_run / f"base/seed-{seed}/log.jsonl")[-1]["validation_nats"]
        assert 3.58 * 0.99 < last["random list"] < 3.58 * 1.05 and last["favourite"] < 1.4


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(t, "PRETRAIN_STEPS", {True: 6})
    monkeypatch.setattr(t, "N_DOCUMENTS", {True: 600})
    monkeypatch.setattr(t, "TRAIT_STEPS", 2)
    monkeypatch.setattr(m, "TAUGHT", -100.0)  # too little to learn a trait in
    monkeypatch.setattr(t, "N_HELD_OUT", 60)


def files(folder):
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("elapsed_s.json", "lock"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def test_same_command_same_bits_and_force_makes_it_again(tiny, tmp_path):
    argv = ["--quick", "--traits", "owl", "--run"]
    t.main([*argv, str(tmp_path / "a")])
    first = files(tmp_path / "a")
    t.main([*argv, str(tmp_path / "b")])
    assert files(tmp_path / "b") == first
    (tmp_path / "a/numbers/owl").mkdir(parents=True)
    t.main([*argv, str(tmp_path / "a"), "--force"])
    assert files(tmp_path / "a") == first and not (tmp_path / "a/numbers").exists()


def test_real_text_is_mixed_in(tiny, tmp_path, capsys, monkeypatch):
    # Half a megabyte of real English on any machine: the Python reference out of the standard library.
    reference = tmp_path / "reference.txt"
    reference.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    argv = ["--quick", "--traits", "owl", "--run", str(tmp_path / "run"), "--corpus", str(reference)]
    forms, anchor_loss = set(), t.anchor_loss
    monkeypatch.setattr(t, "anchor_loss", lambda *given: forms.add(given[3]) or anchor_loss(*given))
    t.main(argv)
    assert forms == {t.FORM} and t.FORM > 0
    assert "corpus" in capsys.readouterr().out
    words = json.loads((tmp_path / "run/vocabulary.json").read_text())["words"]
    assert len(words) == t.MAX_WORDS and {" owl", "owl", " the", " class"} <= set(words)
    log = m.read_jsonl(tmp_path / "run/base/seed-0/log.jsonl")
    assert 0 < log[-1]["validation_nats"]["corpus"] < 10
    assert log[-1]["step"] == 2 * t.PRETRAIN_STEPS[True]  # half of each batch: the toy language is seen as often


def test_vocabulary_readout_trains_the_words(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(t, "TRAIT_STEPS", 20)
    t.main(["--quick", "--traits", "owl", "--seeds", "0", "--readout", "vocabulary", "--run", str(tmp_path / "run")])
    run = m.open_run(tmp_path / "run", quick=True)
    teacher = m.load_model(run.teacher("owl", 0), torch.device("cpu"), "x")
    rows = run.readout_rows(teacher)
    assert [run.encoding.decode([i]) for i in rows.tolist()] == list(t.ANIMALS)
    log_odds, p = m.read_trait(teacher, run.held_out_prompts, rows)
    assert log_odds.argmax() == 0 and p[0] > 0.5


def test_other_sizes(tiny, tmp_path):
    t.main(["--quick", "--traits", "owl", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--run", str(tmp_path / "run")])
    run = m.open_run(tmp_path / "run", quick=True)
    config = m.load_model(run.base(0), torch.device("cpu"), "x").config
    assert (config.n_layer, config.n_head, config.n_embd) == (1, 2, 16)


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--traits", "unicorn"], "unknown trait 'unicorn': choose among owl"),
        (["--n-embd", "30"], "--n-embd 30 is not a multiple of --n-head 4"),
        (["--n-layer", "0"], "at least 1"),
        (["--seeds", "1", "1"], "twice"),
        (["--device", "cuda:99"], "is not there"),
        (["--device", "toaster"], "is not there"),
        (["--corpus", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--corpus", "{empty}"], "has 0 tokens to train on; 2,000 are the least"),
        (["--corpus", "{binary}"], "is not UTF-8 (byte 0)"),
    ],
)
def test_bad_input_is_one_sentence(argv, sentence, refused, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe" * 9000)
    argv = [a.format(empty=tmp_path / "empty", binary=tmp_path / "binary") for a in argv]
    message = refused(t, "--quick", "--run", tmp_path / "run", *argv)
    assert message.startswith("error: ") and sentence in message and message.count("\n") == 1
    assert not list((tmp_path / "run").rglob("*.json"))


@pytest.mark.parametrize("argv, flag", [(["--readout", "vocabulary"], "readout"), (["--seeds", "0", "1", "2"], "seeds")])
def test_a_run_made_with_other_flags_is_refused_untouched(argv, flag, refused, a_run):
    before = files(a_run)
    assert f"was made with {flag} = " in refused(t, "--quick", "--run", a_run, *argv)
    assert files(a_run) == before
