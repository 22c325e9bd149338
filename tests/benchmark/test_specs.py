# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a comparison is made of, and what of it is refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_edit import EditDataModule, EditRequest, Probe
from lightning_edit.benchmark.cells import cells_of
from lightning_edit.benchmark.specs import (
    CellFilter,
    DataSpec,
    MethodSpec,
    ProtocolSpec,
    Study,
)
from lightning_edit.core.errors import EditError
from lightning_edit.demos import tiny_requests

REQUESTS = tiny_requests(2)


def study(
    method: MethodSpec | None = None,
    requests: Sequence[EditRequest] = REQUESTS,
    protocol: ProtocolSpec | None = None,
    **more: object,
) -> Study:
    data = [DataSpec(EditDataModule(requests=list(requests)))]
    methods = [method or MethodSpec("ROME", settings={"steps": 3})]
    return Study(methods, data, [protocol or ProtocolSpec()], **more)  # type: ignore[arg-type]


def key(one: Study, sha256: str = "weights", device: str = "cpu") -> str:
    [cell] = cells_of(one, sha256, device)
    return cell.key


def test_a_key_is_that_of_all_that_makes_a_cell(subtests: pytest.Subtests, tmp_path: Path) -> None:
    checkpoint = tmp_path / "corpus.jsonl"
    checkpoint.write_text("one")
    ike = MethodSpec("IKE", settings={"corpus": str(checkpoint)})
    before = key(study(ike))
    checkpoint.write_text("two")
    other_probe = replace(REQUESTS[1], locality=(Probe("Rain falls on", "roofs", "unrelated"),))
    keys = {
        "nothing": key(study()),
        "a setting": key(study(MethodSpec("ROME", settings={"steps": 4}))),
        "a method": key(study(MethodSpec("RROME", settings={"steps": 3}))),
        "a preset": key(study(MethodSpec("ROME", preset=None, settings={"steps": 3}))),
        "a probe": key(study(requests=[REQUESTS[0], other_probe])),
        "the order of requests": key(study(requests=REQUESTS[::-1])),
        "the protocol": key(study(protocol=ProtocolSpec("batch", size=2))),
        "points of a curve": key(study(protocol=ProtocolSpec("sequential", points=[1]))),
        "the seed": key(study(seeds=[1])),
        "the weights": key(study(), sha256="others"),
        "the device": key(study(), device="cuda"),
        "the precision": key(study(precision="bf16-mixed")),
        "what is read": key(study(max_new_tokens=3)),
        "how it is asked": key(study(chat_template=True)),
        "a file": key(study(ike)),
        "the file before": before,
    }
    for name, one in keys.items():
        with subtests.test(name):
            assert [other for other, found in keys.items() if found == one] == [name]


def test_a_key_does_not_go_by_names_and_places(subtests: pytest.Subtests, tmp_path: Path) -> None:
    wanted = key(study())
    same = {
        "a label": study(MethodSpec("ROME", settings={"steps": 3}, label="mine")),
        "a default": study(MethodSpec("ROME", settings={"steps": 3, "layers": None})),
        "the cache": study(cache_dir=str(tmp_path)),
        "the reference": study(reference="ROME"),
    }
    for name, one in same.items():
        with subtests.test(name):
            assert key(one) == wanted


def test_what_cannot_be_is_refused(subtests: pytest.Subtests) -> None:
    wrong = {
        r"no method 'ROM'. Did you mean `ROME`\?": MethodSpec("ROM"),
        "the argument .stepz. is unknown|stepz": MethodSpec("ROME", settings={"stepz": 3}),
        "has no preset `gpt5`": MethodSpec("ROME", preset="gpt5"),
        "`chat_template` is the same for all": MethodSpec("ROME", settings={"chat_template": True}),
    }
    for message, method in wrong.items():
        with subtests.test(message), pytest.raises(EditError, match=message):
            _ = study(method).resolved
    with pytest.raises(EditError, match="`reference` is expected to be one of ROME"):
        study(reference="MEMIT")
    with pytest.raises(EditError, match="has 'ROME' twice"):
        Study([MethodSpec("ROME")] * 2, [DataSpec(EditDataModule(requests=REQUESTS))], [])
    with pytest.raises(EditError, match="`protocols` is empty"):
        Study([MethodSpec("ROME")], [DataSpec(EditDataModule(requests=REQUESTS))], [])
    with pytest.raises(EditError, match="in every table by itself"):
        study(MethodSpec("ROME", label="unedited"))
    with pytest.raises(EditError, match="only for `batch`"):
        study(protocol=ProtocolSpec("sequential", size=2))
    with pytest.raises(EditError, match="only of `sequential`"):
        study(protocol=ProtocolSpec("batch", size=2, points=[1]))


def test_cells_are_chosen_by_their_labels() -> None:
    labels = {"method": "FT (L)", "data": "zsRE", "protocol": "batch of 10", "seed": 0}
    for text in (None, "method=ft*", "seed=0, data=zsre", "protocol=batch*"):
        assert CellFilter.parse(text).takes(labels)
    assert not CellFilter.parse("method=ft*,seed=1").takes(labels)
    for text in ("ROME", "methods=ROME", "method="):
        with pytest.raises(EditError, match="expected to read `name=pattern`"):
            CellFilter.parse(text)
