# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""A model in one's own process, whose adapters peft puts in and takes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_edit.core.errors import MissingDependencyError, ServerError
from lightning_edit.serving.server import JSON, Served

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

__all__ = ["InProcess"]


class InProcess:
    """A model of transformers in this process.

    The model's weights are never written: an adapter is computed beside them. While one is swapped
    no other thread may ask the model.

    Args:
        model: The base model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._adapted: PeftModel | None = None
        self._folders: dict[str, str] = {}
        self._preferred: str | None = None

    def push(self, folder: Path, name: str) -> None:
        """Loads an adapter; one of the name and of the same modules is swapped in its place.

        Swapping changes tensors alone, so that a compiled model stays compiled.

        Raises:
            MissingDependencyError: If peft is not installed.
            ServerError: If the name is none of a module, or the adapter does not fit the model.
        """
        try:
            from peft import PeftConfig, PeftModel
            from peft.utils.hotswap import hotswap_adapter
        except ImportError as error:
            raise MissingDependencyError("peft", "peft", "An adapter in one's process") from error
        if "." in name:
            raise ServerError(f"`{name}` cannot name a module, since it has a dot in it.")
        try:
            if not (folder / "adapter_model.safetensors").is_file():
                raise ValueError("there is no adapter_model.safetensors")
            config = PeftConfig.from_pretrained(str(folder))
            strange = set(config.target_modules) - {n for n, _ in self.model.named_modules()}
            if strange:
                raise ValueError(f"it has no module {min(strange)}")
            if name in self._folders and self._is_like(config, name):
                hotswap_adapter(self._adapted, str(folder), name)
            else:
                self._forget(name)
                if self._adapted is None:
                    self._adapted = PeftModel.from_pretrained(self.model, str(folder), name)
                else:
                    self._adapted.load_adapter(str(folder), name)
        except (OSError, RuntimeError, ValueError) as error:
            raise ServerError(
                f"The adapter in `{folder}` does not fit {type(self.model).__name__}: "
                f"{' '.join(str(error).split())[:300]}."
            ) from error
        self._folders[name] = str(folder)
        self.prefer(self._preferred)

    def pull(self, name: str) -> None:
        """Takes an adapter out; see ``LiveServer.pull``. Without any the model is as it was."""
        self._forget(name)
        self.prefer(None if self._preferred == name else self._preferred)

    def served(self) -> list[Served]:
        """The adapters that were pushed; see ``LiveServer.served``."""
        return [
            Served(name, folder, 1.0 if name == self._preferred else 0.0)
            for name, folder in self._folders.items()
        ]

    def prefer(self, name: str | None) -> None:
        """Has the model answer with one adapter, or without any; see ``LiveServer.prefer``."""
        self._preferred = name
        if self._adapted is None:
            return
        if name is None:
            self._adapted.base_model.disable_adapter_layers()
        else:
            self._adapted.base_model.enable_adapter_layers()
            self._adapted.set_adapter(name)

    def fields(self, name: str | None) -> Mapping[str, JSON]:
        """Nothing: ``prefer`` says who answers."""
        return {}

    def _forget(self, name: str) -> None:
        if name not in self._folders or self._adapted is None:
            return
        del self._folders[name]
        if self._folders:
            self._adapted.delete_adapter(name)
        else:
            self._adapted.unload()
            self._adapted = None

    def _is_like(self, config: LoraConfig, name: str) -> bool:
        """Whether an adapter has the modules, ranks and scales of one that is loaded."""
        if self._adapted is None:
            return False
        loaded = self._adapted.peft_config[name]
        same = ("target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern")
        return all(_plain(getattr(loaded, n)) == _plain(getattr(config, n)) for n in same)


def _plain(value: object) -> object:
    """Module names in any order are the same."""
    return sorted(value) if isinstance(value, (set, list)) else value
