# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Configurations that come with the package, and the settings of a method for a model in them."""

from __future__ import annotations

import codecs
import locale
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from lightning_edit.core.documents import parse_yaml, read_text
from lightning_edit.core.errors import EditError, some_of

__all__ = ["config_folder", "find_config", "load_preset", "presets_of", "with_preset"]


class _Editor(TypedDict):
    """The section of a configuration that describes the editor."""

    class_path: str
    init_args: dict[str, object]


def config_folder() -> Path:
    """The folder of the configurations that come with the package."""
    here = Path(__file__).parent
    # In a wheel they lie in the package, in a checkout beside it.
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def find_config(name: str) -> str:
    """The file of a configuration: as named, or else the packaged one of that name.

    Args:
        name: A path, or a packaged configuration such as ``method/rome.yaml``.

    Raises:
        EditError: If the file holds characters that would be read as others on this system, is no
            regular file, or is nested too deeply or comes to too much to be read.

    Examples:
        >>> Path(find_config("method/rome.yaml")).name
        'rome.yaml'
    """
    if Path(name).exists() and not Path(name).is_dir():
        _check_config(Path(name))
        _check_encoding(Path(name))
        return name
    folder = config_folder()
    for candidate in (name, f"{name}.yaml", name.removeprefix("configs/")):
        if (folder / candidate).is_file():
            return str(folder / candidate)
    return name


def presets_of(method: str) -> dict[str, Path]:
    """Files in ``configs/method`` with settings of a method.

    Args:
        method: Name of its class.

    Returns:
        Name of each preset to its file. It is named after its model, ``init_args.model``; a further
        form of a method, which has a file of its own, after that file.

    Examples:
        >>> {name: path.name for name, path in presets_of("FineTune").items()}
        {'smollm2': 'fine_tune.yaml', 'ft_l': 'ft_l.yaml', 'ft_m': 'ft_m.yaml'}
    """
    folder = config_folder() / "method"
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        section = _editor_in(path)
        if section["class_path"].rpartition(".")[2] == method:
            is_form = path.stem.replace("_", "") != method.lower()
            file = path.relative_to(folder).with_suffix("").as_posix()
            found[file if is_form else str(section["init_args"]["model"])] = path
    return found


def load_preset(method: str, name: str) -> dict[str, object]:
    """Settings of a method that suit a model.

    Args:
        method: Name of its class.
        name: The model they suit, or a further form of the method: a name in ``presets_of``.

    Returns:
        The editor's arguments, without the model.

    Raises:
        ValueError: If the method has no such preset; the message names those that it has.

    Examples:
        >>> load_preset("ROME", "smollm2")
        {'steps': 25, 'weight_decay': 0.001, 'clamp_norm_factor': 1.5}
    """
    presets = presets_of(method)
    if name not in presets:
        there = ", ".join(f"`{one}`" for one in presets) or "none"
        raise ValueError(
            f"{method} has no preset `{name}`; there is {there}. Choose one, or leave it out and "
            "give the settings themselves."
        )
    settings = _editor_in(presets[name])["init_args"]
    return {key: value for key, value in settings.items() if key != "model"}


def with_preset(
    method: str, name: str, model: str, given: Mapping[str, object]
) -> dict[str, object]:
    """Settings of a preset with others over them; warns if they suit another model than this.

    Args:
        method: As in ``load_preset``.
        name: As in ``load_preset``.
        model: Name of the model that is edited.
        given: Settings that overrule the preset's.

    Raises:
        ValueError: If the method has no such preset.

    Examples:
        >>> with_preset("ROME", "smollm2", "smollm2", {"steps": 3})
        {'steps': 3, 'weight_decay': 0.001, 'clamp_norm_factor': 1.5}
    """
    settings = load_preset(method, name)
    owner = preset_in(presets_of(method)[name])[1]
    taken = [f"`{one}`" for one in settings if one not in given]
    if owner and owner != model and taken:
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn(
            f"`preset={name!r}`: {some_of(taken)} of {method} suit {owner}, but this model is "
            f"{model}. Leave the preset out for the method's own, or give them yourself."
        )
    return settings | dict(given)


def preset_in(path: Path) -> tuple[str, str, dict[str, object]]:
    """Method, model and settings of a packaged file that holds a model's settings of a method.

    Args:
        path: A configuration. Of one that is no packaged preset, or one of a further form of a
            method, whose settings make the form, there are no settings.
    """
    folder = config_folder() / "method"
    if folder.resolve() not in path.resolve().parents:
        return "", "", {}
    section = _editor_in(path)
    method, model = section["class_path"].rpartition(".")[2], section["init_args"].get("model")
    if path.stem.replace("_", "") != method.lower() or model is None:
        return "", "", {}
    return method, str(model), {k: v for k, v in section["init_args"].items() if k != "model"}


def _editor_in(path: Path) -> _Editor:
    """The section of a configuration that describes the editor."""
    import yaml

    section: _Editor = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    return section


def _check_config(file: Path) -> None:
    """Checks that a file can be read within bounds; whether it is YAML, the parser says."""
    from yaml import YAMLError

    try:
        parse_yaml(read_text(file))
    except YAMLError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EditError(
            f"`{file}` cannot be read as a configuration: {reason}. Give a file of YAML."
        ) from None


def _check_encoding(file: Path) -> None:
    """Checks that jsonargparse, which goes by the locale, will read a file for what it is."""
    encoding = locale.getpreferredencoding(do_setlocale=False)
    if codecs.lookup(encoding).name != "utf-8" and not file.read_bytes().isascii():
        raise EditError(
            f"`{file}` holds characters beyond ASCII, which would be read as {encoding} here. Set "
            "the environment variable PYTHONUTF8=1, so that Python reads it as UTF-8."
        )
