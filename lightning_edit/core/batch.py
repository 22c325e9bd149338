# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""From text to tokens: the one place where prompts, subjects and targets are tokenized."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from lightning_edit.core.errors import ModelError, RequestError
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["IGNORE_INDEX", "EditBatch", "PromptTokenizer", "pad_rows", "space_between"]

IGNORE_INDEX = -100


class PromptTokenizer:
    """Tokenizes prompts, targets and subjects alike for every method and metric.

    Prompts and targets are tokenized apart and concatenated, so that a prompt's tokens never
    depend on its target. A target gets one leading space unless the prompt ends in white space,
    the script is written without spaces, or a chat template ends the prompt.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        chat_template: Wrap each prompt as a user's message of the tokenizer's chat template.
        is_encoder_decoder: The target goes to the decoder and ends with the end token.
        max_length: Most tokens that the model has positions for; no bound when None.

    Raises:
        ModelError: If the tokenizer gives no character offsets, or has no chat template where
            one is asked for.

    Examples:
        >>> from lightning_edit.demos import tiny_tokenizer
        >>> tokens = PromptTokenizer(tiny_tokenizer())
        >>> tokens.target("The capital of Veloria is", "Brask") == tokens.target("x", " Brask")
        True
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        chat_template: bool = False,
        is_encoder_decoder: bool = False,
        max_length: int | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "The tokenizer gives no character offsets, by which subjects are found. Load a "
                "fast tokenizer (`AutoTokenizer.from_pretrained(..., use_fast=True)`)."
            )
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise ModelError("`chat_template=True`, but the tokenizer has no chat template.")
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.is_encoder_decoder = is_encoder_decoder
        self.max_length = max_length

    @property
    def pad_id(self) -> int:
        """A token to fill rows with. Masks go by lengths, so it may equal the end token."""
        for name in ("pad_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0

    @property
    def eos_id(self) -> int | None:
        """The end token, where there is one."""
        token = self.tokenizer.eos_token_id
        return None if token is None else int(token)

    def render(self, prompt: str) -> str:
        """The text that stands for the prompt after templating."""
        if not self.chat_template:
            return prompt
        return str(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
        )

    def prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the model expects before it."""
        return self._encode(self.render(prompt))[0]

    def target(self, prompt: str, target: str) -> list[int]:
        """Token ids of an answer that follows a prompt, with the end token for a decoder.

        Raises:
            RequestError: If the answer has no tokens.
        """
        text = self.leading_space(prompt, target) + target
        ids = [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]
        if not ids:
            raise RequestError(f"The target {target!r} of {prompt!r} has no tokens.")
        if self.is_encoder_decoder and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def leading_space(self, prompt: str, target: str) -> str:
        """The white space to put between a prompt and its answer: one space or none."""
        if self.chat_template or self.is_encoder_decoder:
            return ""
        return space_between(prompt, target)

    def subject_last(self, text: str, subject: str, prefix: str = "") -> tuple[list[int], int]:
        """Tokens of ``prefix + text`` and the index of the token that ends the subject.

        Args:
            text: A prompt that holds the subject; its first occurrence counts.
            subject: Text of the subject.
            prefix: Context put before the prompt.

        Returns:
            Token ids of the whole row and an index into them.

        Raises:
            RequestError: If the subject is not in the text, or the chat template changes the text.
        """
        ids, inside = self.subject_range(text, subject, prefix)
        return ids, inside[-1]

    def subject_range(self, text: str, subject: str, prefix: str = "") -> tuple[list[int], range]:
        """Tokens of ``prefix + text`` and the indices of those that hold the subject.

        The subject's characters are found by offsets, after templating: merges over its
        boundaries, quotes and scripts without spaces are no obstacle.

        Args:
            text: A prompt that holds the subject; its first occurrence counts.
            subject: Text of the subject.
            prefix: Context put before the prompt.

        Returns:
            Token ids of the whole row and a range of indices into them.

        Raises:
            RequestError: If the subject is not in the text, or the chat template changes the text.
        """
        if subject not in text:
            raise RequestError(f"The subject {subject!r} does not occur in {text!r}.")
        whole, rendered = prefix + text, self.render(prefix + text)
        at = len(prefix) + text.index(subject)
        if whole not in rendered:  # chat templates may strip white space
            at -= len(whole) - len(whole.lstrip())
            whole = whole.strip()
        if whole not in rendered:
            raise RequestError(
                f"The chat template changes the prompt {whole!r}, so that the subject cannot be "
                f"found in it: {rendered!r}. Turn `chat_template` off."
            )
        start = rendered.index(whole) + at
        end = start + len(subject)
        ids, offsets = self._encode(rendered)
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if not inside:
            raise RequestError(f"No token of {rendered!r} covers the subject {subject!r}.")
        return ids, range(inside[0], inside[-1] + 1)

    def check_length(
        self, request: EditRequest, prompt: int, target: int, prefix: str = ""
    ) -> None:
        """Checks that a model has positions for a request.

        Args:
            request: Named in the error.
            prompt: Tokens of its prompt.
            target: Tokens of its target.
            prefix: Context before the prompt, named in the error.

        Raises:
            RequestError: If the row is longer than ``max_length``.
        """
        longest = max(prompt, target) if self.is_encoder_decoder else prompt + target
        if self.max_length is None or longest <= self.max_length:
            return
        context = f" behind the context {prefix!r}" if prefix else ""
        raise RequestError(
            f"Request {request.id!r}: its prompt has {prompt} tokens{context} and its target "
            f"{target}, but the model has positions for {self.max_length}. Shorten the "
            f"{'target' if target > prompt else 'prompt'}, or choose a model with a longer context."
        )

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        # A chat template writes its own special tokens.
        encoded = self.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=not self.chat_template
        )
        ids = [int(i) for i in encoded["input_ids"]]
        offsets = list(encoded["offset_mapping"])
        is_ended = self.eos_id is not None and ids[-1:] == [self.eos_id]
        if is_ended and not self.is_encoder_decoder and offsets[-1][0] == offsets[-1][1]:
            # The tokenizer ends every text, but the target is still to follow.
            return ids[:-1], offsets[:-1]
        return ids, offsets


@dataclass(frozen=True)
class EditBatch:
    """Edit requests as tokens, padded on the right.

    Args:
        requests: The requests, B of them.
        input_ids: Prompt and target tokens, [B, T]; the prompt alone for an encoder-decoder.
        attention_mask: 1 on tokens, 0 on padding, [B, T].
        labels: Target tokens in their places and -100 elsewhere, [B, T]; [B, U] for the decoder
            of an encoder-decoder.
        prompt_lengths: Number of prompt tokens, [B].
        tokens: The tokenizer that made the batch.
        processes: Those that hold this very batch, whose work they may share out.
        pass_dtype: Precision of passes that a method may round, from the Trainer's ``bf16-mixed``
            or the caller's autocast; None for that of the weights.
    """

    requests: tuple[EditRequest, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_lengths: Tensor
    tokens: PromptTokenizer
    processes: Processes = field(default_factory=Processes)
    pass_dtype: torch.dtype | None = None

    @classmethod
    def from_requests(cls, requests: Sequence[EditRequest], tokens: PromptTokenizer) -> Self:
        """Tokenizes requests.

        Raises:
            RequestError: If there is none, a target has no tokens, or a request is longer than
                the model's context.
        """
        if not requests:
            raise RequestError("A batch of edits is empty. Give at least one request.")
        prompts = [tokens.prompt(request.prompt) for request in requests]
        targets = [tokens.target(r.prompt, r.target_new) for r in requests]
        for request, prompt, target in zip(requests, prompts, targets, strict=True):
            tokens.check_length(request, len(prompt), len(target))
        return cls.from_ids(prompts, targets, tokens, tuple(requests))

    @classmethod
    def from_ids(
        cls,
        prompts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        tokens: PromptTokenizer,
        requests: tuple[EditRequest, ...] = (),
    ) -> Self:
        """Pads token ids that are given already."""
        if tokens.is_encoder_decoder:
            input_ids, mask = pad_rows(prompts, tokens.pad_id)
            labels, _ = pad_rows(targets, IGNORE_INDEX)
        else:
            input_ids, mask = pad_rows(
                [[*p, *t] for p, t in zip(prompts, targets, strict=True)], tokens.pad_id
            )
            labels, _ = pad_rows(
                [[IGNORE_INDEX] * len(p) + [*t] for p, t in zip(prompts, targets, strict=True)],
                IGNORE_INDEX,
            )
        lengths = torch.tensor([len(p) for p in prompts])
        return cls(requests, input_ids, mask, labels, lengths, tokens)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str | int) -> Self:
        """Moves the tensors to a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            prompt_lengths=self.prompt_lengths.to(device),
        )

    def select(self, indices: Sequence[int]) -> Self:
        """The batch of some of the requests, in the order given."""
        rows = torch.tensor(list(indices), dtype=torch.long, device=self.input_ids.device)
        return replace(
            self,
            requests=tuple(self.requests[i] for i in indices) if self.requests else (),
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            labels=self.labels[rows],
            prompt_lengths=self.prompt_lengths[rows],
        )


def pad_rows(
    rows: Sequence[Sequence[int]], fill: int, *, side: str = "right"
) -> tuple[Tensor, Tensor]:
    """Pads rows of ids to one length.

    Args:
        rows: B sequences of any lengths.
        fill: Value of the padding.
        side: ``right`` or ``left``: where the padding goes.

    Returns:
        The ids and a mask that is 1 on given ids, both [B, T] int64.

    Examples:
        >>> pad_rows([[1, 2], [3]], 0, side="left")[0].tolist()
        [[1, 2], [0, 3]]
    """
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), fill)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, columns] = torch.tensor(list(row), dtype=torch.long)
        mask[i, columns] = 1
    return ids, mask


def space_between(text: str, more: str) -> str:
    """The white space to put between two pieces of running text: one space or none.

    Examples:
        >>> space_between("The capital of France is", "Paris"), space_between("首都は", "東京")
        (' ', '')
    """
    is_spaced = text[-1:].isspace() or more[:1].isspace() or _is_unspaced(more[:1])
    return "" if is_spaced else " "


def _is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that sets no spaces between words."""
    name = unicodedata.name(character, "") if character else ""
    return name.startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "IDEOGRAPHIC"))
