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
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, validate_data

from ..errors import ConfigError, DataError, ModelError, ShapeError

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


# ----------------------------------------------------------------------------------------------------------- features


class _Features(TransformerMixin, BaseEstimator):
    """What both kinds of features share: settings checked early, clones that share, states that can be stored."""

    def fit(self, X: Any, y: Any = None) -> Any:
        """Check the settings and the kind of `X`; nothing is learned, `y` is not used, and the model does not run."""
        if self.model is None:
            X = validate_data(self, X, dtype=[np.float32, np.float64])
            self._check_width(X.shape[1])
            return self
        self._ask()
        if not _are_images(self.model, X):
            from ..models.origin import language_origin
            from ..rows.pooling import check_texts

            check_texts(_as_texts(X))
            self.model_digest_ = language_origin(self.model).digest
        return self

    def _ask(self) -> Any:
        raise NotImplementedError

    def _check_width(self, width: int) -> None:
        raise NotImplementedError

    def _pooled(self, X: Any) -> Any:
        """Features of texts, images or rows."""
        ask = self._ask()
        settings: Any = self
        if settings.model is None:
            return self._pooled_rows(X, ask)
        if _are_images(settings.model, X):
            from ..rows.capture_images import pool_images

            if settings.cache is not None or settings.max_tokens is not None:
                raise ConfigError(
                    "`cache` and `max_tokens` are for texts; images are neither kept nor cut. Leave them out."
                )
            (found,) = pool_images(
                _loaded_vision(settings.model), X, [ask], skip_special=settings.skip_special, empty=settings.empty
            )
        else:
            from ..rows.pooling import pool_texts

            self._check_model()
            (found,) = pool_texts(
                settings.model, _as_texts(X), [ask], max_tokens=settings.max_tokens, cache=settings.cache,
                batch_tokens=settings.batch_tokens, skip_special=settings.skip_special, empty=settings.empty,
            )  # fmt: skip
        return found[settings.pool]

    def _pooled_rows(self, X: Any, ask: Any) -> Any:
        """Every row of an array as a document of its own."""
        import torch

        from ..rows.pooling import pool_batches

        if hasattr(self, "n_features_in_"):
            X = validate_data(self, X, dtype=[np.float32, np.float64], reset=False)
        else:
            X = check_array(X, dtype=[np.float32, np.float64])
        self._check_width(X.shape[1])
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
        from ..models.origin import language_origin

        now = language_origin(self.model).digest
        if now != fitted:
            raise ModelError(
                f"the model must be the one of fit ({fitted[:19]}…); `{self.model}` is {now[:19]}…. "
                "Give that model with set_params(model=…), or fit again."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Plain values and numpy arrays only, so that pickle, joblib and skops can store them.

        A path stays a path. An SAE that was given as a value goes along as arrays. A model that was given as a value is
        replaced by the folder or hub name it came from.
        """
        from ..sae.model import SAE

        state = dict(super().__getstate__())
        for name, value in state.items():
            if isinstance(value, SAE):
                state[name] = _state_of(value)
            elif isinstance(value, os.PathLike):
                state[name] = os.fspath(value)
            elif name == "model" and value is not None and not isinstance(value, str):
                part = getattr(value, "tokenizer", None) or getattr(value, "processor", None)
                state[name] = str(getattr(part, "name_or_path", "") or "") or value.name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(
            {
                name: _sae_of(value) if isinstance(value, dict) and _STATE in value else value
                for name, value in state.items()
            }
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.string = self.model is not None
        tags.input_tags.two_d_array = self.model is None
        tags.no_validation = self.model is not None
        tags.transformer_tags.preserves_dtype = []
        return tags


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
        ``"sum"``, ``"mean"``, ``"max"``, ``"last"``, ``"first"``; ``"count"`` (tokens where the latent fired);
        ``"top5"`` (tokens where it was among the 5 largest). See `saekit.rows.pooling.pool_batches`.
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
        model: Any,
        sae: Any,
        *,
        layer: int | None = None,
        hook: str | None = None,
        pool: str = "sum",
        max_tokens: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        batch_tokens: int | None = None,
        skip_special: bool = True,
        empty: str = "refuse",
    ) -> None:
        self.model = model
        self.sae = sae
        self.layer = layer
        self.hook = hook
        self.pool = pool
        self.max_tokens = max_tokens
        self.cache = cache
        self.batch_tokens = batch_tokens
        self.skip_special = skip_special
        self.empty = empty

    def transform(self, X: Any) -> Any:
        """Pooled codes ``[n, n_latents]`` of texts, images or rows, as ``scipy.sparse.csr_matrix``.

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

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """``sae_00012`` for latent 12; names sort as latents do."""
        return _names("sae", self._sae().n_latents)

    def _sae(self) -> Any:
        from ..sae.model import SAE

        if isinstance(self.sae, SAE):
            return self.sae
        if not isinstance(self.sae, str | os.PathLike):
            raise ConfigError(
                f"SAEFeatures: `sae` must be an SAE or the path of one; got {type(self.sae).__name__}. "
                "One SAE per SAEFeatures; make a FeatureUnion of several."
            )
        return _loaded_sae(os.fspath(self.sae), _stamp(os.fspath(self.sae)))

    def _ask(self) -> Any:
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


class HiddenStates(_Features):
    """Hidden states, pooled over the tokens of each text (or the patches of each image); dense float32.

    The arm that an SAE has to beat, under the same pooling.

    Parameters
    ----------
    model
        As for `SAEFeatures`, but never None.
    layer, hook
        Where the states are taken; one of them is needed.
    pool
        ``"mean"``, ``"sum"``, ``"max"``, ``"last"`` or ``"first"``.
    max_tokens, cache, batch_tokens, skip_special, empty
        As for `SAEFeatures`.

    Attributes
    ----------
    model_digest_ : str
        Digest of the language model of `fit`.
    """

    def __init__(
        self,
        model: Any,
        *,
        layer: int | None = None,
        hook: str | None = None,
        pool: str = "mean",
        max_tokens: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        batch_tokens: int | None = None,
        skip_special: bool = True,
        empty: str = "refuse",
    ) -> None:
        self.model = model
        self.layer = layer
        self.hook = hook
        self.pool = pool
        self.max_tokens = max_tokens
        self.cache = cache
        self.batch_tokens = batch_tokens
        self.skip_special = skip_special
        self.empty = empty

    def transform(self, X: Any) -> np.ndarray:
        """Pooled states ``[n, d]`` of texts or images.

        Raises
        ------
        DataError, ConfigError, ModelError, OfflineError
            As `saekit.rows.pooling.pool_texts`.
        """
        return self._pooled(X)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """``hidden_012`` for dimension 12. Loads the model, and runs it on one word where its width is not known."""
        from ..models.language import LanguageModel
        from ..models.origin import language_origin
        from ..rows.pooling import pool_texts

        ask = self._ask()
        model = self.model
        if not isinstance(model, LanguageModel) and _are_images(model, None):
            return _names("hidden", model.d_model)
        model = language_origin(model).load()
        (found,) = pool_texts(model, ["a"], [ask], skip_special=False)
        return _names("hidden", found[self.pool].shape[1])

    def _ask(self) -> Any:
        from ..rows.pooling import Ask

        if self.model is None:
            raise ConfigError("HiddenStates: `model` must be a model; got None. Rows are hidden states already.")
        ask = Ask((self.pool,), None, self.layer, self.hook)
        _ = ask.place  # says what is missing
        return ask

    def _check_width(self, width: int) -> None:
        self._ask()


_ROWS_AT_ONCE = 4096
_STATE = "saekit_sae"  # marks the stored form of an SAE in the state of an estimator


def _names(prefix: str, n: int) -> np.ndarray:
    return np.array([f"{prefix}_{i:0{len(str(max(n - 1, 0)))}d}" for i in range(n)], dtype=object)


def _as_texts(X: Any) -> Any:
    """Texts from a list, an array, or the one column of a table."""
    if isinstance(X, str):
        return X
    if hasattr(X, "to_numpy"):
        X = X.to_numpy()
    if isinstance(X, np.ndarray):
        if X.ndim == 2 and X.shape[1] == 1:
            X = X[:, 0]
        if X.ndim != 1:
            raise DataError(
                f"texts must be one column; got an array of shape {X.shape}. Without a model (model=None) rows of "
                "activations can be given."
            )
    return X


def _are_images(model: Any, X: Any) -> bool:
    """Whether the model looks at images, or `X` are some."""
    from ..inputs.images import Images
    from ..models.vision import VisionModel

    if isinstance(model, VisionModel) or isinstance(X, Images):
        return True
    return isinstance(X, list | tuple) and len(X) > 0 and hasattr(X[0], "getbbox")  # of PIL


@functools.lru_cache(maxsize=1)
def _loaded_vision_model(name: str) -> Any:
    from ..models.loading import load_vision_model

    return load_vision_model(name)


def _loaded_vision(model: Any) -> Any:
    return _loaded_vision_model(os.fspath(model)) if isinstance(model, str | os.PathLike) else model


@functools.lru_cache(maxsize=8)
def _loaded_sae(path: str, stamp: tuple[Any, ...]) -> Any:
    """The SAE of that path; the last ones stay loaded, for the clones that cross-validation makes."""
    from ..store.native import load

    return load(path)


def _stamp(path: str) -> tuple[Any, ...]:
    """Sizes and times of the files of an SAE's folder: when they are as before, so is the SAE."""
    folder = Path(path).expanduser()
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())


def _state_of(sae: Any) -> dict[str, Any]:
    """An SAE as plain values and numpy arrays."""
    scores = getattr(sae, "scores", None) or {}
    tensors = {**sae.tensors(), **{f"scores.{name}": value for name, value in scores.items()}}
    facts = {
        "rule": {"name": sae.rule.name, **sae.rule.settings()},
        "scaling": sae.scaling.settings(),
        "provenance": sae.provenance,
        "dtypes": {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()},
        "shapes": {name: list(t.shape) for name, t in tensors.items()},
    }
    arrays = {name: np.frombuffer(_bytes_of(t), np.uint8) for name, t in tensors.items()}
    return {_STATE: 1, "facts": json.dumps(facts), "tensors": arrays}


def _bytes_of(tensor: Any) -> bytes:
    import torch

    # numpy has no bfloat16, bytes have every type
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _sae_of(state: dict[str, Any]) -> Any:
    """The SAE that `_state_of` took apart."""
    import torch

    from ..sae.model import SAE
    from ..sae.rules import RULES
    from ..sae.scaling import Scaling

    facts = json.loads(state["facts"])
    tensors = {
        name: torch.from_numpy(np.array(array))
        .view(getattr(torch, facts["dtypes"][name]))
        .reshape(facts["shapes"][name])
        for name, array in state["tensors"].items()
    }

    def part(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    settings = facts["rule"]
    own: dict[str, Any] = {name: t for name, t in tensors.items() if "." not in name}
    if part("scores."):
        own["scores"] = part("scores.")
    return SAE(
        **own,
        rule=RULES[settings.pop("name")](**settings, **part("rule.")),
        scaling=Scaling(**facts["scaling"], **part("scaling.")),
        provenance=facts["provenance"],
    )
