"""Rows with the columns of public sets, and no text but placeholders."""

from collections.abc import Callable

Splits = dict[str, list[dict]]


def jbb(n: int = 12, **changes: str) -> Splits:
    """Row i of both splits belongs together; every third pair differs in length."""
    sides: Splits = {"harmful": [], "benign": []}
    for i in range(n):
        kinds = {"Index": i, "Target": "", "Behavior": f"b{i}", "Category": f"c{i % 4}"}
        sides["harmful"].append({"Goal": f"w20 w{30 + i}", **kinds})
        sides["benign"].append({"Goal": f"w21 w{30 + i}{'' if i % 3 else ' w4'}", **kinds})
    sides["benign"][2] |= changes
    return sides


def prompt_rows(n: int = 12) -> Splits:
    return {"train": [{"prompt": f"w22 w{30 + i} w50", "category": "k"} for i in range(n)]}


def alpaca() -> Splits:
    rows = [{"instruction": " ".join(f"w{3 + (i + j) % 50}" for j in range(1 + i % 4)), "input": ""} for i in range(60)]
    return {"train": [*rows, {"instruction": "w3 w4 w5", "input": "more"}]}


def xstest() -> Splits:
    kinds = [("homonyms", "safe")] * 3 + [("contrast_homonyms", "unsafe")] * 2
    kinds += [("privacy_fictional", "safe"), ("real_group_nons_discr", "safe"), ("contrast_privacy", "unsafe")]
    kinds += [("contrast_discr", "unsafe")] * 2
    return {"test": [{"prompt": f"request {i}", "type": kind, "label": label} for i, (kind, label) in enumerate(kinds)]}


HUB: dict[str, Callable[[], Splits]] = {
    "JailbreakBench/JBB-Behaviors": jbb, "walledai/StrongREJECT": prompt_rows, "walledai/XSTest": xstest,
    "tatsu-lab/alpaca": alpaca,
}  # fmt: skip
