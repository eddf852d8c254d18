from __future__ import annotations

import math

import pytest
import torch

from finetune.data import TrainingGroup
from finetune.losses import distill_kl, distill_margin_mse, hybrid, listwise, pointwise
from finetune.preflight import one_sided_warnings
from qwen3_reranker import DataError

S = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)
Y = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)


def test_pointwise_is_the_mean_two_way_log_probability() -> None:
    two_way = torch.log_softmax(torch.stack([torch.zeros(4, dtype=torch.float64), S]), 0)
    expected = -two_way[Y.long(), torch.arange(4)].mean()
    assert pointwise(S, Y).item() == pytest.approx(expected.item(), abs=1e-12)


def test_listwise_lets_positives_compete_with_negatives_only() -> None:
    terms = []
    for i in (0, 3):
        rivals = math.exp(-1.0) + math.exp(0.5)
        terms.append(-math.log(math.exp(S[i].item()) / (math.exp(S[i].item()) + rivals)))
    assert listwise(S, Y).item() == pytest.approx(sum(terms) / 2, abs=1e-12)


def test_listwise_ignores_a_shift_and_pointwise_does_not() -> None:
    assert listwise(S + 7, Y).item() == pytest.approx(listwise(S, Y).item(), abs=1e-12)
    assert pointwise(S + 7, Y).item() != pytest.approx(pointwise(S, Y).item(), abs=0.1)


@pytest.mark.parametrize("labels", [[1.0] * 4, [0.0] * 4])
def test_listwise_of_one_kind_of_label_is_zero_with_zero_gradient(labels: list[float]) -> None:
    scores = S.clone().requires_grad_()
    loss = listwise(scores, torch.tensor(labels))
    loss.backward()
    assert loss.item() == 0
    assert scores.grad is not None
    assert scores.grad.abs().max() == 0


def test_hybrid_adds_the_two() -> None:
    assert hybrid(0.5)(S, Y).item() == pytest.approx(
        pointwise(S, Y).item() + 0.5 * listwise(S, Y).item()
    )


def test_distillation_is_zero_at_the_teachers_scores_and_positive_elsewhere() -> None:
    teacher = torch.tensor([1.0, 0.0, -2.0, 4.0], dtype=torch.float64)
    for loss in (distill_kl, distill_margin_mse):
        assert loss(teacher + 3, teacher).item() == pytest.approx(0, abs=1e-12)  # only differences
        assert loss(S, teacher).item() > 0.01
    p, q = teacher.softmax(0), S.softmax(0)
    assert distill_kl(S, teacher).item() == pytest.approx((p * (p / q).log()).sum().item())
    margins = [
        ((S[i] - S[j]) - (teacher[i] - teacher[j])) ** 2
        for i in range(4) for j in range(4) if i != j
    ]  # fmt: skip
    assert distill_margin_mse(S, teacher).item() == pytest.approx(float(sum(margins)) / 12)
    assert distill_margin_mse(S[:1], teacher[:1]).item() == 0


@pytest.mark.parametrize("scale", [50.0, 500.0])
def test_losses_stay_finite_for_huge_log_odds(scale: float) -> None:
    scores = (S.float() * scale).requires_grad_()
    total = (
        pointwise(scores, Y.float()) + listwise(scores, Y.float()) + distill_kl(scores, Y.float())
    )
    total.backward()
    assert torch.isfinite(total)
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_rows_that_a_loss_cannot_compare_are_told() -> None:
    both, one = TrainingGroup("q", ["p"], ["n"], None), TrainingGroup("q", ["p"], [], None)
    assert one_sided_warnings([both, both], "listwise") == []
    assert one_sided_warnings([one, one], "pointwise") == []
    for loss in ("listwise", "hybrid"):
        (warning,) = one_sided_warnings([both, one], loss)
        assert warning.startswith("1 of 2 rows have no positive or no negative")
    assert len(one_sided_warnings([one, one], "hybrid")) == 1
    with pytest.raises(DataError, match=r"train nothing\. Mine negatives"):
        one_sided_warnings([one, one], "listwise")
