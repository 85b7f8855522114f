"""Shared fixtures: where the data lies, quiet threads, and GPU tests that skip with a reason."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--qnext-data", default=None, help="folder of the shared data; else QNEXT_DATA is read"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Read by OpenMP and by the tokenizers library when they first start, so set before any import.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if find_spec("triton"):
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def qnext_data(pytestconfig: pytest.Config) -> Path:
    """Folder of the shared data (real configs, tokenizer, corpora), or skip with what was tried."""
    named = pytestconfig.getoption("--qnext-data") or os.environ.get("QNEXT_DATA")
    candidate = Path(named) if named else REPO_ROOT.parent / "shared" / "data"
    if not (candidate / "qwen").is_dir():
        pytest.skip(f"no shared data at {candidate}; set QNEXT_DATA or pass --qnext-data")
    return candidate


@pytest.fixture(autouse=True)
def _deterministic(request: pytest.FixtureRequest):
    """Same seed for every test, one thread; only where the test's module has loaded torch."""
    import sys

    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    num_threads = torch.get_num_threads()
    default_dtype = torch.get_default_dtype()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(num_threads)
    torch.set_default_dtype(default_dtype)
