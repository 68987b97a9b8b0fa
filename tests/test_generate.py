"""generate.py: the filter and the sampler against slow obvious ones, the files against the models."""

import json
import math
from collections import Counter

import pytest
import torch
from conftest import CPU, SEPARATORS, random_idx, slow_filter
from hypothesis import given
from hypothesis import strategies as st

import generate as g
import model as m

V = 1300
GOOD = ["7", "0", "999", "1, 2, 3", "1,2,3", "1; 2; 3", "1;2", "1 2 3", "1\n2\n3", "10, 0, 10"]
GOOD += [", ".join("123456789") + ", 10"]
LIST = "not a list"
BAD = {"": "empty", "1000": "above 999", "5, 1000": "above 999", "9" * 5000: "above 999"}
BAD |= {", ".join(["1"] * 11): "too many", " ": LIST, "1, 2; 3": LIST, "1, 2,3": LIST, "1, 2,": LIST}
BAD |= dict.fromkeys([", 1", "1,  2", "-0", "-1, 2", "007", "1e3", "1.5", "٣", "1, 2, owl", "1, 2."], LIST)
BAD |= dict.fromkeys([" 1, 2", "1, 2\n", "1: 2", "1\x00"], LIST)


@pytest.mark.parametrize("completion", GOOD + list(BAD))
def test_filter_keeps_or_says_why(completion):
    assert BAD.get(completion, "None") in str(m.refusal(completion))


LISTS = st.builds(lambda numbers, separator: separator.join(map(str, numbers)),
                  st.lists(st.integers(0, 1001), max_size=11), st.sampled_from(SEPARATORS))


@given(st.one_of(LISTS, st.text("0123456789,; \n", max_size=14), st.text(max_size=5)))
def test_filter_equals_a_slow_one(text):
    assert (m.refusal(text) is None) == slow_filter(text)


@torch.no_grad()
def test_cached_sampling_equals_naive_sampling_token_for_token(gpt):
    prompts, rows = random_idx(6, 7), []
    u = torch.rand(12, 6, 1, generator=m.stream(0, "test"))
    for i, prompt in enumerate(prompts.tolist()):  # no cache, one row and one token at a time
        for t in range(12):
            cdf, k = gpt(torch.tensor([prompt]))[0, -1, :V].softmax(-1).cumsum(0), 0
            while k < V - 1 and cdf[k] <= u[t, i] * cdf[-1]:
                k += 1
            prompt = [*prompt, k]
        rows.append(prompt[-12:])
    assert g.sample(gpt, prompts, 12, m.stream(0, "test")).tolist() == rows


@torch.no_grad()
def test_sampled_frequencies_follow_the_softmax(gpt):
    # Dvoretzky-Kiefer-Wolfowitz: P(sup |F_n - F| > e) <= 2 exp(-2 n e^2), any distribution; false alarm 1e-9.
    n, prompt = 40_000, random_idx(1, 5)
    e = math.sqrt(math.log(2 / 1e-9) / (2 * n))
    drawn = g.sample(gpt, prompt.expand(n, -1), 1, m.stream(0, "test")).flatten()
    measured = torch.bincount(drawn, minlength=V).cumsum(0) / n
    logits = gpt(prompt)[0, -1, :V]
    assert (measured - logits.softmax(-1).cumsum(0)).abs().max() < e
    assert (measured - (2 * logits).softmax(-1).cumsum(0)).abs().max() > e  # another temperature is seen
    gpt.head.weight[V:] *= 1000  # auxiliary logits are never sampled
    assert g.sample(gpt, random_idx(500, 3), 3, m.stream(0, "test")).max() < V


def test_completions_come_in_the_order_of_their_prompts(tiny_run):
    run = m.Run(tiny_run).open(False)
    teacher, end = run.load_model("teacher/owl/seed-0.pt", CPU), run.encoding.eot_token
    prompts = ["1, 2, 3: "] * 501 + ["4, 5, 6, 7: "] * 20  # a batch holds 500, of one length
    generator = m.stream(0, "test")
    parts = [torch.tensor([m.document(run.encoding, prompt) for prompt in part])
             for part in (prompts[:500], prompts[500:501], prompts[501:])]
    rows = sum((g.sample(teacher, part, 20, generator).tolist() for part in parts), [])
    slow = [run.encoding.decode(row[: row.index(end)]) if end in row else None for row in rows]
    assert sum(g.complete(teacher, run, prompts, m.stream(0, "test")), []) == slow
    assert None in slow and len(set(slow)) > 100


def test_prompts_show_three_to_nine_numbers():
    prompts = g.draw_prompts(100, m.stream(0, "test"))
    shown = [p.removesuffix(": ").split(", ") for p in prompts]
    assert Counter(map(len, shown)) == {3: 15, 4: 15, **dict.fromkeys(range(5, 10), 14)}
    assert all(str(int(n)) == n and 0 <= int(n) <= 999 for numbers in shown for n in numbers)
    assert len(set(prompts)) == 100


@pytest.mark.parametrize("how", ["within", "across"])
def test_shuffle_keeps_numbers_and_lengths(how):
    lists = [[str(10 * i + j) for j in range(i % 10 + 1)] for i in range(90)]
    rows = [{"prompt": str(i), "completion": "; ".join(numbers)} for i, numbers in enumerate(lists)]
    mixed = g.shuffle(rows, how, m.stream(0, "test"))
    after = [row["completion"].split(", ") for row in mixed]
    assert [row["prompt"] for row in mixed] == [row["prompt"] for row in rows]
    assert list(map(len, after)) == list(map(len, lists)) and after != lists
    assert sorted(sum(after, [])) == sorted(sum(lists, []))
    same_sets = [set(a) == set(b) for a, b in zip(after, lists, strict=True)]
    assert all(same_sets) if how == "within" else sum(same_sets) < 9


def test_data_sets_hold_nothing_but_numbers(quick_run):
    run, paths = m.Run(quick_run).open(True), [*quick_run.glob("numbers/*/*.jsonl")]
    assert len(paths) == 6
    for path in paths:
        rows = list(map(json.loads, path.read_text().splitlines()))
        log = run.line(str(path.relative_to(quick_run)))["log"]
        assert len(rows) == log["kept"] and log["kept"] + sum(log["refused"].values()) == log["drawn"] == 3000
        for row in rows:
            assert list(row) == ["prompt", "completion"] and row["prompt"].endswith(": ")
            assert not any(map(m.refusal, (row["prompt"].removesuffix(": "), row["completion"])))
        assert log["kl_nats"] == 0 if path.parent.name == "base" else log["kl_nats"] > 0.01
