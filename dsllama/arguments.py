"""The command line of a TrainingConfig: one option for each field, its help from the field's docstring.

--config FILE  --max_lr 3e-4  --shuffle  --zero_stage=3   ->  TrainingConfig
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn, get_args, get_origin

from dsllama.config import TrainingConfig, choices_of, load_config
from dsllama.errors import Problem, UserError, did_you_mean
from dsllama.paths import parse_path

_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Help that gives the default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors like every other, and which takes no abbreviations.

    Words may stand among the options (`a.txt --out x b.txt`), as they may in any other command.
    """

    _mixing = False

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which alone takes only the first words in a row; but what is not known is an error here, in
        the parser of the verb, which knows the names that may have been meant."""
        if self._mixing:
            return super().parse_known_args(args, namespace)
        self._mixing = any(action.nargs in ("*", "+") for action in self._get_positional_actions())
        try:
            parse = self.parse_known_intermixed_args if self._mixing else super().parse_known_args
            parsed, rest = parse(args, namespace)
        finally:
            self._mixing = False
        # A value that has no option before it belongs to the unknown option that it follows.
        if unknown := [word for word in rest if word.startswith("--")] or rest:
            names = [option.lstrip("-") for action in self._actions for option in action.option_strings]
            problems = []
            for word in unknown:
                option = word.split("=")[0]
                if option.startswith("-"):
                    remedy = did_you_mean(option.lstrip("-"), names, f"see {self.prog} --help")
                    problems.append(Problem(option, "there is no such option", remedy))
                else:
                    problems.append(Problem(word, "is a word too many", f"see {self.prog} --help"))
            raise UserError(problems)
        return parsed, rest

    def error(self, message: str) -> NoReturn:
        remedy = f"see {self.prog} --help"
        if "expected one argument" in message:
            remedy = "write it behind the option; a value that begins with - as --option=-value"
        raise UserError(Problem("command line", message, remedy))


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config` and one option per field of TrainingConfig."""
    text = "YAML or JSON file with the fields below"
    parser.add_argument("--config", metavar="FILE", type=read_with(parse_path), default=None, help=text)
    group = parser.add_argument_group("configuration (each overrides the file)")
    for name, field in TrainingConfig.model_fields.items():
        choices = choices_of(field.annotation)
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else _kind(field.annotation)
        default = ["'" + str(p) + "'" for p in field.default] if isinstance(field.default, list) else field.default
        text = f"{field.description} (default: {'null' if default is None else default})"
        options: dict[str, Any] = {"metavar": metavar, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if bool in (field.annotation, *get_args(field.annotation)):
            options |= {"nargs": "?", "const": "true"}
        elif get_origin(field.annotation) is list:
            options |= {"nargs": "*"}
        group.add_argument(f"--{name}", **options)


def read_with(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type that reads a word with a function that raises ValueError."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} {error}") from None

    return read


def config_from(arguments: argparse.Namespace) -> TrainingConfig:
    """The configuration that parsed arguments describe. Raises UserError with everything that is wrong."""
    given = {name: value for name, value in vars(arguments).items() if name in TrainingConfig.model_fields}
    return load_config(arguments.config, {name: value_of(name, value) for name, value in given.items()})


def value_of(name: str, text: Any) -> Any:
    """What a word on the command line means for a field; most stay text, which the field's own check reads."""
    field = TrainingConfig.model_fields.get(name)
    if field is None or isinstance(text, list):
        return text
    kinds, lowered = {field.annotation, *get_args(field.annotation)}, text.strip().lower()
    if any(get_origin(kind) is list for kind in kinds):
        return [text]
    nothing = ("null",) if "none" in choices_of(field.annotation) else ("null", "none")
    if lowered in nothing and type(None) in kinds:
        return None
    return _BOOLEANS.get(lowered, text) if bool in kinds else text


def _kind(annotation: Any) -> str:
    if {bool, str} <= {annotation, *get_args(annotation)}:
        return "BOOL|PATH"
    names = {bool: "BOOL", int: "N", float: "X", list: "TEXT", str: "PATH"}
    parts = (annotation, get_origin(annotation), *get_args(annotation))
    parts += tuple(inner for part in parts for inner in get_args(part))
    return next(name for kind, name in names.items() if kind in parts)
