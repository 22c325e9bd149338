# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The published files themselves, where a folder of them lies beside the repository."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_edit.core.request import cases
from lightning_edit.data import (
    ConflictEdit,
    CounterFact,
    EditDataModule,
    KnowEdit,
    Known1000,
    MQuAKE,
    OldNewPairs,
    QAEdit,
    WikiBigEdit,
    ZsRE,
)

FOLDER = Path(__file__).parents[3] / "shared" / "data"


def data(cls: type[EditDataModule], name: str, **kwargs: Any) -> EditDataModule:
    if not (FOLDER / name).exists():
        pytest.skip(f"{name} does not lie in {FOLDER}")
    return cls(path=str(FOLDER / name), **kwargs)


def kinds(module: EditDataModule, name: str) -> Counter[str]:
    return Counter(probe.kind for request in module.requests for probe in getattr(request, name))


# name, class, requests, requests with an old answer, rephrases, locality and portability by kind
FILES: list[tuple[str, type[EditDataModule], int, int, int, Any, Any]] = [
    ("zsre_mend_train.json", ZsRE, 6000, 0, 6000, {"unrelated": 6000}, {}),
    ("zsre_subject_alias.json", ZsRE, 260, 260, 260, {}, {"subject_alias": 260}),
    ("zsre_inverse.json", ZsRE, 371, 371, 371, {}, {"inverse": 371}),
    ("counterfact.json", CounterFact, 1123, 1123, 2246, {"neighborhood": 11230}, {}),
    ("knowedit_wikibio.json", KnowEdit, 306, 0, 0, {"unrelated": 612}, {}),
    (
        "knowedit_zsre.json",
        KnowEdit,
        600,
        600,
        600,
        {"unrelated": 1200},
        {"one_hop": 373, "inverse": 116, "subject_alias": 111},
    ),
    (
        "knowedit_wiki_counterfact.json",
        KnowEdit,
        400,
        400,
        400,
        {"unrelated": 2664, "neighborhood": 230},
        {"one_hop": 1038, "subject_alias": 1115, "inverse": 209},
    ),
    (
        "knowedit_wiki_recent.json",
        KnowEdit,
        400,
        0,
        0,
        {"unrelated": 1283, "neighborhood": 226},
        {"one_hop": 379, "subject_alias": 34, "inverse": 178},
    ),
    # 277, 72 and 5 cases with one, two and three edits; three questions a case.
    (
        "mquake_cf.json",
        MQuAKE,
        436,
        436,
        436,
        {},
        {"multi_hop": 3 * 354, "single_hop": 2 * 139 + 3 * 138 + 4 * 77},
    ),
    (
        "mquake_hard.json",
        MQuAKE,
        800,
        800,
        800,
        {},
        {"multi_hop": 3 * 200, "single_hop": 4 * 200},
    ),
    # One fact is the only one of its relation.
    ("known_1000.json", Known1000, 1207, 1207, 0, {}, {}),
    ("qaedit.json", QAEdit, 1000, 0, 1000, {"unrelated": 5000}, {}),
    ("wikibigedit.json", WikiBigEdit, 2000, 0, 2000, {"neighborhood": 2000}, {}),
    ("old_new_pairs.json", OldNewPairs, 2000, 2000, 2000, {"unrelated": 2000}, {}),
]


@pytest.mark.parametrize("file", FILES, ids=[file[0] for file in FILES])
@pytest.mark.filterwarnings("ignore:.*is a part of another word")
def test_a_published_file_is_read_whole(file: Any) -> None:
    name, cls, count, old, rephrases, locality, portability = file
    module = data(cls, name)
    assert len(module.requests) == count
    assert sum(request.target_old is not None for request in module.requests) == old
    assert sum(len(request.rephrases) for request in module.requests) == rephrases
    assert kinds(module, "locality") == locality
    assert kinds(module, "portability") == portability
    if old == count:
        assert len(module.old_requests) == count


@pytest.mark.parametrize(
    ("name", "count", "portability"),
    [("zsre_mend_eval.json", 2887, {}), ("zsre_portability.json", 1009, {"one_hop": 1009})],
)
def test_zsre_holds_a_few_edits_that_change_nothing(
    name: str, count: int, portability: dict[str, int]
) -> None:
    module = data(ZsRE, name)
    with pytest.warns(UserWarning, match="asks for no change"):
        assert len(module.requests) == count
    assert kinds(module, "locality") == {"unrelated": count}
    assert kinds(module, "portability") == portability
    assert not any(p.prompt.startswith("nq") for r in module.requests for p in r.locality)


def test_zsre_learns_the_first_answer_where_asked() -> None:
    module = data(ZsRE, "zsre_mend_eval.json", target_new="answers", target_old="pred")
    first = module.requests[0]
    assert (first.target_new, first.target_old) == ("Parramatta River", None)


def test_counterfact_is_joined_with_its_portability_file() -> None:
    further = str(FOLDER / "counterfact_portability.json")
    module = data(CounterFact, "counterfact.json", portability_path=further)
    assert kinds(module, "portability") == {"one_hop": 1026, "subject_alias": 211}
    assert kinds(module, "locality") == {
        "neighborhood": 11230,
        "unrelated": 800,
        "distracting": 8000,
    }


@pytest.mark.parametrize(
    ("name", "count", "dropped"),
    [("counterfact_flat_eval.json", 3000, 7), ("counterfact_flat_train.json", 5000, 8)],
)
def test_flat_counterfact_contradicts_itself_in_places(name: str, count: int, dropped: int) -> None:
    module = data(CounterFact, name, skip_invalid=True)
    with pytest.warns(UserWarning, match=f"Left out {dropped} of {count} requests"):
        assert len(module.requests) == count - dropped
    assert kinds(module, "locality") == {"neighborhood": count - dropped}


@pytest.mark.filterwarnings("ignore:.*is a part of another word")
def test_conflicts_come_in_pairs_whose_first_edits_stand_apart() -> None:
    with pytest.warns(UserWarning, match="Left out 68 of 1200 requests"):
        pairs = cases(data(ConflictEdit, "pitfalls_conflict.json", skip_invalid=True).requests)
    assert Counter(map(len, pairs)) == {2: 566}
    for first, second in pairs:
        assert not first.portability
        [probe] = second.portability
        assert (probe.kind, probe.answer in (first.target_new, second.target_new)) == (
            "conflict",
            True,
        )
