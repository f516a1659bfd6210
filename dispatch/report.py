"""A decision as a value, and the report that it prints."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Callable, Optional

from backends.device import DeviceInfo
from backends.problem import Fc2Problem, dtype_name
from backends.tactic import Tactic
from dispatch.evidence import Estimate
from dispatch.hardware import floor_seconds, gpu_named
from dispatch.model import ALPHA_ANY

#: A time must be lower by more than this share to displace an incumbent. Published reports of ranks that
#: diverge on ties are about differences of 0.08 to 2%.
TIE_MARGIN = 0.02
# Candidates with a known time that a printed decision lists.
_SHOWN = 6


@dataclass(frozen=True)
class Candidate:
    """One way to run the problem that was considered.

    Attributes:
        backend, tactic: what; tactic is None where the whole backend was rejected.
        estimate: its expected time, None where unknown.
        rejected: why it cannot be taken; "" where it could.
        incumbent: "rule" or "default" where it is the one that wins ties inside its backend, else "".
    """

    backend: str
    tactic: Optional[Tactic]
    estimate: Optional[Estimate] = None
    rejected: str = ""
    incumbent: str = ""

    @property
    def seconds(self) -> float:
        return self.estimate.seconds if self.estimate else float("inf")

    @property
    def name(self) -> str:
        """For people: the backend, or the tactic as briefly as tells it from its backend."""
        if self.tactic is None:
            return self.backend
        return self.tactic.brief if self.tactic.brief != self.backend else str(self.tactic)


@dataclass(frozen=True)
class Survey:
    """What a decision was made among; put together when it is asked for, which takes milliseconds.

    Attributes:
        candidates: all tactics of all backends considered, rejected ones included; the chosen one is first.
        notes: what to know about the decision; a sentence each.
    """

    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Decision:
    """The backend and tactic chosen for a problem, and everything that was considered. Print it for a report.

    Attributes:
        problem, device: what was decided on.
        backend: name of the chosen backend.
        tactic: one of that backend's tactics.
        source: "forced" (the caller named the tactic), "rule", "measured" (this problem on this GPU),
            "interpolated" (between measured problems), "model" or "default".
        estimate: what is known of the chosen one's time; None where nothing is.
        warning: a sentence if this is a slow path that the caller can leave, else "".
    """

    problem: Fc2Problem
    device: DeviceInfo
    backend: str
    tactic: Tactic
    source: str
    estimate: Optional[Estimate]
    warning: str
    _look: Callable[[], Survey] = field(repr=False, compare=False)

    @functools.cached_property
    def _survey(self) -> Survey:
        return self._look()

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All that were considered, rejected ones included; the chosen one is first."""
        return self._survey.candidates

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know about this decision; a sentence each."""
        return self._survey.notes

    @property
    def seconds(self) -> Optional[float]:
        """Predicted time; None where nothing is known."""
        return self.estimate.seconds if self.estimate else None

    @property
    def alpha(self) -> str:
        """Form of alpha that the predicted time is for; "" where there is none."""
        return self.estimate.alpha if self.estimate else ""

    @property
    def rejected(self) -> tuple[tuple[str, str], ...]:
        """(backend, reason) of every backend that cannot run the problem."""
        return tuple((c.backend, c.rejected) for c in self.candidates if c.tactic is None)

    @property
    def runner_up(self) -> Optional[Candidate]:
        """The fastest of the others whose time is known as well as the chosen one's; None if there is none."""
        others = [c for c in self.candidates[1:] if c.estimate and self._comparable(c)]
        return min(others, key=lambda c: c.seconds, default=None)

    def _comparable(self, candidate: Candidate) -> bool:
        return self.estimate is not None and candidate.estimate.evidence == self.estimate.evidence

    @property
    def margin(self) -> Optional[float]:
        """Runner-up's time over the chosen one's, minus 1; None where either is unknown."""
        runner_up = self.runner_up
        return None if runner_up is None or self.seconds is None else runner_up.seconds / self.seconds - 1

    def line(self) -> str:
        """One line: problem, choice, source and predicted time."""
        return f"{self._asked}: {self._answer}"

    @property
    def _asked(self) -> str:
        p = self.problem
        return (
            f"fc2 m={p.m} n={p.n} k={p.k} experts={p.experts} {dtype_name(p.out_dtype)} a={p.a_layout} b={p.b_layout} "
            f"on {self.device.name}"
        )

    @property
    def _answer(self) -> str:
        time = "" if self.seconds is None else f", {_us(self.seconds)} predicted"
        return f"{self.tactic} ({self.source}{time})"

    def verdict(self, candidate: Candidate) -> str:
        """Why a candidate was not taken."""
        if candidate.rejected:
            return candidate.rejected
        if candidate.estimate is None:
            return "no time known"
        text = f"{_us(candidate.seconds)} {_origin(candidate.estimate)}"
        if self.seconds is None:
            return f"{text}; the chosen one has no known time and comes first in the fixed order"
        ratio = candidate.seconds / self.seconds - 1
        if abs(ratio) <= TIE_MARGIN:
            return f"{text}: a tie, which goes to the chosen one"
        if ratio > 0:
            return f"{text}: {ratio:.0%} slower"
        return f"{text}: {-ratio:.0%} less, but {_PRECEDENCE[self.source]}"

    def __str__(self) -> str:
        gpu = gpu_named(self.device.name)
        lines = [self._asked, f"  runs: {self._answer}"]
        if self.estimate is not None:
            condition = "whatever alpha is" if self.alpha == ALPHA_ANY else f"for alpha {self.alpha}"
            lines.append(f"  time: {_us(self.seconds)} {_origin(self.estimate)}, {condition}")
        if gpu is not None:
            floor = _us(floor_seconds(self.problem, gpu))
            lines.append(f"  floor: {floor} if every weight is read ({gpu.source})")
        if self.margin is not None:
            lines.append(f"  runner-up: {self.runner_up.name}, {self.margin:+.1%}")
        lines += [f"  note: {text}" for text in (*self.notes, *([self.warning] if self.warning else []))]
        known = (c for c in self.candidates[1:] if c.estimate)
        lost = sorted(known, key=lambda c: (not self._comparable(c), c.seconds))
        refused = [c for c in self.candidates[1:] if c.rejected]
        lines += [f"  not {c.name}: {self.verdict(c)}" for c in (*lost[:_SHOWN], *refused)]
        if len(lost) > _SHOWN:
            lines.append(f"  not {len(lost) - _SHOWN} more, from {_us(lost[_SHOWN].seconds)} up")
        unknown = sum(not c.estimate and not c.rejected for c in self.candidates[1:])
        if unknown:
            lines.append(f"  not {unknown} more tactics, of which no time is known")
        return "\n".join(lines)


_PRECEDENCE = {
    "forced": "the caller named the chosen one",
    "rule": "the rule holds until you tune this problem",
    "measured": "not measured at this very problem, as the chosen one is",
    "interpolated": "with less evidence than the chosen one has",
    "model": "with less evidence than the chosen one has",
}
# Sources of entries that are not publications; the shoot-out's come in by `python -m bench import`.
_MEASURED_BY = {"tuned": "measured by tuning", "shoot-out": "measured by the shoot-out"}


def _origin(estimate: Estimate) -> str:
    entry = estimate.entry
    if entry is None or estimate.source != "measured":
        return estimate.source
    return _MEASURED_BY.get(entry.source, f"published ({entry.source})")


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
