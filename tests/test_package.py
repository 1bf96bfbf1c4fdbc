"""What holds for the package as a whole: rooms, silence on import, versions, declared dependencies, the wheel."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import vdm_diffusers

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "vdm_diffusers"

# Each room may import those above it. A new module gets its place here.
CORE = [
    "numerics",
    "noise_schedules",
    "gaussian",
    "prediction",
    "timelines",
    "score",
    "time_sampling",
    "adaptive_time_sampling",
    "frequency",
    "control_variates",
    "decoders",
    "elbo",
    "elbo_forms",
    "objectives",
    "reverse_variance",
    "step_grids",
    "learned_variance",
    "repetitions",
    "likelihood",
    "latent_evaluation",
]
ROOMS = [
    *CORE,
    "probability_flow",
    "manifest",
    "safety",
    "models",
    "schedulers",
    "hub",
    "pictures",
    "pipelines",
    "loading",
    "evaluation",
    "command_line",
    "compression",
    "registration",
    "__init__",
    "__main__",
]
# The evaluators also read users' images and show their progress.
CORE_IMPORTS = {room: {"torch"} for room in CORE} | {
    "likelihood": {"torch", "numpy", "PIL", "tqdm"},
    "control_variates": {"torch", "numpy"},  # Gauss-Legendre nodes
}

# Import names that differ from the names of their distributions.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn", "huggingface_hub": "huggingface-hub"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree: ast.AST, module: list[str], inside_function: bool = False) -> Iterator[tuple[str, bool]]:
    """Absolute dotted name of everything that is imported, and whether that happens inside a function.

    `module` is the dotted path of the file's package. `from a import b` gives "a.b": b may be a module.
    Imports for the type checker alone are no dependency.
    """
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            yield from ((".".join([*base, alias.name]), inside_function) for alias in node.names)
        function = inside_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from imports(node, module, function)


def imports_of(path: Path) -> Iterator[tuple[str, bool]]:
    package = ["vdm_diffusers", *path.relative_to(PACKAGE).parent.parts]
    return imports(ast.parse(path.read_text(encoding="utf-8")), package)


def violations(room: str, imported: list[str]) -> list[str]:
    """What of `imported` (dotted names) the room may not import."""
    wrong = []
    for name in imported:
        top, *rest = name.split(".")
        if top == "vdm_diffusers":
            # A name that is no room (vdm_diffusers.VDMScheduler) comes from the package itself, the last room.
            other = rest[0] if rest and rest[0] in ROOMS else "__init__"
            if other != room and ROOMS.index(other) >= ROOMS.index(room):
                wrong.append(name)
        elif room in CORE and top not in CORE_IMPORTS[room] | sys.stdlib_module_names:
            wrong.append(name)
    return wrong


def test_dependencies_point_one_way():
    files = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "__init__.py" in files
    unplaced = {room_of(path) for path in files} - set(ROOMS)
    assert not unplaced, f"{unplaced} have no place in ROOMS: say there what may import them"
    wrong = {str(p.relative_to(ROOT)): violations(room_of(p), [name for name, _ in imports_of(p)]) for p in files}
    assert not {path: names for path, names in wrong.items() if names}


@pytest.mark.parametrize(
    ("room", "source", "expected"),
    [
        ("gaussian", "import torch\nfrom .noise_schedules import x", []),
        ("gaussian", "from torch import Tensor\nfrom math import log\nfrom vdm_diffusers import noise_schedules", []),
        ("gaussian", "from .prediction import convert", ["vdm_diffusers.prediction.convert"]),
        ("gaussian", "def f():\n    from . import elbo", ["vdm_diffusers.elbo"]),
        ("gaussian", "import vdm_diffusers.elbo as e", ["vdm_diffusers.elbo"]),
        ("gaussian", "from vdm_diffusers import VDMScheduler", ["vdm_diffusers.VDMScheduler"]),
        ("gaussian", "import numpy", ["numpy"]),
        ("likelihood", "import numpy\nimport diffusers.utils", ["diffusers.utils"]),
        ("likelihood", "if TYPE_CHECKING:\n    from diffusers import DiffusionPipeline", []),
        ("models", "import diffusers\nfrom .elbo import bits_per_dim", []),
        ("models", "from .schedulers import VDMScheduler", ["vdm_diffusers.schedulers.VDMScheduler"]),
    ],
)
def test_the_rule_itself(room, source, expected):
    imported = [name for name, _ in imports(ast.parse(source), ["vdm_diffusers"])]
    assert violations(room, imported) == expected


def test_relative_imports_inside_subpackages_are_resolved():
    tree = ast.parse("from ..elbo import a\nfrom . import b\nfrom .c import d")
    names = [name for name, _ in imports(tree, ["vdm_diffusers", "models"])]
    assert names == ["vdm_diffusers.elbo.a", "vdm_diffusers.models.b", "vdm_diffusers.models.c.d"]


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_the_core_works_where_diffusers_is_absent():
    # The package's own __init__ offers the Diffusers classes, so a bare package of the same name stands in for it.
    present = [name for name in CORE if (PACKAGE / f"{name}.py").exists()]
    code = f"""
import importlib, sys, types
for absent in ("diffusers", "transformers", "accelerate", "datasets", "huggingface_hub"):
    sys.modules[absent] = None
package = types.ModuleType("vdm_diffusers")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["vdm_diffusers"] = package
for name in {present!r}:
    importlib.import_module("vdm_diffusers." + name)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_import_prints_nothing():
    result = run_python("import vdm_diffusers")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_one_version():
    version = vdm_diffusers.__version__
    assert metadata.version("vdm-diffusers") == version, "the installed metadata are old: pip install -e . again"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == version


def requirements(extra: str = "") -> dict[str, Requirement]:
    """Name -> requirement of the installed package: those of every user, or those that `extra` adds."""
    found = map(Requirement, metadata.requires("vdm-diffusers") or [])
    return {
        r.name: r for r in found if (r.marker is None) == (not extra) and (not extra or f'"{extra}"' in str(r.marker))
    }


def test_imports_are_declared():
    always = {"vdm-diffusers", *requirements()}
    sometimes = always | {*requirements("train"), *requirements("compression"), *requirements("data")}
    undeclared = {
        (str(path.relative_to(ROOT)), name)
        for path in PACKAGE.rglob("*.py")
        for name, inside_function in imports_of(path)
        if (top := name.split(".")[0]) not in sys.stdlib_module_names
        and DISTRIBUTIONS.get(top, top.replace("_", "-")) not in (sometimes if inside_function else always)
    }
    assert not undeclared


def test_the_lowest_constraints_are_the_declared_bounds():
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    declared = requirements() | requirements("train") | requirements("compression")
    declared |= requirements("data") | requirements("test")
    declared.pop("vdm-diffusers", None)
    assert pinned.keys() == declared.keys()
    assert pinned.pop("torch") in declared.pop("torch").specifier  # only one version of it is run
    assert {name: f">={version}" for name, version in pinned.items()} == {
        name: str(requirement.specifier) for name, requirement in declared.items()
    }


@pytest.mark.slow
def test_wheel_is_complete(tmp_path):
    # Built from a copy: setuptools leaves a build folder, whose old files would find their way into the next wheel.
    source, package = tmp_path / "source", tmp_path / "source" / "src" / "vdm_diffusers"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}
    info = f"vdm_diffusers-{vdm_diffusers.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == modules | {"vdm_diffusers/py.typed"}
    assert info + "licenses/LICENSE" in names
