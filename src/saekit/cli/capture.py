"""``saekit capture``: activations of a language model into a cache on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from ..errors import ConfigError
from ..rows.settings import CaptureSettings
from .command import Setting, command
from .console import print_facts, print_json, progress_of, tell
from .options import Data, Hook, Images, Json, Layer, Layers, Model, Out, Text, Tokens
from .settings import layers_of, required

if TYPE_CHECKING:
    from ..rows.source import Source

HELP = """Run a language model over texts and store its activations at one module as rows.

\b
  saekit capture --model builtin --data builtin --layer 2 --tokens 200000 --out rows
  saekit capture --model gpt2 --data texts.jsonl.gz --text body --hook h.6.mlp --out rows
  saekit capture --model builtin --data builtin --layer 2 --out rows --set dtype="float32" --set context=256
  saekit capture --model builtin --data builtin --layers 1,2,3 --out rows      one folder for each layer
  saekit capture --model M --data chats.jsonl --text messages --roles assistant --layer 4 --out rows
  saekit capture --model vit --images photos --layer 6 --out rows        one row per patch, or per image token

An interrupted capture continues where it stopped when it is called again.
"""


@command(
    "Activations of a language model as rows on disk.", HELP, flags=("device", "roles", "chat_template"), ranked=True
)
def capture(
    *,
    model: Model | None = None,
    data: Data | None = None,
    images: Images | None = None,
    layer: Layer | None = None,
    layers: Layers | None = None,
    hook: Hook | None = None,
    tokens: Tokens | None = None,
    text: Text | None = None,
    image: Annotated[str | None, Setting("With --images: name of the image column [the only one].")] = None,
    limit: Annotated[int | None, Setting("With --images: maximum number of images [all].")] = None,
    settings: CaptureSettings,
    out: Out | None = None,
    json: Json = False,
) -> None:
    """Capture rows into a folder."""
    from ..inputs.images import read_images
    from ..models.loading import load_model
    from ..ranks import is_first_rank
    from ..rows.capture import capture as run

    given = {"model": model, "data": data, "images": images, "out": out}
    required(given, "model", "data" if images is None else "images", "out")
    for option, value in {"--data": data, "--tokens": tokens, "--text": text}.items():
        if images is not None and value is not None:
            raise ConfigError(f"{option} is for texts; --images is given. Leave one of them out.")
    for option, value in {"image": image, "limit": limit}.items():
        if images is None and value is not None:
            raise ConfigError(f"`{option}` is for images; --images is not given. Leave it out.")
    if [layer, layers, hook].count(None) != 2:
        raise ConfigError(
            "exactly one of --layer, --layers and --hook must be given: where in the model the rows come from."
        )
    place: Any = layer if layers is None else layers_of(layers)
    assert model is not None
    with progress_of(json) as progress:
        loaded = load_model(model, vision=images is not None, **settings.placement)
        source: Any = data if images is None else read_images(images, image=image, split=settings.split, limit=limit)
        rows: Source | dict[str, Source] = run(
            loaded,
            source,
            layer=place,
            hook=hook,
            tokens=tokens,
            text="text" if text is None else text,
            out=out,
            settings=settings,
            progress=progress,
        )
    if not is_first_rank():
        return
    facts: dict[str, Any] = {"out": str(out)}
    for name, each in (rows if isinstance(rows, dict) else {"": rows}).items():
        facts |= {name: summary(each)} if name else summary(each)
    if json:
        print_json(facts)
    else:
        print_facts(facts)
        first = f"{out}/{next(iter(rows))}" if isinstance(rows, dict) else out
        tell(f"\nTrain on them: saekit train --rows {first} --arch topk --latents 1024 --k 16 --out run")


def summary(rows: Source) -> dict[str, Any]:
    """Return what is told about a source of rows."""
    info = {name: value for name, value in rows.info.items() if name not in ("n_rows", "d_in")}
    return {"n_rows": rows.n_rows, "d_in": rows.d_in, **info}
