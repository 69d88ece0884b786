"""What all commands have in common: parsing, one-line errors, exit codes, where output goes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import traceback
import warnings
from abc import abstractmethod
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from optimum.commands.base import BaseOptimumCLICommand

from .options import COMMON, Option, add_options, nearest, read_options

__all__ = ["Result", "SegQuantSubcommand", "one_line_errors"]

USER_ERROR = 2
INTERNAL_ERROR = 1

_HOSTS = ("optimum_segquant", "modelopt_ext", "diffusers", "transformers", "optimum", "huggingface_hub")
"""Packages that check what a user gives them: a ValueError of theirs is the user's to mend."""

_QUIET = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""What libraries read when they are imported, which a command does after this is set."""


@dataclass(frozen=True)
class Result:
    """What a command found.

    Attributes:
        data: for ``--json``, plain types.
        text: for people.
    """

    data: Any
    text: str


class SegQuantSubcommand(BaseOptimumCLICommand):
    """A command of ``optimum-cli segquant``.

    Class attributes:
        OPTIONS: its options.
        DESCRIPTION: what it does, a sentence or two.
        EXAMPLES: command lines, without ``optimum-cli segquant``.
    """

    OPTIONS: Sequence[Option] = ()
    DESCRIPTION = ""
    EXAMPLES: Sequence[str] = ()

    @classmethod
    def add_to(cls, parser: ArgumentParser) -> None:
        """Add options, description and examples to the command's parser."""
        parser.formatter_class = RawDescriptionHelpFormatter
        parser.description = cls.DESCRIPTION
        lines = "\n".join(f"  optimum-cli segquant {example}" for example in cls.EXAMPLES)
        parser.epilog = f"examples:\n{lines}\n\nexit codes: 0 done, 2 something given was wrong, 1 anything else"
        parser.allow_abbrev = False
        add_options(parser, cls.OPTIONS)
        one_line_errors(parser, [option.flag for option in (*cls.OPTIONS, *COMMON) if not option.positional])

    @staticmethod
    @abstractmethod
    def work(values: Namespace) -> Result:
        """Do it.

        Args:
            values: of all options, checked; ``progress`` says whether bars may be shown.
        """

    def run(self) -> None:
        """Run with exit codes and one-line errors; Optimum's tool calls this."""
        arguments: Namespace = self.args
        debug = bool(getattr(arguments, "debug", False))
        try:
            values = read_options(arguments, self.OPTIONS)
            debug = values["debug"]
            with _quiet_unless(debug), contextlib.redirect_stdout(sys.stderr if debug else io.StringIO()):
                values["progress"] = not values["quiet"] and sys.stderr.isatty()
                result = self.work(Namespace(**values))
        except KeyboardInterrupt:
            _fail("stopped; what was finished is kept", 130)
        except Exception as error:
            if debug:
                traceback.print_exc()
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own
                _fail(f"memory ran out, use smaller batches, sizes or dtypes: {one_line(error)}", USER_ERROR)
            if is_user_error(error):
                _fail(one_line(error), USER_ERROR)
            hint = "" if debug else "; --debug shows the traceback, please report it"
            _fail(f"internal error: {type(error).__name__}: {one_line(error)}{hint}", INTERNAL_ERROR)
        _write(json.dumps(result.data, indent=2, allow_nan=False) if values["json"] else result.text)


def one_line_errors(parser: ArgumentParser, flags: Sequence[str]) -> None:
    """Let a parser say what is wrong in one line, also of unknown options, which argparse leaves to the tool's root."""

    def error(message: str) -> NoReturn:
        _fail(f"{message}; see {parser.prog} --help", USER_ERROR)

    parse: Callable[..., tuple[Namespace, list[str]]] = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None, **kwargs: Any) -> tuple[Namespace, list[str]]:
        found, rest = parse(args, namespace, **kwargs)
        for word in rest:
            if word.startswith("-"):
                name = word.partition("=")[0]
                error(f"there is no option {name}{nearest(name, list(flags))}")
        if rest:
            error(f"one thing too many: {' '.join(rest)}")
        return found, rest

    parser.error = error  # type: ignore[method-assign]
    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def is_user_error(error: BaseException) -> bool:
    """Whether something that was given is wrong, and not the program."""
    if isinstance(error, (OSError, ImportError)):
        return True
    if not isinstance(error, (ValueError, TypeError, FloatingPointError)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    places = frames[-1].filename.replace("\\", "/") if frames else ""
    return any(f"/{host}/" in places for host in _HOSTS)


def one_line(error: BaseException) -> str:
    """An error's message without line breaks; indented lines, which are items of a list, are set apart."""
    text = ""
    for line in str(error).splitlines():
        apart = "; " if line[:1].isspace() and text and not text.endswith((":", ";", ",")) else " "
        text = f"{text}{apart}{' '.join(line.split())}" if line.strip() else text
    return text.strip() or type(error).__name__


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _write(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes that torchrun started, one speaks
        print(text.rstrip("\n"))


@contextlib.contextmanager
def _quiet_unless(debug: bool) -> Iterator[None]:
    """Logs of errors only and no warnings; with ``debug`` everything is shown."""
    environment = {} if debug else dict(_QUIET)
    before = {name: os.environ.get(name) for name in environment}
    levels = {name: logging.getLogger(name).level for name in ("optimum_segquant", "modelopt_ext")}
    os.environ.update({name: value for name, value in environment.items() if before[name] is None})
    if debug:
        logging.basicConfig(stream=sys.stderr, format="%(name)s: %(message)s")
    for name in levels:
        logging.getLogger(name).setLevel(logging.INFO if debug else logging.ERROR)
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
