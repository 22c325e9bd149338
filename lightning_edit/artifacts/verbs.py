# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What needs no Trainer: functions on saved edits, offered by the command ``lightning-edit`` too.

The functions return data and write nothing to the screen: ``lightning_edit.cli.tables`` prints.
"""

# torch is imported when a function runs, so that help on the command line does not wait for it.
# jsonargparse imports what stands under TYPE_CHECKING, too: hence Any for a WeightDelta.

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning_edit.artifacts.outcomes import Comparison, Offer, Rendered, SavedEdit, Written

__all__ = ["apply", "diff", "export", "list_", "report", "revert"]

DType = Literal["float32", "bfloat16", "float16"]


def apply(
    delta: str,
    model: str | None = None,
    output: str = "edited",
    dtype: DType | None = None,
    check: bool = True,
    force: bool = False,
) -> Written:
    """Writes an edited copy of a model: the base model plus a saved edit.

    The result is a folder of safetensors, configuration and tokenizer, which every program that
    reads Hugging Face models can read.

    Args:
        delta: Folder of the saved edit, or of the run that saved it.
        model: The base model: a folder, a hub id, a GGUF file or `smollm2`. By default the one
            that the edit names.
        output: Folder to write.
        dtype: Number format of the written model. By default that of the model the edit was made
            in.
        check: Compare the hash of the weights with that of the edit's base. Turn this off to add
            the edit to another model on purpose.
        force: Replace a model that lies in the output folder.

    Returns:
        What was written.

    Raises:
        ArtifactError: If the edit is damaged or belongs to other weights, or the output folder
            must not be replaced.
        ModelError: If the model cannot be loaded.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> from lightning_edit import WeightDelta
        >>> folder, base = getfixture("tmp_path"), tiny_model()
        >>> base.save_pretrained(folder / "base")
        >>> delta = {"model.norm.weight": base.model.norm.weight.detach()}
        >>> _ = WeightDelta(delta).save(folder / "delta")
        >>> done = apply(str(folder / "delta"), str(folder / "base"), str(folder / "edited"))
        >>> done.what, sorted(path.name for path in done.folder.iterdir())[:2]
        ('edited model', ['README.md', 'config.json'])
    """
    from lightning_edit.artifacts.export import check_output, model_card, save_model
    from lightning_edit.core.delta import WeightDelta
    from lightning_edit.models import load_model

    artifact = _artifact(delta)
    edit = WeightDelta.load(artifact)
    base, kept = edit.provenance.base, set(edit.originals)
    source = _base_name(edit, artifact, model)
    folder = check_output(output, force=force, inputs=(artifact, source))
    revision = base.revision if source == base.id else None
    with _named_by(edit, given=model is not None):
        loaded = load_model(source, revision=revision, dtype=_recorded_dtype(edit))
    _apply(edit, loaded, dtype, check=check)
    has_tokenizer = save_model(
        loaded,
        folder,
        source=source,
        revision=revision,
        card=model_card(edit.provenance, edit.norm()),
    )
    notes = [] if has_tokenizer else ["The base has no tokenizer that could be copied."]
    if check and not base.sha256:
        notes.append("The edit does not record its base's hash, so the base was not checked.")
    if any(name not in kept for name in edit.changes):
        notes.append("The edit was saved without originals, so it cannot be undone exactly.")
    elif dtype in (None, base.dtype):
        words = ("lightning-edit", "revert", str(artifact), "--model", str(folder))
        notes.append(f"Undo with: {shlex.join(words)}")
    facts = {"base": source, **_facts(edit), "dtype": _dtype_of(loaded)}
    return Written(folder, "edited model", facts, tuple(notes))


def revert(
    delta: str,
    model: str = "edited",
    output: str = "restored",
    check: bool = True,
    force: bool = False,
) -> Written:
    """Writes a copy of an edited model without the edit: the original, bit for bit.

    Args:
        delta: Folder of the saved edit, or of the run that saved it.
        model: Folder of the edited model.
        output: Folder to write.
        check: Compare the hash of the result with that of the edit's base. Turn this off to take
            out one edit of several that a model has.
        force: Replace a model that lies in the output folder.

    Returns:
        What was written.

    Raises:
        ArtifactError: If the edit was saved without originals or is not in the model, if the
            result is not the base, or the output folder must not be replaced.
        ModelError: If the model cannot be loaded.
    """
    from lightning_edit.artifacts.export import check_output, save_model
    from lightning_edit.core.delta import WeightDelta
    from lightning_edit.core.errors import ArtifactError
    from lightning_edit.core.hashing import weight_hash
    from lightning_edit.models import load_model

    artifact = _artifact(delta)
    edit = WeightDelta.load(artifact)
    folder = check_output(output, force=force, inputs=(artifact, model))
    loaded = load_model(model, dtype="auto")
    edit.revert_(loaded)
    expected = edit.provenance.base.sha256
    found = weight_hash(loaded) if expected else ""
    if check and found != expected:
        raise ArtifactError(
            f"What the edit changed in `{model}` is as it was before, but the model has the "
            f"weight hash {found[:12]}…, and the edit's base {expected[:12]}…: another edit is "
            "in it too. Undo later edits first, or keep them with `check=False` (`--no_check`)."
        )
    has_tokenizer = save_model(loaded, folder, source=model)
    notes = [] if has_tokenizer else ["The edited model has no tokenizer that could be copied."]
    if expected and found == expected:
        notes.append(f"Every bit is that of the base: its weight hash is {expected[:12]}….")
    elif expected:
        notes.append("Other changes are left in the model: it is not the edit's base.")
    else:
        notes.append("The edit does not record its base's hash, so the result was not checked.")
    facts = {"edited model": model, **_facts(edit)}
    return Written(folder, "restored model", facts, tuple(notes))


def diff(first: str, second: str) -> Comparison:
    """Compares two saved edits, two models, or an edit and a model, parameter by parameter.

    Args:
        first: Folder of a saved edit or a model; a model may also be a hub id or `smollm2`.
        second: The same. Of two models, the one that came later.

    Returns:
        One row for each changed parameter, and what the requests have in common.

    Raises:
        ArtifactError: If an edit is damaged, or the two do not fit together.
        ModelError: If a model cannot be loaded.
    """
    from lightning_edit.artifacts.catalog import ARTIFACT
    from lightning_edit.artifacts.comparison import (
        compare_edits,
        compare_models,
        compare_with_model,
    )
    from lightning_edit.core.delta import WeightDelta
    from lightning_edit.models import load_model

    def read(name: str) -> Any:
        folder = _artifact(name)
        if (folder / ARTIFACT).is_file():
            return WeightDelta.load(folder)
        return load_model(name, dtype="auto")

    one, other = read(first), read(second)
    match isinstance(one, WeightDelta), isinstance(other, WeightDelta):
        case True, True:
            return compare_edits(one, other, (first, second))
        case True, False:
            return compare_with_model(one, other, (first, second))
        case False, True:
            return compare_with_model(other, one, (second, first))
    return compare_models(one, other, (first, second))


def export(
    delta: str,
    to: Literal["lora", "hf"] = "lora",
    output: str = "exported",
    model: str | None = None,
    rank: int | None = None,
    force: bool = False,
) -> Written:
    """Writes a saved edit in the format of another program.

    A change of rank r is a LoRA adapter of rank r, exactly. Dense changes are cut to their
    largest singular values, and what that leaves out is reported.

    Args:
        delta: Folder of the saved edit, or of the run that saved it.
        to: `lora` is an adapter that peft loads beside the base model; `hf` a whole edited
            model, as `apply` writes it.
        output: Folder to write.
        model: The base model, of which an adapter needs only the configuration. By default the
            one that the edit names.
        rank: Largest rank of the adapter in a module. By default nothing is left out.
        force: Replace a model or an adapter that lies in the output folder.

    Returns:
        What was written.

    Raises:
        ArtifactError: If an adapter cannot hold the edit (it changes norms, biases or
            embeddings, or a dense change needs a `rank`), or the edit is damaged.
        ModelError: If the model cannot be found.
    """
    from lightning_edit.artifacts.export import check_output, model_skeleton, save_adapter
    from lightning_edit.core.delta import WeightDelta
    from lightning_edit.core.errors import ArtifactError

    if to == "hf":
        if rank is not None:
            raise ArtifactError(
                "`rank` is of adapters, but `hf` writes the whole model, exactly. Leave it out, "
                "or export to `lora`."
            )
        return apply(delta, model, output, force=force)
    artifact = _artifact(delta)
    edit = WeightDelta.load(artifact)
    base = edit.provenance.base
    source = _base_name(edit, artifact, model)
    folder = check_output(output, force=force, inputs=(artifact, source))
    with _named_by(edit, given=model is not None):
        skeleton = model_skeleton(source, base.revision if source == base.id else None)
    factors = edit.to_lora(skeleton, rank)
    save_adapter(
        factors,
        folder,
        provenance=edit.provenance,
        is_encoder_decoder=bool(skeleton.config.is_encoder_decoder),
    )
    worst = max(factors, key=lambda name: factors[name].relative_error)
    error = factors[worst].relative_error
    ranks = sorted({pair.rank for pair in factors.values()})
    facts = {
        "base": source,
        **_facts(edit),
        "rank": " to ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))),
        "left out": f"{error:.2g} of the change at most" if error else "nothing",
    }
    notes = (f"The most is left out of `{worst}`.",) if error > 1e-5 else ()
    return Written(folder, "LoRA adapter", facts, notes)


def report(
    folder: str, format: Literal["html", "md", "json", "latex", "csv", "all"] = "all"
) -> Rendered:
    """Writes the report of a run again, from its `results.json`; or gives its table as text.

    Args:
        folder: Folder of the run.
        format: `html`, `md` and `json` write that file; `all` writes every file of the report;
            `latex` and `csv` write none but give the table of the metrics.

    Returns:
        The report, and what was made of it.

    Raises:
        ArtifactError: If the folder holds no report, or a damaged one.
    """
    from lightning_edit.report import metrics_table, read_report, write_results
    from lightning_edit.report.files import EDITS, FILES, RESULTS, is_foreign_card

    found = read_report(folder)
    if format in ("latex", "csv"):
        return Rendered(found, text=metrics_table(found, format))
    files = {"html": ("report.html",), "md": ("report.md",), "json": (EDITS, RESULTS)}
    everything = [name for name in FILES if not is_foreign_card(Path(folder) / name)]
    wanted = files.get(format, everything)
    write_results(found, folder, wanted)
    return Rendered(found, tuple(Path(folder) / name for name in wanted))


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
    from lightning_edit.artifacts.catalog import offers, saved_edits

    if folder is not None:
        return saved_edits(folder)
    return offers(None if what == "all" else what)


def _artifact(name: str) -> Path:
    from lightning_edit.artifacts.catalog import find_edit

    return find_edit(Path(name).expanduser())


def _base_name(edit: Any, artifact: Path, model: str | None) -> str:
    from lightning_edit.core.errors import ArtifactError

    name = model or edit.provenance.base.id
    if not name:
        raise ArtifactError(
            f"The edit in `{artifact}` does not record its base model. Name it with `model`."
        )
    return name


@contextmanager
def _named_by(edit: Any, *, given: bool) -> Iterator[None]:
    """Says where the name of a model that cannot be loaded comes from."""
    from lightning_edit.core.errors import ModelError

    try:
        yield
    except ModelError as error:
        if given:
            raise
        raise ModelError(
            f"The edit records its base model as `{edit.provenance.base.id}`, which cannot be "
            f"loaded. If it lies elsewhere, name it with `model`. {error}"
        ) from error


def _recorded_dtype(edit: Any) -> Literal["auto", "float32", "bfloat16", "float16"]:
    match str(edit.provenance.base.dtype):
        case "float32" | "bfloat16" | "float16" as name:
            return name
    return "auto"


def _apply(edit: Any, model: Any, dtype: DType | None, *, check: bool) -> None:
    """Applies an edit so that the change is rounded once, to the number format asked for."""
    import torch

    kind = getattr(torch, dtype) if dtype else model.dtype
    if torch.finfo(kind).eps >= torch.finfo(model.dtype).eps:
        edit.apply_(model, check=check)
        model.to(kind)
        return
    if check:
        edit.check_base(model)
    model.to(kind)
    edit.apply_(model, check=False)


def _facts(edit: Any) -> dict[str, Any]:
    ids = edit.provenance.request_ids
    facts: dict[str, Any] = {"method": edit.provenance.method} if edit.provenance.method else {}
    if ids:
        facts["requests"] = f"{len(ids)}: {', '.join(ids[:5])}{', …' if len(ids) > 5 else ''}"
    names = list(edit.changes)
    facts["changed"] = names[0] if len(names) == 1 else f"{len(names)} parameters"
    facts["‖Δ‖"] = edit.norm()
    return facts


def _dtype_of(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
