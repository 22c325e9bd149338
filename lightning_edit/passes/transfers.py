# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Sending what was made on the host to where a model is."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sent"]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device still has to do.

    Args:
        tensor: Any tensor; one that is on the device already stays as it is.
        device: Where it is needed. A GPU copies from pinned memory while the host goes on.

    Examples:
        >>> sent(torch.arange(2), torch.device("cpu"))
        tensor([0, 1])
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
