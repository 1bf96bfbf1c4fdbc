"""Recipes: YAML files of `argument: value` lines, read as if they stood on the command line before the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from .parser import Parser

RECIPES = Path(__file__).parents[1] / "recipes"
DIGITS_RECIPE = RECIPES / "digits.yaml"
NULL = ("", "~", "null")  # YAML's words for no value: the argument keeps its default
LARGEST_RECIPE = 1 << 20  # bytes; one with every argument has a hundredth


class RecipeError(ValueError):
    """A recipe cannot be read; the message says where."""


class _Loader(yaml.BaseLoader):
    """YAML whose values stay the text that they are (YAML reads `no` as false, and 2e-4 as a string).

    Aliases, which can unfold to any size, are refused, and so is a key that is given twice.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise RecipeError(f"line {self.peek_event().start_mark.line + 1}: a recipe has no anchors and aliases.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"line {key.start_mark.line + 1}: the name of an argument is a word.")
            if key.value in seen:
                raise RecipeError(f"line {key.start_mark.line + 1}: {key.value} stands here for the second time.")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def recipes() -> list[str]:
    """The recipes that come with the scripts."""
    return sorted(str(path) for path in RECIPES.glob("*.yaml"))


def read_recipe(path: Path, parser: Parser) -> dict[str, Any]:
    """The arguments of a recipe by name, each of its own type.

    Raises:
        RecipeError: there is no such file, or it is not a recipe. What an argument cannot take ends the program as on
            the command line, with the name of the file.
    """
    tokens: list[str] = []
    for key, value in _entries(path).items():
        if key not in parser.names() - {"config"}:
            raise RecipeError(parser.unknown(f"--{key}"))
        parts = value if isinstance(value, list) else [value]
        if isinstance(value, dict) or any(isinstance(part, (dict, list)) for part in parts):
            raise RecipeError(f"{key} must be a value or a list of values, not lists or lines within it.")
        if isinstance(value, list):
            tokens += [f"--{key}", *parts]
        elif value not in NULL:
            tokens.append(f"--{key}={value}")
    return parser.read(tokens, source=str(path))


def _entries(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise RecipeError(f"there is no such file; recipes that come with this script: {', '.join(recipes())}.")
    try:
        if path.stat().st_size > LARGEST_RECIPE:
            raise RecipeError(f"a recipe has at most {LARGEST_RECIPE >> 20} MB.")
        entries = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"it cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError("it is not text in UTF-8: save it in that encoding.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RecipeError("it is nested too deep: a recipe is a list of `argument: value` lines.") from error
    if entries is None or entries == "":
        return {}
    if not isinstance(entries, dict):
        raise RecipeError("a recipe is a list of `argument: value` lines.")
    return entries
