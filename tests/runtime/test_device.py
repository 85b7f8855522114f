import pytest
import torch

from qnext.runtime.device import (
    dtype_name,
    peak_memory_bytes,
    resolve_device,
    resolve_dtype,
    set_num_threads,
)


def test_devices_resolve_by_name():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("meta").type == "meta"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device(torch.device("cpu")).type == "cpu"


@pytest.mark.parametrize("name", ["gpu", "tpu:0", "mps", "", None])
def test_an_unknown_device_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"device is {name!r}"):
        resolve_device(name)


def test_a_gpu_that_is_not_there_is_refused_with_the_count():
    with pytest.raises(ValueError, match="torch sees"):
        resolve_device("cuda:99")


def test_number_types_resolve_by_name_and_back():
    for name in ("float32", "bfloat16", "float16", "float64"):
        assert dtype_name(resolve_dtype(name)) == name
        assert dtype_name(resolve_dtype(f"torch.{name}")) == name
    assert resolve_dtype(torch.float32) is torch.float32
    for wrong in ("int7", None):
        with pytest.raises(ValueError, match=f"dtype is {wrong!r}"):
            resolve_dtype(wrong)


def test_threads_are_set_or_refused():
    assert set_num_threads(1) == 1
    assert set_num_threads(None) == 1
    with pytest.raises(ValueError, match="num_threads is 0"):
        set_num_threads(0)


def test_peak_memory_is_in_bytes():
    assert peak_memory_bytes(torch.device("cpu")) > 10 * 2**20
