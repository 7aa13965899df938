# SPDX-License-Identifier: Apache-2.0
"""The command line, derived from the fields of `detr_fast.config.Config`."""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from detr_fast.config import Config, UsageError

_METAVARS = {int: "N", float: "X", str: "TEXT"}
_TRUTHS = {"true": True, "false": False}


class Switch(argparse.Action):
    """``--flag``, which may also be told ``true`` or ``false``: what a file turned on goes off.

    Args:
        on (bool): value of the field where the flag is given.
    """

    def __init__(self, *names: Any, on: bool, **options: Any) -> None:
        super().__init__(*names, nargs="?", **options)
        self.on = on

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set the value of the field."""
        if values not in (None, *_TRUTHS):
            raise argparse.ArgumentError(self, f"expected true or false, got {values!r}")
        setattr(namespace, self.dest, self.on == _TRUTHS.get(values, True))


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if isinstance(action, Switch) else super()._format_args(action, default_metavar)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line as `UsageError`.

    So it ends like every other mistake: with one line, and exit code 2.
    """

    def error(self, message: str) -> NoReturn:
        """Raise what `argparse` would have printed."""
        raise UsageError(f"{message} (see --help)")


def _parser(program: str, description: str, more: Mapping[str, dict[str, Any]]) -> Parser:
    parser = Parser(
        prog=program,
        usage=f"{program} [flags]",
        description=description,
        epilog="A switch takes true or false, too: --deterministic false.",
        argument_default=argparse.SUPPRESS,  # what is left out is not in the namespace
        allow_abbrev=False,
        formatter_class=_Help,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with flags and their values, such as lr: 2e-4; the command line comes first",
    )
    own = parser.add_argument_group("this command") if more else parser
    for name, options in more.items():
        own.add_argument(f"--{name}", **options)
    entries = [entry for entry in fields(Config) if entry.metadata]
    titles = dict.fromkeys(entry.metadata["group"] for entry in entries)
    groups = {title: parser.add_argument_group(title) for title in titles}
    for entry in entries:
        options = dict(entry.metadata["options"])
        name, text = options.pop("name", entry.name), entry.metadata["help"]
        if entry.type is bool:
            options |= {"action": Switch, "on": not entry.default}
        else:
            options["type"] = entry.type
            text += f" ({entry.default})" if entry.default != "" else ""
            if "choices" not in options:
                options["metavar"] = _METAVARS[entry.type]
        names = [f"--{name}" for name in (name, *options.pop("aliases", ()))]
        groups[entry.metadata["group"]].add_argument(*names, dest=entry.name, help=text, **options)
    return parser


def parse(
    program: str,
    description: str,
    arguments: Sequence[str] | None = None,
    more: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Read a command line: the flags that stand there or in its ``--config``, and no others.

    Args:
        program (str): its name in messages.
        description (str): the first lines of ``--help``.
        arguments (Sequence[str], optional): default: those of this process.
        more (Mapping[str, dict]): flags that only this program has, and what ``add_argument``
            takes for them.

    Raises:
        UsageError: if a flag is unknown or has a value of the wrong kind.
    """
    parser = _parser(program, description, more)
    given = vars(parser.parse_args(sys.argv[1:] if arguments is None else arguments))
    if "config" in given:
        file = given.pop("config")
        try:
            given = vars(parser.parse_args(_arguments_of(file, parser))) | given
        except UsageError as error:
            raise UsageError(f"--config {file}: {error}") from None
    return given


def _arguments_of(file: str, parser: Parser) -> list[str]:
    """The command line that a YAML file stands for."""
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UsageError("is no text in UTF-8") from error
    except yaml.YAMLError as error:
        raise UsageError(" ".join(f"is no YAML: {error}".split())) from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UsageError(f"expected lines such as 'lr: 2e-4', found a {type(content).__name__}")
    actions = {
        name.removeprefix("--"): action
        for action in parser._actions
        for name in action.option_strings
        if action.dest not in ("help", "config")
    }
    return [f"--{key}={_word(key, value, actions)}" for key, value in content.items()]


def _word(key: Any, value: Any, actions: Mapping[str, argparse.Action]) -> str:
    """A value of a YAML file as it would stand on the command line."""
    if key not in actions:
        near = difflib.get_close_matches(str(key), actions, 1)
        raise UsageError(f"there is no flag {key!r}" + (f": {near[0]}?" if near else ""))
    if isinstance(value, bool):  # YAML reads the words on and off as these, too
        words = ("true", "false") if isinstance(actions[key], Switch) else ("on", "off")
        return words[0] if value else words[1]
    if not isinstance(value, (int, float, str)):
        raise UsageError(f"{key}: expected one number or word, found {value!r}")
    return str(value)
