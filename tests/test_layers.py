"""Who may import whom: the rule of the architecture, read from the imports themselves."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"configs", "storage", "tokenize_stage", "train_stage"}
ALLOWED = {
    "configs": set(),
    "storage": set(),
    "tokenize_stage": {"configs", "storage"},
    "train_stage": {"configs", "storage"},
}
FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imported_modules(path):
        top = name.split(".")[0]
        if top not in OURS or top == package or top in ALLOWED[package]:
            continue
        assert package == "train_stage", f"{path} imports {name}"
        if not name.startswith("tokenize_stage.text.text_encoder"):  # the frozen encoder of prompts
            pixels = name.startswith(("tokenize_stage.vq.", "tokenize_stage.pixels."))
            pixels |= name in ("tokenize_stage.vq", "tokenize_stage.pixels")
            assert path.name == "pictures.py" and pixels, f"{path} imports {name}"


def test_storage_needs_torch_only_for_model_directories():
    users = [p.name for p in (ROOT / "storage").glob("*.py") if "torch" in imported_modules(p)]
    assert users == ["pretrained.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_size_and_name(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    assert path.stem not in {"utils", "util", "helpers", "common", "misc", "base"}
    assert path.stem.startswith("__") or path.stem not in sys.stdlib_module_names
    assert ast.get_docstring(ast.parse(text)), f"{path} says nothing about itself"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path}: {node.name} is too long"


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))
