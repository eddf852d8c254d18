"""Checks of what callers pass, before any work starts.

Decides what is accepted; every refusal names the argument, what was got and what to do. Texts are
never quoted, only their types and positions.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import sys
from collections.abc import Iterable, Mapping, Set
from typing import Any

from ..errors import InputError, named, shown
from ..text.prompt import TEMPLATES, PromptTemplate
from ..text.strings import plain

API_KEY_VARIABLE = "QWEN3_RERANKER_API_KEY"
"""Where the server looks for the key of its clients, and a client for that of its server."""

_LONGEST_TIMEOUT_S = 1e9
"""Thirty years; locks and event loops refuse to wait for much longer."""

DTYPES = ("float32", "bfloat16", "float16", "int8", "nf4")


def check_query(value: Any, name: str = "query") -> str:
    """Return the query, a string that is not blank.

    Raises:
        InputError: If it is not a string, or blank.
    """
    text = plain(value)
    if text is None:
        raise InputError(f"{name} must be a string, got {type(value).__name__}. Pass the text.")
    if not text.strip():
        raise InputError(f"{name} is blank ({len(text)} characters). Pass what to look for.")
    return text


def check_documents(value: Any, name: str = "documents") -> list[str]:
    """Return the documents as a list, of the caller's own objects where they are plain strings.

    Raises:
        InputError: If they are not strings in a list or another iterable with an order.
    """
    items = check_sequence(value, name, "strings")
    texts = [text for item in items if (text := plain(item)) is not None]
    if len(texts) < len(items):
        wrong = [i for i, item in enumerate(items) if plain(item) is None]
        kind = type(items[wrong[0]]).__name__
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(
            f"{name}[{wrong[0]}] must be a string, got {kind}{others}. Pass the text itself; an "
            "empty string stands for a document without text."
        )
    return texts


def check_lists(queries: Any, documents_of: Any) -> tuple[list[str], list[list[str]]]:
    """Return queries and, aligned with them, their documents.

    Raises:
        InputError: If they are not aligned, or as `check_query` and `check_documents`.
    """
    given = check_sequence(queries, "queries", "strings")
    rows = check_sequence(
        documents_of, "documents", "lists of strings, one per query", dimensions=(1, 2)
    )
    if len(given) != len(rows):
        raise InputError(
            f"queries and documents must be aligned, got {len(given)} queries and {len(rows)} "
            "lists of documents. Pass one list per query."
        )
    is_single = len(given) == 1
    if not is_single and any(plain(row) is not None for row in rows):
        raise InputError(
            "documents must be a list of lists, one per query, got strings. Pass the documents of "
            "each query as a list of their own."
        )
    return (
        [
            check_query(item, "query" if is_single else f"queries[{i}]")
            for i, item in enumerate(given)
        ],
        [
            check_documents(row, "documents" if is_single else f"documents[{i}]")
            for i, row in enumerate(rows)
        ],
    )


def check_pairs(value: Any) -> list[tuple[str, str]]:
    """Return (query, document) pairs.

    Raises:
        InputError: If an item is not a pair of strings, or a query is blank.
    """
    checked = []
    for i, item in enumerate(check_sequence(value, "pairs", "(query, document) pairs")):
        is_list = _is(item, tuple, list)
        if not is_list or len(item) != 2:
            count = f" of {len(item)}" if is_list else ""
            raise InputError(
                f"pairs[{i}] must be a (query, document) pair, got {type(item).__name__}{count}. "
                "Pass two strings."
            )
        document = plain(item[1])
        if document is None:
            raise InputError(
                f"document of pairs[{i}] must be a string, got {type(item[1]).__name__}. Pass the "
                "text itself."
            )
        checked.append((check_query(item[0], f"query of pairs[{i}]"), document))
    return checked


def check_instruction(value: Any, name: str = "instruction") -> str | None:
    """Return the instruction; an empty string is taken literally, None means the default.

    Raises:
        InputError: If it is neither a string nor None.
    """
    text = plain(value)
    if text is None and value is not None:
        raise InputError(
            f"{name} must be a string or None, got {type(value).__name__}. Pass one English "
            "sentence that states the task."
        )
    return text


def check_instructions(value: Any, num_queries: int) -> list[str | None]:
    """Return one instruction per query, from one for all or a list.

    Raises:
        InputError: If there are fewer or more than queries, or one is not a string or None.
    """
    if not _is(value, list, tuple):
        return [check_instruction(value)] * num_queries
    if len(value) != num_queries:
        raise InputError(
            f"instruction must be one string or one per query, got {len(value)} for "
            f"{num_queries} queries. Pass one string for all, or a string or None for each."
        )
    return [check_instruction(item, f"instruction[{i}]") for i, item in enumerate(value)]


def check_cut(top_n: Any, score_threshold: Any) -> None:
    """Check how much of a ranking is kept.

    Raises:
        InputError: If `top_n` is below 1 or `score_threshold` is no probability.
    """
    if top_n is not None and (_integer(top_n) or 0) < 1:
        raise InputError(
            f"top_n must be an integer of at least 1 or None, got {shown(top_n)}. Use None to keep "
            "every document."
        )
    share = to_float(score_threshold)
    if score_threshold is not None and (share is None or not 0 <= share <= 1):  # also NaN
        raise InputError(
            f"score_threshold must be between 0 and 1 or None, got {shown(score_threshold)}. "
            "Scores are probabilities; use None to keep every document."
        )


def check_name(name: str, value: Any) -> str | None:
    """Return a string that may be missing.

    Raises:
        InputError: If it is neither a string nor None.
    """
    text = plain(value)
    if text is None and value is not None:
        raise InputError(
            f"{name} must be a string or None, got {type(value).__name__}. Use None for the "
            "default."
        )
    return text


def check_device(value: Any) -> str | None:
    """Return a device's name, from the name or a torch device; the model's loading tries it.

    Raises:
        InputError: If it is neither, nor None.
    """
    return str(value) if _is_of_torch(value, "device") else check_name("device", value)


def check_positive_int(name: str, value: Any) -> int:
    """Return a count of at least 1.

    Raises:
        InputError: If it is not an integer, below 1, or more than any machine counts.
    """
    count = _integer(value) or 0
    if not 1 <= count <= sys.maxsize:
        most = f" and at most {sys.maxsize}" if count > 0 else ""
        raise InputError(
            f"{name} must be an integer of at least 1{most}, got {shown(value)}. Leave it out for "
            "the default."
        )
    return count


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return one of some words.

    Raises:
        InputError: If it is none of them.
    """
    word = plain(value)
    if word is None or word not in choices:
        raise InputError(
            f"{name} must be one of {', '.join(choices)}, got {named(value)}. Leave it out for "
            f"{choices[0]}."
        )
    return word


def check_api_key(name: str, value: Any) -> str | None:
    """Return a key that an HTTP header can carry; it is never shown.

    Raises:
        InputError: If it is no string of printable ASCII characters without spaces, or blank.
    """
    if value is None:
        return None
    key = (plain(value) or "").strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"{name} must be printable ASCII without spaces, got something else (not shown). Put "
            "the key there, or leave it out."
        )
    return key


def check_flag(name: str, value: Any) -> bool:
    """Return a switch.

    Raises:
        InputError: If it is neither True nor False.
    """
    if not _is(value, bool):
        raise InputError(
            f"{name} must be True or False, got {shown(value)}. Leave it out for False."
        )
    return bool(value)


def check_timeout(value: Any) -> float | None:
    """Return seconds, or None for no limit.

    Raises:
        InputError: If it is not a positive number.
    """
    if value is None:
        return None
    seconds = to_float(value)
    if seconds is None or not seconds > 0:  # also NaN
        raise InputError(
            f"timeout_s must be a number of seconds above 0 or None, got {shown(value)}. Use None "
            "to wait as long as it takes."
        )
    # What no clock can count is as long as it takes.
    return None if seconds > _LONGEST_TIMEOUT_S else seconds


def check_window_score(value: Any) -> Any:
    """Return how the scores of a long document's windows become one.

    Raises:
        InputError: If it is none of the ways there are.
    """
    word = plain(value)
    if word not in (None, "max", "mean") or (word is None and value is not None):
        raise InputError(
            f"window_score must be 'max', 'mean' or None, got {named(value)}. Use None to cut "
            "documents that do not fit."
        )
    return word


def check_dtype(value: Any) -> str | None:
    """Return a dtype's name, from the name itself or a torch dtype.

    Raises:
        InputError: If it is no dtype that models run in.
    """
    is_of_torch = _is_of_torch(value, "dtype")
    name = str(value) if is_of_torch else plain(value)
    name = None if name is None else name.removeprefix("torch.")
    if name not in (None, *DTYPES) or (name is None and value is not None):
        got = value if is_of_torch else named(value)
        raise InputError(
            f"dtype must be one of {', '.join(DTYPES)} or None, got {got}. Use None for the "
            "default of checkpoint and device."
        )
    return name


def check_template(value: Any) -> PromptTemplate | None:
    """Return a template from itself or its id.

    Raises:
        InputError: If it is neither, nor None.
    """
    if value is None or _is(value, PromptTemplate):
        found: PromptTemplate | None = value
        return found
    name = plain(value)
    if name is None or name not in TEMPLATES:
        raise InputError(
            f"template must be one of {', '.join(TEMPLATES)}, a PromptTemplate or None, got "
            f"{named(value)}. Use None to take what the checkpoint was trained with."
        )
    return TEMPLATES[name]


def check_path(name: str, value: Any) -> str:
    """Return a Hub name or path as a string.

    Raises:
        InputError: If it is neither, or blank.
    """
    if not _is(value, str, os.PathLike):
        raise InputError(
            f"{name} must be a Hub name or a path, got {type(value).__name__}. Pass a string."
        )
    text = plain(value)
    if text is None:
        text = os.fsdecode(value)
    if not text.strip():
        raise InputError(f"{name} is blank. Pass a Hub name such as 'Qwen/Qwen3-Reranker-0.6B'.")
    return text


def check_sequence(
    value: Any, name: str, content: str, *, dimensions: tuple[int, ...] = (1,)
) -> list[Any]:
    """Return the items of a list or another iterable with an order; they are not looked at.

    Args:
        value: What was passed.
        name: Of the argument.
        content: What its items should be.
        dimensions: What an array may have; one of two is a list of its rows.

    Raises:
        InputError: If it has no order, is a table, or could only hold numbers: an empty one would
            pass for no documents.
    """
    # A string is a sequence of strings, and sets and mappings have no positions to return.
    remedy = "Wrap a single item in a list."
    if _is(value, Iterable) and not _is(value, str, bytes, range, Mapping, Set):
        if getattr(value, "ndim", 1) not in dimensions:  # of arrays, series and tables
            remedy = "Pass one column, of one dimension."
        elif _holds_numbers(value):
            remedy = f"Pass {content}."
        else:
            return list(value)
    raise InputError(f"{name} must be a list of {content}, got {type(value).__name__}. {remedy}")


def to_float(value: Any) -> float | None:
    """Return a number of Python or NumPy as a float, infinite if it is too large; None of others.

    Example:
        >>> to_float(0.5), to_float(-(10**400)), to_float(True)
        (0.5, -inf, None)
    """
    if _is(value, bool) or not _is(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _is(value: object, *kinds: type) -> bool:
    # Not isinstance, which believes a mock's __class__.
    return issubclass(type(value), kinds)


def _is_of_torch(value: object, name: str) -> bool:
    return (type(value).__module__, type(value).__name__) == ("torch", name)


def _holds_numbers(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    if dtype is not None:
        if str(dtype) == "float64" and len(value) == 0:
            return False  # NumPy makes such an array of an empty list, whatever it was for
        return _is_of_torch(dtype, "dtype") or getattr(dtype, "kind", "O") not in "OUT"
    try:
        memoryview(value)  # bytearray, array.array
    except TypeError:
        return False
    return True


def _integer(value: Any) -> int | None:
    try:
        return None if _is(value, bool) else operator.index(value)
    except TypeError:
        return None
