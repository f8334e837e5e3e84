"""``saekit kernels check``: whether the compiled kernels are right and faster on this machine's own devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, did_you_mean
from .command import command
from .console import print_json, print_table, print_text, progress_of, say, tell
from .options import Json

if TYPE_CHECKING:
    from ..kernels.verdicts import Verdict

HELP = """Compare every kernel with a slow reference on the devices of this machine, time it, and keep the verdict.

\b
  saekit kernels check                     every GPU and the CPU, less than five minutes each
  saekit kernels check --device cuda:0
  saekit show --machine                    which kernels run here, and why

Until a GPU has been checked, it runs plain torch. From then on the Triton kernels run where they were right and at no
size slower, until device, libraries, torch, Triton or saekit change. The verdict lies in kernels/ of $SAEKIT_CACHE
[~/.cache/saekit]; delete the file to forget it. SAEKIT_KERNELS=fast or plain overrules it. Exit status 1: a kernel is
not right here, and plain torch runs instead.
"""

ACTIONS = ("check",)


@command("Proof of the kernels on this machine.", HELP)
def kernels(
    action: Annotated[str, typer.Argument(metavar="check", help="What to do.")],
    *,
    device: Annotated[
        str | None, typer.Option("--device", metavar="D", help="`cuda`, `cuda:1`, `mps` or `cpu` [all that are here].")
    ] = None,
    json: Json = False,
) -> None:
    """Check the kernels and print the verdicts."""
    if action not in ACTIONS:
        raise ConfigError(f"kernels: the action must be `check`; got `{action}`. {did_you_mean(action, ACTIONS)}")
    from ..files import cache_folder
    from ..kernels import verdicts
    from ..training.kernel_check import check_kernels

    with progress_of(json) as progress:
        found = check_kernels(device, progress=progress)
    if json:
        files = {name: str(verdicts.path_of(each.device)) for name, each in found.items()}
        print_json({"devices": {name: {**each.to_json(), "file": files[name]} for name, each in found.items()}})
    else:
        for name, verdict in found.items():
            _print(name, verdict)
        if device is None and not any(each.device["kind"] != "cpu" for each in found.values()):
            print_text("There is no GPU that torch can use here: only the kernels of the CPU were checked.")
        tell(f"verdicts are in {cache_folder() / verdicts.FOLDER}")
    if any(each.failed for each in found.values()):
        raise typer.Exit(1)


def _print(name: str, verdict: Verdict) -> None:
    n = len(verdict.checks)
    say(f"{name} ({verdict.device['name']}): {n - len(verdict.failed)} of {n} comparisons passed")
    for wrong in verdict.failed:
        print_text(f"  wrong: {wrong.name}: {wrong.detail}")
    if verdict.note:
        say(f"  {verdict.note}")
    if verdict.timings:
        lines = [["", "size", "plain ms", "fast ms", "times as fast"]]
        for each in verdict.timings:
            fast = ["–", "–"] if each.fast is None else [f"{1e3 * each.fast:.3g}", f"{each.ratio:.2f}"]
            lines.append([each.work, each.size, f"{1e3 * each.plain:.3g}", *fast])
        print_table(lines)
    paths = ", ".join(f"{work} {'fast' if work in verdict.fast else 'plain'}" for work in ("encode", "step"))
    say(f"  `auto` runs from now on: {paths}\n")
