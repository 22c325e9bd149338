# Copyright the lightning_edit developers.
# SPDX-License-Identifier: Apache-2.0
"""Pure tensor mathematics."""

from lightning_edit.functional.bootstrap import (
    cluster_means,
    cluster_weights,
    percentile_interval,
    sign_flip_p,
)
from lightning_edit.functional.conflict import (
    conflict_magnitude,
    ignore_rate,
    knowledge_distortion,
)
from lightning_edit.functional.counterfact import (
    edit_score,
    efficacy_magnitude,
    efficacy_success,
    neighborhood_magnitude,
    neighborhood_success,
)
from lightning_edit.functional.fluency import ngram_entropy, ngram_fluency
from lightning_edit.functional.intervals import wilson_interval
from lightning_edit.functional.matching import (
    answer_matches,
    autoregressive_hit,
    completion_matches,
    contains_answer,
    normalize_answer,
    states_answer,
    token_f1,
)
from lightning_edit.functional.metrics import (
    kl_divergence,
    locality_agreement,
    mirage_gap,
    token_accuracy,
)
from lightning_edit.functional.retention import (
    average_retention,
    early_retention,
    edits_held,
    forgetting,
    retention_area,
    retention_by_age,
)
from lightning_edit.functional.routing import routing_similarity

__all__ = [
    "answer_matches",
    "autoregressive_hit",
    "average_retention",
    "cluster_means",
    "cluster_weights",
    "completion_matches",
    "conflict_magnitude",
    "contains_answer",
    "early_retention",
    "edit_score",
    "edits_held",
    "efficacy_magnitude",
    "efficacy_success",
    "forgetting",
    "ignore_rate",
    "kl_divergence",
    "knowledge_distortion",
    "locality_agreement",
    "mirage_gap",
    "neighborhood_magnitude",
    "neighborhood_success",
    "ngram_entropy",
    "ngram_fluency",
    "normalize_answer",
    "percentile_interval",
    "retention_area",
    "retention_by_age",
    "routing_similarity",
    "sign_flip_p",
    "states_answer",
    "token_accuracy",
    "token_f1",
    "wilson_interval",
]
