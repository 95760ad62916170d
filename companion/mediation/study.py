"""A study: one model and one prompt set, ready to be measured; the models that it is compared with; how precise it is.

Effects that are to be believed are computed in float32 with float64 read-outs; bfloat16 is a screening run with a noise floor.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from operator import eq

import pandas as pd
import torch

from companion.base import paths
from companion.base.display import NotDefined
from companion.base.errors import InputError
from companion.base.thresholds import COMPONENTS, UNTRAINED
from companion.mediation import estimands, outcomes
from companion.model import memory, replay
from companion.model.activations import clean_run, shared_prefix
from companion.model.architecture import Subject, find_parts
from companion.model.interventions import Patch, position_mask
from companion.model.load import check_fit, load, untrained_twin
from companion.prompts import pairs, positions, tokens
from companion.prompts.pairs import MIN_PAIRS, Pair, PromptSet, load_set, subsample
from companion.prompts.tokens import Openers, TokenPair

CONTROL_PAIRS = 120  # a treatment: in the default set one for each topic
NOISE_PAIRS = 16  # of the noise floor
BUDGET = 4.8e13  # operations that the sweeps of layers, modules and heads may take unasked (`memory.operations`)
FEWEST = 72  # pairs a treatment, whatever they cost: with one a topic, 22 topics in the test split
SMOKE = 24  # pairs a treatment in the smoke profile
COSTLY_SMOKE = (6, 3)  # the same where each pair is costly: a treatment's, a benign behaviour's
ROBUST = 30  # pairs a treatment, where each is costly, of what only supports a verdict, such as control models


@dataclass(frozen=True)
class Study:
    """Everything a measurement needs. `twins` maps a T2 pair to its T2b pair; `dropped` counts unusable pairs by reason.

    `judge` labels an answer to a request by its content (request, answer), where one can; see `timing.clamped_answers`.
    `is_costly` says that all pairs of the set would cost more than `BUDGET`, `is_smoke` that numbers need mean nothing.
    """

    slug: str
    subject: Subject
    pairs: tuple[TokenPair, ...]
    openers: Mapping[str, Openers]
    twins: Mapping[str, str]
    judge: Callable[[str, str], str] | None = None
    is_costly: bool = False
    is_smoke: bool = False
    dropped: Mapping[str, int] = field(default_factory=dict)

    def of(self, *treatments: str) -> list[TokenPair]:
        """Its pairs of these treatments, in the order of the prompt set."""
        return [pair for pair in self.pairs if pair.pair.treatment in treatments]

    @property
    def treatments(self) -> tuple[str, ...]:
        """The treatments that it has pairs of: T1, T2, T2b, then the benign ones."""
        return tuple(sorted({pair.pair.treatment for pair in self.pairs}, key=pairs.treatment_order))

    @property
    def main_treatment(self) -> str:
        """T2 where it has such pairs, else its first treatment."""
        return "T2" if "T2" in self.treatments else self.treatments[0]

    def with_twins(self, harmful: Sequence[TokenPair]) -> list[tuple[TokenPair, TokenPair]]:
        """These T2 pairs with their T2b twins, where all four prompts have equally many tokens."""
        by_id = {pair.pair.id: pair for pair in self.of("T2b")}
        both = [(pair, by_id.get(self.twins.get(pair.pair.id, ""))) for pair in harmful]
        return [(pair, twin) for pair, twin in both if twin is not None and len(twin.control) == len(pair.control)]

    def thinned(self, n: int) -> Study:
        """`subsample` for what no verdict rests on: fewer pairs where each is costly."""
        return self.subsample(min(n, ROBUST) if self.is_costly else n)

    @property
    def judged(self) -> Study:
        """The same study, without validate pairs where each is costly: choices rest on discover, and numbers on test."""
        kept = tuple(pair for pair in self.pairs if pair.pair.split != "validate")
        return replace(self, pairs=kept) if self.is_costly and kept else self

    @property
    def is_quick(self) -> bool:
        """Whether it is a look at a costly study, in the smoke profile: as little of everything as makes every table."""
        return self.is_smoke and self.is_costly

    @property
    def answer_steps(self) -> int:
        """Tokens of an answer."""
        return 8 if self.is_quick else outcomes.STEPS

    @property
    def thinned_layers(self) -> tuple[int, ...]:
        """All layers, or every third (smoke: tenth) from the last one down where each is costly, for what no verdict rests on."""
        last, step = self.subject.n_layers - 1, 10 if self.is_quick else 3 if self.is_costly else 1
        return tuple(range(last % step, last + 1, step))

    def subsample(self, n: int) -> Study:
        """The same study on at most `n` pairs a treatment, spread over topics; twins stay with their pairs."""
        kept = {pair.id for pair in subsample([one.pair for one in self.pairs], n)}
        return replace(self, pairs=tuple(pair for pair in self.pairs if pair.pair.id in kept))


def affordable_pairs(subject: Subject, content: PromptSet) -> int:
    """How many pairs a treatment the sweeps take unasked, a function of the model's shape and the set; 0: all of them."""
    counts = Counter(pair.treatment for pair in content.pairs)
    n = max(FEWEST, int(BUDGET / memory.operations(subject) / len(counts)))
    return 0 if n >= max(counts.values()) else n


def chosen_pairs(content: PromptSet, affordable: int, profile: str = "full", asked: int = 0) -> tuple[Pair, ...]:
    """The pairs of a study: as many a treatment as were asked for, else what is affordable or, in the smoke profile, few.

    Where pairs are costly, a benign behaviour, which is a comparison, has fewer. Raises InputError if too few were asked for.
    """
    if asked and asked < MIN_PAIRS:
        raise InputError(f"--pairs {asked}: at least {MIN_PAIRS} pairs a treatment are needed (0 means all)")
    if asked or not affordable:
        return subsample(content.pairs, asked or (SMOKE if profile == "smoke" else 0))
    n, n_benign = COSTLY_SMOKE if profile == "smoke" else (affordable, ROBUST)
    few = {pair.id for pair in subsample(content.pairs, n_benign)}
    return tuple(pair for pair in subsample(content.pairs, n) if pair.treatment[0] != "B" or pair.id in few)


def begin(
    model: str, prompt_set: str, slug: str, *, device: str = "cpu", dtype: str = "float32", profile: str = "full",
    pairs: int = 0,
) -> Study:  # fmt: skip
    """Load the model and the prompt set, tokenise the pairs, and find the answer openers.

    `pairs` bounds the pairs a treatment (0: `affordable_pairs`, or few in the smoke profile).
    """
    subject = load(model, device=device, dtype=dtype)
    content = load_set(prompt_set)
    affordable = affordable_pairs(subject, content)
    chosen = chosen_pairs(content, affordable, profile, pairs)
    kept, dropped = tokens.tokenize(chosen, subject.tokenizer)
    sides = [side for pair in kept for side in (pair.control, pair.treated)]
    longest = max(len(side) for side in sides) + outcomes.STEPS
    check_fit(subject, max(int(side.max()) for side in sides), longest, "a prompt with its answer")
    twins = {p.pair.id: p.pair.twin for p in kept if p.pair.twin}
    openers = tokens.openers(content, subject.tokenizer, len(subject.unembedding[0]))
    made = Study(slug, subject, tuple(kept), openers, twins, dropped=dropped)
    return replace(made, is_costly=affordable > 0, is_smoke=profile == "smoke")


def own_pair(study: Study, control: str, treated: str, treatment: str = "") -> TokenPair | NotDefined:
    """A pair of the reader's own, scored by the openers of a treatment (by default the main one).

    Where the two prompts have different token lengths it is not defined, and the reason says how many each has and, unless
    the set is sensitive, which tokens are not shared.
    """
    tokenizer, is_sensitive = study.subject.tokenizer, any(one.pair.sensitive for one in study.pairs)
    pair = Pair("own", treatment or study.main_treatment, "own", control, treated, sensitive=is_sensitive)
    made, _ = tokens.token_pair(pair, tokenizer)
    if made is not None:
        return made
    sides = [positions.labels(tokens.encode(tokenizer, text)[0], tokenizer) for text in (control, treated)]
    head = sum(takewhile(bool, map(eq, *sides)))
    tail = sum(takewhile(bool, map(eq, *(side[head:][::-1] for side in sides))))
    own = [" ".join(side[head : len(side) - tail]) or "none" for side in sides]
    which = "" if is_sensitive else f" (not shared: {own[0]}; {own[1]})"
    return NotDefined(
        f"Control has {len(sides[0])} tokens and treated {len(sides[1])}{which}: they must differ and have equally many, "
        "so swap a word for one of the same length."
    )


# ---- what a model is compared with ----


def shipped() -> tuple[str, ...]:
    """Names of the models that come with the companion."""
    return tuple(sorted(folder.name for folder in paths.ORGANISM.iterdir() if (folder / "config.json").is_file()))


def is_shipped(model: str) -> bool:
    """True for an embedded model, by name."""
    return model == "embedded" or model in shipped()


def other_shipped(model: str, profile: str = "full") -> tuple[str, ...]:
    """The other shipped models, if the model is one (none in the smoke profile): other seeds, then the other attention."""
    own = "window-0" if model == "embedded" else model
    names = sorted(shipped(), key=lambda name: (name.startswith("full"), name))
    return tuple(name for name in names if name != own) if is_shipped(model) and profile == "full" else ()


def control_study(study: Study, model: str, label: str) -> Study:
    """The study of one control model by its label, on at most 120 pairs a treatment (no benign ones where they are costly).

    An untrained twin has the same architecture and fresh random weights.
    """
    name, others = label.removesuffix(UNTRAINED), other_shipped(model)
    subject, seed = study.subject, 0
    if name in others:
        subject, seed = load(name, device=str(subject.device), dtype="float32"), 1 + others.index(name)
    few = study.thinned(CONTROL_PAIRS)
    main = few.of("T1", "T2", "T2b")
    few = replace(few, pairs=tuple(main)) if study.is_costly and main else few
    return replace(few, subject=untrained_twin(subject, seed) if label.endswith(UNTRAINED) else subject)


def control_studies(study: Study, model: str, profile: str) -> Iterator[tuple[str, Study]]:
    """Label and study of every control model: the model's untrained twin, `other_shipped` models and their twins."""
    for name in (study.slug, *other_shipped(model, profile)):
        for label in (name, name + UNTRAINED):
            if label != study.slug:
                yield label, control_study(study, model, label)


def normalisations(study: Study) -> dict[str, pd.Series]:
    """Divisors of component effects by (site, layer), so that MLPs do not win by being larger.

    Parameters; and the patch norm, the mean length of treated - control activation at the last token, on discover.
    """
    chosen = [pair for pair in study.of(study.main_treatment) if pair.pair.split == "discover"]
    index = pd.MultiIndex.from_product([COMPONENTS, range(study.subject.n_layers)], names=["site", "layer"])
    norms = pd.Series(0.0, index)
    for group in estimands.batches(chosen, study.subject):
        batch = estimands.run_clean(study.subject, group)
        for site, layer in index:
            change = batch.treated.site(site, layer) - batch.control.site(site, layer)
            norms[site, layer] += float(change[:, -1].double().norm(dim=-1).sum())
    modules = [parts.attn for parts in study.subject.layers] + [parts.mlp for parts in study.subject.layers]
    counts = [float(sum(p.numel() for p in module.parameters())) for module in modules]
    return {"per patch norm": norms / max(len(chosen), 1), "per parameter": pd.Series(counts, index)}


# ---- precision ----


def describe_precision(study: Study) -> str:
    """One line for a notebook: float32 effects, or a screening run with its noise floor for modules and for neurons."""
    if study.subject.dtype != torch.bfloat16:
        return f"effects are computed in {str(study.subject.dtype).removeprefix('torch.')}"
    floors = {site: noise_floor(study, site) for site in (*COMPONENTS, "neuron")}
    shown = "; ".join(
        f"{site} {rms:.3f} log-odds ({changed:.0%} change sign, {lost:.0%} vanish)"
        for site, (rms, changed, lost) in floors.items()
    )
    return f"SCREENING in bfloat16: do not cite these effects; measured noise floor: {shown}"


def tolerance(study: Study) -> float:
    """How far two routes to the same effect may lie apart, relative to the total effect: rounding, not a mistake."""
    facts = study.subject.facts
    return 1e-4 if facts is None else facts.tolerance


@torch.no_grad()
def noise_floor(study: Study, site: str) -> tuple[float, float, float]:
    """How far NIE0 in the study's own precision is from that in float32, at one site, at the last token of every layer.

    Root mean square error (log-odds), and two shares among the effects that are not 0 in float32: of those that come out
    with the other sign, and of those that come out as 0. On up to 16 pairs and, of neurons, on every sixteenth.
    """
    subject, openers = study.subject, study.openers[study.main_treatment]
    group = estimands.batches(study.of(study.main_treatment), subject, size=NOISE_PAIRS)[0]
    control, treated = estimands.prompt_tokens(subject, group)
    last, indices = position_mask(control, -1), range(0, subject.d_mlp, 16) if site == "neuron" else (None,)
    patches = [Patch(site, layer, last, i) for layer in range(subject.n_layers) for i in indices]
    exact = find_parts(copy.deepcopy(subject.model).float(), None, f"{subject.name} in float32", subject.sha256)
    effects = []
    for one in (subject, exact):
        shared = shared_prefix(one, control, treated)
        base, source = (clean_run(one, side, shared=shared) for side in (control, treated))
        patched = outcomes.log_odds(one, replay.interchange(one, base, source, patches), openers)
        effects.append(patched - outcomes.log_odds(one, base.resid_post[-1][:, None, -1:], openers))
    half, full = effects
    exists = full != 0
    shares = [float(x[exists].double().mean()) if exists.any() else 0.0 for x in (half * full < 0, half == 0)]
    return float((half - full).pow(2).mean().sqrt()), shares[0], shares[1]
