"""What a run returns, and the errors it raises."""

from __future__ import annotations

from dataclasses import dataclass, field


class EmulatorError(Exception):
    """Base of everything the emulator raises."""


class PtxError(EmulatorError):
    """PTX the emulator cannot parse, or an opcode or modifier it does not know."""


class Fault(EmulatorError):
    """The kernel did something wrong. The message ends with the CTA, warp, PTX line and how to reproduce
    it."""

    def locate(self, warp, kernel, machine) -> Fault:
        text = str(self)
        if warp is not None:
            line = next((i.text for i in kernel.instrs if i.line == warp.line), "")
            text += f"\n  at {warp.name}, PTX line {warp.line}: {line}"
        text += f"\n  kernel {kernel.name[:80]}, schedule={machine.schedule!r}, seed={machine.seed}"
        located = type(self)(text)
        located.reason = str(self)
        return located


class Race(Fault):
    """Two accesses without a happens-before relation."""


class Deadlock(Fault):
    """No warp can run and nothing asynchronous is pending."""

    @staticmethod
    def describe(machine) -> Deadlock:
        lines = ["deadlock: no warp can run and no asynchronous operation is pending"]
        for cluster in machine.active:
            for cta in cluster.ctas:
                for w in cta.warps:
                    if w.waiting is not None and not w.state == 2:
                        lines.append(f"  {w.name}, PTX line {w.line}: waits for {w.waiting()}")
        return Deadlock("\n".join(lines))


@dataclass
class LaunchReport:
    """One kernel launch."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_smem: int
    counters: dict[str, int] = field(default_factory=dict)
    high_water: dict[str, int] = field(default_factory=dict)
    warp_instructions: dict[int, int] = field(
        default_factory=dict
    )  # by warp index within the CTA, summed over CTAs
    loads: dict[str, int] = field(
        default_factory=dict
    )  # bytes of global loads (not TMA) by buffer, a uniform one counted once
    stores: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Report:
    """All launches of one host call, in order."""

    schedule: str
    seed: int
    launches: list[LaunchReport] = field(default_factory=list)

    @property
    def instructions(self) -> int:
        return sum(sum(launch.warp_instructions.values()) for launch in self.launches)

    def counter(self, name: str) -> int:
        return sum(launch.counters.get(name, 0) for launch in self.launches)

    def __str__(self) -> str:
        out = []
        for launch in self.launches:
            out.append(
                f"{launch.kernel[:80]}: grid {launch.grid} cluster {launch.cluster} block {launch.block} "
                f"dynamic SMEM {launch.dynamic_smem} B, {launch.seconds:.2f} s"
            )
            for title, table in (
                ("counters", launch.counters),
                ("high water", launch.high_water),
                ("instructions by warp", launch.warp_instructions),
                ("bytes loaded", launch.loads),
                ("bytes stored", launch.stores),
            ):
                if table:
                    out.append(
                        f"  {title}: " + ", ".join(f"{k} {v}" for k, v in sorted(table.items(), key=str))
                    )
        return "\n".join(out)
