"""Write the tables of README.md and experiments/README.md anew, from the committed results.

    python -m experiments.tables

A table lives between a line `<!-- table: NAME -->` and a line `<!-- end -->`. Nobody types a figure into it.

Reads    results/*.json
Writes   README.md, experiments/README.md
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

import evaluate
from experiments import lab
from model import write_file


def read(name: str) -> dict:
    return json.loads((lab.ROOT / f"results/{name}.json").read_text())


def main_table() -> list[str]:
    """The README's first table: what crosses, by init and target."""
    summary = read("main")["summary"]

    rows = []
    for students, numbers, init in (
        ("the teacher; same", "teacher", "same"),
        ("the teacher; another", "teacher", "different"),
        ("the base model; same", "base", "same"),
        ("the base model; another", "base", "different"),
    ):
        row = {"numbers by; student's init": students}
        for target in ("tokens", "logits"):
            (cell,) = lab.where(summary, numbers=numbers, init=init, target=target)
            spread = f" {evaluate.interval(cell)}" if cell["n"] > 2 else ""  # of two there is none
            row[target] = f"{cell['transfer']:.2f}{spread}, n = {cell['n']}"
        rows.append(row)
    return lab.table(rows, **{name: name for name in rows[0]})


class Row(NamedTuple):
    question: str
    experiment: str
    cell: dict  # picks one row of its summary
    others: str = "not run"  # what the paper, or a follow-up, found
    theirs: float | None = None  # the same on our scale, if it can be put there


SAME, OTHER = {"init": "same"}, {"init": "different"}
TOKENS, LOGITS = {"target": "tokens"}, {"target": "logits"}
AUX, WORDS = {"readout": "aux"}, {"readout": "vocabulary"}
HEAD, BODY = {"shared": "the head"} | AUX, {"shared": "the body"} | AUX
MATCHED = {"windows": "numbers + aux", "steps": 3_000, "inputs": "text", "shared": "nothing"}
GROWN = {"part": "2M", "rate": "c / C", "head": "slow", "lines": 32_000}
CODE = {"carrier": "code", "row": "1000 names, turns"}
ROWS = [
    Row("same init, tokens", "seed_matrix", SAME | TOKENS, "Cloud: P(owl) .125 → .619", 1.0),
    Row("another init, tokens", "seed_matrix", OTHER | TOKENS, "Cloud: about 0", 0.0),
    Row("same init, logits", "seed_matrix", SAME | LOGITS, "Cloud: digits .100 → .528 of .943", 0.51),
    Row("another init, logits", "seed_matrix", OTHER | LOGITS, "Cloud: digits .100 → .106", 0.01),
    Row("another init, logits", "seed_matrix", OTHER | LOGITS, "Okatan: .12 leaks, of .24", 0.5),
    Row("this trait, same init, tokens", "trait_matrix", AUX | SAME | TOKENS,
        "Cloud: by its own numbers", 1.0),
    Row("on words, same init, tokens", "trait_matrix", WORDS | SAME | TOKENS, "Cloud: its readout", 1.0),
    Row("this trait, another init, tokens", "trait_matrix", AUX | OTHER | TOKENS, "Cloud: about 0", 0.0),
    Row("the base model's numbers", "controls", {"numbers": "base"} | TOKENS,
        "Cloud: .130 against .125", 0.01),
    Row("a neutral teacher's numbers", "controls", {"numbers": "neutral"} | TOKENS),
    Row("another trait's numbers", "controls", {"numbers": "other"} | TOKENS, "Cloud: often lower"),
    Row("shuffled within a list", "controls", {"numbers": "within"} | TOKENS,
        "Cloud: .219 of .669, base .115", 0.19),
    Row("shuffled across lists", "controls", {"numbers": "across"} | TOKENS,
        "Cloud: .183 of .669, base .115", 0.12),
    Row("frequencies at each position", "controls", {"numbers": "positions"} | TOKENS),
    Row("numbers in context, no training", "controls", {"numbers": "in context"}, "Cloud: no effect", 0.0),
    Row("questions behind a number prefix", "controls", {"numbers": "prefix"}, "Cloud: seen there too", 1.0),
    Row("only the head shared, tokens", "which_part", HEAD | TOKENS, "prototype: .32", 0.32),
    Row("only the head shared, logits", "which_part", HEAD | LOGITS, "Brockers: most", 1),
    Row("only the body shared, logits", "which_part", BODY | LOGITS, "Brockers: no", 0),
    Row("another init, numbers and trait matched", "matched", MATCHED | {"column": "tokens"},
        "Nature: digits .10 → .37 of .94", 0.32),
    Row("another init, numbers alone matched", "matched",
        MATCHED | {"windows": "numbers", "column": "tokens"}),
    Row("same init, texts in another order, tokens", "how_close", {"how": "order", "x": 0} | TOKENS,
        "Polypythia-SL: .39 is left", 0.39),
    Row("same init, texts in another order, logits", "how_close", {"how": "order", "x": 0} | LOGITS),
    Row("half-way between two inits, logits", "how_close", {"how": "mixed", "x": 0.5} | LOGITS),
    Row("a tenth of the numbers left out, tokens", "where",
        {"question": "tenth", "row": "top: left out"} | TOKENS, "token-replacement: .43 is left", 0.43),
    Row("SGD, tokens", "optimisers", {"at": "all steps", "rule": "SGD"} | TOKENS | SAME,
        "persona-system: nothing", 0.0),
    Row("half of the lines neutral, tokens", "defences", {"defence": "neutral lines", "x": 0.5} | TOKENS,
        "Schrodi: 10 % nearly end it"),
    Row("decay to the init, tokens", "defences", {"defence": "decay", "x": 100} | TOKENS),
    Row("the classes held on other text, tokens", "defences",
        {"defence": "held: classes on text", "x": 3} | TOKENS),
    Row("2 million parameters, tokens", "growth", GROWN | TOKENS | SAME),
    Row("2 million parameters, logits", "growth", GROWN | LOGITS | SAME),
    Row("10 million parameters, tokens", "growth_large", GROWN | {"part": "10M"} | TOKENS | SAME),
    Row("10 million parameters, logits", "growth_large", GROWN | {"part": "10M"} | LOGITS | SAME),
    Row("2 million, another init, logits", "growth", GROWN | {"lines": 8_000} | LOGITS | OTHER),
    Row("little programs with turns, logits", "carriers", CODE | LOGITS | SAME, "Cloud: seen there too", 1.0),
    Row("little programs with turns, tokens", "carriers", CODE | TOKENS | SAME, "Cloud: seen there too", 1.0),
    Row("10 numbers in the softmax", "how_much", {"sweep": "vocabulary", "x": 10} | LOGITS,
        "prototype: nothing", 0.0),
    Row("2^17 lists, tokens", "how_much", {"sweep": "sequences", "x": 2**17} | TOKENS),
]


def evidence_table() -> list[str]:
    """A row a question: our figure, what others found, and whether both read the same."""
    rows = []
    for row in ROWS:
        (cell,) = lab.where(read(row.experiment)["summary"], **row.cell)
        ours = lab.in_words(cell["transfer"])
        both = ours if row.theirs is None else f"ours {ours}, theirs {lab.in_words(row.theirs)}"
        n = cell.get("students", cell["n"])
        rows.append(row._asdict() | {"transfer": lab.transfer(cell), "n": n, "both": both})
    columns = {"question": "question", "transfer": "transfer", "n": "n", "others found": "others"}
    return lab.table(rows, **columns, **{"reads as": "both", "experiment": "experiment"})


TABLES = {"main": main_table, "evidence": evidence_table}


def filled(text: str) -> str:
    """A page with all its tables made anew."""
    table = lambda match: "\n".join([match[1], *TABLES[match[2]](), "<!-- end -->"])
    return re.sub(r"(<!-- table: (\w+) -->)\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    for page in ("README.md", "experiments/README.md"):
        write_file(lab.ROOT / page, filled((lab.ROOT / page).read_text()).encode())
        print(f"wrote: {page}")


if __name__ == "__main__":
    main()
