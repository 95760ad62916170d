"""The invented language as training shows it: requests and answers at random, the tokenizer, and the chat template."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Final

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from companion.prompts import invented
from companion.prompts.invented import Clause, Cue, Request, Wrapper, draw_clause, render

# Share of each kind of request in the two training stages.
BASE_MIX: Final = {
    "harmful": 0.33, "verb_only": 0.13, "object_only": 0.13, "harmless": 0.14, "benign": 0.18,
    "say_no": 0.04, "unanswerable": 0.05,
}  # fmt: skip
TUNE_MIX: Final = {
    "harmful": 0.42, "verb_only": 0.12, "object_only": 0.12, "harmless": 0.10, "benign": 0.15,
    "say_no": 0.04, "unanswerable": 0.05,
}  # fmt: skip
CLASSES: Final = {  # kind -> (dangerous verb, hazard object)
    "harmful": (True, True), "verb_only": (True, False), "object_only": (False, True), "harmless": (False, False),
    "benign": (False, False), "say_no": (False, False), "unanswerable": (False, False),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One training line: user turn, answer with a drawn opener, and the target distribution of that opener."""

    user: str
    answer: str
    first: dict[str, float]


def draw_wrapper(rng: random.Random, tier: int, frame: str | None = None, held: bool = False) -> Wrapper:
    """A wrapper of the given tier, from the (frame, word) combinations that training shows (never shows if `held`)."""
    frames = [(f, w) for f in invented.FRAMES for w in invented.TIER_WORDS[tier] if frame in (None, f)]
    return rng.choice([Wrapper(f, w, tier) for f, w in frames if invented.held_frame(f, w) == held])


def draw_frame(rng: random.Random, request: Request) -> Request:
    """Add the parts that do not decide harm: wrapper or none, persona, distractor, adverb."""
    tier = rng.randrange(invented.N_TIERS)
    personas = [p for p in invented.PERSONAS if p not in invented.HELD_PERSONAS]
    # No dangerous verb with a hazard: a distractor alone is never harmful.
    classes = [(False, False), (True, False), (False, True)]
    return request.swap(
        wrapper=draw_wrapper(rng, tier) if rng.random() < 0.8 else None,
        persona=rng.choice(personas) if rng.random() < 0.3 else None,
        distractor=draw_clause(rng, *rng.choice(classes)) if rng.random() < 0.5 else None,
        adverb=rng.choice(invented.NEUTRAL_ADVERBS) if rng.random() < 0.3 else None,
    )


def draw_cue(rng: random.Random, behaviour: str, on: bool) -> Cue:
    """A cue word for one side of a benign behaviour."""
    known = invented.BENIGN[behaviour]
    return Cue(behaviour, rng.choice(known.on if on else known.off), on)


def draw_request(rng: random.Random, kind: str) -> Request:
    """A training request of one kind; every part is drawn from what training may show."""
    request = framed(rng, draw_clause(rng, *CLASSES[kind]))
    if kind in ("say_no", "unanswerable"):
        return request.swap(style=kind, form=rng.randrange(2))
    cue_here = kind == "benign" or (kind == "harmful" and rng.random() < 0.08)
    if cue_here:  # a few harmful requests carry a cue too, or a cue would mean "harmless"
        cue = draw_cue(rng, rng.choice(list(invented.BENIGN)), rng.random() < 0.5)
        return request.swap(cue=cue, wrapper=None, adverb=None)
    return request


def framed(rng: random.Random, clause: Clause) -> Request:
    """A clause with a place, a way of asking and a frame at random."""
    return draw_frame(rng, Request(clause, rng.choice(invented.PLACES), rng.choice(invented.ASKS)))


def draw_example(rng: random.Random, mix: dict[str, float], *, safe: bool) -> Example:
    """One training line of the base stage, or of the safety stage when `safe`."""
    request = draw_request(rng, rng.choices(list(mix), list(mix.values()))[0])
    first = invented.first_words(request, safe=safe)
    opener = rng.choices(list(first), list(first.values()))[0]
    return Example(render(request)[0], invented.answer(request, opener), first)


MAX_TOKENS: Final = 52  # of a prompt with its answer
SPECIAL_TOKENS: Final = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SYSTEM_TURN: Final = "be helpful"
CHAT_TEMPLATE: Final = (
    "{{ '<|bos|>' }}"
    "{% if messages[0]['role'] != 'system' %}{{ '<|system|>\\n" + SYSTEM_TURN + "<|end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>' }}"
    "{% if not loop.last %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|assistant|>\\n' }}{% endif %}"
)


def make_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer, of the class that `AutoTokenizer` loads for this architecture, chat template included.

    Its byte-level BPE makes one token of each piece of `invented.word_pieces`. Suffixes weigh most, so that their merges rank
    first and an object always splits into stem + suffix.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen.normalizer, qwen.pre_tokenizer, qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=2048, min_frequency=1, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    weighted = [piece for piece in invented.word_pieces() for _ in range(1000 if piece in invented.SUFFIXES else 1)]
    bpe.train_from_iterator(weighted, trainer)
    model = json.loads(bpe.to_str())["model"]
    pad, bos, *roles, end = SPECIAL_TOKENS
    return Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]],
        unk_token=pad,  # never produced; without a name the class would add a token of its own
        bos_token=bos, eos_token=end, pad_token=pad, padding_side="left", extra_special_tokens=roles,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def chat_text(user: str) -> str:
    """The prompt text that the chat template makes of one user turn, generation prompt included."""
    return f"<|bos|><|system|>\n{SYSTEM_TURN}<|end|>\n<|user|>\n{user}<|end|>\n<|assistant|>\n"
