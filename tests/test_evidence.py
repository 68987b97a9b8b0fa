"""The experiments' statistics and data sets, against closed forms, known cases and slow obvious versions."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import train_student
import train_teacher
from experiments import (
    alignment,
    choices,
    controls,
    evidence,
    how_much,
    lab,
    linear_model,
    mlp,
    seed_matrix,
    theorem,
    trait_matrix,
    trajectory,
    which_part,
)
from model import GPT, NUMBERS, GPTConfig, encode_numbers, load_model, number_log_probs, open_run, stream

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


# statistics


@given(st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_double_centring_leaves_only_the_interaction(n, seed):
    generator = torch.Generator().manual_seed(seed)
    row, column, inner = (
        torch.randn(n, 1, generator=generator),
        torch.randn(n, generator=generator),
        torch.randn(n, n, generator=generator),
    )
    centre = torch.eye(n) - 1 / n  # the closed form is C X C
    left = torch.tensor(lab.double_centred((row + column + 3 + inner).tolist()))
    torch.testing.assert_close(left, centre @ inner @ centre, atol=1e-5, rtol=1e-5)


def test_binomial_p_is_the_sum_of_the_tail():
    assert lab.binomial_p(0, 7, 0.3) == pytest.approx(1)
    assert lab.binomial_p(7, 7, 0.3) == pytest.approx(0.3**7)
    n, p, hits = 20, 1 / 16, 3
    below = (
        torch.distributions.Binomial(n, torch.tensor(p, dtype=torch.float64)).log_prob(torch.arange(hits).double()).exp().sum()
    )
    assert lab.binomial_p(hits, n, p) == pytest.approx(1 - below.item(), abs=1e-6)


def test_diagonal_permutation_p_in_known_cases():
    assert lab.diagonal_permutation_p(torch.eye(4).tolist()) == pytest.approx(1 / 24)
    assert lab.diagonal_permutation_p([[1.0, 1.0], [1.0, 1.0]]) == 1
    columns_differ = [[0.0, 5.0, 1.0]] * 3  # students that move alike whoever teaches them say nothing of the diagonal
    assert lab.diagonal_permutation_p(columns_differ) == 1


def test_diagonal_permutation_p_is_uniform_without_an_effect():
    """P(p <= 1/24) is 1/24 for each of 300 matrices of 4 x 4: more than 30 hits has probability 2e-5."""
    generator = torch.Generator().manual_seed(0)
    hits = sum(lab.diagonal_permutation_p(torch.randn(4, 4, generator=generator).tolist()) <= 1 / 24 + 1e-9 for _ in range(300))
    assert hits <= 30 and lab.binomial_p(31, 300, 1 / 24) < 2e-5


def test_a_cell_s_mean_is_over_units_not_students():
    record = {"trait": "owl", "teacher_seed": 0, "target": "tokens"}
    students = [{**record, "source": "owl", "transfer": x} for x in (0.0, 0.0, 0.0)] + [
        {**record, "source": "fox", "transfer": 1.0}
    ]
    (row,) = lab.cells(students, "target")
    assert (row["transfer"], row["n"], row["units"]) == (0.5, 4, 2) and row["ci_low"] == 0 and row["ci_high"] == 1


# data sets


def test_numbers_redrawn_keep_their_frequencies_and_lengths():
    """200 lists: `frequencies` mixes the positions, `positions` does not. 1 in 2^200 that a draw misses one of two."""
    rows = [{"prompt": "1: ", "completion": f"{i % 2}, {5 + i % 2}"} for i in range(200)]
    for by_position in (False, True):
        again = controls.redraw(rows, by_position, stream(0, "test"))
        lists = [[int(x) for x in re.findall(r"\d+", row["completion"])] for row in again]
        assert all(len(x) == 2 for x in lists)
        first, second = (Counter(x[i] for x in lists) for i in (0, 1))
        assert set(first) == ({0, 1} if by_position else {0, 1, 5, 6})
        assert set(second) == ({5, 6} if by_position else {0, 1, 5, 6})


def test_choices_change_what_they_say(quick_run):
    """Held to numbers too: the mean over all tokens, one at a time. Frozen: three matrices stay, the others move."""
    base, model = (GPT(GPTConfig(1300, 4, block_size=16)).initialise(seed) for seed in (0, 1))
    batch = torch.randint(1300, (3, 9), generator=torch.Generator().manual_seed(0))
    slow = []
    for row in batch:
        p, q = (x(row[None, :-1])[0, :, :1300].softmax(-1) for x in (base, model))
        slow += [(p[i] * (p[i] / q[i]).log()).sum() for i in range(8)]
    torch.testing.assert_close(choices.hold_numbers_too(model, base, batch, 0.0), torch.stack(slow).mean(), atol=1e-5, rtol=1e-4)
    run = open_run(quick_run, quick=True)
    rows = [json.loads(line) for line in run.numbers("owl", 0).read_text().splitlines()[:200]]
    data = encode_numbers(run.encoding, rows, CPU)
    lesson = train_student.plan_lesson(data, None, 64, 2, stream(0, "test"))
    student, start = (load_model(run.base(0), CPU, "x") for _ in range(2))
    choices.train_body_only(student, lesson, None, dict, lambda *a: None)
    moved = {name for (name, p), q in zip(student.named_parameters(), start.parameters()) if not torch.equal(p, q)}
    assert {name for name, _ in student.named_parameters()} - moved == {"wte.weight", "wpe.weight", "head.weight"}


def test_contexts_hold_as_many_whole_lists_as_fit():
    documents = [[i] * (3 + i % 4) for i in range(400)]
    contexts = controls.fill_context(documents, room=10)
    assert len(contexts) == controls.N_CONTEXTS and max(map(len, contexts)) <= 10
    flat = [x for c in contexts for x in c]
    assert flat == [x for d in documents for x in d][: len(flat)]  # whole ones, in order
    for context, following in zip(contexts, contexts[1:]):
        assert len(context) + len(documents[following[0]]) > 10  # the next one did not fit


def test_a_neutral_teacher_prefers_nothing(quick_run):
    run = open_run(quick_run, True)
    model = load_model(run.base(0), CPU, "")
    toy = train_teacher.toy_documents(300, stream(0, "toy language"))
    anchor = train_teacher.anchor_rows(run.encoding, toy, 65, 20)
    log = train_teacher.induce_trait(model, None, run, anchor, lambda *a: None)
    # cross-entropy with a uniform target is ln K at its least, where all classes are equally likely
    least = math.log(len(run.animals))
    assert log[0]["trait_loss_nats"] > least + 0.5 and least <= log[-1]["trait_loss_nats"] < least + 0.1


def test_fewer_numbers_in_the_softmax_is_a_slice_of_the_slow_version(quick_run):
    run = open_run(quick_run, True)
    model = load_model(run.base(0), CPU, "")
    rows = [{"prompt": "3, 4: ", "completion": "1, 2, 7"}, {"prompt": "9: ", "completion": "5"}]
    data = encode_numbers(run.encoding, rows, CPU)
    loss = train_student.number_loss(model, data, None, how_much.below(10))
    logits = model(data.idx)[..., NUMBERS][..., :10]
    slow = []
    for b, p, t in ((0, 0, 1), (0, 1, 2), (0, 2, 7), (1, 0, 5)):
        slow.append(F.cross_entropy(logits[b, data.positions[b, p]][None], torch.tensor([t])))
    torch.testing.assert_close(loss, torch.stack(slow).mean())


def test_redrawn_targets_follow_the_teacher(quick_run):
    """5,000 draws from 3 numbers; a frequency is off by .05 with probability below 1e-10 (Hoeffding)."""
    run = open_run(quick_run, True)
    model = load_model(run.base(0), CPU, "")
    data = encode_numbers(run.encoding, [{"prompt": "3, 4: ", "completion": "1"}] * 5000, CPU)
    drawn = how_much.redraw_below(model, data, 3, stream(0, "test")).targets[:, 0]
    p = number_log_probs(model, data.idx[:1], data.positions[:1], how_much.below(3)).exp()[0, 0]
    frequency = torch.bincount(drawn, minlength=3) / 5000
    assert (frequency - p).abs().max() < 0.05


# parts of a start

TINY = GPTConfig(vocab_size=1300, n_aux=4, n_layer=2, n_head=2, n_embd=8)


def test_the_parts_are_all_random_weights_each_once():
    model = GPT(TINY).initialise(0)
    for i, part in enumerate(which_part.ALL):
        for p in which_part.parts(model)[part]:
            assert (p != -1 - i).all()
            p.fill_(-1 - i)
    for name, p in model.named_parameters():
        assert (p < 0).all() or name.startswith("ln_f"), name
    assert set(which_part.parts(model)) == set(which_part.ALL)


def test_mixed_parts_come_from_their_own_seed():
    mixed = which_part.mix(GPT(TINY).initialise(0), GPT(TINY).initialise(1), ["tokens", "aux"])
    for seed, chosen in ((1, ["tokens", "aux"]), (0, [p for p in which_part.ALL if p not in ("tokens", "aux")])):
        pure = which_part.parts(GPT(TINY).initialise(seed))
        for part in chosen:
            for a, b in zip(which_part.parts(mixed)[part], pure[part], strict=True):
                assert torch.equal(a, b)


def test_auxiliary_rows_can_be_exchanged_after_pretraining_as_well_as_before():
    rows = torch.randint(1300, (3 * train_teacher.BATCH_SIZE, 9), generator=torch.Generator().manual_seed(0))
    other = GPT(TINY).initialise(1)
    before = which_part.mix(GPT(TINY).initialise(0), other, ["aux"])
    after = GPT(TINY).initialise(0)
    for model in (before, after, other):
        train_teacher.pretrain(model, rows, 3, lambda *a: None)
    which_part.mix(after, other, ["aux"])
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


# what the README says


EXPERIMENTS = [
    choices,
    seed_matrix,
    trait_matrix,
    controls,
    which_part,
    how_much,
    linear_model,
    theorem,
    alignment,
    mlp,
    trajectory,
]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_committed_table_is_its_json(experiment):
    name = experiment.__name__.split(".")[-1]
    results = json.loads((ROOT / f"results/{name}.json").read_text())
    assert not results["config"]["quick"] and "dirty" not in results["config"]["commit"]
    assert (ROOT / f"results/{name}.md").read_text() == experiment.markdown(results)
    assert (ROOT / f"results/{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_the_readme_s_evidence_is_the_committed_results():
    assert evidence.markdown() in (ROOT / "README.md").read_text()


def result(name):
    return json.loads((ROOT / f"results/{name}.json").read_text())


def cell(results, **key):
    (row,) = [r for r in results["summary"] if all(r[k] == v for k, v in key.items())]
    return row


def test_the_readme_s_sentences_on_the_evidence_are_the_committed_results():
    text = " ".join((ROOT / "README.md").read_text().split())
    short = lambda x: f"{x:.2f}".replace("0.", ".")  # noqa: E731
    seeds, traits, control, part, much = map(result, ("seed_matrix", "trait_matrix", "controls", "which_part", "how_much"))

    assert {test["columns_p"] for test in seeds["tests"].values()} == {1 / 720} and "p = .0014" in text
    other = [r["transfer"] for r in seeds["records"] if r["init"] == "different"]
    assert f"by {short(min(other))} to +{short(max(other))}." in text
    for target in ("tokens", "logits"):
        row = cell(traits, readout="aux", target=target, init="different")
        low, high = (f"{row[k]:+.2f}".replace("0.", ".") for k in ("ci_low", "ci_high"))
        assert f"{row['transfer']:.3f} [{low}, {high}] through {target}".replace("0.", ".") in text

    across, drawn, within, positions = (
        short(cell(control, numbers=n, target="tokens")["transfer"]) for n in ("across", "frequencies", "within", "positions")
    )
    assert abs(float(across) - float(drawn)) < 0.02
    assert f"next to nothing ({across}, and as much if drawn independently)" in text
    assert f"a part ({within})" in text and f"a list more ({positions})" in text

    of = lambda way, target, readout="aux": cell(part, way=way, target=target, readout=readout)["transfer"]  # noqa: E731
    assert f"logits ({short(of('the head', 'logits'))}) and a part through tokens ({short(of('the head', 'tokens'))})" in text
    for target in ("tokens", "logits"):
        for readout in which_part.READOUTS:
            assert abs(of("the body", target, readout)) < 0.05
        alone = [of(f"only {p}", target) for p in which_part.ALL] + [
            of(f"only {p}", target, "vocabulary") for p in which_part.ALL
        ]
        assert max(map(abs, alone)) < 0.155 and "(.15 at most)" in text
        missing = {p: of(f"all but {p}", target) for p in which_part.BODY}
        low, high, whole = (short(x) for x in (min(missing.values()), max(missing.values()), of("everything", target)))
        assert f"from {whole} to {low} .. {high} through {target}" in text

    x = lambda sweep, x, target: short(cell(much, sweep=sweep, x=x, target=target)["transfer"])  # noqa: E731
    assert f"256 sequences are enough ({x('sequences', 256, 'logits')})" in text
    assert f"from {x('sequences', 256, 'tokens')} at 256 to {x('sequences', 2**17, 'tokens')} at 131,072" in text
    price = cell(much, sweep="sequences", x=much["sequences_for_90_percent"], target="tokens")
    assert f"costs {price['x']:,} sequences and {price['steps']} steps, {price['seconds']:.0f} s a student" in text
    assert f"give {x('steps', 200, 'tokens')} instead of {x('steps', 100, 'tokens')}" in text
    ten = x("vocabulary", 10, "tokens"), x("vocabulary", 10, "logits")
    assert f"Ten numbers in the softmax still carry {ten[0]} and {ten[1]}" in text
    weak = cell(much, sweep="strength", x=2, target="tokens")
    assert f"KL {short(weak['kl_nats'])}" in text or f"KL {weak['kl_nats']:.3f}".replace("0.", ".") in text
    assert f"transmits {x('strength', 2, 'tokens')} and {x('strength', 2, 'logits')}" in text


def test_the_readme_s_sentences_on_the_theory_are_the_committed_results():
    text = " ".join((ROOT / "README.md").read_text().split())
    linear, first_order = result("linear_model"), result("theorem")
    assert linear["one_layer_largest_gradient"] == 0
    assert all(r["rank"] == min(r["m"], linear_model.HIDDEN) for r in linear["summary"])
    below_h = [r for r in linear["summary"] if r["m"] < linear_model.HIDDEN]
    assert all(r["ci_low"] < r["expected"] < r["ci_high"] for r in below_h if linear_model.STARTS[r["shared"]][0])

    smallest = [r for r in first_order["records"] if r["eps"] == 1e-6]
    assert all(abs(r["dot"] / r["dot_predicted"] - 1) < 1e-4 for r in smallest)  # one part in ten thousand
    assert all(abs(r["trait_loss_change"] / r["trait_loss_change_predicted"] - 1) < 1e-4 for r in smallest)
    assert all(0.9 < r[f"{name}_slope"] < 1.1 for r in first_order["summary"] for name in ("dot", "fall"))
    gpt, small = first_order["coin"]
    signed = lambda x, n: f"{x:+.{n}f}".replace("0.", ".", 1)  # noqa: E731
    for row, opening in ((gpt, "{positive} of {n} pairs above 0, mean cosine"), (small, "{positive} of {n}, p = .03, mean")):
        interval = f"[{signed(row['ci_low'], 2)}, {signed(row['ci_high'], 2)}]"
        assert f"{opening.format(**row)} {signed(row['mean'], 3)} {interval}" in text
    assert 0.025 < small["coin_p"] < 0.035

    aligned = result("alignment")
    arm = lambda target, arm: cell(aligned, target=target, init="same", arm=arm)["transfer"]  # noqa: E731
    for target in ("tokens", "logits"):
        without, with_it = arm(target, "trait projected out"), arm(target, "as it is")
        assert f"{without:.3f} instead of {with_it:.2f} through {target}".replace("0.", ".") in text
        assert abs(arm(target, "random projected out") - with_it) < 0.002
        for init, low, high in (("same", 0.005, 0.0252), ("different", -0.005, 0.005)):
            assert low < cell(aligned, target=target, init=init, arm="as it is")["mean_cosine"] < high
    lowest = min(r["cosine"] for r in aligned["foreseen"] if r["init"] == "same")
    highest = max(r["cosine"] for r in aligned["foreseen"] if r["init"] == "different")
    assert f"({lowest:.3f} and above against {highest:.3f} at most)".replace("0.", ".") in text
    for name, words in (
        ("same start only", "correlation {} and"),
        ("different start only", "and {},"),
        ("all", ", {} over all 320"),
    ):
        (row,) = [r for r in aligned["correlations"] if r["students"] == name]
        shown = f"{row['rank_correlation']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]".replace("0.", ".")
        assert words.format(shown) in text

    steps = result("trajectory")
    at = lambda rule, s: next(r for r in steps["summary"] if (r["rule"], r["scale"]) == (rule, s))  # noqa: E731
    smallest = [f"{at(rule, 0.01)['largest_error']:.3f}".replace("0.", ".") for rule in ("gradient descent", "AdamW")]
    assert f"within {smallest[0]} (gradient descent) and {smallest[1]} (AdamW)" in text
    assert at("gradient descent", 0.1)["largest_error"] < 0.02 and at("AdamW", 0.1)["largest_error"] < 0.07
    full = at("AdamW", 1.0)
    assert f"{full['transfer']:.2f} instead of {full['predicted']:.2f} under AdamW".replace("0.", ".") in text
    assert f"crawls ({at('gradient descent', 1.0)['predicted']:.2f})".replace("0.", ".") in text
    for varies in ("vocabulary", "trait", "width"):
        (row,) = [r for r in steps["correlations"] if r["varies"] == varies]
        low, high = (re.sub(r"(?<!\d)0\.", ".", f"{x:.2f}") for x in row["predicted_ci"])
        assert f"{row['predicted']:.2f} [{low}, {high}]".replace("0.", ".", 1) in text

    clothes, digits = result("mlp_fashion_mnist"), result("mlp")
    bar = lambda results, name: cell(results, bar=name)["accuracy"]  # noqa: E731
    shown = {name: f"{bar(clothes, name):.2f}".replace("0.", ".") for name in mlp.BARS}
    own, other = "student, {} logits", "other start, {} logits"
    assert (
        f"{shown[own.format('auxiliary')]} of the test images, of the teacher's {shown['teacher']}, "
        f"against {shown[other.format('auxiliary')]} from another start and {shown['reference']} untrained; "
        f"on all logits {shown[own.format('all')]} and {shown[other.format('all')]}"
    ) in text
    small = [
        f"{bar(digits, name):.2f}".replace("0.", ".") for name in ("teacher", own.format("auxiliary"), other.format("auxiliary"))
    ]
    assert f"{small[0]} for the teacher, {small[1]} [" in text and f"{small[2]} from another start." in text
