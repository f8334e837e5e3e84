"""``saekit compare``: which latents SAEs share, matched exactly, compared with chance."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..comparison.settings import ComparisonSettings, FunctionSettings
from ..errors import ConfigError, DataError, FormatError
from ..files import remove_file
from ..rows.origin import OriginSettings
from ..settings import Progress
from .command import Table, command
from .completion import saes
from .console import print_comparison, print_json, print_orphans, progress_of, tell
from .options import Data, Json, Model, Out, Rows

if TYPE_CHECKING:
    from pathlib import Path

    from ..comparison.orphans_result import Orphans
    from ..comparison.result import Comparison
    from ..rows.origin import Origin

HELP = """Match the latents of SAEs one to one and count those that they share, compared with random dictionaries.

\b
  saekit compare run/topk-1024-k16-seed0 run/topk-1024-k16-seed1
  saekit compare run --rows rows --out run       all SAEs of a run, also by their activations
  saekit compare A B C --threshold 0.8 --json
  saekit compare run --write                     each latent's stability into the SAE files: prune --by stability
  saekit compare run --model builtin --data builtin --orphans --out run
  saekit compare run --along                     and what snapshots shared (train with --snapshots 4)

Decoders and encoders are matched independently, each to the largest possible sum of cosines, with a proof. A latent is
shared when both give it the same partner and both cosines exceed the threshold. With --out the numbers go to
OUT/comparison.json, with each latent's stability, and figures next to it. With --rows or --model it is also tested
whether partners do the same, against exchanged partners: reconstruct from each other's directions, fire together and on
the same rows; with --model, change the next-token distribution alike when they are ablated. --orphans also measures, on
the rows, the latents that no other SAE has: how often they fire, what they carry, what they respond to.
"""


@command(
    "Which latents SAEs share, compared with chance.",
    HELP,
    flags=("threshold", "strict", "controls"),
    named={"strict": "--strict/--not-strict"},
)
def compare(
    sae: Annotated[
        list[str],
        typer.Argument(metavar="SAE SAE...", help="SAEs: folders, runs, hf:owner/name/folder.", autocompletion=saes),
    ],
    *,
    settings: ComparisonSettings,
    function: Annotated[FunctionSettings, Table()],
    write: Annotated[bool, typer.Option("--write", help="Write each latent's stability into the SAE files.")] = False,
    along: Annotated[
        bool, typer.Option("--along", help="Compare the snapshots of the run, too: does what is shared still rise?")
    ] = False,
    orphans: Annotated[
        bool, typer.Option("--orphans", help="Measure the latents that no other SAE has; needs rows or a model.")
    ] = False,
    rows: Rows | None = None,
    model: Model | None = None,
    data: Data | None = None,
    origin: OriginSettings,
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Compare SAEs with each other."""
    from ..comparison.along import along as with_snapshots
    from ..comparison.along import snapshots_of
    from ..comparison.run import compare as run
    from ..places import Warned
    from ..rows.origin import find_rows, refuse_unread
    from ..sae.model import SAE
    from ..store.address import sae_paths

    paths = sae_paths(sae)
    if len(paths) < 2:
        raise ConfigError(
            f"at least two SAEs must be given; got `{paths[0]}` alone. Name another, or a run with several, trained "
            "with --seeds 0,1 say."
        )
    measures = rows is not None or model is not None or orphans
    if not measures:
        refuse_unread(model, data, "compare")
    if along:
        snapshots_of(paths)  # before what takes long
    if function.text == FunctionSettings().text:
        function = replace(function, text=origin.text)
    with progress_of(json) as progress:
        found, lonely = None, None
        if measures:
            found = find_rows(
                SAE.load(paths[0]), rows, model=model, data=data, path=paths[0], settings=origin, progress=progress
            )
        result = run(
            paths,
            None if found is None else found.rows,
            write=write,
            **_model_of(found),
            settings=settings,
            function=function,
            progress=progress,
        )
        if along:
            result = with_snapshots(paths, result, settings=settings, progress=progress)
        if orphans and found is not None:
            measured = _orphans(paths, found, result, origin.text, progress)
            if isinstance(measured, str):
                result = replace(result, warnings=[*result.warnings, Warned("orphans_not_measured", measured)])
            else:
                lonely = measured
    if out is not None:
        from ..report.comparison import write_figures

        result.save(out / "comparison.json")
        write_figures(result.to_json(), out)
        if lonely is not None:
            lonely.save(out / "orphans.json")
        else:
            _forget_orphans(out / "orphans.json", result)
    if json:
        print_json(result.to_json())
        return
    print_comparison(result)
    if lonely is not None:
        print_orphans(lonely)
    if write:
        tell("wrote each latent's stability into the SAEs; `saekit prune SAE --by stability` ranks by it")
    if out is not None:
        tell(f"wrote {out}/comparison.json and figures; `saekit report {out}` makes a page of them")


def _model_of(found: Origin | None) -> dict[str, Any]:
    """Return the model and the texts in which partners are tested, where the model predicts tokens."""
    if found is None or found.model is None or not found.model.is_causal:
        return {}
    return {"model": found.model, "data": found.data}


def _forget_orphans(path: Path, result: Comparison) -> None:
    """Remove what an earlier call measured of other SAEs, which the page would show beside this comparison."""
    from ..comparison.orphans_result import Orphans

    try:
        digests = Orphans.load(path).digests
    except (FormatError, OSError):
        return  # none, or a file that is not ours
    if digests != [each.sae["digest"] for each in result.saes]:
        remove_file(path)
        tell(f"removed {path}, which was measured on other SAEs; --orphans measures these")


def _orphans(paths: list[str], origin: Origin, comparison: Comparison, text: str, progress: Progress) -> Orphans | str:
    """Measure orphans; where the SAEs share nothing or everything, return why not."""
    from ..comparison.orphans import orphans
    from ..comparison.settings import OrphanSettings

    settings = OrphanSettings(text=text)
    if origin.model is not None:
        settings = replace(settings, tokens=origin.ce_tokens)
    try:
        return orphans(
            paths,
            origin.rows,
            comparison=comparison,
            model=origin.model,
            data=origin.data,
            settings=settings,
            progress=progress,
        )
    except DataError as error:
        return str(error)
