# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What edits of a model will take: memory, seconds and bytes sent, before anything is loaded."""

# torch is imported when the function runs, so that help on the command line does not wait for it.

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lightning_edit.core.errors import EditError

if TYPE_CHECKING:
    from lightning_edit.modules.locate_then_edit.base import LocateModule

__all__ = ["Plan", "plan"]

Division = Literal["FSDP2", "TP"]
SPREADING = ("MEMIT", "AlphaEdit")  # write layers one after another
PLANNED = ("ROME", "RROME", "EMMET", *SPREADING)
GROUPED, SAMPLED = 6, 21  # contexts that methods sample: in groups as MEMIT's, or as ROME's
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ANSWER = 2  # tokens


@dataclass(frozen=True)
class Plan:
    """What edits will take on each of several devices.

    Args:
        method: Name of the method.
        model: What it is to edit.
        edits: How many edits follow one another.
        devices: How many devices share the weights.
        memory: Part of what is held at the same time to its bytes.
        operations: Part of an edit to its floating-point operations, on all devices together; what
            is done once for all edits stands under ``once``.
        seconds: Part of an edit to its seconds; ``once`` as above.
        sent: Bytes that a device receives in an edit.
        appended: Bytes of numbers that a checkpoint adds for an edit, beside its texts. Where the
            keys of earlier edits have become a matrix, it holds that anew from time to time.
        limit: Bytes of a device, where they were given.
    """

    method: str
    model: str
    edits: int
    devices: int
    memory: Mapping[str, int]
    operations: Mapping[str, float]
    seconds: Mapping[str, float]
    sent: int
    appended: int
    limit: int | None = None

    @property
    def total_memory(self) -> int:
        """Bytes of all parts together."""
        return sum(self.memory.values())

    @property
    def seconds_per_edit(self) -> float:
        """Seconds of an edit, without what is done once."""
        return sum(value for name, value in self.seconds.items() if name != "once")

    @property
    def fits(self) -> bool | None:
        """Whether a device holds it all; None where nobody said how much it holds."""
        return None if self.limit is None else self.total_memory <= self.limit


def plan(
    model: str = "smollm2",
    method: str = "MEMIT",
    edits: int = 1,
    devices: int = 1,
    division: Division = "FSDP2",
    layers: list[int] | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    prompt: int = 20,
    tail: int = 6,
    contexts: int | None = None,
    steps: int | None = None,
    teraflops: float | None = None,
    bandwidth: float | None = None,
    gigabytes: float | None = None,
) -> Plan:
    """Says what edits of a model will take, by arithmetic on its configuration.

    Args:
        model: Folder or hub id of a model, the file of a configuration, or `smollm2`.
        method: A method that locates, then edits: ROME, RROME, MEMIT, EMMET or AlphaEdit.
        edits: Edits that follow one another.
        devices: Devices that share the weights.
        division: How they share them: FSDP2, or TP for tensor parallelism.
        layers: Layers to edit; the method's own if None.
        dtype: Precision of the weights.
        prompt: Tokens of a prompt with its context.
        tail: Tokens of them from the end of the subject on, with the answer.
        contexts: Contexts of a prompt; as many as the method samples if None.
        steps: Passes of the search for a target value; the method's own number if None.
        teraflops: Rate of a device, in 10^12 operations a second; measured on this one if None.
        bandwidth: Gigabytes that a device reads a second; measured on this one if None.
        gigabytes: Memory of a device, to tell whether all fits.

    Returns:
        Memory by part, operations, seconds by the roofline, and bytes sent.

    Raises:
        EditError: If a plan of the method is not known, or a number is not above 0.
        ModelError: If there is no such configuration, or it is none of a language model.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> folder = getfixture("tmp_path")
        >>> tiny_model().config.save_pretrained(folder)
        >>> made = plan(str(folder), "ROME", layers=[1], teraflops=1.0, bandwidth=100.0)
        >>> made.memory["originals"]  # of one matrix, in float32
        16384
    """
    from lightning_edit.artifacts.workload import Workload, measured_bandwidth, measured_rate
    from lightning_edit.core.locator import ModelTree
    from lightning_edit.functional.costs import roofline_seconds
    from lightning_edit.models import model_outline

    numbers = {"edits": edits, "devices": devices, "prompt": prompt, "tail": tail}
    optional = {"contexts": contexts, "steps": steps, "teraflops": teraflops}
    _check({**numbers, **optional, "bandwidth": bandwidth, "gigabytes": gigabytes})
    editor = _editor_of(method, layers)
    outline = model_outline(model)
    sites = editor.sites(ModelTree.of(outline))
    inputs = max(site.in_features for site in sites)
    work = Workload(
        outline,
        sites,
        BYTES[dtype],
        contexts or (GROUPED if editor.groups_contexts else SAMPLED),
        prompt,
        tail,
        ANSWER,
        steps or editor.settings.steps,
        method in SPREADING,
        method == "AlphaEdit",
        editor.moments.settings.tokens_per_dimension * inputs,
        edits,
    )
    rate = 1e12 * teraflops if teraflops else measured_rate()
    moved = 1e9 * bandwidth if bandwidth else measured_bandwidth()
    operations, read = work.operations(), work.bytes_read()
    return Plan(
        method,
        model,
        edits,
        devices,
        work.memory(devices),
        operations,
        {
            name: roofline_seconds(count / devices, read[name] / devices, rate, moved)
            for name, count in operations.items()
        },
        round(work.sent(devices, by_rows=division == "FSDP2")),
        work.appended(),
        None if gigabytes is None else round(gigabytes * 1e9),
    )


def _check(numbers: Mapping[str, float | None]) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < float("inf"):
            raise EditError(f"`{name}` is expected to be a number above 0, but got {value}.")


def _editor_of(method: str, layers: list[int] | None) -> LocateModule:
    import lightning_edit

    if method not in PLANNED:
        raise EditError(
            f"There is no plan for {method!r}; there are plans for {', '.join(PLANNED)}."
        )
    editor: LocateModule = getattr(lightning_edit, method)(layers=layers)
    return editor
