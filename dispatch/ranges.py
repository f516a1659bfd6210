"""Lists of numbers as command lines take them."""
from __future__ import annotations

import argparse


def integers(text: str) -> tuple[int, ...]:
    """From "1,8,32:128:32": numbers and first:last[:step] ranges (last included), ascending, each once.

    Raises:
        argparse.ArgumentTypeError: anything else, or a number below 1.
    """
    found: set[int] = set()
    for part in text.split(","):
        try:
            numbers = [int(field) for field in part.split(":")]
        except ValueError:
            numbers = []
        if not 1 <= len(numbers) <= 3 or min(numbers) < 1 or (len(numbers) > 1 and numbers[1] < numbers[0]):
            raise argparse.ArgumentTypeError(f"{part!r} is not a positive number or a range first:last[:step]")
        first, last, step = (*numbers, numbers[0], 1)[:3] if len(numbers) == 1 else (*numbers, 1)[:3]
        found.update(range(first, last + 1, step))
    return tuple(sorted(found))
