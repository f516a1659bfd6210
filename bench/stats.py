"""What is said of a list of timings, and when two of them differ."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Order statistics of samples in one unit; p10 and p90 interpolate linearly between samples."""

    median: float
    p10: float
    p90: float
    count: int

    @property
    def spread(self) -> float:
        """(p90 - p10) / median: the relative width of the middle 80% of the samples."""
        return (self.p90 - self.p10) / self.median


def summarize(samples: Sequence[float]) -> Summary:
    """Raises ValueError when there are no samples, or one is not a finite positive number."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no samples to summarize")
    if not np.all(np.isfinite(values)) or np.any(values <= 0):
        raise ValueError(f"samples must be finite and positive, got {values.min()} .. {values.max()}")
    p10, median, p90 = np.percentile(values, (10, 50, 90))
    return Summary(float(median), float(p10), float(p90), int(values.size))


def geomean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return float(np.exp(np.mean(np.log(np.asarray(values, dtype=np.float64)))))


def change(old: Summary, new: Summary, margin: float) -> tuple[float, str]:
    """How a timing changed, as (relative change, verdict).

    A change counts when it exceeds the margin and the two middle 80% ranges do not overlap: then neither a small drift
    of a quiet timing nor a large one of a noisy timing is called a change.

    Args:
        margin: relative change below which nothing is called a change.

    Returns:
        new.median / old.median - 1, and "slower", "faster" or "same".
    """
    relative = new.median / old.median - 1.0
    if relative > margin and new.p10 > old.p90:
        return relative, "slower"
    if relative < -margin and new.p90 < old.p10:
        return relative, "faster"
    return relative, "same"
