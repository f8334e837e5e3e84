"""The application: its commands and its exit statuses.

Nothing heavy is imported here; a command imports what it needs when it runs, so that ``--help`` and tab completion
answer at once. Exit status: 0 done, 1 the work failed, 2 the call was wrong, 130 interrupted.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import CALL_ERRORS, PlaceWarning, SaekitError
from ..terminal import plain
from ..version import __version__
from .actions import actions
from .capture import capture
from .catalog import catalog
from .classify import classify, predict
from .command import Interrupted
from .compare import compare
from .console import say, tell
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .kernels import kernels
from .plan import plan
from .progressive import progressive
from .prune import prune
from .push import push
from .report import report
from .show import show
from .sources import sources
from .steer import steer
from .train import train
from .transfer import transfer
from .verify import verify
from .workers import CALL

HELP = """Sparse autoencoders from training to report.

\b
  saekit demo --out demo                                  everything once, offline, in minutes
  saekit capture --model M --data D --layer 2 --out rows  activations of a language model
  saekit train --rows rows --arch topk --latents 1024 --k 16 --out run
  saekit evaluate run --rows rows                         numbers compared with their baselines
  saekit compare run                                      latents that seeds share, compared with chance
  saekit report run                                       one HTML page

--model takes a folder, a hub name or `builtin`; --data a file, a hub data set (owner/name[:config][@split]) or
`builtin`. Each command explains itself: saekit train --help.
"""

_EPILOG = "Results go to stdout, progress to stderr. Exit status: 0 done, 1 the work failed, 2 the call was wrong."

app = typer.Typer(
    name="saekit",
    help=HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"saekit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (any command takes it).")
    ] = False,
) -> None:
    """Options of the program itself; `main` acts on --debug."""


COMMANDS = (
    capture, train, evaluate, compare, prune, progressive, classify, predict, transfer, actions, explain, show, steer,
    catalog, sources, verify, convert, push, plan, kernels, report, demo,
)  # fmt: skip
for _each in COMMANDS:
    app.command(_each.name, help=_each.help, short_help=_each.short_help, epilog=_each.epilog or None)(_each.callback)

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (``sys.argv`` by default) and leave with its exit status."""
    # This process is ours alone. Threads that spin while they wait make a machine with other work on it many times
    # slower (20 times, two threads on two busy cores); the variable is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends the process gets what Ctrl-C gets
    # What others print for us: warnings, records of the logs of libraries, the traceback of --debug.
    warnings.formatwarning = lambda message, *_, **__: plain(f"warning: {message}", keep="\n\t") + "\n"
    logging.setLogRecordFactory(_plain_record)
    sys.excepthook = lambda *error: tell("".join(traceback.format_exception(*error)).rstrip())
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def _plain_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    record.msg, record.args = plain(record.getMessage(), keep="\n\t"), ()
    return record


@functools.cache
def _program() -> Any:
    """Return all commands as typer parses them; making them takes longer than most of them need."""
    return typer.main.get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status; errors are told on stderr, in one block."""
    debug = "--debug" in arguments or bool(os.environ.get("SAEKIT_DEBUG"))
    rest = [argument for argument in arguments if argument != "--debug"]
    call = CALL.set(tuple(rest))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlaceWarning)  # the results that are printed hold them
            status = _program().main(args=rest, prog_name="saekit", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except BrokenPipeError:  # the reader of our output has gone, `saekit show … | head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (typer.Abort, KeyboardInterrupt, Interrupted) as error:
        tell(_interrupted(error, rest))
        return 130
    except _UsageError as error:
        shown = io.StringIO()
        error.show(shown)  # type: ignore[attr-defined]
        tell(shown.getvalue().rstrip())
        return 2
    except Exception as error:
        if debug:
            raise
        tell(f"error: {_message(error)}")
        return 2 if isinstance(error, CALL_ERRORS) else 1
    finally:
        CALL.reset(call)


def _interrupted(error: BaseException, arguments: Sequence[str]) -> str:
    """Return what to type after an interruption."""
    name = arguments[0] if arguments else ""
    keeps = name in _RESUMED and any(each.startswith(("--out", "--config")) for each in arguments)
    resume = ["--resume"] if name == "train" and "--resume" not in arguments else []
    said = str(error).partition(";")[0] or "interrupted"
    line = shlex.join(["saekit", *arguments, *resume])
    return f"{said}. {'To go on' if keeps else 'To begin again'}: {line}"


_RESUMED = ("train", "capture", "classify", "transfer")
"""Commands that go on where an interrupted call with the same folder stopped."""


def _message(error: Exception) -> str:
    if isinstance(error, SaekitError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        place = f"`{error.filename}`: " if error.filename else ""
        return f"{place}{error.strerror}. Nothing that was complete before is lost."
    return (
        f"{type(error).__name__}: {error}\nUnexpected error, probably a bug in saekit. Add --debug for the traceback."
    )
