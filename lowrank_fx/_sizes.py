"""Sizes in bytes, as users write them."""

from __future__ import annotations

import re

from lowrank_fx.errors import OptionError


def parse_size(option: str, size: int | str, example: str, *, whole: bool = False) -> int:
    """A number of bytes from an integer or text; KB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024.

    >>> parse_size("sketch_memory", "2KiB", "256MiB")
    2048

    Args:
        option: whose value it is.
        size: the value.
        example: a legal one, for the message.
        whole: the number in front of the unit has to be an integer of at most nine digits.

    Raises:
        OptionError: it is neither, or not positive.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    number = r"[0-9]{1,9}" if whole else r"[0-9]+(?:\.[0-9]+)?"
    match = re.fullmatch(rf"\s*({number})\s*([KMGT]i?B|B)\s*", size) if isinstance(size, str) else None
    amount = 0 if match is None else float(match[1]) if "." in match[1] else int(match[1])
    if match is None or not amount:
        raise OptionError(f"{option}={size!r} is not a size; use a number of bytes or text such as {example!r}")
    base = 1024 if "i" in match[2] else 1000
    return int(amount * base ** " KMGT".index(match[2][0] if match[2] != "B" else " "))
