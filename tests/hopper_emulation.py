"""Runs the kernels of the Hopper backend on the emulator."""
from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_ptr

from backends.hopper import compiler
from backends.hopper.dense_plan import DenseTiling
from backends.hopper.stream_plan import StreamConfig, strips
from backends.hopper.tactic import KernelConfig
from backends.problem import OUT_DTYPES
from backends.triton import layout
from tests.emulator import Report, compile_target, emulate
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference


@functools.lru_cache(maxsize=None)
def compiled(config: KernelConfig):
    with compile_target("sm_90a"):
        return compiler.compile_kernel(config)


def launch(config: KernelConfig, buffers: dict[str, torch.Tensor], integers, **options) -> Report:
    """A kernel on tensors in the order of its pointers."""
    kernel = compiler.kernel_of(config)
    assert len(buffers) == len(kernel.pointers) and len(integers) == kernel.INTEGERS
    pointers = [
        make_ptr(kind, tensor.data_ptr(), cute.AddressSpace.gmem, assumed_align=align)
        for (kind, align), tensor in zip(kernel.pointers, buffers.values())
    ]
    return emulate(compiled(config), *pointers, *map(cutlass.Int32, integers), 0, buffers=buffers, **options)


def lists(alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """counts, token_of and weight_of as `backends.triton.plan.list_tokens` makes them; unwritten parts are poisoned."""
    m, experts = alpha.shape
    width = -(-m // 16) * 16
    token_of = torch.full((experts, width), 1 << 30, dtype=torch.int32)
    weight_of = torch.full((experts, width), float("nan"))
    counts = torch.zeros(experts, dtype=torch.int32)
    for e in range(experts):
        tokens = alpha[:, e].nonzero().flatten()
        counts[e] = len(tokens)
        token_of[e, : -(-len(tokens) // 16) * 16] = -1
        token_of[e, : len(tokens)] = tokens.int()
        weight_of[e, : len(tokens)] = alpha[tokens, e]
    return counts, token_of, weight_of


def gathered(
    a, counts: torch.Tensor, token_of: torch.Tensor, weight_of: torch.Tensor, experts: int
) -> torch.Tensor:
    """Slots as `backends.triton.plan.gather_tokens` makes them; what it does not write is NaN."""
    width, k = token_of.shape[1], a.shape[1]
    values = (a.dequantize().double() / 256).half()
    out = torch.full((experts, width, k // experts), float("nan"), dtype=torch.float16)
    for e in range(experts):
        tokens = token_of[e, : counts[e]].long()
        out[e, : len(tokens)] = values[tokens, e * (k // experts) : (e + 1) * (k // experts)]
    # 16 values of a lane: 8w + {0, 4, 1, 5}, then 8w + {2, 6, 3, 7}, of its word w.
    pieces = out.view(experts, width // 8, 8, k // experts // 256, 4, 4, 2, 8)  # e eight token chunk q t w value
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    values = pieces[..., order].permute(0, 1, 3, 4, 6, 2, 5, 7).contiguous()
    chunks = k // experts // 256
    slots = torch.full((experts, width // 8, chunks, 1040), -1, dtype=torch.int32)
    pieces = values.view(torch.int32).view(experts, width // 8, chunks, 8, 8, 16)  # ... piece token word
    for token in range(8):
        for piece in range(8):
            first = 16 + token * 128 + (piece ^ token) * 16
            slots[..., first : first + 16] = pieces[..., piece, token, :]
    used = (torch.arange(width) < counts[:, None]).view(experts, width // 8, 1, 8)
    slots[..., :8] = torch.where(used, token_of.view(experts, width // 8, 1, 8), -1)
    weights = torch.where(used, weight_of.view(experts, width // 8, 1, 8), 0.0)
    slots[..., 8:16] = weights.view(torch.int32)
    return slots


def run(
    config: StreamConfig, m: int, n: int, alpha: torch.Tensor | str, seed: int = 0, emulator_seed: int = 0,
    parts: int = 1, **options,
) -> tuple[torch.Tensor, Report]:
    """Fresh operands through the emulator into a poisoned output, checked against the float64 reference."""
    k = config.experts * config.chunks * 256
    if isinstance(alpha, str):
        alpha = make_alpha(alpha, m, config.experts, torch.Generator().manual_seed(seed + 1))
    a, b = make_operands(m, n, k, seed)
    prepared = layout.prepare(b)
    out = torch.full((m, n), float("nan"), dtype=OUT_DTYPES[config.out_dtype])
    counts, token_of, weight_of = lists(alpha)
    tensors = dict(
        w_data=prepared.data, w_scale=prepared.scale, gathered=gathered(a, counts, token_of, weight_of, config.experts),
        counts=counts, sums=torch.full((max((parts - 1) * strips(n, config) * m * config.rows, 4),), float("nan")),
        flags=torch.zeros(strips(n, config), dtype=torch.int32), out=out,
    )  # fmt: skip
    report = launch(config, tensors, (m, n, parts), seed=emulator_seed, **options)
    assert_meets_bar(out, *reference(a, b, alpha))
    return out, report


def image(a, columns: int) -> torch.Tensor:
    """Activations as `DenseKernel` takes them: float16 [K/64, columns, 64], by the definition."""
    tokens, k = a.shape
    plain = a.dequantize().view(tokens, k // 64, 4, 16)  # token, slice, lane t, value
    image = torch.zeros(k // 64, columns, 8, 8, dtype=torch.float16)
    for unit in range(8):
        first = 8 * (unit // 4) + unit % 4
        pair = plain[:, :, :, [first, first + 4]].reshape(tokens, k // 64, 8) / 256
        for token in range(tokens):
            image[:, token, unit ^ token % 8] = pair[token].half()
    return image


def dense(
    tiling: DenseTiling, hidden: int, a, b, alpha: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and the decoded activations, poisoned before."""
    (tokens, k), experts = a.shape, alpha.shape[1]
    prepared = layout.prepare(b)
    alpha_t = torch.zeros(experts, tiling.columns)
    alpha_t[:, :tokens] = alpha.T
    out = torch.full((tokens, hidden), float("nan"), dtype=out_dtype)
    buffers = dict(
        a_data=a.data, a_scale=a.scale, w_data=prepared.data, w_scale=prepared.scale, alpha_t=alpha_t,
        counts=(alpha != 0).sum(0).int(), acts=torch.full((k // 64, tiling.columns, 64), float("nan"), dtype=torch.float16),
        parts=torch.full((max(tiling.parts_floats, 4),), float("nan")),
        counters=torch.zeros(tiling.counters, dtype=torch.int32), out=out,
    )  # fmt: skip
    launch(tiling.kernel, buffers, tiling.integers(tokens, hidden, experts), **options)
    return out, buffers["acts"]
