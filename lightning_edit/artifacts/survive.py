# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Whether a saved edit holds once the edited model is quantised."""

# torch is imported when the function runs, so that help on the command line does not wait for it.

from __future__ import annotations

from lightning_edit.artifacts.outcomes import Survived, SurvivedEdit

__all__ = ["survive"]


def survive(delta: str, model: str | None = None, formats: list[str] | None = None) -> Survived:
    """Tells which edits hold, and which are lost, once the edited model is quantised.

    The edit is applied to its base in memory, the linear maps of all blocks are rounded as the
    format stores them, and each request is asked before and after. Nothing is written.

    Args:
        delta: Folder of the saved edit, or of the run that saved it.
        model: The base model. By default the one that the edit names.
        formats: `int8` and `int4` as torchao rounds weights, `q8_0` and `q4_0` as GGUF files hold
            them. By default the first two.

    Returns:
        What became of each edit in each format.

    Raises:
        ArtifactError: If the edit is damaged, does not keep its requests in words, or a format is
            not known.
        MissingDependencyError: If torchao is not installed (`pip install
            'lightning-edit[quantise]'`), or gguf.
        ModelError: If the model cannot be loaded, or a format does not divide its weights.
    """
    from collections.abc import Mapping
    from typing import cast, get_args

    from lightning_edit.artifacts.sources import base_name, load_base, open_edit
    from lightning_edit.core.batch import PromptTokenizer, TemplateValue
    from lightning_edit.core.errors import ArtifactError
    from lightning_edit.core.locator import ModelTree
    from lightning_edit.evaluation.quantised import QuantFormat
    from lightning_edit.evaluation.survival import measure_survival
    from lightning_edit.models import load_tokenizer

    chosen = formats or ["int8", "int4"]
    for name in chosen:
        if name not in get_args(QuantFormat):
            raise ArtifactError(
                f"`formats`: {name!r} is not known. Choose from {', '.join(get_args(QuantFormat))}."
            )
    artifact, edit = open_edit(delta)
    asked = edit.provenance.requests
    if not asked:
        raise ArtifactError(
            f"The edit in `{artifact}` does not keep its requests in words, so that they cannot be "
            "asked. Make it again by this version."
        )
    source = base_name(edit, artifact, model)
    loaded = load_base(edit, source, given=model is not None)
    edit.apply_(loaded)
    settings = edit.provenance.settings
    chat = bool(settings.get("measure_in_chat") or settings.get("chat_template"))
    tokens = PromptTokenizer(
        load_tokenizer(source),
        chat_template=chat,
        is_encoder_decoder=ModelTree.of(loaded).is_encoder_decoder,
        chat_template_kwargs=cast(
            Mapping[str, TemplateValue] | None, settings.get("chat_template_kwargs")
        ),
        system_prompt=cast(str | None, settings.get("system_prompt")),
    )
    found = measure_survival(loaded, tokens, asked, cast(list[QuantFormat], chosen))
    rows = tuple(SurvivedEdit(r.id, r.form, r.outcome, r.before, r.after) for r in found)
    return Survived(str(artifact), rows)
