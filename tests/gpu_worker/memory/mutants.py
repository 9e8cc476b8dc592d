"""Mutants of the memory manager: methods with one statement left out, put in place of the real ones for a while."""

import ast
import importlib.util
import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

# Statements that do something; what is left out leaves a method that still compiles.
_DOING = ast.Assign | ast.AugAssign | ast.Delete | ast.Expr | ast.If | ast.Continue | ast.Return


@dataclass(frozen=True)
class Mutant:
    """`class.method` without the statement that begins with `text`; `occurrence` counts equal ones from 0."""

    module: ModuleType
    method: str
    text: str
    occurrence: int

    @property
    def name(self) -> str:
        again = f" ({self.occurrence + 1})" if self.occurrence else ""
        return f"{self.method}: {self.text}{again}"

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The real method runs without the statement."""
        function = _function(vars(self.module), self.method)
        code = function.__code__
        function.__code__ = self._compiled()
        try:
            yield
        finally:
            function.__code__ = code

    def _compiled(self) -> CodeType:
        tree = ast.parse(inspect.getsource(self.module))
        found = [place for place in _places(tree, self.method) if _first_line(place.statement) == self.text]
        found[self.occurrence].leave_out()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "mutant.py"
            path.write_text(ast.unparse(tree), encoding="utf-8")
            spec = importlib.util.spec_from_file_location(self.module.__name__, path)
            assert spec is not None
            assert spec.loader is not None
            copy = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(copy)
        return _function(vars(copy), self.method).__code__


@dataclass(frozen=True)
class _Place:
    body: list[ast.stmt]
    index: int

    @property
    def statement(self) -> ast.stmt:
        return self.body[self.index]

    def leave_out(self) -> None:
        self.body[self.index] = ast.Pass()


def mutants_of(module: ModuleType) -> list[Mutant]:
    """One for each statement of each method that changes something; checks and what only reads are left alone."""
    found: list[Mutant] = []
    for method in _methods(ast.parse(inspect.getsource(module))):
        texts = [_first_line(place.statement) for place in _places(ast.parse(inspect.getsource(module)), method)]
        found += [Mutant(module, method, text, texts[:index].count(text)) for index, text in enumerate(texts)]
    return found


def _methods(tree: ast.Module) -> list[str]:
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    methods = [(owner, node) for owner in classes for node in owner.body if isinstance(node, ast.FunctionDef)]
    return [f"{owner.name}.{node.name}" for owner, node in methods if not _is_class_method(node)]


def _is_class_method(node: ast.FunctionDef) -> bool:
    return any(isinstance(decorator, ast.Name) and decorator.id == "classmethod" for decorator in node.decorator_list)


def _places(tree: ast.Module, method: str) -> list[_Place]:
    owner_name, name = method.split(".")
    (owner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner_name)
    (function,) = (node for node in owner.body if isinstance(node, ast.FunctionDef) and node.name == name)
    places: list[_Place] = []
    for node in ast.walk(function):
        for field in ("body", "orelse"):
            body = getattr(node, field, [])
            if isinstance(body, list):
                places += [_Place(body, index) for index, part in enumerate(body) if _does_something(part)]
    return sorted(places, key=lambda place: place.statement.lineno)


def _does_something(statement: object) -> bool:
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    return isinstance(statement, _DOING)


def _first_line(statement: ast.stmt) -> str:
    return ast.unparse(statement).splitlines()[0]


def _function(namespace: dict[str, Any], method: str) -> FunctionType:
    owner, name = method.split(".")
    found = vars(namespace[owner])[name]
    function = found.fget if isinstance(found, property) else found
    assert isinstance(function, FunctionType)
    return function
