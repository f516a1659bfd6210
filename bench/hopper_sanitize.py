"""Every Triton tactic once, on small awkward shapes: `compute-sanitizer --tool memcheck python -m bench.hopper_sanitize`.

Also with `--tool racecheck`. Prints how many launches it made; the sanitizer's summary is the result.
"""
from __future__ import annotations

import torch

from backends import DeviceInfo, Fc2Problem, Nvfp4Tensor, quantize_nvfp4
from backends.triton.backend import TritonBackend


def main() -> None:
    backend = TritonBackend()
    capability = DeviceInfo.of("cuda").capability
    runs = 0
    for m, n, experts, inner, layout in ((5, 200, 3, 256, "128x4"), (70, 200, 3, 256, "linear"), (19, 72, 2, 48, "128x4")):
        a = quantize_nvfp4(torch.randn(m, experts * inner, device="cuda"), layout=layout)
        plain: Nvfp4Tensor = quantize_nvfp4(torch.randn(n, experts * inner, device="cuda"), layout=layout)
        for b in (plain, backend.prepare(plain)):
            problem = Fc2Problem(m, n, experts * inner, experts, torch.bfloat16, layout, b.layout, "cuda", capability)
            for share in (0.2, 1.0):  # routed and dense
                alpha = torch.rand(m, experts, device="cuda") * (torch.rand(m, experts, device="cuda") < share)
                for tactic in backend.tactics(problem):
                    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
                    backend.run(problem, tactic, a, b, alpha, out)
                    runs += 1
    torch.cuda.synchronize()
    print(f"{runs} runs")


if __name__ == "__main__":
    main()
