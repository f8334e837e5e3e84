"""``saekit report``: the results of a folder as one page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import FormatError
from .command import command
from .console import print_json, progress_of, say
from .options import Json

HELP = """Write DIR/report.html from the results in DIR: evaluations, training logs. One file, readable offline.

A file that cannot be read is left out and named, on the page and here; the exit status is then 1.

\b
  saekit report demo
"""


@command("One HTML page from a folder of results.", HELP)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with results (*.json, log.jsonl).")],
    *,
    title: Annotated[str, typer.Option("--title", help="Heading of the page [saekit report].")] = "saekit report",
    json: Json = False,
) -> None:
    """Collect the results of a folder and write the page."""
    from ..report.page import write
    from ..report.results_folder import collect

    with progress_of(json):
        found = collect(folder)
        page = write(found.shown, folder, title=title, date=found.date, unread=found.unread)
    if json:
        unread = [asdict(each) for each in found.unread]
        print_json({"report": str(page), "results": [each["kind"] for each in found.results], "unread": unread})
    else:
        say(str(page))
    if found.unread:
        raise FormatError(found.told(page))
