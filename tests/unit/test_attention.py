from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from qwen3_reranker.engine.packing import Group, Pack, Seat, build_pack
from qwen3_reranker.model import attention_cuda
from qwen3_reranker.model.attention import check_varlen, packed_attention, prepare
from qwen3_reranker.model.prefix_cache import KeyValues

HEADS, KEY_HEADS, SIZE = 4, 2, 16
BACKENDS = ["documents", "padded", "varlen"]
SHAPES = [
    [(5, [3])],
    [(5, [3, 9, 1])],
    [(1, [1, 1])],
    [(7, [20, 4]), (3, [8]), (12, [2, 2, 30])],
    [(40, [5, 5, 5, 5])],
    [(20, [700, 600, 30])],  # long enough for the maskless path
]


def pack_of(shape: list[tuple[int, list[int]]], backend: str) -> Pack:
    groups = [
        Group(np.zeros(head, np.int32), [np.zeros(n, np.int32) for n in lengths])
        for head, lengths in shape
    ]
    seats = [Seat(g, tuple(range(len(lengths)))) for g, (_, lengths) in enumerate(shape)]
    return build_pack(groups, seats, backend=backend)


def tensors(pack: Pack, *, requires_grad: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, len(pack.token_ids), SIZE, generator=generator).requires_grad_(
            requires_grad
        )
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]


def reference_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool, return_aux: Any,
) -> Any:  # fmt: skip
    """What CUDA's kernel promises: sequence by sequence, causal from the bottom right."""
    assert enable_gqa
    outputs, sums = [], []
    for (q0, q1), (k0, k1) in zip(
        pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True
    ):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        repeat = query.shape[1] // key.shape[1]
        k, v = (t[k0:k1].repeat_interleave(repeat, dim=1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], k) * scale
        if window_size == (-1, 0):
            sees = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(k1 - k0 - (q1 - q0))
            scores = scores.masked_fill(~sees, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        sums.append(scores.logsumexp(-1))  # (heads, queries)
    output = torch.cat(outputs)
    return output if return_aux is None else (output, torch.cat(sums, dim=1))


@pytest.fixture(autouse=True)
def _kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cuda, "kernel", lambda: reference_varlen)


def attend(
    pack: Pack,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    outside: list[KeyValues | None] | None = None,
) -> torch.Tensor:
    module = torch.nn.Module()
    module.layer_idx = 1  # type: ignore[assignment]
    prepared = prepare(pack, outside or [None] * len(pack.spans), query.device)
    output, weights = packed_attention(
        module, query, key, value, None, scaling=SIZE**-0.5, prepared=prepared
    )
    assert weights is None
    return output


def by_definition(
    pack: Pack, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """Softmax over the tokens each token may see, written out."""
    num = len(pack.token_ids)
    sees = torch.zeros(num, num, dtype=torch.bool)
    for span in pack.spans:
        for part in (span.head, *span.documents):
            for row in range(part.start, part.stop):
                sees[row, span.head] = True
                sees[row, part] = True
                sees[row, row + 1 : part.stop] = False
    key, value = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (key, value))
    scores = (query @ key.transpose(2, 3) / math.sqrt(SIZE)).masked_fill(~sees, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_backends_equal_the_definition(backend: str, shape: list[tuple[int, list[int]]]) -> None:
    pack = pack_of(shape, backend)
    query, key, value = tensors(pack)
    expected = by_definition(pack, query, key, value)
    torch.testing.assert_close(attend(pack, query, key, value), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_document_never_sees_its_neighbour(backend: str) -> None:
    pack = pack_of([(5, [4, 6])], backend)
    query, key, value = tensors(pack)
    before = attend(pack, query, key, value)
    first, second = pack.spans[0].documents
    key[:, :, first] += 10
    value[:, :, first] += 10
    after = attend(pack, query, key, value)
    assert torch.equal(before[:, second], after[:, second])
    assert not torch.allclose(before[:, first], after[:, first]), "the change itself must show"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_gradients_equal_the_definitions(backend: str, shape: list[tuple[int, list[int]]]) -> None:
    pack = pack_of(shape, backend)
    inputs = tensors(pack, requires_grad=True)
    expected = torch.autograd.grad(by_definition(pack, *inputs).square().sum(), inputs)
    actual = torch.autograd.grad(attend(pack, *inputs).square().sum(), inputs)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("outside", [1, 4, 5])
@pytest.mark.parametrize("lengths", [[3], [3, 9, 1], [700, 600, 30], [1200]], ids=str)
def test_beginning_outside_the_row_changes_nothing(
    backend: str, outside: int, lengths: list[int]
) -> None:
    whole = pack_of([(5, lengths), (6, [4, 2])], "padded")
    query, key, value = tensors(whole)
    expected = attend(whole, query, key, value)
    groups = [
        Group(np.zeros(head, np.int32), [np.zeros(n, np.int32) for n in each])
        for head, each in ((5, lengths), (6, [4, 2]))
    ]
    seats = [Seat(0, tuple(range(len(lengths))), outside), Seat(1, (0, 1))]
    pack = build_pack(groups, seats, backend=backend)
    nothing = torch.empty(0)
    left = (key[:, :, :outside], value[:, :, :outside])
    row = [tensor[:, :, outside:] for tensor in (query, key, value)]
    output = attend(pack, *row, outside=[[(nothing, nothing), left], None])
    torch.testing.assert_close(output, expected[:, outside:], atol=2e-6, rtol=1e-5)


def test_heads_are_read_where_they_are_when_copies_would_be_many() -> None:
    pack = pack_of([(5, [3, 4]), (60, [2] * 30)], "varlen")
    query, key, value = tensors(pack)
    plan = attention_cuda.plan_sequences(pack, query.device)
    assert plan.heads is not None
    assert len(plan.causal.keys_at) == len(pack.token_ids), "nothing is copied"
    expected = by_definition(pack, query, key, value)
    with torch.no_grad():
        torch.testing.assert_close(attend(pack, query, key, value), expected, atol=2e-6, rtol=1e-5)
    # With gradients heads are copied, because a log-sum-exp carries none.
    torch.testing.assert_close(attend(pack, query, key, value), expected, atol=2e-6, rtol=1e-5)
    with torch.enable_grad():
        assert prepare(pack, [None, None], query.device).plan.heads is None  # type: ignore[union-attr]


@pytest.mark.parametrize("lengths", [[1, 3], [2, 3]])
def test_row_of_as_many_tokens_as_heads_is_like_any_other(lengths: list[int]) -> None:
    head = 60
    whole = pack_of([(head, lengths)], "padded")
    query, key, value = tensors(whole)
    groups = [Group(np.zeros(head, np.int32), [np.zeros(n, np.int32) for n in lengths])]
    pack = build_pack(groups, [Seat(0, (0, 1), head)], backend="varlen")
    assert attention_cuda.plan_sequences(pack, query.device).heads is not None, "read where it is"
    nothing = torch.empty(0)
    outside = [[(nothing, nothing), (key[:, :, :head], value[:, :, :head])]]
    row = [tensor[:, :, head:] for tensor in (query, key, value)]
    with torch.no_grad():
        output = attend(pack, *row, outside=outside)
    expected = by_definition(whole, query, key, value)[:, head:]
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)


def test_varlen_is_refused_where_its_kernel_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, sizes = torch.device("cpu"), (HEADS, KEY_HEADS, SIZE)
    assert check_varlen(cpu, torch.float32, sizes) == ""

    def top_left(*args: Any, window_size: tuple[int, int], **kwargs: Any) -> Any:
        query, key, value, cu_q, cu_k, *most = args
        if window_size == (-1, 0):  # as torch's own causal mask: the first query sees one key
            ends = [start + q1 - q0 for start, (q0, q1) in zip(
                cu_k.tolist(), pairwise(cu_q.tolist()), strict=False)]  # fmt: skip
            chosen = [torch.arange(a, b) for a, b in zip(cu_k.tolist(), ends, strict=False)]
            key, value = (t[torch.cat(chosen)] for t in (key, value))
            cu_k = cu_q
        return reference_varlen(
            query, key, value, cu_q, cu_k, *most, window_size=window_size, **kwargs
        )

    monkeypatch.setattr(attention_cuda, "kernel", lambda: top_left)
    assert "differs from padded attention" in check_varlen(cpu, torch.float32, sizes)

    def off_sum(*arguments: Any, return_aux: Any = None, **options: Any) -> Any:
        result = reference_varlen(*arguments, return_aux=return_aux, **options)
        return result if return_aux is None else (result[0], -result[1])

    monkeypatch.setattr(attention_cuda, "kernel", lambda: off_sum)
    assert "differs from padded attention" in check_varlen(cpu, torch.float32, sizes)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(attention_cuda, "kernel", lambda: broken)
    assert check_varlen(cpu, torch.float32, sizes) == "RuntimeError in its check"


def test_documents_backend_is_bit_equal_in_any_company() -> None:
    alone = pack_of([(9, [30, 1])], "documents")
    together = pack_of([(9, [30, 12, 7, 50])], "documents")
    query, key, value = tensors(together)
    row = slice(0, 39)
    shared = attend(together, query, key, value)[:, row]
    cut = [t[:, :, : len(alone.token_ids)] for t in (query, key, value)]
    assert torch.equal(attend(alone, *cut)[:, row], shared)
