"""What to tune: token counts in a useful order, where to look closer, and which tactics to run. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Mapping, Optional, Sequence

from backends import registry
from backends.device import DeviceInfo
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.choice import choose
from dispatch.errors import Fc2Error, UnavailableError
from dispatch.evidence import Measured

#: Between two tuned token counts, using one's winner at the other may cost at most this; else one between is
#: tuned.
BUCKET_REGRET = 0.05
#: Token counts closer than this ratio are not refined further.
CLOSEST = 1.3
#: Candidates predicted to take longer than this many times the best are not run.
PRUNE = 1.6


@dataclass(frozen=True)
class Point:
    """One problem and form of alpha to tune."""

    problem: Fc2Problem
    alpha: str


def coarse_to_fine(points: Sequence[Point]) -> list[Point]:
    """The points shape by shape, since a shape's weights take seconds to make; inside one, token counts in
    the order ends, middle, quarters, so that they are covered evenly wherever the run stops."""
    by_m = sorted({p.problem.m for p in points})
    order: list[int] = []
    ranges = [(0, len(by_m) - 1)]
    for low, high in ranges:  # grows while it is read: breadth first
        order += [i for i in (low, high) if i not in order]
        if high - low > 1:
            middle = (low + high) // 2
            ranges += [(low, middle), (middle, high)]
    rank = {by_m[i]: position for position, i in enumerate(order)}
    shapes = list(dict.fromkeys(replace(p.problem, m=1) for p in points))
    return sorted(points, key=lambda p: (shapes.index(replace(p.problem, m=1)), rank[p.problem.m]))


def next_m(times: Mapping[int, Mapping[Tactic, float]]) -> Optional[int]:
    """A token count to tune between two neighbours whose winners differ and cost too much at the other; None
    if none.

    Args:
        times: seconds by m and tactic.
    """
    tuned = sorted(m for m in times if times[m])
    worst, found = BUCKET_REGRET, None
    for low, high in zip(tuned, tuned[1:]):
        middle = round(math.sqrt(low * high))
        if high < CLOSEST * low or middle in times:
            continue
        here, there = (min(times[m], key=lambda t: times[m][t]) for m in (low, high))
        regret = (
            max(
                times[low].get(there, math.inf) / times[low][here],
                times[high].get(here, math.inf) / times[high][there],
            )
            - 1
        )
        if regret > worst:
            worst, found = regret, middle
    return found


def plan(
    point: Point,
    device: DeviceInfo,
    measured: Measured,
    backends: Optional[Sequence[str]],
    limit: int,
    winners: Sequence[Tactic] = (),
) -> list[Tactic]:
    """The tactics to run at a point: what "auto" takes now, each backend's incumbent and choice, earlier winners,
    the rest by expected time.

    Args:
        backends: names; default those that "auto" may take.
        limit: tactics at most, beyond one for each backend.
        winners: what won at other token counts of the same shape.
    """
    first: list[Tactic] = []
    rest: list[tuple[float, Tactic]] = []
    unknown: list[Tactic] = []
    for name in backends or registry.names():
        if not backends and not registry.get(name).is_automatic(device):
            continue
        try:
            decision = choose(point.problem, device, measured, name)
        except Fc2Error:
            if backends:
                raise
            continue
        own = [c for c in decision.candidates if c.tactic is not None and not c.rejected]
        first += [c.tactic for c in own if c.incumbent or c.tactic == decision.tactic]
        rest += [(c.seconds, c.tactic) for c in own if c.estimate]
        unknown += [c.tactic for c in own if not c.estimate]
    if not first:
        raise UnavailableError("no backend can run this problem; see `python -m dispatch explain`")
    if not backends:
        first.insert(0, choose(point.problem, device, measured).tactic)
    rest.sort(key=lambda pair: pair[0])
    kept = [tactic for seconds, tactic in rest if seconds <= PRUNE * rest[0][0]]
    allowed = {*first, *unknown, *(tactic for _, tactic in rest)}
    wanted = dict.fromkeys([*first, *(tactic for tactic in winners if tactic in allowed)])
    # Of tactics that nothing is known about, some from all over the list, which enumerates their fields in
    # order: at least a third of the room, or none of them would ever become known.
    unknown = [tactic for tactic in unknown if tactic not in wanted]
    room = max(0, limit - len(wanted))
    count = min(len(unknown), max(room - len(kept), -(-room // 3)))
    sampled = [unknown[i * len(unknown) // count] for i in range(count)]
    wanted = dict.fromkeys([*wanted, *[t for t in kept if t not in wanted][: room - count], *sampled])
    return list(wanted)[: max(limit, len(dict.fromkeys(first)))]
