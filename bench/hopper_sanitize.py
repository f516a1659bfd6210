"""Every tactic for Hopper once, on small awkward shapes: `compute-sanitizer --tool memcheck python -m bench.hopper_sanitize`.

Also with `--tool racecheck`. Prints how many calls it made; the sanitizer's summary is the result. What racecheck reports of
`fc2_warpgroup` and, on the largest shape, of `StreamKernel` is taken for false alarms: `results/hopper-notes.md` says why.
"""
from __future__ import annotations

import torch

from backends import DeviceInfo, Fc2Problem, Nvfp4Tensor, quantize_nvfp4, registry


# M, N, E, I and the layout of scale factors.
SMALL = ((5, 200, 5, 256, "128x4"), (70, 200, 5, 256, "linear"), (19, 72, 2, 48, "128x4"))
# With 52 of 132 multiprocessors idle and 40 items, helpers take 8 of each strip (of 37 and fewer they would take none,
# `share.py`); with so many tokens slots are awaited in no order.
HELPED = (400, 5120, 40, 256, "128x4")


def main() -> None:
    device = DeviceInfo.of("cuda")
    runs = dict.fromkeys(("hopper", "triton"), 0)
    for shape in (*SMALL, HELPED):
        m, n, experts, inner, layout = shape
        a = quantize_nvfp4(torch.randn(m, experts * inner, device="cuda"), layout=layout)
        plain: Nvfp4Tensor = quantize_nvfp4(torch.randn(n, experts * inner, device="cuda"), layout=layout)
        for b in (plain, registry.get("triton").prepare(plain)):
            problem = Fc2Problem(m, n, experts * inner, experts, torch.bfloat16, layout, b.layout, "cuda", device.capability)
            for share in (0.15, 1.0):  # routed and dense
                alpha = torch.rand(m, experts, device="cuda") * (torch.rand(m, experts, device="cuda") < share)
                for name in runs if shape in SMALL else ("hopper",):
                    for tactic in registry.get(name).tactics(problem):
                        out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
                        registry.get(name).run(problem, tactic, a, b, alpha, out)
                        runs[name] += 1
    torch.cuda.synchronize()
    print(", ".join(f"{name}: {count} runs" for name, count in runs.items()))


if __name__ == "__main__":
    main()
