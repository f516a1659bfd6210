"""Numbers of others to compare with: implementations measured on the same GPU, and published times of a B200."""
from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Mapping

from bench.contestants import short_name
from dispatch.store import shipped_tables

#: The GPU of the published times.
PUBLISHED_GPU = "NVIDIA B200"


@dataclass(frozen=True)
class Peer:
    """One implementation's times over M.

    Attributes:
        name: of the implementation.
        gpu: the driver's name of the GPU.
        us: microseconds by token count.
        source: who measured, and how.
    """

    name: str
    gpu: str
    us: Mapping[int, float]
    source: str


@functools.lru_cache(maxsize=1)
def _records() -> tuple[Mapping[str, Any], ...]:
    return tuple(json.loads(Path(__file__).with_name("peers.json").read_text(encoding="utf-8"))["peers"])


def measured_peers(gpu: str, n: int, k: int, experts: int, alpha: str) -> list[Peer]:
    """Other implementations of this layer, measured on this GPU."""
    wanted = {"gpu": gpu, "n": n, "k": k, "experts": experts, "alpha": alpha}
    return [
        Peer(record["name"], gpu, {int(m): us for m, us in record["us"].items()}, record["source"])
        for record in _records()
        if all(record[name] == value for name, value in wanted.items())
    ]


def published(n: int, k: int, experts: int) -> list[Peer]:
    """Published B200 times of this shape, one peer for each source and tactic; they do not depend on alpha."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for entry in _published_entries():
        p = entry.problem
        if (p.n, p.k, p.experts) == (n, k, experts):
            found.setdefault((entry.source, short_name(entry.tactic)), {})[p.m] = entry.seconds * 1e6
    return [
        Peer(f"{tactic} [{source}]", PUBLISHED_GPU, dict(sorted(times.items())), f"published in {source}")
        for (source, tactic), times in found.items()
    ]


def best_published(n: int, k: int, experts: int) -> Mapping[int, float]:
    """The best published B200 time by token count."""
    best: dict[int, float] = {}
    for peer in published(n, k, experts):
        for m, us in peer.us.items():
            best[m] = min(us, best.get(m, us))
    return dict(sorted(best.items()))


def _published_entries() -> Iterable:
    table = shipped_tables().get(PUBLISHED_GPU)
    return [e for e in table.entries if e.seconds and e.source.startswith("pr")] if table else []
