"""Counts of parameters, bytes and operations against published and hand-worked numbers."""

import subprocess
import sys

import pytest

from qnext.config.presets import PRESETS, preset
from qnext.model.accounting import (
    conv_state_bytes,
    count_parameters,
    decode_flops_per_token,
    forward_flops_per_token,
    kv_bytes_per_token,
    recurrent_state_bytes,
    sequence_bytes,
    training_flops_per_token,
)
from qnext.model.qwen3_next import Qwen3Next

MIB, KIB = 1 << 20, 1 << 10


def test_accounting_imports_no_torch():
    code = "import sys, qnext.model.accounting; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_real_model_s_published_totals():
    counts = count_parameters(preset("next-80b-a3b"), has_mtp=True)
    assert counts.total == 81_324_862_720
    assert counts.main == 79_674_391_296
    assert counts.parts["mtp"].total == 1_650_471_424
    assert counts.parts["embedding"].active == 0
    assert counts.parts["experts"].active * 512 == counts.parts["experts"].total * 10
    assert 3.0e9 < counts.active < 3.7e9


@pytest.mark.parametrize("name,active", [("bench-nano", 8.6e6), ("bench-small", 97e6)])
def test_active_parameters_of_the_benchmark_models(name, active):
    assert count_parameters(preset(name), has_mtp=False).active == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("has_mtp", [True, False])
def test_the_count_is_that_of_the_model_itself(name, has_mtp):
    model = Qwen3Next(preset(name), has_mtp=has_mtp, device="meta")
    found = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(preset(name), has_mtp=has_mtp).total == found


def test_the_shipped_model_and_its_dense_twin_have_equal_active_compute():
    nano = count_parameters(preset("nano"), has_mtp=True)
    dense = count_parameters(preset("nano-dense"), has_mtp=True)
    assert nano.total <= 15_000_000
    assert dense.active == pytest.approx(nano.active, rel=0.01)


def test_memory_of_a_sequence_of_the_real_model():
    config = preset("next-80b-a3b")
    assert recurrent_state_bytes(config) == 72 * MIB
    assert conv_state_bytes(config) == pytest.approx(1.7 * MIB, rel=0.01)
    assert kv_bytes_per_token(config, has_mtp=False) == 24 * KIB
    assert kv_bytes_per_token(config, has_mtp=True) == 26 * KIB
    expected = 72 * MIB + 36 * 8192 * 3 * 2 + 1000 * 26 * KIB
    assert sequence_bytes(config, 1000, has_mtp=True) == expected


def test_operations_are_six_per_active_parameter_and_causal_attention():
    config = preset("next-80b-a3b")
    active = count_parameters(config, has_mtp=False).active
    per_pair = 12 * 4 * 16 * 256
    assert forward_flops_per_token(config, 4096) == 2 * active + per_pair * 2048
    assert training_flops_per_token(config, 4096) == 6 * active + 3 * per_pair * 2048
    assert decode_flops_per_token(config, 4096) == 2 * active + per_pair * 4096
