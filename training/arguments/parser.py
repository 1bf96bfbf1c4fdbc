"""From a command line to dataclasses: every option is a field, and nothing else is one."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from .fields import default_of

# Arguments of Diffusers' train_unconditional.py that have no counterpart here, and what to write instead.
REPLACED_ARGUMENTS = {
    "save_images_epochs": "samples are drawn every --sample_steps optimiser steps",
    "save_model_epochs": "models are saved every --checkpointing_steps optimiser steps, and at the end",
    "local_rank": "torchrun and `accelerate launch` set it in the environment",
    "enable_xformers_memory_efficient_attention": "the network uses PyTorch's scaled_dot_product_attention",
}
_TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """The type of a field: one value or several of `base`, perhaps of `choices`, perhaps none."""

    base: type
    choices: tuple[str, ...] = ()
    several: bool = False
    optional: bool = False

    @classmethod
    def of(cls, hint: Any) -> _Kind:
        """From a type hint: bool, int, float, str, a Literal, or a list of these; each may be `| None`."""
        options = [part for part in get_args(hint) if part is not type(None)]
        if get_origin(hint) in (Union, types.UnionType):
            if len(options) != 1:
                raise TypeError(f"a field of arguments has one type, not {hint}.")
            return dataclasses.replace(cls.of(options[0]), optional=True)
        if get_origin(hint) is Literal:
            return cls(str, choices=get_args(hint))
        if get_origin(hint) is list:
            return dataclasses.replace(cls.of(options[0]), several=True)
        if hint not in (bool, int, float, str):
            raise TypeError(f"a field of arguments cannot be of the type {hint}.")
        return cls(hint)

    @property
    def shown(self) -> str:
        """What stands in place of a value in the help."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return {bool: "BOOL", int: "INT", float: "NUMBER", str: "TEXT"}[self.base]

    def read(self, text: str) -> Any:
        """A value from the command line.

        Raises:
            argparse.ArgumentTypeError: it is none of this kind.
        """
        if self.optional and text.lower() == "none":
            return None
        if self.choices and text not in self.choices:
            near = difflib.get_close_matches(text.lower(), [choice.lower() for choice in self.choices], n=1)
            meant = next((choice for choice in self.choices if near and choice.lower() == near[0]), None)
            hint = f" Did you mean {meant}?" if meant else ""
            raise argparse.ArgumentTypeError(
                f"invalid choice: {text!r} (choose from {', '.join(self.choices)}).{hint}"
            )
        if self.base is bool:
            if text.lower() not in _TRUTH:
                raise argparse.ArgumentTypeError(f"invalid bool value: {text!r} (write true or false)")
            return _TRUTH[text.lower()]
        try:
            return self.base(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {self.base.__name__} value: {text!r}") from None


class Parser(argparse.ArgumentParser):
    """A command line of the fields of some dataclasses. Errors are one sentence, and end the program with exit code 2.

    Arguments:
        groups: the dataclasses; each has a group of the help by its `_argument_group_name`.
    """

    def __init__(self, groups: Sequence[type], **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS, formatter_class=_Help, **options
        )
        # so that -5e-1 is a value: argparse itself knows exponents from Python 3.14 on
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)
        self.groups = tuple(groups)
        self.topics: dict[str, argparse._ArgumentGroup] = {}
        self.fields: dict[str, dataclasses.Field[Any]] = {}
        for group in groups:
            title = group._argument_group_name  # type: ignore[attr-defined]
            self.topics[title] = self.add_argument_group(title, (group.__doc__ or "").split("\n\n")[0])
            hints = get_type_hints(group)
            for declared in dataclasses.fields(group):
                self.fields[declared.name] = declared
                self._add(self.topics[title], declared, _Kind.of(hints[declared.name]))

    @staticmethod
    def _add(group: argparse._ArgumentGroup, declared: dataclasses.Field[Any], kind: _Kind) -> None:
        name, default = declared.name, default_of(declared)
        names = [name, *filter(None, [declared.metadata["alias"]])]
        options = dict.fromkeys(f"--{spelled}" for n in names for spelled in (n, n.replace("_", "-")))
        shown = "none" if default is None else " ".join(map(str, default)) if kind.several else default
        text = f"{declared.metadata['help']} (default: {shown})".replace("%", "%%")
        more: dict[str, Any] = {"metavar": kind.shown, "type": kind.read, "help": text, "dest": name}
        if kind.several:
            more["nargs"] = "+"
        elif kind.base is bool:
            more |= {"nargs": "?", "const": True}
        group.add_argument(*options, **more)
        if default is True:
            off = dict.fromkeys((f"--no_{name}", f"--no-{name.replace('_', '-')}"))
            group.add_argument(*off, action="store_false", dest=name, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def read(self, tokens: Sequence[str], *, source: str = "") -> dict[str, Any]:
        """The arguments that stand on a command line, by name.

        Arguments:
            source: where the tokens are from, for messages; empty: the command line itself.
        """
        name, self.prog = self.prog, f"{self.prog}: {source}" if source else self.prog
        try:
            namespace, unknown = self.parse_known_args(list(tokens))
            if unknown:
                self.error(self.unknown(unknown[0]))
            values = {key: self._whole(key, value) for key, value in vars(namespace).items()}
        finally:
            self.prog = name
        return values

    def _whole(self, name: str, value: Any) -> Any:
        """A value as the field has it: a list of which `none` is all means None."""
        if isinstance(value, list) and None in value:
            if len(value) > 1:
                self.error(f"argument --{name}: none stands alone, got {' '.join(map(str, value))}.")
            return None
        return value

    def unknown(self, token: str) -> str:
        """The sentence about something that is no argument."""
        name = token.removeprefix("--").split("=")[0].replace("-", "_")
        if name in REPLACED_ARGUMENTS:
            return f"--{name} is not an argument of this script: {REPLACED_ARGUMENTS[name]}."
        if not token.startswith("--"):
            return f"{token!r} belongs to no argument."
        close = difflib.get_close_matches(name, self.names(), n=1)
        return f"unknown argument --{name}." + (f" Did you mean --{close[0]}?" if close else "")

    def names(self) -> set[str]:
        """All argument names and aliases, without dashes."""
        return {option[2:] for action in self._actions for option in action.option_strings}

    def answer_help(self, tokens: Sequence[str]) -> None:
        """Print the help and end the program, if it was asked for.

        `--help` explains the arguments that most runs need, `--help all` every one, `--help GROUP` a group,
        `--help NAME` one.
        """
        asked = next((index for index, token in enumerate(tokens) if token in ("-h", "--help")), None)
        if asked is None:
            return
        topic = tokens[asked + 1].removeprefix("--").replace("-", "_") if asked + 1 < len(tokens) else ""
        by_option = {option: action.dest for action in self._actions for option in action.option_strings}
        wanted: Callable[[argparse.Action], bool]
        if topic == "all":
            wanted = lambda action: True  # noqa: E731
        elif topic in self.topics:
            members = self.topics[topic]._group_actions
            wanted = lambda action: action in members  # noqa: E731
        elif f"--{topic}" in by_option:
            wanted = lambda action: action.dest == by_option[f"--{topic}"]  # noqa: E731
        else:
            wanted = lambda action: action.dest not in self.fields or self.fields[action.dest].metadata["basic"]  # noqa: E731
            self.epilog = (
                f"These are the arguments that most runs need, {len(self.fields)} in all. --help all explains every "
                "one, --help "
                f"{{{','.join(self.topics)}}} those of a group, --help NAME a single one."
            )
        for action in self._actions:
            if not wanted(action):
                action.help = argparse.SUPPRESS
        for group in self.topics.values():
            if all(action.help is argparse.SUPPRESS for action in group._group_actions):
                group.title = group.description = None
        self.print_help()
        self.exit(0)


class _Help(argparse.HelpFormatter):
    """Help with one spelling of each argument: underscores; dashes are understood too."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        shown = "" if action.nargs == 0 or action.const is True else f" {action.metavar}"
        return action.option_strings[0] + shown + (" ..." if action.nargs == "+" else "")
