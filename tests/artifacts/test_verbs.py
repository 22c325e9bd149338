# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The verbs on saved edits do what they say, to the bit, and refuse what would do harm."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_edit.artifacts import verbs
from lightning_edit.artifacts.outcomes import Offer, SavedEdit
from lightning_edit.cli import console
from lightning_edit.core.change import LowRank
from lightning_edit.core.delta import WeightDelta
from lightning_edit.core.errors import ArtifactError, EditError, ModelError
from lightning_edit.core.hashing import weight_hash
from lightning_edit.core.locator import Locator
from lightning_edit.core.provenance import BaseModelInfo, Provenance
from lightning_edit.demos import tiny_requests, tiny_tokenizer
from lightning_edit.models import load_model, load_tokenizer
from lightning_edit.report import EditRow, MetricRow, RunReport, read_report, write_results
from lightning_edit.report.undo import apply_commands
from tests import zoo


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _run(
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


def _weights(folder: str) -> dict[str, Tensor]:
    return dict(load_model(folder, dtype="auto").named_parameters())


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


# -- apply and revert ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*zoo.DECODERS, "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Only .* survives rounding")
def test_apply_then_revert_is_the_base(kind: str, dtype: torch.dtype) -> None:
    delta = _run(kind, dtype)
    done = verbs.apply("run/delta")
    assert done.folder == Path("edited")
    base, edited = _weights("base"), _weights("edited")
    assert base.keys() == edited.keys()
    for name, tensor in edited.items():
        wanted = base[name]
        if name in delta.changes:
            wanted = (wanted.float() + delta.dense(name)).to(dtype)
            assert not torch.equal(tensor, base[name])
        assert torch.equal(tensor, wanted)
    undone = verbs.revert("run/delta")
    assert undone.folder == Path("restored")
    assert any("Every bit is that of the base" in note for note in undone.notes)
    assert _same(_weights("restored"), base)
    assert weight_hash(load_model("restored", dtype="auto")) == delta.provenance.base.sha256
    tokenizer = load_tokenizer("restored")
    assert tokenizer("Velmora").input_ids == tiny_tokenizer()("Velmora").input_ids


def test_a_run_folder_will_do() -> None:
    delta = _run()
    done = verbs.apply("run")
    assert done.what == "edited model"
    assert done.facts["base"] == "base"
    assert done.facts["requests"] == "1: capital-velmora"
    assert done.facts["changed"] == "2 parameters"
    assert done.facts["‖Δ‖"] == pytest.approx(delta.norm())
    assert done.notes == ("Undo with: lightning-edit revert run/delta --model edited",)
    card = Path("edited/README.md").read_text(encoding="utf-8")
    assert "capital-velmora" in card
    assert f"`{delta.provenance.base.sha256}`" in card


def test_narrower_weights_are_rounded_once() -> None:
    delta = _run()
    done = verbs.apply("run", dtype="bfloat16")
    assert done.facts["dtype"] == "bfloat16"
    assert not any("Undo" in note for note in done.notes)
    base = _weights("base")
    for name, tensor in _weights("edited").items():
        wanted = base[name] + (delta.dense(name) if name in delta.changes else 0)
        assert torch.equal(tensor, wanted.bfloat16())
    with pytest.raises(ArtifactError, match="it is bfloat16, and the edit wrote float32"):
        verbs.revert("run")


@pytest.mark.filterwarnings("ignore:Only .* survives rounding")
def test_wider_weights_keep_the_whole_change() -> None:
    delta = _run(dtype=torch.bfloat16)
    verbs.apply("run", dtype="float32")
    base = _weights("base")
    for name, tensor in _weights("edited").items():
        change = delta.dense(name) if name in delta.changes else torch.tensor(0.0)
        assert torch.equal(tensor, base[name].float() + change)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_another_base(dtype: Any) -> None:
    _run()
    zoo.build("llama", seed=1).save_pretrained("other")
    with pytest.raises(ArtifactError, match="belongs to base with the weight hash"):
        verbs.apply("run", "other", dtype=dtype)
    assert not Path("edited").exists()
    verbs.apply("run", "other", dtype=dtype, check=False)
    other, edited = _weights("other"), _weights("edited")
    assert not _same(other, edited)
    assert edited.keys() == other.keys()


def test_another_base_in_wider_weights() -> None:
    _run(dtype=torch.bfloat16)
    zoo.build("llama", seed=1).bfloat16().save_pretrained("other")
    with pytest.raises(ArtifactError, match="belongs to base with the weight hash"):
        verbs.apply("run", "other", dtype="float32")


@pytest.mark.parametrize("verb", [verbs.apply, verbs.export])
def test_the_base_has_moved(verb: Any) -> None:
    delta = _run()
    base = dataclasses.replace(delta.provenance.base, id="./gone/base")
    delta.provenance = dataclasses.replace(delta.provenance, base=base)
    delta.save("delta")
    with pytest.raises(ModelError, match=r"base model as `./gone/base`.*name it with `model`"):
        verb("delta")
    verb("delta", model="base")


def test_the_base_is_not_recorded() -> None:
    model = zoo.build("llama")
    model.save_pretrained("base")
    WeightDelta({"model.norm.weight": torch.ones(32)}).save("delta")
    with pytest.raises(ArtifactError, match="does not record its base model"):
        verbs.apply("delta")
    done = verbs.apply("delta", "base")
    assert "The edit does not record its base's hash, so the base was not checked." in done.notes
    assert "The base has no tokenizer that could be copied." in done.notes
    assert torch.equal(_weights("edited")["model.norm.weight"], model.model.norm.weight + 1)


def test_outputs_are_kept() -> None:
    _run()
    verbs.apply("run")
    before = _weights("edited")
    for verb in (verbs.apply, verbs.export):
        with pytest.raises(ArtifactError, match="is not empty"):
            verb("run", output="edited")
    with pytest.raises(ArtifactError, match="is not empty"):
        verbs.revert("run", output="base")
    with pytest.raises(ArtifactError, match="`base` in it is needed"):
        verbs.apply("run", output="base", force=True)
    with pytest.raises(ArtifactError, match="`edited` in it is needed"):
        verbs.revert("run", output="edited", force=True)
    with pytest.raises(ArtifactError, match="`run/delta` in it is needed"):
        verbs.apply("run", output="run", force=True)
    assert _same(_weights("edited"), before)
    verbs.apply("run", output="edited", force=True, dtype="float16")
    assert load_model("edited", dtype="auto").dtype == torch.float16


def test_revert_without_originals() -> None:
    _run(originals=False)
    done = verbs.apply("run")
    assert "saved without originals, so it cannot be undone exactly" in done.notes[0]
    with pytest.raises(ArtifactError, match="were not kept"):
        verbs.revert("run")
    assert not Path("restored").exists()


def test_revert_what_was_not_applied() -> None:
    _run()
    with pytest.raises(ArtifactError, match="the edit is not applied here"):
        verbs.revert("run", "base")


def test_two_edits_in_one_model() -> None:
    _run(layers=(0,))
    second = _run(folder="second", seed=1, layers=(2,))
    verbs.apply("run", output="one")
    verbs.apply("second", "one", "two", check=False)
    with pytest.raises(ArtifactError, match=r"another edit is in it too.*--no_check"):
        verbs.revert("run", "two")
    assert not Path("restored").exists()
    done = verbs.revert("run", "two", check=False)
    assert any("Other changes are left" in note for note in done.notes)
    wanted = _weights("base")
    with torch.no_grad():
        for name in second.changes:
            wanted[name] += second.dense(name)
    assert _same(_weights("restored"), wanted)


def test_revert_an_edit_that_records_no_hash() -> None:
    delta = _run()
    plain = WeightDelta.load("run/delta")
    WeightDelta(plain.changes, originals=plain.originals).save("plain")
    verbs.apply("run")
    done = verbs.revert("plain")
    assert any("so the result was not checked" in note for note in done.notes)
    assert weight_hash(load_model("restored")) == delta.provenance.base.sha256


@pytest.mark.parametrize("verb", [verbs.apply, verbs.revert, verbs.export])
def test_no_such_edit(verb: Any) -> None:
    with pytest.raises(ArtifactError, match="`nowhere` holds no saved edit"):
        verb("nowhere")


# -- diff ------------------------------------------------------------------------------------


def test_diff_of_two_edits() -> None:
    one = _run()
    other = _run(folder="other", seed=1, layers=(1, 2))
    compared = verbs.diff("run", "other/delta")
    assert (compared.first, compared.second) == ("run", "other/delta")
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]
    assert {row.name for row in compared.rows} == set(names)
    rows = {row.name: row for row in compared.rows}
    assert rows[names[0]].norm_second is None
    assert rows[names[0]].cosine is None
    assert rows[names[1]].norm_first is None
    row = rows[names[2]]
    a, b = one.dense(names[2]).flatten(), other.dense(names[2]).flatten()
    assert row.norm_first == pytest.approx(float(a.norm()), rel=1e-5)
    size = float(_weights("base")[names[2]].detach().norm())
    assert row.relative_second == pytest.approx(float(b.norm()) / size, rel=1e-5)
    assert (row.rank_first, row.rank_second) == (2, 2)
    assert row.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-5)
    assert compared.requests_first == ("capital-velmora",)
    assert compared.requests_second == ("language-velmora",)
    assert compared.requests_both == ()
    assert compared.notes == ()


def test_diff_of_an_edit_with_itself() -> None:
    _run()
    compared = verbs.diff("run", "run")
    assert [row.cosine for row in compared.rows] == pytest.approx([1, 1])
    assert compared.requests_both == ("capital-velmora",)
    assert compared.requests_first == compared.requests_second == ()


def test_diff_of_edits_of_different_bases() -> None:
    delta = _run()
    base = dataclasses.replace(delta.provenance.base, sha256="0" * 64)
    delta.provenance = dataclasses.replace(delta.provenance, base=base)
    delta.save("other")
    [note] = verbs.diff("run", "other").notes
    assert note.startswith("The edits belong to different weights: base (")
    names = list(delta.changes)
    WeightDelta({names[0]: torch.ones(3)}).save("third")
    with pytest.raises(ArtifactError, match=r"\[32, 64\] in run and \[3\] in third"):
        verbs.diff("run", "third")


def test_diff_of_two_models() -> None:
    delta = _run()
    verbs.apply("run")
    compared = verbs.diff("base", "edited")
    assert [row.name for row in compared.rows] == list(delta.changes)
    for row in compared.rows:
        assert row.norm_first is None
        assert row.norm_second == pytest.approx(delta.norms()[row.name], rel=1e-4)
        assert row.rank_second == 2
    verbs.revert("run")
    same = verbs.diff("base", "restored")
    assert same.rows == ()
    assert same.notes == ("All parameters are equal.",)
    verbs.apply("run", output="short", dtype="bfloat16")
    assert "The weights are float32 and bfloat16" in verbs.diff("base", "short").notes[0]


def test_diff_of_other_architectures() -> None:
    _run()
    zoo.build("gpt2").save_pretrained("gpt2")
    with pytest.raises(ArtifactError, match=r"differ in more than values: `model.embed_tokens.wei"):
        verbs.diff("base", "gpt2")
    with pytest.raises(ArtifactError, match=r"has no `model.layers.0.mlp.down_proj.weight`"):
        verbs.diff("run", "gpt2")


def test_diff_of_an_edit_and_a_model() -> None:
    delta = _run()
    verbs.apply("run")
    for pair in (("run", "edited"), ("edited", "run")):
        compared = verbs.diff(*pair)
        assert (compared.first, compared.second) == ("run", "edited")
        assert compared.notes == ("The edit is in the model.",)
        assert [row.cosine for row in compared.rows] == pytest.approx([1, 1])
    compared = verbs.diff("run", "base")
    assert compared.notes[0].endswith("the edit is not in it.")
    assert [row.norm_second for row in compared.rows] == [0, 0]
    (delta * 2).save("double")
    verbs.apply("double", "base", "other")
    assert "neither its original weights" in verbs.diff("run", "other").notes[0]
    _run(originals=False, folder="bare")
    with pytest.raises(ArtifactError, match=r"in bare does not keep the originals of model.layers"):
        verbs.diff("bare", "edited")


# -- report ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "files"),
    [
        ("html", {"report.html"}),
        ("md", {"report.md"}),
        ("json", {"results.json", "edits.jsonl"}),
        ("all", {"report.html", "report.md", "results.json", "edits.jsonl", "README.md"}),
        ("latex", set()),
        ("csv", set()),
    ],
)
def test_report(fmt: Any, files: set[str]) -> None:
    _run()
    before = {path.name: path.read_text() for path in Path("run").iterdir() if path.is_file()}
    for name in ("report.html", "report.md", "README.md"):
        Path("run", name).write_text("library_name: lightning_edit, worn out")
    done = verbs.report("run", fmt)
    assert {path.name for path in done.files} == files
    assert bool(done.text) == (not files)
    for path in Path("run").iterdir():
        if path.is_file():
            kept = path.name in ("results.json", "edits.jsonl")
            assert (path.read_text() == before[path.name]) == (path.name in files or kept)
    assert done.report == read_report("run")


def test_a_report_keeps_a_readme_of_ones_own() -> None:
    _run()
    Path("run/README.md").write_text("# My project\n")
    assert Path("run/README.md") not in verbs.report("run").files
    assert Path("run/README.md").read_text() == "# My project\n"


def test_report_as_text() -> None:
    _run()
    assert "reliability,teacher_forced,0.0,1.0,0.2,1.0,1" in verbs.report("run", "csv").text
    assert r"\begin{tabular}" in verbs.report("run", "latex").text
    with pytest.raises(ArtifactError, match="holds no report"):
        verbs.report("run/delta")


# -- list ------------------------------------------------------------------------------------


def _edits(folder: str) -> list[SavedEdit]:
    return [edit for edit in verbs.list_(folder) if isinstance(edit, SavedEdit)]


def test_list_of_saved_edits() -> None:
    first = _run(folder="runs/10")
    _run(folder="runs/2", seed=1)
    WeightDelta.load("runs/2/delta").save("runs/plain")
    WeightDelta({}).save("runs/.delta-half/delta")
    Path("runs/bad/delta").mkdir(parents=True)
    Path("runs/bad/delta/delta_config.json").write_text("{")
    edits = {str(edit.path): edit for edit in _edits("runs")}
    assert list(edits) == ["runs/10/delta", "runs/2/delta", "runs/bad/delta", "runs/plain"]
    one = edits["runs/10/delta"]
    assert one.requests == {"capital-velmora": "The capital of Velmora is → Kettleby (was Dorin)"}
    assert (one.method, one.base, one.date) == ("ROME", "base", "2026-01-02")
    assert one.norm == pytest.approx(first.norm())
    assert one.parameters == tuple(first.changes)
    assert "is damaged" in edits["runs/bad/delta"].problem
    plain = edits["runs/plain"]
    assert plain.requests == {"language-velmora": ""}
    assert plain.date[:2] == "20"
    assert plain.date != "2026-01-02"
    assert [edit.path for edit in _edits("runs/10/delta")] == [Path("runs/10/delta")]
    with pytest.raises(ArtifactError, match="There is no folder `nowhere`"):
        verbs.list_("nowhere")


def test_list_of_what_there_is() -> None:
    import lightning_edit

    offers = [offer for offer in verbs.list_() if isinstance(offer, Offer)]
    assert {offer.kind for offer in offers} == {
        "methods", "metrics", "data", "callbacks", "models", "configs"
    }  # fmt: skip
    assert all(offer.summary for offer in offers)
    named = {(offer.kind, offer.name) for offer in offers}
    assert len(named) == len(offers)
    for pair in (("methods", "ROME"), ("metrics", "Locality"), ("data", "CounterFact"),
                 ("callbacks", "EditReport"), ("configs", "data/zsre.yaml")):  # fmt: skip
        assert pair in named
    assert ("methods", "EditModule") not in named
    assert ("metrics", "ReadingMetric") not in named
    for offer in offers:
        if offer.kind == "methods":
            assert offer.name in lightning_edit.__all__
            assert offer.paper.startswith("https://arxiv.org/abs/")
    assert {offer for offer in offers if offer.kind == "data"} == set(verbs.list_(what="data"))


# -- the command -----------------------------------------------------------------------------


def test_the_commands_in_a_report_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_edit.__main__ import main

    _run()
    Path("base").rename("run/base")
    monkeypatch.chdir("run")
    for line in apply_commands(read_report(".")).splitlines():
        program, *words = shlex.split(line)
        assert program == "lightning-edit"
        monkeypatch.setattr("sys.argv", ["lightning-edit", *words])
        assert main(words) == 0
    assert _same(_weights("restored"), _weights("base"))
    assert not _same(_weights("edited"), _weights("base"))
    printed = capsys.readouterr().out
    assert "Wrote the edited model to edited" in printed
    assert "Wrote the restored model to restored" in printed


def test_an_error_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning_edit.__main__ import main

    monkeypatch.setattr("sys.argv", ["lightning-edit"])
    assert main(["apply", "nowhere"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-edit apply: `nowhere` holds no saved edit")


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    options = console.parser("apply").parse_args(["d", "--force", "--no_check", "--dtype=bfloat16"])
    assert options.as_dict() == {
        "delta": "d", "model": None, "output": "edited", "dtype": "bfloat16", "check": False,
        "force": True,
    }  # fmt: skip
    assert console.parser("list").parse_args([]).as_dict() == {"folder": None, "what": "all"}
    assert console.parser("list").parse_args(["runs"]).folder == "runs"
    with pytest.raises(SystemExit):
        console.parser("export").parse_args(["d", "--to", "onnx"])
    assert "lora" in capsys.readouterr().err


@pytest.mark.parametrize("verb", console.VERBS)
def test_every_option_has_help(verb: str) -> None:
    parser = console.parser(verb)
    assert parser.description
    assert all(action.help for action in parser._actions)
    known = {action.dest for action in parser._actions} - {"help"}
    assert known == set(console.VERBS[verb].__annotations__) - {"return"}


def test_verbs_raise_one_family() -> None:
    assert issubclass(ArtifactError, EditError)
    assert issubclass(ModelError, EditError)


def test_help_does_not_wait_for_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from lightning_edit.cli import console; console.parser('apply').format_help();"
        "import json; print(json.dumps('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
