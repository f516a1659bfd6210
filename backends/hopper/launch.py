"""The launches of one pass on SM 9.0. Scratch memory comes from torch's allocator."""

from __future__ import annotations

from typing import Callable

import torch

from backends.device import DeviceInfo
from backends.hopper import stream_plan
from backends.hopper.dense_plan import CHUNK, CLUSTER, STREAM_TOKENS, dense_tiling
from backends.hopper.stream_plan import GATHER_COUNTERS, GROUP, SLOT_BYTES
from backends.hopper.tactic import HopperTactic, ListConfig, stream_config
from backends.operand import PreparedOperand, round_up
from backends.problem import Fc2Problem


def run(
    problem: Fc2Problem,
    tactic: HopperTactic,
    launcher: Callable,
    a_data: torch.Tensor,
    a_scale: torch.Tensor,
    b: PreparedOperand,
    alpha: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Enqueue one pass: list, stream, multiply, where one of the last two returns at once; a pass of few tokens is always
    streamed. Each kernel is launched while the one before it runs (programmatic dependent launch). It may read operands at once:
    the listing kernel lets others start when all work before the call is complete. What another kernel writes it waits for.

    The dense kernel comes last: its blocks look at alpha and leave one after the other, on what multiprocessors the streaming
    kernel does not need, where in front of that kernel they would all have to have left (routed calls 1 to 3 us longer on an
    H100, 2026-11-26).

    Args:
        problem: of the whole call; a_data, a_scale, alpha and out are the pass's rows.
        launcher: the compiled kernel of a configuration.
    """
    tokens, experts = out.shape[0], problem.experts
    config = stream_config(problem, tactic, tokens)
    device = out.device
    wide = round_up(tokens, 16)
    multiprocessors = DeviceInfo.of(device).sm_count
    tiling = dense_tiling(tokens, problem.n, problem.k, config.out_dtype, config.a_swizzled, multiprocessors // CLUSTER)
    counts = torch.empty(round_up(experts, 8), dtype=torch.int32, device=device)
    token_of = torch.empty((experts, wide), dtype=torch.int32, device=device)
    weight_of = torch.empty((experts, wide), dtype=torch.float32, device=device)
    alpha_t = torch.empty((experts, tiling.columns), dtype=torch.float32, device=device)
    # Decoded activations, of the routed form or of the dense one: a call uses only one of them in the end. What the listing
    # kernel makes of both lies apart.
    acts_bytes = max(wide // GROUP * problem.k // CHUNK * SLOT_BYTES, tiling.acts_bytes)
    acts = torch.empty((acts_bytes + tiling.ahead_bytes) // 4, dtype=torch.int32, device=device)
    first_acts = acts.data_ptr() + acts_bytes
    # Part sums, the same.
    division = stream_plan.division(problem.n, config, tokens, multiprocessors, tactic.helpers)
    floats = max(division.left * division.strips * tokens * config.rows, tiling.parts_floats)
    sums = torch.empty(floats, dtype=torch.float32, device=device)
    before = GATHER_COUNTERS + division.strips
    counters = torch.empty(before + tiling.counters, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream

    operands = a_data.data_ptr(), a_scale.data_ptr()
    weights = b.data.data_ptr(), b.scale.data_ptr()
    launcher(ListConfig(config.a_swizzled))(
        alpha.data_ptr(), *operands, counts.data_ptr(), token_of.data_ptr(), weight_of.data_ptr(), alpha_t.data_ptr(),
        acts.data_ptr(), first_acts, counters.data_ptr(), tokens, experts, config.chunks, before, counters.numel(),
        *tiling.work, stream,
    )  # fmt: skip
    launcher(config)(
        alpha.data_ptr(), *operands, *weights, acts.data_ptr(), counts.data_ptr(), token_of.data_ptr(), weight_of.data_ptr(),
        sums.data_ptr(), counters.data_ptr(), out.data_ptr(), tokens, problem.n, *division.integers, stream,
    )  # fmt: skip
    if tokens > STREAM_TOKENS:
        launcher(tiling.kernel)(
            alpha.data_ptr(), *operands, *weights, alpha_t.data_ptr(), acts.data_ptr(), first_acts, sums.data_ptr(),
            counters[before:].data_ptr(), out.data_ptr(), tokens, problem.n, experts, config.chunks, *tiling.work, stream,
        )  # fmt: skip
