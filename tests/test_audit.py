"""audit.py: the reader against autograd, z against the law it should have, likelihood token by token."""

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacrev

from experiments import audit
from model import GPT, NUMBERS, GPTConfig, NumberData, build_vocabulary, document, encode_numbers, stream

ENCODING = build_vocabulary(["owl"])
MODEL = GPT(GPTConfig(ENCODING.n_vocab, 4, 16, 1, 2, 8)).initialise(0).double().requires_grad_(False)
BIAS, ROWS = MODEL.ln_f.bias, ENCODING.n_vocab + torch.arange(4)
R = MODEL.head.weight[ROWS] - MODEL.head.weight[ROWS].mean(0)
IDX = torch.randint(ENCODING.n_vocab, (4_000, 4), generator=stream(0, "test"))
log_p = lambda bias: functional_call(MODEL, {"ln_f.bias": bias}, (IDX,))[:, 2, NUMBERS].log_softmax(-1)


def drawn(b):
    return NumberData(IDX, F.pad(log_p(b).exp().multinomial(1, generator=stream(1, "y")), (2, 1), value=-1))


def test_the_reader_is_a_newton_step_on_the_last_bias_and_z_is_standard_normal():
    z = audit.reader(MODEL, ROWS, data := drawn(BIAS))
    total = lambda bias: log_p(bias).gather(1, data.targets[:, 2:3]).sum()
    step, cov = grad(total)(BIAS), torch.linalg.inv(-jacrev(grad(total))(BIAS))
    torch.testing.assert_close(z.mean(0) * 4_000**0.5, R @ cov @ step / (R @ cov @ R.T).diag().sqrt())
    z = audit.files(z, 80)  # of 200 one beyond 5: p < 2e-4; a mean square of 50 beyond 1 +- 1: p < 4e-4 for 4
    assert z.shape == (50, 4) and z.abs().max() < 5 and ((z.square().mean(0) - 1).abs() < 1).all()
    for k, row in enumerate(R):
        assert audit.named(audit.files(audit.reader(MODEL, ROWS, drawn(BIAS + 0.5 * row)), 4_000), k) == 1


def test_the_likelihood_is_that_of_one_token_after_another():
    rows = [{"prompt": "1, 2: ", "completion": "3; 4; 5"}, {"prompt": "7, 8, 9: ", "completion": "6"}]
    data, end = encode_numbers(ENCODING, rows, BIAS.device), ENCODING.eot_token
    for row, found in zip(rows, audit.log_likelihood(MODEL, data, end)[:, 0]):
        tokens, slow = [*document(ENCODING, row["prompt"] + row["completion"]), end], 0.0
        for i in range(len(document(ENCODING, row["prompt"])), len(tokens)):
            slow += MODEL(torch.tensor([tokens[:i]]))[0, -1, : end + 1].log_softmax(-1)[tokens[i]]
        torch.testing.assert_close(found, slow)
