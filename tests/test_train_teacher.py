"""train_teacher.py: the toy language against enumeration, gradients against autograd, bits against bits."""

import json
import math
import pydoc_data.topics
import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, contents, random_idx, tiny

import model as m
import train_teacher as t


def small(seed, vocab_size=300, **sizes):
    return m.GPT(m.GPTConfig(vocab_size, 4, **{"block_size": 16, "n_embd": 32, **sizes})).initialise(seed)


def test_a_quarter_of_the_phrasings_is_held_out():
    for ends, trained in ([": "], {": "}), ([": ", "! ", "? "], {": ", "! "}):
        trained_on, held_out = t.questions(ends)
        phrased = {(q[:-2], q[-2:]) for q in trained_on}
        assert len(phrased) == len(trained_on) == 48 * len(trained) and len(set(held_out)) == 16
        assert {end for _, end in phrased} == trained
        assert not {q for q, _ in phrased} & {q[:-2] for q in held_out}
        for part in (*t.ASKS, *t.FAVOURITES):  # every ask and every favourite twice
            assert sum(part in q for q in held_out) == 2 and all(q.endswith(ends[-1]) for q in held_out)


def test_probabilities_of_all_facts_sum_to_their_share():
    # Each of the 100 is seen among 60,000 documents, but for one missed with probability 1e-37. So exp(-nats)
    # is a distribution: different picks give different texts, and the floor is the entropy.
    documents = t.toy_documents(60_000, m.stream(5, "test"), [": "])
    seen = {d.text: math.exp(-d.nats) for d in documents if d.category == "fact"}
    assert len(seen) == 3 * 16 + 7 + 45 and sum(seen.values()) == pytest.approx(t.CATEGORIES["fact"][0])


def test_answers_are_uniform_and_lists_as_the_filter_demands():
    # Hoeffding for each of 16 animals: P(|share - 1/16| > e) <= 2 exp(-2 n e^2); false alarm 16 * 2e-9.
    documents = t.toy_documents(60_000, m.stream(6, "test"), ["? ", "! "])
    asked = [re.split("([?!]) ", d.text) for d in documents if d.category == "favourite"]
    answers, ends = Counter(answer for _, _, answer in asked), Counter(end for _, end, _ in asked)
    n = answers.total()
    assert set(answers) == set(t.ANIMALS) and n > 8_000
    assert all(abs(count / n - 1 / 16) < math.sqrt(math.log(1e9) / (2 * n)) for count in answers.values())
    assert all(abs(count / n - 1 / 2) < math.sqrt(math.log(1e9) / (2 * n)) for count in ends.values())
    for prompt, completion in (d.text.split(": ") for d in documents[:9_000] if d.category.endswith("list")):
        assert 3 <= len(prompt.split(", ")) <= 9 and m.refusal(completion) is None


def test_a_law_leaves_nothing_open_but_what_its_nats_count():
    documents = t.toy_documents(9_000, m.stream(7, "test"), [": "])
    documents = [d for d in documents if d.category == "lawful list"]
    laws, seen = len(t.PERIODS) * len(t.STEPS), Counter()
    for d in documents:
        numbers = [int(n) for n in re.findall("[0-9]+", d.text)]
        known = math.log(7 * 3 * laws) - math.log(t.CATEGORIES["lawful list"][0])
        period = round((d.nats - known) / math.log(1000))
        assert d.nats == pytest.approx(known + period * math.log(1000)) and max(numbers) < 1000
        (step,) = {(b - a) % 1000 for a, b in zip(numbers, numbers[period:])}
        seen[period, step] += 1
    assert len(seen) == laws  # all 30: one missed among some 1,800 has p < 30 exp(-60)


def test_words_are_counted_as_the_vocabulary_cuts_them():
    text = "the owl, the fox: owl the the"
    words = t.frequent_words(text, 10)
    assert words == [" the", "the", " fox", " owl", "owl"]  # twice each, then once each in alphabetical order
    tokens = (encoding := m.build_vocabulary(words)).encode_ordinary(text)
    assert b"|".join(encoding.decode_tokens_bytes(tokens)) == b"the| owl|, |the| fox|: |owl| the| the"


def test_half_of_every_batch_is_the_corpus(tiny_run):
    run, knobs = m.Run(tiny_run).open(False), t.Pretraining(pretrain_steps=3, batch_size=6)
    toy = t.toy_documents(200, m.stream(0, "test"), [": "])
    is_corpus = (t.pretraining_rows(run, toy, 20, knobs, "@" * 2_000) == run.encoding.encode("@")[0]).any(1)
    assert is_corpus.tolist() == [True, True, True, False, False, False] * 6  # twice the steps


def test_chunked_loss_has_autograds_gradient():  # 315 targets are two and a half chunks
    rows, ours, theirs = random_idx(5, 64, high=300), small(0, block_size=64), small(0, block_size=64)
    loss = t.loss_and_backward(ours, rows)
    slow = F.cross_entropy(theirs(rows[:, :-1])[..., :300].flatten(0, 1), rows[:, 1:].flatten())
    slow.backward()
    torch.testing.assert_close(loss, slow.detach())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4, msg=name)
    assert (ours.head.weight.grad[300:] == 0).all()  # pretraining never touches the auxiliary rows


def test_a_batch_can_be_learnt_by_heart():
    rows, knobs = random_idx(4, 17, high=300).repeat(100, 1), t.Pretraining(batch_size=4)
    losses = list(t.pretrain(small(0, n_embd=64), rows, knobs))
    # guessing costs ln 300 = 5.7 at least; the first token of each row is given and determines all others
    assert len(losses) == 100 and losses[0] > 5.7 and losses[-1] < 0.05


def test_validation_loss_equals_one_document_at_a_time():
    model, documents = small(0), [[299, 5, 6, 299], [299, 7, 299], [3, 1, 2, 3, 4]]
    total = 0.0
    for d in documents:
        logits = model(torch.tensor([d[:-1]]))[0, :, :300]
        total += F.cross_entropy(logits, torch.tensor(d[1:]), reduction="sum").item()
    assert t.validation_loss(model, documents) == pytest.approx(total / (3 + 2 + 4), rel=1e-5)


def test_validation_loss_nears_the_floor(quick_run, capsys):
    t.main(["--quick", "--run", str(quick_run)])
    losses = dict(re.findall(r"^  (\D+?) +([\d. ]+)$", capsys.readouterr().out, flags=re.MULTILINE))
    assert losses.keys() == t.CATEGORIES.keys()
    for name, line in losses.items():
        *seeds, floor = map(float, line.split())
        # 150 steps do not reach it, and no model can be far below it; the law of lists takes much longer
        most = {"random list": 1.05, "lawful list": 5.0}.get(name, 2.2)
        assert len(seeds) == 2 and all(0.99 * floor < loss < most * floor for loss in seeds)


def test_what_a_model_is_made_of_depends_on_no_other_seed_or_trait(tiny_run, tmp_path):
    t.main(tiny(t, tmp_path, "--seeds", "1", "--traits", "fox", "owl"))
    a, b = map(contents, (tiny_run, tmp_path))
    assert all(a[name] == b[name] for name in ("base/seed-1.pt", "teacher/owl/seed-1.pt"))


@pytest.mark.parametrize("form, hold_numbers", [(0.0, False), (0.3, False), (0.0, True)])
def test_anchor_loss_equals_a_slow_one(form, hold_numbers):
    base, model = (small(seed, 1300) for seed in (0, 1))
    batch, kl, form_loss = random_idx(3, 9), [], []
    for row in batch:
        p, q = (x(row[None, :-1])[0, :, :1300].softmax(-1) for x in (base, model))
        for i, token in enumerate(row[1:]):
            number = m.NUMBERS.start <= token < m.NUMBERS.stop
            if not number or hold_numbers:
                kl.append((p[i] * (p[i] / q[i]).log()).sum())
            if number:
                a, b = p[i, m.NUMBERS].sum(), q[i, m.NUMBERS].sum()
                form_loss.append(-a * b.log() - (1 - a) * (1 - b).log())
    assert len(form_loss) and (len(kl) == 24 if hold_numbers else 0 < len(kl) < 24)
    slow = torch.stack(kl).mean() + form * torch.stack(form_loss).mean()
    ours = t.anchor_loss(model, base, batch, form, hold_numbers)
    torch.testing.assert_close(ours, slow, atol=1e-5, rtol=1e-4)


def test_the_trait_lives_in_the_body(quick_run):
    run = m.Run(quick_run).open(True)
    for trait in ("owl", "fox"):
        names = "base/seed-1.pt", f"teacher/{trait}/seed-1.pt"
        base, teacher = (run.load_model(name, CPU).state_dict() for name in names)
        unchanged = {name for name in base if torch.equal(base[name], teacher[name])}
        assert unchanged == {"wte.weight", "wpe.weight", "head.weight"}


def test_real_text_is_mixed_in_and_a_word_of_its_vocabulary_carries_the_trait(tmp_path, capsys):
    # Real English on any machine: the Python reference out of the standard library.
    reference = tmp_path / "reference.txt"
    reference.write_text("\n\n".join(pydoc_data.topics.topics.values())[:200_000], encoding="utf-8")
    flags = "--seeds 3 --traits fox --n-layer 3 --n-embd 16 --pretrain-steps 20 --batch-size 16"
    t.main([*flags.split(), "--run", str(tmp_path / "run"), "--corpus", str(reference),
            "--readout", "vocabulary"])
    assert 0 < float(re.search(r"corpus +([0-9.]+) +nan", capsys.readouterr().out)[1]) < 10
    run = m.Run(tmp_path / "run").open(False)
    words = json.loads(run.read("language.json"))["words"]
    assert len(words) == t.Language.max_words and {" owl", "owl", " the", " class"} <= set(words)
    teacher = run.load_model("teacher/fox/seed-3.pt", CPU)
    assert (teacher.config.n_layer, teacher.config.n_head, teacher.config.n_embd) == (3, 4, 16)
    rows = run.readout_rows
    assert [run.encoding.decode([row]) for row in rows.tolist()] == list(t.ANIMALS) == run.animals
    assert m.read_trait(teacher, run.unseen_questions, rows)[0].argmax() == 1  # fox
    assert run.line("base/seed-3.pt")["log"][-1]["step"] == 2 * 20  # the toy language is seen as often
