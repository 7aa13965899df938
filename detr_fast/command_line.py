# SPDX-License-Identifier: Apache-2.0
"""The command line, derived from the fields of :class:`detr_fast.config.Config`."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any, NoReturn

from detr_fast.config import Config, UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong command line as :class:`UsageError`.

    So it ends like every other mistake: with one line, and exit code 2.
    """

    def error(self, message: str) -> NoReturn:
        """Raise what :mod:`argparse` would have printed."""
        raise UsageError(f"{message} (see --help)")


def _parser(
    program: str, description: str, more: Mapping[str, dict[str, Any]]
) -> argparse.ArgumentParser:
    parser = Parser(
        prog=program,
        description=description,
        argument_default=argparse.SUPPRESS,  # what is left out is not in the namespace
        allow_abbrev=False,
    )
    entries = [entry for entry in fields(Config) if entry.metadata]
    titles = dict.fromkeys(entry.metadata["group"] for entry in entries)
    groups = {title: parser.add_argument_group(title) for title in titles}
    for entry in entries:
        options = dict(entry.metadata["options"])
        name, text = options.pop("name", entry.name), entry.metadata["help"]
        if entry.type is bool:
            options["action"] = "store_false" if entry.default else "store_true"
        else:
            options["type"] = entry.type
            text += f" ({entry.default})" if entry.default != "" else ""
        names = [f"--{name}" for name in (name, *options.pop("aliases", ()))]
        groups[entry.metadata["group"]].add_argument(*names, dest=entry.name, help=text, **options)
    own = parser.add_argument_group("this command") if more else parser
    for name, options in more.items():
        own.add_argument(f"--{name}", **options)
    return parser


def parse(
    program: str,
    description: str,
    arguments: Sequence[str] | None = None,
    more: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Read a command line: the flags that stand there, and no others.

    Args:
        program (str): its name in messages.
        description (str): the first lines of ``--help``.
        arguments (Sequence[str], optional): default: those of this process.
        more (Mapping[str, dict]): flags that only this program has, and what ``add_argument``
            takes for them.

    Raises:
        UsageError: if a flag is unknown or has a value of the wrong kind.
    """
    return vars(_parser(program, description, more).parse_args(arguments))
