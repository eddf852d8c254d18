"""The last rows of causal attention: a document's, that sees its head and itself.

`is_causal` is never used where queries and keys differ in number: torch aligns that mask at the
top left on CPU, so a document would lose sight of its own beginning. Knows nothing of packs.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial

import torch
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from .cpu_trials import least_seconds, size_step

_BLOCK = 64
"""Queries whose scores are computed at once: fewer make small products, more see keys in vain."""

_BLOCK_BYTES = 2 * 2**20
"""Of a block's scores for each thread, which stay in its cache; heads take turns beyond."""

_LONGEST_IN_BLOCKS = 768
"""Tokens of a document. One thread gains by blocks up to 2,000 and more, two gain no more here."""

_FEWEST_PRODUCTS = 4_000_000
"""Of a document, heads * queries * keys * head size: below, a block's many calls cost more."""

_KEPT_MASK = 2**18
"""Numbers of the largest mask that is kept; rounding makes it up to four times as large."""


def attend_tail(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return the last rows of causal attention over the keys: those of the queries given.

    Args:
        query: Shape (1, heads, queries, head size).
        key: Shape (1, key heads, keys, head size), as many keys as queries or more.
        value: As `key`.
        scaling: Factor of the scores before the softmax.

    Returns:
        Shape (1, heads, queries, head size).
    """
    _, heads, length, size = query.shape
    in_blocks = (
        query.device.type == "cpu"
        and torch.is_inference_mode_enabled()  # training keeps gradients, and may round by autocast
        and length <= _LONGEST_IN_BLOCKS
        and query.numel() * key.shape[2] >= _FEWEST_PRODUCTS
        and blocks_pay(query.dtype, (heads, key.shape[1], size))
    )
    return (tail_in_blocks if in_blocks else tail_by_kernel)(query, key, value, scaling)


def tail_mask(like: torch.Tensor, before: int, rows: int) -> torch.Tensor:
    """Return what is added to scores of `rows` tokens after `before` others.

    Returns:
        Shape (rows, before + rows), zero where a token sees and -inf where it does not.
    """
    return like.new_full((rows, before + rows), -torch.inf).triu_(before + 1)


def tail_by_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Compute `attend_tail` by torch's fused kernel.

    Without a mask the kernel skips the upper triangle, but is aligned at the top left, so that
    rows are needed for the keys before: of zeros, and thrown away. So are the rows that fill a
    size up, and keys that do come last, where no token sees them.
    """
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    step = size_step(query.device, query.dtype)
    is_masked = before > 0 and not _skips_mask(before, length)
    ahead = 0 if is_masked else before
    query = _padded(query, ahead, -(ahead + length) % step)
    key, value = (_padded(each, 0, -(before + length) % step) for each in (key, value))
    mask = _kept_mask(query, before, key.shape[2]) if is_masked else None
    output = sdpa(
        query, key, value, attn_mask=mask, is_causal=not is_masked, scale=scaling, enable_gqa=True
    )
    return output[:, :, ahead : ahead + length]


def _padded(tokens: torch.Tensor, ahead: int, behind: int) -> torch.Tensor:
    return pad(tokens, (0, 0, ahead, behind)) if ahead or behind else tokens


def _kept_mask(query: torch.Tensor, before: int, num_keys: int) -> torch.Tensor:
    """Return a `tail_mask`, cut from one that serves every layer and documents of other lengths."""
    rows = query.shape[2]
    size = max(rows, num_keys - before)
    if size * num_keys > _KEPT_MASK:
        return tail_mask(query, before, size)[:rows, :num_keys]
    size, ahead = (1 << (number - 1).bit_length() for number in (size, before))
    mask = _cached_mask(ahead, size, query.dtype, query.device)
    return mask[:rows, ahead - before : ahead - before + num_keys]


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what serving has made, training may need
def _cached_mask(ahead: int, size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return tail_mask(torch.empty(0, dtype=dtype, device=device), ahead, size)


def _skips_mask(before: int, length: int) -> bool:
    """Say whether a document is attended together with rows for what it follows, unmasked.

    That the kernel then skips the upper triangle pays for those rows: `python -m
    benchmarks.choices` finds both equal at 500 tokens, and this ahead beyond.
    """
    return length >= max(512, 2 * before)


def tail_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Compute `attend_tail` by plain products, each block of queries with the keys it sees.

    The kernel multiplies in small tiles and computes all that a mask then hides. As there, scores
    and softmax are float32 and probabilities are rounded to the values' dtype.
    """
    _, heads, length, size = query.shape
    _, key_heads, num_keys, _ = key.shape
    per_key, before = heads // key_heads, num_keys - length
    num_blocks = -(-length // _BLOCK)
    rows = -(-length // num_blocks)  # even blocks: a last one of a few rows costs like a whole one
    hidden = query.new_full((rows, rows), -torch.inf, dtype=torch.float32).triu_(1)
    room = _BLOCK_BYTES * torch.get_num_threads()
    at_once = max(1, room // (4 * per_key * rows * num_keys))
    output = torch.empty_like(query)
    for first in range(0, key_heads, at_once):
        turned = key[0, first : first + at_once].float().transpose(1, 2)
        values = value[0, first : first + at_once]
        asking = slice(first * per_key, (first + len(values)) * per_key)
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            seen, num = before + stop, stop - start
            block = query[0, asking, start:stop].float() * scaling
            block = block.reshape(len(values), -1, size)
            scores = torch.bmm(block, turned[:, :, :seen])  # (key heads, heads of each * num, seen)
            scores.view(-1, num, seen)[:, :, before + start :].add_(hidden[:num, :num])
            torch.softmax(scores, dim=-1, out=scores)  # in place: rows are read before written
            attended = torch.bmm(scores.to(value.dtype), values[:, :seen])
            output[0, asking, start:stop] = attended.view(-1, num, size)
    return output


@cache
@torch.inference_mode()
def blocks_pay(dtype: torch.dtype, sizes: tuple[int, int, int]) -> bool:
    """Say whether blocks compute on this CPU what torch's kernel does, clearly faster: a trial.

    A Zen 4 spares a third of the time in bfloat16 with the heads of Qwen3, a tenth with SmolLM2's.
    In float32 the gain is lost as soon as other work wants the cache, and float16 takes four times
    as long, so that neither is tried.

    Args:
        dtype: Of queries, keys and values.
        sizes: Heads, key heads and head size.
    """
    if dtype is not torch.bfloat16:
        return False
    heads, key_heads, size = sizes
    generator = torch.Generator().manual_seed(0)
    query, key = (  # heads of a token beside each other, as layers leave them
        torch.randn(1, tokens, count, size, generator=generator).transpose(1, 2).to(dtype)
        for tokens, count in ((200, heads), (275, key_heads))
    )
    ways = [partial(way, query, key, key, size**-0.5) for way in (tail_by_kernel, tail_in_blocks)]
    expected, found = (way() for way in ways)
    # A mask that is off by a token moves outputs by tenths, rounding by hundredths; NaN fails.
    if not (expected.float() - found.float()).abs().max() <= 0.05:
        return False
    kernel, blocks = least_seconds(ways)
    return blocks < 0.95 * kernel
