"""Who takes part at a problem: pairs of a tactic and a form of the weights, and the reasons of those who do not."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Optional, Sequence

from backends import registry
from backends.device import DeviceInfo
from backends.interface import Fc2Backend
from backends.problem import Fc2Problem
from backends.tactic import Tactic
from bench.options import Options
from bench.records import Absent
from dispatch import store
from dispatch.inputs import AlphaForm

#: The backend that is everyone's baseline: all of its tactics always take part.
BASELINE = "torch"
#: Another backend's name for a field that the command line pins.
_ALIASES = {"split_k": "split"}


@dataclass(frozen=True)
class Contestant:
    """A tactic on one form of the weights.

    Attributes:
        form: `b_layout` of the weights: a layout, or "backend/form" for prepared ones.
        auto: whether "auto" takes it for weights of this form.
    """

    tactic: Tactic
    form: str
    auto: bool = False

    @property
    def label(self) -> str:
        """Unique among the contestants of one problem."""
        return self.tactic.brief + (" prepared" if "/" in self.form else "")


def absent_backends(names: Sequence[str], device: DeviceInfo) -> list[Absent]:
    """The backends that cannot run on the device, or whose packages do not import."""
    absent = []
    for name in names:
        support = registry.get(name).is_supported(device)
        if not support:
            absent.append(Absent(name, support.reason))
    return absent


def line_up(
    problem: Fc2Problem, device: DeviceInfo, options: Options, alpha: AlphaForm, favourite: Optional[Tactic]
) -> tuple[list[Contestant], list[Absent]]:
    """Contestants for a problem, whose `b_layout` says which form of the weights, and who is missing though supported.

    Args:
        options: which backends may take part, and which of their tactics; a tactic that lacks a pinned field may not.
        alpha: its form; the tables' fastest for it takes part.
        favourite: what "auto" takes; it takes part even where it is nobody's default.
    """
    tactics: list[Tactic] = []
    absent: list[Absent] = []
    chosen = bool(options.pins or options.tactics)
    for name in options.backends:
        backend = registry.get(name)
        if not backend.is_supported(device) or _prefers_other_weights(backend, problem):
            continue
        if options.tactics:
            found = [t for t in options.tactics if t.backend == name and backend.can_implement(problem, t)]
        elif options.all_tactics or options.pins:
            found = [tactic for tactic in backend.tactics(problem) if matches(tactic.to_json(), options.pins)]
            if not found:
                absent.append(Absent(name, "no tactic that can implement the problem has the fields asked for"))
        else:
            found, reason = _usual(backend, problem)
            if not found:
                absent.append(Absent(name, reason))
        tactics += found
    if not chosen:
        others = (favourite, fastest_known(problem, device, options, alpha))
        tactics += (t for t in dict.fromkeys(others) if t and t.backend in options.backends and t not in tactics)
    return [Contestant(tactic, problem.b_layout, tactic == favourite) for tactic in tactics], absent


def fastest_known(problem: Fc2Problem, device: DeviceInfo, options: Options, alpha: AlphaForm) -> Optional[Tactic]:
    """The fastest of the tactics timed with this form of alpha, at this M or at those around it; None where there is none.

    "auto" cannot ask for the form, as alpha lies on the device: the two together show what that costs.
    """

    def runs(tactic: Tactic) -> bool:
        if tactic.backend not in options.backends:
            return False
        backend = registry.get(tactic.backend)
        return bool(backend.is_supported(device) and backend.can_implement(problem, tactic))

    estimates = store.measured_for(device).evidence(problem, str(alpha), runs).estimates
    known = {tactic: e.seconds for tactic, e in estimates.items() if e.source != "model"}
    return min(known, key=known.get, default=None)


def _prefers_other_weights(backend: Fc2Backend, problem: Fc2Problem) -> bool:
    """Whether a backend that cannot read this form of the weights takes part with another one."""
    if backend.can_implement(problem, backend.default_tactic(problem)):
        return False
    return "/" in problem.b_layout or bool(backend.prepared_layout(problem))


def _usual(backend: Fc2Backend, problem: Fc2Problem) -> tuple[list[Tactic], str]:
    if backend.name == BASELINE:
        return list(backend.tactics(problem)), "it has no tactic for the problem"
    tactic = backend.default_tactic(problem)
    support = backend.can_implement(problem, tactic)
    return ([tactic], "") if support else ([], support.reason)


def matches(record: Mapping[str, Any], pins: Mapping[str, tuple]) -> bool:
    """Whether a tactic's record has one of the wanted values in every pinned field."""
    for names, accepted in pins.items():
        fields = [name if name in record else _ALIASES.get(name, name) for name in names.split(",")]
        if any(field not in record for field in fields):
            return False
        values = tuple(record[field] for field in fields)
        if (values if len(fields) > 1 else values[0]) not in accepted:
            return False
    return True
