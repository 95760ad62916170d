"""A study: one model and one prompt set, tokenised and ready to be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from companion.base.errors import InputError
from companion.mediation import outcomes
from companion.model.architecture import Subject
from companion.model.load import check_fit, load
from companion.prompts import pairs, positions, subsample, tokens
from companion.prompts.pairs import Pair, load_set
from companion.prompts.tokens import Openers, TokenPair


@dataclass(frozen=True)
class Study:
    """Everything a measurement needs. `twins` maps a T2 pair to its T2b pair; `dropped` counts unusable pairs.

    `judge` labels an answer to a request by its content (request, answer), where one can; see `timing.clamped_answers`.
    """

    slug: str
    subject: Subject
    pairs: tuple[TokenPair, ...]
    openers: Mapping[str, Openers]
    twins: Mapping[str, str]
    dropped: Mapping[str, int]
    judge: Callable[[str, str], str] | None = None

    def of(self, *treatments: str) -> list[TokenPair]:
        """Its pairs of these treatments, in the order of the prompt set."""
        return [pair for pair in self.pairs if pair.pair.treatment in treatments]

    @property
    def treatments(self) -> tuple[str, ...]:
        """The treatments that it has pairs of: T1, T2, T2b, then the benign ones."""
        return tuple(sorted({pair.pair.treatment for pair in self.pairs}, key=pairs.treatment_order))

    def with_twins(self, harmful: Sequence[TokenPair]) -> list[tuple[TokenPair, TokenPair]]:
        """These T2 pairs with their T2b twins, where all four prompts have equally many tokens."""
        by_id = {pair.pair.id: pair for pair in self.of("T2b")}
        both = [(pair, by_id.get(self.twins.get(pair.pair.id, ""))) for pair in harmful]
        return [(pair, twin) for pair, twin in both if twin is not None and len(twin.control) == len(pair.control)]

    def subsample(self, n: int) -> Study:
        """The same study on at most `n` pairs a treatment, spread over topics; twins stay with their pairs."""
        kept = {pair.id for pair in subsample.subsample([one.pair for one in self.pairs], n)}
        return replace(self, pairs=tuple(pair for pair in self.pairs if pair.pair.id in kept))


def begin(
    model: str, prompt_set: str, slug: str, *, device: str = "cpu", dtype: str = "float32", profile: str = "full",
    pairs: int = 0,
) -> Study:  # fmt: skip
    """Load the model and the prompt set, tokenise the pairs, and find the answer openers.

    `pairs` bounds the pairs a treatment (0: all; 24 in the smoke profile).
    """
    subject = load(model, device=device, dtype=dtype)
    content = load_set(prompt_set)
    chosen = subsample.subsample(content.pairs, subsample.pairs_asked(pairs, profile))
    kept, dropped = tokens.tokenize(chosen, subject.tokenizer)
    sides = [side for pair in kept for side in (pair.control, pair.treated)]
    longest = max(len(side) for side in sides) + outcomes.STEPS
    check_fit(subject, max(int(side.max()) for side in sides), longest, "a prompt with its answer")
    twins = {p.pair.id: p.pair.twin for p in kept if p.pair.twin}
    return Study(slug, subject, tuple(kept), tokens.openers(content, subject.tokenizer), twins, dropped)


def own_pair(study: Study, control: str, treated: str, treatment: str) -> TokenPair:
    """A pair of the reader's own, scored by the openers of one of the study's treatments.

    Raises InputError if the two prompts have different token lengths, and says which tokens they are.
    """
    pair = Pair("own", treatment, "own", control, treated, sensitive=any(p.pair.sensitive for p in study.pairs))
    made, _ = tokens.token_pair(pair, study.subject.tokenizer)
    if made is None and pair.sensitive:
        raise InputError(
            "the prompts must have equally many tokens and differ (their texts are not shown for this set)"
        )
    if made is None:
        sides = [tokens.encode(study.subject.tokenizer, text)[0] for text in (control, treated)]
        shown = [" ".join(positions.labels(ids, study.subject.tokenizer)) for ids in sides]
        raise InputError(
            f"the prompts must have equally many tokens and differ; control has {len(sides[0])} ({shown[0]}), "
            f"treated {len(sides[1])} ({shown[1]}): swap a word for one of the same length"
        )
    return made
