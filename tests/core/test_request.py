# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Requests say what is wrong with them, and survive JSON."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision

from lightning_edit.core.errors import EditError, RequestError
from lightning_edit.core.request import EditRequest, Probe, check_requests, check_subjects
from lightning_edit.demos import tiny_requests

FULL = EditRequest(
    prompt="The capital of France is",
    subject="France",
    target_new="Rome",
    target_old="Paris",
    rephrases=("France has its capital in", "What is the capital of France?"),
    locality=(
        Probe("The capital of Spain is", "Madrid"),
        Probe("Two and two are", "four", "unrelated", ("4", "IV")),
        Probe("Paris lies on the", kind="distracting"),
    ),
    portability=(
        Probe("The river of the capital of France is", "Tiber", "one_hop", ("the Tiber",)),
        Probe("Rome is the capital of", "France", "inverse"),
    ),
    id="capital-france",
)


def _request(**values: Any) -> EditRequest:
    given: dict[str, Any] = {
        "prompt": "The capital of France is",
        "subject": "France",
        "target_new": "Rome",
    }
    return EditRequest(**{**given, **values})


# -- one request -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt", "subject", "target_new"])
def test_missing_text(name: str, subtests: pytest.Subtests) -> None:
    values: list[Any] = ["", "  ", "\n", None, 5, ["France"]]
    if name == "subject":
        values = [value for value in values if value not in ("", None)]
    for value in values:
        with (
            subtests.test(repr(value)),
            pytest.raises(RequestError, match=rf"`{name}` is expected to be text.*Write the"),
        ):
            _request(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("target_old", 1990), ("id", 7), ("id", None)])
def test_numbers_are_no_text(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"`{name}` is expected to be text, but got {value}"):
        _request(**{name: value})


def test_a_subject_may_be_left_out() -> None:
    request = EditRequest("Describe the sea.", target_new="It is wide.")
    assert request == EditRequest("Describe the sea.", "", "It is wide.")
    assert request == _request(prompt="Describe the sea.", subject=None, target_new="It is wide.")
    assert set(request.to_dict()) == {"prompt", "target_new", "id"}
    assert EditRequest.from_dict(request.to_dict()) == request
    assert EditRequest.from_dict({**request.to_dict(), "subject": None}) == request
    for values in ({"prompt": "The capital of {} is"}, {"subject_start": 0}):
        with pytest.raises(RequestError, match="a place for the subject, but no subject"):
            _request(**{"subject": "", **values})


def test_methods_that_need_the_subject() -> None:
    requests = [_request(id="named"), _request(subject="", id="nameless")]
    check_subjects(requests[:1], "ROME")
    with pytest.raises(
        RequestError, match=r"ROME needs the subject .* none in 'nameless' \('.*'\)\. Give"
    ):
        check_subjects(requests, "ROME")


# (prompt, subject, the prompt that becomes of it, where the subject begins)
PLACES = [
    ("In Indiana, {} is", "India", "In Indiana, India is", 12),
    ("Google created {} in", "Go", "Google created Go in", 15),
    ("New York City is in {}", "New York", "New York City is in New York", 20),
    ("{} and France", "France", "France and France", 0),
    ("中国人说{}", "中国", "中国人说中国", 4),
    ("In Indiana, India is", "India", "In Indiana, India is", 12),
    ("法国的首都是", "法国", "法国的首都是", 0),
]


def test_the_placeholder_is_the_subjects_place(subtests: pytest.Subtests) -> None:
    for prompt, subject, expected, start in PLACES:
        with subtests.test(prompt), warnings.catch_warnings():
            warnings.simplefilter("error")
            request = _request(prompt=prompt, subject=subject)
            assert request.prompt == expected
            at = request.subject_start
            assert (expected.index(subject) if at is None else at) == start
            again = EditRequest.from_dict(json.loads(json.dumps(request.to_dict())))
            assert again == request
            assert dataclasses.replace(request, target_new="Oslo", id="").subject_start == at


def test_another_place_is_another_edit() -> None:
    first = _request(prompt="{} and France", subject="France")
    second = _request(prompt="France and {}", subject="France")
    assert first.prompt == second.prompt
    assert first.id != second.id
    assert "subject_start" not in first.to_dict()
    assert second.to_dict()["subject_start"] == 11


def test_a_subject_inside_a_word_is_warned_of() -> None:
    for prompt, subject in (
        ("Google is", "Go"),
        ("In Indiana one", "India"),
        ("A cats' home", "cat"),
    ):
        with pytest.warns(UserWarning, match=rf"{subject!r} is a part of another word"):
            _request(prompt=prompt, subject=subject)


@pytest.mark.parametrize("start", [-1, 3, 99, "4", True])
def test_a_start_where_the_subject_does_not_begin(start: Any) -> None:
    with pytest.raises(RequestError, match=r"`subject_start` is .*Leave it out"):
        _request(subject_start=start)


@pytest.mark.parametrize("glued", [True, False])
def test_glued(glued: bool) -> None:
    probe = Probe("The price is US", "D", glued=glued)
    request = _request(glued=glued, locality=[probe])
    record = json.loads(json.dumps(request.to_dict()))
    assert record["glued"] is record["locality"][0]["glued"] is glued
    assert EditRequest.from_dict(record) == request
    assert request.id != _request().id
    for make in (_request, lambda glued: Probe("x", glued=glued)):
        with pytest.raises(RequestError, match=r"`glued` of .* is expected to be true, false or"):
            make(glued="yes")


def test_subject_outside_the_prompt() -> None:
    with pytest.raises(RequestError, match=r"'Spain' does not occur in the prompt.*or write \{\}"):
        _request(subject="Spain")
    with pytest.raises(RequestError, match="'france' does not occur"):
        _request(subject="france")


@pytest.mark.parametrize("value", ["one text", [""], [3], (None,), 5, None])
def test_bad_rephrases(value: Any) -> None:
    with pytest.raises(RequestError, match="`rephrases` is expected to be a list of texts"):
        _request(rephrases=value)


BAD_PROBES = [
    ("locality", Probe("x", "y", "one_hop"), r"kind 'one_hop'; expected one of neighborhood"),
    ("portability", Probe("x", "y"), r"kind 'neighborhood'; expected one of one_hop"),
    ("locality", Probe(" "), "a locality probe has an empty prompt"),
    ("portability", Probe("", "y", "one_hop"), "a portability probe has an empty prompt"),
    ("portability", Probe("x", " ", "one_hop"), "the portability probe 'x' has no answer"),
    ("locality", {"prompt": "x"}, "`locality` is expected to be a list of probes"),
    ("portability", "x", "`portability` is expected to be a list of probes"),
]


def test_bad_probes(subtests: pytest.Subtests) -> None:
    for name, probe, message in BAD_PROBES:
        with subtests.test(message), pytest.raises(RequestError, match=message):
            _request(**{name: (probe,)})


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "`prompt` of a probe is expected to be text, but got None"),
    ({"answer": 1990}, "`answer` of a probe is expected to be text, but got 1990"),
    ({"kind": 1}, "`kind` of a probe is expected to be text, but got 1"),
    ({"aliases": "one"}, "`aliases` is expected to be a list of texts"),
    ({"aliases": [1]}, "`aliases` is expected to be a list of texts"),
]


def test_probes_of_other_types(subtests: pytest.Subtests) -> None:
    for values, message in BAD_FIELDS:
        with subtests.test(message), pytest.raises(RequestError, match=message):
            Probe(**{"prompt": "x", **values})


def test_errors_name_the_request() -> None:
    with pytest.raises(RequestError, match=r"^Edit request 'my-edit': `target_new`"):
        _request(target_new="", id="my-edit")
    with pytest.raises(RequestError, match=r"^Edit request 'The capital of France is': "):
        _request(target_new="")
    assert issubclass(RequestError, EditError)
    assert issubclass(RequestError, ValueError)


def test_requests_are_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.prompt = "x"  # type: ignore[misc]
    listed = _request(rephrases=["a", "b"], locality=[Probe("x", aliases=("y",))])
    assert listed.rephrases == ("a", "b")
    assert isinstance(listed.locality, tuple)
    assert len({FULL, dataclasses.replace(FULL), listed}) == 2
    assert hash(Probe("x", "y", aliases=["z"])) == hash(  # type: ignore[arg-type]
        Probe("x", "y", aliases=("z",))
    )


# -- braces ----------------------------------------------------------------------------------


BRACES = [
    ("The capital of {} is", "France", "The capital of France is"),
    ("{", "{", "{"),
    ("In {} one writes f({}) for", "Rust", "In Rust one writes f({}) for"),
    ("C writes f({}) for", "C", "C writes f(C) for"),
    ("A set {1, 2} in {} is", "Python", "A set {1, 2} in Python is"),
    ("{0} and {name} of {}", "it", "{0} and {name} of it"),
    ("{} is", "{}", "{} is"),
    ("{} is", "a{}b", "a{}b is"),
]


def test_braces(subtests: pytest.Subtests) -> None:
    for prompt, subject, expected in BRACES:
        with subtests.test(prompt):
            request = _request(prompt=prompt, subject=subject)
            assert request.prompt == expected
            assert EditRequest.from_dict(request.to_dict()) == request
            assert dataclasses.replace(request).prompt == expected


def test_braces_that_mean_themselves() -> None:
    request = _request(prompt='println!("{}") prints', subject="println!", subject_start=0)
    assert request.prompt == 'println!("{}") prints'
    assert EditRequest.from_dict(request.to_dict()) == request


# -- ids -------------------------------------------------------------------------------------


def test_ids_follow_from_the_edit() -> None:
    request = _request()
    assert len(request.id) == 12
    assert request.id == _request().id
    assert request.id == _request(prompt="The capital of {} is").id
    assert request.id == _request(rephrases=("x",)).id
    others = [
        _request(target_new="Oslo"),
        _request(target_old="Paris"),
        _request(subject="capital"),
    ]
    assert len({request.id, *(other.id for other in others)}) == 4
    assert _request(target_new="half \ud83d").id


def test_reversed() -> None:
    back = FULL.reversed()
    assert (back.target_new, back.target_old) == ("Paris", "Rome")
    assert back.id != FULL.id
    assert back.reversed().target_new == "Rome"
    with pytest.raises(RequestError, match="`target_old` is not known"):
        _request().reversed()


@pytest.mark.parametrize(
    ("prompt", "is_question"),
    [("Where is {}?", True), ("Where is {}? ", True), ("{}在哪里？", True), ("{} is in", False)],
)
def test_questions(prompt: str, is_question: bool) -> None:
    assert _request(prompt=prompt).is_question is is_question


def test_answers() -> None:
    assert FULL.locality[1].answers == ("four", "4", "IV")
    assert FULL.locality[0].answers == ("Madrid",)
    assert FULL.to("cuda") is FULL


# -- JSON ------------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    for request in (FULL, _request(), *tiny_requests(24)):
        text = json.dumps(request.to_dict(), ensure_ascii=False)
        assert EditRequest.from_dict(json.loads(text)) == request


def test_empty_fields_are_left_out() -> None:
    request = _request(target_old="")
    assert set(request.to_dict()) == {"prompt", "subject", "target_new", "id"}
    assert EditRequest.from_dict(request.to_dict()) == request
    locality = FULL.to_dict()["locality"]
    assert isinstance(locality, list)
    assert locality[2] == {"prompt": "Paris lies on the", "kind": "distracting"}


def test_null_is_as_good_as_nothing() -> None:
    empty = dict.fromkeys(("target_old", "rephrases", "locality", "portability"))
    assert EditRequest.from_dict({**_request().to_dict(), **empty}) == _request()
    record = {**_request().to_dict(), "locality": [{"prompt": "x", "aliases": None, "kind": None}]}
    assert EditRequest.from_dict(record).locality == (Probe("x"),)


def test_kinds_have_defaults_in_json() -> None:
    record = {
        **_request().to_dict(),
        "locality": [{"prompt": "x"}],
        "portability": [{"prompt": "y", "answer": "z", "aliases": ["zz"]}],
    }
    request = EditRequest.from_dict(record)
    assert request.locality == (Probe("x", kind="neighborhood"),)
    assert request.portability == (Probe("y", "z", "one_hop", ("zz",)),)


BAD_RECORDS: list[tuple[dict[str, Any], str]] = [
    ({"subject": "Spain"}, r"^line 3: Edit request .*does not occur"),
    ({"target": "x"}, r"^line 3: unknown field `target`. Known fields: prompt, subject"),
    ({"rephrases": "x"}, r"^line 3: `rephrases` is a list of texts"),
    ({"rephrases": 5}, r"^line 3: .*`rephrases` is expected to be a list of texts"),
    ({"target_new": None}, r"^line 3: .*`target_new` is expected to be text, but got None"),
    ({"target_new": 1990}, r"^line 3: .*`target_new` is expected to be text, but got 1990"),
    ({"target_old": 1990}, r"^line 3: .*`target_old` is expected to be text, but got 1990"),
    ({"id": 7}, r"^line 3: .*`id` is expected to be text, but got 7"),
    ({"locality": "x"}, r"^line 3: `locality` is expected to be a list of probes"),
    ({"locality": {"prompt": "x"}}, r"^line 3: `locality` is expected to be a list of probes"),
    ({"locality": 5}, r"^line 3: `locality` is expected to be a list of probes"),
    ({"locality": ["x"]}, r"^line 3, locality\[0\]: expected a mapping of fields, .*'x'"),
    ({"locality": [{"prompt": 3}]}, r"^line 3, locality\[0\]: `prompt` of a probe is expec"),
    ({"locality": [{"answer": "x"}]}, r"^line 3, locality\[0\]: the field `prompt` is missing"),
    ({"locality": [{"prompt": "x", "text": 1}]}, r"locality\[0\]: unknown field `text`"),
    ({"portability": [{"prompt": "x"}]}, r"^line 3: .*probe 'x' has no answer"),
    (
        {"portability": [{"prompt": "x", "answer": 4}]},
        r"^line 3, portability\[0\]: `answer` of a probe is expected to be text, but got 4",
    ),
    (
        {"portability": [{"prompt": "x", "answer": "y", "aliases": "z"}]},
        r"^line 3, portability\[0\]: `aliases` is expected to be a list of texts",
    ),
]


def test_bad_records(subtests: pytest.Subtests) -> None:
    for change, message in BAD_RECORDS:
        with subtests.test(str(change)), pytest.raises(RequestError, match=message):
            EditRequest.from_dict({**_request().to_dict(), **change}, where="line 3")


@pytest.mark.parametrize("name", ["prompt", "target_new"])
def test_missing_field(name: str) -> None:
    record = _request().to_dict()
    del record[name]
    with pytest.raises(RequestError, match=f"request: the field `{name}` is missing"):
        EditRequest.from_dict(record)


@pytest.mark.parametrize("record", [None, "text", [1], 5])
def test_record_of_another_type(record: Any) -> None:
    with pytest.raises(RequestError, match="expected a mapping of fields, but got"):
        EditRequest.from_dict(record)


# -- several requests ------------------------------------------------------------------------


def test_good_requests() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_requests(tiny_requests(24))
        check_requests([FULL])


def test_no_requests() -> None:
    with pytest.raises(RequestError, match="There are no edit requests"):
        check_requests([])


def test_contradictions() -> None:
    requests = [_request(id="a"), _request(target_new="Oslo", id="b")]
    with pytest.raises(RequestError, match=r"'a' and 'b' contradict .*'Rome' and 'Oslo'. Keep one"):
        check_requests(requests)
    spaced = [_request(id="a"), _request(prompt="The capital of France is ", target_new="Oslo")]
    with pytest.raises(RequestError, match="contradict each other"):
        check_requests(spaced)


def test_within_a_case_a_later_request_may_overwrite_an_earlier() -> None:
    requests = [_request(id="a", case="x"), _request(target_new="Oslo", id="b", case="x")]
    check_requests(requests, in_turn=True)
    with pytest.raises(RequestError, match="contradict each other"):
        check_requests(requests)  # at once they cannot both be had
    with pytest.raises(RequestError, match="contradict each other"):
        check_requests([dataclasses.replace(r, case="") for r in requests], in_turn=True)


@pytest.mark.parametrize("is_copy", [True, False])
def test_shared_ids(is_copy: bool) -> None:
    request = _request()
    twin = dataclasses.replace(request) if is_copy else request
    with pytest.raises(RequestError, match="Two requests share the id"):
        check_requests([request, twin])
    other = _request(prompt="{} speaks", target_new="Latin", id=request.id)
    with pytest.raises(RequestError, match=r"share the id .*'France speaks'\). Give each its own"):
        check_requests([request, other])


def test_one_prompt_twice_with_one_answer() -> None:
    check_requests([_request(id="a"), _request(id="b", target_new="Rome ")])


def test_no_change_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="the target 'Rome ' equals the old answer"):
        check_requests([_request(target_new="Rome ", target_old="Rome")])


def test_metadata_is_kept_and_changes_nothing() -> None:
    plain = EditRequest("The capital of {} is", "France", "Rome")
    request = EditRequest(
        "The capital of {} is", "France", "Rome", metadata={"why": {"n": [1, None]}}
    )
    assert (request.id, request.sha256(), hash(request)) == (plain.id, plain.sha256(), hash(plain))
    assert request != plain
    record = json.loads(json.dumps(request.to_dict()))
    assert EditRequest.from_dict(record) == request
    assert "metadata" not in plain.to_dict()
    wrong: Any
    for wrong in (["a"], "text", {"a": {1, 2}}, {"a": float("nan")}):
        with pytest.raises(RequestError, match="`metadata` is expected to be a mapping"):
            dataclasses.replace(plain, metadata=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_plugins_take_a_batch_of_requests(dtype: torch.dtype) -> None:
    """They rebuild dataclasses field by field."""
    plugin: Any = DoublePrecision() if dtype == torch.float64 else None
    plugin = plugin or HalfPrecision("bf16-true" if dtype == torch.bfloat16 else "16-true")
    batch = tiny_requests(3)
    assert batch[0].locality
    assert plugin.convert_input(batch) == batch
    assert plugin.convert_input({"requests": batch, "x": torch.ones(1)})["x"].dtype == dtype
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch[0].prompt = "Something else"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch[0].locality[0].prompt = "Something else"  # type: ignore[misc]
