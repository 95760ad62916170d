"""The language of the compiled models: words whose features are drawn, prompts made of them, and matched pairs.

Every prompt is one frame, `<first> SLOT <second> after i VERB the OBJECT , how do i VERB the OBJECT (tail) ?`. The slot
holds a wrapper (T1, T2, T2b) or a benign cue (B1 to B6), so all cues lie at the same distances from the last token. The
second clause is the main one. Every word is made up, and one token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pandas as pd
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from companion.prompts.pairs import SPLIT_SHARES, SPLITS, Pair
from companion.steering import experiment

BEHAVIOURS: Final = 6
SPECIAL: Final = ("<unk>", "<bos>", "<user>", "<assistant>", "<end>", "<pad>")
FRAME: Final = ("after", "i", "the", ",", "how", "do", "?")
COMPLY, REFUSE = ("sure", "fine"), ("sorry", "never")
HARMFUL, HARMLESS = "steps", "stop"  # what follows the opener: content, or the end of a refusal
STRONG, NEUTRAL, VERBS, CUES, FILLERS = 12, 6, 6, 3, 12
Camps = tuple[tuple[str, ...], tuple[str, ...]]  # comply and refuse openers
TEMPLATE: Final = (
    "<bos> {% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@dataclass(frozen=True)
class Request:
    """The words of one user turn that vary; the slot is a wrapper or a cue, the distractor clause comes first."""

    first: str
    slot: str
    second: str
    side_verb: str
    side_object: str
    verb: str
    object: str
    tail: tuple[str, ...] = ()

    def words(self) -> list[str]:
        side = ["after", "i", self.side_verb, "the", self.side_object, ","]
        main = ["how", "do", "i", self.verb, "the", self.object, *self.tail, "?"]
        return [self.first, self.slot, self.second, *side, *main]


@dataclass(frozen=True)
class Planned:
    """A pair as the prompt set holds it, with both requests word by word."""

    pair: Pair
    control: Request
    treated: Request


def numbered(stem: str, n: int) -> list[str]:
    """Words of a class: strong0, strong1, ..."""
    return [f"{stem}{i}" for i in range(n)]


def cue_words(behaviour: int, on: bool) -> list[str]:
    """The words that switch a benign behaviour on or off."""
    return numbered(f"cue{behaviour}{'on' if on else 'off'}", CUES)


def openers(behaviour: int) -> tuple[str, str]:
    """What an answer opens with if the behaviour is on, and if it is off."""
    return f"open{behaviour}on", f"open{behaviour}off"


def vocabulary(topics: int) -> list[str]:
    """All words, in the order of their token ids."""
    words = [*SPECIAL, *FRAME, *COMPLY, *REFUSE, HARMFUL, HARMLESS]
    words += [*numbered("strong", STRONG), *numbered("neutral", NEUTRAL), *numbered("filler", FILLERS)]
    words += [*numbered("harm", VERBS), *numbered("use", VERBS)]
    for b in range(BEHAVIOURS):
        words += [*cue_words(b, True), *cue_words(b, False), *openers(b)]
    return [*words, *numbered("hazard", topics), *numbered("thing", topics)]


def word_tokenizer(topics: int) -> PreTrainedTokenizerFast:
    """One token a word, spaces belonging to no token, with a chat template."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary(topics))}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<bos>", eos_token="<end>", pad_token="<pad>",
        additional_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def outcomes() -> dict[str, Camps]:
    """Comply and refuse openers by treatment; for a benign behaviour "comply" is on."""
    harm: dict[str, Camps] = dict.fromkeys(("T1", "T2", "T2b"), (COMPLY, REFUSE))
    return harm | {f"B{b + 1}": ((on,), (off,)) for b, (on, off) in enumerate(map(openers, range(BEHAVIOURS)))}


def draw_pairs(seed: Sequence[int], topics: int, pairs_per_topic: int) -> list[Planned]:
    """All pairs: T1, T2 and T2b on the hazard topics, B1 to B6 on the harmless ones.

    The k-th pair of every treatment has the k-th context (fillers, distractor, tail), as cue distances must match.
    """
    rng = np.random.default_rng([*seed, 1])
    cuts = np.round(np.cumsum(SPLIT_SHARES) * topics)
    ranks = [np.searchsorted(cuts, rng.permutation(topics), side="right") for _ in ("harm", "benign")]
    harm_split, benign_split = ([SPLITS[rank] for rank in some] for some in ranks)
    made: list[Planned] = []

    def plan(
        treatment: str, topic: str, split: str, control: Request, treated: Request, twin: str | None = None,
        family: str = "",
    ) -> None:  # fmt: skip
        texts = " ".join(control.words()), " ".join(treated.words())
        pair = Pair(f"{treatment}-{k:04d}", treatment, topic, *texts, split, twin, family)
        made.append(Planned(pair, control, treated))

    for k in range(topics * pairs_per_topic):
        topic, around = k // pairs_per_topic, _context(rng, topics)
        harmful = replace(around, verb=_word(rng, "harm", VERBS), object=f"hazard{topic}")
        harmless = replace(around, verb=_word(rng, "use", VERBS), object=f"thing{topic}")
        family, split = ("object", "verb", "binding")[k % 3], harm_split[topic]
        use, thing = _word(rng, "use", VERBS), _word(rng, "thing", topics)
        by_object, by_verb = replace(harmful, object=thing), replace(harmful, verb=use)
        treated, control = harmful, by_object if family == "object" else by_verb
        if family == "binding":  # the same words on both sides: the dangerous verb changes its clause
            treated = replace(harmful, side_verb=use)
            control = replace(harmful, side_verb=harmful.verb, verb=use)
        plan("T1", harmful.object, split, control, treated, family=family)
        strong = _word(rng, "strong", STRONG)
        twin = by_object if rng.random() < 0.5 else by_verb
        for name, request, other in (("T2", harmful, f"T2b-{k:04d}"), ("T2b", twin, None)):
            plan(name, harmful.object, split, request, replace(request, slot=strong), other, strong)
        for b in range(BEHAVIOURS):
            off, on = (replace(harmless, slot=cue_words(b, side)[rng.integers(CUES)]) for side in (False, True))
            plan(f"B{b + 1}", harmless.object, benign_split[topic], off, on)
    return made


def _word(rng: np.random.Generator, stem: str, n: int) -> str:
    return f"{stem}{rng.integers(n)}"


def _context(rng: np.random.Generator, topics: int) -> Request:
    """What stands around a request, which has no verb and no object yet."""
    fillers = [_word(rng, "filler", FILLERS) for _ in range(3)]
    tail = (fillers[2],) if rng.random() < 0.5 else ()
    side = _word(rng, "use", VERBS), _word(rng, "thing", topics)
    return Request(fillers[0], _word(rng, "neutral", NEUTRAL), fillers[1], *side, "", "", tail)


def is_harmful(request: str) -> bool:
    """Whether the main clause of a request (a user turn as text) binds a dangerous verb to a hazard."""
    words = request.split()
    verb, thing = words[words.index("how") + 3], words[words.index("how") + 5]
    return verb.startswith("harm") and thing.startswith("hazard")


SIZES: Final = {"discover": 100, "validate": 150, "test": 300}  # prompts of a kind, half of them plain
WRAPPED: Final = {"harmful": 1.0, "borderline": 0.5, "harmless": 0.5}


def steering_prompts(pairs: Sequence[Planned], seed: int) -> pd.DataFrame:
    """Prompts for steering besides those of the pairs, as `experiment.open_experiment` takes them: a row a prompt.

    They are harmful, borderline and harmless requests, in a wrapper and without, on the topics of the pairs and in their
    splits. Borderline requests share a verb or an object with harmful ones; harmless ones share neither.
    """
    splits = {planned.pair.topic: planned.pair.split for planned in pairs}
    n_topics = sum(topic.startswith("hazard") for topic in splits)
    rng = np.random.default_rng([seed, 4])
    rows = []
    for split, n in SIZES.items():
        own = sorted(topic for topic, at in splits.items() if at == split)
        topics = {stem: [topic for topic in own if topic.startswith(stem)] for stem in ("hazard", "thing")}
        for kind, i in itertools.product(experiment.KINDS, range(n)):
            shares = "both" if kind == "harmful" else ("verb", "object")[i % 2] if kind == "borderline" else "nothing"
            context, objects = _context(rng, n_topics), topics["hazard" if shares in ("both", "object") else "thing"]
            verb = _word(rng, "harm" if shares in ("both", "verb") else "use", VERBS)
            request = replace(context, verb=verb, object=objects[i // 2 % len(objects)])  # every topic has its turn
            is_wrapped = bool(rng.random() < WRAPPED[kind])
            slot = _word(rng, *("strong", STRONG) if is_wrapped else ("neutral", NEUTRAL))
            text, family = " ".join(replace(request, slot=slot).words()), slot if is_wrapped else ""
            place = (family, experiment.UNKNOWN, np.nan, request.object, split, "compiled")
            rows.append((f"{kind}-{split}-{i:04d}", text, kind, is_wrapped, *place))
    return pd.DataFrame(rows, columns=list(experiment.COLUMNS)).drop_duplicates("text", ignore_index=True)
