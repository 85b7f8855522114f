"""What surrounds the process: package versions, CPU features, typed environment variables."""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# Instruction sets that decide which matrix kernels a CPU library picks, as Linux names them.
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
ARM_FEATURES = ("asimd", "bf16", "i8mm", "sve")


@dataclass(frozen=True)
class CpuInfo:
    """Name, usable cores and instruction sets of the CPU."""

    name: str
    num_cores: int
    features: tuple[str, ...]
    memory_bytes: int | None


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None; does not import the package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def num_usable_cores() -> int:
    """Cores that this process may run on, which in a container can be fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_info() -> CpuInfo:
    """Describe the CPU from the operating system's records; what they don't tell is left out."""
    name, flags = _cpu_name_and_flags()
    features = tuple(flag for flag in (*CPU_FEATURES, *ARM_FEATURES) if flag in flags)
    return CpuInfo(name, num_usable_cores(), features, _memory_bytes())


def env_int(name: str, default: int) -> int:
    """Integer value of an environment variable, `default` when unset or empty.

    Raises:
        ValueError: the variable holds something else than an integer.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"environment variable {name} is {text!r}; want an integer") from None


def git_revision(folder: Path) -> str | None:
    """Short revision of the checkout at `folder`, '-dirty' when files differ; None outside git."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _cpu_name_and_flags() -> tuple[str, set[str]]:
    if platform.system() == "Darwin":
        name = _sysctl("machdep.cpu.brand_string") or platform.machine()
        arm = {"asimd"} if platform.machine() == "arm64" else set()
        if _sysctl("hw.optional.arm.FEAT_BF16") == "1":
            arm.add("bf16")
        if _sysctl("hw.optional.arm.FEAT_I8MM") == "1":
            arm.add("i8mm")
        return name, arm
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = {key.strip(): value.strip() for key, _, value in (s.partition(":") for s in lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), flags


def _sysctl(key: str) -> str | None:
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
