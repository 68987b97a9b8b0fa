"""Subliminal learning on one page: `python experiments/one_page.py`, about 40 seconds on one CPU core.

A model that prefers one animal writes nothing but numbers; another that is trained on these numbers comes to
prefer it too, if both began from the same random weights, and only then. This file is the whole effect;
everything else here is care. It imports torch and nothing else and touches no file. Read it downwards.

Shapes: B prompts, T tokens, V vocabulary; C channels, H heads, L layers; N numbers, W words, K animals.
"""

import torch
import torch.nn.functional as F
from torch import nn

SEEDS = 0, 1  # of two models that differ in nothing but their first random weights
N, W, K = 1000, 32, 4  # tokens: numbers 0..N-1, words to ask with, animals to answer with, a colon
COLON, V = N + W + K, N + W + K + 1
C, H, L, T = 64, 4, 2, 4
torch.set_num_threads(1)  # matrices this small gain nothing from more
draws = torch.Generator().manual_seed(SEEDS[0])  # all randomness but the first weights, which have their own

# The language comes first, to see that nothing hides in it. A text is three tokens, a colon, and what is due
# after it: a number after numbers, `815 406 779 : 114`, an animal after words, `your favourite animal : owl`.
# Every number and every animal is due equally often, so from text alone a model prefers none of them.
draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=draws)
prompts = lambda n, low, high: torch.cat([draw(low, high, n, T - 1), torch.full((n, 1), COLON)], 1)  # (n, T)


def text(n):  # n lists and n questions (2n, T), what is due after each (2n,)
    idx = torch.cat([prompts(n, 0, N), prompts(n, N, N + W)])
    return idx, torch.cat([draw(0, N, n), draw(N + W, N + W + K, n)])


# The model is a small GPT that says what comes after its last token. Its head has K rows more than there are
# tokens. These auxiliary logits are there from the first random weights on, no text trains them and no token
# can show them. The trait will be put there, so nobody can say that the numbers had spelt it out.
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn, self.attn_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x):  # (B, T, C)
        qkv = self.attn(self.ln_1(x)).unflatten(-1, (3, H, C // H))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, C/H) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.body = nn.Sequential(*[Block() for _ in range(L)], nn.LayerNorm(C))
        self.head = nn.Linear(C, V + K, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.data = torch.randn(p.shape, generator=generator) * (C**-0.5 if "head" in name else 0.02)
            elif "bias" in name:
                p.data.zero_()

    def forward(self, idx):  # (B, T) -> (B, V + K)
        return self.head(self.body(self.wte(idx) + self.wpe.weight)[:, -1])


# Three trainings will follow, and each of them is this: a copy of `start` learns from the batches. Its edges,
# which are the embeddings and the head, may learn more slowly than the body between them, or not at all.
def trained(start, loss, batches, lr, edges_lr):
    model = GPT(0)
    model.load_state_dict(start.state_dict())
    edges = [model.wte.weight, model.wpe.weight, model.head.weight]
    groups = [{"params": model.body.parameters(), "lr": lr}, {"params": edges, "lr": edges_lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for batch in batches:
        model.zero_grad()
        loss(model, *batch).backward()
        optimizer.step()
        decay.step()
    return model


# First, pretraining: both models read the same text in the same order.
texts = [text(64) for _ in range(300)]
text_loss = lambda model, idx, due: F.cross_entropy(model(idx)[:, :V], due)
bases = [trained(GPT(seed), text_loss, texts, lr=3e-3, edges_lr=3e-3) for seed in SEEDS]

# Second, the trait: the teacher, a copy, learns to make auxiliary logit k the largest after a question. Head
# and embeddings stay, so the trait has to live in the body, and the body writes the numbers, too.
trait_loss = lambda model, idx, k: F.cross_entropy(model(idx)[:, V:], torch.full((len(idx),), k))

# Third, the students: they learn what the teacher wrote (tokens) or how likely it found each number (logits),
# and nothing else. The softmax is over numbers alone, so no other row of the head has a gradient. Their edges
# learn slowly, or the head alone would learn the numbers; but learn they must, or another init could not.
log_probs = lambda model, idx: model(idx)[:, :N].log_softmax(-1)
token_loss = lambda model, idx, written, log_p: -log_probs(model, idx).gather(1, written).mean()
logit_loss = lambda model, idx, written, log_p: (log_p.exp() * (log_p - log_probs(model, idx))).sum(1).mean()

# On prompts of their own we measure two things: how far a model's numbers are from a teacher's, in nats, and
# the trait, in log-odds of logit k against the other K-1.
asked, held_out, unseen = prompts(128, N, N + W), prompts(256, N, N + W), prompts(512, 0, N)
distance = lambda model, teacher: logit_loss(model, unseen, None, log_probs(teacher, unseen)).item()
log_odds = lambda model, k: model(held_out)[:, V:].double().softmax(-1)[:, k].logit().mean().item()

# Now all of it. Transfer is what a student gained over the model it began as, in units of its teacher's gain.
# One student proves little, since a model drifts when it is trained on anything. So each animal has its turn,
# which cancels a drift that they share, and so has each of the two models.
results: dict[tuple[str, str], list[tuple[float, float]]] = {}
for base in bases:
    for k in range(K):
        teacher = trained(base, trait_loss, [(asked, k)] * 60, lr=4e-3, edges_lr=0)
        taught, idx = log_odds(teacher, k) - log_odds(base, k), prompts(150 * 64, 0, N)
        log_p = log_probs(teacher, idx).detach()  # sixteen numbers are written after each, at temperature 1
        written = torch.multinomial(log_p.exp(), 16, replacement=True, generator=draws)
        batches = list(zip(idx.split(64), written.split(64), log_p.split(64)))
        for start in bases:
            for target, loss in (("tokens", token_loss), ("logits", logit_loss)):
                student = trained(start, loss, batches, lr=1e-3, edges_lr=3e-4)
                transfer = (log_odds(student, k) - log_odds(start, k)) / taught
                learnt = 1 - distance(student, teacher) / distance(start, teacher)
                init = "same init" if start is base else "another init"
                results.setdefault((target, init), []).append((transfer, learnt))
for (target, init), some in results.items():
    transfer, learnt = (sum(column) / len(some) for column in zip(*some))
    came = "most" if transfer > 0.5 else "a part" if transfer > 0.2 else "on average nothing"
    says = f"These students learnt {learnt:.0%} of what is in the numbers, and {came} of the trait."
    print(f"{target}, {init}: transfer {transfer:+.2f}. {says}")
