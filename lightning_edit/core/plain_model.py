# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Whether a model's weights are numbers in memory that edits can be added to, and the model itself.

What stands in the way is known by what it is: by the types of tensors and modules, and by hooks,
not by number formats, which plain weights have as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import ModelError, RequestError
from lightning_edit.core.probe import is_causal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "check_ids",
    "check_tokens",
    "check_weight",
    "check_weights",
    "check_writes",
    "encoder_alone",
]

# Packages whose tensors and modules hold quantized weights.
_QUANTIZERS = (
    "aqlm",
    "auto_gptq",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "eetq",
    "fbgemm_gpu",
    "gptqmodel",
    "hqq",
    "optimum.quanto",
    "quanto",
    "spqr_quant",
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torchao",
    "vptq",
)
# Modules of transformers' own that stand in the place of a model's are quantized ones.
_INTEGRATIONS = "transformers.integrations."
_EXPORTS = "transformers.integrations.executorch"
# What quantizers keep on a module that is a plain one by its type.
_MARKS = ("qweight", "quantization_scheme", "weight_packed")


def check_weights(model: nn.Module) -> None:
    """Checks that all weights of a model are in memory and none is quantized.

    Args:
        model: A language model.

    Raises:
        ModelError: If some are not, with the first of them and how to mend it.

    Examples:
        >>> from lightning_edit.demos import tiny_model
        >>> check_weights(tiny_model())
        >>> check_weights(tiny_model().to("meta"))
        Traceback (most recent call last):
        ...
        lightning_edit.core.errors.ModelError: LlamaForCausalLM is not in memory as a whole: ...
    """
    name = type(model).__name__
    for path, module in model.named_modules():
        kind = type(module)
        if _is_of_quantizer(kind) or any(hasattr(module, mark) for mark in _MARKS):
            raise _quantized(name, path, kind)
        if any(_offloads(hook) for hook in _hooks_of(module)):
            raise _offloaded(name, path)
    for path, parameter in model.named_parameters():
        check_weight(path, parameter, name)


def check_weight(path: str, weight: Tensor, model: str = "The model") -> None:
    """Checks that a weight is in memory and not quantized.

    Args:
        path: Its name.
        weight: The tensor.
        model: Name of the model, for the error.

    Raises:
        ModelError: If it is not.
    """
    local = getattr(weight, "_local_tensor", weight)  # of one that is sharded
    for tensor in (weight, local):
        kind = type(tensor)
        # Whoever keeps other numbers than those that a tensor shows says how they are got.
        hides = getattr(kind, "dequantize", None) is not Tensor.dequantize
        if tensor.is_quantized or hides or _is_of_quantizer(kind):
            raise _quantized(model, path, kind)
    if local.is_meta:
        raise _offloaded(model, path)


def check_writes(model: nn.Module) -> None:
    """Checks that a model writes from left to right.

    Args:
        model: A language model.

    Raises:
        ModelError: If it is an encoder alone, whose every position sees what follows.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or is_causal(model):
        return
    raise encoder_alone(type(model).__name__)


def encoder_alone(name: str) -> ModelError:
    """What is said of a model that does not write.

    Args:
        name: Its class.
    """
    return ModelError(
        f"{name} is an encoder alone: what it makes of a position depends on what follows it, so "
        "that it neither writes nor answers, which is what edits are made and measured by. Give a "
        "decoder, such as GPT-2, Llama or Qwen, or an encoder with a decoder, such as T5."
    )


def check_tokens(model: PreTrainedModel, tokens: PromptTokenizer) -> None:
    """Checks that a model writes, and knows the tokens that rows are filled and ended with.

    Args:
        model: A language model.
        tokens: Its tokenizer.

    Raises:
        ModelError: If it is an encoder alone, or one of the tokens is beyond its embedding, or that
            is not in memory.
    """
    for path, parameter in islice(model.named_parameters(), 1):  # which tells where rows go
        if parameter.is_meta:
            raise _offloaded(type(model).__name__, path)
    check_writes(model)
    rows = _embedding_rows(model)
    for what, token in (("pad", tokens.pad_id), ("eos", tokens.eos_id)):
        if rows and token is not None and token >= rows:
            text = tokens.tokenizer.convert_ids_to_tokens(token)
            raise ModelError(
                f"The {what} token {text!r} has the id {token}, but the embedding of "
                f"{type(model).__name__} has {rows} rows: the token was added to the tokenizer and "
                "is not in the model. Call `model.resize_token_embeddings(len(tokenizer))` first, "
                f"or set `tokenizer.{what}_token` to a token that the "
                "model has, such as its end token."
            )


def check_ids(
    model: PreTrainedModel, tokens: PromptTokenizer, rows: Iterable[Sequence[int]]
) -> None:
    """Checks that a model knows all tokens of some rows.

    Args:
        model: A language model.
        tokens: Its tokenizer.
        rows: Token ids.

    Raises:
        RequestError: If one of them is beyond the model's embedding.
    """
    known = _embedding_rows(model)
    for row in rows if known else ():
        most = max(row, default=0)
        if most >= known:
            text = tokens.tokenizer.convert_ids_to_tokens(most)
            raise RequestError(
                f"The token {text!r} has the id {most}, but the embedding of "
                f"{type(model).__name__} has {known} rows. Write the text without it, or call "
                "`model.resize_token_embeddings(len(tokenizer))` and train the token first."
            )


def _embedding_rows(model: PreTrainedModel) -> int:
    """Tokens that a model has an embedding of; 0 where that is not known."""
    get = getattr(model, "get_input_embeddings", None)
    embeddings = None if get is None else get()
    return int(getattr(embeddings, "num_embeddings", 0) or 0)


def _is_of_quantizer(kind: type) -> bool:
    names = [f"{base.__module__}." for base in kind.__mro__]
    if any(name.startswith(f"{package}.") for name in names for package in _QUANTIZERS):
        return True
    return names[0].startswith(_INTEGRATIONS) and not names[0].startswith(_EXPORTS)


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    """Hooks of accelerate on a module."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield hook
        yield from getattr(hook, "hooks", ())


def _offloads(hook: Any) -> bool:
    """Whether a hook of accelerate brings weights only while its module runs."""
    return bool(getattr(hook, "offload", False)) or type(hook).__name__ == "CpuOffload"


def _quantized(model: str, path: str, kind: type) -> ModelError:
    package = ".".join(kind.__module__.split(".")[:2])
    return ModelError(
        f"{model} is quantized: `{path}` is a {kind.__name__} of {package}, to which no edit can "
        "be added. Load the model unquantized, without `quantization_config`, in float32 or "
        "bfloat16; edit that, and quantize what comes out."
    )


def _offloaded(model: str, path: str) -> ModelError:
    return ModelError(
        f"{model} is not in memory as a whole: `{path}` is offloaded to the CPU or the disk, or "
        "was never loaded. Load it without `device_map` and `cpu_offload` onto one device that "
        "holds it, such as the CPU; where memory is short, in bfloat16."
    )
