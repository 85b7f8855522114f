"""The layers of the package: who may import whom, how long things may be, what a kernel needs.

Everything is read from the syntax tree, never by importing, so that an import inside a function or
under TYPE_CHECKING counts like one at the top.
"""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

REPO_ROOT = Path(__file__).resolve().parents[1]
PACKAGE = REPO_ROOT / "qnext"

# From the top down; folders in one entry are siblings and don't import each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cli",),
    ("rl", "bench"),
    ("train", "server"),
    ("eval", "inspect"),
    ("engine", "data"),
    ("model",),
    ("io",),
    ("cache",),
    ("kernels",),
    ("tokenizer",),
    ("config",),
    ("runtime",),
)
RANK = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 150
BACKENDS = {"torch": "torch", "numba": "numba", "triton_fwd": "triton"}  # file: its entry's suffix
# The public entry points, which import what they name only when asked for it.
ALLOWED_EXPORTS = {"qnext/__init__.py", "qnext/tokenizer/__init__.py"}


@dataclass(frozen=True)
class Import:
    """One imported module of ours (`qnext.model.moe`), the names taken from it, and where."""

    module: str
    names: tuple[str, ...]
    line: int


def relative_name(path: Path) -> str:
    return path.relative_to(REPO_ROOT).as_posix()


def python_files(*folders: str) -> list[Path]:
    return sorted(
        path
        for folder in folders
        for path in (REPO_ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    )


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_in(tree: ast.AST) -> list[Import]:
    """Every import under `tree`, also relative ones (their module starts with a dot)."""
    found: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, (), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = tuple(alias.name for alias in node.names)
            found.append(Import(module, names, node.lineno))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.append(Import(str(node.args[0].value), (), node.lineno))
    return found


def module_path(module: str) -> Path | None:
    """File of one of our modules, or None when there is no such module."""
    base = REPO_ROOT.joinpath(*module.split("."))
    if base.with_suffix(".py").is_file():
        return base.with_suffix(".py")
    return base / "__init__.py" if (base / "__init__.py").is_file() else None


def imported_modules(entry: Import) -> list[str]:
    """Modules of ours that one import names: `from qnext.model import moe` is qnext.model.moe."""
    if entry.module != "qnext" and not entry.module.startswith("qnext."):
        return []
    submodules = [f"{entry.module}.{name}" for name in entry.names]
    real = [module for module in submodules if module_path(module)]
    return real if real and len(real) == len(submodules) else [entry.module, *real]


def folder_of_module(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else None


def direction_faults(folder: str, tree: ast.Module) -> list[str]:
    """Imports in a file of `folder` that don't point to a folder below it."""
    faults: list[str] = []
    for entry in imports_in(tree):
        for module in imported_modules(entry):
            target = folder_of_module(module)
            if target and target != folder and RANK[target] <= RANK[folder]:
                faults.append(f"line {entry.line}: {folder}/ may not import {target}/ ({module})")
            if module == "qnext" and entry.names and folder != "cli":
                public = [name for name in entry.names if name != "__version__"]
                if public:
                    faults.append(f"line {entry.line}: import {public[0]} from its own module")
    return faults


def module_level_imports(tree: ast.Module) -> list[Import]:
    """Imports that run when the module is imported: not those inside functions."""
    found: list[Import] = []
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            found += imports_in(ast.Module(body=[node], type_ignores=[]))
        pending += list(ast.iter_child_nodes(node))
    return found


def loads_torch(module: str, seen: set[str]) -> str | None:
    """Name of the chain by which importing `module` imports torch, or None."""
    seen.add(module)
    path = module_path(module)
    if path is None:
        return None
    for entry in module_level_imports(tree_of(path)):
        if entry.module == "torch" or entry.module.startswith("torch."):
            return f"{module} line {entry.line}"
        for target in imported_modules(entry):
            parents = [".".join(target.split(".")[:n]) for n in range(1, target.count(".") + 2)]
            for step in parents:
                if step not in seen and (chain := loads_torch(step, seen)):
                    return f"{module} -> {chain}"
    return None


def signature_of(function: ast.FunctionDef) -> str:
    return (
        f"({ast.unparse(function.args)}) -> {ast.unparse(function.returns or ast.Constant(None))}"
    )


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    marks = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    return any(mark in marks for mark in ("triton.jit", "gluon.jit", "njit"))


FILES = python_files("qnext")


def test_every_folder_of_the_package_has_a_place_in_the_layers():
    folders = {path.relative_to(PACKAGE).parts[0] for path in FILES if path.parent != PACKAGE}
    assert folders - set(RANK) == set(), "name the folder in LAYERS, in its right place"


def test_a_folder_imports_only_folders_below_it():
    faults = [
        f"{relative_name(path)} {fault}"
        for path in FILES
        if path.parent != PACKAGE
        for fault in direction_faults(path.relative_to(PACKAGE).parts[0], tree_of(path))
    ]
    assert not faults, "\n".join(faults)


def test_no_module_imports_relatively():
    faults = [
        f"{relative_name(path)} line {entry.line}: {entry.module}"
        for path in python_files("qnext", "tests", "benchmarks")
        for entry in imports_in(tree_of(path))
        if entry.module.startswith(".")
    ]
    assert not faults, "\n".join(faults)


def test_no_name_is_re_exported_through_init():
    faults = []
    for path in FILES:
        if path.name != "__init__.py" or relative_name(path) in ALLOWED_EXPORTS:
            continue
        body = [node for node in tree_of(path).body if not is_docstring(node)]
        faults += [f"{relative_name(path)} line {node.lineno}" for node in body]
    assert not faults, "an __init__.py holds a docstring at most:\n" + "\n".join(faults)


def is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_allowed_exports_load_lazily():
    for name in ALLOWED_EXPORTS:
        path = REPO_ROOT / name
        if path.is_file():
            ours = [e for e in module_level_imports(tree_of(path)) if e.module.startswith("qnext")]
            assert not ours, f"{name} imports {ours[0].module} at its top; import it when called"


def test_names_are_imported_from_the_module_that_defines_them():
    """`from qnext.x.y import Z` is refused when y only imported Z from elsewhere itself."""
    faults = []
    for path in python_files("qnext", "tests", "benchmarks"):
        for entry in imports_in(tree_of(path)):
            source = module_path(entry.module) if entry.module.startswith("qnext.") else None
            if source is None:
                continue
            borrowed = {
                name
                for other in imports_in(tree_of(source))
                if other.module.startswith("qnext")
                for name in other.names
                if not module_path(f"{entry.module}.{name}")
            }
            faults += [
                f"{relative_name(path)} line {entry.line}: {name} is not defined in {entry.module}"
                for name in entry.names
                if name in borrowed and relative_name(source) not in ALLOWED_EXPORTS
            ]
    assert not faults, "\n".join(faults)


def test_files_stay_under_the_length_limit():
    faults = [
        f"{relative_name(path)}: {count} lines, limit {MAX_FILE_LINES}"
        for path in python_files("qnext", "tests", "benchmarks", "docs")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    ]
    assert not faults, "\n".join(faults)


def test_functions_stay_under_the_length_limit():
    faults = []
    for path in python_files("qnext", "benchmarks"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                limit = MAX_KERNEL_LINES if is_kernel(node) else MAX_FUNCTION_LINES
                count = (node.end_lineno or node.lineno) - node.lineno + 1
                if count > limit:
                    faults.append(
                        f"{relative_name(path)} {node.name}: {count} lines, limit {limit}"
                    )
    assert not faults, "\n".join(faults)


def kernel_folders() -> list[Path]:
    kernels = PACKAGE / "kernels"
    if not kernels.is_dir():
        return []
    return sorted(path for path in kernels.iterdir() if path.is_dir() and any(path.glob("*.py")))


def top_functions(path: Path) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in tree_of(path).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("folder", kernel_folders(), ids=lambda folder: folder.name)
def test_every_op_has_a_reference_with_the_same_signature_as_its_backends(folder):
    assert (folder / "reference.py").is_file(), f"{folder.name} has no reference.py"
    op = folder.name
    reference = top_functions(folder / "reference.py").get(f"{op}_reference")
    assert reference, f"{op}/reference.py defines no {op}_reference"
    for file, backend in BACKENDS.items():
        path = folder / f"{file}.py"
        if not path.is_file():
            continue
        entry = top_functions(path).get(f"{op}_{backend}")
        assert entry, f"{op}/{file}.py defines no {op}_{backend}"
        assert signature_of(entry) == signature_of(reference), f"{op}: {backend} and reference part"


@pytest.mark.parametrize(
    "module",
    sorted(
        ".".join(path.relative_to(REPO_ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] in ("config", "cli")
        or relative_name(path) in ("qnext/__init__.py", "qnext/engine/scheduler.py")
    ),
)
def test_configuration_scheduler_and_command_line_import_no_torch(module):
    assert (chain := loads_torch(module, set())) is None, f"imports torch: {chain}"


def test_there_is_no_utils():
    faults = [relative_name(path) for path in FILES if "util" in path.stem or "utils" in path.parts]
    assert not faults, "a shared function lives in the lowest folder that uses it: " + str(faults)


# The checks themselves can fail: each is fed a small file that breaks its rule.


@pytest.mark.parametrize(
    "source",
    [
        "from qnext.model.moe import MixtureOfExperts",
        "def late():\n    import qnext.engine.llm",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from qnext.io import shards",
        "from qnext import engine",
        "from importlib import import_module\nimport_module('qnext.data.loader')",
    ],
)
def test_an_import_that_points_upwards_is_found(source):
    assert direction_faults("kernels", ast.parse(source))


def test_siblings_may_not_import_each_other_and_lower_folders_may_be_imported():
    assert direction_faults("engine", ast.parse("import qnext.data.loader"))
    assert not direction_faults(
        "engine", ast.parse("import qnext.model.moe\nimport qnext.engine.llm")
    )


def test_relative_imports_are_seen():
    assert imports_in(ast.parse("from . import moe"))[0].module == "."
    assert imports_in(ast.parse("from ..model.moe import route"))[0].module == "..model.moe"


def test_imports_inside_functions_do_not_count_as_module_level():
    source = (
        "def run():\n  import torch\nclass A:\n  import json\ntry:\n  import rich\nfinally: ..."
    )
    found = {e.module for e in module_level_imports(ast.parse(source))}
    assert found == {"json", "rich"}
