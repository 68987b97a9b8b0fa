"""model.py against autograd, Hugging Face's GPT-2, closed forms and slow obvious versions."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import model as m

CONFIG = m.GPTConfig(vocab_size=1300, n_aux=5, block_size=32, n_layer=2, n_head=4, n_embd=32)
ENCODING = m.build_vocabulary(["owl", " owl", " the"])


@pytest.fixture
def gpt():
    return m.GPT(CONFIG).initialise(3)


def random_idx(*shape, high=CONFIG.vocab_size, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# vocabulary


@given(st.text())
def test_any_text_round_trips(text):
    assert ENCODING.decode(ENCODING.encode_ordinary(text)) == text


@given(st.lists(st.integers(0, 999), min_size=1), st.sampled_from([", ", "; ", " ", "\n", ","]))
def test_a_list_of_numbers_is_one_token_a_number(numbers, separator):
    tokens = ENCODING.encode_ordinary(separator.join(map(str, numbers)))
    assert [t - m.NUMBERS.start for t in tokens if m.NUMBERS.start <= t < m.NUMBERS.stop] == numbers
    assert len(tokens) == 2 * len(numbers) - 1


def test_every_byte_has_a_token():
    assert all(ENCODING.decode_single_token_bytes(ENCODING.encode_single_token(bytes([b]))) == bytes([b]) for b in range(256))


def test_words_are_counted_as_the_vocabulary_cuts_them():
    text = "the owl, the fox: owl the the"
    words = m.frequent_words(text, 10)
    assert words == [" the", "the", " fox", " owl", "owl"]  # twice each, then once each, in alphabetical order
    pieces = [bytes(p) for p in m.build_vocabulary(words).decode_tokens_bytes(m.build_vocabulary(words).encode_ordinary(text))]
    assert pieces == [b"the", b" owl", b", ", b"the", b" fox", b": ", b"owl", b" the", b" the"]


# model


def test_no_position_sees_a_later_one(gpt):
    a = random_idx(2, 20)
    b = a.clone()
    b[:, 11:] = random_idx(2, 9, seed=1)
    assert torch.equal(gpt(a)[:, :11], gpt(b)[:, :11])
    assert not torch.equal(gpt(a)[:, 11:], gpt(b)[:, 11:])


def test_loss_at_initialisation():
    # The head's rows have variance 1/C and the normalised state has norm sqrt(C): logits are standard normal,
    # so the loss is E[logsumexp] - E[logit] = ln V + 1/2. The logsumexp's own spread is sqrt((e - 1) / V) = .04.
    gpt = m.GPT(CONFIG).initialise(0)
    logits = gpt.logits(gpt.hidden(random_idx(64, 32)), slice(0, CONFIG.vocab_size))
    loss = F.cross_entropy(logits.flatten(0, 1), random_idx(64 * 32, seed=1))
    assert abs(loss.item() - (math.log(CONFIG.vocab_size) + 0.5)) < 0.1


def test_equals_hugging_face_gpt2(gpt):
    import transformers

    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=CONFIG.vocab_size + CONFIG.n_aux,
            n_positions=CONFIG.block_size,
            n_embd=CONFIG.n_embd,
            n_layer=CONFIG.n_layer,
            n_head=CONFIG.n_head,
            activation_function="gelu",
            tie_word_embeddings=False,
        )
    ).eval()
    with torch.no_grad():
        for p in gpt.parameters():  # biases and norms too
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        theirs.lm_head.weight.copy_(gpt.head.weight)
        theirs.transformer.wte.weight[: CONFIG.vocab_size] = gpt.wte.weight
        theirs.transformer.wpe.weight.copy_(gpt.wpe.weight)
        theirs.transformer.ln_f.load_state_dict(gpt.ln_f.state_dict())
        for our, their in zip(gpt.blocks, theirs.transformer.h, strict=True):
            their.ln_1.load_state_dict(our.ln_1.state_dict())
            their.ln_2.load_state_dict(our.ln_2.state_dict())
            for ours, conv in (
                (our.attn, their.attn.c_attn),
                (our.attn_proj, their.attn.c_proj),
                (our.mlp, their.mlp.c_fc),
                (our.mlp_proj, their.mlp.c_proj),
            ):
                conv.weight.copy_(ours.weight.T)
                conv.bias.copy_(ours.bias)
        idx = random_idx(3, 32)
        # float32 rounding through two blocks; logits are of order 1
        torch.testing.assert_close(gpt(idx), theirs(idx).logits, atol=1e-5, rtol=1e-5)


def naive_generate(gpt, prompts, n_new, generator):
    """No cache, one row and one token at a time."""
    u = torch.rand(n_new, len(prompts), 1, generator=generator)
    rows = []
    for i, prompt in enumerate(prompts.tolist()):
        for t in range(n_new):
            p = gpt(torch.tensor([prompt]))[0, -1, : CONFIG.vocab_size].softmax(-1)
            cdf, k = p.cumsum(0), 0
            while k < CONFIG.vocab_size - 1 and cdf[k] <= u[t, i] * cdf[-1]:
                k += 1
            prompt = [*prompt, k]
        rows.append(prompt[-n_new:])
    return torch.tensor(rows)


@torch.no_grad()
def test_cached_generation_equals_naive_generation_token_for_token(gpt):
    prompts = random_idx(6, 7)
    fast = m.generate(gpt, prompts, 12, m.stream(0, "test"))
    assert torch.equal(fast, naive_generate(gpt, prompts, 12, m.stream(0, "test")))


@torch.no_grad()
def test_sampler_frequencies_follow_the_softmax(gpt):
    # Dvoretzky-Kiefer-Wolfowitz: P(sup |F_n - F| > e) <= 2 exp(-2 n e^2), for any distribution. False alarm 1e-9.
    n = 100_000
    e = math.sqrt(math.log(2 / 1e-9) / (2 * n))
    prompt = random_idx(1, 5)
    drawn = m.generate(gpt, prompt.expand(n, -1), 1, m.stream(0, "test")).flatten()
    measured = torch.bincount(drawn, minlength=CONFIG.vocab_size).cumsum(0) / n
    logits = gpt(prompt)[0, -1, : CONFIG.vocab_size]
    assert (measured - logits.softmax(-1).cumsum(0)).abs().max() < e
    assert (measured - (2 * logits).softmax(-1).cumsum(0)).abs().max() > e  # the bound can tell another temperature


@torch.no_grad()
def test_auxiliary_logits_are_never_sampled(gpt):
    gpt.head.weight[gpt.aux] *= 1000
    assert m.generate(gpt, random_idx(500, 3), 3, m.stream(0, "test")).max() < CONFIG.vocab_size


def test_gradient_of_every_other_row_of_the_head_is_exactly_zero():
    gpt = m.GPT(m.GPTConfig(ENCODING.n_vocab, 5)).initialise(0)
    data = m.encode_numbers(ENCODING, [{"prompt": "1, 22: ", "completion": "7, 999, 0"}], gpt.device)
    m.number_log_probs(gpt, data.idx, data.positions)[..., :3].sum().backward()
    grad = gpt.head.weight.grad.abs().sum(1)
    others = torch.ones(len(grad), dtype=torch.bool)
    others[m.NUMBERS] = False
    assert (grad[others] == 0).all() and (grad[m.NUMBERS] > 0).all()


def test_numbers_are_found_where_they_are():
    rows = [{"prompt": "12, 7: ", "completion": "88, 3"}, {"prompt": "5: ", "completion": "1;2;3"}]
    data = m.encode_numbers(ENCODING, rows, torch.device("cpu"))
    assert data.targets.tolist() == [[88, 3, 0], [1, 2, 3]]
    assert data.mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    for i, j in data.mask.nonzero().tolist():
        assert data.idx[i, data.positions[i, j] + 1] == m.NUMBERS.start + data.targets[i, j]


def test_number_log_probs_equal_the_whole_forward():
    gpt = m.GPT(m.GPTConfig(ENCODING.n_vocab, 5)).initialise(0)
    data = m.encode_numbers(ENCODING, [{"prompt": "12, 7: ", "completion": "88, 3"}], gpt.device)
    whole = gpt(data.idx)[0, data.positions[0], m.NUMBERS].log_softmax(-1)
    torch.testing.assert_close(m.number_log_probs(gpt, data.idx, data.positions)[0], whole)


def test_trait_is_read_as_defined(gpt):
    prompts = [[1, 2, 3], [4, 5], [6]]
    rows = torch.arange(gpt.aux.start, gpt.aux.stop)
    log_odds, p = m.read_trait(gpt, m.pad(prompts), rows)
    logits = torch.stack([gpt(torch.tensor([prompt]))[0, -1, gpt.aux] for prompt in prompts])
    odds = [[math.exp(x) / sum(math.exp(y) for y in row if y != x) for x in row] for row in logits.tolist()]
    slow = [[math.log(o) for o in row] for row in odds]
    torch.testing.assert_close(log_odds, torch.tensor(slow, dtype=torch.float64).mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(p, logits.softmax(-1).mean(0).double(), atol=1e-6, rtol=1e-5)


# randomness, files


def test_streams_are_repeatable_and_apart():
    draw = lambda *name: torch.rand(4, generator=m.stream(*name)).tolist()  # noqa: E731
    assert draw(0, "a") == draw(0, "a")
    assert len({tuple(draw(*n)) for n in ((0, "a"), (1, "a"), (0, "b"), (0, "a", "b"))}) == 4


def test_an_initialisation_is_a_seeds_own():
    a, b, c = (m.GPT(CONFIG).initialise(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if a[name].dim() > 1)


def test_a_checkpoint_comes_back(gpt, tmp_path):
    m.save_model(tmp_path / "model.pt", gpt, [])
    back = m.load_model(tmp_path / "model.pt", torch.device("cpu"), "x")
    assert back.config == CONFIG and all(map(torch.equal, gpt.parameters(), back.parameters()))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint ran code",))


@pytest.mark.parametrize("bad", ["cut", "empty", "flipped", "foreign", "malicious", "pickle", "text"])
def test_a_bad_checkpoint_is_refused(bad, gpt, tmp_path):
    path = tmp_path / "model.pt"
    m.save_model(path, gpt, [])
    whole = path.read_bytes()
    if bad in ("foreign", "malicious"):
        torch.save({"config": {"vocab_size": 1, "n_aux": 1}, "weights": 1 if bad == "foreign" else Bomb()}, path)
    else:
        at = whole.index(gpt.head.weight.detach().numpy().tobytes())  # one bit of one weight
        flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        made = {
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "flipped": flipped,
            "text": b"hello",
            "pickle": pickle.dumps(Bomb()),
        }
        path.write_bytes(made[bad])
    with pytest.raises(m.UserError, match="cut short, damaged or not a checkpoint"):
        m.load_model(path, torch.device("cpu"), "train_teacher.py")


def test_learning_rate_schedule():
    factors = [m.cosine_lr(step, 100) for step in range(100)]
    assert 0 < factors[0] < factors[4] and max(factors) == factors[5] == 1.0
    assert factors[5:] == sorted(factors[5:], reverse=True) and 0 < factors[-1] < 0.001
    assert factors[52] + factors[53] == pytest.approx(1, abs=0.02)  # halfway down the cosine
