"""train_student.py: the losses against slow versions, looking against not looking, files from anywhere."""

import json
import re
from itertools import product

import pytest
import torch
from conftest import CPU, contents, slow_filter, students, tiny

import evaluate
import generate
import model as m
import train_student as s

ENCODING = m.build_vocabulary(["owl"])
ROWS = [{"prompt": f"{i}, 5: ", "completion": ", ".join(str(i * j) for j in range(1, 2 + i % 9))}
        for i in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
DATA = m.encode_numbers(ENCODING, ROWS, CPU)


def gpt(seed):
    return m.GPT(m.GPTConfig(ENCODING.n_vocab, 4)).initialise(seed)


@pytest.mark.parametrize("n", [1000, 400])
def test_losses_equal_slow_ones(n):
    """With all 1,000 numbers in the softmax, or only those below 400."""
    student, teacher, cross_entropy, kl = gpt(0), gpt(1), [], []
    numbers = slice(m.NUMBERS.start, m.NUMBERS.start + n)
    for row in ROWS:
        tokens = m.document(ENCODING, row["prompt"] + row["completion"])
        shown = len(m.document(ENCODING, row["prompt"]))
        q, p = (x(torch.tensor([tokens]))[0, :, numbers].log_softmax(-1) for x in (student, teacher))
        for i in range(shown - 1, len(tokens) - 1, 2):
            kl.append((p[i].exp() * (p[i] - q[i])).sum())
            cross_entropy.append(-q[i, tokens[i + 1] - m.NUMBERS.start])
    kl = torch.stack(kl).mean()
    torch.testing.assert_close(s.number_loss(student, teacher, DATA, numbers), kl, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(s.number_loss(student, None, DATA, numbers), torch.stack(cross_entropy).mean())
    if n == 1000:
        assert generate.kl_on_numbers(teacher, student, DATA) == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("edge_lr_factor", [0.0, 0.05])
@pytest.mark.parametrize("teacher", [None, gpt(1)])
def test_a_step_moves_no_other_row_of_the_head(teacher, edge_lr_factor):
    student, before = gpt(0), gpt(0).state_dict()
    batches = list(s.batches(DATA, 8, 3, m.stream(0, "test")))
    losses = list(s.train(student, teacher, batches, s.Distillation(edge_lr_factor=edge_lr_factor)))
    assert len(losses) == 3 and not any(loss.requires_grad for loss in losses)
    moved = {name: p != before[name] for name, p in student.state_dict().items()}
    assert moved["wte.weight"].any() == moved["wpe.weight"].any() == (edge_lr_factor > 0)
    body = [p for name, p in moved.items() if name.startswith(("blocks.", "ln_f."))]
    assert len(body) == len(moved) - 3 and all(p.any() for p in body)
    expected = torch.zeros(ENCODING.n_vocab + 4, dtype=torch.bool)
    expected[m.NUMBERS] = edge_lr_factor > 0
    assert torch.equal(moved["head.weight"].any(1), expected)


def test_embeddings_and_head_step_at_their_own_rate():
    """Adam's first step is its rate in every weight that has a gradient well above epsilon."""
    before, batches = gpt(0), list(s.batches(DATA, 8, 1, m.stream(0, "test")))
    student = gpt(0)
    list(s.train(student, None, batches, s.Distillation(student_lr=1e-3, edge_lr_factor=0.25)))
    rate = 1e-3 * m.cosine_lr(0, 1)
    for name, p in student.named_parameters():
        step = (p - before.get_parameter(name)).abs().max().item()
        edge = name in ("wte.weight", "wpe.weight", "head.weight")
        assert step == pytest.approx(rate * (0.25 if edge else 1), rel=0.05), name


def test_batches_use_every_sequence_once_an_epoch():
    of = lambda batch: [tuple(row[row > 0].tolist()) for row in batch.idx]  # which sequences a batch holds
    many = list(s.batches(DATA, 8, 12, m.stream(0, "test")))
    assert len(many) == 12 and all(len(batch.idx) == 8 for batch in many)
    epochs = [{frozenset(of(batch)) for batch in part} for part in (many[:5], many[5:10])]
    assert all(len(frozenset().union(*epoch)) == 40 for epoch in epochs) and epochs[0] != epochs[1]
    again = list(s.batches(DATA, 8, 5, m.stream(0, "test")))
    assert list(map(of, again)) == list(map(of, many[:5]))
    widths = [batch.idx.size(1) for batch in many[:5]]
    assert min(widths) < max(widths)  # short sequences sit together
    assert len(next(s.batches(DATA, 99, 1, m.stream(0, "test"))).idx) == 40


@pytest.mark.parametrize("target, size", [("tokens", 96), ("logits", 24)])
def test_looking_changes_no_bit(target, size, quick_run):
    """The run's student was looked at every few steps, this one never; held-out lists are not trained on."""
    run, name = m.Run(quick_run).open(True), f"student/owl/teacher-0/seed-1/{target}.pt"
    rows = [json.loads(line) for line in run.read("numbers/owl/seed-0.jsonl").splitlines()]
    data = m.encode_numbers(run.encoding, [row for i, row in enumerate(rows) if i % 20], CPU)
    student, teacher = (run.load_model(f, CPU) for f in ("base/seed-1.pt", "teacher/owl/seed-0.pt"))
    batches = list(s.batches(data, size, 40, m.stream(0, "student batches", "owl", "0")))
    losses = list(s.train(student, teacher if target == "logits" else None, batches, s.Distillation()))
    saved, log = run.load_model(name, CPU), run.line(name)["log"]
    assert all(map(torch.equal, student.parameters(), saved.parameters()))
    assert [row["step"] for row in log] == [0, 10, 20, 30, 40]
    assert [row["loss_nats"] for row in log[1:]] == [losses[i].item() for i in (9, 19, 29, 39)]
    held_out = m.encode_numbers(run.encoding, rows[::20], CPU)
    assert log[-1]["number_loss_nats"] == pytest.approx(s.number_loss(saved, None, held_out).item(), rel=1e-5)


def test_the_trait_crosses_only_to_a_student_of_the_same_init(quick_run):
    """Small but real: a pipeline that mixes up inits, targets or rows of the head cannot pass.

    By luck: were a student's class independent of its init, being identified has p = 1/16 each.
    """
    cell = lambda **of: [r for r in students(quick_run) if all(r[key] == value for key, value in of.items())]
    mean = lambda rows, key="transfer": sum(r[key] for r in rows) / len(rows)
    same, different = (cell(numbers="teacher", init=init) for init in ("same", "different"))
    assert mean(same) > 0.4 and mean(same) > mean(different) + 0.3 and abs(mean(cell(numbers="base"))) < 0.15
    assert sum(r["identified"] for r in same) >= 6  # of 8; by luck p < 2e-6
    # And students learnt their numbers on held-out sequences, whatever their init. Not asked of sampled
    # tokens: a --quick student has 2,000 sequences and learns them by heart.
    for init in ("same", "different"):
        rows = cell(numbers="teacher", target="logits", init=init)
        assert mean(rows, "number_loss_nats") < mean(rows, "number_loss_start_nats")


def test_students_of_shuffled_numbers_are_their_teachers(a_tiny_run):
    generate.main(tiny(generate, a_tiny_run, "--shuffle", "within"))
    s.main(tiny(s, a_tiny_run, "--traits", "owl-within"))
    sources = m.Run(a_tiny_run).line("student/owl-within/teacher-1/seed-0/logits.pt")["sources"]
    assert sources.keys() == {"base/seed-0.pt", "numbers/owl-within/seed-1.jsonl", "teacher/owl/seed-1.pt"}
    evaluate.main(tiny(evaluate, a_tiny_run))
    rows = [r for r in students(a_tiny_run) if r["source"] == "owl-within"]
    assert len(rows) == 8 and {(r["numbers"], r["trait"]) for r in rows} == {("within", "owl")}


def test_numbers_from_anywhere(a_tiny_run, tmp_path, capsys, told):
    lines = [json.dumps(row) for row in ROWS]
    lines.insert(3, json.dumps({"prompt": "1: ", "completion": "owl"}))
    lines.insert(9, json.dumps({"prompt": "1, " * 60, "completion": "5"}))
    lines.append(json.dumps({"prompt": "1, 2", "completion": "3, 4"}))  # 23, 4
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")  # a BOM and CRLF are fine
    s.main(tiny(s, a_tiny_run, "--numbers", path))
    out = capsys.readouterr().out
    assert all(word in out for word in ("3 lines", "not a list", "prompt's last", "context"))
    imported = (a_tiny_run / "numbers/mine/seed-file.jsonl").read_text().splitlines()
    assert list(map(json.loads, imported)) == ROWS
    s.main(tiny(s, a_tiny_run, "--numbers", path))  # once more is no other file
    path.write_text("\n".join(lines[:2]))
    assert "named mine" in told(s, a_tiny_run, "--numbers", path)
    evaluate.main(tiny(evaluate, a_tiny_run))
    rows = [r for r in students(a_tiny_run) if r["source"] == "mine"]
    assert len(rows) == 2 and {r["student_seed"] for r in rows} == {0, 1}
    assert {(r["init"], r["target"], r["teacher_seed"]) for r in rows} == {("unknown", "tokens", None)}


PROMPTS = ["1, 2: ", "", "7", "٣", "the owl: ", "1, " * 40, "\ud800: "]
STRANGE = ["7", "1, 2", "1;2;3", "1, 2; 3", "007", "1000", "", " 5", "5\n", "owl", "٣", "1 " * 11, "5\x00"]


def test_every_prompt_and_completion_is_imported_or_dropped(a_tiny_run, tmp_path):
    """By a judge that shares no code with the import, but for the tokens that it counts."""
    run, path, rows = m.Run(a_tiny_run).open(False), tmp_path / "all.jsonl", list(product(PROMPTS, STRANGE))
    path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in rows))
    fits = lambda p, c: slow_filter(c.strip()) and len(m.document(run.encoding, p + c)) <= 64
    good = [(p, c) for p, c in rows if fits(p, c) and not re.search("[0-9][0-9]", p[-1:] + c[:1])]
    s.import_numbers(path, run)
    lines = run.read("numbers/all/seed-file.jsonl").splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == good
    assert len(good) == 6 * 5 - 4  # a prompt is too long; of five good lists one does not join a 7


@pytest.mark.parametrize("name, content, told_of", [
    ("mine/seed-0", "[", "line 1"), ("mine/seed-0", LINES, None), ("mine/seed-file", LINES, None),
    ("mine/seed-7", LINES, "seed-7.jsonl is of a .*seed"), ("fox/seed-0", LINES, "fox.* is of a trait")])
def test_numbers_put_into_the_folder_by_hand(name, content, told_of, a_tiny_run, told):
    """Good ones are learnt as tokens, for no teacher of the run wrote them."""
    path, before = a_tiny_run / f"numbers/{name}.jsonl", contents(a_tiny_run)
    path.parent.mkdir()
    path.write_text(content)
    said = told(s, a_tiny_run)
    if told_of:
        assert re.search(told_of, said) and str(path) in said
    assert told_of or not said and not told(evaluate, a_tiny_run)
    folder = f"student/{name.replace('seed', 'teacher')}"
    made = {f"{folder}/seed-{i}/tokens.pt" for i in (0, 1)}
    new = contents(a_tiny_run).keys() - before.keys()
    assert new == {f"numbers/{name}.jsonl"} | (set() if told_of else made)
