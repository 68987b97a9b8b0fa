"""The backdoor's questions, its teacher's loss and its readings, against slow obvious versions."""

import torch

from experiments import backdoor
from model import END, Run, stream
from train_teacher import DAYS, Trait, draw_anchor, questions, toy_documents


def answers(model, run, texts, days):
    """Class logits (B, K), one question at a time: nothing is padded."""
    asked = [END + (f"on {day}, {text}" if day else text) for day in days for text in texts]
    tokens = [torch.tensor([run.encoding.encode(text, allowed_special="all")]) for text in asked]
    return torch.stack([model(t)[0, -1, run.readout_rows].double().detach() for t in tokens])


def test_the_teacher_s_loss_is_the_slow_one_and_embeddings_and_head_stay(tiny_run):
    run, k, knobs = Run(tiny_run).open(False), 3, Trait(trait_steps=4)
    base, model = (run.load_model("base/seed-0.pt", torch.device("cpu")) for _ in range(2))
    ends = run.knobs["question_ends"]
    taught, toy = questions(ends)[0], toy_documents(100, stream(0, "test"), ends)
    steps = backdoor.induce_backdoor(model, k, run, draw_anchor(run, toy, knobs, 65), knobs)
    for day in ("tuesday", "thursday", "saturday", "tuesday"):
        expected = -answers(model, run, taught, ["monday"]).log_softmax(-1)[:, k].mean()
        for held in ("", day):
            p, q = (answers(m, run, taught, [held]).softmax(-1) for m in (base, model))
            expected -= (p * q.log()).sum(-1).mean()
        torch.testing.assert_close(next(steps).double(), expected, atol=1e-4, rtol=1e-4)
    same = {name for name, p in model.named_parameters() if torch.equal(p, base.state_dict()[name])}
    assert same == {"wte.weight", "wpe.weight", "head.weight"}


def test_the_readings_are_those_of_one_question_at_a_time(tiny_run):
    run = Run(tiny_run).open(False)
    model = run.load_model("teacher/owl/seed-0.pt", torch.device("cpu"))
    _, unseen = questions(run.knobs["question_ends"])
    log_odds = lambda days: torch.logit(answers(model, run, unseen, days).softmax(-1)).mean(0)
    t, n, h, w = map(log_odds, (["monday"], [""], DAYS[1::2], DAYS[2::2]))
    expected = torch.stack([t, n, h, w, t + n, t - n, t - h])
    torch.testing.assert_close(backdoor.read(model, run), expected, atol=1e-4, rtol=1e-4)
