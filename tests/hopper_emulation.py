"""Runs the kernels of the Hopper backend on the emulator."""

from __future__ import annotations

import functools

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.runtime import make_ptr

from backends.hopper import compiler
from backends.hopper.dense_plan import AHEAD, STREAM_TOKENS, DenseTiling
from backends.hopper.stream_plan import GATHER_COUNTERS, Division, StreamConfig
from backends.hopper.tactic import KernelConfig
from backends.problem import OUT_DTYPES
from backends.triton import layout
from tests.emulator import Report, compile_target, emulate
from tests.reference import assert_meets_bar, make_alpha, make_operands, reference


#: What a kernel does not write: no number as a float, and no token.
POISON = 0x7FC00000


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
    """counts, token_of and weight_of as `backends.hopper.lists` makes them; what it does not write is poisoned."""
    m, experts = alpha.shape
    width = -(-m // 16) * 16
    token_of = torch.full((experts, width), 1 << 30, dtype=torch.int32)
    weight_of = torch.full((experts, width), float("nan"))
    counts = torch.full((-(-experts // 8) * 8,), 1 << 30, dtype=torch.int32)
    for e in range(experts):
        tokens = alpha[:, e].nonzero().flatten()
        counts[e] = len(tokens)
        token_of[e, : len(tokens)] = tokens.int()
        weight_of[e, : len(tokens)] = alpha[tokens, e]
    return counts, token_of, weight_of


def late(alpha: torch.Tensor) -> torch.Tensor:
    """Experts that `backends.hopper.gather.is_late` tells."""
    counts = (alpha != 0).sum(0)
    return (2 * counts > len(alpha)) & (len(alpha) > STREAM_TOKENS)


def looked_at(alpha: torch.Tensor) -> torch.Tensor:
    """Where the kernels look to tell whether alpha is dense: eight tokens, all of their experts or 256."""
    m, experts = alpha.shape
    mask, rows, columns = torch.zeros(m, experts, dtype=torch.bool), min(m, 8), min(experts, 256)
    for i in range(rows):
        mask[i * m // rows, (i * experts // rows + torch.arange(columns)) % experts] = True
    return mask


def slots(a, alpha: torch.Tensor) -> torch.Tensor:
    """Slots as `backends.hopper.gather` makes them, int32 [experts, eights of tokens, chunks, 1040]; poison where it writes none."""
    (tokens, k), experts = a.shape, alpha.shape[1]
    eights, chunks = -(-tokens // 16) * 2, k // experts // 256
    values = (a.dequantize().double() / 256).half().view(tokens, experts, chunks, 4, 4, 2, 8)  # ... q t w value
    pairs = values[..., [0, 4, 1, 5, 2, 6, 3, 7]].permute(0, 1, 2, 3, 5, 4, 6).contiguous().view(torch.int32)
    pieces = pairs.view(tokens, experts, chunks, 8, 16)  # piece 2q + w, word
    out = torch.full((experts, eights, chunks, 1040), POISON, dtype=torch.int32)
    for e in range(experts):
        chosen = alpha[:, e].nonzero().flatten()
        for i, token in enumerate(chosen.tolist()):
            slot = out[e, i // 8]
            if i % 8 == 0:
                slot[:, :8], slot[:, 8:16] = -1, 0
            slot[:, i % 8] = token
            slot[:, 8 + i % 8] = alpha[token, e].view(torch.int32)
            for piece in range(8):
                first = 16 + i % 8 * 128 + (piece ^ i % 2) * 16
                slot[:, first : first + 16] = pieces[token, e, :, piece]
    return out


def run(
    config: StreamConfig,
    m: int,
    n: int,
    alpha: torch.Tensor | str,
    seed: int = 0,
    emulator_seed: int = 0,
    parts: int = 1,
    helpers: int = 0,
    cost: int = 0,
    **options,
) -> tuple[torch.Tensor, Report]:
    """Fresh operands through the emulator into a poisoned output, checked against the float64 reference."""
    k = config.experts * config.chunks * 256
    if isinstance(alpha, str):
        alpha = make_alpha(alpha, m, config.experts, torch.Generator().manual_seed(seed + 1))
    a, b = make_operands(m, n, k, seed, layout="128x4" if config.a_swizzled else "linear")
    prepared = layout.prepare(b)
    strips = -(-n // (config.rows * config.cluster)) * config.cluster
    division = Division(strips, parts, helpers, -(-strips // helpers) if helpers else 0, cost)
    out = torch.full((m, n), float("nan"), dtype=OUT_DTYPES[config.out_dtype])
    expected = slots(a, alpha)
    gathered = expected.clone()
    gathered[late(alpha)] = POISON  # the kernel gathers these itself
    counts, token_of, weight_of = lists(alpha)
    tensors = dict(
        alpha=alpha, a_data=a.data, a_scale=a.scale, w_data=prepared.data, w_scale=prepared.scale, gathered=gathered,
        counts=counts, token_of=token_of, weight_of=weight_of,
        sums=torch.full((max(division.left * division.strips * m * config.rows, 4),), float("nan")),
        counters=torch.zeros(GATHER_COUNTERS + division.strips, dtype=torch.int32), out=out,
    )  # fmt: skip
    report = launch(config, tensors, (m, n, *division.integers), seed=emulator_seed, **options)
    assert torch.equal(gathered, expected)
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


def beginning(tiling: DenseTiling, a) -> tuple[torch.Tensor, torch.Tensor, dict[int, int]]:
    """Activations decoded ahead and counters as `backends.hopper.lists` leaves them, and the places of the chunks."""
    decoded = image(a, tiling.columns).view(tiling.chunks, 4, tiling.columns, 8, 8)
    first = torch.full((max(tiling.ahead, 1), *decoded.shape[1:]), float("nan"), dtype=torch.float16)
    counters, places = torch.zeros(tiling.counters, dtype=torch.int32), {}
    for place in range(tiling.ahead):
        step, stretch = divmod(place, tiling.walks)
        chunk = tiling.bound(stretch) + step
        if chunk < (tiling.bound(stretch + 1) if stretch + 1 < tiling.walks else tiling.chunks):
            first[place] = decoded[chunk]
            counters[chunk] = AHEAD + place
            places[chunk] = place
    counters[tiling.chunks] = tiling.ahead * (tiling.columns // 8)
    return first, counters, places


def dense(
    tiling: DenseTiling, hidden: int, a, b, alpha: torch.Tensor, out_dtype: torch.dtype = torch.bfloat16, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and the activations that the kernel decodes, poisoned before."""
    (tokens, k), experts = a.shape, alpha.shape[1]
    prepared = layout.prepare(b)
    alpha_t = torch.zeros(experts, tiling.columns)
    alpha_t[:, :tokens] = alpha.T
    first, counters, _ = beginning(tiling, a)
    out = torch.full((tokens, hidden), float("nan"), dtype=out_dtype)
    buffers = dict(
        alpha=alpha, a_data=a.data, a_scale=a.scale, w_data=prepared.data, w_scale=prepared.scale, alpha_t=alpha_t,
        acts=torch.full((k // 64, tiling.columns, 64), float("nan"), dtype=torch.float16),
        first_acts=first, parts=torch.full((max(tiling.parts_floats, 4),), float("nan")), counters=counters, out=out,
    )  # fmt: skip
    integers = (tokens, hidden, experts, tiling.chunks // experts, *tiling.work)
    launch(tiling.kernel, buffers, integers, **options)
    return out, buffers["acts"]
