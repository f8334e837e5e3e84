"""The matrices that arms read: codes and hidden states of one pass of the model, pixels, and controls of the SAEs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, InputError, ShapeError, listed
from ..inputs.images import Images
from ..inputs.labelled import Labelled
from ..measure.controls import untrained_like
from ..models.deferred import defer_model
from ..models.language import LanguageModel
from ..models.loading import load_language_model, load_vision_model
from ..models.vision import VisionModel
from ..places import Warned, warnings_on
from ..provenance import place_of
from ..rows.capture import capture
from ..rows.capture_images import pool_images
from ..rows.first_use import warnings_on_first_use
from ..rows.pooling import Ask, place_of_pooling, pool_texts
from ..rows.settings import PoolingSettings
from ..rows.tokens import tokenize
from ..sae.model import SAE
from ..sae.rules import TopKRule
from ..settings import Progress
from .arms import Arm, Origin

SAMPLE_TOKENS = 4096
"""Tokens of training texts that the random and untrained dictionaries are centred on."""

SAMPLE_IMAGES = 64
"""Training images that they are centred on."""

PIXEL_SIDE = 16
"""Images are made grey and at most this wide and high for the arm of pixels."""

Named = Sequence[tuple[str, SAE]]
ModelLike = str | os.PathLike[str] | LanguageModel | VisionModel
View = Callable[[Arm, int, int], Any]
"""``view(arm, i, j)``: rows of value j as a classifier of value i reads them, a matrix with every row of the data."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A model and the labelled texts or images that it reads."""

    model: ModelLike
    data: Labelled
    max_tokens: int | None = None
    prompt: str | None = None
    cache: Path | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Name and digest of the model."""
        if self.data.images is not None or isinstance(self.model, VisionModel):
            vision: Any = load_vision_model(self.model)  # type: ignore[arg-type]
            return {"name": vision.name, "digest": vision.digest}
        origin = defer_model(self.model)
        named = isinstance(self.model, LanguageModel)
        name = self.model.name if named else os.path.basename(os.fspath(self.model).rstrip("/"))  # type: ignore
        return {"name": name, "digest": origin.digest}

    def place(self) -> dict[str, Any]:
        """Return what is known of the rows that SAEs are put onto, but for the hook, as the `info` of rows."""
        if self.data.images is None and not isinstance(self.model, VisionModel):
            return place_of_pooling(defer_model(self.model))
        vision: Any = load_vision_model(self.model)  # type: ignore[arg-type]
        return {**vision.info, "filters": {"special": {"skipped": True}, "outliers": None}}

    def load(self) -> Any:
        """Return the loaded model."""
        if self.data.images is not None:
            return load_vision_model(self.model)  # type: ignore[arg-type]
        return load_language_model(self.model)  # type: ignore[arg-type]

    def pool(self, asks: Sequence[Ask], progress: Progress) -> list[dict[str, Any]]:
        """Return what is asked for, one row per text or image."""
        images = self.data.images
        if images is not None:
            how = PoolingSettings(prompt=self.prompt)
            return pool_images(self.load(), images, asks, settings=how, progress=progress)
        return pool_texts(
            self.load(), self.data.texts, asks, max_tokens=self.max_tokens, cache=self.cache, progress=progress
        )

    def sample(self, train: np.ndarray, hook: str, seed: int) -> torch.Tensor:
        """Return activations of some training rows."""
        order = train[np.argsort(np.random.Generator(np.random.PCG64([seed, 5])).random(len(train)))]
        if self.data.images is not None:
            rows = capture(self.load(), self.data.images.pick(order[:SAMPLE_IMAGES]), hook=hook)
        else:
            texts = [self.data.texts[row] for row in order[:SAMPLE_TOKENS]]
            rows = capture(self.load(), texts, hook=hook, tokens=SAMPLE_TOKENS)
        return next(iter(rows.batches(SAMPLE_TOKENS))).x

    def check(self) -> None:
        """Refuse texts without tokens before the model runs."""
        if self.data.images is not None:
            return
        lm = self.load()
        contexts = tokenize(lm.tokenizer, list(self.data.texts), context=lm.context)
        counts = np.bincount(contexts.document[contexts.position >= 0], minlength=len(self.data))
        without = np.flatnonzero(counts == 0)
        if len(without):
            shown = listed([repr(self.data.texts[int(row)])[:40] for row in without], 3)
            raise InputError(
                f"every text must have at least one token of `{lm.name}`; {len(without)} have none: {shown}. Remove "
                "them."
            )


def origins_of(
    named: Named, kinds: Sequence[str], seed: int, *, layer: int | None = None, hook: str | None = None
) -> dict[str, Origin]:
    """Return the hidden states of every hook, the SAEs, and their random and untrained controls.

    Raises
    ------
    ConfigError
        Nothing says where an SAE belongs, or all SAEs are controls.
    """
    at = {name: place_of(sae, layer=layer, hook=hook, where="classify", name=f"`{name}`") for name, sae in named}
    if not named and (layer is not None or hook is not None or {"dense", "last", "strongest"} & set(kinds)):
        at = {"": place_of(layer=layer, hook=hook, where="classify")}
    found = _dense_origins(list(dict.fromkeys(at.values())))
    for name, sae in named:
        found += _sae_origins(name, sae, at[name], kinds, seed, is_single=len(named) == 1)
    if named and "sae" not in {origin.kind for origin in found}:
        raise ConfigError("classify: at least one SAE that is no control must be given; got none.")
    return {origin.name: origin for origin in found}


def _dense_origins(hooks: Sequence[str]) -> list[Origin]:
    names = ["dense"] if len(hooks) == 1 else [f"dense {hook}" for hook in hooks]
    return [Origin(name, "dense", hook, None, "states", {"hook": hook}) for name, hook in zip(names, hooks)]


def _sae_origins(name: str, sae: SAE, hook: str, kinds: Sequence[str], seed: int, *, is_single: bool) -> list[Origin]:
    """Return an SAE and its twins that learned nothing, or a frozen SAE, which is a control itself."""
    control = _control_of(sae)
    about = {"hook": hook, "n_latents": sae.n_latents, "rule": sae.rule.name, "sae": name}
    own = Origin(name, "sae", hook, sae, sae.digest(), {**about, **({"control": control} if control else {})})
    if control.startswith("frozen"):
        return [replace(own, kind="frozen")] if {"frozen", "strongest"} & set(kinds) else []
    twins = [twin for twin in ("random", "untrained") if {twin, "strongest"} & set(kinds)]
    labels = twins if is_single else [f"{twin} {name}" for twin in twins]
    return [
        own,
        *(
            replace(own, name=label, kind=twin, recipe=f"{twin} {own.recipe} {seed}", about=about)
            for label, twin in zip(labels, twins)
        ),
    ]


def _control_of(sae: SAE) -> str:
    """Return the control that an SAE was trained as (``frozen-decoder``, say), or an empty text."""
    config = sae.provenance.get("config")
    return str(config.get("control") or "") if isinstance(config, dict) else ""


def place_warnings(reader: Reader, origins: Iterable[Origin]) -> list[Warned]:
    """Return what is not as in training about the rows that SAEs are put onto."""
    by_hook: dict[str, list[tuple[str, SAE]]] = {}
    for origin in origins:
        if origin.sae is not None and origin.kind in ("sae", "frozen"):
            by_hook.setdefault(origin.hook, []).append((origin.name, origin.sae))
    return [each for hook, named in by_hook.items() for each in warnings_at(reader, hook, named)]


def warnings_at(reader: Reader, hook: str, named: Named) -> list[Warned]:
    """Return what is not as in training about the rows that SAEs of one hook are put onto."""
    seen = {**reader.place(), "hook": hook}
    every = np.arange(len(reader.data))
    found = warnings_on(named, seen, what="the model given makes")
    return found + warnings_on_first_use(named, lambda: reader.sample(every, hook, 0), seen)


def read_features(
    reader: Reader, origins: dict[str, Origin], arms: Sequence[Arm], seed: int, progress: Progress
) -> View:
    """Compute every matrix that the arms read, from one pass of the model.

    Raises
    ------
    DataError
        A text without tokens, activations that are NaN.
    ShapeError
        An SAE for rows of another width.
    """
    data = reader.data
    X: dict[str, Any] = {"texts": data.texts, "none": np.zeros((len(data), 1), np.float32)}
    leaves = [leaf for arm in arms for leaf in (arm.candidates or (arm,))]
    if data.images is not None and any(arm.features == "pixels" for arm in leaves):
        X["pixels"] = grey_pixels(data.images)
    wanted: dict[str, dict[str, None]] = {}  # poolings of each origin, in the order of the arms
    for arm in leaves:
        if arm.source in origins:
            wanted.setdefault(arm.source, {}).update(dict.fromkeys(arm.pool.split("+")))
    if wanted:
        X |= _of_model(reader, [(origins[name], tuple(pools)) for name, pools in wanted.items()], seed, progress)

    def view(arm: Arm, i: int, j: int) -> Any:
        if arm.candidates:
            return {each.features: view(each, i, j) for each in {c.features: c for c in arm.candidates}.values()}
        if arm.features not in X:
            return joined([X[f"{arm.source}|{pool}"] for pool in arm.pool.split("+")])
        return X[arm.features]

    return view


def joined(matrices: Sequence[Any]) -> Any:
    """Return matrices next to each other."""
    import scipy.sparse

    is_sparse = scipy.sparse.issparse(matrices[0])
    return scipy.sparse.hstack(matrices, format="csr") if is_sparse else np.concatenate(matrices, axis=1)


def _of_model(
    reader: Reader, wanted: Sequence[tuple[Origin, tuple[str, ...]]], seed: int, progress: Progress
) -> dict[str, Any]:
    """Return the matrices of these origins and poolings, from one pass of the model."""
    check_widths([(origin.name, origin.sae, origin.hook) for origin, _ in wanted if origin.sae], reader.load())
    reader.check()
    asks = [Ask(pools, sae=_dictionary(origin, reader, seed), hook=origin.hook) for origin, pools in wanted]
    return {
        f"{origin.name}|{pool}": matrix
        for (origin, _), matrices in zip(wanted, reader.pool(asks, progress))
        for pool, matrix in matrices.items()
    }


def check_widths(given: Sequence[tuple[str, SAE, str]], model: Any) -> None:
    """Refuse SAEs of another width before the model runs; hooks inside a block may have another width.

    Parameters
    ----------
    given
        Name, SAE and hook of each.
    model
        The loaded model.

    Raises
    ------
    ShapeError
        With both widths.
    """
    for name, sae, hook in given:
        if hook.startswith("layers.") and hook.count(".") == 1 and sae.d_in != model.d_model:
            raise ShapeError(
                f"`{name}` must be for rows of the model's width, {model.d_model}; it is for {sae.d_in}. Was it "
                f"trained on another model than `{model.name}`?"
            )


def _dictionary(origin: Origin, reader: Reader, seed: int) -> SAE | None:
    """Return the SAE of an origin: itself, or a dictionary of its shape that learned nothing."""
    sae = origin.sae
    if sae is None or origin.kind not in ("random", "untrained"):
        return sae
    rows = reader.sample(reader.data.parts[0][0], origin.hook, seed)
    with torch.no_grad():
        l0 = float(sae.encode(rows.to(sae.device, sae.dtype)).l0())
    if origin.kind == "untrained":
        return untrained_like(sae, rows.mean(0), rows, l0, seed)
    return random_projection(sae, max(1, round(l0)), seed)


def random_projection(sae: SAE, k: int, seed: int) -> SAE:
    """Return random unit directions with the k largest projections: no bias, no scaling, nothing learned.

    Projections are as signed as the codes of the SAE.

    Parameters
    ----------
    sae
        SAE whose width and number of latents to take.
    k
        Number of latents per row.
    seed
        Random seed of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    sign = sae.rule.sign if isinstance(sae.rule, TopKRule) else "positive"
    W = torch.randn(sae.n_latents, sae.d_in, generator=generator)
    W = (W / W.norm(dim=1, keepdim=True)).to(sae.device, sae.dtype)
    return SAE(
        W_enc=W, b_enc=torch.zeros_like(sae.b_enc), W_dec=W, b_dec=W.new_zeros(sae.d_in), rule=TopKRule(k, sign=sign),
        provenance={key: sae.provenance[key] for key in ("model", "hook", "layer") if key in sae.provenance},
    )  # fmt: skip


def grey_pixels(images: Images) -> np.ndarray:
    """Return grey pixels ``[n, side * side]``, shrunk to the same small square."""
    side = min(PIXEL_SIDE, max(images[0].size))
    return np.stack([np.asarray(image.convert("L").resize((side, side)), np.float32).ravel() / 255 for image in images])


def take(X: Any, rows: np.ndarray) -> Any:
    """Return some rows of a matrix or of texts; of each, where there are several by name."""
    if isinstance(X, dict):
        return {name: take(each, rows) for name, each in X.items()}
    return [X[row] for row in rows] if isinstance(X, tuple | list) else X[rows]
