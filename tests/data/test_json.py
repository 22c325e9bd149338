# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Requests in files: what is written is read back, and errors point at the place."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_edit.core.errors import RequestError
from lightning_edit.core.request import EditRequest, Probe
from lightning_edit.data.json import read_records, read_requests, write_requests

REQUESTS = [
    EditRequest(
        "日本の首都は",
        "日本",
        "京都",
        target_old="東京",
        rephrases=("日本の首都はどこですか？",),
        locality=(Probe("The capital of Italy is", "Rome", "neighborhood"),),
        portability=(Probe("Nihon's capital is", "Kyoto", "subject_alias", ("京都", "Kioto")),),
        id="japan",
    ),
    # JSON may hold this separator raw, and it is no line end there.
    EditRequest("Ada\u2028Lovelace: born in", "Ada\u2028Lovelace", 'Rome: "no"', id="ada"),
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.yaml", "a.YML"])
def test_requests_come_back_equal_from_every_form(tmp_path: Path, name: str) -> None:
    write_requests(REQUESTS, tmp_path / name)
    assert read_requests(tmp_path / name) == REQUESTS
    assert "京都" in (tmp_path / name).read_text(encoding="utf-8")


def test_json_lines_hold_one_request_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_requests(REQUESTS, path)
    assert path.read_text(encoding="utf-8").count("\n") == 2
    with path.open("a", encoding="utf-8") as file:
        file.write("\n\n")
    assert len(read_requests(path)) == 2


def test_records_know_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"b": 2}]')
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"b": 2}')
    assert read_records(tmp_path / "a.json") == [("a.json[0]", {"a": 1}), ("a.json[1]", {"b": 2})]
    assert [where for where, _ in read_records(tmp_path / "a.jsonl")] == [
        "a.jsonl, line 1",
        "a.jsonl, line 3",
    ]


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "b"}', encoding="utf-8-sig")
    assert read_records(tmp_path / "a.jsonl")[0][1] == {"a": "b"}


GOOD = '{"prompt": "{} lives in", "subject": "Ada", "target_new": "Rome"}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", GOOD, r"a\.tsv: .* expected to end in \.json, .* got '\.tsv'"),
        ("a", GOOD, "got 'no suffix'"),
        ("a.jsonl", f"{GOOD}\n{GOOD[:-1]}\n", r"a\.jsonl, line 2, column \d+: not JSON"),
        ("a.json", f"[{GOOD},\n{GOOD}\n{GOOD}]", r"a\.json, line 3, column 1: not JSON"),
        ("a.json", GOOD, r"expected one list of records, but got dict"),
        ("a.json", f"[{GOOD}, 7]", r"a\.json\[1\]: expected a record of named fields, but got 7"),
        ("a.yaml", "- prompt: a\n   subject: b\n", r"a\.yaml, line 2, column \d+: not YAML"),
        ("a.yaml", "- prompt: \x00", r"a\.yaml.*not YAML: .*#x0000"),
        (
            "a.jsonl",
            '{"prompt": "{} lives in", "subject": "Ada"}',
            "line 1: the field .target_new. is",
        ),
        ("a.jsonl", GOOD[:-1] + ', "tagret_old": "x"}', "line 1: unknown field .tagret_old."),
        (
            "a.json",
            f"[{GOOD.replace('{}', 'Tom')}]",
            r"a\.json\[0\]: .*subject 'Ada' does not occur",
        ),
        (
            "a.yaml",
            "- {prompt: '{} began in', subject: Ada, target_new: 1998}",
            "target_new.*1998.*quotes",
        ),
        (
            "a.yaml",
            "- {prompt: '{} is', subject: Ada, target_new: no}",
            "target_new.*False.*quotes",
        ),
        (
            "a.yaml",
            "- {prompt: '{} is', subject: Ada, target_new: x, locality: [{prompt: a, answer: 3}]}",
            r"a\.yaml\[0\]: .locality\[0\]\.answer. .* got 3",
        ),
    ],
)
def test_errors_name_file_record_and_field(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message):
        read_requests(tmp_path / name)


def test_an_absent_value_counts_as_absent(tmp_path: Path) -> None:
    content = "- {prompt: '{} is', subject: Ada, target_new: x, target_old: null, rephrases: ~}"
    (tmp_path / "a.yaml").write_text(content)
    request = read_requests(tmp_path / "a.yaml")[0]
    assert (request.target_old, request.rephrases) == (None, ())


def test_a_missing_file_is_named_with_the_folder_it_was_looked_for_in(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.json: .*No such file.*counts from"):
        read_requests(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(RequestError, match="cannot be read"):
        read_requests(tmp_path / "folder.json")


def test_other_encodings_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(RequestError, match="UTF-8"):
        read_requests(tmp_path / "a.json")


def test_an_unknown_form_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="txt"):
        write_requests(REQUESTS, tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_facts_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "\ufeffprompt,subject,target_new,target_old,rephrases\n"
        '"The capital of {} is",France,Rome,,"France\'s capital is\nIts seat, in France, is"\n'
        ",,,,\n"
        "The height of {} is,Mont Blanc,4806,4805,\n",
        encoding="utf-8",
    )
    first, second = read_requests(path)
    assert (first.prompt, first.target_new, first.target_old) == (
        "The capital of France is",
        "Rome",
        None,
    )
    assert first.rephrases == ("France's capital is", "Its seat, in France, is")
    assert (second.target_new, second.target_old, second.rephrases) == ("4806", "4805", ())
    path.write_text("prompt,target_new\nIt is,a,b\n")
    with pytest.raises(RequestError, match=r"facts\.csv, line 2: expected as many cells"):
        read_requests(path)
    path.write_text("prompt,target_nwe\nIt is,a\n")
    with pytest.raises(RequestError, match="target_nwe"):
        read_requests(path)
    with pytest.raises(RequestError, match="the name is expected to end in"):
        write_requests([first], path)
