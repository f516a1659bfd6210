"""A tactic: one way for one backend to run a problem, as named fields.

Tactics are stored by name, never by index, so that a file written by one version means the same to the next.
"""
from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Mapping


@dataclass(frozen=True)
class Tactic:
    """Base of every backend's tactic: a frozen dataclass of ints, strings and bools with defaults.

    A subclass sets `backend` to the name of the backend that runs it.
    """

    backend: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        """`{"backend": name, field: value, ...}`."""
        return {"backend": self.backend, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Tactic:
        """The inverse of `to_json`; a missing field takes its default.

        Raises:
            ValueError: another backend's record, an unknown field, or a value of the wrong type.
        """
        values = dict(record)
        backend = values.pop("backend", cls.backend)
        if backend != cls.backend:
            raise ValueError(f"tactic is for backend {backend!r}, not {cls.backend!r}")
        known = {f.name: f for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"{cls.__name__} has no field {name!r}; it has {', '.join(known) or 'none'}")
            default = known[name].default
            # bool is an int to isinstance, but True is no tile size.
            if type(value) is not type(default):
                raise ValueError(
                    f"{cls.__name__}.{name} is {value!r} ({type(value).__name__}); "
                    f"it takes {type(default).__name__}, such as {default!r}"
                )
        return cls(**values)

    def __str__(self) -> str:
        return _text(self)

    @property
    def brief(self) -> str:
        """For people: the backend, tile and cluster as "(128,64)@(1,2)" where there are such fields, and fields off
        their defaults. Tells the tactics of one backend apart."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = []
        if {"tile_m", "tile_n", "cluster_m", "cluster_n"} <= values.keys():
            tile = (values.pop("tile_m"), values.pop("tile_n"))
            cluster = (values.pop("cluster_m"), values.pop("cluster_n"))
            parts.append("({},{})@({},{})".format(*tile, *cluster))
        defaults = {f.name: f.default for f in fields(self)}
        parts += [f"{name}={value}" for name, value in values.items() if value != defaults[name]]
        return " ".join([self.backend, *parts])


@functools.lru_cache(maxsize=4096)  # decisions order tactics by it
def _text(tactic: Tactic) -> str:
    shown = ",".join(f"{f.name}={getattr(tactic, f.name)}" for f in fields(tactic))
    return f"{tactic.backend}({shown})"
