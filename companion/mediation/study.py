"""A study: one model and one prompt set, ready to be measured; and the sweeps that notebooks 02 and 03 ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


def begin(
    model: str,
    prompt_set: str,
    slug: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    profile: str = "full",
    pairs: int = 0,
) -> Study:
    """Load the model and the prompt set, tokenise the pairs, and find the answer openers.

    `pairs` bounds the pairs a treatment (0: all; 24 in the smoke profile).
    """
    subject = load(model, device=device, dtype=dtype)
    content = load_set(prompt_set)
    chosen = subsample.subsample(content.pairs, subsample.pairs_asked(pairs, profile))
    kept, dropped = tokens.tokenize(chosen, subject.tokenizer)
    _check_fit(subject, kept)
    twins = {p.pair.id: p.pair.twin for p in kept if p.pair.twin}
    return Study(slug, subject, tuple(kept), tokens.openers(content, subject.tokenizer), twins, dropped)


def _check_fit(subject: Subject, pairs: Sequence[TokenPair]) -> None:
    sides = [side for pair in pairs for side in (pair.control, pair.treated)]
    longest = max(len(side) for side in sides) + outcomes.STEPS
    check_fit(subject, max(int(side.max()) for side in sides), longest, "a prompt with its answer")


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
