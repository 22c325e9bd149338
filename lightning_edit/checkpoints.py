# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are data: wherever they come from, no code in them runs and none is imported."""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, Self, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.core.saving import CHECKPOINT_PAST_HPARAMS_KEYS
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor

from lightning_edit.core.append_log import appended_to, read_log
from lightning_edit.core.arguments import CheckedArguments
from lightning_edit.core.errors import ArtifactError
from lightning_edit.core.hashing import is_sharded, nested_hash
from lightning_edit.core.memory import with_entries
from lightning_edit.core.side_memory import MEMORY_PREFIX

__all__ = [
    "FORMAT_VERSION",
    "PlainCheckpoints",
    "check_editor",
    "check_file",
    "check_hyper_parameters",
    "check_seal",
    "load_plainly",
    "read_checkpoint",
    "read_plainly",
    "record_in",
    "seal",
    "seal_of_last",
]

#: 2: with a checksum of all that the checkpoint holds.
FORMAT_VERSION = 2

_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
# What a parser takes for the description of an object, not for an argument.
_SECTIONS = ("class_path", "dict_kwargs", "init_args")
_UNSAFE = re.compile(r"GLOBAL ([\w.]+)")


class PlainCheckpoints(CheckedArguments):
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
        elif appended_to(Path(where)).exists():
            source = io.BytesIO()
            torch.save(saved, source)
            source.seek(0)
        loader: Any = super()
        with warnings.catch_warnings():
            # Edited weights follow from the base and the edits.
            warnings.filterwarnings("ignore", message="The state dict in .* contains no parameters")
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
        check_file(where)
        # By the class, since the instance has this very object in the method's place. A strategy of
        # divided weights would have every tensor of the model in the file.
        divides = isinstance(self.strategy, ModelParallelStrategy)
        loads = (Strategy if divides else type(self.strategy)).load_checkpoint
        if loads is not Strategy.load_checkpoint:
            # Puts weights into the model while it reads them.
            read_checkpoint(where)
        with read_plainly(where):
            found = loads(self.strategy, checkpoint_path, weights_only=True)
        if loads is Strategy.load_checkpoint:
            check_seal(found, where)
        return _with_appended(found, where)


class _SealedSaving:
    """A strategy's ``save_checkpoint`` that adds a checksum of all that an editor's holds."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.sha256 = ""  # of the last one

    def __call__(
        self,
        checkpoint: dict[str, object],
        filepath: str | Path,
        storage_options: object = None,
    ) -> None:
        if self.strategy.is_global_zero and "lightning_edit" in checkpoint:
            loops = cast(Mapping[str, Mapping[str, Any]], checkpoint.get("loops", {}))
            _count_epoch(loops.get("fit_loop", {}))
            seal(checkpoint)
            self.sha256 = str(record_in(checkpoint).get("sha256", ""))
        type(self.strategy).save_checkpoint(self.strategy, checkpoint, filepath, storage_options)


def _count_epoch(loop: Mapping[str, Any]) -> None:
    """Counts the epoch that is running as begun, where Lightning left it out.

    Lightning 2.6 does after a run was resumed at the end of an epoch: a checkpoint of a later epoch
    then reads as one between two epochs, so that resuming it makes the epoch's steps once more.

    Args:
        loop: State of the fit loop, which is set right.
    """
    if not {"epoch_progress", "epoch_loop.batch_progress"} <= loop.keys():
        return
    batches = loop["epoch_loop.batch_progress"]["current"]
    for epochs in loop["epoch_progress"].values():
        is_within = batches["processed"] > batches["completed"]
        if is_within and epochs["ready"] <= epochs["processed"]:
            epochs["ready"] = epochs["started"] = epochs["processed"] + 1


def load_plainly(strategy: Strategy) -> None:
    """Has a strategy load checkpoints of tensors and plain values alone, and save them sealed.

    The Trainer's own ``weights_only`` does not reach every strategy, and allows pickles by default
    where a checkpoint has an address.

    Args:
        strategy: Of the Trainer that is about to run.
    """
    if not isinstance(strategy.load_checkpoint, _PlainLoading):
        cast(Any, strategy).load_checkpoint = _PlainLoading(strategy)
        cast(Any, strategy).save_checkpoint = _SealedSaving(strategy)


def seal_of_last(strategy: Strategy) -> str:
    """Checksum of the last checkpoint that a strategy saved; none if it is not known here.

    Args:
        strategy: Of the Trainer that runs an editor.
    """
    saving = strategy.save_checkpoint
    plain = isinstance(strategy.checkpoint_io, TorchCheckpointIO)
    return saving.sha256 if isinstance(saving, _SealedSaving) and plain else ""


def _with_appended(checkpoint: dict[str, Any], where: str) -> dict[str, Any]:
    """A checkpoint with what a run has appended to it in the file beside it.

    What was not written to its end is not there.

    Args:
        checkpoint: As it was read and checked.
        where: Its file; others, such as addresses, have nothing beside them.

    Raises:
        ArtifactError: If what was appended is damaged.
    """
    digest = checkpoint.get("lightning_edit", {}).get("sha256")
    if "://" in where or not digest:
        return checkpoint
    later = []
    for record in read_log(appended_to(Path(where)), digest):
        with read_plainly(where):
            later.append(torch.load(io.BytesIO(record), map_location="cpu", weights_only=True))
    return _extended(checkpoint, later) if later else checkpoint


def _extended(checkpoint: dict[str, Any], later: list[dict[str, Any]]) -> dict[str, Any]:
    """A checkpoint and those after it, each with what is new in it, as one that holds all."""
    parts = [part for one in later for part in one["optimizer_states"][0]["increments"]]
    [edits], last = checkpoint["optimizer_states"], later[-1]
    ids = [*edits["request_ids"], *(name for part in parts for name in part["request_ids"])]
    edits = {
        **edits,
        "parts": [part["tensors"] for part in parts if not part["entries"]],
        "carried": _carried_after(edits["carried"], parts),
        "request_ids": list(dict.fromkeys(ids)),
        "batches": [*edits["batches"], *(batch for part in parts for batch in part["batches"])],
    }
    prefix, state = f"model.{MEMORY_PREFIX}", dict(checkpoint["state_dict"])
    memory = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    if memory:
        changes = ((part["tensors"], part["entries"]) for part in parts)
        state |= {f"{prefix}{name}": t for name, t in with_entries(memory, changes).items()}
    kept = [record_in(one)["edit_state"] for one in (checkpoint, *later)]
    history = [row for one in kept for row in one["history"]]
    record = {**record_in(last), "edit_state": {**kept[-1], "history": history}}
    whole = {**last, "state_dict": state, "optimizer_states": [edits], "lightning_edit": record}
    seal(whole)
    return whole


def _carried_after(
    carried: Mapping[str, Tensor], parts: Iterable[Mapping[str, Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """What is carried after some edits, each of which has what is new in it."""
    found = {name: [tensor] for name, tensor in carried.items()}
    for part in parts:
        found |= {name: [tensor] for name, tensor in part["carried"].items()}
        for name, columns in part.get("columns", {}).items():
            found[name].append(columns)
    return {n: torch.cat(ts, 1) if len(ts) > 1 else ts[0] for n, ts in found.items()}


def seal(checkpoint: Mapping[str, Any]) -> None:
    """Adds the checksum of all that a checkpoint of an editor holds to its record.

    One whose tensors lie on several processes, each its part, gets none.

    Args:
        checkpoint: As it is about to be written.
    """
    if is_sharded(checkpoint):
        return
    record = cast(dict[str, object], record_in(checkpoint))
    record["format_version"] = FORMAT_VERSION
    record.pop("sha256", None)
    record["sha256"] = nested_hash(checkpoint)


def check_seal(checkpoint: Mapping[str, Any], where: str) -> None:
    """Checks that a checkpoint of an editor holds what was written, by its checksum.

    Those of version 0.1.0 have none; of them the file's own checksums were looked at.

    Args:
        checkpoint: As it was read.
        where: Its name, for errors.

    Raises:
        ArtifactError: If it does not, or is of a newer format.
    """
    record = checkpoint.get("lightning_edit")
    if not isinstance(record, Mapping):
        return
    version, digest = record.get("format_version", 1), record.get("sha256")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactError(
            f"`{where}` was written in format {version!r}, newer than {FORMAT_VERSION}, which this "
            "version of lightning_edit reads. Upgrade with `pip install -U lightning-edit`."
        )
    if version < 2 and digest is None:
        return
    rest = {name: value for name, value in record.items() if name != "sha256"}
    if nested_hash({**checkpoint, "lightning_edit": rest}) != digest:
        raise ArtifactError(
            f"`{where}` is damaged: it does not hold what was written, by its checksum. Restore it "
            "from a backup, or go on from an earlier checkpoint."
        )


def check_file(where: str) -> None:
    """Checks the file of a checkpoint before it is read: its checksums, and the sizes it names.

    Args:
        where: A local file; others, such as addresses, are left to those who read them.

    Raises:
        ArtifactError: If a part of the file is damaged, missing, or said to be larger than it is.
    """
    path = Path(where)
    _check_regular(path)
    if not path.is_file():
        return
    with read_plainly(where), path.open("rb") as file:
        _check_archive(file)


def _check_regular(path: Path) -> None:
    """Refuses pipes and devices, which would be waited for without an end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ArtifactError(f"`{path}` is no regular file. Give one that a run has written.")


def _check_archive(file: IO[bytes]) -> None:
    """Checks what torch does not: the CRC-32 of each part, and that none is compressed.

    Raises:
        ValueError: If one is not as it was written.
        zipfile.BadZipFile: If it is no archive.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        # Written as they are, so that they cannot ask for more memory than the file has bytes.
        if any(p.compress_type for p in parts) or sum(p.file_size for p in parts) > size:
            raise ValueError("its parts are said to be larger than the file")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its part `{damaged}` does not have the checksum it was written with")
    file.seek(0)


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


def check_editor(record: Mapping[str, Any], editor: list[str]) -> None:
    """Checks that a run goes on with the editor that it began with.

    Args:
        record: What an editor kept in the checkpoint; in version 0.1.0 that was not in it.
        editor: Name of the editor that goes on, and of the parameters that it edits.

    Raises:
        ArtifactError: If it is another, or edits other parameters.
    """
    made_by, *names = record.get("made_by", editor)
    method, *edited = editor
    if made_by != method:
        raise ArtifactError(
            f"The checkpoint is of {made_by}, not of {method}, whose edits it would be said to "
            f"hold. Resume with {made_by}, or begin a new run in another folder."
        )
    if names != edited:
        raise ArtifactError(
            f"The checkpoint holds edits of {', '.join(names) or 'no weights'}, but here "
            f"{', '.join(edited) or 'no weights'} are to be edited. Resume with the `layers` and "
            "`modules` that it was made with, or begin a new run in another folder."
        )


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
    if isinstance(source, (str, Path)) and "://" not in where:
        _check_regular(Path(where))
    with read_plainly(where):
        if isinstance(source, (str, Path)):
            with get_filesystem(where).open(where, "rb") as file:
                held = io.BytesIO(file.read()) if "://" in where else file
                _check_archive(held)
                saved = torch.load(held, map_location="cpu", weights_only=True)
        else:
            _check_archive(source)
            saved = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise ArtifactError(
            f"`{where}` is no checkpoint: it holds {type(saved).__name__}, not a dict. Give a file "
            "that a run has written."
        )
    check_seal(saved, where)
    return _with_appended(saved, where) if isinstance(source, (str, Path)) else saved


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
