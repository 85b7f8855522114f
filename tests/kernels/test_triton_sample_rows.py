"""Sampling and acceptance kernels: exact cuts, the right distributions, the same bits anywhere."""

import math

import numpy as np
import pytest
import torch

from qnext.kernels.decide_token.reference import Cuts, pick, token_weights
from qnext.kernels.sample_rows.fields import (
    MAX_CANDIDATES,
    PenaltyFields,
    SampledRows,
    SampleWorkspace,
    SamplingFields,
    TokenCounts,
    Window,
)
from qnext.kernels.sample_rows.reference import (
    accept_drafts_reference,
    apply_penalties_reference,
    count_tokens_reference,
    cut_probs,
    sample_rows_reference,
)
from qnext.runtime.random_bits import Purpose, uniform
from qnext.runtime.random_bits import random_bits as bits_of
from tests.kernels.triton_env import DEVICE, IS_INTERPRETED, poisoned

triton = pytest.importorskip("triton")
tl = triton.language

from qnext.kernels.sample_rows.triton_accept import accept_drafts_triton  # noqa: E402
from qnext.kernels.sample_rows.triton_fwd import sample_rows_triton, supports  # noqa: E402
from qnext.kernels.sample_rows.triton_mass import random_bits  # noqa: E402
from qnext.kernels.sample_rows.triton_penalties import (  # noqa: E402
    apply_penalties_triton,
    clear_counts_triton,
    count_tokens_triton,
)

# The interpreter takes some 60 ms for a row with filters.
NUM_SEEDS = 120 if IS_INTERPRETED else 10000

# temperature, top_k, top_p, min_p
SETTINGS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.7, 20, 1.0, 0.0),
    (0.7, 20, 0.8, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.3, 50, 0.95, 0.05),
    (1.0, 0, 0.95, 0.02),
    (1.0, 1, 1.0, 0.0),
    (5.0, 3000, 0.5, 0.0),
]


def fields_of(settings, seeds=None, positions=None) -> SamplingFields:
    columns = list(zip(*settings, strict=True))
    count = len(settings)
    seeds = [7 + 3 * i - 2**40 * i for i in range(count)] if seeds is None else seeds
    positions = range(5, 5 + count) if positions is None else positions
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int32)
    values = (*columns, list(seeds), list(positions))
    pairs = zip(values, dtypes, strict=True)
    return SamplingFields(*(torch.tensor(v, dtype=d, device=DEVICE) for v, d in pairs))


def sampled(logits, fields, purpose=0, **options) -> SampledRows:
    count = logits.shape[0]
    out = SampledRows(
        torch.full((count,), -7, dtype=torch.int64, device=DEVICE),
        poisoned(count, dtype=torch.float32),
        torch.full((count, 4), -7, dtype=torch.int64, device=DEVICE),
    )
    return sample_rows_triton(logits, fields, purpose=purpose, out=out, **options)


def kept_ids(row, cut) -> list[int]:
    return cut_probs(row, 1.0, cut).nonzero().flatten().tolist()


def check_rows(logits, fields) -> None:
    """Cuts equal the reference's, up to logits at a rounding's distance; tokens fit the CDF."""
    ours = sampled(logits, fields)
    expected = sample_rows_reference(logits.cpu(), fields, purpose=0)
    for i in range(logits.shape[0]):
        temperature = float(fields.temperature[i])
        row = logits[i].cpu()
        probs = cut_probs(row, temperature, ours.cuts[i])
        right = cut_probs(row, temperature, expected.cuts[i])
        assert float((probs - right).abs().sum()) < 2e-5, f"row {i}: another distribution"
        token = int(ours.tokens[i])
        assert probs[token] > 0, f"row {i}: a token of probability 0"
        assert abs(float(ours.logprobs[i]) - math.log(probs[token])) < 3e-5
        if temperature >= 1e-5:
            u = uniform(int(fields.seed[i]) % 2**64, int(fields.position[i]), Purpose.TARGET)
            reached = probs.cumsum(0)
            before = float(reached[token] - probs[token])
            assert before - 1e-5 <= u <= float(reached[token]) + 1e-5, f"row {i}: not at u"
        else:
            assert token == int(row.argmax())


@triton.jit
def bits_kernel(p_seed, p_position, p_bits, purpose, B: tl.constexpr) -> None:
    o_b = tl.arange(0, B)
    bits = random_bits(tl.load(p_seed + o_b), tl.load(p_position + o_b), purpose)
    tl.store(p_bits + o_b, bits.to(tl.int64, bitcast=True))


@pytest.mark.parametrize("purpose", [0, 1, 2, 3])
def test_random_bits_are_the_references(purpose):
    seeds = [0, 1, -1, 2**62 + 12345, -(2**63), 2**32, 2**32 - 1, 77]
    positions = [0, 1, 2, 3, 2**31 - 1, 262144, 9, 10]
    bits = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    bits_kernel[(1,)](
        torch.tensor(seeds, device=DEVICE),
        torch.tensor(positions, dtype=torch.int32, device=DEVICE),
        bits,
        purpose,
        B=8,
    )
    expected = [bits_of(s % 2**64, p, purpose) for s, p in zip(seeds, positions, strict=True)]
    assert [b % 2**64 for b in bits.tolist()] == expected


def test_the_reference_has_the_distribution_of_a_cpu():
    logits = torch.randn(len(SETTINGS), 300) * 3
    logits[:, 100:140] = logits[:, :40]  # ties
    fields = fields_of(SETTINGS)
    rows = sample_rows_reference(logits, fields, purpose=int(Purpose.TARGET))
    for i in range(len(SETTINGS)):
        temperature = float(fields.temperature[i])
        if temperature == 0:
            assert int(rows.tokens[i]) == int(logits[i].argmax())
            continue
        cuts = Cuts(
            temperature, int(fields.top_k[i]), float(fields.top_p[i]), float(fields.min_p[i])
        )
        weights = token_weights(logits[i].numpy(), cuts)
        probs = cut_probs(logits[i], temperature, rows.cuts[i])
        np.testing.assert_allclose(probs.numpy(), weights / weights.sum(), atol=1e-12)
        u = uniform(int(fields.seed[i]) % 2**64, int(fields.position[i]), Purpose.TARGET)
        assert int(rows.tokens[i]) == pick(weights, u)


@pytest.mark.parametrize("vocab_size", [5, 130, 4097, 9001])
def test_rows_are_drawn_from_the_right_distribution(vocab_size):
    logits = (torch.randn(len(SETTINGS), vocab_size) * 3).to(DEVICE)
    check_rows(logits, fields_of(SETTINGS))


def test_ties_at_a_cut_keep_the_lowest_ids():
    logits = torch.full((4, 5000), -3.0, device=DEVICE)
    logits[:, 10::100] = 2.0  # 50 equal ones in two chunks
    logits[:, 7] = 4.0
    settings = [(1.0, 20, 1.0, 0.0), (1.0, 20, 0.5, 0.0), (1.0, 0, 1.0, 0.1), (1.0, 0, 0.25, 0.0)]
    fields = fields_of(settings)
    check_rows(logits, fields)
    ours = sampled(logits, fields)
    ties = list(range(10, 5000, 100))
    assert kept_ids(logits[0], ours.cuts[0]) == sorted([7, *ties[:19]])
    assert kept_ids(logits[2], ours.cuts[2]) == sorted([7, *ties])
    expected = sample_rows_reference(logits.cpu(), fields, purpose=0)
    for i in range(4):
        assert kept_ids(logits[i], ours.cuts[i]) == kept_ids(logits[i], expected.cuts[i])


def test_both_zeros_are_one_value():
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0, -9.0]], device=DEVICE)
    ours = sampled(logits, fields_of([(1.0, 3, 1.0, 0.0)]))
    assert kept_ids(logits[0], ours.cuts[0]) == [0, 1, 2]
    assert int(sampled(logits, fields_of([(0.0, 0, 1.0, 0.0)])).tokens[0]) == 0


def test_rows_without_a_small_candidate_set_are_cut_as_exactly():
    vocab_size = 2 * MAX_CANDIDATES + 100
    logits = torch.randn(4, vocab_size, device=DEVICE) * 0.3
    logits[2] = 1.0  # all equal
    logits[3, 5000:] = 0.25  # thousands of equal ones at the cut
    settings = [(1.0, 0, 0.9, 0.0), (2.0, 12000, 0.7, 1e-3), (1.0, 0, 0.7, 0.0)]
    settings.append((1.0, 10000, 1.0, 0.0))
    check_rows(logits, fields_of(settings))


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_extreme_logits_leave_the_one_token(scale):
    logits = torch.full((len(SETTINGS), 4200), scale - 2e4, device=DEVICE)
    logits[:, 4150] = scale
    ours = sampled(logits, fields_of([(max(t, 0.01), *rest) for t, *rest in SETTINGS]))
    assert ours.tokens.tolist() == [4150] * len(SETTINGS)
    logits = torch.full_like(logits, -float("inf"))
    logits[:, 4099] = scale
    ours = sampled(logits, fields_of(SETTINGS))
    assert ours.tokens.tolist() == [4099] * len(SETTINGS)
    assert ours.logprobs.abs().max() < 1e-6


def test_a_rows_result_does_not_depend_on_the_rows_beside_it():
    logits = (torch.randn(len(SETTINGS) * 2, 4500) * 3).to(DEVICE)
    fields = fields_of(SETTINGS * 2)
    workspace = SampleWorkspace.allocate(32, 4500, torch.device(DEVICE))
    together = sampled(logits, fields, workspace=workspace)
    for i in (0, 1, 3, 4, 6, 15):
        one = SamplingFields(*(value[i : i + 1] for value in vars(fields).values()))
        alone = sampled(logits[i : i + 1], one, workspace=workspace)
        for name, value in vars(alone).items():
            assert torch.equal(value, getattr(together, name)[i : i + 1]), f"row {i}: {name}"
    assert not workspace.counters.any(), "the counters are zero between calls"


def test_plain_rows_are_the_same_without_the_filters_launches():
    settings = [(0.0, 0, 1.0, 0.0), (0.8, 0, 1.0, 0.0)]
    logits = torch.randn(2, 5000, device=DEVICE)
    fields = fields_of(settings)
    first, second = sampled(logits, fields), sampled(logits, fields, has_filters=False)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.cuts, second.cuts)


def test_absent_rows_are_neither_read_nor_written():
    logits = poisoned(6, 300, dtype=torch.float32)
    logits[:3] = torch.randn(3, 300, device=DEVICE)
    lens = torch.tensor([2, 1, 0], dtype=torch.int32, device=DEVICE)
    fields = fields_of([(1.0, 5, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0)])
    ours = sampled(logits, fields, rows_per_seq=2, query_lens=lens)
    tokens = ours.tokens.tolist()
    assert min(tokens[:3]) >= 0, "rows 0 and 1 of the first sequence, row 0 of the second"
    assert tokens[3:] == [-7, -7, -7]


def chi_square_p_value(tokens, probs) -> float:
    from scipy.stats import chisquare

    counts = np.bincount(tokens, minlength=probs.size)
    assert counts[probs == 0].sum() == 0, "a token of probability 0"
    live = probs > 0
    return float(chisquare(counts[live], probs[live] / probs.sum() * len(tokens)).pvalue)


@pytest.mark.parametrize(
    "setting",
    [
        (1.2, 0, 1.0, 0.0),
        (1.0, 0, 1.0, 0.1),
        pytest.param((0.9, 4, 0.9, 0.0), marks=pytest.mark.gpu),
    ],
)
def test_many_seeds_give_the_distribution(setting):
    count = NUM_SEEDS
    row = torch.randn(7, device=DEVICE)
    fields = fields_of([setting] * count, seeds=range(count), positions=[3] * count)
    ours = sampled(row.expand(count, 7), fields)
    probs = cut_probs(row, setting[0], ours.cuts[0]).numpy()
    assert chi_square_p_value(ours.tokens.cpu().numpy(), probs) > 1e-3


def draft_and_verify(setting, target_row, draft_row, count, depth=3):
    """Drafts drawn by the kernel, then verified, for many seeds at once."""
    vocab_size = target_row.numel()
    fields = fields_of([setting] * count, seeds=range(50, 50 + count), positions=[11] * count)
    draft_logits = draft_row.expand(count, depth - 1, vocab_size).contiguous()
    cuts = torch.zeros(count, depth - 1, 4, dtype=torch.int64, device=DEVICE)
    tokens = torch.zeros(count, depth - 1, dtype=torch.int64, device=DEVICE)
    for j in range(depth - 1):
        out = SampledRows(
            torch.zeros(count, dtype=torch.int64, device=DEVICE),
            torch.zeros(count, device=DEVICE),
            cuts[:, j],
        )
        sample_rows_triton(draft_logits[:, j], fields, purpose=1, position_offset=j, out=out)
        tokens[:, j] = out.tokens
    lens = torch.full((count,), depth, dtype=torch.int32, device=DEVICE)
    window = Window(tokens, lens, draft_logits, cuts)
    logits = target_row.expand(count * depth, vocab_size).contiguous()
    return logits, fields, window


@pytest.mark.parametrize(
    "setting",
    [
        (1.0, 0, 1.0, 0.0),
        pytest.param((0.8, 5, 0.95, 0.0), marks=pytest.mark.gpu),
        pytest.param((1.5, 0, 0.8, 0.05), marks=pytest.mark.gpu),
    ],
)
def test_decided_tokens_have_the_targets_distribution(setting):
    target, draft = torch.randn(8, device=DEVICE), torch.randn(8, device=DEVICE)
    logits, fields, window = draft_and_verify(setting, target, draft, NUM_SEEDS)
    tokens, num_accepted = accept_drafts_triton(logits, fields, window)
    tokens, num_accepted = tokens.cpu().numpy(), num_accepted.cpu().numpy()
    assert 0.05 < num_accepted.mean() / 2 < 0.95, "both outcomes must be exercised"
    rows = sample_rows_reference(logits[:1].cpu(), fields, purpose=0)
    probs = cut_probs(target, setting[0], rows.cuts[0]).numpy()
    assert chi_square_p_value(tokens[:, 0], probs) > 1e-3
    assert chi_square_p_value(tokens[num_accepted >= 1, 1], probs) > 1e-3
    assert chi_square_p_value(tokens[num_accepted == 2, 2], probs) > 1e-3
    assert (tokens[num_accepted == 0, 1] == -1).all()


def test_acceptance_equals_the_reference():
    count, depth, vocab_size = 6, 3, 4300
    settings = [(0.0, 0, 1.0, 0.0), *[(1.0, 0, 1.0, 0.0)] * 2, *[(0.9, 50, 0.9, 0.0)] * 3]
    fields = fields_of(settings)
    logits = (torch.randn(count * depth, vocab_size) * 3).to(DEVICE)
    draft_logits = logits.view(count, depth, vocab_size)[:, :-1].clone()
    draft_logits += torch.randn_like(draft_logits)
    tokens = torch.zeros(count, depth - 1, dtype=torch.int64, device=DEVICE)
    cuts = torch.zeros(count, depth - 1, 4, dtype=torch.int64, device=DEVICE)
    for j in range(depth - 1):
        rows = sampled(draft_logits[:, j], fields, purpose=1, position_offset=j)
        tokens[:, j], cuts[:, j] = rows.tokens, rows.cuts
    tokens[0, 0] = logits[0].argmax()  # the greedy row accepts one
    lens = torch.tensor([3, 3, 2, 3, 1, 0], dtype=torch.int32, device=DEVICE)
    for window in (Window(tokens, lens, draft_logits, cuts), Window(tokens, lens)):
        ours = accept_drafts_triton(logits, fields, window)
        expected = accept_drafts_reference(logits, fields, window)
        assert torch.equal(ours[1].cpu(), expected[1].cpu())
        assert torch.equal(ours[0].cpu(), expected[0].cpu())
        assert int(ours[1][0]) >= 1


def test_a_draft_like_the_target_is_always_accepted():
    row = torch.randn(500, device=DEVICE)
    logits, fields, window = draft_and_verify((0.9, 40, 0.95, 0.0), row, row, count=10)
    assert accept_drafts_triton(logits, fields, window)[1].tolist() == [2] * 10


def penalty_case():
    counts = [TokenCounts.allocate(3, 900, torch.device(DEVICE)) for _ in range(2)]
    slots = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    prompt = torch.randint(0, 900, (2, 400), device=DEVICE)
    prompt[1, 30:] = -1
    answer = torch.randint(0, 900, (2, 6), device=DEVICE)
    answer[0, :3] = 17
    ways = (count_tokens_triton, count_tokens_reference)
    for each, count_tokens in zip(counts, ways, strict=True):
        count_tokens(prompt, each, slots, is_prompt=True)
        count_tokens(answer, each, slots, is_prompt=False)
    return counts, slots


def test_seen_tokens_are_counted_and_listed_once():
    (ours, expected), slots = penalty_case()
    assert torch.equal(ours.packed, expected.packed)
    assert torch.equal(ours.num_ids, expected.num_ids)
    for slot in range(3):
        listed = ours.ids[slot, : int(ours.num_ids[slot])]
        assert listed.sort().values.tolist() == ours.packed[slot].nonzero().flatten().tolist()
    clear_counts_triton(ours, slots)
    assert not ours.packed.any() and not ours.num_ids.any()


@pytest.mark.parametrize("options", [{}, {"rows_per_seq": 3}, {"window_offset": 2}])
def test_penalties_equal_the_reference(options):
    (ours, expected), slots = penalty_case()
    window = torch.tensor([[17, 500], [3, 3]], device=DEVICE) if options else None
    fields = PenaltyFields(
        *(torch.tensor(v, device=DEVICE) for v in ([1.5, 1.0], [0.3, 0.0], [0.2, 0.7]))
    )
    logits = torch.randn(2 * options.get("rows_per_seq", 1), 900, device=DEVICE) * 3
    right = logits.clone()
    apply_penalties_triton(logits, fields, ours, slots, window_tokens=window, **options)
    apply_penalties_reference(right, fields, expected, slots, window_tokens=window, **options)
    torch.testing.assert_close(logits, right, rtol=1e-6, atol=1e-6)


def test_other_dtypes_and_vocabularies_are_refused_with_a_reason():
    fields = fields_of([SETTINGS[0]])
    assert supports(torch.zeros(1, 8), fields, purpose=0) is None
    reason = supports(torch.zeros(1, 8, dtype=torch.float16), fields, purpose=0)
    assert reason and "float32" in reason
    assert "not contiguous" in str(supports(torch.zeros(8, 2).T, fields, purpose=0))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8, 130])
@pytest.mark.parametrize("spread", [3.0, 0.5])
def test_rows_of_a_real_vocabulary(num_rows, spread):
    logits = torch.randn(num_rows, 151936, device=DEVICE) * spread
    settings = [SETTINGS[(i + num_rows) % len(SETTINGS)] for i in range(num_rows)]
    check_rows(logits, fields_of(settings))


@pytest.mark.gpu
def test_a_graph_replays_the_same_tokens_many_times():
    num_rows = 64
    logits = torch.randn(num_rows, 151936, device=DEVICE) * 3
    fields = fields_of([SETTINGS[i % len(SETTINGS)] for i in range(num_rows)])
    device = torch.device(DEVICE)
    workspace = SampleWorkspace.allocate(num_rows, 151936, device)
    out = SampledRows.empty(num_rows, device)
    sample_rows_triton(logits, fields, purpose=0, out=out, workspace=workspace)
    first = [value.clone() for value in vars(out).values()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sample_rows_triton(logits, fields, purpose=0, out=out, workspace=workspace)
    for _ in range(200):
        graph.replay()
        for value, expected in zip(vars(out).values(), first, strict=True):
            assert torch.equal(value, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_seqs", [1, 32])
def test_acceptance_over_a_real_vocabulary_equals_the_reference(num_seqs):
    setting = (0.8, 50, 0.95, 0.0)
    row = torch.randn(151936, device=DEVICE) * 3
    draft = row + 0.5 * torch.randn_like(row)
    logits, fields, window = draft_and_verify(setting, row, draft, num_seqs)
    ours = accept_drafts_triton(logits, fields, window)
    expected = accept_drafts_reference(logits, fields, window)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
