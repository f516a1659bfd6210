"""The backends by name. Adding one is a file and a line in `_BUILTIN`, or `register` from outside."""
from __future__ import annotations

import importlib

from backends.interface import Fc2Backend

# Name -> "module:class", in the order in which "auto" considers them. Imported on first use only, so that a
# backend's optional packages cost nothing, and break nothing, until that backend is asked for.
_BUILTIN = {
    "cute": "backends.cute.backend:CuteBackend",
    "hopper": "backends.hopper.backend:HopperBackend",
    "triton": "backends.triton.backend:TritonBackend",
    "torch": "backends.torch_baseline:TorchBackend",
}
_instances: dict[str, Fc2Backend] = {}
_registered: list[str] = []
#: Counts registrations and removals: what was decided under another count may be out of date.
generation = 0


def names() -> list[str]:
    """All backend names, in the order in which "auto" considers them."""
    return [*_BUILTIN, *_registered]


def get(name: str) -> Fc2Backend:
    """The backend of that name. Raises KeyError listing the known names."""
    if name not in _instances:
        if name not in _BUILTIN:
            raise KeyError(f"unknown backend {name!r}; known: {', '.join(names())}")
        module, _, cls = _BUILTIN[name].partition(":")
        _instances.setdefault(name, getattr(importlib.import_module(module), cls)())
    return _instances[name]


def register(backend: Fc2Backend) -> None:
    """Add a third party's backend, after the built-in ones.

    Raises:
        TypeError: not an `Fc2Backend`.
        ValueError: the name is taken, is not a plain identifier, or is not that of its tactics.
    """
    if not isinstance(backend, Fc2Backend):
        raise TypeError(f"register() takes an Fc2Backend instance, got {type(backend).__name__}")
    if not backend.name.isidentifier() or backend.name == "auto":
        raise ValueError(f"backend name {backend.name!r} is not usable; take an identifier other than 'auto'")
    if backend.tactic_type.backend != backend.name:
        raise ValueError(
            f"backend {backend.name!r} runs tactics of {backend.tactic_type.backend!r}; set {backend.tactic_type.__name__}.backend "
            f"to {backend.name!r}"
        )
    if backend.name in names():
        raise ValueError(f"a backend named {backend.name!r} is already registered")
    global generation
    _instances[backend.name] = backend
    _registered.append(backend.name)
    generation += 1


def unregister(name: str) -> None:
    """Remove a backend that `register` added. Raises KeyError for any other name."""
    if name not in _registered:
        raise KeyError(f"{name!r} was not added by register(); registered: {', '.join(_registered) or 'none'}")
    global generation
    _registered.remove(name)
    del _instances[name]
    generation += 1
