"""The DeltaNet decode step against the plain recurrence over whole sequences."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from qnext.kernels.causal_conv1d.reference import causal_conv1d_reference
from qnext.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from qnext.kernels.gated_delta_step.inputs import L2_EPS, StepMemory, StepRows, StepWeights
from qnext.kernels.gated_delta_step.reference import gated_delta_step_reference
from qnext.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from qnext.kernels.l2_norm.reference import l2_norm_reference
from tests.kernels.triton_env import DEVICE, IS_INTERPRETED, error, poisoned

triton_fwd = pytest.importorskip("qnext.kernels.gated_delta_step.triton_fwd")

STEPS = {
    "reference": gated_delta_step_reference,
    "triton": triton_fwd.gated_delta_step_triton,
}
KERNELS = ("triton", "gluon")  # at sizes that both take
# Seen: 3e-7 in fp32; in 16 bits, rows that round to the other side.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@dataclass(frozen=True)
class Sizes:
    Hk: int = 1
    Hv: int = 2
    K: int = 8
    V: int = 8
    width: int = 4

    @property
    def channels(self) -> int:
        return 2 * self.Hk * self.K + self.Hv * self.V

    @property
    def columns(self) -> int:
        return self.channels + self.Hv * self.V + 2 * self.Hv


SMALL = Sizes()
FLAGSHIP = Sizes(Hk=16, Hv=32, K=128, V=128)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def make_weights(sizes: Sizes, dtype=torch.float32, a_log: float = 0.0) -> StepWeights:
    return StepWeights(
        conv1d=random(sizes.channels, sizes.width, dtype=dtype),
        A_log=random(sizes.Hv) * 0.3 + a_log,
        dt_bias=random(sizes.Hv),
        norm=random(sizes.V, dtype=dtype) * 0.2 + 1,
        norm_eps=1e-6,
    )


def make_memory(sizes: Sizes, slots: int, ring: int, dtype=torch.float32, state=None) -> StepMemory:
    return StepMemory(
        poisoned(slots, ring, sizes.channels + 2 * sizes.Hv, dtype=dtype),
        poisoned(slots, sizes.Hv, sizes.K, sizes.V, dtype=state or torch.float32),
    )


def copy(memory: StepMemory) -> StepMemory:
    return StepMemory(memory.conv_ring.clone(), memory.states.clone())


def whole_sequence(fused: torch.Tensor, weights: StepWeights, sizes: Sizes):
    """Heads of a whole sequence and its last state, layer by layer as the model runs it."""
    fused = fused.float().cpu()
    conv1d, A_log = weights.conv1d.float().cpu(), weights.A_log.float().cpu()
    dt_bias, norm = weights.dt_bias.float().cpu(), weights.norm.float().cpu()
    mixed, z, b, a = fused.split([sizes.channels, sizes.Hv * sizes.V, sizes.Hv, sizes.Hv], -1)
    mixed = causal_conv1d_reference(mixed, conv1d, torch.arange(fused.shape[0]))
    key = sizes.Hk * sizes.K
    q, k, v = mixed.split([key, key, sizes.Hv * sizes.V], -1)
    q = l2_norm_reference(q.reshape(-1, sizes.Hk, sizes.K), L2_EPS, sizes.K**-0.5)
    k = l2_norm_reference(k.reshape(-1, sizes.Hk, sizes.K), L2_EPS)
    v = v.reshape(-1, sizes.Hv, sizes.V)
    heads, state = gated_delta_rule_reference(
        q,
        k,
        v,
        -A_log.exp() * F.softplus(a + dt_bias),
        torch.sigmoid(b),
        cu_seqlens=torch.tensor([0, fused.shape[0]]),
        initial_state=torch.zeros(1, sizes.Hv, sizes.K, sizes.V),
    )
    z = z.reshape(-1, sizes.Hv, sizes.V)
    return gated_rms_norm_reference(heads, z, norm, weights.norm_eps).flatten(1), state[0]


def speculate(
    step, tokens: torch.Tensor, weights, memory: StepMemory, slots: list[int], num_rows: int
) -> torch.Tensor:
    """Heads of whole sequences [N, T, Hv * V], decoded by windows with drafts accepted at random.

    tokens: the rows of the sequences, without their rejected drafts. [N, T, columns]
    """
    num_seqs, length, columns = tokens.shape
    context, pending = [0] * num_seqs, [0] * num_seqs
    heads = poisoned(num_seqs, length, memory.states[0, :, 0].numel(), dtype=tokens.dtype)
    while min(context) < length:
        counts, accepted = [0] * num_seqs, [0] * num_seqs
        fused = poisoned(num_seqs, num_rows, columns, dtype=tokens.dtype)
        for n in range(num_seqs):
            left = length - context[n]
            if left == 0:
                continue
            counts[n] = int(torch.randint(1, num_rows + 1, ()))
            accepted[n] = min(int(torch.randint(0, counts[n], ())), left - 1)
            good = accepted[n] + 1
            fused[n, : counts[n]] = random(counts[n], columns, dtype=tokens.dtype)
            fused[n, :good] = tokens[n, context[n] : context[n] + good]
        rows = StepRows(ints(*slots), ints(*counts), ints(*context), ints(*pending))
        out = step(fused.flatten(0, 1), weights, memory, rows).unflatten(0, (num_seqs, -1))
        for n in range(num_seqs):
            assert (out[n, counts[n] :] == 0).all(), "rows that are padding are zero"
            if counts[n]:
                good = accepted[n] + 1
                heads[n, context[n] : context[n] + good] = out[n, :good]
                context[n], pending[n] = context[n] + good, accepted[n]
    return heads


def check_windows(step, sizes: Sizes, num_rows: int, length: int, **options: float) -> None:
    weights = make_weights(sizes, **options)
    memory = make_memory(sizes, 3, sizes.width - 1 + 2 * num_rows)
    tokens = random(2, length, sizes.columns)
    heads = speculate(step, tokens, weights, memory, [2, 0], num_rows)
    for n in range(2):
        expected, _ = whole_sequence(tokens[n], weights, sizes)
        assert error(heads[n], expected) < TOLERANCE[torch.float32]
    assert memory.states[1].isnan().all() and memory.conv_ring[1].isnan().all()


@pytest.mark.parametrize("name", STEPS)
def test_decoding_row_by_row_equals_the_whole_sequence(name):
    weights, tokens = make_weights(SMALL), random(2, 7, SMALL.columns)
    memory = make_memory(SMALL, 2, 5)  # the ring wraps
    heads = speculate(STEPS[name], tokens, weights, memory, [1, 0], 1)
    for n, slot in enumerate([1, 0]):
        expected, state = whole_sequence(tokens[n], weights, SMALL)
        assert error(heads[n], expected) < TOLERANCE[torch.float32]
        assert error(memory.states[slot], state) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("num_rows", range(2, 9))
@pytest.mark.parametrize("name", STEPS)
def test_windows_with_rejected_drafts_equal_the_accepted_sequence(name, num_rows):
    check_windows(STEPS[name], SMALL, num_rows, length=num_rows + 3)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(Hk=2, Hv=6, K=12, V=20),
        Sizes(Hk=1, Hv=3, K=20, V=5, width=2),
        Sizes(Hk=3, Hv=3, K=4, V=4, width=3),
        Sizes(width=1),
    ],
)
@pytest.mark.parametrize("name", STEPS)
def test_sizes_need_not_be_powers_of_two(name, sizes):
    check_windows(STEPS[name], sizes, num_rows=2, length=5)


@pytest.mark.parametrize("a_log", [-9.0, 4.0])
@pytest.mark.parametrize("name", STEPS)
def test_slow_and_fast_decay_hold(name, a_log):
    check_windows(STEPS[name], SMALL, num_rows=3, length=9, a_log=a_log)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("name", STEPS)
def test_decoding_goes_on_from_what_a_prefill_leaves(name, width):
    sizes = Sizes(width=width)
    weights, tokens = make_weights(sizes), random(9, sizes.columns)
    memory = make_memory(sizes, 1, 12)
    _, state = whole_sequence(tokens[:7], weights, sizes)
    memory.states[0] = state.to(DEVICE)
    mixed, _, gates = tokens.split([sizes.channels, sizes.Hv * sizes.V, 2 * sizes.Hv], -1)
    for position in range(7 - (width - 1), 7):
        memory.conv_ring[0, position % 12] = torch.cat([mixed[position], gates[position]])
    rows = StepRows(ints(0), ints(2), ints(7), ints(0))
    heads = STEPS[name](tokens[7:], weights, memory, rows)
    expected, _ = whole_sequence(tokens, weights, sizes)
    assert error(heads, expected[7:]) < TOLERANCE[torch.float32]


def test_softplus_of_very_negative_gates_keeps_its_digits():
    """log(1 + exp(-15.5)) is off by a quarter if 1 + exp(-15.5) rounds first."""
    weights = replace(make_weights(SMALL), A_log=torch.full((2,), 2.77, device=DEVICE))
    fused = random(1, SMALL.columns)
    fused[:, -2:] = -15.5 - weights.dt_bias
    memory = make_memory(SMALL, 1, 5)
    memory.states.copy_(random(*memory.states.shape))
    memory.conv_ring.fill_(0.1)
    other = copy(memory)
    rows = StepRows(ints(0), ints(1), ints(9), ints(0))
    for step, where in ((STEPS["triton"], memory), (STEPS["reference"], other)):
        step(fused, weights, where, rows)
    assert error(memory.states, other.states) < 2e-7


def test_drafts_change_no_bit_of_the_rows_before_them_or_after():
    weights, tokens = make_weights(SMALL), random(2, 9, SMALL.columns)
    step = STEPS["triton"]
    plain = speculate(step, tokens, weights, make_memory(SMALL, 2, 5), [0, 1], 1)
    drafted = speculate(step, tokens, weights, make_memory(SMALL, 2, 11), [0, 1], 4)
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize("name", STEPS)
def test_padding_sequences_touch_nothing(name):
    weights, memory = make_weights(SMALL), make_memory(SMALL, 4, 9)
    memory.states[2], memory.conv_ring[2] = 0.5, 0.25
    before = copy(memory)
    rows = StepRows(ints(0, 2, -1), ints(0, 1, 0), ints(7, 11, 3), ints(2, 1, 1))
    fused = poisoned(9, SMALL.columns, dtype=torch.float32)
    fused[3] = random(SMALL.columns)
    out = STEPS[name](fused, weights, memory, rows)
    assert (out[[0, 1, 2, 4, 5, 6, 7, 8]] == 0).all() and out[3].isfinite().all()
    untouched = [0, 1, 3]
    assert memory.states[untouched].isnan().all() and memory.conv_ring[untouched].isnan().all()
    assert torch.equal(memory.conv_ring[2, 11 % 9], fused[3, [*range(32), *range(48, 52)]])
    others = [place for place in range(9) if place != 11 % 9]
    assert torch.equal(memory.conv_ring[2, others], before.conv_ring[2, others])
    assert memory.states[2].isfinite().all() and not torch.equal(memory.states, before.states)


def launcher(kernel: str | None, **launch):
    """The step, run by the kernel named; by the one it chooses itself where that is None."""
    if kernel == "gluon" and not triton_fwd.HAS_GLUON:
        pytest.skip("this Triton has no Gluon that fits")
    return partial(triton_fwd.gated_delta_step_fwd, kernel=kernel, **launch)


def compare(
    sizes: Sizes,
    dtype: torch.dtype,
    state: torch.dtype,
    num_seqs: int,
    num_rows: int,
    *,
    kernel: str | None = None,
    max_pending: int | None = None,
    use_pdl: bool = False,
    **launch: int,
) -> None:
    """One step from a random memory, kernel against reference, in all that it writes.

    max_pending: most rows to replay; as many as a window of num_rows leaves, unless given.
    """
    step = launcher(kernel, use_pdl=use_pdl, **launch)
    max_pending = num_rows - 1 if max_pending is None else max_pending
    weights = make_weights(sizes, dtype)
    ring = sizes.width - 1 + num_rows + max(num_rows, max_pending)
    memory = make_memory(sizes, num_seqs + 1, ring, dtype, state)
    slots = torch.randperm(num_seqs + 1)[:num_seqs].tolist()
    memory.states[slots] = random(num_seqs, *memory.states.shape[1:], dtype=state)
    memory.conv_ring[slots] = random(num_seqs, *memory.conv_ring.shape[1:], dtype=dtype)
    counts = torch.randint(0, num_rows + 1, (num_seqs,)).tolist()
    context = torch.randint(ring, 100 * ring, (num_seqs,)).tolist()
    pending = torch.randint(0, max_pending + 1, (num_seqs,)).tolist()
    counts[0], pending[0] = num_rows, max_pending
    rows = StepRows(ints(*slots), ints(*counts), ints(*context), ints(*pending))
    fused = random(num_seqs * num_rows, sizes.columns, dtype=dtype)
    other = copy(memory)
    assert triton_fwd.supports(fused, weights, memory, rows, use_pdl=use_pdl) is None
    out = step(fused, weights, memory, rows)
    expected = gated_delta_step_reference(fused, weights, other, rows)
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(memory.states[slots], other.states[slots]) < TOLERANCE[state]
    assert torch.equal(memory.conv_ring[slots], other.conv_ring[slots])
    spare = (set(range(num_seqs + 1)) - set(slots)).pop()
    assert memory.states[spare].isnan().all() and memory.conv_ring[spare].isnan().all()


@pytest.mark.parametrize("state", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_step_equals_the_reference(dtype, state):
    compare(Sizes(Hk=2, Hv=4, K=8, V=8), dtype, state, num_seqs=3, num_rows=2)


@pytest.mark.parametrize("max_pending", [0, 9])
def test_more_rows_than_a_window_may_be_replayed(max_pending):
    sizes = Sizes(Hk=2, Hv=4, K=8, V=8)
    compare(sizes, torch.float32, torch.float32, 2, 2, max_pending=max_pending)


@pytest.mark.gpu
@pytest.mark.parametrize("num_seqs, num_rows", [(1, 1), (17, 1), (5, 2), (3, 4), (2, 8)])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_one_step_equals_the_reference_at_the_flagship_shape(
    kernel, dtype, state, num_seqs, num_rows
):
    compare(FLAGSHIP, dtype, state, num_seqs, num_rows, kernel=kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows, max_pending", [(1, 5), (2, 9), (4, 0), (8, 15)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_any_number_of_rows_may_be_replayed_at_the_flagship_shape(kernel, num_rows, max_pending):
    compare(
        FLAGSHIP, torch.bfloat16, torch.float32, 3, num_rows, kernel=kernel, max_pending=max_pending
    )


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_narrow_convolutions_never_read_what_was_not_written(kernel, width):
    sizes = Sizes(Hk=1, Hv=3, K=128, V=128, width=width)
    check_windows(launcher(kernel), sizes, num_rows=2, length=6)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("num_warps, num_ahead", [(4, 0), (4, 40), (8, 40)])
def test_launch_options_change_no_value(num_warps, num_ahead, num_rows):
    options = {"num_warps": num_warps, "num_ahead": num_ahead}
    compare(FLAGSHIP, torch.bfloat16, torch.float32, 5, num_rows, kernel="gluon", **options)


@pytest.mark.gpu
def test_the_flagship_is_run_by_gluon_and_other_sizes_by_triton():
    memory = make_memory(FLAGSHIP, 1, 5)
    assert triton_fwd.kernels(memory)[0] == ("gluon" if triton_fwd.HAS_GLUON else "triton")
    assert triton_fwd.kernels(make_memory(Sizes(K=128, V=64), 1, 5)) == ["triton"]


@pytest.mark.gpu
@pytest.mark.parametrize("K, V", [(128, 64), (64, 64), (96, 128), (32, 32), (16, 100)])
def test_one_step_equals_the_reference_at_other_shapes(K, V):
    compare(Sizes(Hk=4, Hv=8, K=K, V=V), torch.bfloat16, torch.float32, 9, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_flagship_windows_equal_the_accepted_sequence_and_plain_decoding_bit_for_bit(kernel):
    weights, tokens = make_weights(FLAGSHIP, a_log=-3.0), random(2, 24, FLAGSHIP.columns)
    step = launcher(kernel)
    plain = speculate(step, tokens, weights, make_memory(FLAGSHIP, 2, 16), [0, 1], 1)
    drafted = speculate(step, tokens, weights, make_memory(FLAGSHIP, 2, 16), [1, 0], 4)
    assert torch.equal(plain, drafted)
    expected, _ = whole_sequence(tokens[1], weights, FLAGSHIP)
    assert error(drafted[1], expected) < TOLERANCE[torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_early_start_changes_no_value(kernel):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs compute capability 9.0")
    compare(FLAGSHIP, torch.bfloat16, torch.float32, 5, 2, kernel=kernel, use_pdl=True)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_cuda_graph_follows_lengths_that_change_on_the_device(kernel):
    step = launcher(kernel)
    weights = make_weights(FLAGSHIP, torch.bfloat16)
    memory = make_memory(FLAGSHIP, 3, 16, torch.bfloat16)
    memory.states.copy_(random(*memory.states.shape))
    memory.conv_ring.copy_(random(*memory.conv_ring.shape))
    rows = StepRows(ints(0, 1), ints(2, 2), ints(20, 30), ints(0, 0))
    fused = random(4, FLAGSHIP.columns, dtype=torch.bfloat16)
    step(fused, weights, copy(memory), rows)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(fused, weights, memory, rows)
    for values in (((2, 0), (1, 2), (7, 31), (1, 1)), ((0, 2), (2, 0), (22, 8), (0, 0))):
        for tensor, new in zip(vars(rows).values(), values, strict=True):
            tensor.copy_(ints(*new))
        other = copy(memory)
        graph.replay()
        expected = gated_delta_step_reference(fused, weights, other, rows)
        assert error(out, expected) < TOLERANCE[torch.bfloat16]
        assert error(memory.states, other.states) < TOLERANCE[torch.float32]


def test_what_the_kernel_cannot_run_has_a_reason():
    weights, memory = make_weights(SMALL), make_memory(SMALL, 2, 7)
    rows = StepRows(ints(0), ints(1), ints(0), ints(0))
    fused = random(2, SMALL.columns)
    supports = triton_fwd.supports
    assert supports(fused, weights, memory, rows) is None
    assert "9 rows" in str(supports(random(9, SMALL.columns), weights, memory, rows))
    assert "conv_ring holds 7" in str(supports(random(3, SMALL.columns), weights, memory, rows))
    assert "conv_ring is in" in str(supports(fused.half(), weights, memory, rows))
    assert "float64" in str(supports(fused.double(), weights, memory, rows))
    wide = replace(weights, conv1d=random(SMALL.channels, 5))
    assert "width is 5" in str(supports(fused, wide, memory, rows))
    assert "int32" in str(
        supports(fused, weights, memory, replace(rows, query_lens=ints(1).long()))
    )
    assert "contiguous" in str(supports(random(SMALL.columns, 2).t(), weights, memory, rows))
    large = make_memory(Sizes(K=8, V=256), 2, 7)
    assert "V = 256" in str(supports(fused, weights, large, rows))
    if IS_INTERPRETED:
        assert "dependent launch" in str(supports(fused, weights, memory, rows, use_pdl=True))
