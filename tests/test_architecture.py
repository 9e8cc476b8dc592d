"""The rules of the house that a machine can hold: who imports what, what is never called, how long things get."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import loraplex.v1
from tests.checkout import ROOT, read, tree_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# They run code that is hidden in data; weights are safetensors, messages are protobuf, documents are JSON.
FORBIDDEN_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"}
# Each shadows a module that everybody imports.
FORBIDDEN_FILE_NAMES = {"http.py", "logging.py", "queue.py", "types.py"}


def python_files(folder: str = ".") -> list[Path]:
    """Our Python files; generated ones are not in git."""
    return [path for path in tree_files(folder) if path.suffix == ".py"]


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Modules, and names taken from modules, in dotted form."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


def forbidden_imports(source: str) -> list[str]:
    names = imported_modules(ast.parse(source))
    return [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS]


def forbidden_calls(source: str) -> list[str]:
    return [name for name in called_names(ast.parse(source)) if name.removeprefix("builtins.") in FORBIDDEN_CALLS]


def long_functions(source: str) -> list[str]:
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [node.name for node in functions if node.end_lineno and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES]


def long_file(source: str) -> list[str]:
    lines = source.count("\n")
    return [f"{lines} lines"] if lines > MAX_FILE_LINES else []


def top_level_imports(source: str, package: str) -> list[str]:
    """Imports of `package` that run when the module is imported."""
    deferred = ast.FunctionDef | ast.AsyncFunctionDef
    body = [statement for statement in ast.parse(source).body if not isinstance(statement, deferred)]
    return [name for statement in body for name in imported_modules(statement) if name.split(".")[0] == package]


def assigned_names(source: str) -> set[str]:
    nodes = ast.walk(ast.parse(source))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def offences(check: Callable[[str], list[str]], files: list[Path]) -> dict[str, list[str]]:
    found = {str(path): check(read(path)) for path in files}
    return {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("check", [forbidden_imports, forbidden_calls, long_functions, long_file])
def test_our_code_keeps_the_rule(check: Callable[[str], list[str]]) -> None:
    assert offences(check, python_files()) == {}


@pytest.mark.parametrize(
    ("check", "source", "found"),
    [
        (forbidden_imports, "def f():\n    import pickle", ["pickle"]),
        (forbidden_imports, "from marshal import loads", ["marshal.loads"]),
        (forbidden_imports, "from torch import load", ["torch.load"]),
        (forbidden_imports, "import torch.nn, json", []),
        (forbidden_calls, "eval('1')\nmodel.eval()", ["eval"]),
        (forbidden_calls, "x = torch.load(path, weights_only=True)", ["torch.load"]),
        (forbidden_calls, "yaml.safe_load(text)", []),
        (long_functions, "def f():\n" + "    x = 1\n" * 60, ["f"]),
        (long_functions, "async def f():\n" + "    x = 1\n" * 59, []),
        (long_file, "x = 1\n" * 401, ["401 lines"]),
        (long_file, "x = 1\n" * 400, []),
    ],
)
def test_the_check_finds_what_it_should(check: Callable[[str], list[str]], source: str, found: list[str]) -> None:
    assert check(source) == found


def test_no_module_shadows_one_of_the_standard_library() -> None:
    assert [path for path in python_files() if path.name in FORBIDDEN_FILE_NAMES] == []


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stdout


def test_only_the_pool_of_the_memory_manager_has_torch() -> None:
    with_torch = {
        path.name
        for path in python_files("gpu_worker/memory")
        if any(name.split(".")[0] == "torch" for name in imported_modules(ast.parse(read(path))))
    }
    assert with_torch == {"pool.py"}


def test_importing_the_kernels_does_not_import_triton() -> None:
    packages = [path for path in python_files("kernels") if path.name == "__init__.py"]
    assert offences(lambda source: top_level_imports(source, "triton"), packages) == {}


def test_a_triton_import_is_seen_at_the_top_level_and_nowhere_else() -> None:
    source = "try:\n    import triton.language as tl\nexcept ImportError:\n    pass\ndef f():\n    import triton"
    assert top_level_imports(source, "triton") == ["triton.language"]


def test_our_kernels_do_not_pass_for_the_package_of_that_name() -> None:
    assert "__version__" not in assigned_names(read("kernels/__init__.py"))


def test_the_package_named_kernels_is_not_pinned() -> None:
    pins = {line.split("==")[0].lower() for line in read("constraints.txt").splitlines()}
    assert "kernels" not in pins


def test_transformers_can_be_imported_from_the_checkout() -> None:
    command = [sys.executable, "-W", "error::ImportWarning", "-c", "from transformers import LlamaForCausalLM"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


def services() -> dict[str, Any]:
    """Name of the servicer base class -> (its descriptor, the class), for each service of the protos."""
    found = {}
    for module in pkgutil.iter_modules(loraplex.v1.__path__, "loraplex.v1."):
        if module.name.endswith("_pb2"):
            for name, descriptor in importlib.import_module(module.name).DESCRIPTOR.services_by_name.items():
                base = getattr(importlib.import_module(f"{module.name}_grpc"), f"{name}Servicer")
                found[f"{name}Servicer"] = (descriptor, base)
    return found


def servicers() -> list[tuple[str, str, str]]:
    """(module, class, base class) of each class in a service's folder that derives from a generated servicer."""
    return [
        (".".join(path.with_suffix("").parts), node.name, ast.unparse(base).rpartition(".")[2])
        for folder in ("adapter_store", "gateway", "gpu_worker", "scheduler")
        for path in python_files(folder)
        for node in ast.walk(ast.parse(read(path)))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if ast.unparse(base).endswith("Servicer")
    ]


def missing_methods(servicer: type, base: type, methods: list[str]) -> list[str]:
    return [name for name in methods if getattr(servicer, name) is getattr(base, name)]


@pytest.mark.parametrize(("module", "name", "base_name"), servicers(), ids=lambda part: part)
def test_a_servicer_answers_every_method_of_its_service(module: str, name: str, base_name: str) -> None:
    descriptor, base = services()[base_name]
    servicer = getattr(importlib.import_module(module), name)
    assert missing_methods(servicer, base, list(descriptor.methods_by_name)) == []


def test_every_service_has_a_servicer() -> None:
    assert {base for _, _, base in servicers()} == services().keys()


def test_a_method_that_is_not_overridden_is_found() -> None:
    descriptor, base = services()["MemoryServiceServicer"]
    incomplete = type("Incomplete", (base,), {"GetUsage": lambda self, request, context: None})
    assert missing_methods(incomplete, base, list(descriptor.methods_by_name))[0] == "ListResident"
