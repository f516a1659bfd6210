"""Which backend and tactic run a problem, and why: a value computed without touching tensors or a GPU."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from backends import registry
from backends.device import DeviceInfo
from backends.interface import Fc2Backend, Support
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from dispatch.errors import ArgumentError, ArgumentTypeError, UnavailableError


@dataclass(frozen=True)
class Decision:
    """The backend and tactic chosen for a problem.

    Attributes:
        problem: what was decided on.
        backend: name of the chosen backend.
        tactic: one of that backend's tactics.
        source: "forced" when the caller named the backend, "default" when the order of the registry decided.
        rejected: (backend name, reason) for every backend considered before the chosen one.
    """

    problem: Fc2Problem
    backend: str
    tactic: Tactic
    source: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        p = self.problem
        lines = [
            f"fc2 m={p.m} n={p.n} k={p.k} experts={p.experts} -> {self.tactic} ({self.source})",
            *(f"  not {name}: {reason}" for name, reason in self.rejected),
        ]
        return "\n".join(lines)


def choose(
    problem: Fc2Problem, device: DeviceInfo, backend: str = "auto", tactic: Optional[Tactic] = None
) -> Decision:
    """Decide who runs `problem` on `device`.

    A named backend, or a tactic, is honoured or refused, never replaced; "auto" takes the first backend in registry
    order that is supported and can implement the problem.

    Raises:
        ArgumentError: unknown backend, or a tactic of another backend than the one named.
        ArgumentTypeError: tactic is not a `Tactic`.
        UnavailableError: the named backend or tactic cannot run; or nothing can. The message holds every reason.
    """
    if tactic is not None:
        backend = _backend_of(tactic, backend)
    if backend != "auto":
        chosen = _get(backend)
        wanted, support = _assess(chosen, problem, device, tactic, automatic=False)
        if not support:
            raise UnavailableError(f"backend {backend!r} cannot run this call: {support.reason}")
        return Decision(problem, backend, wanted, "forced")
    rejected = []
    for name in registry.names():
        wanted, support = _assess(registry.get(name), problem, device, None, automatic=True)
        if support:
            return Decision(problem, name, wanted, "default", tuple(rejected))
        rejected.append((name, support.reason))
    raise UnavailableError("no backend can run this call:\n" + "\n".join(f"  {n}: {reason}" for n, reason in rejected))


def _assess(
    backend: Fc2Backend, problem: Fc2Problem, device: DeviceInfo, tactic: Optional[Tactic], automatic: bool
) -> tuple[Optional[Tactic], Support]:
    support = backend.is_automatic(device) if automatic else backend.is_supported(device)
    if not support:
        return None, support
    tactic = tactic or backend.default_tactic(problem)
    return tactic, backend.can_implement(problem, tactic)


def _backend_of(tactic: Tactic, backend: str) -> str:
    if not isinstance(tactic, Tactic):
        raise ArgumentTypeError(f"tactic is {type(tactic).__name__}; it takes a Tactic, such as backends.get(name).tactics(...)[0]")
    if backend not in ("auto", tactic.backend):
        raise ArgumentError(
            f"tactic belongs to backend {tactic.backend!r} and backend is {backend!r}; name one backend, or leave it 'auto'"
        )
    return tactic.backend


def _get(name: str) -> Fc2Backend:
    try:
        return registry.get(name)
    except KeyError:
        known = ", ".join(["auto", *registry.names()])
        raise ArgumentError(f"backend is {name!r}; known: {known}") from None
