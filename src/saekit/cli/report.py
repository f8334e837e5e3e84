"""``saekit report``: the results of a folder as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .command import command
from .console import print_json, progress_of, say
from .options import Json

HELP = """Write DIR/report.html from the results in DIR: evaluations, training logs. One file, readable offline.

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
    from ..report.results_folder import collect, date_of

    with progress_of(json):
        results = collect(folder)
        page = write(results, folder, title=title, date=date_of(folder))
    if json:
        print_json({"report": str(page), "results": [result["kind"] for result in results]})
    else:
        say(str(page))
