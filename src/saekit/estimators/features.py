"""scikit-learn classes: features of an SAE, hidden states, binarization and selection of latents.

::

    clf = make_pipeline(SAEFeatures("builtin", sae, layer=2, pool="sum"), Binarize(1.0), LogisticRegression())
    clf.fit(texts, labels)

Constructor arguments are stored as they are and nothing is loaded before `fit` or `transform`. Cloning an estimator (as
every cross-validation does) shares the SAE and the model. In cross-validation give `cache=`: the model then runs once
over each text.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, validate_data

from ..errors import ConfigError, ModelError, ShapeError
from ..files import local_path
from ..settings import suggest_keywords

if TYPE_CHECKING:
    import scipy.sparse

    from ..models.language import LanguageModel
    from ..models.vision import VisionModel
    from ..rows.pooling import Ask
    from ..sae.model import SAE

TRUSTED = tuple(
    f"saekit.estimators.{module}{name}"
    for home, name in (
        ("binarize.", "Binarize"),
        ("features.", "HiddenStates"),
        ("features.", "SAEFeatures"),
        ("select.", "SelectLatents"),
    )
    for module in (home, "")  # files of 0.1 name the package
)
"""What `skops.io.loads` must be told to trust (``trusted=[...]``) to read these classes from a file."""


class _Features(TransformerMixin, BaseEstimator):
    """What both kinds of features have in common: settings checked early, states that can be stored."""

    def __init__(
        self,
        model: str | os.PathLike[str] | LanguageModel | VisionModel | None,
        *,
        layer: int | None = None,
        hook: str | None = None,
        pool: str = "mean",
        max_tokens: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        batch_tokens: int | None = None,
        skip_special: bool = True,
        empty: Literal["refuse", "zero"] = "refuse",
    ) -> None:
        self.model: Any = model  # of either kind: what `X` holds decides
        self.layer = layer
        self.hook = hook
        self.pool = pool
        self.max_tokens = max_tokens
        self.cache = cache
        self.batch_tokens = batch_tokens
        self.skip_special = skip_special
        self.empty = empty

    def fit(self, X: Any, y: Any = None) -> Any:
        """Check the settings and the kind of `X`; nothing is learned, `y` is not used, and the model does not run."""
        if self.model is None:
            X = validate_data(self, X, dtype=[np.float32, np.float64])
            self._check_width(X.shape[1])
            return self
        self._ask()
        if not _are_images(self.model, X):
            from ..models.deferred import defer_model
            from ..rows.pooling import check_texts

            check_texts(X)
            self.model_digest_ = defer_model(self.model).digest
        return self

    def _ask(self) -> Ask:
        raise NotImplementedError

    def _check_width(self, width: int) -> None:
        raise NotImplementedError

    def _pooled(self, X: Any) -> Any:
        """Return features of texts, images or rows."""
        ask = self._ask()
        if self.model is None:
            return self._pooled_rows(X, ask)
        from ..rows.settings import PoolingSettings

        if _are_images(self.model, X):
            from ..rows.capture_images import pool_images

            if self.cache is not None or self.max_tokens is not None:
                raise ConfigError(
                    "`cache` and `max_tokens` are for texts; images are neither kept nor cut. Leave them out."
                )
            reading = PoolingSettings(skip_special=self.skip_special, empty=self.empty)
            (found,) = pool_images(_loaded_vision(self.model), X, [ask], settings=reading)
        else:
            from ..rows.pooling import pool_texts

            self._check_model()
            if ask.sae is not None:
                self._check_first_use(X, ask.sae, ask.place)
            (found,) = pool_texts(
                self.model,
                X,
                [ask],
                max_tokens=self.max_tokens,
                cache=self.cache,
                settings=PoolingSettings(
                    batch_tokens=self.batch_tokens, skip_special=self.skip_special, empty=self.empty
                ),
            )
        return found[self.pool]

    def _check_first_use(self, texts: Any, sae: SAE, hook: str) -> None:
        """Warn where an SAE of another library does not do on these texts what its file states."""
        from ..models.deferred import defer_model
        from ..places import warn
        from ..rows.first_use import first_rows, warnings_on_first_use
        from ..rows.pooling import place_of_pooling
        from ..rows.settings import StreamSettings
        from ..rows.stream import stream
        from ..sae.naming import name_of

        def rows() -> Any:
            return first_rows(stream(self.model, list(texts), hook=hook, settings=StreamSettings(outliers=None)))

        seen = {**place_of_pooling(defer_model(self.model)), "hook": hook}
        warn(warnings_on_first_use([(name_of(sae), sae)], rows, seen))

    def _pooled_rows(self, X: Any, ask: Ask) -> Any:
        """Pool every row of an array as a document of its own."""
        import torch

        from ..rows.pooling import pool_batches

        if hasattr(self, "n_features_in_"):
            X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        else:
            X = check_array(X, dtype=[np.float32, np.float64])
        self._check_width(X.shape[1])
        if ask.sae is not None:
            from ..places import warn, warnings_on
            from ..rows.first_use import warnings_on_first_use
            from ..rows.opening import SCALE_ROWS, variance_of
            from ..sae.naming import name_of

            first = torch.from_numpy(np.array(X[:SCALE_ROWS]))
            named = [(name_of(ask.sae), ask.sae)]
            warn(warnings_on(named, {"row_variance": variance_of(first)}))
            warn(warnings_on_first_use(named, lambda: first, {}))
        blocks = range(0, len(X), _ROWS_AT_ONCE)
        batches = (
            (
                {ask.place: torch.from_numpy(np.array(X[i : i + _ROWS_AT_ONCE]))},
                torch.arange(i, min(i + _ROWS_AT_ONCE, len(X))),
            )
            for i in blocks
        )
        (found,) = pool_batches(batches, len(X), [ask], what="rows")
        return found[ask.pools[0]]

    def _check_model(self) -> None:
        """Refuse another model than the one of `fit`, as there may be one after loading from a file."""
        fitted = getattr(self, "model_digest_", None)
        if fitted is None:
            return
        from ..models.deferred import defer_model

        now = defer_model(self.model).digest
        if now != fitted:
            raise ModelError(
                f"the model must be the one of fit ({fitted[:19]}…); `{self.model}` is {now[:19]}…. "
                "Give that model with set_params(model=…), or fit again."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return plain values and numpy arrays only, so that pickle, joblib and skops can store them.

        A path stays a path. An SAE that was given as a value goes along as arrays. A model that was given as a value is
        replaced by the folder or hub name it came from.
        """
        from ..sae.model import SAE
        from .stored_sae import state_of

        state = dict(super().__getstate__())
        for name, value in state.items():
            if isinstance(value, SAE):
                state[name] = state_of(value)
            elif isinstance(value, os.PathLike):
                state[name] = os.fspath(value)
            elif name == "model" and value is not None and not isinstance(value, str):
                part = getattr(value, "tokenizer", None) or getattr(value, "processor", None)
                state[name] = str(getattr(part, "name_or_path", "") or "") or value.name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        from .stored_sae import is_state, sae_of

        super().__setstate__({name: sae_of(value) if is_state(value) else value for name, value in state.items()})

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.string = self.model is not None
        tags.input_tags.two_d_array = self.model is None
        tags.no_validation = self.model is not None
        tags.transformer_tags.preserves_dtype = []
        return tags


@suggest_keywords
class SAEFeatures(_Features):
    """An SAE's codes, pooled over the tokens of each text (or the patches of each image); CSR float32.

    Parameters
    ----------
    model
        The language model: ``"builtin"``, a folder, a hub name or a `LanguageModel`; for images a vision model; None
        when `transform` gets activations, an array ``[n, d_in]`` of which each row is a document.
    sae
        An `SAE`, or the path of one (a folder, or ``hf:owner/name/folder``).
    layer, hook
        Where the SAE reads; see `saekit.capture`. Neither: where it was trained, as its provenance says.
    pool
        ``"sum"``, ``"mean"``, ``"max"``, ``"min"``, ``"last"``, ``"first"``; ``"count"`` (tokens where the latent
        fired); ``"top5"`` (tokens where it was among the 5 largest). See `saekit.rows.pooling.pool_batches`.
    max_tokens
        Read this many tokens of a text at most; None: all, long texts in windows.
    cache
        Folder in which pooled rows are kept by text, so that each text is run once over all folds, fits and processes.
    batch_tokens
        Tokens in one forward pass; None: the usual number.
    skip_special
        Leave out tokens that the tokenizer adds: BOS, CLS, SEP.
    empty
        What to do about texts without tokens: ``"refuse"``, or a ``"zero"`` row.

    Attributes
    ----------
    model_digest_ : str
        Digest of the language model of `fit`; after loading from a file another model is refused.
    n_features_in_ : int
        Width of the rows, without a model.

    Notes
    -----
    `fit` learns nothing: `transform` works without it. A clone shares the SAE and the model. The model of a name is
    loaded at the first text that is not in the cache; the last one stays loaded. pickle, joblib and skops store an SAE
    given as a value with the estimator, one given by its path as the path; a model always as its folder or name.
    `set_output(transform="pandas")` is refused: a data frame cannot hold sparse features.

    Examples
    --------
    ::

        clf = make_pipeline(SAEFeatures("builtin", sae, layer=2), Binarize(1.0), LogisticRegression())
        clf.fit(texts, labels)
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LanguageModel | VisionModel | None,
        sae: SAE | str | os.PathLike[str],
        *,
        layer: int | None = None,
        hook: str | None = None,
        pool: str = "sum",
        max_tokens: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        batch_tokens: int | None = None,
        skip_special: bool = True,
        empty: Literal["refuse", "zero"] = "refuse",
    ) -> None:
        super().__init__(
            model, layer=layer, hook=hook, pool=pool, max_tokens=max_tokens, cache=cache, batch_tokens=batch_tokens,
            skip_special=skip_special, empty=empty,
        )  # fmt: skip
        self.sae = sae

    def transform(self, X: object) -> scipy.sparse.csr_matrix:
        """Return pooled codes ``[n, n_latents]`` of texts, images or rows, as ``scipy.sparse.csr_matrix``.

        Raises
        ------
        DataError, ConfigError, ShapeError, ModelError, OfflineError
            As `saekit.rows.pooling.pool_texts`.
        """
        from sklearn.utils._set_output import _get_output_config

        if _get_output_config("transform", self)["dense"] != "default":
            raise ConfigError(
                "Pandas output does not support sparse data, which SAEFeatures gives. Leave set_output as it is; "
                "get_feature_names_out() names the columns."
            )
        return self._pooled(X)

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Return names of columns: ``sae_00012`` for latent 12, so that names sort as latents do."""
        return _names("sae", self._sae().n_latents)

    def _sae(self) -> SAE:
        from ..sae.model import SAE

        if isinstance(self.sae, SAE):
            return self.sae
        if not isinstance(self.sae, str | os.PathLike):
            raise ConfigError(
                f"SAEFeatures: `sae` must be an SAE or the path of one; got {type(self.sae).__name__}. "
                "One SAE per SAEFeatures; make a FeatureUnion of several."
            )
        return _loaded_sae(os.fspath(self.sae), _stamp(os.fspath(self.sae)))

    def _ask(self) -> Ask:
        from ..rows.pooling import Ask

        if self.model is None:
            return Ask((self.pool,), self._sae(), hook="rows")
        ask = Ask((self.pool,), self._sae(), self.layer, self.hook)
        _ = ask.place  # says what is missing
        return ask

    def _check_width(self, width: int) -> None:
        d_in = self._sae().d_in
        if width != d_in:
            raise ShapeError(
                f"SAEFeatures: rows must have width d_in={d_in} of the SAE; got {width}. "
                "Was it trained on another model?"
            )


@suggest_keywords
class HiddenStates(_Features):
    """Hidden states, pooled over the tokens of each text (or the patches of each image); dense float32.

    The baseline of an SAE, under the same pooling.

    Parameters
    ----------
    model
        As for `SAEFeatures`, but never None.
    layer, hook
        Where the states are taken; one of them is needed.
    pool
        ``"mean"``, ``"sum"``, ``"max"``, ``"min"``, ``"last"`` or ``"first"``.
    max_tokens, cache, batch_tokens, skip_special, empty
        As for `SAEFeatures`.

    Attributes
    ----------
    model_digest_ : str
        Digest of the language model of `fit`.
    """

    def transform(self, X: object) -> np.ndarray:
        """Return pooled states ``[n, d]`` of texts or images.

        Raises
        ------
        DataError, ConfigError, ModelError, OfflineError
            As `saekit.rows.pooling.pool_texts`.
        """
        return self._pooled(X)

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Return names of columns: ``hidden_012`` for dimension 12. Loads the model."""
        from ..models.deferred import defer_model
        from ..models.language import LanguageModel
        from ..rows.pooling import pool_texts
        from ..rows.settings import PoolingSettings

        ask = self._ask()
        model = self.model
        if not isinstance(model, LanguageModel) and _are_images(model, None):
            return _names("hidden", model.d_model)
        model = defer_model(model).load()
        (found,) = pool_texts(model, ["a"], [ask], settings=PoolingSettings(skip_special=False))
        return _names("hidden", found[self.pool].shape[1])

    def _ask(self) -> Ask:
        from ..rows.pooling import Ask

        if self.model is None:
            raise ConfigError("HiddenStates: `model` must be a model; got None. Rows are hidden states already.")
        ask = Ask((self.pool,), None, self.layer, self.hook)
        _ = ask.place  # says what is missing
        return ask

    def _check_width(self, width: int) -> None:
        self._ask()


_ROWS_AT_ONCE = 4096


def _names(prefix: str, n: int) -> np.ndarray:
    return np.array([f"{prefix}_{i:0{len(str(max(n - 1, 0)))}d}" for i in range(n)], dtype=object)


def _are_images(model: object, X: object) -> bool:
    """Return whether the model reads images, or `X` are images."""
    from ..inputs.images import are_images
    from ..models.vision import VisionModel

    if isinstance(model, VisionModel):
        return True
    return not isinstance(X, str | np.ndarray | None) and are_images(X) is True


@functools.lru_cache(maxsize=1)
def _loaded_vision_model(name: str) -> VisionModel:
    from ..models.loading import load_vision_model

    return load_vision_model(name)


def _loaded_vision(model: str | os.PathLike[str] | VisionModel) -> VisionModel:
    return _loaded_vision_model(os.fspath(model)) if isinstance(model, str | os.PathLike) else model


@functools.lru_cache(maxsize=8)
def _loaded_sae(path: str, stamp: tuple[tuple[str, int, int], ...]) -> SAE:
    """Load the SAE of that path; the last ones stay loaded, for the clones that cross-validation makes."""
    from ..store.native import load

    return load(path)


def _stamp(path: str) -> tuple[tuple[str, int, int], ...]:
    """Return sizes and times of the files of an SAE's folder: while they are the same, so is the SAE."""
    folder = local_path(path)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
