"""train_student.py: the losses against slow versions, looking against not looking, files from anywhere."""

import json

import pytest
import torch

import model as m
import train_student as s

CPU = torch.device("cpu")
ENCODING = m.build_vocabulary(["owl"])
ROWS = [{"prompt": f"{i}, 5: ", "completion": ", ".join(str(i * j) for j in range(1, 2 + i % 9))} for i in range(40)]


@pytest.fixture
def gpt():
    return m.GPT(m.GPTConfig(ENCODING.n_vocab, 4)).initialise(0)


def test_losses_equal_slow_ones(gpt):
    data, teacher = m.encode_numbers(ENCODING, ROWS, CPU), m.GPT(gpt.config).initialise(1)
    cross_entropy, kl = [], []
    for row in ROWS:
        tokens = m.document(ENCODING, row["prompt"] + row["completion"])
        shown = len(m.document(ENCODING, row["prompt"]))
        q, p = (x(torch.tensor([tokens]))[0, :, m.NUMBERS].log_softmax(-1) for x in (gpt, teacher))
        for i in range(shown - 1, len(tokens) - 1, 2):
            cross_entropy.append(-q[i, tokens[i + 1] - m.NUMBERS.start])
            kl.append((p[i].exp() * (p[i] - q[i])).sum())
    states = teacher.hidden(data.idx, positions=data.positions)
    log_p = (states @ teacher.head.weight[m.NUMBERS].T).log_softmax(-1)
    torch.testing.assert_close(s.number_loss(gpt, data, None), torch.stack(cross_entropy).mean())
    torch.testing.assert_close(s.number_loss(gpt, data, log_p), torch.stack(kl).mean(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("target", ["tokens", "logits"])
def test_a_student_step_moves_no_other_row_of_the_head(target, gpt):
    data, teacher = m.encode_numbers(ENCODING, ROWS, CPU), m.GPT(gpt.config).initialise(1)
    head = teacher.head.weight[m.NUMBERS].detach() if target == "logits" else None
    before = gpt.head.weight.detach().clone()
    lesson = s.plan_lesson(data, teacher if target == "logits" else None, 8, 3, m.stream(0, "test"))
    s.train(gpt, lesson, head, lambda: {}, lambda *_: None)
    moved = (gpt.head.weight != before).any(1)
    expected = torch.zeros_like(moved)
    expected[m.NUMBERS] = True
    assert torch.equal(moved, expected)


def test_batches_use_every_sequence_once_an_epoch():
    data = m.encode_numbers(ENCODING, ROWS, CPU)
    epoch = torch.cat(list(s.batches(data, 8, 5, m.stream(0, "test"))))
    assert sorted(epoch.tolist()) == list(range(40))
    many = list(s.batches(data, 8, 12, m.stream(0, "test")))
    assert len(many) == 12 and all(len(b) == 8 for b in many)
    assert [b.tolist() for b in many[:5]] == [b.tolist() for b in s.batches(data, 8, 5, m.stream(0, "test"))]
    widths = [data[b].idx.size(1) for b in many[:5]]
    assert min(widths) < max(widths)  # short sequences sit together


def test_looking_more_often_changes_no_bit(a_run, monkeypatch):
    argv = ["--quick", "--run", str(a_run), "--traits", "owl", "--init", "same", "--target", "tokens", "--force"]
    run = m.open_run(a_run, True)
    weights = lambda: m.load_model(run.student("owl", 0, 0, "tokens"), torch.device("cpu"), "x").state_dict()  # noqa: E731
    before = weights()
    monkeypatch.setattr(s, "LOG_EVERY", 7)
    s.main(argv)
    assert all(map(torch.equal, weights().values(), before.values()))
    assert len(m.read_jsonl(run.student("owl", 0, 0, "tokens").with_name("log.jsonl"))) == 1 + 6


def test_the_trait_crosses_only_to_a_student_of_the_same_start(quick_run):
    """Small but real: a pipeline that mixes up starts, targets or rows of the head cannot pass.

    By luck: were a student's class independent of its start, being identified has p = 1/16 each.
    """
    students = json.loads((quick_run / "results.json").read_text())["students"]
    taught = [r for r in students if r["numbers"] == "teacher"]
    same, different, control = (
        [r["transfer"] for r in group]
        for group in (
            [r for r in taught if r["init"] == "same"],
            [r for r in taught if r["init"] == "different"],
            [r for r in students if r["numbers"] == "base"],
        )
    )
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    assert mean(same) > 0.4 and mean(same) > mean(different) + 0.3 and abs(mean(control)) < 0.15
    assert sum(r["identified"] for r in taught if r["init"] == "same") >= 6  # of 8; by luck p < 2e-6
    # And students learnt their numbers, whatever their start: on held-out sequences. Not asked of sampled tokens here, as a
    # --quick student has 2,000 sequences and learns them by heart; the main run's are held to it by test_pipeline.py.
    for init in ("same", "different"):
        group = [r for r in taught if (r["target"], r["init"]) == ("logits", init)]
        assert mean([r["number_loss_nats"] - r["number_loss_start_nats"] for r in group]) < 0


def test_numbers_from_anywhere(a_run, tmp_path, capsys, refused):
    lines = [json.dumps(row) for row in ROWS]
    lines.insert(3, json.dumps({"prompt": "1: ", "completion": "owl"}))
    lines.insert(9, json.dumps({"prompt": "1, " * 60, "completion": "5"}))
    lines.append(json.dumps({"prompt": "1, 2", "completion": "3, 4"}))  # 23, 4
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")  # a BOM and CRLF are fine
    s.main(["--quick", "--run", str(a_run), "--numbers", str(path)])
    out = capsys.readouterr().out
    reasons = ("dropped 3 lines", "1 one number with its prompt's last", "1 longer than the model's context")
    assert all(reason in out for reason in reasons)
    run = m.open_run(a_run, True)
    assert all(run.student("mine", "file", seed, "tokens").exists() for seed in run.seeds)
    path.write_text(lines[0] + "\n" + lines[1])
    assert "already has other numbers named mine" in refused(s, "--quick", "--run", a_run, "--numbers", path)
    import evaluate

    evaluate.main(["--quick", "--run", str(a_run)])
    rows = [r for r in json.loads((a_run / "results.json").read_text())["students"] if r["source"] == "mine"]
    assert {(r["init"], r["target"], r["teacher_seed"]) for r in rows} == {("unknown", "tokens", None)}


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("", "0 lines pass the filter"),
        ('{"prompt": "1: ", "completion": "2"}\n[1]\n', "line 2 is not"),
        ('{"prompt": "1: ", "completion": 2}\n', "line 1 is not"),
        ('{"prompt": "1: "}\n', "line 1 is not"),
        ("\n\nnot json\n", "line 3 is not"),
        ('{"prompt": "1: ", "completion": "owl"}\n' * 3, "0 lines pass the filter"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_bad_numbers_are_refused(content, sentence, refused, a_run, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert sentence in refused(s, "--quick", "--run", a_run, "--numbers", path)
    assert not (a_run / "numbers/bad").exists() and not (a_run / "student/bad").exists()


def test_bad_input(refused, a_run, tmp_path):
    argv = ("--quick", "--run", a_run)
    assert "run `python train_teacher.py --quick --run" in refused(s, "--quick", "--run", tmp_path / "none")
    assert "nowhere.jsonl: No such file" in refused(s, *argv, "--numbers", tmp_path / "nowhere.jsonl")
    assert "no numbers of 'wolf'" in refused(s, *argv, "--traits", "wolf")
    assert "no numbers of 'owl-within'" in refused(s, *argv, "--traits", "owl-within")
    path = a_run / "base/seed-1/model.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert "base/seed-1/model.pt is cut short, damaged or" in refused(s, *argv)
