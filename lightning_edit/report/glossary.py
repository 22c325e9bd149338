# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""The metrics in plain words: names, what they ask, in which order they are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["METRICS", "READINGS", "MetricName", "Term", "metric_name", "sort_metrics"]


@dataclass(frozen=True)
class Term:
    """A word of the field and what it means to somebody who has never heard it.

    Args:
        label: How it is written in a table.
        question: What it asks, as one short question or phrase.
        meaning: The same in a full sentence.
        is_rate: Whether its values are shares in [0, 1].
    """

    label: str
    question: str
    meaning: str
    is_rate: bool = True


METRICS = {
    "reliability": Term(
        "Reliability",
        "Does it say the new answer?",
        "Share of the edits after which the model gives the new answer to the edited prompt.",
    ),
    "generality": Term(
        "Generality",
        "Also when asked in other words?",
        "Share of rephrased prompts to which the model gives the new answer.",
    ),
    "locality": Term(
        "Locality",
        "Do the neighbors stay as they were?",
        "Share of answers to questions beside the edit that are those of the unedited model.",
    ),
    "portability": Term(
        "Portability",
        "Do the consequences follow?",
        "Share of questions whose answer follows from the new fact that are answered so.",
    ),
    "efficacy_success": Term(
        "ES (efficacy success)",
        "New answer likelier than the old?",
        "Share of edited prompts where the new answer is more probable than the old one.",
    ),
    "paraphrase_success": Term(
        "PS (paraphrase success)",
        "The same, in other words?",
        "Share of rephrased prompts where the new answer is more probable than the old one.",
    ),
    "neighborhood_success": Term(
        "NS (neighborhood success)",
        "Neighbors keep the old answer?",
        "Share of neighboring prompts where their right answer is more probable than the new one.",
    ),
    "edit_score": Term("S (edit score)", "ES, PS and NS in one", "Harmonic mean of ES, PS and NS."),
    "retention": Term(
        "Retention",
        "Are earlier edits still there?",
        "Share of the earlier edits of a sequence that the model still answers with.",
    ),
    "perplexity_ratio": Term(
        "Perplexity ratio",
        "Is ordinary text as familiar as before?",
        "Perplexity of ordinary text after the edits over that before; 1 means no harm.",
        is_rate=False,
    ),
}

# The short names that papers print.
_ALIASES = {
    "es": "efficacy_success",
    "ps": "paraphrase_success",
    "ns": "neighborhood_success",
    "s": "edit_score",
}

READINGS = {
    "teacher_forced": Term(
        "teacher-forced",
        "each token, with the answer so far given",
        "Each token of the answer is predicted with the right tokens before it at hand: the "
        "reading of most papers, and a generous one.",
    ),
    "teacher_forced_strict": Term(
        "teacher-forced, all tokens",
        "every token right, with the answer so far given",
        "As teacher-forced, but an answer counts only when every one of its tokens is right.",
    ),
    "autoregressive": Term(
        "autoregressive",
        "as the model really writes",
        "The model writes on by itself from the prompt alone, as it would in use: the strict "
        "reading.",
    ),
    "stated": Term(
        "autoregressive, answer stated",
        "as the reply of a chat model",
        "The model writes by itself, and what counts is whether its first sentence states the "
        "answer without denying it.",
    ),
    "contains": Term(
        "autoregressive, answer contained",
        "whether the answer stands anywhere in what it writes",
        "The model writes by itself, and what counts is whether the answer stands anywhere in it: "
        "a generous reading, for a text that denies the answer contains it, too.",
    ),
    "token_f1": Term(
        "autoregressive, token F1",
        "how many words it shares with the answer",
        "The model writes by itself; F1 of its words and those of the answer, for answers that may "
        "be worded in several ways.",
    ),
    "kl": Term(
        "KL divergence (nats)",
        "how far the predictions moved",
        "Kullback-Leibler divergence of the predictions after the edits from those before.",
        is_rate=False,
    ),
}


@dataclass(frozen=True)
class MetricName:
    """A key of the metrics table, ``<metric>[/<kind>][/<reading>]``, taken apart.

    Args:
        metric: First part of the key.
        kind: What stands between metric and reading.
        reading: Last part of the key, where it is a reading.
    """

    metric: str
    kind: str
    reading: str

    @property
    def term(self) -> Term | None:
        """What the metric means, where it is known."""
        return METRICS.get(self.metric)

    @property
    def reading_term(self) -> Term | None:
        """What the reading means, where it is known."""
        return READINGS.get(self.reading)

    @property
    def label(self) -> str:
        """The metric as written in a table, with its kind.

        Examples:
            >>> metric_name("portability/one_hop/autoregressive").label
            'Portability (one hop)'
        """
        label = self.term.label if self.term else self.metric.replace("_", " ").capitalize()
        return f"{label} ({self.kind.replace('_', ' ').replace('/', ', ')})" if self.kind else label

    @property
    def reading_label(self) -> str:
        """The reading as written in a table; empty where the key has none."""
        return self.reading_term.label if self.reading_term else self.reading.replace("_", " ")

    @property
    def full_label(self) -> str:
        """The metric with its reading, as written in one line."""
        return ", ".join(filter(None, (self.label, self.reading_label)))

    @property
    def is_rate(self) -> bool:
        """Whether the values are shares in [0, 1], and thus may be drawn as bars."""
        reading = self.reading_term
        return self.term is not None and self.term.is_rate and (not reading or reading.is_rate)


def metric_name(key: str) -> MetricName:
    """Takes a key of the metrics table apart.

    Examples:
        >>> metric_name("reliability/teacher_forced")
        MetricName(metric='reliability', kind='', reading='teacher_forced')
        >>> metric_name("es")
        MetricName(metric='efficacy_success', kind='', reading='')
    """
    metric, _, rest = key.partition("/")
    kind, _, reading = rest.rpartition("/")
    return MetricName(_ALIASES.get(metric, metric), kind, reading)


def sort_metrics(keys: Iterable[str]) -> list[str]:
    """Puts metrics in reading order: the known ones as above, kinds after the whole, then others.

    Examples:
        >>> sort_metrics(["x", "locality/kl", "reliability/autoregressive",
        ...               "reliability/teacher_forced"])
        ['reliability/teacher_forced', 'reliability/autoregressive', 'locality/kl', 'x']
    """
    metrics, readings = list(METRICS), list(READINGS)

    def rank(key: str) -> tuple[int, str, int]:
        name = metric_name(key)
        return (
            metrics.index(name.metric) if name.metric in METRICS else len(metrics),
            name.kind,
            readings.index(name.reading) if name.reading in READINGS else len(readings),
        )

    return sorted(keys, key=rank)
