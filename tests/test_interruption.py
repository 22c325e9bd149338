# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, interrupted or ended at any place goes on as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from lightning_edit import MemoryWrite
from lightning_edit.checkpoints import read_checkpoint
from lightning_edit.demos import WORLD, tiny_requests
from tests.processes import run_module, run_program
from tests.runs import (
    NOISE,
    ROOT,
    TinyWorld,
    assert_same_edit,
    metrics_of,
    printed_command,
    run_here,
)

# ROME on a tiny model shares directions among its few keys, which it says.
pytestmark = pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning")


def interruption(signal_name: str, step: int, place: str = "between") -> list[str]:
    return [
        "--trainer.callbacks+=tests.interrupting.Interrupt",
        f"--trainer.callbacks.signal_name={signal_name}",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.place={place}",
    ]


def interrupted(
    world: TinyWorld, run: Path, signal_name: str, step: int, place: str
) -> subprocess.CompletedProcess[str]:
    return run_program(world.arguments(run, *interruption(signal_name, step, place)))


def committed_steps(run: Path) -> int:
    checkpoint = read_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == len(checkpoint["optimizer_states"][0]["request_ids"])
    return int(checkpoint["global_step"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return TinyWorld(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole_run(world: TinyWorld) -> Path:
    """A run that nothing has stopped."""
    run = world.folder / "whole"
    assert run_here(world.arguments(run)) == 0
    assert metrics_of(run)["reliability/teacher_forced"]["n"] == 5
    return run


@pytest.mark.parametrize("place", ["between", "committed"])
def test_a_killed_run_goes_on_to_the_same_end(
    world: TinyWorld, whole_run: Path, tmp_path: Path, place: str
) -> None:
    killed = interrupted(world, tmp_path, "SIGKILL", 3, place)
    assert killed.returncode == -9
    # The fourth edit stood in the weights when the second kind of kill came; nothing kept it.
    assert committed_steps(tmp_path) == 3
    assert not (tmp_path / "results.json").exists()
    assert run_here(world.arguments(tmp_path, "--ckpt_path=last")) == 0
    assert committed_steps(tmp_path) == 5
    assert_same_edit(tmp_path, whole_run)


def test_ctrl_c_in_an_edit_says_how_to_go_on(
    world: TinyWorld, whole_run: Path, tmp_path: Path
) -> None:
    words = world.arguments(tmp_path, *interruption("SIGINT", 2, "middle"))
    stopped = run_module(ROOT, "lightning_edit", *words)
    assert stopped.returncode == 130
    assert not [noise for noise in NOISE if noise in stopped.stderr]
    assert "Stopped after 2 committed step(s)" in stopped.stderr
    assert committed_steps(tmp_path) == 2
    # The very words that were printed, less the cause of the interruption.
    _, words = printed_command(stopped.stderr)
    words = [word for word in words if "trainer.callbacks" not in word]
    assert words[-2:] == ["--ckpt_path", str(tmp_path / "checkpoints" / "last.ckpt")]
    assert run_here(words) == 0
    assert_same_edit(tmp_path, whole_run)


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_the_printed_command_finds_the_checkpoint_of_any_logger(
    world: TinyWorld,
    whole_run: Path,
    tmp_path: Path,
    logger: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if logger == "TensorBoardLogger":
        pytest.importorskip("tensorboard")
    home, away = tmp_path / "my home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    monkeypatch.chdir(home)
    logging = ["--trainer.logger", logger, "--trainer.logger.save_dir", "logs"]
    logging += ["--trainer.log_every_n_steps", "1"]
    words = world.arguments(Path("root"), *logging, *interruption("SIGINT", 2))
    monkeypatch.setattr("sys.argv", ["lightning-edit"])
    with caplog.at_level("INFO"):
        assert run_here(words) == 130
    logs = home / "logs" / "lightning_logs" / "version_0"
    folder, words = printed_command(caplog.text)
    monkeypatch.chdir(away)
    monkeypatch.chdir(folder)  # as the command does
    assert words[-2:] == ["--ckpt_path", str(logs / "checkpoints" / "last.ckpt")]
    assert run_here([word for word in words if "trainer.callbacks" not in word]) == 0
    assert_same_edit(logs.with_name("version_1"), whole_run)
    assert not any(away.iterdir())


def test_a_terminated_run_finishes_its_edit_and_does_not_claim_success(
    world: TinyWorld, tmp_path: Path
) -> None:
    ended = interrupted(world, tmp_path, "SIGTERM", 1, "middle")
    assert ended.returncode == 128 + 15
    assert "Stopped after 2 committed step(s)" in ended.stderr
    assert committed_steps(tmp_path) == 2
    assert not (tmp_path / "results.json").exists()


def test_a_killed_training_of_an_editor_goes_on_to_the_same_end(tmp_path: Path) -> None:
    settings = {"rank": 8, "edit_lr": 0.01, "edit_lr_lr": 1e-3}
    world = TinyWorld(tmp_path, n=8, method="MEND", settings=settings)
    config = yaml.safe_load(world.config.read_text())
    config["data"]["init_args"]["batch_size"] = 2
    trainer = {"logger": False, "max_epochs": 2, "accelerator": "cpu", "limit_val_batches": 0}
    config["trainer"] = {**trainer, "enable_model_summary": False}
    world.config.write_text(yaml.safe_dump(config))

    def words(run: Path, *more: str) -> list[str]:
        callbacks = (
            "--trainer.callbacks+=EditCheckpoint",
            f"--trainer.callbacks.dirpath={run}",
        )
        return [
            "fit",
            "-c",
            str(world.config),
            f"--trainer.default_root_dir={run}",
            *callbacks,
            *more,
        ]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_here(words(whole)) == 0
    done = run_program(words(killed, *interruption("SIGKILL", 5)))
    assert done.returncode == -9, done.stderr
    stopped = torch.load(killed / "last.ckpt", weights_only=True)
    assert stopped["global_step"] == 5
    assert run_here(words(killed, f"--ckpt_path={killed / 'last.ckpt'}")) == 0
    a, b = (torch.load(run / "last.ckpt", weights_only=True) for run in (whole, killed))
    assert a["global_step"] == b["global_step"] == 8
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert any(not torch.equal(t, stopped["state_dict"][n]) for n, t in a["state_dict"].items())
    assert all(torch.equal(t, b["state_dict"][n]) for n, t in a["state_dict"].items())


@pytest.mark.slow
def test_two_hundred_remembered_edits_go_on_where_they_were_killed(tmp_path: Path) -> None:
    settings = {"layers": [1], "steps": 2, "radius": 0.01}
    world = TinyWorld(tmp_path, method="GRACE", settings=settings)
    places = [fact.subject for fact in WORLD]
    rows = [
        {
            "id": f"{request.id}-{i}",
            "prompt": f"{places[i % len(places)]} and {request.prompt}",
            "subject": request.subject,
            "target_new": request.target_new,
        }
        for i, request in enumerate(tiny_requests(20) * 10)
    ]
    world.requests.write_text("\n".join(map(json.dumps, rows)))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_here(world.arguments(whole)) == 0
    assert interrupted(world, killed, "SIGKILL", 100, "committed").returncode == -9
    assert committed_steps(killed) == 100
    assert run_here(world.arguments(killed, "--ckpt_path=last")) == 0
    assert committed_steps(killed) == 200
    a, b = (MemoryWrite.load(run / "delta") for run in (whole, killed))
    assert list(a.entries) == list(b.entries)
    assert len(a.entries) > 100
    for name, entry in a.entries.items():
        assert entry is not None
        assert entry.equals(b.entries[name])
    assert metrics_of(whole) == metrics_of(killed)
