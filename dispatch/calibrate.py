"""Fitting the model to a table, and how far decisions without a measurement may be trusted.

`python -m dispatch fit FILE` runs this on a table and writes the constants into it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Optional, Sequence

from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.choice import pick_among
from dispatch.evidence import Measured
from dispatch.hardware import GPUS, Gpu, gpu_named
from dispatch.measured import Entry, Table
from dispatch.model import Model, fit


def gpu_of_table(table: Table) -> Gpu:
    """The known GPU that a table is for. Raises ValueError if its ceilings are not in `dispatch.hardware`."""
    gpu = gpu_named(table.gpu)
    if gpu is None:
        known = ", ".join(gpu.device.name for gpu in GPUS.values())
        raise ValueError(f"no ceilings are known for {table.gpu!r}; dispatch.hardware has {known}")
    return gpu


def fitted(table: Table) -> Table:
    """The table with the model fitted to its entries."""
    return replace(table, model=_fit(table.entries, gpu_of_table(table)).families)


def _fit(entries: Sequence[Entry], gpu: Gpu) -> Model:
    return fit(entries, gpu.device.sm_count, gpu.read_bandwidth, gpu.mma_flops)


@dataclass(frozen=True)
class LeftOut:
    """One measured problem, decided as if it had not been measured.

    Attributes:
        problem: the problem.
        measured: seconds of each tactic measured there.
        predicted: seconds expected of them from all other problems; None where nothing is known.
        chosen: what is taken on these expectations.
    """

    problem: Fc2Problem
    measured: dict[Tactic, float]
    predicted: dict[Tactic, Optional[float]]
    chosen: Tactic

    @property
    def regret(self) -> float:
        """Time of the chosen over the best, minus 1."""
        return self.measured[self.chosen] / min(self.measured.values()) - 1

    @property
    def errors(self) -> dict[Tactic, float]:
        """Predicted over measured, minus 1, of those with a prediction."""
        return {t: p / self.measured[t] - 1 for t, p in self.predicted.items() if p is not None}


def leave_one_out(table: Table) -> list[LeftOut]:
    """For each measured problem: forget all of its rows, fit the model to the rest, decide, and compare.

    Stricter than leaving out one row, which would leave the same problem's other tactics to compare with.
    """
    gpu = gpu_of_table(table)
    everything = Measured(table)
    problems = dict.fromkeys(e.problem for e in table.entries if e.seconds is not None)
    results = []
    for problem in problems:
        here = everything.evidence(problem).estimates
        if all(estimate.evidence != "here" for estimate in here.values()):
            continue
        rest = tuple(e for e in table.entries if e.problem != problem and e.seconds is not None)
        others = Measured(replace(table, entries=rest), model=_fit(rest, gpu))
        evidence = others.evidence(problem, allowed=here.__contains__)
        estimates = {tactic: evidence.estimate(tactic) for tactic in here}
        results.append(
            LeftOut(
                problem,
                {tactic: estimate.seconds for tactic, estimate in here.items()},
                {tactic: e.seconds if e else None for tactic, e in estimates.items()},
                pick_among(tuple(here), others, problem),
            )
        )
    return results


def summary(results: Sequence[LeftOut]) -> str:
    """Two lines: regret over problems that had a choice, and prediction error over all rows."""
    choices = [r for r in results if len(r.measured) > 1]
    errors = [abs(math.log1p(error)) for r in results for error in r.errors.values()]
    rows = sum(len(r.measured) for r in results)
    lines = []
    if choices:
        worst = max(choices, key=lambda r: r.regret)
        p = worst.problem
        lines.append(
            f"leave-one-out regret over {len(choices)} problems with a choice: geomean {geomean_regret(choices):.1%}, "
            f"worst {worst.regret:.1%} (m={p.m} n={p.n} k={p.k} experts={p.experts}: {worst.chosen})"
        )
    if errors:
        mean, largest = math.expm1(sum(errors) / len(errors)), math.expm1(max(errors))
        lines.append(
            f"leave-one-out prediction error over {len(errors)} of {rows} rows: mean {mean:.1%}, worst {largest:.1%}"
        )
    return "\n".join(lines)


def geomean_regret(results: Sequence[LeftOut]) -> float:
    """Geometric mean of chosen over best time, minus 1."""
    return math.expm1(sum(math.log1p(r.regret) for r in results) / len(results))
