"""What `dispatch` raises. Every error is an `Fc2Error` and also the built-in type one would expect."""
from __future__ import annotations


class Fc2Error(Exception):
    """Base of all errors of this package."""


class ArgumentError(Fc2Error, ValueError):
    """An argument has a value, shape or device that does not fit."""


class ArgumentTypeError(Fc2Error, TypeError):
    """An argument has a type or dtype that is not accepted."""


class UnavailableError(Fc2Error, RuntimeError):
    """The backend or tactic asked for cannot run this problem on this device."""


class PerformanceWarning(UserWarning):
    """A call runs on a slow path that the caller can leave; the message says how. Given once per process and path."""


class NotCompiledError(Fc2Error, RuntimeError):
    """A kernel would have to be compiled while a CUDA graph is being captured."""
