# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""From text to tokens: the one place where prompts, subjects and targets are tokenized."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from lightning_edit.core.documents import check_text
from lightning_edit.core.errors import FailedRequestsError, ModelError, RequestError
from lightning_edit.core.processes import Processes
from lightning_edit.core.request import EditRequest
from lightning_edit.core.spacing import space_between, word_starts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["IGNORE_INDEX", "EditBatch", "PromptTokenizer", "TemplateValue", "pad_rows"]

IGNORE_INDEX = -100
TemplateValue = bool | int | float | str
# Arguments of `apply_chat_template` that are not the template's.
_RESERVED = ("add_generation_prompt", "continue_final_message", "conversation", "tokenize")
# Texts that tokens hardly merge with, to read another text as it reads within a longer one.
_ANCHORS = ("\n", ".", "x")
_STAND_IN = "\ue000"  # for a message, where only what the chat template puts around it counts


class PromptTokenizer:
    """Tokenizes prompts, targets and subjects alike for every method and metric.

    A target has the tokens that it has in the running text of prompt and target. Where a token of
    that text reaches over the seam, the prompt keeps the tokens that it has alone, since these are
    what a model is asked with, and the target has those of a piece of running text. Whether a space
    stands between them is a matter of running text as well, unless a request says it; a chat
    template says it for its messages, and the target of an encoder-decoder begins a text.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        chat_template: Wrap each prompt as a user's message of the tokenizer's chat template.
        is_encoder_decoder: The target goes to the decoder and ends with the end token.
        max_length: Most tokens that the model has positions for; no bound when None.
        chat_template_kwargs: Arguments of the chat template, such as
            ``{"enable_thinking": False}``.
        system_prompt: The system's message before each prompt, in the chat template.

    Raises:
        ModelError: If the tokenizer gives no character offsets, has no chat template where one is
            asked for, or one that does not know the arguments or the system's message.

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
        chat_template_kwargs: Mapping[str, TemplateValue] | None = None,
        system_prompt: str | None = None,
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
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.system_prompt = system_prompt
        if self.chat_template_kwargs or system_prompt is not None:
            self._check_template()

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
        return self._render(prompt) if self.chat_template else prompt

    def prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with the special tokens the model expects before it."""
        return self._encode(self.render(prompt))[0]

    def target(self, prompt: str, target: str, glued: bool | None = None) -> list[int]:
        """Token ids of an answer that follows a prompt, with the end token for a decoder.

        Args:
            prompt: What is asked, as it is given to ``prompt``.
            target: The answer.
            glued: Whether the answer follows without a space; as running text has it if None.

        Raises:
            RequestError: If the answer has no tokens.
        """
        text = self.leading_space(prompt, target, glued) + target
        if self.is_encoder_decoder:
            ids = self._plain(text)
        else:
            rendered = self.render(prompt)
            before, whole = self._encode(rendered)[0], self._encode(rendered + text)[0]
            is_apart = whole[: len(before)] == before
            ids = whole[len(before) :] if is_apart else self._running(text)
        if not ids:
            raise RequestError(f"The target {target!r} of {prompt!r} has no tokens.")
        if self.is_encoder_decoder and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def leading_space(self, prompt: str, target: str, glued: bool | None = None) -> str:
        """The white space to put between a prompt and its answer: one space or none.

        Args:
            prompt: What is asked.
            target: The answer.
            glued: Whether the answer follows without a space; as running text has it if None.
                Of no account where a chat template or a decoder begins the answer anew.
        """
        if self.is_encoder_decoder:
            return ""
        return self._frame[1] if self.chat_template else space_between(prompt, target, glued)

    def subject_last(
        self, text: str, subject: str, prefix: str = "", start: int | None = None
    ) -> tuple[list[int], int]:
        """Tokens of ``prefix + text`` and the index of the token that ends the subject.

        Args:
            text: A prompt that holds the subject.
            subject: Text of the subject.
            prefix: Context put before the prompt.
            start: Where the subject begins in the prompt, as a request's ``subject_start``; at the
                first place where it is a word of its own if None, or else at the first one.

        Returns:
            Token ids of the whole row and an index into them.

        Raises:
            RequestError: If the subject is not in the text, or the chat template changes the text.
        """
        ids, inside = self.subject_range(text, subject, prefix, start)
        return ids, inside[-1]

    def subject_of(self, request: EditRequest, prefix: str = "") -> tuple[list[int], int]:
        """Tokens of a request's prompt and the position of its subject's last token.

        Args:
            request: The request; its ``subject_start`` counts.
            prefix: As in ``subject_last``.
        """
        return self.subject_last(request.prompt, request.subject, prefix, request.subject_start)

    def subject_range(
        self, text: str, subject: str, prefix: str = "", start: int | None = None
    ) -> tuple[list[int], range]:
        """Tokens of ``prefix + text`` and the indices of those that hold the subject.

        The subject's characters are found by offsets, after templating: merges over its
        boundaries, quotes and scripts without spaces are no obstacle.

        Args:
            text: A prompt that holds the subject.
            subject: Text of the subject.
            prefix: Context put before the prompt.
            start: Where the subject begins in the prompt, as a request's ``subject_start``; at the
                first place where it is a word of its own if None, or else at the first one.

        Returns:
            Token ids of the whole row and a range of indices into them.

        Raises:
            RequestError: If the subject is not in the text, or the chat template changes the text.
        """
        if not subject:
            raise RequestError(f"No subject is named in {text!r}. Give the request its `subject`.")
        if subject not in text:
            raise RequestError(f"The subject {subject!r} does not occur in {text!r}.")
        if start is None:
            start = next(iter(word_starts(text, subject)), text.index(subject))
        whole, rendered = prefix + text, self.render(prefix + text)
        at, begin = len(prefix) + start, len(self._frame[0]) if self.chat_template else 0
        if not rendered.startswith(whole, begin):  # chat templates may strip white space
            at -= len(whole) - len(whole.lstrip())
            whole = whole.strip()
        if not rendered.startswith(whole, begin):
            raise RequestError(
                f"The chat template changes the prompt {whole!r}, so that the subject cannot be "
                f"found in it: {rendered!r}. Turn `chat_template` off."
            )
        first = begin + at
        end = first + len(subject)
        ids, offsets = self._encode(rendered)
        inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > first]
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

    def _render(self, prompt: str, answer: str | None = None) -> str:
        """A conversation: the prompt, and its answer where there is one."""
        system = [] if self.system_prompt is None else [("system", self.system_prompt)]
        replies = [] if answer is None else [("assistant", answer)]
        messages = [*system, ("user", prompt), *replies]
        return str(
            self.tokenizer.apply_chat_template(
                [{"role": role, "content": content} for role, content in messages],
                tokenize=False,
                add_generation_prompt=answer is None,
                **self.chat_template_kwargs,
            )
        )

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What the chat template puts before a prompt, and the white space before an answer."""
        asked = self._render(_STAND_IN)
        try:
            told = self._render(_STAND_IN, _STAND_IN)
        except Exception:  # templates raise errors of their own, and some know no answers
            told = ""
        space = ""
        if told.startswith(asked):
            space = told[len(asked) :].partition(_STAND_IN)[0]
        return asked.partition(_STAND_IN)[0], "" if space.strip() else space

    def _check_template(self) -> None:
        """Checks that the chat template takes the arguments and the system's message.

        Raises:
            ModelError: If it does not.
        """
        kwargs, system = self.chat_template_kwargs, self.system_prompt
        if not self.chat_template:
            raise ModelError(
                "`chat_template_kwargs` and `system_prompt` need the chat template. Set "
                "`chat_template=True`, or leave them out."
            )
        template = self.tokenizer.get_chat_template()
        for name in kwargs:
            if name in _RESERVED or not re.search(rf"\b{re.escape(name)}\b", template):
                raise ModelError(
                    f"`chat_template_kwargs` names {name!r}, which is no argument of this "
                    "tokenizer's chat template. Read `tokenizer.chat_template` for those it has."
                )
        try:
            is_told = system is None or system.strip() in self._render(_STAND_IN)
        except Exception as error:  # templates raise errors of their own
            raise ModelError(
                "The chat template refuses `chat_template_kwargs` or `system_prompt`: "
                f"{error}. Leave them out."
            ) from None
        if not is_told:
            raise ModelError(
                "The chat template passes over `system_prompt`. Leave it out, and write it into "
                "the prompts."
            )

    def _plain(self, text: str) -> list[int]:
        """Token ids of a text by itself, without special tokens."""
        encoded = self.tokenizer(_readable(text), add_special_tokens=False)
        return [int(i) for i in encoded["input_ids"]]

    def _running(self, text: str) -> list[int]:
        """Token ids of a text within a longer one: without what a tokenizer begins texts with."""
        for anchor in _ANCHORS:
            before, whole = self._plain(anchor), self._plain(anchor + text)
            if before and whole[: len(before)] == before:
                return whole[len(before) :]
        return self._plain(text)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        # A chat template writes its own special tokens.
        encoded = self.tokenizer(
            _readable(text), return_offsets_mapping=True, add_special_tokens=not self.chat_template
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
        targets = [tokens.target(r.prompt, r.target_new, r.glued) for r in requests]
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

    def without(self, reasons: Mapping[str, str]) -> Self:
        """The requests that did not fail.

        Args:
            reasons: Why requests failed, by id.

        Raises:
            FailedRequestsError: If none is left.
        """
        kept = [e for e, request in enumerate(self.requests) if request.id not in reasons]
        if not kept:
            raise FailedRequestsError(dict(reasons))
        return self.select(kept)

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


def _readable(text: str) -> str:
    """A text, if tokenizers can read it."""
    try:
        return check_text(text)
    except ValueError as error:
        raise RequestError(
            f"A text cannot be read by a tokenizer: {error}. Write the whole character."
        ) from None
