# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What the package offers, found by enumeration: whoever adds a class gets its tests."""

from __future__ import annotations

import atexit
import functools
import inspect
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback
from torch import nn

import lightning_edit
from lightning_edit import MEND, SERAC, EditDataModule, EditModule, TrainedEditor
from lightning_edit.demos import tiny_model, tiny_requests, tiny_tokenizer, trained_tiny_model
from lightning_edit.modules.meta_learning.hypernetwork import HyperEditModule
from lightning_edit.modules.meta_learning.training import Trainable
from lightning_edit.optim import E
from tests.modules.helpers import bare_trainer

__all__ = [
    "CALLBACKS",
    "CONFIGS",
    "EDITORS",
    "HYPERNETWORKS",
    "LEARNERS",
    "METHOD_CONFIGS",
    "RememberingEditor",
    "arguments_of",
    "class_in",
    "documented_arguments",
    "public_classes",
    "quick",
    "quick_editor",
    "trained_editor",
]

CONFIGS = Path(__file__).parents[2] / "configs"

# What makes a run of an editor quick, by the name of the argument.
QUICK: dict[str, Any] = {
    "count": 0,
    "steps": 3,
    "rank": 2,
    "tokens_per_dimension": 1,
    "context_templates": ["{}", "Yes. {}"],
    "max_new_tokens": 4,
}

# What an editor needs more of to be of any use.
QUICK_FOR: dict[str, dict[str, Any]] = {
    "MEMIT": {"clamp_norm_factor": 4.0},  # three steps are to be bounded by nothing but themselves
    "KE": {"warmup_steps": 0},
    "SERAC": {"width": 16, "depth": 1, "lr": 5e-3, "encoder_lr": 5e-3},
    "TPatcher": {"lr": 0.1, "steps": 8, "first_check": 8, "memory_tokens": 64},
    "UltraEdit": {"lr": 1e-4},
}


def public_classes(base: type) -> dict[str, Any]:
    """Concrete public subclasses of a class, by name."""
    found = {}
    for name in sorted(lightning_edit.__all__):
        value = getattr(lightning_edit, name)
        if inspect.isclass(value) and issubclass(value, base) and not inspect.isabstract(value):
            found[name] = value
    return found


class RememberingEditor(TrainedEditor):
    """A trained editor whose edits are of a memory."""

    paper = SERAC.paper


#: Editors that ``fit`` trains.
LEARNERS: dict[str, Any] = {
    name: cls for name, cls in public_classes(EditModule).items() if issubclass(cls, Trainable)
}
#: Those whose edits are of weights.
HYPERNETWORKS: dict[str, type[HyperEditModule]] = public_classes(HyperEditModule)
#: Editors whose edits ``fit`` commits.
EDITORS: dict[str, type[EditModule[Any]]] = {
    name: cls for name, cls in public_classes(EditModule).items() if name not in LEARNERS
}
CALLBACKS: dict[str, type[Callback]] = public_classes(Callback)
METHOD_CONFIGS = sorted((CONFIGS / "method").glob("*.yaml"))


def class_in(path: Path, section: str = "model") -> str:
    """The class that a configuration names."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return str(config[section]["class_path"])


def arguments_of(cls: type) -> dict[str, type]:
    """Arguments of a constructor and of those that it passes ``**kwargs`` to, with their class."""
    found: dict[str, type] = {}
    for owner in cls.__mro__:
        init = owner.__dict__.get("__init__")
        if init is None or owner in (nn.Module, object):
            continue
        parameters = inspect.signature(init).parameters
        found |= {
            name: owner
            for name, parameter in parameters.items()
            if name != "self"
            and name not in found
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def documented_arguments(cls: type) -> dict[str, str]:
    """The ``Args`` section of a docstring: name to text."""
    found: dict[str, str] = {}
    inside, name = False, ""
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if line == "Args:":
            inside = True
        elif inside and line and not line.startswith(" "):
            break
        elif inside and line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(":")
            found[name] = text.strip()
        elif inside and line.strip():
            found[name] += " " + line.strip()
    return found


def quick(cls: type[EditModule[E]], kind: str = "trained") -> dict[str, Any]:
    """Arguments with which an editor of a tiny model of some kind is quick."""
    known = arguments_of(cls)
    mine = {**QUICK, **QUICK_FOR.get(cls.__name__, {})}
    found = {name: value for name, value in mine.items() if name in known}
    if not issubclass(cls, TrainedEditor):
        return found
    return {
        **found,
        "checkpoint": trained_editor(kind, SERAC if cls is RememberingEditor else MEND),
    }


def quick_editor(cls: type[EditModule[E]], dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """An editor of a trained tiny model of its own."""
    model, tokenizer = trained_tiny_model()
    if issubclass(cls, TrainedEditor) and dtype != torch.float32:
        more["any_base"] = True
    return cls.from_model(model.to(dtype), tokenizer, **{**quick(cls), **more})


@functools.cache
def trained_editor(kind: Any, method: Any) -> str:
    """A checkpoint of an editor of a tiny model, trained once in a process."""
    model = trained_tiny_model()[0] if kind == "trained" else tiny_model(kind)
    settings = {"rank": 8, "edit_lr": 0.01, "edit_lr_lr": 1e-3} if method is MEND else quick(method)
    editor = method.from_model(model, tiny_tokenizer(), **settings)
    trainer = bare_trainer(max_epochs=2 if method is MEND else 8)
    trainer.fit(editor, EditDataModule(requests=tiny_requests(8), batch_size=4))
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    trainer.save_checkpoint(folder / f"{kind}.ckpt")
    return str(folder / f"{kind}.ckpt")
