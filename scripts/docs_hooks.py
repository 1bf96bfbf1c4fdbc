"""What mkdocs does besides its plugins: the API reference, a page for each public module, and links into the
repository.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "vdm_diffusers"
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)\)")
log = get_plugin_logger("repository")


def public_modules() -> list[str]:
    """Dotted names of the modules with something public in them, the package's own first."""
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "__init__.py" and path.parent != PACKAGE:
            continue
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names.append(".".join(part for part in parts if part != "__init__"))
    return sorted(names, key=lambda name: (name.count(".") > 0, name.count("."), name))


def summary(module: str) -> str:
    """The first sentence of a module's docstring."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


def on_config(config: Any) -> Any:
    """Put the reference into the navigation."""
    config.nav.append(
        {"API reference": ["reference/index.md", *(f"reference/{name}.md" for name in public_modules())]}
    )
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the reference."""
    lines = [f"- [`{name}`]({name}.md): {summary(name)}" for name in public_modules()]
    pages = {"index": "# API reference\n\n" + "\n".join(lines) + "\n"}
    pages |= {name: f"# `{name}`\n\n::: {name}\n" for name in public_modules()}
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave the pages become the names of files in the repository, which must be there."""

    def name_of(match: re.Match[str]) -> str:
        if not (ROOT / match[2]).exists():
            log.warning(f"{page.file.src_uri}: there is no {match[2]} in the repository")
        return f"{match[1]} (`{match[2]}`)" if match[2] not in match[1] else match[1]

    return _OUTSIDE.sub(name_of, markdown)
