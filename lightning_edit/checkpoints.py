# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are data: wherever they come from, no code in them runs and none is imported."""

from __future__ import annotations

import inspect
import io
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, Self, cast

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from lightning_edit.core.errors import ArtifactError

__all__ = [
    "PlainCheckpoints",
    "check_hyper_parameters",
    "load_plainly",
    "read_checkpoint",
    "read_plainly",
    "record_in",
]

_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
# What a parser takes for the description of an object, not for an argument.
_SECTIONS = ("class_path", "dict_kwargs", "init_args")
_UNSAFE = re.compile(r"GLOBAL ([\w.]+)")


class PlainCheckpoints:
    """Base of modules and data modules whose checkpoints hold tensors and plain values alone.

    Lightning loads checkpoints from an address such as ``https://…`` with pickles allowed, and
    imports the classes that a checkpoint names. Here neither happens.
    """

    #: Arguments that are no primitives, which a checkpoint must not hold.
    unsaved_arguments: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint_path: str | Path | IO[bytes], *args: object, **kwargs: object
    ) -> Self:
        """Makes a module from a checkpoint, as Lightning does, of tensors and plain values alone.

        Args:
            checkpoint_path: A file, an address that fsspec knows, or an open file.
            args: As Lightning's own method takes them.
            kwargs: The same, and arguments of the module; ``weights_only`` is always true.

        Raises:
            ArtifactError: If the checkpoint holds anything else, or names a class that is none of
                ours and not imported.
        """
        where = str(checkpoint_path)
        if kwargs.get("weights_only") is False:
            raise ArtifactError(
                f"`{where}` is only read with `weights_only=True`, so that no code in it runs. "
                "Leave `weights_only` out."
            )
        source = checkpoint_path
        if isinstance(source, (str, Path)) and "://" in str(source):
            # Read once, so that what is checked is what is loaded.
            with read_plainly(where), get_filesystem(where).open(where, "rb") as file:
                source = io.BytesIO(file.read())
        saved = read_checkpoint(source, where=where)
        for key in (*CHECKPOINT_PAST_HPARAMS_KEYS, cast(Any, cls).CHECKPOINT_HYPER_PARAMS_KEY):
            class_path = check_hyper_parameters(saved.get(key, {}), cls, where)
            if class_path is not None:
                kwargs["_class_path"] = class_path
        if not isinstance(source, (str, Path)):
            source.seek(0)
        loader: Any = super()
        module: Self = loader.load_from_checkpoint(
            source, *args, **{**kwargs, "weights_only": True}
        )
        return module


class _PlainLoading:
    """A strategy's ``load_checkpoint`` that allows no pickles, whatever the Trainer was told."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def __call__(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, object]:
        where = str(checkpoint_path)
        if Path(where).is_dir():
            raise ArtifactError(
                f"`{where}` is a folder, as sharded strategies write it, whose description is a "
                "pickle. Give the file of a run on one device or under DDP."
            )
        with read_plainly(where):
            # By the class, since the instance has this very object in the method's place. A sharded
            # strategy would have every tensor of the model in the file.
            is_sharded = isinstance(self.strategy, ModelParallelStrategy)
            kind = Strategy if is_sharded else type(self.strategy)
            return kind.load_checkpoint(self.strategy, checkpoint_path, weights_only=True)


def load_plainly(strategy: Strategy) -> None:
    """Has a strategy load checkpoints of tensors and plain values alone.

    The Trainer's own ``weights_only`` does not reach every strategy, and allows pickles by default
    where a checkpoint has an address.

    Args:
        strategy: Of the Trainer that is about to run.
    """
    if not isinstance(strategy.load_checkpoint, _PlainLoading):
        cast(Any, strategy).load_checkpoint = _PlainLoading(strategy)


def record_in(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an editor keeps in a checkpoint beside Lightning's own.

    Raises:
        ArtifactError: If no editor has written the checkpoint.
    """
    if "lightning_edit" not in checkpoint:
        raise ArtifactError(
            "The checkpoint was not written by an editor of lightning_edit: it lacks the key "
            "`lightning_edit`. Give a checkpoint of an editing run."
        )
    found: Mapping[str, Any] = checkpoint["lightning_edit"]
    return found


def read_checkpoint(source: str | Path | IO[bytes], where: str = "") -> dict[str, Any]:
    """Reads a checkpoint into memory, on the CPU.

    Args:
        source: A file, an address that fsspec knows, or an open file.
        where: Its name in errors; that of the source by default.

    Raises:
        ArtifactError: If it is missing, damaged, or holds more than tensors and plain values.

    Examples:
        >>> file = getfixture("tmp_path") / "a.ckpt"
        >>> torch.save({"state_dict": {"weight": torch.ones(2)}}, file)
        >>> read_checkpoint(file)["state_dict"]["weight"]
        tensor([1., 1.])
    """
    where = where or str(source)
    with read_plainly(where):
        if isinstance(source, (str, Path)):
            with get_filesystem(where).open(where, "rb") as file:
                saved = torch.load(file, map_location="cpu", weights_only=True)
        else:
            saved = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise ArtifactError(
            f"`{where}` is no checkpoint: it holds {type(saved).__name__}, not a dict. Give a file "
            "that a run has written."
        )
    return saved


@contextmanager
def read_plainly(where: str) -> Iterator[None]:
    """Says in our own words why a checkpoint cannot be read.

    Args:
        where: Its name.
    """
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(
            f"There is no checkpoint `{where}`. Give a file that a run has written."
        ) from None
    except ArtifactError:
        raise
    except Exception as error:  # torch and fsspec raise all kinds for a damaged file
        unsafe = _UNSAFE.search(str(error))
        if unsafe is not None:
            raise ArtifactError(
                f"`{where}` is not loaded: it asks for `{unsafe[1]}`, but checkpoints of editors "
                "hold tensors and plain values alone, so that no code in them can run. Give one "
                "that an editing run has written."
            ) from None
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArtifactError(
            f"`{where}` cannot be read as a checkpoint ({reason}). Give a file that a run has "
            "written, or restore it from a backup."
        ) from None


def check_hyper_parameters(found: object, family: type, where: str) -> str | None:
    """Checks the arguments in a checkpoint before anything is made or imported from them.

    Args:
        found: The checkpoint's hyper-parameters.
        family: The class that is loaded, or a base of it.
        where: The checkpoint's name, for errors.

    Returns:
        Where the class lies that the checkpoint names; None where it names none.

    Raises:
        ArtifactError: If it names a class that is no imported subclass of the family, or holds a
            description of another object to make.
    """
    if not isinstance(found, Mapping):
        raise ArtifactError(
            f"`{where}` is damaged: its hyper-parameters are no dict. Restore it from a backup."
        )
    if found.get("_instantiator", _INSTANTIATOR) != _INSTANTIATOR:
        raise ArtifactError(
            f"`{where}` is to be made by `{found['_instantiator']}`, which is none of Lightning's "
            "ways. Give a checkpoint that an editing run has written."
        )
    classes, path = _subclasses(family), found.get("_class_path")
    if path is not None:
        known = _imported(str(path), family)
        if known is None:
            raise ArtifactError(
                f"`{where}` names the class `{path}`, which is no imported subclass of "
                f"{family.__name__}, so that it is not imported. Give a checkpoint of an editor; "
                "if the class is your own, import its module first."
            )
        classes, path = [known], f"{known.__module__}.{known.__qualname__}"
    for name, value in found.items():
        makes = name in _SECTIONS or not str(name).isidentifier() or _describes_object(value)
        if makes or any(_is_object(cls, name, value) for cls in classes):
            raise ArtifactError(
                f"`{where}` describes an object to make as `{name}`: {value!r:.80}. Checkpoints of "
                "editors hold plain values alone. Give one that an editing run has written, and "
                f"`{name}` in the configuration."
            )
    return path


def _imported(path: str, family: type) -> type | None:
    """The class of that address, if it is imported and of the family; imports nothing."""
    module, _, name = path.rpartition(".")
    found = vars(sys.modules.get(module, object)).get(name)
    if isinstance(found, type) and issubclass(found, family):
        return found
    # A class of this package may have moved to another file since the checkpoint was written.
    own = [cls for cls in _subclasses(family) if _is_ours(path) and _is_ours(cls.__module__)]
    return next((cls for cls in own if cls.__name__ == name), None)


def _is_ours(path: str) -> bool:
    return path.partition(".")[0] == __name__.partition(".")[0]


def _subclasses(cls: type) -> list[type]:
    found = [cls]
    one: type
    for one in cls.__subclasses__():
        found += _subclasses(one)
    return found


def _describes_object(value: object) -> bool:
    """Whether a parser would make an object of a value, however deep."""
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_describes_object, value.values()))
    return isinstance(value, (list, tuple)) and any(map(_describes_object, value))


def _is_object(cls: type, name: str, value: object) -> bool:
    """Whether a parser would import what an argument names: one that takes objects, not text."""
    if value is None or name not in getattr(cls, "unsaved_arguments", ()):
        return False
    for parent in cls.__mro__:
        parameter = inspect.signature(parent.__init__).parameters.get(name)  # type: ignore[misc]
        if parameter is not None:
            return "str" not in re.findall(r"\w+", str(parameter.annotation))
    return True
