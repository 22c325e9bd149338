# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A task of lm-eval of which nothing has to be fetched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from lightning_edit import EditRequest

__all__ = ["write_own_task"]


def write_own_task(folder: Path, facts: Sequence[EditRequest]) -> None:
    """Writes the task ``own_facts``: which of two answers to each fact is the likelier.

    Args:
        folder: What lm-eval gets as its folder of further tasks.
        facts: Facts with old answers, which count as right.
    """
    rows = [
        {"prompt": fact.prompt, "choices": [fact.target_old, fact.target_new]} for fact in facts
    ]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "own_facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "facts.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "own_facts.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
