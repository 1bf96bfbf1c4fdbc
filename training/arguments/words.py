"""Words that the core knows, read from its source: its modules take seconds to import, and the help must not."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@cache
def words(module: str, name: str) -> tuple[str, ...]:
    """The strings in the assignment to `name` in a module of `vdm_diffusers`: of a Literal or a tuple, or the keys of
    a dictionary.

    Raises:
        LookupError: there is no such assignment.
    """
    package = find_spec("vdm_diffusers")
    if package is None or package.origin is None:
        raise LookupError("vdm_diffusers is not installed: pip install -e . in the repository's folder.")
    source = Path(package.origin).parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, (ast.Assign, ast.AnnAssign))
            value = node.value
            held = value.keys if isinstance(value, ast.Dict) else [value]
            return tuple(
                part.value
                for entry in held
                if entry is not None
                for part in ast.walk(entry)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            )
    raise LookupError(f"vdm_diffusers.{module} assigns nothing to {name}.")
