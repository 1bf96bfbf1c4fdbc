"""docs/theory.md names functions and tests beside its equations: they exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import vdm_diffusers

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
NAMES = re.findall(r"`([A-Za-z_][\w.]*)(?:\([^`]*\))?`", TEXT)
MODULES = {path.stem for path in (ROOT / "src" / "vdm_diffusers").glob("*.py")}


def test_functions_exist():
    found = 0
    for name in NAMES:
        first, *rest = name.split(".")
        if not rest or rest == ["py"]:
            continue
        target = (
            importlib.import_module(f"vdm_diffusers.{first}")
            if first in MODULES
            else getattr(vdm_diffusers, first, None)
        )
        if target is None:  # `Hierarchy.num_layers` and the like, of elbo_forms
            target = getattr(importlib.import_module("vdm_diffusers.elbo_forms"), first)
        for part in rest:
            fields = getattr(target, "__dataclass_fields__", {})
            target = fields[part] if part in fields else getattr(target, part)
        found += 1
    assert found > 20


def test_tests_exist():
    defined = {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    named = {name for name in NAMES if name.startswith("test_") and not name.endswith(".py")}
    assert len(named) > 10
    assert named <= defined
    assert all((ROOT / "tests" / name).is_file() for name in NAMES if re.fullmatch(r"test_\w+\.py", name))


@pytest.mark.parametrize("picture", re.findall(r"\]\((figures/[\w./]+)\)", TEXT))
def test_figures_exist(picture):
    assert (ROOT / "docs" / picture).is_file()
