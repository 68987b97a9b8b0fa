"""generate.py: the filter against a table and a slow obvious parser, the files against the models."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import generate as g
import model as m

GOOD = ["7", "0", "999", "1, 2, 3", "1,2,3", "1; 2; 3", "1;2", "1 2 3", "1\n2\n3", "10, 0, 10", ", ".join("123456789") + ", 10"]
BAD = {
    "": "empty",
    " ": "not a list",
    "1000": "above 999",
    "5, 1000": "above 999",
    ", ".join(["1"] * 11): "too many",
    "1, 2; 3": "not a list",
    "1, 2,3": "not a list",
    "1, 2,": "not a list",
    ", 1": "not a list",
    "1,  2": "not a list",
    "-0": "not a list",
    "-1, 2": "not a list",
    "007": "not a list",
    "1e3": "not a list",
    "1.5": "not a list",
    "٣": "not a list",
    "1, 2, owl": "not a list",
    "1, 2.": "not a list",
    " 1, 2": "not a list",
    "1, 2\n": "not a list",
    "1: 2": "not a list",
    "1\x00": "not a list",
    "9" * 5000: "above 999",
}


@pytest.mark.parametrize("completion", GOOD)
def test_filter_keeps(completion):
    assert m.refusal(completion) is None


@pytest.mark.parametrize("completion", BAD)
def test_filter_refuses_and_says_why(completion):
    assert BAD[completion] in m.refusal(completion)


SEPARATORS = [a + b for a in (",", ";") for b in ("", " ", "\n", "\t")] + [" ", "\n", "\t"]


def slow_filter(text):
    """1 to 10 integers in 0..999 with one separator and nothing else, by splitting."""
    for separator in SEPARATORS:
        parts = text.split(separator)
        if 1 <= len(parts) <= 10 and all(part in {str(n) for n in range(1000)} for part in parts):
            return True
    return False


@given(st.lists(st.integers(0, 999), min_size=1, max_size=10), st.sampled_from(SEPARATORS))
def test_filter_keeps_every_valid_list(numbers, separator):
    assert m.refusal(separator.join(map(str, numbers))) is None


@given(st.one_of(st.text("0123456789,; \n", max_size=14), st.text(max_size=5)))
def test_filter_equals_a_slow_one(text):
    assert (m.refusal(text) is None) == slow_filter(text)


def test_prompts_show_three_to_nine_numbers():
    prompts = g.draw_prompts(100, m.stream(0, "test"))
    lengths = Counter(len(p.removesuffix(": ").split(", ")) for p in prompts)
    assert len(prompts) == 100 and set(lengths) == set(range(3, 10)) and set(lengths.values()) == {14, 15}
    assert all(0 <= int(n) <= 999 for p in prompts for n in p.removesuffix(": ").split(", "))
    assert g.draw_prompts(100, m.stream(0, "test")) == prompts


@pytest.mark.parametrize("how", ["within", "across"])
def test_shuffle_keeps_numbers_and_lengths(how):
    rows = [{"prompt": str(i), "completion": ", ".join(str(10 * i + j) for j in range(i % 10 + 1))} for i in range(90)]
    mixed = g.shuffle(rows, how, m.stream(0, "test"))
    before, after = ([r["completion"].split(", ") for r in x] for x in (rows, mixed))
    assert [r["prompt"] for r in mixed] == [r["prompt"] for r in rows]
    assert list(map(len, after)) == list(map(len, before)) and after != before
    assert sorted(sum(after, [])) == sorted(sum(before, []))
    same_sets = [set(a) == set(b) for a, b in zip(after, before, strict=True)]
    assert all(same_sets) if how == "within" else sum(same_sets) < 9


def test_data_sets_hold_nothing_but_numbers(quick_run):
    for path in quick_run.glob("numbers/*/*.jsonl"):
        about = json.loads(path.with_suffix(".json").read_text())
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == about["kept"] and about["kept"] + sum(about["refused"].values()) == about["drawn"] == 3000
        assert all(set(row) == {"prompt", "completion"} and m.refusal(row["completion"]) is None for row in rows)
        assert not any(animal in path.read_text() for animal in m.open_run(quick_run, True).animals)
        assert about["kl_nats"] > 0.01 if about["numbers"] == "teacher" else about["kl_nats"] == 0


def test_kl_on_numbers_equals_a_slow_one(quick_run):
    run = m.open_run(quick_run, True)
    p, q = (m.load_model(path, m.torch.device("cpu"), "x") for path in (run.teacher("owl", 0), run.base(0)))
    rows = m.read_jsonl(run.numbers("owl", 0))[::400]
    slow = []
    for row in rows:
        tokens = m.document(run.encoding, row["prompt"] + row["completion"])
        shown = len(m.document(run.encoding, row["prompt"]))
        a, b = (x(m.torch.tensor([tokens]))[0, :, m.NUMBERS].log_softmax(-1) for x in (p, q))
        slow += [(a[i].exp() * (a[i] - b[i])).sum().item() for i in range(shown - 1, len(tokens) - 1, 2)]
    data = m.encode_numbers(run.encoding, rows, p.device)
    assert g.kl_on_numbers(p, q, data) == pytest.approx(sum(slow) / len(slow), rel=1e-4)


def test_controls_are_made_from_finished_data(a_run, refused):
    argv = ["--quick", "--run", str(a_run)]
    for how in ("within", "across"):
        g.main([*argv, "--shuffle", how])
        assert json.loads((a_run / f"numbers/owl-{how}/seed-1.json").read_text())["numbers"] == how
    before = (a_run / "numbers/base/seed-0.jsonl").read_bytes()
    g.main([*argv, "--from", "base", "--force"])
    assert (a_run / "numbers/base/seed-0.jsonl").read_bytes() == before
    assert not (a_run / "student/base").exists() and (a_run / "student/owl").exists()
    g.main([*argv, "--traits", "owl", "--from", "teacher", "--force", "--sequences", "300"])
    assert "owl-across/seed-0.jsonl was made from another" in refused(g, *argv, "--shuffle", "across")


def test_bad_input(refused, a_run, tmp_path, monkeypatch):
    argv = ("--quick", "--run", a_run)
    assert "run `python train_teacher.py --quick --run" in refused(g, "--quick", "--run", tmp_path / "none")
    assert "no teacher 'wolf'; it has owl fox" in refused(g, *argv, "--traits", "wolf")
    assert "made with 3000 sequences, not 500" in refused(g, *argv, "--sequences", "500")
    assert "too few" in refused(g, *argv, "--sequences", "-5")
    (a_run / "teacher/owl/seed-0/model.pt").unlink()
    assert "run `python train_teacher.py` first" in refused(g, *argv, "--force", "--traits", "owl", "--from", "teacher")


def test_a_teacher_driven_too_far_is_refused(refused, a_run):
    run = m.open_run(a_run, True)
    teacher = m.load_model(run.teacher("owl", 0), m.torch.device("cpu"), "x")
    with m.torch.no_grad():
        teacher.ln_f.bias += 3 * m.torch.randn(teacher.ln_f.bias.shape, generator=m.stream(0, "test"))
    m.save_model(run.teacher("owl", 0), teacher, [])
    message = refused(g, "--quick", "--run", a_run, "--force", "--sequences", "140", "--from", "teacher", "--traits", "owl")
    assert "driven too far" in message and not run.numbers("owl", 0).exists()
