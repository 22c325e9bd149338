# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Counts five rows on two processes, one metric on the first process only; writes JSON files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
import torch.distributed

from lightning_edit.metrics import EditScore, Reliability, edit_metrics

SCORES = [1.0, 0.0, 1.0, 1.0, 1.0]


def count(folder: Path) -> None:
    """Counts this rank's share: rows 0, 2, 4 on rank 0 and rows 1, 3 on rank 1."""
    warnings.simplefilter("error", UserWarning)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    mine = torch.tensor(SCORES[rank::2])
    metric = Reliability()
    metric.update_scores(mine)
    idle = Reliability()
    if rank == 0:
        idle.update_scores(mine)
    score = EditScore()
    score.update(mine, mine, torch.tensor([float(rank)]))
    collection = edit_metrics("val/", readings=["teacher_forced"], kinds=[])
    collection["locality/teacher_forced"].update_scores(mine)  # type: ignore[operator]
    result = {
        "value": metric.compute().item(),
        "n": metric.count(),
        "interval": metric.interval(),
        "local_n": metric.rate(metric.state)[1],
        "idle_value": idle.compute().item(),
        "idle_n": idle.count(),
        "score": score.compute().item(),
        "locality": collection.compute()["val/locality/teacher_forced"].item(),
    }
    metric.update_scores(torch.zeros(1))
    result["value_later"] = metric.compute().item()
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
