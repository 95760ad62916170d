"""The library's float64 is not: RMSNorm and eager softmax cast to float32 inside. Here they do not, for exactness tests."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from companion.model.readout import norm_gain

_softmax = nn.functional.softmax


@contextmanager
def true_float64(model: PreTrainedModel) -> Iterator[None]:
    """For a while every RMSNorm of the model, and softmax, keep the dtype of what they are given."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                stack.enter_context(mock.patch.object(module, "forward", _rms_norm(module)))
        stack.enter_context(mock.patch.object(nn.functional, "softmax", _plain_softmax))
        yield


def _rms_norm(module: nn.Module) -> Any:
    gain, _, eps = norm_gain(module)
    return lambda x: gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _plain_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return _softmax(x, dim=dim)
