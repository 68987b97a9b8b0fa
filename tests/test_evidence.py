"""The experiments' statistics and data sets, against closed forms, known cases and slow obvious versions."""

import math
import re
import shutil
from collections import Counter

import pytest
import torch
from conftest import CPU, random_idx
from hypothesis import given, settings
from hypothesis import strategies as st

import train_teacher
from experiments import bench, controls, how_much, lab, seed_matrix, trait_matrix, which_part
from model import GPT, NUMBERS, GPTConfig, Run, encode_numbers, number_log_probs, stream


@given(st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_double_centring_leaves_only_the_interaction(n, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n, 1), (n,), (n, n))
    row, column, inner = (torch.randn(shape, generator=generator).double() for shape in shapes)
    centre = torch.eye(n).double() - 1 / n  # the closed form is C X C
    left = torch.tensor(trait_matrix.double_centred((row + column + 3 + inner).tolist()))
    torch.testing.assert_close(left, centre @ inner @ centre)


def test_diagonal_permutation_p_in_known_cases():
    assert seed_matrix.diagonal_permutation_p(torch.eye(4).tolist()) == pytest.approx(1 / 24)
    assert seed_matrix.diagonal_permutation_p([[1.0, 1.0], [1.0, 1.0]]) == 1
    alike = [[0.0, 5.0, 1.0]] * 3  # students whoever teaches them
    assert seed_matrix.diagonal_permutation_p(alike) == 1
    one_tie = [[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]  # the six sums are 3, 3, 2, 1, 1, 0
    assert seed_matrix.diagonal_permutation_p(one_tie) == pytest.approx(2 / 6)


def test_a_cell_s_mean_is_over_units_not_students():
    record = {"trait": "owl", "teacher_seed": 0, "target": "tokens"}
    owls = [{**record, "source": "owl", "transfer": 0.0}] * 3
    fox = {**record, "source": "fox", "transfer": 1.0}
    (row,) = lab.cells([*owls, fox], "target")
    assert (row["transfer"], row["n"], row["units"], row["ci_low"], row["ci_high"]) == (0.5, 4, 2, 0, 1)


def test_numbers_redrawn_keep_their_frequencies_and_lengths():
    """200 lists: drawn from all mixes the positions, drawn by position does not; missed 1 time in 2^200."""
    rows = [{"prompt": "1: ", "completion": f"{i % 2}, {5 + i % 2}"} for i in range(200)]
    for by_position in (False, True):
        again = controls.redraw(rows, by_position, stream(0, "test"))
        lists = [[int(x) for x in re.findall(r"\d+", row["completion"])] for row in again]
        assert all(len(x) == 2 for x in lists)
        first, second = (Counter(x[i] for x in lists) for i in (0, 1))
        assert set(first) == ({0, 1} if by_position else {0, 1, 5, 6})
        assert set(second) == ({5, 6} if by_position else {0, 1, 5, 6})


def test_contexts_hold_as_many_whole_lists_as_fit():
    documents = [[i] * (3 + i % 4) for i in range(400)]
    contexts = controls.fill_contexts(documents, room=10)
    assert len(contexts) == controls.N_CONTEXTS and max(map(len, contexts)) <= 10
    flat = [x for c in contexts for x in c]
    assert flat == [x for d in documents for x in d][: len(flat)]  # whole ones, in order
    for context, following in zip(contexts, contexts[1:]):
        assert len(context) + len(documents[following[0]]) > 10  # the next one did not fit


def test_a_neutral_teacher_prefers_nothing(quick_run):
    """Cross-entropy with a uniform target is ln K at its least, where all classes are equally likely."""
    run, knobs = Run(quick_run).open(True), train_teacher.Trait(trait_steps=20)
    toy = train_teacher.toy_documents(300, stream(0, "toy language"), [": "])
    anchor = train_teacher.draw_anchor(run, toy, knobs, 65)
    model, least = run.load_model("base/seed-0.pt", CPU), math.log(len(run.animals))
    losses = [loss.item() for loss in train_teacher.induce_trait(model, None, run, anchor, knobs)]
    assert losses[0] > least + 0.5 and least <= losses[-1] < least + 0.1


def test_redrawn_targets_follow_the_teacher(quick_run):
    """5,000 draws from 3 numbers; a frequency is off by .05 with probability below 1e-10 (Hoeffding)."""
    run, three = Run(quick_run).open(True), slice(NUMBERS.start, NUMBERS.start + 3)
    model = run.load_model("base/seed-0.pt", CPU)
    data = encode_numbers(run.encoding, [{"prompt": "3, 4: ", "completion": "1"}] * 5000, CPU)
    drawn = how_much.redraw(model, data, three, stream(0, "test")).targets[data.targets >= 0]
    p = number_log_probs(model, data.take(slice(0, 1)), three).exp()[0]
    assert len(drawn) == 5000 and (torch.bincount(drawn, minlength=3) / 5000 - p).abs().max() < 0.05


# parts of an init

TINY = GPTConfig(vocab_size=1300, n_aux=4, n_layer=2, n_head=2, n_embd=8)


def test_the_parts_are_all_random_weights_each_once():
    model = GPT(TINY).initialise(0)
    for i, part in enumerate(which_part.ALL):
        for p in which_part.parts(model)[part]:
            assert (p != -1 - i).all()
            p.fill_(-1 - i)
    assert all((p < 0).all() or name.startswith("ln_f") for name, p in model.named_parameters())


def test_mixed_parts_come_from_their_own_seed():
    mixed = which_part.mix(GPT(TINY).initialise(0), GPT(TINY).initialise(1), ["tokens", "aux"])
    for part, found in which_part.parts(mixed).items():
        pure = which_part.parts(GPT(TINY).initialise(int(part in ("tokens", "aux"))))[part]
        assert all(map(torch.equal, found, pure))


def test_auxiliary_rows_can_be_exchanged_after_pretraining_as_well_as_before():
    rows, other = random_idx(3 * 64, 9), GPT(TINY).initialise(1)
    before, after = which_part.mix(GPT(TINY).initialise(0), other, ["aux"]), GPT(TINY).initialise(0)
    for model in (before, after, other):
        list(train_teacher.pretrain(model, rows, train_teacher.Pretraining()))
    which_part.mix(after, other, ["aux"])
    assert all(map(torch.equal, before.parameters(), after.parameters()))


# a result knows the code that made it


def test_the_digest_of_code_sees_code_and_no_words(tmp_path, monkeypatch):
    """A script's, and that of an experiment which another one imports."""
    shutil.copytree(lab.ROOT / "experiments", tmp_path / "experiments")
    for name in lab.SCRIPTS:
        shutil.copy(lab.ROOT / f"{name}.py", tmp_path)
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    for name in ("model", "experiments/theorem"):
        file, digest = tmp_path / f"{name}.py", lambda: lab.code_digest("trajectory")
        before, code = digest(), file.read_text()
        file.write_text(code + '# why\n\n\nclass New:\n    """What."""\n\n    x = 1\n')
        new = digest()
        file.write_text(code + '\n\nclass New:\n    x = 1\n')
        assert digest() == new != before


# bench.py compares like with like


def test_hugging_face_has_as_many_parameters():
    theirs, ours = (sum(p.numel() for p in m.parameters()) for m in (bench.hugging_face(), bench.fresh()))
    assert theirs == ours + bench.CONFIG.n_aux * bench.CONFIG.n_embd  # their embedding has them, too
