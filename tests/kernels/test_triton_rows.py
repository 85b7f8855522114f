"""Kernels of a GPU decode step for few rows, against plain PyTorch."""

import pytest
import torch

from tests.kernels.triton_env import DEVICE, HALF, IS_INTERPRETED, error

pytest.importorskip("triton")

from qnext.kernels.experts_rows import triton_fwd as experts_module
from qnext.kernels.experts_rows.reference import ExpertScales, experts_rows_reference
from qnext.kernels.experts_rows.triton_config import RowsTile
from qnext.kernels.experts_rows.triton_one import one_tile
from qnext.kernels.fp8_blocks import dequantized, quantize_blocks, scale_shape
from qnext.kernels.norm_router import triton_fwd as router_module
from qnext.kernels.norm_router.reference import norm_router_reference
from qnext.kernels.row_argmax import triton_fwd as argmax_module
from qnext.kernels.row_argmax.reference import row_argmax_reference
from qnext.kernels.row_linear import triton_fwd as linear_module
from qnext.kernels.row_linear.reference import row_linear_reference

EPS = 1e-6
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, HALF]


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every tensor that a launcher allocates starts as NaN, or as an impossible id."""

    allocate = torch.empty

    def empty(*shape, **how):
        out = allocate(*shape, **how)
        return out.fill_(float("nan") if out.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(
        torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype, device=x.device)
    )


# Products of rows


def check_linear(num_rows, size, num_outputs, dtype, *, has_norm, has_residual, is_fp8=False):
    x = random(num_rows, size, dtype=dtype)
    weight, scale = random(num_outputs, size, dtype=dtype, scale=size**-0.5), None
    if is_fp8:
        weight, scale = quantize_blocks(weight)
    norm_weight = random(size, dtype=dtype, scale=0.2) if has_norm else None
    residual = random(num_rows, num_outputs, dtype=dtype) if has_residual else None
    given = (x, weight, norm_weight, residual, scale)
    assert linear_module.supports(*given, eps=EPS) is None
    ours = linear_module.row_linear_triton(*given, eps=EPS, out_dtype=torch.float32)
    expected = row_linear_reference(*given, eps=EPS, out_dtype=torch.float32)
    assert ours.dtype == torch.float32
    # Accumulated in fp32: what is left is the norm's rounding, where a sum lies near a tie.
    assert error(ours, expected) < (3e-4 if has_norm and dtype != torch.float32 else 1e-5)
    narrow = linear_module.row_linear_triton(*given, eps=EPS)
    assert narrow.dtype == dtype
    assert error(narrow, expected) < TOLERANCE[dtype]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16])
def test_rows_are_multiplied_by_a_weight(num_rows, dtype):
    check_linear(num_rows, 64, 24, dtype, has_norm=False, has_residual=False)
    check_linear(num_rows, 64, 24, dtype, has_norm=True, has_residual=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("size, num_outputs", [(40, 13), (1100, 5), (2048, 7)])
def test_odd_sizes_are_multiplied(num_rows, size, num_outputs):
    check_linear(num_rows, size, num_outputs, torch.float32, has_norm=True, has_residual=False)
    check_linear(num_rows, size, num_outputs, torch.float32, has_norm=False, has_residual=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("size, num_outputs", [(1024, 20), (256, 150), (200, 24), (1152, 10)])
def test_blocks_of_eight_bits_are_multiplied_with_their_scales(size, num_outputs):
    for num_rows in (1, 5):
        sizes = (num_rows, size, num_outputs, HALF)
        check_linear(*sizes, has_norm=True, has_residual=True, is_fp8=True)


@pytest.mark.parametrize("columns", [256, 512])
def test_scales_past_the_last_block_are_not_read(columns):
    x, whole = random(3, 384, dtype=HALF), random(150, 384, dtype=HALF, scale=0.05)
    weight, scale = quantize_blocks(whole)
    room = torch.full((scale.numel() + 4,), float("nan"), device=DEVICE)
    held = room[: scale.numel()].view_as(scale).copy_(scale)
    how = {"eps": EPS, "out_dtype": torch.float32}
    tile = linear_module.RowTile(16, columns, 2, 3)
    ours = linear_module.row_linear_fwd(x, weight, None, None, held, **how, tile=tile)
    assert error(ours, row_linear_reference(x, weight, None, None, scale, **how)) < 1e-5


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("tile", [(4, 64), (8, 256), (2, 128)])
def test_a_row_is_multiplied_in_tiles_of_any_cut(tile):
    x, weight = random(1, 200, dtype=HALF), random(13, 200, dtype=HALF, scale=0.1)
    norm_weight, residual = random(200, dtype=HALF, scale=0.2), random(1, 13, dtype=HALF)
    how = {"eps": EPS, "out_dtype": torch.float32}
    given = (x, weight, norm_weight, residual, None)
    ours = linear_module.row_linear_fwd(
        *given, **how, tile=linear_module.RowTile(*tile, num_warps=4)
    )
    assert error(ours, row_linear_reference(*given, **how)) < 3e-4


def test_a_row_has_the_same_bits_in_any_company():
    x, weight = random(16, 96, dtype=HALF), random(20, 96, dtype=HALF)
    norm_weight = random(96, dtype=HALF, scale=0.2)

    def run(rows, use_dot=None):
        return linear_module.row_linear_fwd(
            rows, weight, norm_weight, None, None, eps=EPS, out_dtype=HALF, use_dot=use_dot
        )

    whole = run(x)
    assert torch.equal(run(x[3:5]), whole[3:5])
    assert torch.equal(run(x[7:8], use_dot=True), whole[7:8])


def test_blocks_return_what_they_hold():
    weight = random(2, 200, 300)
    packed, scale = quantize_blocks(weight)
    assert tuple(scale.shape) == scale_shape(weight.shape) == (2, 2, 3)
    assert error(dequantized(packed, scale), weight) < 0.04
    again, _ = quantize_blocks(dequantized(packed, scale))
    assert torch.equal(again.float(), packed.float())


# Choice of experts


def check_router(num_rows, size, num_experts, top_k, dtype, *, is_normed, uses_counters):
    x = random(num_rows, size, dtype=dtype)
    norm_weight = random(size, dtype=dtype, scale=0.2)
    gate = random(num_experts, size, dtype=dtype, scale=2 * size**-0.5)
    shared_gate = random(1, size, dtype=dtype, scale=size**-0.5)
    given = (x, norm_weight, EPS, gate, shared_gate)
    how = {"top_k": top_k, "norm_topk_prob": is_normed}
    assert router_module.supports(*given, **how) is None
    counters = None
    if uses_counters:
        counters = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
    normed, weights, ids, shared_logit = router_module.norm_router_fwd(
        *given, **how, counters=counters
    )
    expected = norm_router_reference(*given, **how)
    assert ids.dtype == torch.int32 and weights.dtype == shared_logit.dtype == torch.float32
    assert error(normed, expected[0]) < TOLERANCE[dtype] / 4
    # Two logits that differ by less than the sums' rounding may trade places.
    assert (ids == expected[2]).float().mean() > 0.98
    assert error(weights, expected[1]) < 2e-3
    assert error(shared_logit, expected[3]) < 2e-3
    if counters is not None:
        assert not counters.any()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("uses_counters", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 16])
def test_experts_are_chosen(num_rows, dtype, uses_counters):
    check_router(num_rows, 64, 24, 4, dtype, is_normed=True, uses_counters=uses_counters)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("num_rows", [1, 3, 17])
@pytest.mark.parametrize("num_experts, top_k", [(5, 5), (37, 7), (64, 32)])
def test_experts_are_chosen_at_odd_sizes(num_rows, num_experts, top_k):
    size = 1100 if num_experts == 5 else 40
    check_router(
        num_rows, size, num_experts, top_k, torch.float32, is_normed=False, uses_counters=True
    )


@pytest.mark.parametrize("num_rows", [2, 20])
def test_equal_experts_are_chosen_by_lowest_id(num_rows):
    x, gate = random(num_rows, 32), torch.zeros(40, 32, device=DEVICE)
    gate[[9, 30, 11]] = random(32).abs()  # three equal winners or three equal losers
    given = (x.abs(), torch.zeros(32, device=DEVICE), EPS, gate, None)
    how = {"top_k": 6, "norm_topk_prob": True}
    _, weights, ids, shared_logit = router_module.norm_router_triton(*given, **how)
    assert shared_logit is None
    assert ids.tolist() == [[9, 11, 30, 0, 1, 2]] * num_rows
    assert torch.equal(weights[:, 0], weights[:, 2])


def test_ids_stay_valid_where_logits_are_no_numbers():
    x = torch.full((1, 32), float("nan"), device=DEVICE)
    given = (x, torch.zeros(32, device=DEVICE), EPS, random(12, 32), random(1, 32))
    _, _, ids, _ = router_module.norm_router_triton(*given, top_k=3, norm_topk_prob=True)
    assert ids.tolist() == [[0, 1, 2]]


# Mixtures


def mixture_inputs(num_rows, size, width, num_experts, top_k, dtype, *, shared_width, is_fp8):
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_rows)])
    for row in ids[1:3]:
        row.copy_(ids[0].flip(0))  # experts that two or three tokens share
    weights = [
        random(num_experts, 2 * width, size, dtype=dtype, scale=size**-0.5),
        random(num_experts, size, width, dtype=dtype, scale=width**-0.5),
        random(2 * shared_width, size, dtype=dtype, scale=size**-0.5),
        random(size, shared_width, dtype=dtype, scale=max(shared_width, 1) ** -0.5),
    ]
    scales = None
    if is_fp8:
        packed = [quantize_blocks(weight) for weight in weights]
        weights = [pair[0] for pair in packed]
        scales = ExpertScales(*(pair[1] for pair in packed))
    if not shared_width:
        weights[2:] = [None, None]
    named = {
        "top_weights": torch.rand(num_rows, top_k).to(DEVICE),
        "top_ids": ids.to(DEVICE, torch.int32),
        "shared_logit": random(num_rows) if shared_width else None,
        "residual": random(num_rows, size, dtype=dtype),
        "scales": scales,
    }
    return (random(num_rows, size, dtype=dtype), *weights), named


def check_mixture(*shape, shared_width, is_fp8=False, tile=None, takes_one=False):
    given, named = mixture_inputs(*shape, shared_width=shared_width, is_fp8=is_fp8)
    assert not takes_one or one_tile(given[1:], named["top_ids"].shape[1]) is not None
    assert experts_module.supports(*given, **named) is None
    ours = experts_module.experts_rows_fwd(*given, **named, tile=tile)
    expected = experts_rows_reference(*given, **named)
    assert ours.dtype == expected.dtype
    assert error(ours, expected) < TOLERANCE[shape[-1]]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16])
def test_experts_and_shared_expert_are_summed(num_rows, dtype):
    check_mixture(num_rows, 64, 32, 12, 3, dtype, shared_width=32)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "size, width, top_k, shared_width",
    [(40, 24, 5, 0), (48, 24, 1, 56), (1100, 20, 2, 8), (32, 600, 4, 40), (24, 16, 3, 1040)],
)
def test_mixtures_of_odd_sizes_are_summed(size, width, top_k, shared_width):
    check_mixture(3, size, width, 9, top_k, torch.float32, shared_width=shared_width)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "size, width, shared_width",
    [(200, 128, 256), (1152, 128, 0), (64, 640, 0), (64, 128, 0), (256, 640, 128)],
)
def test_mixtures_of_eight_bits_are_summed(size, width, shared_width):
    check_mixture(2, size, width, 3, 2, HALF, shared_width=shared_width, is_fp8=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "size, width, top_k, shared_width",
    [(64, 128, 3, 256), (1024, 256, 2, 128), (256, 128, 4, 0), (128, 512, 10, 512)],
)
def test_a_mixture_of_one_row_in_eight_bits_is_summed_without_tiles(
    size, width, top_k, shared_width
):
    sizes = (1, size, width, 12, top_k, HALF)
    check_mixture(*sizes, shared_width=shared_width, is_fp8=True, takes_one=True)


def test_one_row_takes_tiles_where_sizes_are_no_powers_of_two():
    for size, width, shared_width in ((96, 128, 128), (64, 384, 128), (64, 128, 384)):
        sizes = (1, size, width, 4, 2, HALF)
        given, _ = mixture_inputs(*sizes, shared_width=shared_width, is_fp8=True)
        assert one_tile(given[1:], 2) is None
        check_mixture(*sizes, shared_width=shared_width, is_fp8=True)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "tile",
    [
        RowsTile(16, 64, 4, 3, 32, 16, 4, 2),
        RowsTile(64, 16, 4, 3, 16, 64, 4, 2),
    ],
)
def test_mixtures_are_summed_in_tiles_of_any_cut(tile):
    check_mixture(2, 80, 48, 6, 3, HALF, shared_width=32, tile=tile)


@pytest.mark.parametrize("num_rows, is_fp8", [(1, False), (2, False), (4, False), (2, True)])
def test_a_mixture_has_the_same_bits_in_any_company(num_rows, is_fp8):
    width = 128 if is_fp8 else 32
    given, named = mixture_inputs(8, 64, width, 12, 3, HALF, shared_width=width, is_fp8=is_fp8)
    whole = experts_module.experts_rows_fwd(*given, **named)
    part = slice(2, 2 + num_rows)
    alone = {
        name: value[part] if isinstance(value, torch.Tensor) else value
        for name, value in named.items()
    }
    ours = experts_module.experts_rows_fwd(given[0][part], *given[1:], **alone)
    assert torch.equal(ours, whole[part])


# The likeliest token


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("num_rows, width", [(1, 1), (2, 70), (3, 4096), (16, 5000)])
def test_the_largest_logit_is_found(num_rows, width):
    logits = random(num_rows, width)
    assert argmax_module.supports(logits) is None
    assert torch.equal(argmax_module.row_argmax_triton(logits), logits.argmax(-1))


def test_ties_go_to_the_lowest_token_and_nan_never_wins():
    nan, inf = float("nan"), float("inf")
    rows = [
        ([1.0, 3.0, 3.0, nan], 1),
        ([-0.0, 0.0, -1.0, 0.0], 0),
        ([nan, -inf, nan, -inf], 1),
        ([nan, nan, nan, nan], 0),
        ([-5.0, -3.0, -3.0, -4.0], 1),
        ([inf, inf, nan, 1.0], 0),
    ]
    logits = torch.full((len(rows), 4500), -inf, device=DEVICE)
    logits[3] = nan
    for idx, (values, _) in enumerate(rows):
        logits[idx, 2 : 2 + len(values)] = torch.tensor(values)
    # Places before the values hold minus infinity, which only the rows of NaN prefer.
    expected = row_argmax_reference(logits)
    assert torch.equal(argmax_module.row_argmax_triton(logits), expected)
    assert expected.tolist() == [3, 2, 0, 0, 3, 2]
    far = torch.zeros(1, 9000, device=DEVICE)
    far[0, [4095, 4096, 8999]] = 2.0
    assert argmax_module.row_argmax_triton(far).tolist() == [4095]


# Refusals


def test_inputs_that_no_kernel_takes_are_refused_with_a_reason():
    x, weight = random(17, 32), random(8, 32)
    assert "17 rows" in linear_module.supports(x, weight)
    assert "float64" in linear_module.supports(x.double()[:2], weight.double())
    assert "weight of" in linear_module.supports(x[:2], weight.half())
    assert "contiguous" in linear_module.supports(x[:2, ::2], weight[:, ::2])
    assert "scales" in linear_module.supports(x[:2], weight.to(torch.float8_e4m3fn), scale=x)
    assert "fp32" in argmax_module.supports(x.half())
    how = {"top_k": 33, "norm_topk_prob": True}
    assert "33 of" in router_module.supports(x, x[0], EPS, random(64, 32), None, **how)
    given, named = mixture_inputs(2, 64, 32, 12, 3, HALF, shared_width=32, is_fp8=True)
    assert "multiple of 128" in experts_module.supports(*given, **named)


# Real sizes, on a GPU only


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16])
def test_products_of_the_flagship_are_right(num_rows, dtype):
    check_linear(num_rows, 2048, 12352, dtype, has_norm=True, has_residual=False)
    check_linear(num_rows, 4096, 2048, dtype, has_norm=False, has_residual=True)
    check_linear(num_rows, 2048, 151936, dtype, has_norm=True, has_residual=False)
    if dtype != torch.float32:
        check_linear(num_rows, 2048, 12352, dtype, has_norm=True, has_residual=False, is_fp8=True)
        check_linear(num_rows, 4096, 2048, dtype, has_norm=False, has_residual=True, is_fp8=True)
        check_linear(num_rows, 2048, 151936, dtype, has_norm=False, has_residual=False, is_fp8=True)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("uses_counters", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16, 37, 128])
def test_experts_of_the_flagship_are_chosen(num_rows, uses_counters):
    for dtype in (torch.bfloat16, torch.float32):
        for _ in range(4):
            check_router(
                num_rows, 2048, 512, 10, dtype, is_normed=True, uses_counters=uses_counters
            )


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_products_of_several_rows_have_a_dtype_and_a_residual(out_dtype, has_residual):
    x = random(5, 2048, dtype=torch.bfloat16)
    weight = random(12352, 2048, dtype=torch.bfloat16, scale=0.02)
    norm_weight = random(2048, dtype=torch.bfloat16, scale=0.2)
    residual = random(5, 12352, dtype=torch.bfloat16) if has_residual else None
    given, how = (x, weight, norm_weight, residual, None), {"eps": EPS, "out_dtype": out_dtype}
    ours = linear_module.row_linear_fwd(*given, **how)
    assert ours.dtype == out_dtype
    assert error(ours, row_linear_reference(*given, **how)) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("cut", [(1, 1), (2, 2), (4, 4)])
@pytest.mark.parametrize("uses_counters", [False, True])
def test_experts_of_the_flagship_are_chosen_by_any_cut(cut, uses_counters):
    x, norm_weight = random(3, 2048, dtype=torch.bfloat16), random(2048, dtype=torch.bfloat16)
    gate, shared = random(512, 2048, dtype=torch.bfloat16), random(1, 2048, dtype=torch.bfloat16)
    given, how = (x, norm_weight, EPS, gate, shared), {"top_k": 10, "norm_topk_prob": True}
    counters = torch.zeros(3, dtype=torch.int32, device=DEVICE) if uses_counters else None
    ours = router_module.norm_router_fwd(*given, **how, counters=counters, cut=cut)
    expected = norm_router_reference(*given, **how)
    assert (ours[2] == expected[2]).float().mean() > 0.98
    assert error(ours[1], expected[1]) < 2e-3
    assert counters is None or not counters.any()


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 16])
def test_mixtures_of_the_flagship_are_summed(num_rows, is_fp8):
    shape = (num_rows, 2048, 512, 64, 10, torch.bfloat16)
    check_mixture(*shape, shared_width=512, is_fp8=is_fp8)


@pytest.mark.gpu
@pytest.mark.skipif(IS_INTERPRETED, reason="launches overlap on a GPU only")
def test_a_layer_whose_launches_overlap_gives_the_same_bits():
    """Out-projection, router, mixture and next in-projection, many times in one graph."""
    dtype, num_layers = torch.bfloat16, 12
    given, named = mixture_inputs(8, 2048, 512, 64, 10, dtype, shared_width=512, is_fp8=False)
    norm_weight = random(2048, dtype=dtype, scale=0.2)
    gate, shared_gate = random(64, 2048, dtype=dtype), random(1, 2048, dtype=dtype)
    in_proj = random(4096, 2048, dtype=dtype, scale=0.02)
    out_proj = random(2048, 4096, dtype=dtype, scale=0.02)
    counters = torch.zeros(8, dtype=torch.int32, device=DEVICE)

    def step(x, use_pdl):
        how = {"eps": EPS, "out_dtype": dtype, "use_pdl": use_pdl}
        for _ in range(num_layers):
            inner = linear_module.row_linear_fwd(x, in_proj, norm_weight, None, None, **how)
            x = linear_module.row_linear_fwd(inner, out_proj, None, x, None, **how)
            normed, weights, ids, logit = router_module.norm_router_fwd(
                x, norm_weight, EPS, gate, shared_gate, top_k=10, norm_topk_prob=True,
                counters=counters, use_pdl=use_pdl,
            )  # fmt: skip
            x = experts_module.experts_rows_fwd(
                normed, *given[1:], top_weights=weights, top_ids=ids, shared_logit=logit,
                residual=x, scales=None, use_pdl=use_pdl,
            )  # fmt: skip
        return x, argmax_module.row_argmax_fwd(x.float(), use_pdl=use_pdl)

    for num_rows in (1, 2, 3, 8):
        x = named["residual"][:num_rows].contiguous()
        expected = step(x, use_pdl=False)
        graph = torch.cuda.CUDAGraph()
        step(x, use_pdl=True)
        with torch.cuda.graph(graph):
            ours = step(x, use_pdl=True)
        for _ in range(50):
            for tensor in ours:
                tensor.fill_(0)
            graph.replay()
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
        assert not counters.any()
