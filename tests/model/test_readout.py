"""Logits and log-probabilities of final residual streams are the library's; a frozen norm makes them affine."""

import pytest
import torch
from families import FAMILIES, tiny_subject
from grid_tools import runs
from torch import nn

from companion.base.errors import InputError
from companion.model import readout


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_librarys(family: str) -> None:
    subject = tiny_subject(family)
    base, source = runs(subject)
    plain = subject.model(base.tokens).logits
    rows = torch.tensor([3, 60, 4])
    torch.testing.assert_close(readout.logits(subject, base.resid_post[3]), plain)
    torch.testing.assert_close(readout.logits(subject, base.resid_post[3], rows), plain[..., rows])
    frozen = readout.logits(subject, base.resid_post[3], rows, norm_like=base.resid_post[3])
    torch.testing.assert_close(frozen, plain[..., rows], rtol=1e-4, atol=1e-5)
    other = readout.logits(subject, source.resid_post[3], rows, norm_like=base.resid_post[3])
    assert not torch.allclose(other, readout.logits(subject, source.resid_post[3], rows), atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_need_no_vocabulary_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks, also where exp would overflow."""
    monkeypatch.setattr(readout, "VOCABULARY_BLOCK", 7)
    subject = tiny_subject(family, torch.float64)
    base, source = runs(subject)
    for factor in (1, 1000):
        with torch.no_grad():
            subject.unembed.weight.mul_(factor)
        for resid in (base.resid_post[3], source.resid_post[3]):
            wanted = readout.logits(subject, resid).log_softmax(-1)
            for row in (3, 60, 4):
                got = readout.token_log_probs(subject, resid, torch.full(resid.shape[:-1], row))
                torch.testing.assert_close(got, wanted[..., row], rtol=1e-10, atol=1e-10)


def test_frozen_logits_are_affine_in_the_residual() -> None:
    subject = tiny_subject("gpt2", torch.float64)
    like, other = (run.resid_post[3] for run in runs(subject))
    middle, *ends = (readout.logits(subject, x, norm_like=like) for x in ((like + other) / 2, like, other))
    torch.testing.assert_close(middle, sum(ends) / 2, rtol=0, atol=1e-12)


class Bare(nn.Module):
    """A norm without weights that does not say its epsilon, as OLMo 1's (centred) and others' (not)."""

    def __init__(self, centred: bool, eps: float) -> None:
        super().__init__()
        self.centred, self.hidden_eps = centred, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.hidden_eps)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_a_norm_without_weights_has_gain_1_and_its_epsilon_is_found(centred: bool, eps: float) -> None:
    norm = Bare(centred, eps)
    gain, bias, found = readout.norm_gain(norm)
    assert (gain.item(), bias, found, readout.is_centred(norm)) == (1.0, None, eps, centred)
    x = 1e-3 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(readout.frozen_norm(norm, x, x), norm(x))
    with pytest.raises(InputError, match="Tanh is neither a LayerNorm nor an RMSNorm"):
        readout.norm_gain(nn.Tanh())
