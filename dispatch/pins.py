"""What a caller fixes of a tactic: all of it, or some fields; as an argument or as text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Mapping, Union

from backends.tactic import Tactic
from dispatch.errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True)
class Pin:
    """Some fields of a tactic that a caller fixes; the others stay open.

    Attributes:
        backend: whose tactic; "" where the fields alone say so.
        values: (field, value) in the order given.
    """

    backend: str
    values: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, tactic: Union[Tactic, Pin, Mapping[str, Any]]) -> Pin:
        """From a tactic, or a mapping of some of its fields, with "backend" or without. Raises
        ArgumentTypeError."""
        if isinstance(tactic, Pin):
            return tactic
        if isinstance(tactic, Tactic):
            tactic = tactic.to_json()
        if not isinstance(tactic, Mapping):
            raise ArgumentTypeError(
                f"tactic is {type(tactic).__name__}; it takes a Tactic, or a mapping of some fields of one such as "
                "{'backend': 'cute', 'tile_n': 64}"
            )
        values = dict(tactic)
        return cls(str(values.pop("backend", "")), tuple(values.items()))

    @classmethod
    def parse(cls, text: str) -> Pin:
        """From what `str(tactic)` prints, in whole or in part: "cute(tile_m=128,tile_n=64)", "cute" or
        "split_k=2".

        Raises:
            ArgumentError: the text is something else.
        """
        match = re.fullmatch(r"\s*(?:([A-Za-z_]\w*)\s*(?:\((.*)\))?|(.*=.*))\s*", text, re.DOTALL)
        if match is None:
            raise ArgumentError(
                f"tactic is {text!r}; it takes text such as 'cute(tile_m=128,tile_n=64)' or 'split_k=2'"
            )
        values = []
        for item in filter(None, (part.strip() for part in (match[2] or match[3] or "").split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not name.isidentifier():
                raise ArgumentError(f"tactic is {text!r}; {item!r} in it is not 'field=value'")
            number = int(value) if re.fullmatch(r"-?\d+", value) else value
            values.append((name, {"true": True, "false": False}.get(value.lower(), number)))
        return cls(match[1] or "", tuple(values))

    def to_json(self) -> dict[str, Any]:
        return {"backend": self.backend, **dict(self.values)} if self.backend else dict(self.values)

    def matches(self, tactic: Tactic) -> bool:
        return all(getattr(tactic, name) == value for name, value in self.values)

    def applied_to(self, tactic: Tactic) -> Tactic:
        """The tactic with the pinned fields replaced. Raises ValueError for an unknown field or a wrong
        type."""
        return type(tactic).from_json({**tactic.to_json(), **dict(self.values)})

    def __str__(self) -> str:
        shown = ",".join(f"{name}={value}" for name, value in self.values)
        return f"{self.backend}({shown})" if self.backend else shown


#: What `tactic=` takes.
TacticLike = Union[None, Tactic, Pin, Mapping[str, Any]]
