# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""What edits do beside what was asked for: to prose, to fluency, to prompts in another guise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lightning_edit.core.batch import PromptTokenizer
from lightning_edit.core.errors import MissingDependencyError
from lightning_edit.core.request import EditRequest, is_question
from lightning_edit.evaluation.harness import log_likelihoods
from lightning_edit.evaluation.scoring import continuations, prompt_ids
from lightning_edit.functional.matching import autoregressive_hit
from lightning_edit.metrics.fluency import Fluency
from lightning_edit.passes.borrowing import borrowed
from lightning_edit.passes.decoding import GREEDY, write

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DENIALS", "PREFIXES", "answered", "capabilities", "fluency"]

#: Texts that have nothing to do with any fact; an edit is to hold behind them.
PREFIXES = (
    "It rained all afternoon, and the streets were empty. {}",
    "The meeting was moved to Thursday at ten. {}",
    "She closed the book and looked out of the window. {}",
)
#: Denials of a prompt; an edit is not to be repeated after them.
DENIALS = ("It is false to say: {}", "The following is not true. {}")


def answered(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    *,
    max_new_tokens: int = 24,
) -> float:
    """Share of the prompts in templates after which a model writes the new answer.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        requests: Requests, whose prompts are put into each template.
        templates: Texts with ``{}`` for the prompt.
        max_new_tokens: Longest continuation that is read, in tokens.

    Examples:
        >>> from lightning_edit.demos import tiny_requests, trained_tiny_model
        >>> model, tokenizer = trained_tiny_model()
        >>> old = [request.reversed() for request in tiny_requests(2)]
        >>> answered(model, PromptTokenizer(tokenizer), old, ["{}"])
        1.0
    """
    asked = [(t.replace("{}", r.prompt), r) for r in requests for t in templates]
    written = continuations(
        model, tokens, [prompt for prompt, _ in asked], max_new_tokens=max_new_tokens
    )
    hits = (
        autoregressive_hit(is_question(prompt), said.text, [request.target_new])
        for (prompt, request), said in zip(asked, written, strict=True)
    )
    return sum(hits) / len(asked)


@torch.no_grad()
def fluency(
    model: PreTrainedModel, tokens: PromptTokenizer, prompts: Sequence[str], *, length: int = 60
) -> float:
    """How little a model repeats itself in what it writes greedily after prompts, in [0, 1].

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        prompts: Texts to continue.
        length: Tokens of each continuation, neither less nor more.
    """
    metric = Fluency()
    settings = {**GREEDY, "max_new_tokens": length, "min_new_tokens": length}
    asked = prompt_ids(model, tokens, prompts)
    by_length: dict[int, list[list[int]]] = {}
    for ids in asked.values():
        by_length.setdefault(len(ids), []).append(list(ids))
    with borrowed(model):
        for rows in by_length.values():  # of one length, so that nothing is padded
            start = torch.tensor(rows, device=next(model.parameters()).device)
            texts = write(model, tokens, start, torch.ones_like(start), settings)
            metric.update(texts[:, -length:].tolist())
    return float(metric.compute())


def capabilities(
    model: PreTrainedModel,
    tokens: PromptTokenizer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | None = None,
) -> dict[str, float]:
    """Scores of lm-eval's tasks, with a model's edits in it, memories included.

    Args:
        model: A Hugging Face language model.
        tokens: Its tokenizer.
        tasks: Names of tasks of lm-eval, or of your own in ``include_path``.
        limit: Documents of each task; all of them when None.
        include_path: Folder of further tasks in YAML.

    Returns:
        ``<task>/<metric>`` to its value, without the standard errors.

    Raises:
        MissingDependencyError: If lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("lm_eval"):
            raise
        raise MissingDependencyError("lm-eval", "capability", "Measuring capabilities") from None

    class Edited(HFLM):  # type: ignore[misc, unused-ignore]
        """Has a memory know where prompts end."""

        def loglikelihood(
            self, requests: Sequence[object], **_: object
        ) -> list[tuple[float, bool]]:
            pairs = [request.args for request in requests]  # type: ignore[attr-defined]
            return log_likelihoods(model, tokens.tokenizer, pairs)

    with borrowed(model):
        found = simple_evaluate(
            model=Edited(pretrained=model, tokenizer=tokens.tokenizer, batch_size=1),
            tasks=list(tasks),
            limit=limit,
            task_manager=TaskManager(include_path=include_path),
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    return dict(_scores(found["results"]))


def _scores(results: Mapping[str, Mapping[str, object]]) -> Iterator[tuple[str, float]]:
    for task, values in results.items():
        for name, value in values.items():
            metric, _, way = name.partition(",")
            if isinstance(value, (int, float)) and way and not metric.endswith("_stderr"):
                yield f"{task}/{metric}", float(value)
