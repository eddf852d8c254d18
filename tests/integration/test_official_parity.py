"""Our scores against the official algorithm, one pair at a time, on the same weights."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_reranker import Reranker
from qwen3_reranker.engine.packing import Budget, Pack
from qwen3_reranker.model.loading import load_model
from tests import real_parts, texts
from tests.fakes import leaking
from tests.invariants import check_ranking
from tests.official import CHATML_SUFFIX, SUFFIX, Official

Pairs = Sequence[tuple[str, str]]
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "seq-cls": {"architecture": "ForSequenceClassification"},
    "qwen2": {"family": "Qwen2"},
    "llama": {"family": "Llama", "tied": False},
    "untied seq-cls": {"architecture": "ForSequenceClassification", "tied": False, "seed": 1},
}
WIDE = {**real_parts.QWEN3_0_6B, "num_hidden_layers": 4}


def mixed_pairs(count: int) -> Pairs:
    """Return pairs of which a fifth is adversarial."""
    adversarial = count // 5
    return texts.ordinary_pairs(count - adversarial) + texts.adversarial_pairs(adversarial)


def our_log_odds(reranker: Reranker, pairs: Pairs) -> list[float]:
    """Score all pairs in packs of many queries."""
    rankings = reranker.rank_many([query for query, _ in pairs], [[doc] for _, doc in pairs])
    for (_, document), ranking in zip(pairs, rankings, strict=True):
        check_ranking(ranking, [document])
    return [ranking[0].log_odds for ranking in rankings]


def compare(folder: Path, pairs: Pairs, *, suffix: str = SUFFIX) -> tuple[float, float]:
    """Return the largest difference in log-odds and in P."""
    official = Official(folder, dtype=torch.float32, suffix=suffix)
    theirs = [official.log_odds(query, document) for query, document in pairs]
    with Reranker(str(folder), dtype="float32") as reranker:
        ours = our_log_odds(reranker, pairs)
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    assert len(set(theirs)) > len(pairs) // 2, "scores must spread, or nothing is compared"
    largest_p = max(abs(sigmoid(a) - sigmoid(b)) for a, b in zip(ours, theirs, strict=True))
    print(f"\n{len(pairs)} pairs: |d log-odds| {max(differences):.1e}, |dP| {largest_p:.1e}")
    return max(differences), largest_p


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_qwen3_equals_the_official_algorithm(
    checkpoint: Callable[..., Path], variant: str, count: int
) -> None:
    log_odds, probability = compare(checkpoint(**VARIANTS[variant]), mixed_pairs(count))
    assert log_odds <= 5e-5
    assert probability <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_qwen3_of_real_widths_equals_the_official_algorithm(
    checkpoint: Callable[..., Path], variant: str
) -> None:
    log_odds, probability = compare(checkpoint(**WIDE, **VARIANTS[variant]), mixed_pairs(100))
    assert log_odds <= 5e-5
    assert probability <= 1e-5


@pytest.mark.parametrize("count", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_pretrained_weights_equal_the_official_algorithm(smollm2: Path, count: int) -> None:
    log_odds, probability = compare(smollm2, mixed_pairs(count), suffix=CHATML_SUFFIX)
    assert log_odds <= 5e-5
    assert probability <= 1e-5


def test_truncated_documents_equal_the_official_algorithm(
    checkpoint: Callable[..., Path],
) -> None:
    folder = checkpoint()
    official = Official(folder, dtype=torch.float32)
    documents = ["water " * 500, "light", "one two three " * 100]
    with Reranker(str(folder), dtype="float32", max_length=200) as reranker:
        results = reranker.rank("plants", documents)
    check_ranking(results, documents)
    for result in results:
        expected = official.log_odds("plants", result.document, max_length=200)
        assert result.log_odds == pytest.approx(expected, abs=5e-5)
        assert result.truncated is (result.index != 1)


@pytest.mark.parametrize(
    "shape", [{}, pytest.param(WIDE, marks=pytest.mark.slow)], ids=["tiny", "real widths"]
)
def test_bfloat16_is_as_close_to_float32_as_the_official_script(
    checkpoint: Callable[..., Path], shape: dict[str, Any]
) -> None:
    folder = checkpoint(dtype="bfloat16", **shape)
    # Long documents too: there a rounded rotary frequency shows.
    pairs = [*mixed_pairs(30), *(("water", "light " * n + "plants " * n) for n in (150, 300, 600))]
    with Reranker(str(folder), dtype="bfloat16") as reranker:
        ours = our_log_odds(reranker, pairs)
    truth = official_scores(folder, torch.float32, pairs)
    theirs = np.sqrt(np.mean((official_scores(folder, torch.bfloat16, pairs) - truth) ** 2))
    mine = np.sqrt(np.mean((np.array(ours) - truth) ** 2))
    print(f"\nRMS log-odds error in bfloat16: official {theirs:.4f}, ours {mine:.4f}")
    assert 0 < mine <= 1.1 * theirs


def official_scores(folder: Path, dtype: torch.dtype, pairs: Pairs) -> np.ndarray:
    official = Official(folder, dtype=dtype)
    return np.array([official.log_odds(*pair) for pair in pairs])


@pytest.fixture(scope="module")
def tiny(checkpoint: Callable[..., Path]) -> Iterator[Reranker]:
    with Reranker(str(checkpoint()), dtype="float32") as reranker:
        yield reranker


def largest_error(reranker: Reranker, folder: Path, pairs: Pairs) -> float:
    official = Official(folder, dtype=torch.float32)
    return max(
        abs(mine - official.log_odds(*pair))
        for mine, pair in zip(our_log_odds(reranker, pairs), pairs, strict=True)
    )


def change_packs(
    reranker: Reranker, monkeypatch: pytest.MonkeyPatch, change: Callable[[Pack], Pack]
) -> None:
    network = reranker.loaded.network
    forward = type(network).forward
    monkeypatch.setattr(type(network), "forward", lambda self, pack: forward(self, change(pack)))


def test_negative_control_positions_off_by_one_are_seen(
    tiny: Reranker, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shift(pack: Pack) -> Pack:
        positions = pack.position_ids.copy()
        for span in pack.spans:
            for document in span.documents:
                positions[document] += 1
        return Pack(pack.token_ids, positions, pack.spans, pack.backend)

    pairs = texts.ordinary_pairs(10)
    assert largest_error(tiny, checkpoint(), pairs) <= 5e-5
    change_packs(tiny, monkeypatch, shift)
    assert largest_error(tiny, checkpoint(), pairs) > 1e-3


def test_negative_control_a_document_seeing_its_neighbour_is_seen(
    tiny: Reranker, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import qwen3_reranker.model.attention as attention

    official = Official(checkpoint(), dtype=torch.float32)
    documents = [document for _, document in texts.ordinary_pairs(6)]

    def error() -> float:
        return max(
            abs(result.log_odds - official.log_odds("water", result.document))
            for result in tiny.rank("water", documents)
        )

    assert error() <= 5e-5
    monkeypatch.setitem(attention.BACKENDS, "documents", leaking)
    assert error() > 1e-3


def test_negative_control_a_suffix_one_newline_short_is_seen(
    tiny: Reranker, checkpoint: Callable[..., Path]
) -> None:
    short = Official(checkpoint(), dtype=torch.float32, suffix=SUFFIX.removesuffix("\n"))
    pairs = texts.ordinary_pairs(10)
    ours = our_log_odds(tiny, pairs)
    assert max(abs(a - short.log_odds(*p)) for a, p in zip(ours, pairs, strict=True)) > 1e-3


def test_score_does_not_depend_on_company_order_or_budget(
    companies: tuple[Path, list[str]],
) -> None:
    folder, documents = companies
    rng = random.Random(0)
    with Reranker(str(folder), dtype="float32") as reranker:
        alone = [reranker.rank("water and light", [d])[0].log_odds for d in documents]
    largest = 0.0
    for budget in (None, 256, 1500, 30_000):
        order = rng.sample(range(len(documents)), len(documents))
        shuffled = [documents[i] for i in order]
        with Reranker(str(folder), dtype="float32", max_batch_tokens=budget) as reranker:
            results = reranker.rank("water and light", shuffled)
            others = reranker.rank_many(
                ["something else", "water and light"], [documents[::-1], shuffled]
            )[1]
        check_ranking(results, shuffled)
        for ranking in (results, others):
            for result in ranking:
                largest = max(largest, abs(result.log_odds - alone[order[result.index]]))
    print(f"\nlargest change by company, order or budget: {largest:.1e}")
    assert largest <= 1e-5


@pytest.fixture(
    params=[
        "tiny",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("pretrained", "real widths")),
    ]
)
def companies(
    request: pytest.FixtureRequest, checkpoint: Callable[..., Path], smollm2: Path
) -> tuple[Path, list[str]]:
    documents = [document for _, document in mixed_pairs(20)]
    if request.param == "tiny":
        return checkpoint(), documents * 2
    if request.param == "pretrained":
        return smollm2, documents[:8]
    return checkpoint(**WIDE), documents


def test_negative_control_right_padding_depends_on_company(
    checkpoint: Callable[..., Path],
) -> None:
    official = Official(checkpoint(), dtype=torch.float32)
    short, long = (official.prompt_ids("q", text) for text in ("water", "water " * 50))
    padded = torch.tensor([short + [151643] * (len(long) - len(short)), long])
    mask = (torch.arange(len(long)) < torch.tensor([[len(short)], [len(long)]])).long()
    with torch.no_grad():
        logits = official.model(input_ids=padded, attention_mask=mask).logits[0, -1]
    wrong = (logits[official.yes] - logits[official.no]).item()
    assert abs(wrong - official.log_odds_of_ids(short)) > 1e-2


def test_both_backends_and_the_default_agree(checkpoint: Callable[..., Path]) -> None:
    from qwen3_reranker.engine.engine import Engine

    loaded = load_model(str(checkpoint()), dtype="float32")
    group = loaded.tokenizer.encode_group(
        None, "water", [document for _, document in mixed_pairs(30)], max_length=8192
    )
    scores = []
    for backend in ("documents", "padded"):
        engine = Engine(
            loaded.network.score,
            backend=backend,
            budget=Budget(900, 3000 if backend == "padded" else None),
        )
        scores.append(engine.submit([group]).result().log_odds[0])
        engine.close()
    np.testing.assert_allclose(scores[0], scores[1], atol=2e-5)
