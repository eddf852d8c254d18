"""Strings as they must be: of the plain type, and without halves of characters.

Knows nothing of prompts and tokens.
"""

from __future__ import annotations


def plain(value: object) -> str | None:
    """Return a string of exactly the type str, the same object where it is one; None of no string.

    What a subclass redefines would act inside the prompt: `markupsafe.Markup` escapes the labels
    that it is joined with. The type alone counts: a mock may claim any class.

    Example:
        >>> class Loud(str):
        ...     def __add__(self, other): return self.upper()
        >>> plain(Loud("tea")) + "!", plain(7)
        ('tea!', None)
    """
    return str.__str__(value) if issubclass(type(value), str) else None


def repaired(text: str) -> str:
    """Return a text that UTF-8 can carry: surrogate pairs joined, lone surrogates as U+FFFD.

    Example:
        >>> repaired("half a smile " + chr(0xD83D)) == "half a smile " + chr(0xFFFD)
        True
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def as_string(value: object) -> str:
    """Return a value that must be a string, of a file that somebody else wrote.

    Raises:
        TypeError: If it is none; the caller says of which file.
    """
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {type(value).__name__}")
    return value
