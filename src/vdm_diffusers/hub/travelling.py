"""The code that travels with a published model: the package's own sources in one file, made when publishing."""

from __future__ import annotations

import ast
import io
import os
import pathlib
import re
import tokenize
from collections.abc import Mapping
from functools import cache
from importlib import metadata

CODE_FILE = "vdm_diffusers.py"
CODE_PATHS = (CODE_FILE, f"unet/{CODE_FILE}", f"scheduler/{CODE_FILE}")
_PACKAGE = pathlib.Path(__file__).parent.parent
_TRAVELLERS = (  # with all that they import
    "models/unet_vdm",
    "models/analytic_start",
    "schedulers/scheduling_vdm",
    "pipelines/pipeline_vdm",
)
_SUBSTITUTES = {"pipelines/checkpoint_mixin": "pipelines/travelled_checkpoints"}


@cache
def travelling_code() -> str:
    """One self-contained module with the network, the scheduler and the pipeline, made of the package's own sources.

    Diffusers imports each code file of a repository as a module of its own, and those in folders under one and the
    same name: so a repository carries three copies of one file. Only what loading and sampling need is in it, without
    docstrings.
    """
    package = _PACKAGE
    sources: dict[str, str] = {}

    def collect(module: str) -> None:
        if module in sources:
            return
        source = (package / f"{module}.py").read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if (own := _own_module(node, module)) is not None:
                collect(own)
        sources[module] = source  # after what it needs

    for module in _TRAVELLERS:
        collect(module)
    header = (
        f"# vdm-diffusers {metadata.version('vdm-diffusers')} (Apache-2.0) in one file, for those who load this "
        "repository without the\n"
        "# package: made from the package's sources when the model was published, not to be edited.\n"
    )
    return header + _joined(sources)


def write_travelling_code(folder: str | os.PathLike[str]) -> None:
    """Write `travelling_code` where a repository carries it, so that the folder loads without this package."""
    for name in CODE_PATHS:
        path = pathlib.Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(travelling_code(), encoding="utf-8")


def _own_module(node: ast.AST, module: str) -> str | None:
    """The module of this package that an import statement of `module` names, as a path such as "models/fourier"."""
    if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "vdm_diffusers" for alias in node.names):
        raise ValueError(
            f"{module} says `{ast.unparse(node)}`: in code that travels write `from .module import name`."
        )
    if not isinstance(node, ast.ImportFrom):
        return None
    parts = (node.module or "").split(".") if node.module else []
    if node.level:
        parents = module.split("/")[:-1]
        parts = [*parents[: len(parents) - node.level + 1], *parts]
    elif parts[:1] != ["vdm_diffusers"]:
        return None
    else:
        parts = parts[1:]
    parts = _SUBSTITUTES.get("/".join(parts), "/".join(parts)).split("/")
    if not (_PACKAGE / "/".join(parts)).with_suffix(".py").is_file():
        raise ValueError(
            f"{module} says `{ast.unparse(node)}`: code that travels imports names from modules, not from packages."
        )
    return "/".join(parts)


def _joined(sources: Mapping[str, str]) -> str:
    """The modules one after another, the imports of each other resolved and the others gathered at the top.

    A private name that two modules define is made unique. Raises ValueError for a public one, and for an import of a
    module of the package inside a function.
    """
    imports: dict[str, tuple[str | None, str]] = {}  # name -> module it comes from (None: is one), name there
    bodies: list[str] = []
    taken: dict[str, str] = {}  # name in the joined file -> the statement that defines it
    names: dict[str, dict[str, str]] = {}  # module -> its top-level names -> their names in the joined file
    for module, source in sources.items():
        tree, lines = ast.parse(source), source.splitlines()
        drop: set[int] = set()
        renamed: dict[str, str] = {}
        names[module] = {}
        top_imports = set()
        for index, node in enumerate(tree.body):
            span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            docstring = index == 0 and isinstance(node, ast.Expr)
            if docstring or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                drop.update(span)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                drop.update(span)
                top_imports.add(node)
                own = _own_module(node, module)
                for alias in node.names:
                    if own is not None:
                        final = names[own].get(alias.name, alias.name)
                        if final != (alias.asname or alias.name):
                            renamed[alias.asname or alias.name] = final
                    else:
                        source_module = node.module if isinstance(node, ast.ImportFrom) else None
                        if imports.setdefault(alias.asname or alias.name, (source_module, alias.name)) != (
                            source_module,
                            alias.name,
                        ):
                            raise ValueError(
                                f"{module} imports another {alias.asname or alias.name!r} than a module before it."
                            )
            for name in set(_defined(node)) - set(names[module]):
                statement, final = ast.unparse(node), name
                if taken.get(name) == statement:
                    drop.update(span)  # the same thing said twice, such as a logger
                elif name in taken and name.startswith("_"):
                    final = renamed[name] = f"_{module.rpartition('/')[2]}{name}"
                elif name in taken:
                    raise ValueError(
                        f"{name!r} of {module} is defined in another module too: code that travels needs one."
                    )
                taken.setdefault(final, statement)
                names[module][name] = final
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                drop.update(_docstring_lines(node))
        for inner in ast.walk(tree):
            nested = isinstance(inner, (ast.Import, ast.ImportFrom)) and inner not in top_imports
            if nested and _own_module(inner, module):
                raise ValueError(f"{module} imports from the package inside a function: code that travels cannot.")
        kept = "\n".join("" if number in drop else line for number, line in enumerate(lines, 1))
        bodies.append(f"# --- {module} ---\n\n{_rename(kept, renamed).strip()}\n")
    if both := sorted(set(imports) & set(taken)):
        raise ValueError(
            f"{', '.join(both)} is imported in one module and defined in another: code that travels needs one name "
            "each."
        )
    return _import_lines(imports) + "\n\n\n" + "\n\n".join(re.sub(r"\n{4,}", "\n\n\n", body) for body in bodies)


def _docstring_lines(node: ast.AST) -> set[int]:
    """The lines of the docstrings in a definition, but those that are its whole body."""
    found: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and len(inner.body) > 1:
            first = inner.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                found.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def _import_lines(imports: Mapping[str, tuple[str | None, str]]) -> str:
    plain: list[str] = []
    grouped: dict[str, list[str]] = {}
    for name, (module, original) in sorted(imports.items()):
        said = original if name == original else f"{original} as {name}"
        if module is None:
            plain.append(f"import {said}")
        else:
            grouped.setdefault(module, []).append(said)
    lines = {module: f"from {module} import {', '.join(said)}" for module, said in sorted(grouped.items())}
    return "\n".join([lines.pop("__future__"), *plain, *lines.values()])


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _rename(source: str, names: Mapping[str, str]) -> str:
    """`source` with every use of a name (not of an attribute) replaced."""
    if not names:
        return source
    lines = source.splitlines()
    previous = ""
    edits = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string in names and previous != ".":
            edits.append((token.start, token.end, names[token.string]))
        previous = token.string
    for (row, start), (_, end), new in reversed(edits):
        lines[row - 1] = lines[row - 1][:start] + new + lines[row - 1][end:]
    return "\n".join(lines)
