"""Numbers of others to compare with: implementations measured on the same GPU, and published times of a B200."""
from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from dispatch.measured import Entry
from dispatch.store import shipped_tables

#: The GPU of the published times.
PUBLISHED_GPU = "NVIDIA B200"
#: Field of a table that keeps published entries which measured ones have displaced.
DISPLACED = "published"


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
    for entry in published_entries():
        p = entry.problem
        if (p.n, p.k, p.experts) == (n, k, experts):
            found.setdefault((entry.source, entry.tactic.brief), {})[p.m] = entry.seconds * 1e6
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


def published_entries() -> list[Entry]:
    """Published times as entries: the B200 table's, until measured ones displace them (see `bench.importing`)."""
    table = shipped_tables().get(PUBLISHED_GPU)
    if table is None:
        return []
    displaced = [Entry.from_json(record) for record in table.extra.get(DISPLACED, ())]
    return [entry for entry in (*table.entries, *displaced) if entry.seconds and is_published(entry)]


def is_published(entry: Entry) -> bool:
    """Whether an entry's source is a publication: a pull request."""
    return entry.source.startswith("pr")
