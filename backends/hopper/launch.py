"""The launches of one pass on SM 9.0. Scratch memory comes from torch's allocator."""

from __future__ import annotations

from typing import Callable

import torch

from backends.device import DeviceInfo
from backends.hopper import stream_plan
from backends.hopper.dense_plan import CHUNK, CLUSTER, dense_tiling
from backends.hopper.stream_plan import GROUP, SLOT_BYTES, StreamConfig
from backends.operand import PreparedOperand, round_up
from backends.problem import Fc2Problem
from backends.triton.plan import gather_tokens, list_tokens


def run(
    problem: Fc2Problem,
    config: StreamConfig,
    launcher: Callable,
    a_data: torch.Tensor,
    a_scale: torch.Tensor,
    b: PreparedOperand,
    alpha: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Enqueue one pass: list, gather, stream, multiply. Each kernel is launched while the one before it
    runs (programmatic dependent launch) and waits for it before it touches memory.

    Args:
        problem: of the whole call; a_data, a_scale, alpha and out are the pass's rows.
        launcher: the compiled kernel of a configuration.
    """
    tokens, experts, inner = out.shape[0], problem.experts, problem.intermediate
    device = out.device
    swizzled = problem.a_layout == "128x4"
    padded = 1 << (experts - 1).bit_length()
    wide = round_up(tokens, 16)
    multiprocessors = DeviceInfo.of(device).sm_count
    tiling = dense_tiling(tokens, problem.n, problem.k, config.out_dtype, swizzled, multiprocessors // CLUSTER)
    counts = torch.empty(experts, dtype=torch.int32, device=device)
    token_of = torch.empty((experts, wide), dtype=torch.int32, device=device)
    weight_of = torch.empty((experts, wide), dtype=torch.float32, device=device)
    alpha_t = torch.empty((experts, tiling.columns), dtype=torch.float32, device=device)
    # Decoded activations, of the routed form or of the dense one: a call uses only one of them.
    slots = wide // GROUP * problem.k // CHUNK
    acts = torch.empty(max(slots * SLOT_BYTES, tiling.acts_bytes) // 4, dtype=torch.int32, device=device)
    # Part sums, the same.
    strips, parts = stream_plan.strips(problem.n, config), stream_plan.parts(problem.n, config, multiprocessors)
    floats = max((parts - 1) * strips * tokens * config.rows, tiling.parts_floats)
    sums = torch.empty(floats, dtype=torch.float32, device=device)
    counters = torch.empty(strips + tiling.counters, dtype=torch.int32, device=device)
    words = a_data.view(torch.int32)
    stream = torch.cuda.current_stream(device).cuda_stream

    list_tokens[(experts,)](
        alpha, counts, token_of, weight_of, alpha_t, counters, tokens, tiling.columns, counters.numel(),
        EXPERTS=experts, BLOCK=max(128, 1 << (config.tokens - 1).bit_length()), OVERLAP=True, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    gather_tokens[(experts, min(4, -(-tokens // 8)))](
        words, a_scale, counts, token_of, weight_of, acts, tokens,
        EXPERTS=experts, EXPERTS_PADDED=padded, INNER=inner, A_SWIZZLED=swizzled, ROWS=8, LISTED=True, HAS_DENSE=True,
        OVERLAP=True, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    launcher(config)(
        b.data.data_ptr(), b.scale.data_ptr(), acts.data_ptr(), counts.data_ptr(), sums.data_ptr(), counters.data_ptr(),
        out.data_ptr(), tokens, problem.n, parts, stream,
    )  # fmt: skip
    launcher(tiling.kernel)(
        words.data_ptr(), a_scale.data_ptr(), b.data.data_ptr(), b.scale.data_ptr(), alpha_t.data_ptr(), counts.data_ptr(),
        acts.data_ptr(), sums.data_ptr(), counters[strips:].data_ptr(), out.data_ptr(),
        *tiling.integers(tokens, problem.n, experts), stream,
    )  # fmt: skip
