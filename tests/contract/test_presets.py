# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Presets hold what suits their model and nothing else, and everything reads the same ones."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import lightning_edit
from lightning_edit import ROME, FineTune
from lightning_edit.demos import tiny_model, tiny_tokenizer
from lightning_edit.presets import load_preset, presets_of
from tests.contract.enumeration import CONFIGS, EDITORS, LEARNERS, METHOD_CONFIGS, class_in

DOCS = CONFIGS.parent / "docs"
# Complete runs, which repeat settings of a preset since configurations do not include each other.
RUNS = [CONFIGS / "edit.yaml", *sorted((CONFIGS / "f_learning").glob("*.yaml"))]


@pytest.fixture(scope="module")
def table() -> ModuleType:
    """What mkdocs calls while it builds; no module of a package."""
    spec = importlib.util.spec_from_file_location("presets", DOCS / "presets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", METHOD_CONFIGS, ids=lambda path: str(path.stem))
def test_a_preset_differs_from_its_class_for_a_reason(path: Path, table: ModuleType) -> None:
    defaults = table.class_defaults(getattr(lightning_edit, class_in(path)))
    for name, value, reason in table.settings_in(path):
        if name not in defaults:  # an argument without a default needs a value
            continue
        assert value != defaults[name], (
            f"{path.stem}: `{name}` is the class's default; leave it out"
        )
        assert len(reason) > 10, (
            f"{path.stem}: say behind `{name}` why it is not {defaults[name]!r}"
        )
        number = isinstance(defaults[name], (int, float))
        assert not (number and isinstance(value, str)), f"`{name}` is no number"


def test_the_page_of_presets_has_them_all(table: ModuleType) -> None:
    page = table.on_page_markdown((DOCS / "presets.md").read_text(encoding="utf-8"))
    assert "| `method/rome` | `clamp_norm_factor` | 4 | 1.5 | 4.0 lets ten edits of one" in page
    assert "{{" not in page
    for path in METHOD_CONFIGS:
        for setting in table.settings_in(path):
            assert not setting.reason or f" | {setting.reason} |" in page


@pytest.mark.parametrize(
    ("method", "steps", "lr", "weight_decay", "clamp", "kl"),
    [
        ("ROME", 20, 0.5, 0.5, 4.0, 0.0625),  # GPT-2 XL and GPT-J
        ("RROME", 20, 0.5, 0.5, 4.0, 0.0625),
        ("MEMIT", 25, 0.5, 0.5, 0.75, 0.0625),  # these and the following: GPT-J
        ("PMET", 30, 0.2, 0.5, 0.75, 1.0),
        ("EMMET", 25, 0.5, 0.5, 0.75, 0.0625),
        ("AlphaEdit", 25, 0.5, 0.5, 0.75, 0.0625),
    ],
)
def test_target_values_are_searched_as_in_the_papers_by_default(
    method: str, steps: int, lr: float, weight_decay: float, clamp: float, kl: float
) -> None:
    settings = getattr(lightning_edit, method)().settings
    found = (settings.steps, settings.lr, settings.weight_decay, settings.clamp_norm_factor)
    assert (*found, settings.kl_factor) == (steps, lr, weight_decay, clamp, kl)


def test_defaults_of_a_class_come_before_those_of_its_bases(table: ModuleType) -> None:
    assert table.class_defaults(lightning_edit.PMET)["kl_factor"] == 1.0
    assert table.class_defaults(ROME)["kl_factor"] == 0.0625
    assert "checkpoint" not in table.class_defaults(lightning_edit.TrainedEditor)


def test_every_method_has_a_preset_for_the_default_model() -> None:
    for name in (*EDITORS, *LEARNERS):
        assert "smollm2" in presets_of(name), name


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.stem))
def test_a_complete_run_has_the_settings_of_the_preset(path: Path, table: ModuleType) -> None:
    defaults = table.class_defaults(getattr(lightning_edit, class_in(path)))
    section = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]
    assert section["model"] == "smollm2"
    wanted = defaults | load_preset(class_in(path), "smollm2")
    assert defaults | section == wanted | {"model": "smollm2"}


def test_settings_of_the_demo_are_those_that_its_figures_were_made_with() -> None:
    settings = {"steps": 25, "weight_decay": 0.001, "clamp_norm_factor": 1.5}
    assert load_preset("ROME", "smollm2") == settings


def test_an_editor_takes_a_preset_and_arguments_overrule_it() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config._name_or_path = "smollm2"
    editor = ROME.from_model(model, tokenizer, preset="smollm2", layers=[1], steps=3)
    assert editor.hparams["clamp_norm_factor"] == 1.5
    assert editor.hparams["weight_decay"] == 0.001
    assert editor.hparams["steps"] == 3
    assert editor.hparams["model"] == "smollm2"
    own = ROME.from_model(model, tokenizer, layers=[1])
    assert own.hparams["clamp_norm_factor"] == 4.0


def test_a_preset_of_another_model_is_told() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    words = r"`steps`, `weight_decay`, `clamp_norm_factor` of ROME suit smollm2, but this model is "
    with pytest.warns(UserWarning, match=words + "LlamaForCausalLM. Leave the preset out"):
        editor = ROME.from_model(model, tokenizer, preset="smollm2", layers=[1])
    assert editor.hparams["clamp_norm_factor"] == 1.5  # which was asked for
    own = {"clamp_norm_factor": 4.0, "steps": 3, "weight_decay": 0.5}
    ROME.from_model(model, tokenizer, preset="smollm2", layers=[1], **own)  # nothing of it is left


def test_forms_of_a_method_are_presets_of_their_own() -> None:
    editor = FineTune.from_model(tiny_model(), tiny_tokenizer(), preset="ft_l", layers=[1])
    assert editor.norm_constraint == 4e-3
    assert load_preset("FineTune", "smollm2")["parameters"] == "all"


def test_presets_of_other_models_are_found_in_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "method" / "gpt2"
    folder.mkdir(parents=True)
    text = "model:\n  class_path: {}\n  init_args: {{model: gpt2, {}: 0.5}}\n"
    (folder / "rome.yaml").write_text(text.format("lightning_edit.ROME", "lr"))
    (folder / "ft_l.yaml").write_text(text.format("FineTune", "norm_constraint"))
    monkeypatch.setattr("lightning_edit.presets.config_folder", lambda: tmp_path)
    assert load_preset("ROME", "gpt2") == {"lr": 0.5}
    assert load_preset("FineTune", "gpt2/ft_l") == {"norm_constraint": 0.5}


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match="FineTune has no preset `gpt2`; there is `smollm2`, `ft_l`"
    ):
        FineTune.from_model(tiny_model(), tiny_tokenizer(), preset="gpt2")
    with pytest.raises(ValueError, match="OneStep has no preset `smollm2`; there is none"):
        load_preset("OneStep", "smollm2")


def test_presets_are_read_without_torch() -> None:
    code = (
        "import sys; from lightning_edit.presets import load_preset; "
        "load_preset('ROME', 'smollm2'); assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
