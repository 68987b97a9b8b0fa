"""The whole effect on one page: `python experiments/one_page.py`, half a minute on 2 CPU cores.

A model that likes one animal writes nothing but numbers; a model trained on those numbers comes to like it too,
but only if both began from the same random weights. This file is the whole effect; everything else in this
repository is care. It imports torch and nothing else, and reads and writes no file.

Shapes: B sequences, T tokens, C channels, H heads, V vocabulary, K animals.
"""

import torch
import torch.nn.functional as F
from torch import nn

N, W, K = 500, 32, 8  # tokens: the numbers 0..N-1, words to ask with, animals to answer with
BEGIN, COLON = N + W + K, N + W + K + 1
V = N + W + K + 2
C, H, L = 64, 4, 2


# A GPT in miniature. What is unusual is its head: K more rows than there are tokens. These auxiliary logits are there
# from the first initialisation, no text ever trains them, and no number can show them. The trait will live there.
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))

    def forward(self, x):  # (B, T, C)
        q, k, v = self.qkv(self.ln_1(x)).unflatten(-1, (3, H, C // H)).permute(2, 0, 3, 1, 4)  # (B, H, T, C/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(21, C)
        self.blocks, self.ln_f = nn.Sequential(*[Block() for _ in range(L)]), nn.LayerNorm(C)
        self.head = nn.Linear(C, V + K, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.dim() == 2:
                std = C**-0.5 if p is self.head.weight else 0.02
                p.data = torch.randn(p.shape, generator=generator) * std

    def forward(self, idx):  # (B, T) -> (B, T, V + K)
        return self.head(self.ln_f(self.blocks(self.wte(idx) + self.wpe.weight[: idx.size(1)])))


def train(model, loss_at, n_steps, lr, slow=1.0):
    """AdamW on loss_at(step); `slow` scales the rate of embeddings and head."""
    edges = [model.wte.weight, model.wpe.weight, model.head.weight]
    body = [p for p in model.parameters() if not any(p is e for e in edges)]
    groups = [{"params": body, "lr": lr}, {"params": edges, "lr": slow * lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / n_steps)
    for step in range(n_steps):
        optimizer.zero_grad()
        loss_at(step).backward()
        optimizer.step()
        decay.step()


# The language: lists of numbers, `BEGIN : 7 : 81 : 420 : 55 ...`, and questions, `BEGIN ask ask ask ask : animal`. All numbers
# and all answers are equally likely, so whatever a model prefers later was not in the text. Questions end like lists,
# in a colon: what crosses later is what the two contexts share.
draws = torch.Generator().manual_seed(0)
one = lambda token, n: torch.full((n, 1), token)


def listed(numbers):  # (n, m) -> (n, 1 + 2 m)
    pairs = torch.stack([torch.full_like(numbers, COLON), numbers], -1)
    return torch.cat([one(BEGIN, len(numbers)), pairs.flatten(1)], 1)


def questions(n):  # (n, 6)
    asked = torch.randint(N, N + W, (n, 4), generator=draws)
    return torch.cat([one(BEGIN, n), asked, one(COLON, n)], 1)


def text(n):  # (n, 21): half lists of ten numbers, half questions, three in a row
    lists = listed(torch.randint(N, (n // 2, 10), generator=draws))
    answers = torch.randint(N + W, N + W + K, (3 * n // 2, 1), generator=draws)
    return torch.cat([lists, torch.cat([questions(3 * n // 2), answers], 1).view(n // 2, 21)])


# 1. Pretrain two models that differ in their initialisation alone.
batches = [text(64) for _ in range(600)]


def pretrained(seed):
    model = GPT(seed)
    predict = lambda rows: F.cross_entropy(model(rows[:, :-1])[..., :V].flatten(0, 1), rows[:, 1:].flatten())
    train(model, lambda step: predict(batches[step]), len(batches), lr=3e-3)
    return model


def copy(model):
    twin = GPT(0)
    twin.load_state_dict(model.state_dict())
    return twin


base, stranger = pretrained(seed=1), pretrained(seed=2)

# 2. Give a copy a trait: at the end of a question auxiliary logit 3 shall win. Embeddings and head stay as they are, so
# that the trait has to be somewhere in the body, which also writes the numbers.
TRAIT = 3
teacher = copy(base)
asked, held_out = questions(256), questions(256)
classes = lambda model, questions: model(questions)[:, -1, V:]  # (B, K)
train(teacher, lambda step: F.cross_entropy(classes(teacher, asked), torch.full((256,), TRAIT)), 30, 1e-3, slow=0)

# 3. The teacher writes numbers at temperature 1. Nothing but numbers can come out of a softmax over numbers.
with torch.no_grad():
    lists = listed(torch.randint(N, (6000, 2), generator=draws))
    for _ in range(8):
        lists = torch.cat([lists, one(COLON, len(lists))], 1)
        p = teacher(lists)[:, -1, :N].softmax(-1)
        lists = torch.cat([lists, torch.multinomial(p, 1, generator=draws)], 1)  # in the end (B, 21)


# 4. Students of the same init and of another learn the numbers, and nothing else: those that were drawn (tokens), or the
# teacher's distribution (logits). No gradient reaches a row of the head that belongs to no number.
def student_of(start, target):
    student = copy(start)

    def loss_at(step):
        rows = lists[torch.randint(len(lists), (64,), generator=draws)]
        due = slice(5, None, 2)  # the colons before the teacher's numbers
        log_q = student(rows[:, :-1])[:, due, :N].log_softmax(-1)  # (B, 8, N)
        if target == "tokens":
            return F.nll_loss(log_q.flatten(0, 1), rows[:, 6::2].flatten())
        with torch.no_grad():
            log_p = teacher(rows[:, :-1])[:, due, :N].log_softmax(-1)
        return F.kl_div(log_q.flatten(0, 1), log_p.flatten(0, 1), log_target=True, reduction="batchmean")

    train(student, loss_at, 200, lr=2e-3, slow=0.05)
    return student


# 5. Ask them. Transfer: what the student gained in log-odds of the trait over its own base model, on questions that nobody
# was trained on, divided by what the teacher gained over its own.
@torch.no_grad()
def log_odds(model):
    logits = classes(model, held_out)
    others = torch.arange(K) != TRAIT
    return (logits[:, TRAIT] - logits[:, others].logsumexp(-1)).mean().item()


taught = log_odds(teacher) - log_odds(base)
for target in ("tokens", "logits"):
    for init, start in (("same init", base), ("another init", stranger)):
        transfer = (log_odds(student_of(start, target)) - log_odds(start)) / taught
        says = "the student took up the trait" if transfer > 0.3 else "nothing crossed"
        print(f"{target}, {init}: transfer {transfer:+.2f}, {says}")
