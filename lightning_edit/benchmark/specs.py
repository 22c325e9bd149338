# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What a comparison is made of: methods, data sets, protocols, and how they are run."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import lightning_edit
from lightning_edit.core.errors import EditError
from lightning_edit.data.base import EditDataModule
from lightning_edit.modules.base import DType, EditModule
from lightning_edit.modules.protocols import ProtocolName
from lightning_edit.presets import load_preset, presets_of

__all__ = [
    "UNEDITED",
    "CellFilter",
    "DataSpec",
    "MethodSpec",
    "Precision",
    "ProtocolSpec",
    "Resolved",
    "Study",
]

#: The row of the model as it is.
UNEDITED = "unedited"

Precision: TypeAlias = Literal["32-true", "bf16-mixed", "16-mixed"]

# Arguments of editors that a study says for all methods, so that all are asked alike.
_STUDYS = {
    "baseline",
    "chat_template",
    "chat_template_kwargs",
    "dtype",
    "max_new_tokens",
    "model",
    "revision",
    "system_prompt",
    "test_protocol",
}
# Those that make no difference to a result.
_INDIFFERENT = {"cache_dir", "repeat_requests"}


@dataclass(frozen=True)
class Resolved:
    """A method with all its settings.

    Args:
        cls: The editor.
        arguments: What is given to it: the preset's settings and the study's own over them.
        settings: Every argument that bears on its edits, those left at their defaults included.
        files: Hashes of the files that settings name.
    """

    cls: type[EditModule]
    arguments: Mapping[str, object]
    settings: Mapping[str, object]
    files: Mapping[str, str]


@dataclass
class MethodSpec:
    """A method of a comparison.

    Args:
        method: Name of the editor's class, such as ``ROME``; with its module if it is none of
            this package.
        preset: Whose settings to take from the method's files in ``configs/method``. ``auto`` takes
            those for the model where there are any; none means the class's own defaults.
        settings: Arguments of the editor over those of the preset.
        label: Its name in the tables; the method's, with the preset's where one is named.

    Examples:
        >>> MethodSpec("FineTune", preset="ft_l").name
        'FineTune (ft_l)'
    """

    method: str
    preset: str | None = "auto"
    settings: dict[str, object] = field(default_factory=dict)
    label: str | None = None

    @property
    def name(self) -> str:
        """Its name in the tables."""
        named = f" ({self.preset})" if self.preset not in (None, "auto") else ""
        return self.label or f"{self.method.rpartition('.')[2]}{named}"

    def resolve(self, model: str) -> Resolved:
        """The class and all settings, checked.

        Args:
            model: The model's name, by which presets go.

        Raises:
            EditError: If there is no such method, preset or argument, or an argument is wrong.
        """
        cls = _method_class(self.method)
        if wrong := sorted(_STUDYS & set(self.settings)):
            raise EditError(
                f"The method {self.name!r}: `{wrong[0]}` is the same for all methods of a "
                "comparison. Leave it out of `settings`, or give it to `compare` if that has it."
            )
        preset = self.preset
        if preset == "auto":
            preset = model if model in presets_of(cls.__name__) else None
        try:
            chosen = (load_preset(cls.__name__, preset) if preset else {}) | self.settings
            editor = cls(model=model, **chosen)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise EditError(f"The method {self.name!r}: {error}") from None
        found = {k: v for k, v in editor.hparams.items() if not k.startswith("_")}
        settings = {k: v for k, v in found.items() if k not in _STUDYS | _INDIFFERENT}
        return Resolved(cls, chosen, settings, _hashes(settings))


@dataclass
class DataSpec:
    """A data set of a comparison.

    Args:
        source: Where the requests come from. Its ``limit``, ``offset`` and ``seed`` choose first.
        known: Keep the requests whose old answer the unedited model writes by itself: an edit shows
            only where the model knew the fact before.
        limit: Keep this many of those, the first ones; all of them when None.
        label: Its name in the tables; the class's when None.

    Examples:
        >>> from lightning_edit import Facts
        >>> DataSpec(Facts(demo=True)).name
        'Facts'
    """

    source: EditDataModule
    known: bool = False
    limit: int | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        """Its name in the tables."""
        return self.label or type(self.source).__name__


@dataclass
class ProtocolSpec:
    """How edits are made and measured.

    Args:
        name: ``independent``: each request by itself, the model as new before each; ``batch``: so
            many requests as one edit; ``sequential``: all after one another into the same model.
        size: Requests of a batch.
        points: Numbers of edits after which those so far are measured, for the curve of a sequence;
            all of them are measured at its end in any case.

    Examples:
        >>> ProtocolSpec("batch", size=10).label
        'batch of 10'
    """

    name: ProtocolName = "independent"
    size: int = 1
    points: list[int] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Its name in the tables."""
        return f"batch of {self.size}" if self.name == "batch" else self.name

    def check(self) -> None:
        """Checks that it says what can be done.

        Raises:
            EditError: If it does not.
        """
        if self.size < 1 or (self.size > 1 and self.name != "batch"):
            raise EditError(
                f"The protocol {self.name!r}: `size` is expected to be at least 1, and only for "
                f"`batch`, but got {self.size}. Leave it out, or set `name: batch`."
            )
        if self.points and (self.name != "sequential" or min(self.points) < 1):
            raise EditError(
                f"The protocol {self.name!r}: `points` are numbers of edits from 1 on, and only of "
                f"`sequential`, but got {self.points}. Leave them out, or set `name: sequential`."
            )


@dataclass(frozen=True)
class CellFilter:
    """Which cells to run.

    Args:
        patterns: One of ``method``, ``data``, ``protocol`` and ``seed`` to a pattern of its label,
            in the way of a shell.

    Examples:
        >>> chosen = CellFilter.parse("method=ROME, protocol=batch*")
        >>> chosen.takes({"method": "ROME", "protocol": "batch of 10"})
        True
        >>> chosen.takes({"method": "MEMIT", "protocol": "batch of 10"})
        False
    """

    patterns: Mapping[str, str]

    @classmethod
    def parse(cls, text: str | None) -> CellFilter:
        """Reads ``name=pattern``, several of them parted by commas.

        Raises:
            EditError: If it reads otherwise.
        """
        patterns = {}
        for part in (text or "").split(",") if text else ():
            name, sign, pattern = (piece.strip() for piece in part.partition("="))
            if not sign or name not in ("method", "data", "protocol", "seed") or not pattern:
                raise EditError(
                    "`cells` is expected to read `name=pattern`, where the name is method, data, "
                    f"protocol or seed, but got {part.strip()!r}. Write for example "
                    "`method=ROME,protocol=batch*`."
                )
            patterns[name] = pattern
        return cls(patterns)

    def takes(self, labels: Mapping[str, object]) -> bool:
        """Whether a cell with these labels is one of them."""
        return all(
            fnmatch.fnmatchcase(str(labels[name]).lower(), pattern.lower())
            for name, pattern in self.patterns.items()
        )


@dataclass
class Study:
    """A whole comparison.

    Args:
        methods: In the order of the tables.
        data: In the order of the tables.
        protocols: In the order of the tables.
        seeds: A run for each.
        model: As in [`load_model`][lightning_edit.load_model].
        dtype: Precision of its weights.
        reference: Label of the method that the others are compared with; the first one when None.
        max_new_tokens: Longest continuation that is read, in tokens.
        chat_template: Ask as a user of a chat model would.
        system_prompt: The system's message before each prompt, in the chat template.
        accelerator: Of Lightning's Trainer.
        devices: Of Lightning's Trainer.
        strategy: Of Lightning's Trainer.
        precision: Of Lightning's Trainer.
        cache_dir: Folder for converted models and statistics; ``~/.cache/lightning_edit`` if None.

    Raises:
        EditError: If there is nothing to compare, two things have the same label, or no method has
            the reference's.
    """

    methods: Sequence[MethodSpec]
    data: Sequence[DataSpec]
    protocols: Sequence[ProtocolSpec]
    seeds: Sequence[int] = (0,)
    model: str = "smollm2"
    dtype: DType = "float32"
    reference: str | None = None
    max_new_tokens: int = 24
    chat_template: bool = False
    system_prompt: str | None = None
    accelerator: str = "auto"
    devices: int | str = 1
    strategy: str = "auto"
    precision: Precision = "32-true"
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        named: dict[str, list[str]] = {
            "methods": [method.name for method in self.methods],
            "data": [data.name for data in self.data],
            "protocols": [protocol.label for protocol in self.protocols],
            "seeds": [str(seed) for seed in self.seeds],
        }
        for name, labels in named.items():
            if not labels:
                raise EditError(f"`{name}` is empty, so that there is nothing to compare.")
            if twice := _twice(labels):
                raise EditError(
                    f"`{name}` has {twice!r} twice. Give one of them another `label`, or leave it "
                    "out."
                )
        if UNEDITED in named["methods"]:
            raise EditError(
                f"No method may have the label {UNEDITED!r}: the unedited model is in every table "
                "by itself. Leave it out, or choose another label."
            )
        if self.reference is not None and self.reference not in named["methods"]:
            raise EditError(
                f"`reference` is expected to be one of {', '.join(named['methods'])}, but got "
                f"{self.reference!r}."
            )
        for protocol in self.protocols:
            protocol.check()

    @property
    def reference_name(self) -> str:
        """Label of the method that the others are compared with."""
        return self.reference or self.methods[0].name

    def check(self) -> None:
        """Checks the settings of all methods and reads all data, before a model is loaded.

        Raises:
            EditError: If there is no such method, setting or file, or a request is invalid.
        """
        _ = self.resolved
        for data in self.data:
            _ = data.source.requests

    @cached_property
    def resolved(self) -> dict[str, Resolved]:
        """The methods by label, with all their settings."""
        return {method.name: method.resolve(self.model) for method in self.methods}


def _method_class(name: str) -> type[EditModule]:
    import importlib

    module, _, short = name.rpartition(".")
    try:
        home = importlib.import_module(module) if module else lightning_edit
        found = getattr(home, short)
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, EditModule)):
        import difflib

        near = difflib.get_close_matches(name, lightning_edit.__all__, n=1, cutoff=0.5)
        meant = f" Did you mean `{near[0]}`?" if near else ""
        raise EditError(
            f"There is no method {name!r}.{meant} `lightning-edit list --what methods` names all."
        )
    return found


def _hashes(settings: Mapping[str, object]) -> dict[str, str]:
    """Hashes of what settings name: a checkpoint or an encoder is more than its path."""
    found = {}
    for name, value in settings.items():
        path = Path(value).expanduser() if isinstance(value, str) and value else None
        if path is None or not path.exists():
            continue
        digest = hashlib.sha256()
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            digest.update(file.relative_to(path).as_posix().encode())
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        found[name] = digest.hexdigest()
    return found


def _twice(labels: Iterable[str]) -> str:
    seen: set[str] = set()
    for label in labels:
        if label in seen:
            return label
        seen.add(label)
    return ""
