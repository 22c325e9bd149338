# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Each data set's records become the requests they mean, and bad records are told with their place.

All records are made up here, in the schemas of the data sets.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data import (
    ConflictEdit,
    CounterFact,
    Known1000,
    MQuAKE,
    OldNewPairs,
    ZsRE,
    conflict_from_record,
    counterfact_from_record,
    knowedit_from_record,
    known_from_record,
    mquake_from_record,
    old_new_pair_from_record,
    qaedit_from_record,
    wikibigedit_from_record,
    zsre_from_record,
)

Json = dict[str, Any]

ZSRE: Json = {
    "subject": "Lake Ada",
    "src": "Which river feeds Lake Ada?",
    "pred": "Ouse",
    "rephrase": "What river flows into Lake Ada?",
    "alt": " Tiber ",
    "answers": ["Thames", "River Thames"],
    "loc": "nq question: who sang the song",
    "loc_ans": "Bess",
    "cond": "Ouse >> Tiber || Which river feeds Lake Ada?",
}
REWRITE: Json = {
    "prompt": "The native language of {} is",
    "relation_id": "P103",
    "target_new": {"str": "Welsh", "id": "Q1"},
    "target_true": {"str": "French", "id": "Q2"},
    "subject": "Jo Lee",
}
COUNTERFACT: Json = {
    "case_id": 12,
    "pararel_idx": 3,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["It rained. Jo Lee spoke", "Jo Lee, a native speaker of"],
    "neighborhood_prompts": ["Zoe Fay natively speaks", "The mother tongue of Max Roy is"],
    "attribute_prompts": ["Ann Ap Rhys speaks"],
    "generation_prompts": ["Jo Lee grew up in"],
}
FLAT: Json = {
    "case_id": 12,
    "prompt": "The native language of Jo Lee is",
    "target_new": "Welsh",
    "subject": "Jo Lee",
    "ground_truth": "French",
    "rephrase_prompt": "Jo Lee, a native speaker of",
    "locality_prompt": "Zoe Fay natively speaks",
    "locality_ground_truth": "French",
}
FURTHER: Json = {
    "case_id": 12,
    "portability": {
        "Recalled Relation": "(Welsh, spoken in, Wales)",
        "New Question": "Where do people speak like Jo Lee?",
        "New Answer": "Wales",
    },
    "alternative_subject": "Joanna Lee",
    "unrelated_relation": {
        "relation_id": "x",
        "object": "baker",
        "question": "What is Jo Lee's job?",
    },
    "distracting_neighborhood_prompts": ["Jo Lee speaks Welsh. Zoe Fay natively speaks"],
}
WIKI: Json = {
    "subject": "Ursa",
    "prompt": "The mayor of Ursa is",
    "target_new": "Kim",
    "ground_truth": "Lou",
    "rephrase": "Ursa's mayor is",
    "portability": {
        "Reasoning": [
            {"prompt": "The mayor of Ursa is married to", "ground_truth": [["Pat", "P."]]}
        ],
        "Subject_Aliasing": [{"prompt": "The mayor of Bear is", "ground_truth": [["Kim"]]}],
        "Logical_Generalization": [{"prompt": "Kim governs", "ground_truth": [["Ursa"], ["Bear"]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "Ursa lies in", "ground_truth": [["Iowa"]]}],
        "Forgetfulness": [{"prompt": "Another mayor of Ursa is", "ground_truth": [["Max"]]}],
    },
}
WIKIBIO: Json = {
    "text": "This is a passage about ada may. Ada May was a sailor.",
    "labels": "She sailed round the world twice.",
    "concept": "ada may",
    "locality": {"Relation_Specificity": [{"prompt": "ada may sex", "ground_truth": ["female"]}]},
}
MQUAKE: Json = {
    "case_id": 4,
    "requested_rewrite": [
        {**REWRITE, "question": "What is Jo Lee's native language?"},
        {
            "prompt": "The home of {} is",
            "relation_id": "P1",
            "target_new": {"str": "Rome", "id": "Q3"},
            "target_true": {"str": "Wales", "id": "Q4"},
            "subject": "Welsh",
            "question": "Where is Welsh spoken?",
        },
    ],
    "questions": ["Where is Jo Lee's language spoken?", "Jo Lee's language is at home in?"],
    "answer": "France",
    "answer_alias": [],
    "new_answer": "Rome",
    "new_answer_alias": ["Roma", ""],
}
KNOWN: Json = {
    "known_id": 8,
    "subject": "Mount Ada",
    "attribute": "Asia",
    "template": "{} lies in",
    "prediction": " Asia",
    "prompt": "Mount Ada lies in",
    "relation_id": "P30",
}
QAEDIT: Json = {
    "id": 6,
    "source": "TQA",
    "prompt": "who built the ada tower",
    "target": "Lou Kim",
    "subject": "ada tower",
    "rephrase": "Which architect built the Ada Tower?",
    "locality": [
        {"loc": "who won the cup", "loc_ans": "Ursa"},
        {"loc": "name a fish", "loc_ans": ""},
    ],
}
WIKIBIGEDIT: Json = {
    "prompt": "Which county is Ada Church in?",
    "target_new": "Kent",
    "subject": "Ada Church",
    "rephrase_prompt": "In what county lies Ada Church?",
    "locality_prompt": "Which county is Max Church in?",
    "locality_ground_truth": "Devon",
}
PAIR: Json = {
    "id": 9,
    "source": "zsre",
    "instruction": "Which river feeds Lake Ada?",
    "input": "",
    "output_old": "Thames",
    "output_new": "Tiber",
    "rephrase": "What river flows into Lake Ada?",
    "loc": "nq question: who sang the song",
    "loc_ans": "Bess",
    "subject": "Lake Ada",
}


def test_zsre() -> None:
    request = zsre_from_record(ZSRE, "here")
    assert request == EditRequest(
        "Which river feeds Lake Ada?",
        "Lake Ada",
        "Tiber",
        target_old="Thames",
        rephrases=("What river flows into Lake Ada?",),
        locality=(Probe("who sang the song", "Bess", "unrelated"),),
    )
    assert zsre_from_record({**ZSRE, "case_id": 5}, "here").id == "zsre-5"


def test_zsre_in_the_reduced_form_of_its_training_split() -> None:
    reduced = {k: v for k, v in ZSRE.items() if k not in ("pred", "answers", "cond")}
    assert zsre_from_record(reduced, "here").target_old is None


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        ("alt", "answers", ("Tiber", "Thames")),
        ("alt", "pred", ("Tiber", "Ouse")),
        ("answers", "pred", ("Thames", "Ouse")),
        ("answers", "answers", ("Thames", None)),
    ],
)
def test_zsre_targets(new: Any, old: Any, expected: tuple[str, str | None], tmp_path: Path) -> None:
    (tmp_path / "zsre.json").write_text(json.dumps([ZSRE]))
    data = ZsRE(path=str(tmp_path / "zsre.json"), target_new=new, target_old=old)
    (request,) = data.requests
    assert (request.target_new, request.target_old) == expected


@pytest.mark.parametrize(
    ("fields", "probe"),
    [
        (
            {
                "portability": {
                    "Recalled Relation": "",
                    "New Question": "Whose?",
                    "New Answer": "Ann",
                }
            },
            Probe("Whose?", "Ann", "one_hop"),
        ),
        (
            {"alternative_subject": "Ada Water", "alter_subject_question": "What feeds Ada Water?"},
            Probe("What feeds Ada Water?", "Tiber", "subject_alias"),
        ),
        (
            {"inverse question": "What does Tiber feed?"},
            Probe("What does Tiber feed?", "Lake Ada", "inverse"),
        ),
    ],
)
def test_zsre_portability_is_known_by_its_fields(fields: Json, probe: Probe) -> None:
    assert zsre_from_record({**ZSRE, **fields}, "here").portability == (probe,)
    # Its answers follow from the false target only.
    assert zsre_from_record({**ZSRE, **fields}, "here", "answers").portability == ()


def test_counterfact_in_both_schemas() -> None:
    original = counterfact_from_record(COUNTERFACT, "here")
    assert original == EditRequest(
        "The native language of Jo Lee is",
        "Jo Lee",
        "Welsh",
        target_old="French",
        rephrases=("It rained. Jo Lee spoke", "Jo Lee, a native speaker of"),
        locality=(
            Probe("Zoe Fay natively speaks", "French"),
            Probe("The mother tongue of Max Roy is", "French"),
        ),
        id="counterfact-12",
    )
    flat = counterfact_from_record(FLAT, "here")
    assert flat == EditRequest(
        original.prompt,
        original.subject,
        "Welsh",
        target_old="French",
        rephrases=original.rephrases[1:],
        locality=original.locality[:1],
        id="counterfact-12",
    )


@pytest.mark.parametrize("schema", [COUNTERFACT, FLAT])
def test_counterfact_is_joined_with_its_portability_file(tmp_path: Path, schema: Json) -> None:
    (tmp_path / "cf.json").write_text(json.dumps([schema, {**schema, "case_id": 13}][:1]))
    (tmp_path / "more.json").write_text(json.dumps([FURTHER, {"case_id": 99}]))
    path, more = str(tmp_path / "cf.json"), str(tmp_path / "more.json")
    (request,) = CounterFact(path=path, portability_path=more).requests
    plain = counterfact_from_record(schema, "here")
    assert request.locality == (
        *plain.locality,
        Probe("Jo Lee speaks Welsh. Zoe Fay natively speaks", "French", "distracting"),
        Probe("What is Jo Lee's job?", "baker", "unrelated"),
    )
    assert request.portability == (
        Probe("Where do people speak like Jo Lee?", "Wales", "one_hop"),
        Probe("The native language of Joanna Lee is", "Welsh", "subject_alias"),
    )


def test_the_portability_file_of_another_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cf.json").write_text(json.dumps([COUNTERFACT]))
    (tmp_path / "more.json").write_text(json.dumps([{**FURTHER, "case_id": 99}]))
    path, more = str(tmp_path / "cf.json"), str(tmp_path / "more.json")
    with pytest.raises(RequestError, match=r"more\.json: no .case_id. in it belongs"):
        CounterFact(path=path, portability_path=more).setup("fit")
    (tmp_path / "more.json").write_text(json.dumps([{"portability": {}}]))
    with pytest.raises(RequestError, match=r"more\.json\[0\]: the field .case_id. is missing"):
        CounterFact(path=path, portability_path=more).setup("fit")


def test_knowedit() -> None:
    assert knowedit_from_record(WIKI, "here") == EditRequest(
        "The mayor of Ursa is",
        "Ursa",
        "Kim",
        target_old="Lou",
        rephrases=("Ursa's mayor is",),
        locality=(
            Probe("Ursa lies in", "Iowa", "unrelated"),
            Probe("Another mayor of Ursa is", "Max", "neighborhood"),
        ),
        portability=(
            Probe("The mayor of Ursa is married to", "Pat", "one_hop", ("P.",)),
            Probe("The mayor of Bear is", "Kim", "subject_alias"),
            Probe("Kim governs", "Ursa", "inverse", ("Bear",)),
        ),
    )


def test_knowedit_in_its_other_forms() -> None:
    recent = {k: v for k, v in WIKI.items() if k not in ("ground_truth", "rephrase")}
    request = knowedit_from_record({**recent, "portability": {}}, "here")
    assert (request.target_old, request.rephrases, request.portability) == (None, (), ())

    zsre = {
        **recent,
        "ground_truth": ["Lou", "Louis"],
        "rephrase_prompt": "Ursa's mayor is",
        "portability": {"Reasoning": [{"prompt": "Who?", "ground_truth": "Pat"}]},
    }
    request = knowedit_from_record(zsre, "here")
    assert (request.target_old, request.rephrases) == ("Lou", ("Ursa's mayor is",))
    assert request.portability == (Probe("Who?", "Pat", "one_hop"),)

    assert knowedit_from_record(WIKIBIO, "here") == EditRequest(
        "This is a passage about ada may. Ada May was a sailor.",
        "ada may",
        "She sailed round the world twice.",
        locality=(Probe("ada may sex", "female", "unrelated"),),
    )


def test_knowedit_locality_needs_no_answer_but_portability_does() -> None:
    silent = [{"prompt": "Ursa lies in", "ground_truth": []}]
    request = knowedit_from_record({**WIKI, "locality": {"Relation_Specificity": silent}}, "here")
    assert request.locality == (Probe("Ursa lies in", "", "unrelated"),)
    with pytest.raises(RequestError, match=r"here: .*'Ursa lies in' has no answer"):
        knowedit_from_record({**WIKI, "portability": {"Reasoning": silent}}, "here")


def test_mquake() -> None:
    first, last = mquake_from_record(MQUAKE, "here")
    assert first == EditRequest(
        "The native language of Jo Lee is",
        "Jo Lee",
        "Welsh",
        target_old="French",
        rephrases=("What is Jo Lee's native language?",),
        id="mquake-4-0",
        case="mquake-4",
    )
    assert last.case == first.case
    assert (last.prompt, last.target_new, last.id) == ("The home of Welsh is", "Rome", "mquake-4-1")
    questions = [Probe(asked, "Rome", "multi_hop", ("Roma",)) for asked in MQUAKE["questions"]]
    assert last.portability == tuple(questions)
    hop = {"question": "What does Jo Lee speak?", "answer": "Welsh", "answer_alias": ["Cymraeg"]}
    _, last = mquake_from_record({**MQUAKE, "new_single_hops": [hop]}, "here")
    single = Probe("What does Jo Lee speak?", "Welsh", "single_hop", ("Cymraeg",))
    assert last.portability == (single, *questions)
    with pytest.raises(RequestError, match="`new_single_hops` is expected to be a list"):
        mquake_from_record({**MQUAKE, "new_single_hops": "none"}, "here")


def test_mquake_cases_are_chosen_whole(tmp_path: Path) -> None:
    records = [{**MQUAKE, "case_id": i, "requested_rewrite": own(i)} for i in range(3)]
    (tmp_path / "mquake.json").write_text(json.dumps(records))
    path = str(tmp_path / "mquake.json")
    found = MQuAKE(path=path, offset=1, limit=1, seed=1).requests
    assert [r.id.rpartition("-")[2] for r in found] == ["0", "1"]
    assert found[0].case == found[1].case


def own(case: int) -> list[dict[str, Any]]:
    """The rewrites of ``MQUAKE`` for other people."""
    return [{**r, "subject": f"{r['subject']} {case}"} for r in MQUAKE["requested_rewrite"]]


def test_mquake_cases_can_be_kept_to_single_edits(tmp_path: Path) -> None:
    single = {**MQUAKE, "case_id": 5, "requested_rewrite": MQUAKE["requested_rewrite"][:1]}
    (tmp_path / "mquake.json").write_text(json.dumps([MQUAKE, single]))
    path = str(tmp_path / "mquake.json")
    assert [r.id for r in MQuAKE(path=path).requests] == ["mquake-4-0", "mquake-4-1", "mquake-5-0"]
    (kept,) = MQuAKE(path=path, max_edits=1).requests
    assert (kept.id, len(kept.portability)) == ("mquake-5-0", 2)


def conflict(kind: str, *edits: tuple[str, str, str, str], **more: Any) -> dict[str, Any]:
    """A pair of edits, each of a prompt, a subject, its old and its new object."""
    facts = [
        {
            "relation": {"prompt": prompt, "query": f"{prompt}?"},
            "subject": {"label": subject},
            "object": {"label": old},
            "new_object": {"label": new},
        }
        for prompt, subject, old, new in edits
    ]
    return {"type": kind, "edits": facts, **more}


FATHER, CHILD, SPOUSE = "The father of {} is", "The child of {} is", "The spouse of {} is"


def test_what_follows_from_the_second_edit_contradicts_the_first() -> None:
    first, second = conflict_from_record(
        conflict("reverse", (FATHER, "Ada", "Tom", "Jim"), (CHILD, "Jim", "Ada", "Eve")), "here"
    )
    assert (first.prompt, first.target_old, first.target_new) == (
        "The father of Ada is", "Tom", "Jim",
    )  # fmt: skip
    assert first.rephrases == ("The father of Ada is?",)
    assert first.portability == ()
    assert second.portability == (Probe("The father of Eve is", "Jim", "conflict"),)
    assert first.case == second.case != ""

    tied = [{"relation": {"prompt": CHILD}, "subject": {"label": "Jo"}, "object": {"label": "Ada"}}]
    edits = (FATHER, "Ada", "Tom", "Jim"), (SPOUSE, "Jo", "Jim", "Max")
    record = conflict("composite", *edits, triples=tied, prerequisites=[0])
    _, second = conflict_from_record(record, "here")
    assert second.portability == (Probe("The father of Ada is", "Max", "conflict"),)
    assert second.locality == (Probe("The child of Jo is", "Ada", "unrelated"),)
    with pytest.raises(RequestError, match="`prerequisites` names 1, which is none of `triples`"):
        conflict_from_record({**record, "prerequisites": [1]}, "here")
    with pytest.raises(RequestError, match=r"`type` is expected to be coverage, .* got 'other'"):
        conflict_from_record({**record, "type": "other"}, "here")
    with pytest.raises(RequestError, match="`edits` is expected to be a list of two"):
        conflict_from_record({**record, "edits": []}, "here")


def test_a_pair_may_ask_for_two_answers_and_pairs_may_not(tmp_path: Path) -> None:
    twice = conflict("coverage", (FATHER, "Ada", "Tom", "Jim"), (FATHER, "Ada", "Jim", "Max"))
    again = conflict("coverage", (FATHER, "Ada", "Tom", "Ben"), (FATHER, "Ada", "Ben", "Max"))
    other = conflict("reverse", (FATHER, "Eve", "Tom", "Jim"), (CHILD, "Jim", "Eve", "Ian"))
    (tmp_path / "pairs.json").write_text(json.dumps([twice, again, other]))
    path = str(tmp_path / "pairs.json")
    (_, second) = ConflictEdit(path=path, limit=1).requests
    assert second.portability == (Probe("The father of Ada is", "Max", "conflict"),)
    with pytest.raises(RequestError, match="contradict each other"):
        ConflictEdit(path=path).setup("test")
    with pytest.warns(UserWarning, match="Left out 2 of 6 requests"):
        found = ConflictEdit(path=path, skip_invalid=True).requests
    assert [request.target_new for request in found] == ["Jim", "Max", "Jim", "Ian"]
    assert len(ConflictEdit(path=path, kind="reverse").requests) == 2


def test_an_edit_that_is_taken_back() -> None:
    edit = conflict("", ("The award of {} is", "Ada", "Gold", "Tin"))["edits"][0]
    objects = [{"label": name} for name in ("Ring", "Gold", "Star")]
    first, second = conflict_from_record({"edit": edit, "true_objects": objects}, "here")
    assert (first.target_new, second.target_new, second.target_old) == ("Tin", "Gold", "Tin")
    assert second.prompt == first.prompt
    assert second.locality == tuple(
        Probe("The award of Ada is", name, "neighborhood") for name in ("Ring", "Star")
    )
    with pytest.raises(RequestError, match="`true_objects` is expected to be a list"):
        conflict_from_record({"edit": edit}, "here")


def test_known1000_states_facts_or_takes_the_next_attribute_of_the_relation(tmp_path: Path) -> None:
    facts = [("Asia", "P30"), ("Asia", "P30"), ("Rome", "P36"), ("Africa", "P30"), ("Bonn", "P36")]
    records = [
        {
            **KNOWN,
            "known_id": i,
            "prompt": f"{i}: Mount Ada lies in",
            "attribute": a,
            "relation_id": r,
        }
        for i, (a, r) in enumerate([*facts, ("alone", "P1")])
    ]
    (tmp_path / "known.json").write_text(json.dumps(records))
    path = str(tmp_path / "known.json")
    edits = Known1000(path=path, limit=5).requests
    assert [(r.id, r.target_old, r.target_new) for r in edits] == [
        ("known-0", "Asia", "Africa"),
        ("known-1", "Asia", "Africa"),
        ("known-2", "Rome", "Bonn"),
        ("known-3", "Africa", "Asia"),
        ("known-4", "Bonn", "Rome"),
    ]
    assert len(Known1000(path=path).requests) == 5
    facts_themselves = Known1000(path=path, counterfactual=False).requests
    assert [(r.target_new, r.target_old) for r in facts_themselves] == [
        (record["attribute"], None) for record in records
    ]


def test_qaedit() -> None:
    assert qaedit_from_record(QAEDIT, "here") == EditRequest(
        "who built the ada tower",
        "ada tower",
        "Lou Kim",
        rephrases=("Which architect built the Ada Tower?",),
        locality=(
            Probe("who won the cup", "Ursa", "unrelated"),
            Probe("name a fish", "", "unrelated"),
        ),
        id="qaedit-TQA-6",
    )


def test_wikibigedit() -> None:
    assert wikibigedit_from_record(WIKIBIGEDIT, "here") == EditRequest(
        "Which county is Ada Church in?",
        "Ada Church",
        "Kent",
        rephrases=("In what county lies Ada Church?",),
        locality=(Probe("Which county is Max Church in?", "Devon", "neighborhood"),),
    )


def test_old_new_pairs(tmp_path: Path) -> None:
    assert old_new_pair_from_record(PAIR, "here") == EditRequest(
        "Which river feeds Lake Ada?",
        "Lake Ada",
        "Tiber",
        target_old="Thames",
        rephrases=("What river flows into Lake Ada?",),
        locality=(Probe("who sang the song", "Bess", "unrelated"),),
        id="pair-9",
    )
    (tmp_path / "pairs.json").write_text(json.dumps([{**PAIR, "input": "Answer in Latin."}]))
    data = OldNewPairs(path=str(tmp_path / "pairs.json"))
    assert [r.target_new for r in data.requests] == ["Tiber"]
    assert [r.target_new for r in data.old_requests] == ["Thames"]
    assert data.requests[0].prompt == "Which river feeds Lake Ada?\nAnswer in Latin."


Reader = Callable[[Json, str], EditRequest | list[EditRequest]]


@pytest.mark.parametrize(
    ("reader", "record", "message"),
    [
        (
            zsre_from_record,
            {**ZSRE, "src": None},
            "the field .src. is missing. Fields here: subject",
        ),
        (zsre_from_record, {**ZSRE, "alt": ""}, "the field .alt. is missing or empty"),
        (zsre_from_record, {**ZSRE, "answers": [1998]}, ".answers. is expected to hold text.*1998"),
        (zsre_from_record, {**ZSRE, "loc": 3}, ".loc. is expected to be text, but got 3"),
        (zsre_from_record, {**ZSRE, "subject": "Lake Max"}, "'Lake Max' does not occur"),
        (
            zsre_from_record,
            {**ZSRE, "portability": {"New Question": "a"}},
            "portability.New Answer",
        ),
        (counterfact_from_record, {"text": "a"}, "requested_rewrite.*flat one.*fields text"),
        (
            counterfact_from_record,
            {**COUNTERFACT, "requested_rewrite": {**REWRITE, "target_new": "Welsh"}},
            "expected a record with .str., but got 'Welsh'",
        ),
        (
            counterfact_from_record,
            {**COUNTERFACT, "requested_rewrite": {**REWRITE, "target_true": {}}},
            "requested_rewrite.target_true.str. is missing",
        ),
        (counterfact_from_record, {**FLAT, "target_new": 3}, ".target_new. is expected to be text"),
        (knowedit_from_record, {**WIKI, "locality": []}, None),
        (knowedit_from_record, {**WIKI, "locality": [{}]}, ".locality. is expected to be a record"),
        (
            knowedit_from_record,
            {**WIKI, "locality": {"New": []}},
            "unknown group .New.. Known.*Forget",
        ),
        (
            knowedit_from_record,
            {**WIKI, "portability": {"Reasoning": ["a"]}},
            r"portability\.Reasoning\[0\]: expected a record",
        ),
        (knowedit_from_record, {**WIKIBIO, "text": "About him."}, "'ada may' does not occur"),
        (
            mquake_from_record,
            {**MQUAKE, "requested_rewrite": {}},
            "requested_rewrite. .* list of edits",
        ),
        (
            mquake_from_record,
            {**MQUAKE, "requested_rewrite": ["a"]},
            r"requested_rewrite\[0\]: expected",
        ),
        (mquake_from_record, {**MQUAKE, "new_answer": ""}, ".new_answer. is expected to be text"),
        (known_from_record, {**KNOWN, "attribute": None}, ".attribute. is missing"),
        (qaedit_from_record, {**QAEDIT, "locality": "a"}, ".locality. is expected to be a list"),
        (
            qaedit_from_record,
            {**QAEDIT, "locality": [{}]},
            r"locality\[0\]: the field .loc. is missing",
        ),
        (wikibigedit_from_record, {**WIKIBIGEDIT, "target_new": ["a"]}, "target_new"),
        (old_new_pair_from_record, {**PAIR, "output_old": None}, ".output_old. is missing"),
    ],
)
def test_a_bad_record_is_told_with_its_place_and_field(
    reader: Reader, record: Json, message: str | None
) -> None:
    if message is None:
        reader(record, "zsre.json[7]")
        return
    with pytest.raises(RequestError, match=rf"^zsre\.json\[7\].*{message}"):
        reader(record, "zsre.json[7]")
