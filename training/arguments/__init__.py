"""The arguments of the scripts: dataclasses, their command line, and recipes in YAML.

A recipe (`--config recipe.yaml`) is read as if its entries stood on the command line before the real ones: every value
is converted to its argument's type, an unknown key is refused, and the command line has the last word. Nothing here
imports torch: `--help` and a mistyped argument are answered at once.
"""

from .checks import ELBO_WEIGHTED, LOG_SNR_SCHEDULES, check_arguments, trains_in_discrete_time
from .command_line import ARGUMENTS_FILE, make_parser, parse_arguments
from .evaluation import EvaluateArguments, parse_evaluation, training_record
from .fields import Bounds, argument, check_values
from .groups import (
    GROUPS,
    Arguments,
    DataArguments,
    DiffusionArguments,
    ModelArguments,
    OptimizationArguments,
    RunArguments,
    Storage,
)
from .parser import REPLACED_ARGUMENTS, Parser
from .recipes import DIGITS_RECIPE, RECIPES, recipes

__all__ = [
    "ARGUMENTS_FILE",
    "DIGITS_RECIPE",
    "ELBO_WEIGHTED",
    "GROUPS",
    "LOG_SNR_SCHEDULES",
    "RECIPES",
    "REPLACED_ARGUMENTS",
    "Arguments",
    "Bounds",
    "DataArguments",
    "DiffusionArguments",
    "EvaluateArguments",
    "ModelArguments",
    "OptimizationArguments",
    "Parser",
    "RunArguments",
    "Storage",
    "argument",
    "check_arguments",
    "check_values",
    "make_parser",
    "parse_arguments",
    "parse_evaluation",
    "recipes",
    "training_record",
    "trains_in_discrete_time",
]
