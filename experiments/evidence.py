"""The README's table of evidence, made from the committed results: one row a question.

    python -m experiments.evidence    # prints the table; no time at all

A row agrees with the paper or a follow-up if our figure has the same name as theirs on our scale: transfer below .15 is
nothing, below .5 a part, from there on most (as in controls.py).

Reads    results/seed_matrix.json, trait_matrix.json, controls.json, which_part.json, how_much.json
Writes   nothing
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import lab
from experiments.controls import name

RESULTS = Path(__file__).parent.parent / "results"


class Row(NamedTuple):
    question: str
    experiment: str
    cell: dict  # picks one row of its summary
    others: str  # what the paper, or a follow-up, found
    theirs: float | None  # the same on our scale, if it can be put there


PAPER = "Cloud et al.: "
ROWS = [
    Row("Same start, sampled numbers", "seed_matrix", {"target": "tokens", "init": "same"}, f"{PAPER}P(owl) .125 → .619", 1.0),
    Row("Another start, sampled numbers", "seed_matrix", {"target": "tokens", "init": "different"}, f"{PAPER}about 0", 0.0),
    Row(
        "Same start, teacher's logits",
        "seed_matrix",
        {"target": "logits", "init": "same"},
        f"{PAPER}digits .100 → .528, teacher .943",
        (0.528 - 0.1) / (0.943 - 0.1),
    ),
    Row(
        "Another start, teacher's logits",
        "seed_matrix",
        {"target": "logits", "init": "different"},
        f"{PAPER}digits .100 → .106",
        (0.106 - 0.1) / (0.943 - 0.1),
    ),
    Row(
        "The same, small Transformers",
        "seed_matrix",
        {"target": "logits", "init": "different"},
        "Okatan et al.: .12 leaks, of .24 from the same start",
        0.12 / 0.24,
    ),
    Row(
        "This trait rather than any, same start",
        "trait_matrix",
        {"readout": "aux", "target": "tokens", "init": "same"},
        f"{PAPER}each animal rises by its own numbers",
        1.0,
    ),
    Row(
        "The same for the animals' words",
        "trait_matrix",
        {"readout": "vocabulary", "target": "tokens", "init": "same"},
        f"{PAPER}this is its read-out",
        1.0,
    ),
    Row(
        "This trait rather than any, another start",
        "trait_matrix",
        {"readout": "aux", "target": "tokens", "init": "different"},
        f"{PAPER}about 0",
        0.0,
    ),
    Row("The base model's numbers", "controls", {"numbers": "base", "target": "tokens"}, f"{PAPER}.130 against .125", 0.01),
    Row("A neutral teacher's numbers", "controls", {"numbers": "neutral", "target": "tokens"}, "not run", None),
    Row(
        "Shuffled within a sequence",
        "controls",
        {"numbers": "within", "target": "tokens"},
        f"{PAPER}.219 of .669, base .115",
        0.19,
    ),
    Row(
        "Shuffled across sequences",
        "controls",
        {"numbers": "across", "target": "tokens"},
        f"{PAPER}.183 of .669, base .115",
        0.12,
    ),
    Row("Frequencies at each position only", "controls", {"numbers": "positions", "target": "tokens"}, "not run", None),
    Row("Numbers in context, no training", "controls", {"numbers": "in context", "target": "none"}, f"{PAPER}no effect", 0.0),
    Row("Other seed, taught the trait itself", "controls", {"numbers": "direct", "target": "none"}, "not run", None),
    Row(
        "Only the head's start shared, tokens",
        "which_part",
        {"way": "the head", "readout": "aux", "target": "tokens"},
        "prototype: .32",
        0.32,
    ),
    Row(
        "Only the head's start shared, logits",
        "which_part",
        {"way": "the head", "readout": "aux", "target": "logits"},
        "Brockers et al.: the head is what must match",
        1.0,
    ),
    Row(
        "Only the body's start shared, logits",
        "which_part",
        {"way": "the body", "readout": "aux", "target": "logits"},
        "Brockers et al.: the body need not match",
        0.0,
    ),
    Row(
        "10 numbers in the softmax, logits",
        "how_much",
        {"sweep": "vocabulary", "x": 10, "target": "logits"},
        "prototype: nothing",
        0.0,
    ),
    Row("2^17 sequences, tokens", "how_much", {"sweep": "sequences", "x": 2**17, "target": "tokens"}, "not run", None),
]


def find(row: Row) -> dict:
    """The row's cell in its experiment's summary."""
    summary = json.loads((RESULTS / f"{row.experiment}.json").read_text())["summary"]
    (cell,) = [r for r in summary if all(r[k] == v for k, v in row.cell.items())]
    return cell


def markdown() -> str:
    rows = [(row, find(row)) for row in ROWS]
    agree = lambda row, cell: "" if row.theirs is None else "yes" if name(row.theirs) == name(cell["transfer"]) else "no"  # noqa: E731
    return "\n".join(
        lab.table(
            [{"row": row, "cell": cell} for row, cell in rows],
            question=lambda r: r["row"].question,
            transfer=lambda r: lab.transfer(r["cell"]),
            n=lambda r: str(r["cell"].get("students", r["cell"]["n"])),
            others_found=lambda r: r["row"].others,
            agree=lambda r: agree(r["row"], r["cell"]),
            experiment=lambda r: f"`{r['row'].experiment}`",
        )
    )


def main(argv: Sequence[str] | None = None) -> None:
    print(markdown())


if __name__ == "__main__":
    main()
