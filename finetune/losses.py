"""Losses of one group: log-odds of a query's documents against their labels.

Decides what is minimised. Knows nothing of tokens, packs or batches; every function takes float32
log-odds s = logit(yes) - logit(no), shape (documents,), and returns a scalar.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, kl_div, log_softmax

GroupLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(log-odds, labels) of one group -> its loss."""


def pointwise(log_odds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log p(label) over the documents, label being yes or no.

    The objective of the Qwen3-Embedding report (arXiv 2506.05176), over two tokens instead of the
    vocabulary: p(yes) = sigmoid(s). Labels between 0 and 1 are soft targets.
    """
    return binary_cross_entropy_with_logits(log_odds, labels)


def listwise(log_odds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean over positives of -log softmax of that positive against the negatives.

    Positives do not compete with each other. Only differences count: the order is learnt, P("yes")
    is not. A group without positives or without negatives gives 0, with a gradient of 0.
    """
    positive, negative = log_odds[labels > 0], log_odds[labels <= 0]
    if not len(positive) or not len(negative):
        return (log_odds * 0).sum()
    rivals = negative.logsumexp(0)
    return (torch.logaddexp(positive, rivals) - positive).mean()


def hybrid(weight: float) -> GroupLoss:
    """Return pointwise + weight * listwise: an order, and a P("yes") that keeps its meaning."""
    return lambda log_odds, labels: (
        pointwise(log_odds, labels) + weight * listwise(log_odds, labels)
    )


def distill_kl(log_odds: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return KL(teacher || student) of the softmaxes over a group's log-odds (arXiv 2507.08336)."""
    return kl_div(
        log_softmax(log_odds, 0), log_softmax(scores, 0), log_target=True, reduction="sum"
    )


def distill_margin_mse(log_odds: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of all pairwise margins (arXiv 2010.02666).

    Over all ordered pairs of n documents it is twice the variance of the differences d = s - t,
    times n / (n - 1) when a document is not paired with itself.
    """
    if len(log_odds) < 2:
        return (log_odds * 0).sum()
    return 2 * (log_odds - scores).var(unbiased=True)
