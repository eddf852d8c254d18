from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_reranker.engine.packing import (
    Budget,
    Group,
    Seat,
    build_pack,
    merge_duplicates,
    plan_packs,
)
from qwen3_reranker.text.tokenizer import EncodedGroup, TokenIds

SHAPES = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 80), max_size=12)), max_size=6
)


def ids(length: int, first: int = 0) -> TokenIds:
    return np.arange(first, first + length, dtype=np.int32)


def groups(shape: list[tuple[int, list[int]]]) -> list[Group]:
    return [Group(ids(head), [ids(length) for length in lengths]) for head, lengths in shape]


@given(SHAPES, st.integers(1, 200), st.none() | st.integers(1, 400))
def test_every_document_has_one_seat_within_both_budgets(
    shape: list[tuple[int, list[int]]], linear: int, attention: int | None
) -> None:
    planned = plan_packs(groups(shape), Budget(linear, attention))
    seated = [(seat.group, d) for pack in planned for seat in pack for d in seat.documents]
    assert sorted(seated) == [(g, d) for g, (_, ls) in enumerate(shape) for d in range(len(ls))]
    for pack in planned:
        assert [seat.group for seat in pack] == sorted({seat.group for seat in pack})
        num_documents = sum(len(seat.documents) for seat in pack)
        heads = [shape[seat.group][0] for seat in pack]
        own = [shape[seat.group][1][d] for seat in pack for d in seat.documents]
        padded = [
            len(s.documents) * (shape[s.group][0] + max(shape[s.group][1][d] for d in s.documents))
            for s in pack
        ]
        if num_documents > 1:
            assert sum(heads) + sum(own) <= max(linear, 2 * max(heads))
            assert attention is None or sum(padded) <= attention


def test_longest_documents_of_a_group_go_first() -> None:
    planned = plan_packs(groups([(5, [3, 9, 6])]), Budget(100))
    assert planned == [[Seat(0, (1, 2, 0))]]


def test_group_that_fits_one_pack_is_not_split() -> None:
    planned = plan_packs(groups([(10, [30]), (10, [20, 20])]), Budget(60))
    assert planned == [[Seat(0, (0,))], [Seat(1, (0, 1))]]


def test_small_groups_share_a_pack() -> None:
    planned = plan_packs(groups([(5, [5]), (5, [5]), (5, [5])]), Budget(30))
    assert planned == [[Seat(0, (0,)), Seat(1, (0,)), Seat(2, (0,))]]


def test_long_query_with_many_short_documents_stays_bounded() -> None:
    shape = [(4000, [60] * 500)]
    planned = plan_packs(groups(shape), Budget(2048, 8192))
    assert max(sum(4000 + 60 for s in pack for _ in s.documents) for pack in planned) <= 8192
    shared = plan_packs(groups(shape), Budget(2048))
    tokens = [4000 + 60 * len(pack[0].documents) for pack in shared]
    assert max(tokens) <= 8000
    assert sum(tokens) <= 2.1 * (4000 + 60 * 500), "the head is not computed for every document"


@given(SHAPES, st.integers(20, 200))
def test_pack_lays_documents_behind_their_head(
    shape: list[tuple[int, list[int]]], budget: int
) -> None:
    all_groups = groups(shape)
    for seats in plan_packs(all_groups, Budget(budget)):
        pack = build_pack(all_groups, seats, backend="documents")
        assert len(pack.token_ids) == len(pack.position_ids)
        expected = 0
        for seat, span in zip(seats, pack.spans, strict=True):
            head = all_groups[seat.group].head
            assert span.head == slice(expected, expected + len(head))
            assert pack.token_ids[span.head].tolist() == head.tolist()
            expected = span.head.stop
            for d, place in zip(seat.documents, span.documents, strict=True):
                document = all_groups[seat.group].documents[d]
                assert place == slice(expected, expected + len(document))
                assert pack.token_ids[place].tolist() == document.tolist()
                positions = range(len(head), len(head) + len(document))
                assert pack.position_ids[place].tolist() == list(positions)
                expected = place.stop
        assert expected == len(pack.token_ids)
        ends = [place.stop - 1 for span in pack.spans for place in span.documents]
        assert pack.last_tokens == ends


@given(SHAPES, st.integers(20, 200), st.integers(0, 40), st.integers(0, 80))
def test_what_stays_outside_depends_on_the_group_alone(
    shape: list[tuple[int, list[int]]], budget: int, shared: int, cached: int
) -> None:
    all_groups = [
        Group(ids(head), [ids(n) for n in lengths], num_shared=min(shared, head - 1))
        for head, lengths in shape
    ]
    planned = plan_packs(all_groups, Budget(budget, max_cached_tokens=cached))
    seated = [(seat.group, d) for pack in planned for seat in pack for d in seat.documents]
    assert sorted(seated) == [(g, d) for g, (_, ls) in enumerate(shape) for d in range(len(ls))]
    for g, group in enumerate(all_groups):
        found = {seat.num_cached for pack in planned for seat in pack if seat.group == g}
        packs = sum(seat.group == g for pack in planned for seat in pack)
        assert len(found) <= 1
        assert found <= {0, group.num_shared, len(group.head)}
        assert all(outside <= cached for outside in found)
        if packs > 1 and len(group.head) <= cached:
            assert found == {len(group.head)}
    for seats in planned:
        pack = build_pack(all_groups, seats, backend="documents")
        for seat, span in zip(seats, pack.spans, strict=True):
            head = all_groups[seat.group].head
            outside = [] if span.outside is None else span.outside.tolist()
            assert outside + pack.token_ids[span.head].tolist() == head.tolist()
            assert pack.position_ids[span.head].tolist() == [*range(len(outside), len(head))]
            for d, place in zip(seat.documents, span.documents, strict=True):
                length = len(all_groups[seat.group].documents[d])
                assert pack.position_ids[place].tolist() == [*range(len(head), len(head) + length)]


def test_head_of_many_packs_is_computed_once() -> None:
    group = Group(ids(300), [ids(60)] * 50, num_shared=60)
    planned = plan_packs([group], Budget(1000, max_cached_tokens=400))
    assert {seat.num_cached for pack in planned for seat in pack} == {300}
    assert len(planned) == 4, "3000 tokens of documents and no head"
    (seat,) = plan_packs([group], Budget(4000, max_cached_tokens=400))[0]
    assert seat.num_cached == 60


@pytest.mark.parametrize(("kept", "outside"), [(90, 30), (89, 0)])
def test_more_beginnings_than_can_be_kept_stay_in_the_row(kept: int, outside: int) -> None:
    # Three instructions, the first of them for two queries.
    firsts = [0, 0, 1000, 2000]
    heads = [np.concatenate([ids(30, first), ids(5, i)]) for i, first in enumerate(firsts)]
    planned = plan_packs(
        [Group(head, [ids(9)], num_shared=30) for head in heads],
        Budget(400, max_cached_tokens=kept),
    )
    assert {seat.num_cached for pack in planned for seat in pack} == {outside}


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), max_size=6)), max_size=5))
def test_merging_keeps_every_document_findable(shape: list[tuple[int, list[int]]]) -> None:
    encoded = [
        EncodedGroup(ids(3, head), [ids(2, 10 * d) for d in documents], [False] * 9, 0)
        for head, documents in shape
    ]
    merged, places = merge_duplicates(encoded)
    for group, row in zip(encoded, places, strict=True):
        for document, (g, d) in zip(group.documents, row, strict=True):
            assert merged[g].head.tolist() == group.head.tolist()
            assert merged[g].documents[d].tolist() == document.tolist()
    heads = [group.head.tobytes() for group in merged]
    assert len(set(heads)) == len(heads)
    for group in merged:
        assert len({document.tobytes() for document in group.documents}) == len(group.documents)


@pytest.mark.parametrize("budget", [1, 10])
def test_pair_above_the_budget_travels_alone(budget: int) -> None:
    planned = plan_packs(groups([(5, [50, 60])]), Budget(budget))
    assert planned == [[Seat(0, (1,))], [Seat(0, (0,))]]


def test_budget_of_attention_is_filled_to_its_last_token() -> None:
    shape = [(5, [5]), (5, [5])]  # 10 tokens of attention each
    for limit, num_packs in ((20, 1), (19, 2)):
        assert len(plan_packs(groups(shape), Budget(100, limit))) == num_packs


def test_budget_of_tokens_is_filled_to_its_last_token() -> None:
    for limit, num_packs in ((20, 1), (19, 2)):
        assert len(plan_packs(groups([(5, [5]), (5, [5])]), Budget(limit))) == num_packs


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (None, [5])])
def test_documents_of_a_pack_are_at_most_what_was_asked(
    limit: int | None, sizes: list[int]
) -> None:
    planned = plan_packs(groups([(5, [5] * 5)]), Budget(1000, max_documents=limit))
    assert [sum(len(seat.documents) for seat in pack) for pack in planned] == sizes
    one_each = plan_packs(groups([(5, [5])] * 5), Budget(1000, max_documents=limit))
    assert [sum(len(seat.documents) for seat in pack) for pack in one_each] == sizes


def test_nothing_stays_outside_unless_it_is_shared() -> None:
    planned = plan_packs(groups([(5, [5])]), Budget(100, max_cached_tokens=100))
    assert planned == [[Seat(0, (0,), 0)]]


@pytest.mark.parametrize(("count", "outside"), [(1, 10), (2, 30), (3, 30)])
def test_whole_head_stays_outside_when_several_packs_need_it(count: int, outside: int) -> None:
    group = Group(ids(30), [ids(60)] * count, num_shared=10)
    planned = plan_packs([group], Budget(50, max_cached_tokens=30))
    assert planned == [[Seat(0, (d,), outside)] for d in range(count)]


def test_head_longer_than_what_may_be_kept_stays_in_the_row() -> None:
    group = Group(ids(30), [ids(60)] * 2, num_shared=10)
    planned = plan_packs([group], Budget(50, max_cached_tokens=29))
    assert planned == [[Seat(0, (d,), 10)] for d in range(2)]
    planned = plan_packs([group], Budget(50, max_cached_tokens=9))
    assert planned == [[Seat(0, (d,), 0)] for d in range(2)]


@pytest.mark.parametrize(("kept", "outside"), [(9, 0), (10, 10), (11, 10)])
def test_shared_beginning_stays_outside_if_it_may_be_kept(kept: int, outside: int) -> None:
    group = Group(ids(30), [ids(60)], num_shared=10)
    planned = plan_packs([group], Budget(200, max_cached_tokens=kept))
    assert planned == [[Seat(0, (0,), outside)]]
