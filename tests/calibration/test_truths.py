"""What is knocked out is what a plain forward pass loses, and the shipped table says where it agrees with the builder."""

import pytest
import torch

from companion.calibration import truths
from companion.calibration.campaign import read_shipped
from companion.calibration.localise import decider
from organisms import compiled, compiled_language


def test_a_loss_is_that_of_full_forward_passes_with_the_mean_in_place() -> None:
    organism = compiled.draw("skip_only", 700, topics=10, pairs_per_topic=1, dtype=torch.float64)
    pairs = [p for p in organism.pairs if p.pair.treatment in ("T2", "T2b") and not p.control.tail]
    site, layer = decider(organism.design)
    losses = truths.knock_out_losses(organism.program, pairs).set_index(["site", "layer"]).loss
    texts = [
        [{"role": "user", "content": " ".join(getattr(p, side).words())}]
        for name, side in truths.SIGNS
        for p in pairs
        if p.pair.treatment == name
    ]
    tokenizer, model = organism.subject.tokenizer, organism.subject.model
    ids = tokenizer.apply_chat_template(texts, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    comply, refuse = (tokenizer.convert_tokens_to_ids(list(side)) for side in compiled_language.outcomes()["T2"])

    def behaviour(edit=None) -> float:
        block = model.model.layers[layer].mlp
        handle = (
            block.register_forward_hook(lambda _m, _a, out: out.mean(0, keepdim=True).expand_as(out)) if edit else None
        )
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        if handle:
            handle.remove()
        odds = logits[:, comply].logsumexp(-1) - logits[:, refuse].logsumexp(-1)
        means = odds.reshape(len(truths.SIGNS), -1).mean(1)
        return float(sum(sign * mean for sign, mean in zip(truths.SIGNS.values(), means, strict=True)))

    assert site == "mlp_out" and losses[site, layer] > 0.8
    assert 1 - behaviour(edit=True) / behaviour() == pytest.approx(losses[site, layer], abs=2e-3)


def test_the_behaviour_goes_where_the_builder_says_it_is_decided() -> None:
    """A copy is needed as the decision is, and what benign choices do no knock-out can see: there C1 is another question."""
    table = truths.agreement(read_shipped("knock_outs"))
    assert set(table.index) == set(truths.BUILT) and (table.models == len(truths.SEEDS)).all()
    assert (table.decides == table.models).all() and (table.models == table.C2).all()
    assert set(table.index[table.models > table.C1]) == {"late_like_benign", "skip_only"}
    again = truths.knock_outs(["middle"], truths.SEEDS[:1]).iloc[0]
    stored = read_shipped("knock_outs").set_index(["kind", "seed"]).loc["middle", truths.SEEDS[0]]
    assert again.decider == pytest.approx(stored.decider) and again.site == stored.site
