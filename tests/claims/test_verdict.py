"""Evidence by name, and what a control says of a row."""

from ledger_rows import FINE, table

from companion.claims.verdict import Rows, conclude, control, same_side


def test_a_missing_row_is_none_and_a_control_that_was_not_run() -> None:
    rows = Rows("m", table(FINE))
    share = rows.find("C1", "late share", "full response")
    assert share is not None and share.estimate == 0.7
    assert rows.find("C1", "late share", "nothing") is None and control(None) == "not run"
    assert control(share) == "passed" and control(share, lambda found: found.estimate > 0.7) == "failed"
    assert same_side(rows, "C1", "late share", "nothing", 0.5) == "not run"
    assert set(rows.variants("C2", "MLP share of NIE", "per ")) == {"per patch norm", "per parameter"}


def test_controls_for_support_are_none_of_another_verdict() -> None:
    rows = Rows("m", table(FINE))
    share = rows.find("C1", "late share")
    assert share is not None
    for decision, said in (("supported", "inconclusive"), ("contradicted", "contradicted")):
        made = conclude(rows, share, decision, {"probe": "failed"}, "why", for_support=("probe",))
        assert made.verdict == said and made.controls == ({"probe": "failed"} if decision == "supported" else {})
