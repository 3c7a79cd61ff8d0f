"""The command line: each command is one function of a few lines on medseg's public names.

Results go to stdout, progress and messages to stderr. Exit code 0 is success, 1 bad input (one line says what, and
``--debug`` shows the traceback), 2 bad usage, 130 Ctrl-C.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import tyro
from pydantic import ValidationError
from tyro.conf import FlagCreatePairsOff

import medseg
from medseg.cli.contour import contour
from medseg.cli.data import check, convert, info, plan
from medseg.cli.masks import evaluate
from medseg.cli.models import demo, predict, train
from medseg.cli.refine import refine
from medseg.cli.show import say, show_warning
from medseg.config import explained

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (demo, info, convert, check, plan, train, predict, contour, refine, evaluate)
}


def main() -> None:
    """Entry point of the command ``medseg``."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if arguments == ["--version"]:
        print(f"medseg {medseg.__version__}")
        return
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    alone = os.environ.get("RANK", "0") == "0"  # the first of several processes speaks for all
    logging.getLogger("medseg").setLevel(logging.INFO if alone else logging.ERROR)
    warnings.showwarning = show_warning  # type: ignore[assignment]
    try:
        try:
            code = tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="medseg", args=arguments, config=(FlagCreatePairsOff,),
                description="Medical image segmentation, from a scan to contours. --debug shows tracebacks; --version.",
            )  # fmt: skip
        finally:
            sys.stdout.flush()  # here, where a closed pipe is caught
    except KeyboardInterrupt:
        say("medseg: stopped")
        sys.exit(130)
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be flushed goes there
        sys.exit(1)
    except ValidationError as problem:
        say(f"medseg: error: {explained(problem)}")
        sys.exit(1)
    except Exception as problem:  # noqa: BLE001  the one place where an error becomes a line
        if debug:
            traceback.print_exc()
        expected = isinstance(problem, ValueError | TypeError | OSError)
        kind = "" if expected else f"{type(problem).__name__}: "
        say(f"medseg: error: {kind}{problem}")
        sys.exit(1)
    sys.exit(code or 0)
