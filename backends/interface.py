"""`Fc2Backend`: the one interface between the dispatcher and the kernels."""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Sequence, Union

import torch

from backends.device import DeviceInfo
from backends.operand import Nvfp4Tensor, PreparedOperand
from backends.problem import Fc2Problem
from backends.tactic import Tactic

Operand = Union[Nvfp4Tensor, PreparedOperand]


@dataclass(frozen=True)
class Support:
    """Yes, or no with the reason: a sentence a user can act on. Truthy when ok."""

    ok: bool
    reason: str = ""

    def __post_init__(self) -> None:
        if not self.ok and not self.reason:
            raise ValueError("a Support that is not ok needs a reason")

    def __bool__(self) -> bool:
        return self.ok


#: The one positive answer.
SUPPORTED = Support(True)


class Fc2Backend(ABC):
    """One implementation of FC2. An instance holds its compiled kernels; the registry makes one per process.

    Decisions (`is_supported`, `can_implement`, `tactics`, `default_tactic`) are pure and run without a GPU.
    """

    #: The name users write in `backend=`.
    name: ClassVar[str]
    #: The `Tactic` subclass this backend runs.
    tactic_type: ClassVar[type[Tactic]]

    @abstractmethod
    def is_supported(self, device: DeviceInfo) -> Support:
        """Whether the device's hardware and the installed packages can run this backend at all."""

    def is_automatic(self, device: DeviceInfo) -> Support:
        """Whether "auto" may take this backend on the device; narrower than `is_supported` for test-only modes."""
        return self.is_supported(device)

    @abstractmethod
    def can_implement(self, problem: Fc2Problem, tactic: Tactic) -> Support:
        """Whether the tactic computes the problem correctly; each broken rule has its own reason."""

    def keeps_accuracy(self, tactic: Tactic) -> Support:
        """Whether the tactic keeps the accuracy bar. One that does not is for comparisons: only naming it runs it."""
        return SUPPORTED

    @abstractmethod
    def tactics(self, problem: Fc2Problem) -> Sequence[Tactic]:
        """All tactics that `can_implement` accepts, in a fixed order."""

    @abstractmethod
    def default_tactic(self, problem: Fc2Problem) -> Tactic:
        """The tactic to run where nothing was measured. It may still be rejected by `can_implement`, with a reason."""

    def is_compiled(self, problem: Fc2Problem, tactic: Tactic) -> bool:
        """Whether `run` would launch without compiling anything. True for backends that compile nothing."""
        return True

    def compile(self, problem: Fc2Problem, tactic: Tactic) -> None:
        """Compile what `run` needs; may take seconds. The dispatcher never calls it during a CUDA graph capture."""

    @abstractmethod
    def run(
        self, problem: Fc2Problem, tactic: Tactic, a: Nvfp4Tensor, b: Operand, alpha: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Enqueue the computation on the current stream; never synchronizes with the host.

        Args:
            problem: describes the operands; `can_implement(problem, tactic)` is ok and m > 0.
            tactic: of `tactic_type`.
            a: [M, K].
            b: [N, K], plain or prepared by this backend.
            alpha: float32 [M, E], contiguous, with the global scales of a and b already folded in.
            out: [M, N], contiguous, of `problem.out_dtype`; every element is written.
        """

    def prepare(self, b: Nvfp4Tensor, in_place: bool = False) -> Operand:
        """B in the order this backend reads fastest; b itself where that is the plain form.

        Args:
            in_place: write into b's own memory and empty b (`Nvfp4Tensor.empty`) instead of allocating.
        """
        return b

    def prepared_layout(self, problem: Fc2Problem) -> str:
        """`b_layout` of this problem's weights after `prepare`, where that makes it faster; "" where it does not."""
        return ""

    def unprepare(self, b: Operand) -> Nvfp4Tensor:
        """The exact inverse of `prepare`, in the "128x4" layout."""
        if isinstance(b, Nvfp4Tensor):
            return b
        raise TypeError(f"backend {self.name!r} does not prepare operands; this one belongs to {b.backend!r}")
