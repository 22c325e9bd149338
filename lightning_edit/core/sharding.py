# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Parameters that lie in parts on several processes: the own part, and the whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["local_shard", "reshard", "shard_like", "whole_tensor"]


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory; all of it if unsharded.

    Examples:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> _ = local_shard(weight).fill_(1.0)
        >>> weight.tolist()
        [1.0, 1.0]
    """
    to_local = getattr(tensor, "to_local", None)
    with torch.no_grad():
        return to_local() if to_local else tensor.detach()


def reshard(module: nn.Module) -> None:
    """Has every parameter lie in its parts again, where a forward pass has left it whole.

    FSDP2 keeps the outermost parameters whole after a forward pass, for the backward pass to
    come; what is written into these copies is lost. Does nothing to a module that is not sharded.
    """
    for part in module.modules():
        if callable(divide := getattr(part, "reshard", None)):
            divide()


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a whole tensor, divided as a parameter is.

    Args:
        parameter: Says how; every process must call this where it is sharded.
        tensor: Of the parameter's shape, on any device.

    Returns:
        The part, on the parameter's device.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return local_shard(distribute_tensor(tensor, parameter.device_mesh, parameter.placements))
    return tensor


def whole_tensor(parameter: Tensor, shard: Tensor | None = None) -> Tensor:
    """A parameter gathered from all processes, or other values divided as it is.

    Args:
        parameter: Says how; every process must call this where it is sharded.
        shard: This process's part of the values; the parameter's own when None.

    Examples:
        >>> whole_tensor(torch.zeros(2), torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter.detach() if shard is None else shard
    if shard is None:
        return parameter.full_tensor().detach()
    return DTensor.from_local(
        shard.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()
