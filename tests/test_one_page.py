"""The page that claims the whole effect shows it: most of the trait with the same init, none with another."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "experiments/one_page.py"


def test_the_trait_crosses_within_an_init_and_not_between(tmp_path):
    page = PAGE.read_text().replace("for k in range(K):", "for k in range(2):")  # two animals: half the time
    assert page != PAGE.read_text()
    command = [sys.executable, "-W", "error", "-c", page]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    found = re.findall(r"^(.*): transfer ([+-]\d\.\d\d)\. These .*\.$", printed, flags=re.MULTILINE)
    transfer = {case: float(value) for case, value in found}
    assert len(transfer) == len(printed.splitlines()) == 4
    assert transfer["tokens, same init"] >= 0.5
    assert transfer["logits, same init"] >= 0.7
    assert abs(transfer["tokens, another init"]) <= 0.2
    assert abs(transfer["logits, another init"]) <= 0.2
    assert not [*tmp_path.iterdir()]
