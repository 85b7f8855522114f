"""`qnext doctor`: what this machine is, and which backend each op runs on and why."""

import argparse
import json
import platform
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "safetensors",
    "tokenizers",
    "jinja2",
    "zstandard",
    "huggingface_hub",
    "rich",
    "triton",
    "transformers",
    "tensorboard",
    "datasketch",
    "pyarrow",
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = subparsers.add_parser(
        "doctor",
        help="show versions, CPU and GPU features, and the backend chosen for each op",
        description="Show versions, CPU and GPU features, and the backend chosen for each op.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0 when every op has a backend, 1 otherwise."""
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(render(report))
    return 0 if all(op["backend"] for op in report["ops"]) else 1


def collect() -> dict[str, Any]:
    """Everything the report shows, as plain values ready for JSON."""
    import torch

    from qnext import __version__
    from qnext.kernels.dispatch import backend_report
    from qnext.runtime.device import gpu_infos
    from qnext.runtime.env import cpu_info, git_revision, package_version

    cpu = cpu_info()
    ops = [
        {
            "op": entry.op,
            "backend": entry.backend,
            "reason": entry.reason,
            "rejected": dict(entry.rejected),
        }
        for entry in backend_report()
    ]
    return {
        "qnext": __version__,
        "revision": git_revision(Path(__file__).parent),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: package_version(name) for name in PACKAGES},
        "cpu": {
            "name": cpu.name,
            "num_cores": cpu.num_cores,
            "features": list(cpu.features),
            "memory_bytes": cpu.memory_bytes,
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "torch_threads": torch.get_num_threads(),
            "kernels": cpu_kernels(),
        },
        "cuda": torch.version.cuda,
        "gpus": [vars(gpu) for gpu in gpu_infos()],
        "ops": ops,
    }


def cpu_kernels() -> dict[str, str]:
    """What the Numba kernels run on here, in words; empty without Numba."""
    if find_spec("numba") is None:
        return {}
    from qnext.kernels.cpu_lanes import cache_folder
    from qnext.kernels.cpu_products import dual_objection
    from qnext.kernels.cpu_team import threading_layer

    objection = dual_objection()
    return {
        "threads": threading_layer(),
        "bfloat16": "AVX512-BF16 products of pairs"
        if objection is None
        else f"widened: {objection}",
        "compiled code": cache_folder(),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text: one section per subject, columns aligned."""
    cpu = report["cpu"]
    memory = cpu["memory_bytes"]
    revision = f" ({report['revision']})" if report["revision"] else ""
    lines = [f"qnext {report['qnext']}{revision}  python {report['python']}  {report['system']}"]
    lines += section("Packages", report["packages"].items(), lambda v: v or "not installed")
    lines += section(
        "CPU",
        [
            ("name", cpu["name"]),
            ("cores", f"{cpu['num_cores']} usable, torch uses {cpu['torch_threads']}"),
            ("features", " ".join(cpu["features"]) or "none known"),
            ("torch kernels", cpu["torch_capability"]),
            ("memory", f"{memory / 2**30:.1f} GiB" if memory else "unknown"),
            *((f"kernels: {name}", text) for name, text in cpu["kernels"].items()),
        ],
    )
    lines += section("GPU", list(_gpu_rows(report)))
    lines += section("Ops", list(_op_rows(report["ops"])))
    return "\n".join(lines)


def section(title: str, rows: Any, show: Callable[[Any], str] = str) -> list[str]:
    """A title and its rows, the values in one column."""
    pairs = list(rows)
    width = max((len(name) for name, _ in pairs), default=0)
    return ["", title, *(f"  {name:<{width}}  {show(value)}".rstrip() for name, value in pairs)]


def _gpu_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    if not report["gpus"]:
        build = f"built for CUDA {report['cuda']}" if report["cuda"] else "a build without CUDA"
        return [("none", f"torch is {build} and sees no device")]
    rows = []
    for index, gpu in enumerate(report["gpus"]):
        major, minor = gpu["compute_capability"]
        bf16 = "bfloat16" if gpu["has_bfloat16"] else "no bfloat16"
        rows.append(
            (
                f"cuda:{index}",
                f"{gpu['name']}, sm_{major}{minor}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
                f"{gpu['num_multiprocessors']} multiprocessors, {bf16}",
            )
        )
    return rows


def _op_rows(ops: list[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for op in ops:
        rows.append((op["op"], f"{op['backend'] or 'NONE'}: {op['reason']}"))
        rows += [("", f"  not {name}: {why}") for name, why in op["rejected"].items()]
    return rows
