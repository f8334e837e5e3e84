"""Arms of a classification: what stands between texts or images and a classifier, and which arms there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError, did_you_mean, listed, nearest
from ..measure.weight_scores import WEIGHT_SCORES, weight_scores
from ..rows.pooling import DENSE_POOLS
from ..sae.model import SAE
from .probes import PROBES
from .settings import KINDS, ClassifierSettings

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("floor", "words", "dense", "reduced", "control", "sae")

VOTERS = 4
"""Number of arms that may vote together at most in the search of a family."""

PIXEL_COMPONENTS = 64
"""Principal components of the pixels in the arm of pixels."""


@dataclass(frozen=True)
class Arm:
    """One way to classify.

    Parameters
    ----------
    name
        Unique among arms; what tables call it.
    kind
        One of `KINDS`.
    features
        Name of the matrix that it reads; ``texts`` for the texts themselves.
    probe
        Name of one of `saekit.classification.probes.PROBES`.
    steps
        What stands before the probe, in order: ``words``, ``binarize``, ``select``, ``match``, ``pca``, ``svd``,
        ``ica``, ``means``.
    k
        Latents or components kept; None for all.
    by
        How ``select`` ranks latents: a name that `SelectLatents` takes, or what `scores` are.
    scores
        One number per latent that was computed elsewhere (stability, importance), the highest are kept; None: rank by
        the labels.
    source, pool
        The SAE (or ``dense``) and the pooling behind the matrix.
    about
        What else tables say about it: layer, latents, ...
    candidates
        Arms that a search chooses from, within the training rows; empty for others.
    voters
        Number of them that may vote together.
    """

    name: str
    kind: str
    features: str = ""
    probe: str = "logistic"
    steps: tuple[str, ...] = ()
    k: int | None = None
    by: str = "mean_difference"
    source: str = ""
    pool: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    scores: tuple[float, ...] | None = field(default=None, repr=False)
    candidates: tuple[Arm, ...] = field(default=(), repr=False)
    voters: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"an arm must be of a known kind; got `{self.kind}`. {did_you_mean(self.kind, KINDS)}")
        if self.probe not in PROBES and not self.candidates:
            raise ConfigError(f"`probe` must be one of {listed(PROBES, 12)}; got {self.probe!r}.")

    @property
    def family(self) -> str:
        """What it stands for: one of `FAMILIES`."""
        return _FAMILY[self.base_kind]

    @property
    def base_kind(self) -> str:
        """Its kind; of a search that of what it searches."""
        return self.candidates[0].kind if self.candidates else self.kind

    @property
    def representation(self) -> tuple[Any, ...]:
        """What stands before the probe."""
        return self.features, self.steps, self.k

    def candidate(self, name: str) -> Arm:
        """Return the candidate of that name."""
        return next(each for each in self.candidates if each.name == name)

    def to_json(self) -> dict[str, Any]:
        """Return everything that its result depends on, besides data and budget."""
        plain = asdict(self)
        for name in ("scores", "voters"):  # arms without them are what they were
            if not plain[name]:
                del plain[name]
        candidates = [each.to_json() for each in self.candidates]
        return {**plain, "steps": list(self.steps), "about": dict(self.about), "candidates": candidates}


_FAMILY = {
    "majority": "floor", "words": "words", "pixels": "words", "last": "dense", "dense": "dense", "dense-tree": "dense",
    "difference": "reduced", "pca": "reduced", "svd": "reduced", "ica": "reduced", "random": "control",
    "untrained": "control", "frozen": "control", "matched": "control",
    "full": "sae", "binarized": "sae", "sparse": "sae", "tree": "sae", "binarized-tree": "sae",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a matrix comes from: hidden states, an SAE, or a dictionary made as its control."""

    name: str
    kind: str
    """dense, sae, frozen, random or untrained."""
    hook: str
    sae: SAE | None
    """The SAE; of a control, the one that it is made like."""
    recipe: str
    """Digest of the SAE, and what is made of it."""
    about: dict[str, Any]

    @property
    def role(self) -> str:
        """What its arms are for: dense, sae or control."""
        return self.kind if self.kind in ("dense", "sae") else "control"


def arms_of(
    origins: Sequence[Origin], kinds: Sequence[str], pools: Sequence[str], settings: ClassifierSettings
) -> list[Arm]:
    """Return all arms of these kinds, in the order of tables.

    Parameters
    ----------
    origins
        Where matrices come from.
    kinds
        Names in `KINDS`.
    pools
        Poolings of the codes; hidden states have the mean instead of those that they lack.
    settings
        Numbers of latents and their ranking.
    """
    words = Arm("TF-IDF", "words", features="texts", steps=("words",), source="words")
    pixels = Arm("pixels", "pixels", features="pixels", steps=("pca",), k=PIXEL_COMPONENTS, source="pixels")
    found = [Arm("majority", "majority", features="none", probe="majority"), words, pixels]
    ngrams = [replace(words, name=step, steps=(step,)) for step in ("words", "characters")]
    found += [_search("TF-IDF", ngrams, settings), _search("pixels", [pixels], settings)]
    many = sum(origin.kind == "sae" for origin in origins) > 1
    for role in ("dense", "control", "sae"):
        for origin in (origin for origin in origins if origin.role == role):
            label = origin.name if many else "SAE"
            found += _OF_ROLE[role](origin, label, pools, settings)
    return [arm for arm in found if arm.kind in kinds]


def _search(name: str, representations: Sequence[Arm], settings: ClassifierSettings) -> Arm:
    """Return the arm that is searched among representations, each with every probe."""
    candidates = tuple(
        replace(each, name=f"{each.name}, {probe}", probe=probe)
        for each in representations
        for probe in settings.probes
    )
    first = representations[0]
    return Arm(
        f"strongest {name}", "strongest", probe="search", source=first.source, about=first.about,
        candidates=candidates, voters=VOTERS,
    )  # fmt: skip


def _pooled(origin: Origin, kind: str, settings: ClassifierSettings) -> list[Arm]:
    """Return an origin under every pooling that is searched."""
    return [_at(origin, pool, pool, kind) for pool in settings.search_pools]


def dense_pools(pools: Sequence[str]) -> tuple[str, ...]:
    """Return the poolings of hidden states that poolings of codes are compared with; counts with the mean."""
    return tuple(dict.fromkeys(pool if pool in DENSE_POOLS else "mean" for pool in pools))


def _at(origin: Origin, pool: str, name: str, kind: str) -> Arm:
    return Arm(name, kind, f"{origin.name}|{pool}", source=origin.name, pool=pool, about=origin.about)


def _dense_arms(origin: Origin, label: str, pools: Sequence[str], settings: ClassifierSettings) -> Iterator[Arm]:
    twins = dense_pools(pools)
    if "last" not in twins:
        yield _at(origin, "last", f"{origin.name} last", "last")
    for pool in twins:
        full = _at(origin, pool, f"{origin.name} {pool}", "last" if pool == "last" else "dense")
        yield full
        yield replace(full, name=f"{full.name} tree", kind="dense-tree", probe="tree")
        yield replace(full, name=f"{full.name} class means", kind="difference", steps=("means",))
    first = _at(origin, twins[0], f"{origin.name} {twins[0]}", "dense")  # one pooling for the reduced arms: the first
    for k in settings.ks:
        yield replace(first, name=f"{first.name} PCA {k}", kind="pca", steps=("pca",), k=k)
    for k in settings.control_ks:
        yield replace(first, name=f"{first.name} SVD {k}", kind="svd", steps=("svd",), k=k)
        yield replace(first, name=f"{first.name} ICA {k}", kind="ica", steps=("ica",), k=k)
    pooled = _pooled(origin, "dense", settings)
    yield _search(origin.name, pooled, settings)
    components = [
        replace(each, name=f"{each.name} PCA {k}", kind="pca", steps=("pca",), k=k)
        for each in pooled
        for k in sorted({max(settings.control_ks), max(settings.ks)})
    ]
    yield _search(f"{origin.name} PCA", components, settings)


def _control_arms(origin: Origin, label: str, pools: Sequence[str], settings: ClassifierSettings) -> Iterator[Arm]:
    ranking = ranking_of(settings.select_by, origin)
    for pool in pools:
        full = _at(origin, pool, f"{origin.name} {pool}", origin.kind)
        yield full
        for k in settings.control_ks:
            yield replace(full, name=f"{full.name} k={k}", steps=("select",), k=k, **ranking)
    yield _search(origin.name, _pooled(origin, origin.kind, settings), settings)


def _sae_arms(origin: Origin, label: str, pools: Sequence[str], settings: ClassifierSettings) -> Iterator[Arm]:
    ranking = ranking_of(settings.select_by, origin)
    sparse = [k for k in settings.ks if origin.sae is not None and k < origin.sae.n_latents]
    for pool in pools:
        full = _at(origin, pool, f"{label} {pool}", "full")
        name = full.name
        for k in (k for k in settings.control_ks if k in sparse):
            yield replace(full, name=f"{name} matched k={k}", kind="matched", steps=("match",), k=k, **ranking)
        for k in sparse:
            yield replace(full, name=f"{name} k={k}", kind="sparse", steps=("select",), k=k, **ranking)
        yield replace(full, name=f"{name} tree", kind="tree", probe="tree")
        yield replace(full, name=f"{name} binarized tree", kind="binarized-tree", steps=("binarize",), probe="tree")
        yield replace(full, name=f"{name} binarized", kind="binarized", steps=("binarize",))
        yield full
    yield _search(label, _pooled(origin, "full", settings), settings)


_OF_ROLE = {"dense": _dense_arms, "control": _control_arms, "sae": _sae_arms}


def check_ranking(by: str, origins: Sequence[Origin]) -> None:
    """Refuse a ranking of latents that is neither known nor stored with every SAE.

    Raises
    ------
    ConfigError
        With what is stored.
    """
    from ..estimators.select import SCORES

    if by in SCORES:
        return
    for origin in origins:
        stored = list(origin.sae.scores) if origin.sae is not None else []
        if origin.kind == "sae" and (origin.sae is None or by not in _scores_of(origin.sae)):
            there = f"are stored {listed(stored, 12)}" if stored else "none are stored"
            raise ConfigError(
                f"classify: `select_by` must be one of {listed([*SCORES, *WEIGHT_SCORES], 12)}, or numbers stored "
                f"with every SAE; got `{by}`, and with `{origin.name}` {there}."
                f"{nearest(by, [*SCORES, *WEIGHT_SCORES, *stored])}"
            )


def _scores_of(sae: SAE) -> dict[str, Tensor]:
    """Return what is known about the latents of an SAE before any text is read: stored scores, those of its weights."""
    return {**sae.scores, **weight_scores(sae)}


def ranking_of(by: str, origin: Origin) -> dict[str, Any]:
    """Return how the latents of an origin are ranked: by name, and by what is stored with its SAE."""
    from ..estimators.select import SCORES

    if by in SCORES:
        return {"by": by}
    known = _scores_of(origin.sae) if origin.sae is not None and origin.kind in ("sae", "frozen") else {}
    if by not in known:
        return {"by": "mean_difference"}
    stored = known[by].double().cpu().numpy()
    lowest = np.nanmin(stored, initial=0.0) - 1  # latents without a number, dead ones, come last
    return {"by": by, "scores": tuple(np.where(np.isfinite(stored), stored, lowest).tolist())}
