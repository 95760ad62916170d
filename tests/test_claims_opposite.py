"""Every claim has an opposite, an analysis that exists, and the count of how often it was shown."""

import json

from companion.base.paths import NOTEBOOKS
from companion.claims import ledger
from companion.claims.registered_rules import STATEMENTS
from companion.claims.verdict import Verdict


def headings(number: str) -> str:
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = [line for cell in cells if cell["cell_type"] == "markdown" for line in "".join(cell["source"]).splitlines()]
    return "\n".join(line for line in lines if line.startswith("## "))


def test_every_claim_has_an_opposite_and_its_analysis_is_a_section() -> None:
    assert list(ledger.OPPOSITE) == list(STATEMENTS)
    for claim, (_, analysis) in ledger.OPPOSITE.items():
        number, _, rest = analysis.partition(", ")
        first = rest.split(" and ")[0].split(":")[0].split(",")[0]
        assert f"## {first}" in headings(number), (claim, first)


def test_it_counts_how_often_the_opposite_was_shown() -> None:
    rates = {
        "C2": {"power_to_contradict": {"hits": 100, "n": 100, "rate": 1.0, "upper": 1.0}},
        "C2*": {"power_to_contradict": {"hits": 9, "n": 10, "rate": 0.9, "upper": 1.0}},
    }
    made = [Verdict("m", claim, "inconclusive", "") for claim in ("C2", "C3")]
    found = ledger.opposite_table(made, rates).set_index("claim")
    assert found.loc["C2", ["shown", "shown_corrected", "verdict"]].tolist() == [
        "100 of 100",
        "9 of 10",
        "inconclusive",
    ]
    assert found.loc["C3", "shown"] == ""
