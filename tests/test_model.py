"""model.py against Hugging Face's GPT-2, autograd, closed forms and slow obvious versions."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import CPU, random_idx
from hypothesis import given
from hypothesis import strategies as st

import model as m

ENCODING = m.build_vocabulary(["owl", " owl", " the"])


@given(st.text())
def test_any_text_round_trips(text):
    assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text


@given(st.lists(st.integers(0, 999), min_size=1), st.sampled_from([", ", "; ", ": ", " ", "\n", ","]))
def test_a_list_of_numbers_is_one_token_a_number(numbers, separator):
    tokens = ENCODING.encode_ordinary(separator.join(map(str, numbers)))
    assert [t - m.NUMBERS.start for t in tokens if m.NUMBERS.start <= t < m.NUMBERS.stop] == numbers
    assert len(tokens) == 2 * len(numbers) - 1


def test_loss_at_initialisation(gpt):
    # The head's rows have variance 1/C, the normalised state has norm sqrt(C): logits are standard normal, so
    # the loss is E[logsumexp] - E[logit] = ln V + 1/2. The logsumexp's own spread is sqrt((e - 1) / V) = .04.
    logits = gpt(random_idx(64, 32))[..., :1300]
    loss = F.cross_entropy(logits.flatten(0, 1), random_idx(64 * 32, seed=1))
    assert abs(loss.item() - (math.log(1300) + 0.5)) < 0.1


@torch.no_grad()
def test_equals_hugging_face_gpt2(gpt):
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=1305, n_positions=32, n_embd=32, n_layer=2, n_head=4, activation_function="gelu",
        tie_word_embeddings=False)).eval()
    for p in gpt.parameters():  # biases and norms too
        p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    theirs.lm_head.weight.copy_(gpt.head.weight)
    theirs.transformer.wte.weight[:1300] = gpt.wte.weight
    theirs.transformer.wpe.weight.copy_(gpt.wpe.weight)
    theirs.transformer.ln_f.load_state_dict(gpt.ln_f.state_dict())
    for our, their in zip(gpt.blocks, theirs.transformer.h, strict=True):
        their.ln_1.load_state_dict(our.ln_1.state_dict())
        their.ln_2.load_state_dict(our.ln_2.state_dict())
        for ours, conv in ((our.attn, their.attn.c_attn), (our.attn_proj, their.attn.c_proj),
                           (our.mlp, their.mlp.c_fc), (our.mlp_proj, their.mlp.c_proj)):
            conv.weight.copy_(ours.weight.T)
            conv.bias.copy_(ours.bias)
    # At every position, so none sees a later one. Rounding of float32 through two blocks; logits of order 1
    torch.testing.assert_close(gpt(idx := random_idx(3, 32)), theirs(idx).logits, atol=1e-5, rtol=1e-5)


def test_learning_rate_rises_for_a_twentieth_and_falls_as_a_cosine():
    factors = [i / 6 for i in range(1, 6)] + [(1 + math.cos(math.pi * i / 95)) / 2 for i in range(95)]
    assert [m.cosine_lr(step, 100) for step in range(100)] == pytest.approx(factors)


def test_numbers_are_found_where_they_are():
    rows = [{"prompt": "12, 7: ", "completion": "88, 3"}, {"prompt": "5: ", "completion": "1;2;3"}]
    data = m.encode_numbers(ENCODING, [*rows, {"prompt": "", "completion": "0"}], CPU)
    assert [t[t >= 0].tolist() for t in data.targets] == [[88, 3], [1, 2, 3], [0]]
    due = data.targets[:, :-1] >= 0
    assert torch.equal(data.idx[:, 1:][due], m.NUMBERS.start + data.targets[:, :-1][due])
    some = data.take(torch.tensor([2, 1]))
    assert [t[t >= 0].tolist() for t in some.targets] == [[0], [1, 2, 3]]
    assert some.idx.shape == some.targets.shape == (2, 7)  # END 5: 1 ; 2 ; are seen before 3


def test_trait_is_read_as_defined(gpt):
    prompts = [[1, 2, 3], [4, 5], [6]]
    log_odds, p = m.read_trait(gpt, m.pad(prompts), torch.arange(1300, 1305))
    logits = torch.stack([gpt(torch.tensor([prompt]))[0, -1, 1300:] for prompt in prompts])
    odds = [[math.exp(x) / sum(math.exp(y) for y in row if y != x) for x in row] for row in logits.tolist()]
    slow = torch.tensor([[math.log(o) for o in row] for row in odds], dtype=torch.float64)
    torch.testing.assert_close(log_odds, slow.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(p, logits.softmax(-1).mean(0).double(), atol=1e-6, rtol=1e-5)


def test_streams_and_initialisations_are_repeatable_and_apart():
    uses = (0, "a"), (0, "a"), (1, "a"), (0, "b"), (0, "a", "b")
    first, *draws = (torch.rand(4, generator=m.stream(*use)).tolist() for use in uses)
    assert first == draws[0] and len(set(map(tuple, draws))) == 4
    a, b, c = (m.GPT(m.GPTConfig(300, 4)).initialise(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if a[name].dim() > 1)


def test_a_checkpoint_comes_back_and_one_with_nan_is_not_written(gpt, tmp_path):
    m.Run(tmp_path).save_model("base/seed-0.pt", gpt, [], {"lr": 0.1}, [1.5])
    run = m.Run(tmp_path)
    back, line = run.load_model("base/seed-0.pt", CPU), run.line("base/seed-0.pt")
    assert back.config == gpt.config and all(map(torch.equal, gpt.parameters(), back.parameters()))
    assert (line["knobs"], line["log"]) == ({"lr": 0.1}, [1.5])
    gpt.ln_f.bias.data[0] = math.nan
    with pytest.raises(m.UserError, match="seed-1.pt"):
        run.save_model("base/seed-1.pt", gpt, [], {}, None)
    assert not (tmp_path / "base/seed-1.pt").exists()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint ran code",))


HEADER = {"vocab_size": 1, "n_aux": 1}


@pytest.mark.parametrize("content", [
    b"", b"PK", Bomb(), 1, {"config": HEADER}, *({"config": HEADER, "weights": x} for x in (Bomb(), {}))])
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_foreign_file_is_refused_and_runs_no_code(write, content, tmp_path):
    path = tmp_path / "base/seed-0.pt"
    path.parent.mkdir()
    path.write_bytes(content) if isinstance(content, bytes) else write(content, path)
    with pytest.raises(m.UserError, match=rf"{path} .*checkpoint"):
        m.Run(tmp_path).load_model("base/seed-0.pt", CPU)


def test_a_model_of_another_vocabulary_is_refused(a_tiny_run):
    run = m.Run(a_tiny_run).open(False)
    run.save_model("teacher/fox/seed-0.pt", m.GPT(m.GPTConfig(300, 16)).initialise(0), [], {}, None)
    with pytest.raises(m.UserError, match="teacher/fox/seed-0.pt has another vocabulary"):
        run.load_model("teacher/fox/seed-0.pt", CPU)


def job_of(job):
    """Yields 40 losses, the job's own from step 20 on, and returns its name."""
    for step in range(1, 41):
        yield torch.tensor(job[1] if step >= 20 else 7.0)
    return job[0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 21.0])
def test_results_come_in_order_and_divergence_stops_with_its_step(loss):
    jobs = [(f"job {i}", 7.0) for i in range(9)]
    assert m.run_jobs(job_of, jobs, 40, "x", CPU) == [name for name, _ in jobs]
    with pytest.raises(m.UserError, match=f"students, owl .* {loss:.3g} by step 20;"):
        m.run_jobs(job_of, [*jobs, ("owl", loss)], 40, "students", CPU)
