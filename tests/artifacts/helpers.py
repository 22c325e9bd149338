# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of saved edits share: a run that lies in a folder, and weights in others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.locator import Locator
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.demos import tiny_requests, tiny_tokenizer
from lightning_edit.models import load_model
from lightning_edit.report import EditRow, MetricRow, RunReport, write_results
from tests import zoo

__all__ = ["low_rank_edit", "made_run", "same_weights", "saved_base", "weights"]


def made_run(
    kind: str = "llama",
    dtype: torch.dtype = torch.float32,
    folder: str = "run",
    seed: int = 0,
    layers: tuple[int, ...] = (0, 2),
    **save: bool,
) -> WeightDelta:
    """A base model in ``base``, and what a run of an editor leaves behind."""
    model = zoo.build(kind).to(dtype)
    model.save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    base = BaseModelInfo("base", None, str(dtype).removeprefix("torch."), weight_hash(model))
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for site in Locator(layers=layers).sites(model):
        u, v = (torch.randn(n, 2, generator=generator) for n in site.parameter(model).shape)
        changes[site.name] = LowRank(0.1 * u, v)
    request = tiny_requests(seed + 1)[seed]
    delta = WeightDelta(changes, Provenance("ROME", "", {}, base, (request.id,)))
    originals = {name: p.detach().clone() for name, p in model.named_parameters()}
    delta.apply_(model)
    delta.seal(model, originals).save(Path(folder) / "delta", **save)
    edits = [EditRow(request.id, request.prompt, "", request.target_new, request.target_old)]
    rows = {"reliability/teacher_forced": MetricRow(0.0, 1.0, 1, (0.2, 1.0))}
    report = RunReport(
        "ROME", model=dataclasses.asdict(base), metrics=rows, edits=edits, created="2026-01-02"
    )
    write_results(report, folder)
    return delta


def weights(folder: str) -> dict[str, Tensor]:
    return dict(load_model(folder, dtype="auto").named_parameters())


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def low_rank_edit(model: Any, base: str = "") -> WeightDelta:
    """Ranks 1, 2 and 3 in the last projections of the MLPs, rank 2 in those of attention."""
    generator = torch.Generator().manual_seed(1)
    changes = {}
    sites = [*Locator().sites(model), *Locator(layers=[0], module="attention_out").sites(model)]
    for site, rank in zip(sites, (1, 2, 3, 2, 2), strict=False):
        shape = site.parameter(model).shape
        u, v = (torch.randn(n, rank, generator=generator) for n in shape)
        changes[site.name] = LowRank(0.3 * u, v)
    return WeightDelta(
        changes, Provenance("ROME", base=BaseModelInfo(id=base), request_ids=("a", "b"))
    )


def saved_base(model: Any, folder: Path) -> str:
    model.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    return str(folder / "base")
