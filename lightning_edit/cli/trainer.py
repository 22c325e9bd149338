# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The command line of the Trainer's verbs: ``fit``, ``validate``, ``test``, ``predict``."""

from __future__ import annotations

import inspect
import itertools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, cast

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

import lightning_edit
from lightning_edit.__about__ import __version__
from lightning_edit.callbacks.run_folder import hold
from lightning_edit.checkpoints import check_hyper_parameters, read_checkpoint
from lightning_edit.cli.parsing import EditParser
from lightning_edit.core.errors import EditError
from lightning_edit.core.figures import not_taken
from lightning_edit.core.files import replacing
from lightning_edit.modules.base import EditModule
from lightning_edit.modules.foreign import foreign_editors
from lightning_edit.modules.meta_learning.training import EditorTraining
from lightning_edit.presets import find_config, preset_in
from lightning_edit.rendering.escaping import visible

__all__ = ["EditCLI", "main", "quiet_down"]

# Allows classes to be named without their package in configurations and on the command line.
for _name in lightning_edit.__all__:
    getattr(lightning_edit, _name)
foreign_editors()


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of a ``fit`` beside its results, once model and data are there.

    Lightning saves it first, so that a misspelt model would leave a folder; for all verbs, so that
    a later ``test`` would replace it; and in the encoding of the locale, which may lack characters.
    """

    @override
    def setup(self, *args: object, **kwargs: object) -> None:
        """Waits."""

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = trainer.log_dir or trainer.default_root_dir  # the same on all processes
        hold(trainer, Path(self.folder))
        super().setup(trainer, pl_module, "fit")

    @override
    def save_config(self, trainer: Trainer, *args: object) -> None:
        """Called on the first process alone."""
        text = self.parser.dump(self.config, skip_unset=False)
        path = Path(self.folder) / "config.yaml"
        if path.exists() and path.read_bytes() != text.encode():
            # Of an earlier run, or somebody's own.
            stamp = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            earlier = path.parent / "earlier" / f"config-{stamp:%Y%m%d-%H%M%S-%f}.yaml"
            earlier.parent.mkdir(exist_ok=True)
            os.replace(path, earlier)
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")


class ReliabilityGate(Callback):
    """Counts which requests the model that ``fit`` leaves answers as asked, token by token.

    Args:
        least: Share of them below which the command is to fail.
    """

    def __init__(self, least: float) -> None:
        self.least = least
        #: What to say if it fails; empty where it does not.
        self.verdict = ""

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """While the model is where it was edited; on all processes."""
        requests = cast(Any, trainer).datamodule.requests
        editor = cast(EditModule[Any], pl_module)
        editor.model.eval()
        found = editor.session.measured(requests)
        missed = not_taken(list(found.values()))
        share = 1 - len(missed) / max(1, len(found))
        if share < self.least:
            self.verdict = (
                f"reliability is {share:.3g}, below --fail_under {self.least:g}: the edited model "
                f"does not give the new answer of {len(missed)} of {len(found)} requests: "
                f"{', '.join(missed)}. All was written nevertheless."
            )


class EditCLI(LightningCLI):
    """Lightning's command line over editors, data and callbacks of this package."""

    _gate: ReliabilityGate | None = None

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        """The verb that the command line names: parsers of the others would take twice as long."""
        verbs = LightningCLI.subcommands()
        named = sys.argv[1] if len(sys.argv) > 1 else ""
        return {named: verbs[named]} if named in verbs else verbs

    @override
    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Adds the options that one verb alone has."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--fail_under",
                type=float | None,
                default=None,
                help="Exit with status 2, after all is written, if the share of the requests whose "
                "new answer the edited model gives, token by token, is below this, in [0, 1].",
            )
        return parser

    @override
    def _parse_ckpt_path(self) -> None:
        """Has the arguments in a checkpoint overrule the configuration, once they are checked.

        Lightning would import whatever class they name.
        """
        verb = self.config.get("subcommand")
        checkpoint = self.config[verb].get("ckpt_path") if verb else None
        if not checkpoint or not Path(checkpoint).is_file():
            return
        found = read_checkpoint(checkpoint).get("hyper_parameters", {})
        class_path = check_hyper_parameters(found, EditModule, checkpoint)
        arguments = {name: value for name, value in found.items() if not name.startswith("_")}
        if not found:
            return
        model: dict[str, object] = arguments
        if class_path is not None:
            model = {"class_path": class_path, "dict_kwargs": arguments}
        self.config = self.parser.parse_object({verb: {"model": model}}, self.config)

    def _use_rules_on_other_models(self) -> None:
        """Leaves the settings of a model's preset out where another model is edited."""
        section = self.config.get(self.subcommand or "", self.config).get("model")
        own = getattr(section, "init_args", None)
        if own is None:
            return
        method = section.class_path.rpartition(".")[2]
        for path in _config_files():
            of, model, settings = preset_in(path)
            if of != method or own.get("model") == model:
                continue
            left_out: list[str] = []
            for name, value in settings.items():
                default = _default_of(getattr(lightning_edit, method), name)
                is_its = own.get(name) == value and not _is_named(name)
                if is_its and default is not inspect.Parameter.empty:
                    own[name] = default
                    left_out.append(f"`{name}`")
            if left_out:
                rank_zero_info(
                    f"{', '.join(left_out)} of {path.name} are for {model}. For {own.get('model')} "
                    f"{method}'s own are taken; give others with `--model.…`."
                )

    @override
    def before_instantiate_classes(self) -> None:
        self._use_rules_on_other_models()
        settings = self.config.get(self.subcommand or "", self.config)
        if settings.get("weights_only") is False:
            self._refuse(
                "`weights_only` is false, but checkpoints are always read without pickles, so that "
                "no code in them runs. Leave it out."
            )
        least = settings.get("fail_under")
        if least is not None and not 0 <= least <= 1:
            self._refuse(
                f"`fail_under` is expected to be a share between 0 and 1, but got {least:g}."
            )
        checkpoint = settings.get("ckpt_path")
        if not checkpoint or checkpoint in ("last", "best", "hpc") or "://" in checkpoint:
            return
        if not Path(checkpoint).exists():
            self._refuse(
                f"`ckpt_path`: there is no checkpoint `{checkpoint}`. Give a file that a run has "
                "written, or `last` for the one of the run's own folder."
            )

    def _refuse(self, message: str) -> NoReturn:
        """Ends the program as the parser of the verb does."""
        self._parser(self.subcommand).error(message)

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (EditError, MisconfigurationException, ValueError) as error:
            # What a constructor refuses is a matter of the configuration, not of the program.
            self._refuse(str(error))
        callbacks = getattr(self.trainer, "callbacks", [])
        if self.subcommand in ("validate", "test"):
            settings = self.config_init[self.subcommand]
            # Its table has whole names, intervals and the values before.
            settings["verbose"] &= not any(
                isinstance(c, lightning_edit.EditReport) for c in callbacks
            )

    def before_fit(self) -> None:
        """Has a run counted whose exit status goes by what it came to."""
        least = self.config[self.subcommand].get("fail_under")
        if least is None:
            return
        if isinstance(self.model.fitting, EditorTraining):
            self._refuse(
                f"`fail_under`: {type(self.model).__name__} edits nothing in `fit`, which trains "
                "it. Give it to the `fit` of a TrainedEditor."
            )
        if not hasattr(self.datamodule, "requests"):
            self._refuse(
                f"`fail_under` counts edit requests, but {type(self.datamodule).__name__} has none."
            )
        self._gate = ReliabilityGate(least)
        cast(Any, self.trainer).callbacks.append(self._gate)

    def after_fit(self) -> None:
        """Exits with a status that says so where fewer edits took than were asked for."""
        if self._gate is not None and self._gate.verdict:
            sys.stderr.write(f"lightning-edit fit: {visible(self._gate.verdict)}\n")
            sys.exit(2)

    def before_validate(self) -> None:
        """Has ``validate`` run although configurations of ``fit`` leave validation out."""
        if self.trainer.limit_val_batches == 0:
            self.trainer.limit_val_batches = 1.0

    def after_predict(self) -> None:
        """Shows the texts, which the Trainer only returns."""
        for batch in self.trainer.predict_loop.predictions:
            for row in batch:
                before, after = row["before"], row["after"]
                text = f"{row['prompt']}\n  before  {before}\n  after   {after}\n"
                sys.stdout.write(visible(text))


def _config_files() -> list[Path]:
    """The configurations that the command line names and that are there."""
    words = sys.argv[1:]
    named = [b for a, b in itertools.pairwise(words) if a in ("-c", "--config")]
    named += [w.partition("=")[2] for w in words if w.startswith("--config=")]
    return [Path(name) for name in named if Path(name).is_file()]


def _is_named(argument: str) -> bool:
    """Whether the command line gives an argument of the editor by itself."""
    options = (f"--model.{argument}", f"--model.init_args.{argument}")
    return any(word.partition("=")[0] in options for word in sys.argv)


def _default_of(cls: type, argument: str) -> object:
    """The default of a constructor's argument, which a base may have; empty where there is none."""
    for owner in cls.__mro__:
        init = vars(owner).get("__init__")
        parameters = {} if init is None else inspect.signature(init).parameters
        if argument in parameters:
            return parameters[argument].default
    return inspect.Parameter.empty


def main(args: ArgsType = None) -> EditCLI:
    """Runs one of the Trainer's verbs.

    Args:
        args: Command line or parsed configuration; the process's own when None.
    """
    quiet_down()
    if args is None:
        sys.argv[1:] = _with_packaged_configs(sys.argv[1:])
    elif isinstance(args, list):
        args = _with_packaged_configs(args)
    try:
        return EditCLI(
            EditModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            parser_kwargs={"version": f"lightning_edit {__version__}"},
            parser_class=EditParser,
            # Edits need gradients in `test` and `predict`, too.
            trainer_defaults={"inference_mode": False},
            args=args,
        )
    except MisconfigurationException as error:
        raise EditError(str(error)) from error
    except SIGTERMException:
        # Lightning's own status would be 0, as if all edits had been made.
        sys.exit(128 + signal.SIGTERM)


# Editing wants the model in eval mode, needs no workers to read a few texts, and runs anywhere.
_EXPECTED_WARNINGS = (
    r".*LeafSpec.*",
    r".*does not have many workers.*",
    r"Found .* module\(s\) in eval mode.*",
    r"You called `self\.log\(.* in your `\w+` but have no logger configured.*",
)
_CHATTER = (
    "Tip:",
    "TPU available",
    "GPU available",
    "HPU available",
    "litlogger",
    "`Trainer.fit` stopped",
)


def quiet_down() -> None:
    """Keeps remarks that do not concern an editing run off the screen."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)

    def concerns(record: logging.LogRecord) -> bool:
        """Whether to show it; what is shown may name ids and paths that steer a terminal."""
        text = record.getMessage()
        record.msg, record.args = visible(text), ()
        return not any(words in text for words in _CHATTER)

    shown = warnings.formatwarning

    def visibly(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        return shown(visible(message), category, filename, lineno, line)

    if shown.__name__ != visibly.__name__:
        warnings.formatwarning = visibly

    for name in (
        "lightning.pytorch",
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
    ):
        logging.getLogger(name).addFilter(concerns)


def _with_packaged_configs(arguments: Sequence[str]) -> list[str]:
    found = list(arguments)
    for i, argument in enumerate(found):
        if argument in ("-c", "--config") and i + 1 < len(found):
            found[i + 1] = find_config(found[i + 1])
        elif argument.startswith("--config="):
            found[i] = f"--config={find_config(argument.removeprefix('--config='))}"
    return found
