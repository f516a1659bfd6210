"""A calibrated model of the time of one call: what to expect where nothing was measured.

    seconds = fixed + max(bytes / bandwidth / e_memory, flops / rate * wave factor / e_compute)

`bytes` is device-memory traffic with scale factors, workspace and alpha's form counted; `flops` those of
whole tiles, padding included; the wave factor is the idle share of the last wave. The efficiencies and the
fixed time are fitted per GPU from its measured table (`fit`) and stored in that table: e_memory and fixed per
family of kernels, e_compute per tile. A tile without a measured row has no constant and gets no prediction:
the model interpolates, it does not guess.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Callable, Mapping, Optional, Sequence

from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.hardware import expected_active_experts

if TYPE_CHECKING:
    from dispatch.measured import Entry

ALPHA_ANY, ALPHA_DENSE = "any", "dense"


@functools.lru_cache(maxsize=4096)
def top_k_of(alpha: str, experts: int) -> int:
    """Nonzeros in a row of alpha by its form, "topk:8" or "dense".

    Raises:
        ValueError: not one of these forms.
    """
    if alpha in (ALPHA_DENSE, ALPHA_ANY):
        return experts
    kind, _, count = alpha.partition(":")
    if kind != "topk" or not count.isdecimal() or not int(count):
        raise ValueError(f"alpha form is {alpha!r}; accepted: 'dense', 'any' and 'topk:K', such as 'topk:8'")
    return min(int(count), experts)


@dataclass(frozen=True)
class Work:
    """What one tactic does on one problem, independent of how fast the GPU is.

    Attributes:
        family: kernels that share their fixed time and memory efficiency.
        tile: key of the compute efficiency inside the family.
        bytes: device-memory traffic.
        flops: of whole tiles, padding included.
        wave_factor: time of the busiest multiprocessor over the mean, at least 1.
    """

    family: str
    tile: str
    bytes: float
    flops: float
    wave_factor: float


@dataclass(frozen=True)
class Family:
    """Fitted constants of one family of kernels.

    Attributes:
        fixed: seconds of launch, prologue and epilogue.
        memory: share of the read bandwidth it reaches.
        compute: share of the matrix rate by tile.
    """

    fixed: float
    memory: float
    compute: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        tiles = {tile: round(value, 4) for tile, value in sorted(self.compute.items())}
        return {"fixed_us": round(self.fixed * 1e6, 3), "memory": round(self.memory, 4), "compute": tiles}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Family:
        """Raises KeyError, TypeError or ValueError for a damaged record."""
        values = (float(record["fixed_us"]), float(record["memory"]), *map(float, record["compute"].values()))
        if not all(math.isfinite(v) and v >= 0 for v in values) or not all(v > 0 for v in values[1:]):
            raise ValueError(f"model constants out of range: {dict(record)}")
        return cls(values[0] * 1e-6, values[1], dict(zip(record["compute"], values[2:])))


@dataclass(frozen=True)
class Model:
    """Constants of one GPU.

    Attributes:
        sm_count, bandwidth (bytes/s), rate (FLOP/s): the GPU's own, `dispatch.hardware`.
        families: by `Work.family`.
    """

    sm_count: int
    bandwidth: float
    rate: float
    families: Mapping[str, Family] = field(default_factory=dict)

    def predict(self, problem: Fc2Problem, tactic: Tactic, alpha: str) -> Optional[float]:
        """Seconds, or None for a tactic without constants.

        Args:
            alpha: form of alpha, "topk:8" or "dense".
        """
        work = describe(problem, tactic, self.sm_count, alpha)
        family = self.families.get(work.family) if work else None
        efficiency = family.compute.get(work.tile) if family else None
        if efficiency is None:
            return None
        memory, compute = self.ideal(work)
        return family.fixed + max(memory / family.memory, compute / efficiency)

    def knows(self, backend: str) -> bool:
        """Whether any tactic of the backend has constants."""
        return any(name.partition("/")[0] == backend for name in self.families)

    def ideal(self, work: Work) -> tuple[float, float]:
        """Seconds of memory traffic and of arithmetic at full rate."""
        return work.bytes / self.bandwidth, work.flops * work.wave_factor / self.rate


#: Adding the N partial sums of one (token, expert) pair to out takes the gathered form as long as this many of
#: the pair's N * I multiplications, by the H200's times; anything from 32 to 256 orders its tactics alike
#: (2026-11-23).
_SUM_WORK = 128


def describe(problem: Fc2Problem, tactic: Tactic, sm_count: int, alpha: str) -> Optional[Work]:
    """The work of a tactic; None for a backend this module has no description of."""
    describer = _DESCRIBERS.get(tactic.backend)
    return describer(problem, tactic, sm_count, alpha) if describer else None


def _describe_cute(problem: Fc2Problem, tactic: Tactic, sm_count: int, alpha: str) -> Work:
    """One item is a tile and a range of experts, run by one CTA or a pair.

    split_k 0 (stream-K) divides the experts of all tiles evenly, with about one partial sum per CTA. Without
    `skip` everything is read and multiplied whatever alpha holds. No published time is of stream-K or `skip`:
    they are taken to reach their tile's efficiency.
    """
    ctas = tactic.tile_m // 128
    rows = _round_up(-(-problem.m // tactic.tile_m), max(1, tactic.cluster_m // ctas))
    columns = _round_up(-(-problem.n // tactic.tile_n), tactic.cluster_n)
    items = rows * columns * max(1, tactic.split_k)
    cluster = tactic.cluster_m * tactic.cluster_n
    slots = max(1, sm_count // cluster * cluster // ctas)
    tile = f"{tactic.tile_m}x{tactic.tile_n}"
    active = active_share(problem, alpha) if tactic.skip else 1.0
    flops = 2.0 * rows * tactic.tile_m * columns * tactic.tile_n * problem.k * active
    traffic = problem.bytes - problem.weight_bytes * (1 - active)
    if tactic.split_k == 0:
        partials = slots / items * problem.m * problem.n * 8  # float32, written and read
        return Work("cute", tile, traffic + partials, flops, 1.0)
    split = min(tactic.split_k, problem.experts)
    share = -(-problem.experts // split) / problem.experts  # the longest range of experts
    wave_factor = -(-items // slots) * slots * share * split / items
    return Work("cute", tile, traffic + _workspace(problem, split), flops, wave_factor)


def _describe_triton(problem: Fc2Problem, tactic: Tactic, sm_count: int, alpha: str) -> Work:
    """Experts that nobody selected are skipped. Every set of tactic fields but the split has an efficiency of
    its own.

    "tiled" reads the weights again for each tile of tokens, and multiplies whole tiles by each expert that
    the tile needs. The forms for prepared weights read each needed expert once, and multiply it with the
    tokens that selected it in groups of block_m, adding up their partial sums, or with all tokens where alpha
    is dense.
    """
    shape = _blocks(tactic)
    split = max(1, getattr(tactic, "split", 1))
    share = active_share(problem, alpha)
    rest = problem.bytes - problem.weight_bytes + _workspace(problem, split)
    if tactic.form == "tiled":
        tiles = -(-problem.m // tactic.block_m)
        share = active_share(replace(problem, m=min(problem.m, tactic.block_m)), alpha)
        rows = tiles * tactic.block_m * problem.experts * share
        programs = tiles * -(-problem.n // tactic.block_n) * split
        wave_factor = max(1.0, sm_count / programs)
        return Work(
            "triton/tiled",
            shape,
            problem.weight_bytes * share * tiles + rest,
            _pair_flops(problem, rows),
            wave_factor,
        )
    kind, rows = _gathered_pairs(problem, alpha, tactic.block_m)
    traffic = problem.weight_bytes * share + rest
    return Work(f"triton/{tactic.form} {kind}", shape, traffic, _pair_flops(problem, rows), 1.0)


def _describe_hopper(problem: Fc2Problem, tactic: Tactic, sm_count: int, alpha: str) -> Work:
    """As triton's forms for prepared weights, with tokens in groups of 8; every tactic has an efficiency of its
    own."""
    kind, rows = _gathered_pairs(problem, alpha, 8)
    traffic = problem.bytes - problem.weight_bytes * (1 - active_share(problem, alpha))
    return Work(f"hopper/{kind}", str(tactic), traffic, _pair_flops(problem, rows), 1.0)


def _gathered_pairs(problem: Fc2Problem, alpha: str, block: int) -> tuple[str, float]:
    """Whether alpha is "routed" or "dense", and the (token, expert) pairs that a gathering kernel works for."""
    if alpha in (ALPHA_DENSE, ALPHA_ANY):
        return "dense", float(problem.m * problem.experts)
    top_k = top_k_of(alpha, problem.experts)
    rows = gathered_rows(problem.m, problem.experts, top_k, block)
    return "routed", rows + problem.m * top_k * _SUM_WORK / problem.intermediate


@functools.lru_cache(maxsize=None)
def _blocks(tactic: Tactic) -> str:
    """All fields but the form and the split."""
    shown = (f.name for f in fields(tactic) if f.name not in ("form", "split"))
    return ",".join(f"{name}={getattr(tactic, name)}" for name in shown)


@functools.lru_cache(maxsize=4096)
def gathered_rows(m: int, experts: int, top_k: int, block: int) -> float:
    """Expected (token, expert) pairs, each expert's padded to whole blocks, when tokens select uniformly.

    An expert's tokens are binomial; a block is added with the probability that there are more tokens than the
    blocks before hold: exact for the first one, by the normal approximation for the others.
    """
    p = top_k / experts
    mean, sigma = m * p, math.sqrt(m * p * (1.0 - p))
    blocks, before = 1.0 - (1.0 - p) ** m, block
    while before < min(m, mean + 6.0 * sigma):
        blocks += 0.5 * math.erfc((before + 0.5 - mean) / (sigma * math.sqrt(2.0))) if sigma else 1.0
        before += block
    return experts * blocks * block


def _pair_flops(problem: Fc2Problem, rows: float) -> float:
    """FLOPs of that many (token, expert) pairs."""
    return 2.0 * rows * problem.n * problem.intermediate


def _describe_torch(problem: Fc2Problem, tactic: Tactic, sm_count: int, alpha: str) -> Work:
    """Decodes all of B to bfloat16 on every call unless the decoded weights are kept."""
    values = problem.n * problem.k
    traffic = 2 * values if tactic.form == "cached_weight" else problem.weight_bytes + 4 * values
    return Work(f"torch/{tactic.form}", "gemm", traffic, float(problem.flops), 1.0)


def _workspace(problem: Fc2Problem, parts: int) -> int:
    """Bytes of float32 partial sums, written and read once."""
    return 0 if parts == 1 else 2 * 4 * parts * problem.m * problem.n


def _round_up(value: float, multiple: int) -> int:
    return int(-(-value // multiple)) * multiple


_DESCRIBERS: dict[str, Callable[[Fc2Problem, Tactic, int, str], Work]] = {
    "cute": _describe_cute,
    "hopper": _describe_hopper,
    "torch": _describe_torch,
    "triton": _describe_triton,
}


def active_share(problem: Fc2Problem, alpha: str) -> float:
    """Expected share of the experts that at least one token selects."""
    return (
        expected_active_experts(problem.m, problem.experts, top_k_of(alpha, problem.experts))
        / problem.experts
    )


# Fixed times and memory efficiencies that the fit tries.
_FIXED = [1e-6 * x for x in (0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100, 200, 500)]
_MEMORY = [0.02 * 1.06**i for i in range(67)]
# Compute efficiencies that the fit tries per tile.
_TRIED = 16


def fit(entries: Sequence[Entry], sm_count: int, bandwidth: float, rate: float) -> Model:
    """Constants that minimize the squared logarithm of predicted over measured; the same entries give the
    same model.

    Fixed time and memory efficiency are searched on a grid; for each pair the compute efficiency of every
    tile follows from its own rows.
    """
    model = Model(sm_count, bandwidth, rate)
    families: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for entry in entries:
        if not entry.seconds:
            continue
        work = describe(entry.problem, entry.tactic, sm_count, entry.alpha)
        if work is not None:
            rows = families.setdefault(work.family, {}).setdefault(work.tile, [])
            rows.append((*model.ideal(work), entry.seconds))
    fitted = {name: _fit_family(tiles) for name, tiles in sorted(families.items())}
    return Model(sm_count, bandwidth, rate, fitted)


def _fit_family(tiles: Mapping[str, Sequence[tuple[float, float, float]]]) -> Family:
    """The family's constants from (seconds of traffic, seconds of arithmetic, seconds measured) of each
    tile's rows."""
    import numpy as np

    fixed, memory = np.meshgrid(np.array(_FIXED), np.array(_MEMORY), indexing="ij")
    total = np.zeros_like(fixed)
    compute: dict[str, Any] = {}
    for tile, rows in tiles.items():
        traffic, arithmetic, seconds = (np.array(column)[:, None, None] for column in zip(*rows))
        # Efficiencies to try: those that explain one row exactly (some, evenly, of many rows), and full rate.
        exact = np.sort(arithmetic / np.maximum(seconds - fixed, 1e-9), axis=0)
        picked = exact[np.unique(np.linspace(0, len(rows) - 1, _TRIED).round().astype(int))]
        tried = np.clip(np.concatenate([picked, np.ones_like(fixed)[None]]), 1e-4, 1.0)
        predicted = fixed + np.maximum((traffic / memory)[:, None], arithmetic[:, None] / tried)
        errors = (np.log(predicted / seconds[:, None]) ** 2).sum(axis=0)
        best = errors.argmin(axis=0)[None]
        compute[tile] = np.take_along_axis(tried, best, axis=0)[0]
        total += np.take_along_axis(errors, best, axis=0)[0]
    index = np.unravel_index(total.argmin(), total.shape)
    return Family(
        float(fixed[index]), float(memory[index]), {t: float(value[index]) for t, value in compute.items()}
    )
