"""QuACK's product of the same weights in turns with ours: `python -m bench.quack [--m 64 128 256 384 512] [--json FILE]`.

On the layer of DeepSeek-V3, on SM 9.0, with `pip install -e '.[bench]' quack-kernels`. QuACK multiplies NVFP4 weights with
bfloat16 activations and has no alpha. Here it gets the values of our activations, which bfloat16 holds exactly. In turns with
it run our calls with dense alpha, the first and the last of each turn, and QuACK behind a pass of torch that applies alpha to
the activations, which rounds them to bfloat16.

Medians and the middle 80% in microseconds: single calls on a cold L2, and CUDA graphs of eight calls, which heat the GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
from typing import Callable, Sequence

import torch
from tabulate import tabulate

import dispatch
from backends.operand import Nvfp4Tensor, PreparedOperand
from bench.cupti import KernelTrace, cupti_unavailable
from bench.stats import summarize
from bench.timing import CuptiRunner
from dispatch.inputs import WEIGHT_STD, AlphaForm, TokenSet, copy_operand, generator, random_operand, token_sets
from dispatch.shapes import SHAPES
from dispatch.timing import Flush, GraphRunner, interleave

#: tile_m, tile_n, split_k, cluster_n that were the fastest of a sweep (`results/h200-peers.json`, `h100-peers.json`), by M.
TILES = {64: (128, 64, 7, 1), 128: (256, 128, 4, 1), 256: (128, 256, 2, 1), 384: (128, 192, 1, 1), 512: (128, 256, 1, 2)}
#: Copies of weights and activations that calls take in turn.
_COPIES = 4

Launch = Callable[[], object]


def contestants(
    product: Callable[..., torch.Tensor],
    tile: tuple[int, int, int, int] | None,
    sets: Sequence[TokenSet],
    ours: Sequence[Nvfp4Tensor | PreparedOperand],
    theirs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, list[tuple[Launch, torch.Tensor]]]:
    """By name, a launch and its output for each input set.

    Args:
        product: QuACK's `gemm_w4a16`.
        tile: one of `TILES`; None leaves only QuACK's own choice.
        sets: activations and alpha.
        ours, theirs: as many copies of the weights, and of QuACK's form of them.
    """
    m, experts = sets[0].alpha.shape
    rows = ours[0].shape[0]
    tiles = {"quack, its own tile": {}}
    if tile is not None:
        tiles[f"quack {tile}"] = dict(zip(("tile_m", "tile_n", "split_k", "cluster_n"), tile))
    found: dict[str, list[tuple[Launch, torch.Tensor]]] = {"ours": []}
    for tokens, mine, (blob, scale) in zip(sets, ours, theirs):
        values = tokens.a.decode(dtype=torch.bfloat16)
        out = torch.full((m, rows), float("nan"), dtype=torch.bfloat16, device=values.device)
        grouped, weighted = values.view(m, experts, -1), torch.empty_like(values)

        def call(tokens=tokens, mine=mine, out=out) -> object:
            return dispatch.fc2(tokens.a, mine, tokens.alpha, out=out)

        found["ours"].append((call, out))
        for name, how in tiles.items():

            def multiply(acts=values, blob=blob, scale=scale, out=out, how=how) -> object:
                return product(acts, blob, scale, out=out, wformat="nvfp4", **how)

            def apply_and_multiply(grouped=grouped, alpha=tokens.alpha, weighted=weighted, rest=multiply) -> object:
                torch.mul(grouped, alpha[:, :, None], out=weighted.view_as(grouped))
                return rest(acts=weighted)

            found.setdefault(name, []).append((multiply, out))
            found.setdefault(f"alpha, then {name}", []).append((apply_and_multiply, out))
    return {**found, "ours again": found["ours"]}


def measure(m: int, launches: dict[str, list[tuple[Launch, torch.Tensor]]], samples: int, device: torch.device) -> list[dict]:
    """Records of both timers; every launch has written finite values before."""
    for calls in launches.values():
        for launch, out in calls:
            out.fill_(float("nan"))
            launch()
            if not torch.isfinite(out).all():
                raise RuntimeError("a contestant left part of its output unwritten")
    calls = {name: [launch for launch, _ in pairs] for name, pairs in launches.items()}
    flush, times = Flush(device), {}
    with KernelTrace() as trace:
        single = {name: CuptiRunner(each, trace, flush) for name, each in calls.items()}
        times["single calls"] = interleave(single, samples, warmup=4)
    graphs = {name: GraphRunner(each * 2, device) for name, each in calls.items()}
    times["graphs"] = interleave(graphs, samples // 2, warmup=2)
    records = []
    for timer, by_name in times.items():
        for name, seconds in by_name.items():
            s = summarize([1e6 * x for x in seconds])
            records.append({"m": m, "timer": timer, "what": name, "us": s.median, "p10": s.p10, "p90": s.p90, "samples": s.count})
    return records


def weights(prepare: Callable[..., tuple], n: int, k: int, experts: int, device: torch.device) -> tuple[list, list]:
    """The same random weights in our prepared form and in QuACK's, `_COPIES` of each.

    Args:
        prepare: QuACK's `prepare_w4_weight`.
    """
    plain: Nvfp4Tensor = random_operand(n, k, WEIGHT_STD, generator(device, 0))
    blob, scale = prepare(plain.data.view(torch.uint8), plain.to_layout("linear").scale.view(torch.float8_e4m3fn), "nvfp4")
    mine = dispatch.prepare(plain, experts=experts)
    return [copy_operand(mine) for _ in range(_COPIES)], [(blob.clone(), scale.clone()) for _ in range(_COPIES)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--m", type=int, nargs="+", default=list(TILES), help="token counts")
    parser.add_argument("--samples", type=int, default=40, help="single calls of each; half as many graphs")
    parser.add_argument("--json", help="file for the records")
    arguments = parser.parse_args()
    if min(arguments.m) < 1 or arguments.samples < 4:
        parser.error("--m takes token counts of at least 1, --samples at least 4")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("bench.quack needs a GPU of SM 9.0 (H100, H200)", file=sys.stderr)
        return 2
    try:
        from quack.gemm_w4 import gemm_w4a16, prepare_w4_weight
    except ImportError as error:
        print(f"bench.quack needs QuACK ({error}): pip install quack-kernels", file=sys.stderr)
        return 2
    if reason := cupti_unavailable():
        print(f"bench.quack needs CUPTI: {reason}", file=sys.stderr)
        return 2
    device, shape = torch.device("cuda"), SHAPES["deepseek-v3-tp8"]
    ours, theirs = weights(prepare_w4_weight, shape.n, shape.k, shape.experts, device)
    records: list[dict] = []
    for m in arguments.m:
        sets = token_sets(AlphaForm("dense"), m, shape.k, shape.experts, generator(device, m), _COPIES)
        records += measure(m, contestants(gemm_w4a16, TILES.get(m), sets, ours, theirs), arguments.samples, device)
    meta = {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "quack": importlib.metadata.version("quack-kernels"),
        "command": " ".join(["python -m bench.quack", *sys.argv[1:]]),
    }
    columns = ("m", "timer", "what", "us", "p10", "p90")
    print(meta, tabulate([[r[c] for c in columns] for r in records], headers=columns, floatfmt=".1f"), sep="\n")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"meta": meta, "records": records}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
