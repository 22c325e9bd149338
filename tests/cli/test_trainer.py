# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command line: help, configurations that compose, the verbs, and mistakes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_edit.__main__ import main
from lightning_edit.cli.trainer import EditCLI
from lightning_edit.cli.verbs import VERBS
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer
from tests.contract.enumeration import CALLBACKS, EDITORS, arguments_of
from tests.runs import ROOT, TinyWorld, metrics_of, run_here

Output = pytest.CaptureFixture[str]
TRAINER_VERBS = [name for name, verb in VERBS.items() if verb.module == "trainer"]
pytestmark = pytest.mark.filterwarnings("ignore:.*the update direction and the key:UserWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    world = TinyWorld(tmp_path_factory.mktemp("world"), n=3)
    tiny_model("t5").save_pretrained(world.folder / "t5")
    tiny_tokenizer().save_pretrained(world.folder / "t5")
    return world


def printed_config(output: Output, *words: str) -> dict[str, Any]:
    """What the words come to."""
    assert run_here(["fit", *words, "--print_config"]) == 0
    config: dict[str, Any] = yaml.safe_load(output.readouterr().out)
    return config


# -- help ------------------------------------------------------------------------------------


def test_the_table_of_verbs_names_those_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-edit"])
    assert set(TRAINER_VERBS) == set(EditCLI.subcommands())


def test_usage_lists_every_verb(capsys: Output) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert run_here(words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {verb} " in text for verb in VERBS)
    assert run_here(["--version"]) == 0
    assert re.fullmatch(r"lightning_edit \S+\n", capsys.readouterr().out)


def test_a_misspelt_verb_is_guessed(capsys: Output) -> None:
    assert run_here(["fti"]) == 2
    assert "no verb 'fti'. Did you mean `fit`?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", TRAINER_VERBS)
def test_every_verb_has_help(verb: str, capsys: Output) -> None:
    assert run_here([verb, "--help"]) == 0
    assert "--trainer.devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("section", "name"),
    [("model", name) for name in EDITORS] + [("data", "EditDataModule"), ("data", "Facts")],
)
def test_every_argument_has_a_help_text(section: str, name: str, capsys: Output) -> None:
    import lightning_edit

    assert run_here(["fit", f"--{section}.help", name]) == 0
    text = capsys.readouterr().out
    cls = getattr(lightning_edit, name)
    options = re.split(rf"\n  --{section}\.", text.partition(f"Help for --{section}.help")[2])[1:]
    found = {re.split(r"[\s,.+]", option, maxsplit=1)[0]: option for option in options}
    for argument in arguments_of(cls):
        words = " ".join(found[argument].split())
        # Beside the option itself, its type and its default there are words.
        told = re.sub(r"\(type: .*|--\S+|[A-Z_]+ |\{.*?\}", " ", words)
        assert len(told.split()) > 3, f"{name} --help does not explain `{argument}`: {words}"


# -- configurations --------------------------------------------------------------------------


def test_later_configurations_win_section_by_section(tmp_path: Path, capsys: Output) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(
        "model: {class_path: ROME, init_args: {steps: 3, lr: 0.25}}\n", encoding="utf-8"
    )
    second.write_text(
        "model: {init_args: {steps: 7}}\ntrainer: {max_epochs: 2}\n", encoding="utf-8"
    )
    files = ["-c", str(first), "-c", str(second), "-c", "data/facts.yaml"]
    config = printed_config(capsys, *files, "--model.seed=5")
    arguments = config["model"]["init_args"]
    assert (arguments["steps"], arguments["lr"], arguments["seed"]) == (7, 0.25, 5)
    assert config["trainer"]["max_epochs"] == 2
    assert config["data"]["class_path"] == "lightning_edit.Facts"


@pytest.mark.parametrize(
    "name", ["method/rome.yaml", "method/rome", "configs/method/rome.yaml", "--config=method/rome"]
)
def test_packaged_configurations_are_known_by_name(
    name: str, capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no folder `configs`
    words = [name] if name.startswith("--") else ["--config", name]
    config = printed_config(capsys, *words, "-c", "data/facts")
    assert config["model"]["class_path"] == "lightning_edit.ROME"


def test_a_file_of_ones_own_comes_before_a_packaged_one(
    capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "rome.yaml").write_text("model: {class_path: LoRA}\n", encoding="utf-8")
    config = printed_config(capsys, "-c", "method/rome.yaml", "-c", "data/facts.yaml")
    assert config["model"]["class_path"] == "lightning_edit.LoRA"


def test_classes_go_by_their_short_names(capsys: Output) -> None:
    for name in EDITORS:
        config = printed_config(capsys, f"--model={name}", "--data=Facts")
        assert config["model"]["class_path"] == f"lightning_edit.{name}"
    for name in sorted(set(CALLBACKS) - {"SaveTaskVector", "TaskVectorForgetting"}):
        callback = f"--trainer.callbacks+={name}"
        config = printed_config(capsys, "--model=ROME", "--data=Facts", callback)
        [found] = config["trainer"]["callbacks"]
        assert found["class_path"] == f"lightning_edit.{name}"


# -- verbs -----------------------------------------------------------------------------------


def test_validate_measures_although_fit_leaves_validation_out(
    world: TinyWorld, tmp_path: Path, capsys: Output
) -> None:
    assert run_here(world.arguments(tmp_path / "run", verb="validate")) == 0
    said = capsys.readouterr().out
    assert "Reliability" in said
    assert "val/reliability" not in said  # Lightning's own table, which cuts names
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["validate"]


@pytest.mark.parametrize("protocol", ["independent", "batch", "sequential"])
def test_test_measures_by_protocol(
    world: TinyWorld, tmp_path: Path, capsys: Output, protocol: str
) -> None:
    words = world.arguments(tmp_path, f"--model.test_protocol={protocol}", verb="test")
    assert run_here(words) == 0
    assert "Reliability" in capsys.readouterr().out
    assert metrics_of(tmp_path / "test")["reliability/autoregressive"]["n"] == 3


def test_predict_shows_texts_before_and_after(
    world: TinyWorld, tmp_path: Path, capsys: Output
) -> None:
    words = [*world.arguments(tmp_path, verb="predict"), "--model=FineTune", "--model.lr=0.02"]
    assert run_here([*words, "--data.limit=1"]) == 0
    text = capsys.readouterr().out
    assert "The capital of Velmora is\n  before  Dorin.\n  after   Kettleby.\n" in text
    assert run_here(words) == 0
    assert capsys.readouterr().out.count("  before  ") == 3


def test_fit_tells_what_it_does_and_what_to_do_next(
    world: TinyWorld, tmp_path: Path, capsys: Output, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    with caplog.at_level("INFO"):
        assert run_here(world.arguments(run)) == 0
    assert "3 requests · model.layers.0.mlp.down_proj.weight" in caplog.text
    assert "Reliability" in capsys.readouterr().out
    for noise in ("litlogger", "TPU", "GPU available", "stopped: `max_epochs"):
        assert noise not in caplog.text
    files = {path.name for path in run.iterdir()}
    assert files == {
        "README.md",
        "checkpoints",
        "config.yaml",
        "delta",
        "edits.jsonl",
        "report.html",
        "report.md",
        "results.json",
    }


def test_the_commands_that_fit_prints_write_the_edit_into_the_model_and_take_it_out(
    world: TinyWorld,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with caplog.at_level("INFO"):
        assert run_here(world.arguments(tmp_path / "a run")) == 0
    said = dict(re.findall(r"(Apply|Undo) +lightning-edit ([^#\n]+)", caplog.text))
    monkeypatch.chdir(tmp_path)
    for verb in ("Apply", "Undo"):
        assert run_here(shlex.split(said[verb])) == 0
    folders = (world.model, Path("edited"), Path("restored"))
    base, edited, restored = (load_file(folder / "model.safetensors") for folder in folders)
    assert [name for name in base if not torch.equal(base[name], edited[name])] == [
        "model.layers.0.mlp.down_proj.weight"
    ]
    assert all(torch.equal(base[name], restored[name]) for name in base)


def test_edits_that_did_not_take_are_told_and_fail_the_command_if_asked_to(
    tmp_path: Path, capsys: Output
) -> None:
    for folder in ("world", "learner"):
        (tmp_path / folder).mkdir()
    world = TinyWorld(tmp_path / "world", n=3, method="FineTune", settings={"lr": 2e-2})
    weak, gate = "--model.lr=1e-9", "--fail_under=0.9"
    with pytest.warns(UserWarning, match=r"3 of 3 edits did not take: .*Try more `steps`"):
        assert run_here(world.arguments(tmp_path / "weak", weak, gate)) == 2
    assert "reliability is 0, below --fail_under 0.9" in capsys.readouterr().err
    results = json.loads((tmp_path / "weak" / "results.json").read_text(encoding="utf-8"))
    assert results["not_taken"] == [request.id for request in tiny_requests(3)]
    assert (tmp_path / "weak" / "delta").is_dir()
    report = (tmp_path / "weak" / "report.md").read_text(encoding="utf-8")
    assert "3 of 3 edits did not take: " in report.splitlines()[0]
    with pytest.warns(UserWarning, match="3 of 3 edits did not take"):
        assert run_here(world.arguments(tmp_path / "again", weak)) == 0
    # All in one edit, of which none takes another back.
    assert run_here(world.arguments(tmp_path / "strong", gate, "--data.batch_size=3")) == 0
    results = json.loads((tmp_path / "strong" / "results.json").read_text(encoding="utf-8"))
    assert results["not_taken"] == []
    learner = TinyWorld(tmp_path / "learner", n=3, method="MEND", settings={})
    assert run_here(learner.arguments(tmp_path / "none", gate)) == 2
    assert_told(capsys, "`fail_under`: MEND edits nothing in `fit`, which trains it")


def test_a_second_run_keeps_the_results_of_the_first(world: TinyWorld, tmp_path: Path) -> None:
    run = tmp_path / "run"
    kept = []
    for steps in (2, 3, 4):
        assert run_here(world.arguments(run, f"--model.steps={steps}")) == 0
        kept.append((run / "results.json").read_text(encoding="utf-8"))
    earlier = sorted(path for path in (run / "earlier").iterdir() if path.is_dir())
    assert len(earlier) == len(list((run / "earlier").glob("config-*.yaml"))) == 2
    assert [(folder / "results.json").read_text(encoding="utf-8") for folder in earlier] == kept[:2]
    assert all((folder / "delta" / "delta.safetensors").is_file() for folder in earlier)
    assert len(list((run / "checkpoints" / "earlier").iterdir())) == 2
    assert metrics_of(run)["reliability/teacher_forced"]["n"] == 3


# -- mistakes --------------------------------------------------------------------------------


def one(**fields: str) -> str:
    return json.dumps({**tiny_requests(1)[0].to_dict(), **fields})


def without(field: str) -> str:
    record = tiny_requests(1)[0].to_dict()
    del record[field]
    return json.dumps(record)


REQUESTS = {
    "subject not in prompt": (one(subject="Spain"), r"requests.jsonl, line 1.*'Spain' does not"),
    "contradiction": (
        f"{one(id='a')}\n{one(id='b', target_new='Sallow')}",
        r"'a' and 'b' contradict each other.*'Kettleby' and 'Sallow'",
    ),
    "missing field": (without("target_new"), r"requests.jsonl, line 1: the field `target_new`"),
    "unknown field": (one(targt="x"), r"requests.jsonl, line 1: unknown field `targt`"),
    "no JSON": ("{", r"requests.jsonl, line 1.*not JSON"),
    "empty file": ("", r"There are no edit requests"),
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_bad_requests(world: TinyWorld, tmp_path: Path, capsys: Output, kind: str) -> None:
    text, message = REQUESTS[kind]
    file = tmp_path / "requests.jsonl"
    file.write_text(text, encoding="utf-8")
    assert run_here(world.arguments(tmp_path / "run", f"--data.path={file}")) == 1
    assert_told(capsys, message)
    assert not (tmp_path / "run").exists()


OPTIONS = {
    "no such file": ("--data.path=nowhere.jsonl", 1, r"nowhere\.jsonl: the file cannot be read"),
    "no such model": ("--model.model=./nowhere", 1, r"`\./nowhere` is not found"),
    "misspelt model": ("--model.model=smolm2", 1, r"Did you mean `smollm2`"),
    "encoder": ("--model.model={folder}/t5", 1, r"ROME needs a decoder-only model.*T5For"),
    "layer": ("--model.layers=[9]", 1, r"Layer 9 does not exist.*from 0 to 3"),
    "two layers": ("--model.layers=[0,1]", 1, r"ROME edits one layer"),
    "unknown id": ("--data.ids=[nobody]", 1, r"no request .* the id 'nobody'"),
    "clipping": ("--trainer.gradient_clip_val=1.0", 1, r"clipping is not supported for manual"),
    "out of range": ("--model.steps=0", 2, r" fit: `steps` is expected to be at least 1, but"),
    "no number": ("--model.steps=many", 2, r'"steps":\n.*Expected a <class \'int\'>.*many'),
    "no choice": ("--model.test_protocol=one", 2, r"'independent', 'batch', 'sequential'.*one"),
    "no share": ("--fail_under=90", 2, r"`fail_under` is expected to be a share"),
    "no checkpoint": ("--ckpt_path=nowhere.ckpt", 2, r"there is no checkpoint `nowhere\.ckpt`"),
    "argument": ("--model.stepz=3", 2, r"Did you mean `steps` instead of `stepz`\?"),
    "whose help": ("--model.stepz=3", 2, r"All options: .* fit --model\.help lightning_edit\.ROME"),
    "help of the verb": ("--modle.steps=3", 2, r"All options: .* fit --help\n"),
    "no class": ("--model.pretrained=x", 2, r"(?s)\A(?!.*TrainedEditor).*'pretrained'"),
    "section": ("--modle.steps=3", 2, r"Did you mean `model\.steps` instead of `modle\.steps`\?"),
    "trainer": ("--trainer.max_epohcs=3", 2, r"Did you mean `trainer\.max_epochs`|`max_epochs`"),
    "class": ("--model=ROM", 2, r"Did you mean `ROME` instead of `ROM`\?"),
    "class in capitals": ("--model=locft", 2, r"Did you mean `LocFT` instead of `locft`\?"),
    "data": ("--data=Fakts", 2, r"Did you mean `Facts` instead of `Fakts`\?"),
    "callback": ("--trainer.callbacks+=EditReprot", 2, r"Did you mean `EditReport`"),
    "configuration's name": ("--config=edti", 2, r"Did you mean `edit\.yaml`"),
    "configuration": ("--config=method/roma.yaml", 2, r"Did you mean `method/rome\.yaml`"),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_bad_options(world: TinyWorld, tmp_path: Path, capsys: Output, kind: str) -> None:
    option, status, message = OPTIONS[kind]
    option = option.replace("{folder}", str(world.folder))
    assert run_here(world.arguments(tmp_path / "run", option)) == status
    assert_told(capsys, message)
    assert not (tmp_path / "run").exists()


FILES = {
    "no YAML": ("model: [ROME\n", r"`.*typo\.yaml`, line"),
    "section": ("modell: {class_path: ROME}\n", r"Did you mean `model\.class_path`"),
    "class": ("model: {class_path: ROM}\n", r"Did you mean `ROME`"),
    "argument": (
        "model: {class_path: ROME, init_args: {stps: 3}}\n",
        r"Option 'stps' is not accepted\n.*Did you mean `steps`",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_bad_configurations(world: TinyWorld, tmp_path: Path, capsys: Output, kind: str) -> None:
    text, message = FILES[kind]
    file = tmp_path / "typo.yaml"
    file.write_text(text, encoding="utf-8")
    assert run_here(world.arguments(tmp_path / "run", "-c", str(file))) == 2
    assert_told(capsys, message)
    assert not (tmp_path / "run").exists()


def test_a_verb_without_its_sections_names_them(capsys: Output) -> None:
    assert run_here(["fit"]) == 2
    assert_told(capsys, r"required: fit\.data, fit\.model|required: fit\.model, fit\.data")


def assert_told(capsys: Output, message: str) -> None:
    """One short message on standard error, which no traceback or list of options hides."""
    text = capsys.readouterr().err.replace("INFO: Seed set to 0\n", "")
    assert re.search(message, text), text
    assert "Traceback" not in text
    assert "usage:" not in text
    assert len(text.splitlines()) <= 8, text
    assert text.count("Did you mean") <= 1


def test_the_program_is_installed() -> None:
    import importlib.metadata

    [script] = importlib.metadata.entry_points(group="console_scripts", name="lightning-edit")
    assert script.load() is main
    assert (ROOT / "lightning_edit" / "__main__.py").is_file()


def test_settings_of_a_preset_are_for_its_model(
    world: TinyWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found: list[Any] = []

    def stop(cli: EditCLI) -> None:
        found.append(cli.config[cli.subcommand].model.init_args)
        sys.exit(0)

    monkeypatch.setattr(EditCLI, "instantiate_classes", stop)
    words = ["fit", "-c", "method/rome.yaml", "--data=Facts"]
    with caplog.at_level("INFO"):
        assert run_here(words) == 0
    assert "are for smollm2" not in caplog.text
    with caplog.at_level("INFO"):
        assert run_here([*words, f"--model.model={world.model}", "--model.steps=25"]) == 0
    theirs, others = found
    assert (theirs.steps, theirs.weight_decay, theirs.clamp_norm_factor) == (25, 0.001, 1.5)
    assert (others.steps, others.weight_decay, others.clamp_norm_factor) == (25, 0.5, 4.0)
    assert "`weight_decay`, `clamp_norm_factor` of rome.yaml are for smollm2" in caplog.text
