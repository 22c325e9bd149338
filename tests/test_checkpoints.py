# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that would run code: whatever they are read by and from, nothing runs."""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_edit import MEND, EditModule, FineTune, FullTuning, TrainedEditor
from lightning_edit.checkpoints import check_hyper_parameters, read_checkpoint, seal
from lightning_edit.core.errors import ArtifactError
from lightning_edit.data import EditDataModule, HeldOut, OldThenNew, TextDataModule
from lightning_edit.demos import tiny_requests, trained_tiny_model
from tests.contract.enumeration import quick_editor
from tests.modules.helpers import bare_trainer
from tests.runs import TinyWorld, run_here

VERBS = ("fit", "validate", "test", "predict")
SOURCES = ("path", "file", "http", "memory")


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def harm(tmp_path: Path) -> Iterator[Path]:
    """What is there if code has run."""
    target = tmp_path / "harm"
    yield target
    assert not target.exists()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server of the test's folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # where downloads are kept
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def sources(tmp_path: Path, served: str) -> Any:
    """A function that saves a checkpoint and gives an address of it of some kind."""

    def saved(content: Any, source: str) -> str:
        file = tmp_path / f"{source}.ckpt"
        torch.save(content, file)
        if source == "memory":
            get_filesystem("memory://").pipe(f"/{file.name}", file.read_bytes())
        return {
            "path": str(file),
            "file": f"file://{file}",
            "http": f"{served}/{file.name}",
            "memory": f"memory://{file.name}",
        }[source]

    return saved


def _editor(**settings: Any) -> FineTune:
    model, tokenizer = trained_tiny_model()
    return FineTune.from_model(model, tokenizer, layers=[2], steps=2, **settings)


def _data() -> EditDataModule:
    return EditDataModule(requests=tiny_requests(1))


def test_the_attack_works_where_pickles_are_allowed(tmp_path: Path) -> None:
    torch.save({"a": Attack(tmp_path / "harm")}, tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("allowed", [None, False])
def test_a_trainer_runs_no_code(
    source: str, allowed: bool | None, harm: Path, sources: Any
) -> None:
    where = sources({"state_dict": {}, "loops": Attack(harm)}, source)
    editor = _editor()
    before = {name: p.clone() for name, p in editor.model.named_parameters()}
    for verb in VERBS:
        trainer = bare_trainer(max_epochs=1, limit_val_batches=1, inference_mode=False)
        with pytest.raises(ArtifactError, match=r"\.ckpt` is not loaded: it asks for `\w+.mkdir`"):
            getattr(trainer, verb)(
                editor, datamodule=_data(), ckpt_path=where, weights_only=allowed
            )
    assert all(torch.equal(p, before[n]) for n, p in editor.model.named_parameters())


@pytest.mark.parametrize("source", SOURCES)
def test_no_reader_runs_code(source: str, harm: Path, sources: Any) -> None:
    where = sources({"state_dict": {}, "hyper_parameters": Attack(harm)}, source)
    error = "is not loaded: it asks for|no checkpoint"
    refused = partial(pytest.raises, ArtifactError, match=error)
    with refused():
        read_checkpoint(where)
    for cls in (EditModule, MEND, EditDataModule, HeldOut, OldThenNew, TextDataModule):
        with refused():
            cls.load_from_checkpoint(where)
    with refused():
        quick_editor(MEND).load_editor(where)
    with refused():
        quick_editor(TrainedEditor, checkpoint=where)
    with pytest.raises(ArtifactError, match="only read with `weights_only=True`"):
        FineTune.load_from_checkpoint(where, weights_only=False)


@pytest.mark.parametrize("source", ["path", "file", "http"])
@pytest.mark.parametrize("verb", VERBS)
def test_the_command_line_runs_no_code(
    verb: str, source: str, harm: Path, sources: Any, tmp_path: Path, capsys: Any
) -> None:
    where = sources({"state_dict": {}, "loops": Attack(harm)}, source)
    world = TinyWorld(tmp_path, n=1, method="FineTune", settings={"layers": [2], "steps": 2})
    words = world.arguments(tmp_path / "run", f"--ckpt_path={where}", verb=verb)
    assert run_here(words) == 1
    assert f"lightning-edit {verb}: `{where}` is not loaded: it asks for" in capsys.readouterr().err
    assert run_here([*words, "--weights_only=false"]) in (1, 2)


def test_a_good_checkpoint_comes_from_everywhere(sources: Any, tmp_path: Path) -> None:
    editor, trainer = _editor(), bare_trainer(max_epochs=1)
    trainer.fit(editor, _data())
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    name = next(iter(editor.edit_optimizer.originals))
    for source in SOURCES:
        where = sources(torch.load(tmp_path / "good.ckpt", weights_only=True), source)
        again = _editor()
        bare_trainer(max_epochs=1).fit(again, _data(), ckpt_path=where)
        bare_trainer(max_epochs=1).fit(again, _data(), ckpt_path=where)  # hardened once
        assert torch.equal(again.delta.dense(name), editor.delta.dense(name))
        assert read_checkpoint(where)["global_step"] == 1


def test_data_modules_are_loaded_too(sources: Any, tmp_path: Path) -> None:
    for source in SOURCES:
        saved = {"datamodule_hyper_parameters": {"batch_size": 3}}
        where = sources({**saved, "pytorch-lightning_version": "2.6.4"}, source)
        data = EditDataModule.load_from_checkpoint(where, requests=tiny_requests(1))
        assert data.batch_size == 3


def test_a_folder_is_no_checkpoint_of_an_editor(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a folder, as sharded strategies write it"):
        bare_trainer(max_epochs=1).fit(_editor(), _data(), ckpt_path=tmp_path)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "cannot be read as a checkpoint"),
        (b"not a checkpoint at all", "cannot be read as a checkpoint"),
        (None, "There is no checkpoint"),
        ([1], "is no checkpoint: it holds list"),
    ],
)
def test_other_files_are_refused(content: Any, error: str, tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(ArtifactError, match=error):
        read_checkpoint(file)


# -- classes that a checkpoint names -----------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Path) -> str:
    """A module that could be imported, and would leave its mark."""
    (tmp_path / "modules").mkdir()
    code = f"import pathlib\npathlib.Path({str(harm)!r}).touch()\nclass X: pass\n"
    (tmp_path / "modules" / "some_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    assert "some_module" not in sys.modules
    return "some_module.X"


def _hostile(module: str) -> dict[str, dict[str, Any]]:
    ours = "lightning_edit.modules.full_tuning.FullTuning"
    return {
        "class": {"_class_path": module},
        "another class": {"_class_path": "torch.nn.Linear"},
        "no address": {"_class_path": 3},
        "section": {"class_path": module},
        "arguments": {"_class_path": ours, "init_args": {"optimizer": module}},
        "dotted": {"_class_path": ours, "optimizer.class_path": module},
        "object": {"_class_path": ours, "model": {"class_path": module}},
        "deep": {"_class_path": ours, "layers": [{"a": {"class_path": module}}]},
        "callable": {"_class_path": ours, "optimizer": module},
        "callable of no class": {"optimizer": module},
        "maker": {"_instantiator": module, "_class_path": ours},
    }


@pytest.mark.parametrize("kind", list(_hostile("")))
def test_no_class_is_imported(kind: str, module: str, tmp_path: Path, capsys: Any) -> None:
    found = _hostile(module)[kind]
    torch.save({"state_dict": {}, "hyper_parameters": found}, tmp_path / "a.ckpt")
    error = "names the class|describes an object to make|is to be made by"
    with pytest.raises(ArtifactError, match=error):
        check_hyper_parameters(found, EditModule, "a.ckpt")
    for content in (found, {"_instantiator": "lightning.pytorch.cli.instantiate_module", **found}):
        for key in ("hyper_parameters", "hparams", "module_arguments"):
            file = io.BytesIO()
            torch.save({"state_dict": {}, key: content}, file)
            file.seek(0)
            with pytest.raises(ArtifactError, match=error):
                FullTuning.load_from_checkpoint(file)
    world = TinyWorld(tmp_path, n=1, method="FullTuning", settings={})
    words = world.arguments(tmp_path / "run", f"--ckpt_path={tmp_path / 'a.ckpt'}")
    assert run_here(words) == 1
    assert f"`{tmp_path / 'a.ckpt'}` " in capsys.readouterr().err
    assert "some_module" not in sys.modules


def test_classes_of_ours_are_found_wherever_they_lie_now() -> None:
    now = f"{FineTune.__module__}.FineTune"
    for path in (now, "lightning_edit.FineTune", "lightning_edit.some.earlier.file.FineTune"):
        assert check_hyper_parameters({"_class_path": path}, EditModule, "a.ckpt") == now
    assert check_hyper_parameters({"layers": [1], "lr": 0.1}, EditModule, "a.ckpt") is None
    with pytest.raises(ArtifactError, match="no imported subclass of MEND"):
        check_hyper_parameters({"_class_path": now}, MEND, "a.ckpt")
    named = {"second_moment_text": "texts.txt"}  # a text, where an object may stand, too
    assert check_hyper_parameters(named, EditModule, "a.ckpt") is None


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict:UserWarning")
def test_a_run_of_the_command_line_is_loaded_and_resumed(tmp_path: Path) -> None:
    world = TinyWorld(tmp_path, n=2, method="FineTune", settings={"layers": [2], "steps": 2})
    assert run_here(world.arguments(tmp_path / "run")) == 0
    [file] = (tmp_path / "run").rglob("last.ckpt")
    saved = read_checkpoint(file)
    saved["hyper_parameters"]["_class_path"] = "lightning_edit.some.earlier.file.FineTune"
    seal(saved)
    torch.save(saved, file)
    for source in (file, io.BytesIO(file.read_bytes()), f"file://{file}"):
        editor = FineTune.load_from_checkpoint(source)
        assert len(editor.delta.provenance.request_ids) == 2
    words = world.arguments(tmp_path / "run", f"--ckpt_path={file}", verb="validate")
    assert run_here(words) == 0
