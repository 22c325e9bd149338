# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Parameters that lie in parts on several processes: the own part, and the whole.

All that is known of ``DTensor`` and FSDP2 is here.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_edit.core.change import Change, LowRank
from lightning_edit.core.errors import ModelError
from lightning_edit.core.linear_maps import linears
from lightning_edit.core.processes import Processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

__all__ = [
    "divide_like",
    "divided_again",
    "ends_whole",
    "everywhere",
    "frobenius_norm",
    "has_mean_gradient",
    "is_sharded",
    "leave_files_",
    "lies_in_parts",
    "local_change",
    "local_shard",
    "own_outputs",
    "plain",
    "reshard",
    "shard_",
    "shard_like",
    "sharing",
    "split_",
    "split_factors_",
    "splits_outputs",
    "whole_outputs",
    "whole_tensor",
]

_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_LARGE = 2**20  # bytes
# Models whose outermost parameters are whole for now.
_WHOLE: WeakSet[nn.Module] = WeakSet()


def lies_in_parts(tensor: Tensor) -> bool:
    """Whether this is a process's part of a tensor, with what it knows of the whole.

    Examples:
        >>> lies_in_parts(torch.zeros(2))
        False
    """
    return hasattr(tensor, "full_tensor")


def has_mean_gradient(parameter: Tensor) -> bool:
    """Whether FSDP2 takes the mean over processes of a parameter's gradient.

    Examples:
        >>> has_mean_gradient(torch.zeros(2))
        False
    """
    return "data_parallel" in _mesh_names(parameter)


def _mesh_names(parameter: Tensor) -> tuple[str, ...]:
    """Names of what a parameter is divided by."""
    mesh: DeviceMesh | None = getattr(parameter, "device_mesh", None)
    return () if mesh is None else mesh.mesh_dim_names or ()


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of a model lie in parts on several processes.

    Examples:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    return any(map(lies_in_parts, model.parameters()))


def shard_(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Has each process keep its part of every parameter, by FSDP2; every process must call.

    A block is whole on a process only while it runs; on the CPU each of its large linear maps,
    while that runs. The first pass has to be one of the whole model, since FSDP2 takes what runs
    first for the outermost module.

    Args:
        model: A decoder-only model, all of it on each process; its parameters are replaced.
        blocks: Its blocks.
        mesh: The processes that share it, one-dimensional. Those that share projections by
            ``split_`` are others of the same mesh.
    """
    from torch.distributed.fsdp import fully_shard

    kind = mesh.device_type
    for block in blocks:
        if kind == "cpu":  # where nothing is computed meanwhile, so that large parts cost no time
            for _, part in linears(block):
                if sum(p.nbytes for p in part.parameters()) >= _LARGE:
                    fully_shard(part, mesh=mesh)
        fully_shard(block, mesh=mesh)
    # Also after a pass, since what is written into the parts is not in copies of the whole.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    if kind == "cpu":
        _give_back_at_once()


def _give_back_at_once() -> None:
    """Has the C library give large blocks back to the system when they are freed, where it can.

    By itself glibc keeps what gathered weights leave behind, in pieces that fit none of the next.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not everywhere there is glibc
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, _LARGE)


def leave_files_(model: nn.Module) -> None:
    """Has a process keep its part of weights in memory of its own, not in a mapped file.

    A system maps pages of a file by the megabyte, so that a process would hold much of what is
    the others'. Does nothing where the system does not tell what is mapped.
    """
    ranges = _untouched_files()
    mapped: list[Tensor] = []

    def copied(tensor: Tensor) -> Tensor:
        own = local_shard(tensor)
        found = next((one for one in ranges if own.data_ptr() in one), None)
        if found is None:
            return tensor
        mapped.append(own)  # as long as files are mapped, no copy can lie where one was
        copy = tensor.clone()
        # What others ask of these pages is read again from the file.
        start, length = ctypes.c_void_p(found.start), ctypes.c_size_t(len(found))
        ctypes.CDLL(None).madvise(start, length, mmap.MADV_DONTNEED)
        return copy

    if ranges:
        model._apply(copied)  # type: ignore[no-untyped-call]


def _untouched_files() -> list[range]:
    """Addresses of files of tensors that are mapped, and that nobody has written into."""
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return []
    found: list[range] = []
    span = range(0)
    for line in lines:
        name, *rest = line.split()
        if not name.endswith(":"):  # of a mapping
            start, _, end = name.partition("-")
            is_file = line.endswith(".safetensors")
            span = range(int(start, 16), int(end, 16)) if is_file else range(0)
        elif name == "Anonymous:" and span and rest[0] == "0":
            found.append(span)
    return found


def split_(model: nn.Module, block_names: Sequence[str], mesh: DeviceMesh) -> None:
    """Has each process keep a part of each projection, by the model's own plan.

    That is tensor parallelism; every process must call. What is outside of the blocks stays whole.

    Args:
        model: A decoder-only model, all of it on each process; its parameters are replaced.
        block_names: Names of its blocks.
        mesh: The processes that share each projection, one-dimensional.

    Raises:
        ModelError: If the model has no plan that only divides projections by columns and rows, or
            its attention heads cannot be shared out evenly.
    """
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        parallelize_module,
    )

    name = type(model).__name__
    config, count = getattr(model, "config", None), mesh.size()
    for field in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, field, None) or count
        if heads % count:
            raise ModelError(
                f"{name} has {heads} `{field}`, which {count} processes cannot share evenly. Set a "
                "`tensor_parallel_size` that divides them, or divide it by FSDP2: "
                "`tensor_parallel_size=1`."
            )
    known = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    given: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    stack = block_names[0].rpartition(".")[0]
    inside = {path: style for path, style in given.items() if path.startswith(f"{stack}.*.")}
    plan: dict[str, ParallelStyle] = {p: known[s]() for p, s in inside.items() if s in known}
    strange = [s for s in inside.values() if s not in known and not s.startswith("replicated")]
    if strange or not plan:
        what = f"divides some by {strange[0]!r}" if strange else "does not say how to divide them"
        raise ModelError(
            f"The plan of tensor parallelism of {name} {what}; projections that are divided by "
            "columns and rows are expected. Divide the model by FSDP2: `tensor_parallel_size=1`."
        )
    parallelize_module(model, mesh, plan)


def splits_outputs(parameter: Tensor) -> bool:
    """Whether each process has other outputs of a projection, as tensor parallelism may have it.

    Args:
        parameter: The projection's matrix, [O, I].
    """
    if not lies_in_parts(parameter):
        return False
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(parameter, DTensor)  # noqa: S101 (what lies in parts)
    return any(
        name == "tensor_parallel" and isinstance(placement, Shard) and placement.dim == 0
        for name, placement in zip(_mesh_names(parameter), parameter.placements, strict=False)
    )


def split_factors_(reads: nn.Module, writes: nn.Module, parameter: Tensor) -> None:
    """Divides the two maps of a low-rank path as the projection that they go around.

    Args:
        reads: Linear map of the projection's inputs; divided where each process has its own.
        writes: Linear map to its outputs; divided where each process has its own.
        parameter: The projection's matrix, [O, I]. Every process must call this.
    """
    if "tensor_parallel" not in _mesh_names(parameter):
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    assert isinstance(parameter, DTensor)  # noqa: S101 (what lies in parts)
    mesh = parameter.device_mesh["tensor_parallel"]
    if splits_outputs(parameter):
        parallelize_module(writes, mesh, ColwiseParallel())
    else:
        parallelize_module(reads, mesh, RowwiseParallel())


def whole_outputs(parameter: Tensor, outputs: Tensor) -> Tensor:
    """What leaves a projection, gathered where each process has other outputs of it.

    Args:
        parameter: The projection's matrix, [O, I]. Every process must call this.
        outputs: This process's, or gradients at them, [..., O or less].

    Returns:
        [..., O].

    Examples:
        >>> whole_outputs(torch.zeros(2, 3), torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    if not splits_outputs(parameter):
        return outputs
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(parameter, DTensor)  # noqa: S101 (what splits outputs)
    mesh = parameter.device_mesh["tensor_parallel"]
    parts = DTensor.from_local(outputs, mesh, [Shard(outputs.ndim - 1)], run_check=False)
    return parts.full_tensor()


def own_outputs(projection: nn.Module, outputs: Tensor) -> Tensor:
    """Of what is added to a projection's outputs this process's, where each has others of it.

    Args:
        projection: A linear map. Every process must call this.
        outputs: The same on every process, [..., O]. The gradient at them is, too.

    Returns:
        [..., O or less].

    Examples:
        >>> own_outputs(nn.Linear(3, 2), torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    parameter = getattr(projection, "weight", None)  # quantised ones may have none
    if parameter is None or not splits_outputs(parameter):
        return outputs
    from torch.distributed.tensor import Shard

    mesh = parameter.device_mesh["tensor_parallel"]
    return _divided(outputs, mesh, [Shard(outputs.ndim - 1)]).to_local()


def plain(activation: Tensor) -> Tensor:
    """What goes through a module, gathered where tensor parallelism has it in parts.

    Args:
        activation: Every process must call this where it is.

    Examples:
        >>> plain(torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    gather: Callable[[], Tensor] | None = getattr(activation, "full_tensor", None)
    return activation if gather is None else gather()


def divided_again(whole: Tensor, like: Tensor) -> Tensor:
    """What goes through a module, in parts again where another activation is.

    Args:
        whole: What is to go on, the same on every process. Its gradient is whole, too.
        like: What ``plain`` was made of.

    Examples:
        >>> divided_again(torch.ones(2), torch.zeros(2)).tolist()
        [1.0, 1.0]
    """
    if not lies_in_parts(like):
        return whole
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)  # noqa: S101 (what lies in parts)
    return _divided(whole, like.device_mesh, like.placements)


def _divided(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """What every process has, in parts; the gradient at it is whole."""
    from torch.distributed.tensor import DTensor, Replicate

    same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return same.redistribute(placements=placements)


def sharing(model: nn.Module) -> Processes:
    """The processes that hold a whole model each, and so may each run passes of their own.

    Where weights are sharded, a pass takes all processes, so that all do the same.
    """
    return Processes() if is_sharded(model) else Processes.running()


def everywhere(parameter: Tensor, answer: bool) -> bool:
    """Whether all processes say yes, each of its part of a parameter.

    Args:
        parameter: Every process must call this where it is sharded.
        answer: What this process says.
    """
    return Processes.running().agree(answer) if lies_in_parts(parameter) else answer


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


@contextmanager
def ends_whole(model: nn.Module) -> Iterator[None]:
    """Context manager: what is outside of a sharded model's blocks can be run by itself.

    These are the embedding, the last norm and the projection to the vocabulary, which are gathered
    with the outermost module. A block is gathered as often as it is run. Nothing may be written to
    the outer parameters meanwhile. Does nothing to a model that is not sharded.

    Args:
        model: Every process must enter this where it is sharded.
    """
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(model, FSDPModule) or model in _WHOLE:
        yield
        return
    _WHOLE.add(model)
    model.unshard()
    model.set_reshard_after_forward(False, recurse=False)
    model.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        _WHOLE.discard(model)
        model.set_reshard_after_forward(True, recurse=False)
        model.set_reshard_after_backward(True, recurse=False)
        reshard(model)  # also a block at which a pass was ended


def shard_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of a tensor, divided as a parameter is. Nothing is sent.

    Args:
        parameter: Says how.
        tensor: Of the parameter's shape, the same on every process or divided like it already, on
            any device.

    Returns:
        The part, on the parameter's device.
    """
    if lies_in_parts(tensor):
        return local_shard(tensor).to(parameter.device)
    for dimension in range(tensor.ndim):
        tensor = _own(parameter, tensor, dimension)
    return tensor.to(parameter.device)


def divide_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor, the same on every process, divided as a parameter is. Nothing is sent.

    Args:
        parameter: Says how; where it is not sharded, the tensor stays as it is.
        tensor: Of the parameter's shape.
    """
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return tensor
    return DTensor.from_local(
        shard_like(parameter, tensor).contiguous(),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def local_change(parameter: Tensor, change: Change) -> Tensor:
    """This process's part of a change of a parameter, of factors without making the whole.

    Args:
        parameter: Says how it is divided.
        change: The same on every process.

    Returns:
        The part as float32, on the parameter's device.

    Examples:
        >>> change = LowRank(torch.ones(2, 1), torch.ones(3, 1))
        >>> local_change(torch.zeros(2, 3), change).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if not isinstance(change, LowRank):
        return shard_like(parameter, change)
    if change.u.device == parameter.device and not lies_in_parts(parameter):
        return change.dense()
    u, v = change.u.to(parameter.device), change.v.to(parameter.device)
    if u.ndim > 2:  # of a stack of matrices
        return shard_like(parameter, LowRank(u, v).dense())
    # Rows of the factors are rows and columns of the parameter.
    own_v = _own(parameter, v.T, 1).T
    return LowRank(_own(parameter, u, 0), own_v).dense()


def _own(parameter: Tensor, tensor: Tensor, dimension: int) -> Tensor:
    """What this process has of a tensor along a dimension of a parameter."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return tensor
    mesh = parameter.device_mesh
    axes = [a for a, p in enumerate(parameter.placements) if getattr(p, "dim", None) == dimension]
    # FSDP2 divides, by strides, the part that tensor parallelism has made before.
    axes.sort(key=lambda axis: hasattr(parameter.placements[axis], "split_factor"))
    for axis in axes:
        parts = torch.chunk(tensor, mesh.size(axis), dimension)
        rank = mesh.get_local_rank(axis)
        empty = tensor.narrow(dimension, 0, 0)
        tensor = parts[rank] if rank < len(parts) else empty
    return tensor


def frobenius_norm(tensors: Mapping[str, Tensor]) -> float:
    """Frobenius norm over several tensors, in float64.

    Args:
        tensors: Every process must call this where one of them is sharded.

    Examples:
        >>> frobenius_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        5.0
    """
    norms: dict[bool, list[float]] = {True: [], False: []}
    for tensor in tensors.values():
        norm = torch.linalg.vector_norm(local_shard(tensor), dtype=torch.float64)
        norms[lies_in_parts(tensor)].append(float(norm) / math.sqrt(_holders(tensor)))
    own = math.hypot(*norms[True])
    parts = Processes.running().objects(own) if norms[True] else []
    return math.hypot(*norms[False], *parts)


def _holders(tensor: Tensor) -> int:
    """How many processes have the same part of a tensor as this one."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return 1
    sizes = [
        tensor.device_mesh.size(a) for a, p in enumerate(tensor.placements) if hasattr(p, "dim")
    ]
    return Processes.running().count // math.prod(sizes)


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
