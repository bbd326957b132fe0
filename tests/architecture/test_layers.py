"""Who may know whom: read from the imports, not from good intentions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "common"
PACKAGE = SOURCE / "medsr"
FOLDERS = ("common", "tests", "benchmarks", "docs", "tools", "integrations", "bundles")

# A room may import rooms of its own level and below. A new room must be given its place here.
LEVELS = (
    {"errors", "settings", "geometry", "overrides", "catalog"},
    {"resampling", "phantoms", "networks", "losses", "metrics"},
    {"transforms", "io"},
    {"inferers", "engines", "handlers"},
    {"export"},
    {"cli"},
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PURE = ("errors", "settings", "geometry", "overrides", "catalog")

# Rooms that the level would allow and the design does not.
STRANGERS = {"transforms": {"networks"}, "io": {"networks"}, "handlers": {"networks"}}

# The lowest level that may import a package at all.
EARLIEST = {"torch": 1, "monai": 1, "nibabel": 2, "pydicom": 2, "SimpleITK": 2, "itk": 2, "ignite": 3}

# Slow to import or optional: only inside the functions that need them.
ONLY_IN_FUNCTIONS = {
    *("matplotlib", "pydicom", "SimpleITK", "itk", "nibabel", "highdicom", "nilearn"),
    *("onnx", "onnxruntime", "openvino", "av"),
}

NEVER = {"pickle", "dill", "joblib", "requests", "urllib.request", "http.client", "socket", "ftplib", "gdown"}
NEVER_FROM_NETWORKS = ("monai.transforms", "monai.handlers", "monai.engines", "monai.bundle", "ignite")


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    at_module_level: bool


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(tree: ast.Module, package: str = "") -> Iterator[Import]:
    """Every import with whether it runs when the module is imported; those for type checkers do not."""

    def visit(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_module_level)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield Import(module, node.lineno, at_module_level)
            # "from medsr import io" names a module as well.
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, at_module_level)
        inner = at_module_level and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            inner = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(tree, True)


def within(module: str, packages: set[str] | tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def package_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PACKAGE_FILES = python_files("common/medsr")
ALL_FILES = python_files(*FOLDERS)


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_imports_point_downwards(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert not [one for one in imports_of(tree_of(path)) if one.module.startswith("medsr")]
        return
    assert room in LEVEL_OF, f"give {room} a place in LEVELS"
    for one in imports_of(tree_of(path), package_of(path)):
        if not one.module.startswith("medsr."):
            continue
        other = one.module.split(".")[1]
        if other in LEVEL_OF and other != room:
            assert LEVEL_OF[other] <= LEVEL_OF[room], f"line {one.line}: {room} must not know {other}"
            assert other not in STRANGERS.get(room, ()), f"line {one.line}: {room} must not know {other}"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=name_of)
def test_packages_enter_at_their_level(path: Path) -> None:
    level = LEVEL_OF.get(room_of(path), 0)
    for one in imports_of(tree_of(path), package_of(path)):
        top = one.module.split(".")[0]
        assert level >= EARLIEST.get(top, 0), f"line {one.line}: {top} is for level {EARLIEST[top]} and above"
        if one.at_module_level:
            assert top not in ONLY_IN_FUNCTIONS, f"line {one.line}: import {top} inside the function"
        assert not within(one.module, NEVER), f"line {one.line}: {one.module} is not used here"
        forbidden = ("bundles", "tests", "docs", "benchmarks", "tools", "integrations")
        assert top not in forbidden, f"line {one.line}: the package must not know {top}"


@pytest.mark.parametrize("path", [path for path in PACKAGE_FILES if room_of(path) == "networks"], ids=name_of)
def test_networks_know_no_pipeline(path: Path) -> None:
    for one in imports_of(tree_of(path), package_of(path)):
        assert not within(one.module, NEVER_FROM_NETWORKS), f"line {one.line}: {one.module}"


@pytest.mark.parametrize("room", PURE)
def test_the_lowest_level_is_standard_library_and_numpy(room: str) -> None:
    for one in imports_of(tree_of(PACKAGE / f"{room}.py"), "medsr"):
        # What MONAI's command line is read by, imported where it is needed.
        by_fire = {"fire"} if room == "overrides" else set()
        allowed = {"numpy", "medsr", *sys.stdlib_module_names, *by_fire}
        assert one.module.split(".")[0] in allowed, f"line {one.line}: {one.module}"


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_what_no_file_does(path: Path) -> None:
    tree = tree_of(path)
    for one in imports_of(tree):
        assert one.module.split(".")[0] != "common", f"line {one.line}: import medsr, not common"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert not called.endswith(".cuda"), f"line {node.lineno}: use .to(device)"
        if called in ("torch.load", _torch_load_name(tree)):
            safe = [ast.unparse(word.value) for word in node.keywords if word.arg == "weights_only"]
            assert safe == ["True"], f"line {node.lineno}: torch.load needs weights_only=True"


def _torch_load_name(tree: ast.Module) -> str | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            for alias in node.names:
                if alias.name == "load":
                    return alias.asname or alias.name
    return None


def test_common_is_no_package() -> None:
    assert not (SOURCE / "__init__.py").exists()
    folders = [path.name for path in SOURCE.iterdir() if path.is_dir()]
    made_by_tools = (".", "__")
    packages = [name for name in folders if not name.startswith(made_by_tools)]
    assert [name for name in packages if not name.endswith(".egg-info")] == ["medsr"]


def test_bundles_hold_choices_and_no_code() -> None:
    # Two bundles that each ship a package called scripts cannot live in one process.
    everything = (ROOT / "bundles").rglob("*")
    assert [name_of(path) for path in everything if path.name == "scripts" or path.suffix == ".py"] == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", [("torch", True)]),
        ("def f():\n    import torch", [("torch", False)]),
        ("class A:\n    import torch", [("torch", True)]),
        ("try:\n    import torch\nexcept ImportError: pass", [("torch", True)]),
        ("if TYPE_CHECKING:\n    import torch", [("torch", False)]),
        ("from . import a", [("medsr.io", True), ("medsr.io.a", True)]),
        ("from ..io.dicom import a", [("medsr.io.dicom", True), ("medsr.io.dicom.a", True)]),
    ],
)
def test_the_reader_of_imports(source: str, expected: list[tuple[str, bool]]) -> None:
    found = [(one.module, one.at_module_level) for one in imports_of(ast.parse(source), "medsr.io")]
    assert found == expected
