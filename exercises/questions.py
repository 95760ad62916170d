"""The open question of each notebook: the answer is known, follows from how the thing was made, and is not printed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """One open question; `start` is the code a student begins with."""

    number: str
    title: str
    minutes: int
    task: str
    hint: str
    start: str


_CODE = "CODE = 1  # your teacher may give you another number: it draws other things"
_MODELS = """from companion.mediation import estimands
from exercises import mystery

%s
models = mystery.models("%s", CODE)
for letter, study in models.items():
    print(letter, study.subject.n_layers, "layers", study.treatments)
"""


def _models(number: str) -> str:
    return _MODELS % (_CODE, number)


QUESTIONS: dict[str, Question] = {
    "00": Question(
        "00-open",
        "Three mediators",
        10,
        "`mystery.cells(CODE)` holds the four cells of three mediators, called A, B and C, on forty pairs. One "
        "*adds* its part whatever "
        "else happens, one matters only *together* with the rest of the network, and for one of them the rest "
        "would do as well. Which is which?",
        "Exercise 00-1 on every row, then look at the sign of the mean interaction.",
        f"from exercises import mystery\n\n{_CODE}\nmystery.cells(CODE).head()\n",
    ),
    "01": Question(
        "01-open",
        "Which prompt set would you use?",
        20,
        "Three versions of the same T2 pairs. One is sound. In one, topics are split across splits; in one, "
        "control and treated are exchanged in half of the "
        "pairs. Which is which, and what would each fault do to an effect or its interval? (A pair has `topic`, "
        "`split`, `control` and `treated`.)",
        "For the first fault: in how many splits does a topic occur? For the second: which words differ within a "
        "pair? Count how often each wrapper word stands on either side.",
        f"from exercises import mystery\n\n{_CODE}\nsets = mystery.prompt_sets(CODE)\n"
        'for letter, pairs in sets.items():\n    print(letter, len(pairs), "|", pairs[0].control, "|", '
        "pairs[0].treated)\n",
    ),
    "02": Question(
        "02-open",
        "Early, middle or late?",
        25,
        "Three models whose weights were written by hand. One writes the decision in an early layer, one in a middle layer, one "
        "in a late layer. Which is which? Why would the cumulative curve not do?",
        '`estimands.measure_effects(study.subject, study.of("T2"), study.openers, estimands.mediators(study.subject, '
        '["attn_out", "mlp_out"]))`, then the means of `nie0` and `nie1` by site and layer. An MLP may only pass on what one '
        "below it has found: the last large one writes the decision. Each model also has a smaller side route.",
        _models("02"),
    ),
    "03": Question(
        "03-open",
        "Which has its mechanism in attention?",
        20,
        "Three models. In two of them MLPs write the decision into the residual stream, in one an attention "
        "layer does. Which one? Would the *indirect* "
        "effects have told you?",
        "Direct effects say who writes: `model.effects_of_pair` of this lesson's helpers, or `estimands.measure_effects` "
        "with the "
        "sites `attn_out.direct` and `mlp_out.direct`. All attention outputs together carry "
        "the whole effect in all three.",
        _models("03"),
    ),
    "04": Question(
        "04-open",
        "Side by side?",
        25,
        "Three models. In one, many last-layer neurons that lie side by side decide. In one, many scattered neurons decide. In "
        "one, at most 8 decide. Which is which? Decide by the indices of the largest, not by a sum over neighbours.",
        "`neurons.measure_neurons(study).table` holds every last-layer neuron: columns treatment, split, neuron, nie0, nie1. "
        "Sort by the size of their mean.",
        _models("04").replace(
            "from companion.mediation import estimands\nfrom exercises import mystery",
            "from exercises import mystery\nfrom helpers import neurons",
        ),
    ),
    "05": Question(
        "05-open",
        "When has the signal left?",
        25,
        "In each of three models the two prompts of a T2 pair differ in one wrapper word. Patch the residual stream at "
        "that token (position group `differ`), layer by "
        "layer. Which is the first layer (counted from 0) after which it carries less than half of TE, by NIE0? Give one for "
        "each model.",
        '`estimands.measure_effects(study.subject, study.of("T2"), study.openers, estimands.mediators(study.subject, '
        '["resid_post"], ["differ"]))`, then the mean of `nie0` by layer over the mean of `te`. Patching after layer *l* '
        "reaches only what later layers fetch from there.",
        _models("05"),
    ),
    "06": Question(
        "06-open",
        "Three vectors",
        20,
        "Three vectors of one length for the last layer's residual stream at the last token. One moves *jailbroken* prompts "
        "towards refusing, one towards complying, one was drawn at random. Which is which? How many random draws would you want "
        "to see before you believe your answer? Then add them, also at half and at twice their length, to the prompts with a "
        "neutral wrapper (`batch.control`). Is twice as long twice as strong?",
        "With `resid = batch.treated.resid_post[-1][:, -1]`, the jailbroken prompts, compare "
        '`outcomes.log_odds(this.subject, resid + vector / 2, this.openers["T2"])` with the same without the vector. The '
        "outcome is the log-odds of complying. `vector / 2` is the half length. Draw random vectors of the same length for "
        "comparison.",
        "from companion.mediation import estimands, outcomes, study\nfrom exercises import mystery\n\n"
        f'{_CODE}\nthis = study.begin("embedded", "embedded", "embedded", profile="smoke")\n'
        "vectors = mystery.vectors(this, CODE)\n"
        'of_one_length = estimands.batches(this.of("T2"), this.subject)[0]\n'
        "batch = estimands.run_clean(this.subject, of_one_length)\n",
    ),
    "07": Question(
        "07-open",
        "Where was it trained?",
        20,
        "Three copies of SmolLM2 learned to refuse. In one only attention could change, in one only the first third of layers, "
        "in one only the last third. `mystery.plants(CODE)` shows where the effects lie that training added, and `whole` "
        "shows the same for a copy in which everything could change. Which is which? What would you have answered without "
        "knowing the three candidates?",
        "Compare each table with `whole`. Where middle layers hold more than there, something below them sends more.",
        f"from exercises import mystery\n\n{_CODE}\nfor letter, table in mystery.plants(CODE).items():\n"
        '    print(letter, table, sep="\\n")\n',
    ),
    "08": Question(
        "08-open",
        "Be the ledger",
        20,
        "Three evidence tables for C1. Two were tampered with. What does the *registered* rule say of each: supported, "
        "contradicted, "
        "inconclusive? Supported: the interval of `late share` lies at 0.50 or above, and that of `centroid difference` at "
        "0.05 or "
        "above. Contradicted: the first lies at 0.40 or below, or the second at 0 or below. Before that, TE of T2 must be at "
        "least 0.5 on 20 topics, and two controls must lie on the same side of 0.5 as the first: the late share with the norm "
        "frozen, and that of unsaturated pairs. Write your verdicts and reasons down first; only then ask "
        "`mystery.verdict(table)`.",
        "Both rows have the variant `main`. The controls are rows of `late share` with other variants.",
        f"from exercises import mystery\n\n{_CODE}\ntables = mystery.evidence(CODE)\n"
        'shown = ["quantity", "variant", "estimate", "ci_low", "ci_high", "n_pairs", "n_topics"]\n'
        "for letter, table in tables.items():\n"
        '    rows = table[(table.model == "embedded") & (table.claim == "C1")]\n'
        '    print(letter, rows[shown].round(2).to_string(index=False), sep="\\n")\n',
    ),
}
