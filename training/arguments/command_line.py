"""The command line of `train.py`: where a value comes from, and which source has the last word."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checks import check_arguments
from .fields import check_values
from .groups import GROUPS, Arguments
from .meaning import leave_out_what_means_nothing
from .parser import Parser
from .recipes import DIGITS_RECIPE, RecipeError, read_recipe

ARGUMENTS_FILE = "training_arguments.json"  # beside every model: what it was trained on and how
DATA_SOURCES = ("dataset_name", "train_data_dir")
# What a recipe says about its own data set, and which means nothing for another one.
OF_A_DATA_SET = (*DATA_SOURCES, "dataset_config_name", "image_column", "label_column", "train_split", "eval_split")


def make_parser() -> Parser:
    """The parser of `train.py`."""
    parser = Parser(
        GROUPS,
        usage="%(prog)s [--config RECIPE.yaml] [--argument VALUE ...]",
        description=(
            "Train a variational diffusion model. With neither data nor recipe: the 8x8 digits, by "
            "recipes/digits.yaml."
        ),
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="File of arguments; the command line overrides it.")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Arguments:
    """The arguments of a run from its command line (default: sys.argv), checked.

    Precedence: command line, then the recipe, then the defaults. The recipe is --config's; without it, and without a
    data set on the command line, it is the one for the embedded digits. A data set on the command line replaces the
    recipe's whole.
    """
    parser = make_parser()
    tokens = sys.argv[1:] if argv is None else list(argv)
    parser.answer_help(tokens)
    typed = parser.read(tokens)
    config = typed.pop("config", None)
    if config is None and not any(name in typed for name in DATA_SOURCES):
        config = str(DIGITS_RECIPE)
    notes: list[str] = []
    recipe: dict[str, Any] = {}
    if config is not None:
        try:
            recipe = read_recipe(Path(config).expanduser(), parser)
        except RecipeError as error:
            parser.error(f"--config {config}: {error}")
    given = next((name for name in DATA_SOURCES if typed.get(name) is not None), None)
    if given is not None:
        left_out = {name: recipe.pop(name) for name in OF_A_DATA_SET if name in recipe}
        if left_out:
            was = ", ".join(f"{name} {value}" for name, value in left_out.items())
            notes.append(f"--{given} takes the place of the recipe's data: without its {was}")
    values = recipe | typed
    arguments = Arguments(*(_group(kind, values) for kind in GROUPS), notes=notes)  # type: ignore[misc]
    try:
        for group in arguments.groups:
            check_values(group)
        leave_out_what_means_nothing(arguments, typed, recipe)
        check_arguments(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def _group(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass of arguments from those of `values` that are its fields."""
    return kind(**{name: values[name] for name in kind.__dataclass_fields__ if name in values})  # type: ignore[attr-defined]
