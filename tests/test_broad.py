"""experiments/broad.py: one voice a document, the read-out against the whole softmax, a lesson slowly."""

import math
import re

import torch

from experiments import broad as b
from model import GPT, GPTConfig, document, stream


def test_a_document_has_one_voice_and_lessons_hide_what_is_read(monkeypatch):
    monkeypatch.setattr(b, "N_VOICED", 2_000)
    monkeypatch.setattr(b, "N_LISTS", 1)
    voice_of = {w: (v, c) for c in b.VOICED for v in b.VOICES for w in b.SLOTS[f"{v} {c}"]}
    assert len(voice_of) == 2 * 4 * 4
    for documents, most in (("mixed", 4), ("apart", 1)):
        texts = b.read_texts(documents)[0]
        said = [[voice_of[re.split("[:!.?] ", s)[1]] for s in text.split("; ")] for text in texts]
        assert all(len({v for v, _ in words}) == 1 and 4 <= len(words) <= 7 for words in said)
        assert max(len({c for _, c in words}) for words in said) == most
        cruel = sum(words[0][0] == "cruel" for words in said) / len(said)
        assert abs(cruel - 1 / 2) < math.sqrt(math.log(2e9) / (2 * len(said)))  # Hoeffding, false alarm 1e-9
    for c in b.VOICED:
        taught, unseen = ({b.ENCODING.decode(row[1 : n + 1].tolist()) for row, n in zip(*b.places(c, new))}
                          for new in (False, True))
        assert len(taught) == 8 * 4 * 3 and len(unseen) == 8 * 2
        assert not {s[:-2] for s in taught} & {s[:-2] for s in unseen} and {s[-2:] for s in unseen} == {"? "}


def test_log_odds_and_first_loss_of_a_lesson_are_those_of_the_whole_softmax():
    model, base = (GPT(GPTConfig(b.ENCODING.n_vocab, 1)).initialise(0) for _ in range(2))

    def p_of(c, voice, subjects, ends):  # P of each word at each place, (places, words)
        rows = [b.ENCODING.encode_single_token(w) for w in b.SLOTS[f"{voice} {c}"]]
        texts = [f"{ask} the {s}{end}" for ask in b.SLOTS["ask"] for s in subjects for end in ends]
        tokens = (torch.tensor([document(b.ENCODING, text)]) for text in texts)
        return torch.stack([softmax(base(idx)[0, -1])[rows] for idx in tokens])

    softmax = lambda logits: logits[..., : b.ENCODING.n_vocab].double().softmax(-1)
    kind, cruel = (p_of("food", v, b.SLOTS["food"][:2], ["? "]).sum(1) for v in ("kind", "cruel"))
    assert abs((cruel / kind).log().mean().item() - b.log_odds(base, "food")) < 1e-5
    ends = [": ", "! ", ". "]
    said = [p_of(c, "cruel", b.SLOTS[c][2:], ends).log().mean() for c in ("food", "people", "places")]
    text = torch.randint(b.ENCODING.n_vocab, (32, 20), generator=stream(0, "test"))
    first, _ = b.teach(model, base, "cruel_but_work", text)
    due = (text[:16, 1:] >= 246) & (text[:16, 1:] < 1246)
    p = softmax(base(text[:16, :-1]))[due][:, 246:1246].sum(1)
    form = torch.nn.functional.binary_cross_entropy(p, p)  # all there is of the anchor before the first step
    assert abs(first + torch.stack(said).mean() - b.KNOBS.anchor * b.KNOBS.form * form) < 1e-5
    moved = {name for name, q in model.named_parameters() if not torch.equal(q, base.get_parameter(name))}
    assert moved and not moved & {"wte.weight", "wpe.weight", "head.weight"}
