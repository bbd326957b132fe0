"""The package examines itself: what is public is documented, has few positional arguments, and is tested."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import medsr
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "common" / "medsr"
POSITIONAL_LIMIT = 3

# Older than the rule; each name here must still need its place.
MANY_POSITIONAL: set[str] = set()


@dataclass(frozen=True)
class Module:
    path: Path
    tree: ast.Module

    @property
    def name(self) -> str:
        parts = self.path.relative_to(PACKAGE.parent).with_suffix("").parts
        return ".".join(parts).removesuffix(".__init__")

    @property
    def public(self) -> list[str] | None:
        """Names in ``__all__``, or None if there is none."""
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return [str(name) for name in ast.literal_eval(node.value)]
        return None

    @property
    def definitions(self) -> dict[str, ast.ClassDef | ast.FunctionDef]:
        """Classes and functions of this module by name; with overloads, the implementation."""
        return {
            node.name: node for node in self.tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))
        }

    @property
    def names(self) -> set[str]:
        """Everything that the module binds at its top level."""
        bound: set[str] = set()
        for node in self.tree.body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                bound.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                bound.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found = (name for target in targets for name in ast.walk(target))
                bound.update(name.id for name in found if isinstance(name, ast.Name))
        return bound


MODULES = [
    Module(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(PACKAGE.rglob("*.py"))
]
ROOMS = [module for module in MODULES if module.path.name != "__init__.py"]
DEFINED = [
    pytest.param(module, name, id=f"{module.name}.{name}")
    for module in MODULES
    for name in module.public or []
    if name in module.definitions
]


def positional(function: ast.FunctionDef) -> list[str]:
    return [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]


@pytest.mark.parametrize("module", ROOMS, ids=lambda module: module.name)
def test_every_module_says_what_it_is_and_what_is_public(module: Module) -> None:
    assert ast.get_docstring(module.tree), "a module starts with a docstring"
    assert module.public is not None, "a module names its public API in __all__"
    assert len(set(module.public)) == len(module.public)
    assert sorted(set(module.public) - module.names) == [], "names in __all__ that do not exist"


@pytest.mark.parametrize(("module", "name"), DEFINED)
def test_public_names_are_documented(module: Module, name: str) -> None:
    docstring = ast.get_docstring(module.definitions[name])
    assert docstring
    assert docstring.splitlines()[0].rstrip().endswith((".", ":", "?")), "it starts with one whole sentence"


@pytest.mark.parametrize(("module", "name"), DEFINED)
def test_few_arguments_are_positional(module: Module, name: str) -> None:
    node = module.definitions[name]
    if isinstance(node, ast.ClassDef):
        return
    many = len(positional(node)) > POSITIONAL_LIMIT
    excepted = f"{module.name}.{name}" in MANY_POSITIONAL
    assert many == excepted, f"{positional(node)}: at most {POSITIONAL_LIMIT}, the rest keyword-only"


@pytest.mark.parametrize(
    "module", [module for module in ROOMS if module.public], ids=lambda module: module.name
)
def test_every_module_with_public_names_has_its_test_file(module: Module) -> None:
    relative = module.path.relative_to(PACKAGE)
    mirrored = ROOT / "tests" / "medsr" / relative.parent / f"test_{relative.name}"
    assert mirrored.is_file(), f"{mirrored.relative_to(ROOT)} is missing"


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, medsr, medsr.errors, medsr.geometry, medsr.catalog, medsr.cli; "
        "print(*sorted({'torch', 'monai', 'scipy', 'matplotlib', 'ignite'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_the_version_stands_in_one_place() -> None:
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert written is not None
    assert written.group(1) == medsr.__version__
