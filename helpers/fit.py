"""Whether tokens and lengths fit a model: what does not would be an index error of the library in the middle of a run."""

from helpers.errors import InputError
from helpers.subject_parts import Subject


def check(subject: Subject, largest: int, longest: int, what: str) -> None:
    """`InputError` for a token id that the model does not embed, or a text (`what`) of more tokens than it reads."""
    rows = subject.model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise InputError(
            f"{subject.name}: its tokenizer gives token {largest}, but the model embeds {rows}; they do not belong "
            "together: save the model's own tokenizer into its folder"
        )
    most = getattr(subject.model.config, "max_position_embeddings", None)
    if most is not None and longest > most:
        raise InputError(
            f"{subject.name} reads at most {most} tokens, and {what} takes up to {longest}: leave the longest prompts out, "
            "or use a model that reads more"
        )
