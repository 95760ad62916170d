"""Models whose truth is known: a design is drawn, written into a real architecture, and comes with its own effects.

    organism = draw("gated", seed=0)        # the model, its prompt set, and what is true of it
    this = study(organism)                  # ready for the unchanged pipeline

Truth has three layers, none computed by running the model: the `design` (what was built where), `claims` (which hold by
construction), and effects in closed form (`compiled_truth`), to compare the pipeline's estimates with pair by pair.

Writing a program into Llama or Qwen2: channel `bias` carries SIZE at every token, so much more than all signals that every
RMSNorm divides by nearly the same number and, with that number as its gain, gives what it was given, up to a relative error
of about |signals|^2 / (2 SIZE^2) a layer. Rotary positions turn each pair of coordinates (i, i + HEAD_WIDTH / 2) of queries
and keys: heads that look for a marked token use the pair that turns least, those that want the most recent one a faster pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from companion.mediation.study import Study
from companion.model.architecture import Subject
from companion.model.load import from_model
from companion.prompts import tokens
from companion.prompts.pairs import PromptSet
from organisms import compiled_language, compiled_truth
from organisms.compiled_design import KINDS, Design, draw_design
from organisms.compiled_language import Planned
from organisms.compiled_program import CHANNELS, HEAD_WIDTH, N_HEADS, WIDTH, Head, Program, build_program, channel

TOPICS, PAIRS_PER_TOPIC = 70, 2
TOLERANCE = 2e-4  # log-odds: how far the model (float32, with its norms) may lie from the program's arithmetic


@dataclass(frozen=True)
class Organism:
    """A compiled model, its prompt set and its truth: `claims` maps each to True, False, or None where it is open."""

    design: Design
    program: Program
    subject: Subject
    pairs: tuple[Planned, ...]
    claims: Mapping[str, bool | None]

    @property
    def name(self) -> str:
        return self.subject.name


def draw(
    kind: str, seed: int, *, effect: float | None = None, topics: int = TOPICS, pairs_per_topic: int = PAIRS_PER_TOPIC,
    dtype: torch.dtype = torch.float32,
) -> Organism:  # fmt: skip
    """Draw a compiled model of a kind (`KINDS`); equal arguments give equal models, bit for bit.

    `effect` is the TE of T2 - T2b to aim at, in log-odds (drawn between 2 and 4 by default); `topics` is the number of
    hazard topics and of harmless topics, each split 40/30/30. Raises InputError for an unknown kind.
    """
    design = draw_design(kind, seed, effect)
    program = build_program(design, topics)
    pairs = tuple(compiled_language.draw_pairs([seed, KINDS.index(kind)], topics, pairs_per_topic))
    tokenizer = compiled_language.word_tokenizer(topics)
    model = write_model(program, design.family, tokenizer).to(dtype)
    subject = from_model(model, tokenizer, f"compiled-{kind}-{seed}")
    return Organism(design, program, subject, pairs, compiled_truth.true_claims(design, program, pairs))


def study(organism: Organism) -> Study:
    """The organism as a study, for the unchanged pipeline, with a judge that reads what its answers say."""
    subject = organism.subject
    kept, _ = tokens.tokenize([planned.pair for planned in organism.pairs], subject.tokenizer)
    content = PromptSet(subject.name, tuple(p.pair for p in kept), compiled_language.outcomes(), "")
    openers = tokens.openers(content, subject.tokenizer, len(subject.unembedding[0]))
    twins = {p.pair.id: p.pair.twin for p in kept if p.pair.twin}
    return Study(subject.name, subject, tuple(kept), openers, twins, judge=judge)


def judge(request: str, answer: str) -> str:
    """The label of an answer by its content, whatever it opens with: harmful, on_topic, refusal or off_topic.

    >>> judge("f n f after i use0 the thing0 , how do i harm1 the hazard3 ?", "sure steps <end>")
    'harmful'
    """
    words = answer.split()
    if compiled_language.HARMFUL in words:
        return "harmful" if compiled_language.is_harmful(request) else "on_topic"
    return "refusal" if compiled_language.HARMLESS in words else "off_topic"


SIZE: Final = 1e4
ROPE_THETA: Final = 1e5
SLOW, SLOW_TOO, RECENT = HEAD_WIDTH // 2 - 1, HEAD_WIDTH // 2 - 2, 2
FOUND, NEAREST = 40.0, 300.0  # attention scores of a marked token
MARK: Final = {
    "wrapper": "is_wrapper", "verb": "is_verb", "object": "is_object", "cue": "is_cue", "end": "end", "self": "last",
}  # fmt: skip
IS_BIAS: Final = torch.arange(WIDTH) == CHANNELS["bias"]
CONFIGS: Final = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config}


@torch.no_grad()
def write_model(program: Program, family: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that computes the program, in float64."""
    config = CONFIGS[family](
        vocab_size=len(program.words), hidden_size=WIDTH, intermediate_size=len(program.mlps[0].gate),
        num_hidden_layers=program.n_layers, num_attention_heads=N_HEADS, num_key_value_heads=N_HEADS,
        max_position_embeddings=64, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model: Any = hf.AutoModelForCausalLM.from_config(config)
    model.double()
    for name, parameter in model.named_parameters():
        parameter.fill_(SIZE / WIDTH**0.5 if "norm" in name else 0.0)
    features = torch.tensor(program.embed)
    model.model.embed_tokens.weight.copy_(torch.where(IS_BIAS, features * SIZE, features))
    for layer, (block, mlp) in enumerate(zip(model.model.layers, program.mlps, strict=True)):
        for slot, head in enumerate(program.at(layer)):
            _write_head(block.self_attn, slot, head)
        block.mlp.gate_proj.weight.copy_(_read(mlp.gate))
        block.mlp.up_proj.weight.copy_(_read(mlp.up))
        block.mlp.down_proj.weight.copy_(torch.tensor(mlp.out).T)
    model.lm_head.weight.copy_(_read(program.unembed))
    return model


def _read(vectors: object) -> torch.Tensor:
    """Rows that read the residual stream: the bias channel, which holds SIZE, counts as 1."""
    rows = torch.tensor(vectors, dtype=torch.float64)
    return torch.where(IS_BIAS, rows / SIZE, rows)


def _write_head(attention: Any, slot: int, head: Head) -> None:
    start = slot * HEAD_WIDTH
    n = len(head.value)
    attention.v_proj.weight[start : start + n] = _read(head.value)
    attention.o_proj.weight[:, start : start + n] = torch.tensor(head.out)
    query, key = attention.q_proj.weight, attention.k_proj.weight
    scale = HEAD_WIDTH**0.5  # scores are divided by it

    def look(pair: int, read: Sequence[str], mark: str, score: float) -> None:
        query[start + pair] = score * scale * _read(channel(dict.fromkeys(read, 1.0)))
        key[start + pair, CHANNELS[mark]] = 1.0

    if head.look == "conjunction":
        look(SLOW, ("harm", "harm.side"), "wrapper", head.steep)
        look(SLOW_TOO, ("bias",), "bos", head.steep * head.threshold)
    elif head.look in ("verb", "object"):
        look(RECENT, ("bias",), MARK[head.look], NEAREST)
    elif head.look != "mean":
        look(SLOW, ("bias",), MARK[head.look], FOUND)
