"""A fitted classifier of texts as files: predict, and explain by latents and the tokens where they fired.

The folder holds ``classifier.skops`` (a scikit-learn pipeline without pickle; the types that may be loaded are checked
against what saekit itself writes), ``sparse.skops`` (the same of a few latents, where the classifier reads all),
``sae/`` and ``classifier.json``, which says what it is and how well it did.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError, FormatError, MissingFileError, did_you_mean, listed
from ..files import (
    check_path,
    digest_bytes,
    is_there,
    read_sealed,
    read_together,
    replaced_together,
    write_bytes,
    write_sealed,
)
from ..forms import COUNT, NATURAL, check_form
from ..measure.token_statistics import TokenScores, labels_of
from ..models.deferred import defer_model
from ..models.language import LanguageModel
from ..models.loading import load_language_model
from ..models.vision import VisionModel
from ..places import Warned
from ..rows.asks import warnings_on_pooling
from ..rows.capture import capture
from ..rows.pooling import Ask, place_of_pooling, pool_texts
from ..rows.settings import CaptureSettings
from ..sae.model import SAE
from .arms import Arm
from .decisions import TOP_LATENTS, Explanation, Firing, LinearRule, Reason
from .fit import fit_arm
from .pipeline_file import dump_pipeline, load_pipeline
from .plan import Plan
from .result import ArmScore, Classification
from .sparse_arm import sparse_arm

CARD = "classifier.json"
PIPELINE = "classifier.skops"
SPARSE = "sparse.skops"
SAE_FOLDER = "sae"
PARTS = (SAE_FOLDER, PIPELINE, SPARSE)
"""What must be of the same save as the card."""
SCHEMA = 3
"""Version of the layout; schema 2 brought the seal and the digest of the SAE, schema 3 the sparse arm."""

LABEL_TOKENS = 50_000
"""Tokens of training texts that labels of latents are made from."""


@dataclass(frozen=True, eq=False)
class TextClassifier:
    """A fitted classifier of texts by SAE features.

    Examples
    --------
    ::

        classifier = sk.load_classifier("out/classifier")
        classifier.predict(["how do I freeze my card?"])     # array(['card_freeze'], dtype=object)
        classifier.explain("how do I freeze my card?")       # the latents that decided, and their tokens
    """

    pipeline: Any = field(repr=False)
    """Fitted scikit-learn pipeline: pooled codes in, class codes out."""
    sae: SAE
    classes: tuple[str, ...]
    hook: str
    pool: str
    max_tokens: int | None
    labels: dict[int, str] = field(repr=False)
    """Offline labels of the latents that matter."""
    card: dict[str, Any] = field(repr=False)
    """What it is: model, data, scores, versions."""
    model: Any = None
    """The language model, or its name."""
    sparse: Any = field(default=None, repr=False)
    """The same of a few latents, chosen within the training rows; None where `pipeline` is of a few itself."""

    @cached_property
    def _lm(self) -> LanguageModel:
        lm = load_language_model(self.model)
        wanted = self.card["model"]["digest"]
        if lm.digest != wanted:
            raise ConfigError(
                f"the classifier must read the model it was fitted with, `{self.card['model']['name']}`; `{lm.name}` "
                "has other weights. Give that model (--model)."
            )
        return lm

    def warnings(self) -> list[Warned]:
        """Return what is not as in the SAE's training about the rows that the model makes."""
        ask = Ask((self.pool,), sae=self.sae, hook=self.hook)
        return warnings_on_pooling([ask], place_of_pooling(defer_model(self._lm)))

    def features(self, texts: Sequence[str]) -> Any:
        """Pooled codes ``[n, n_latents]``, CSR."""
        ask = Ask((self.pool,), sae=self.sae, hook=self.hook)
        return pool_texts(self._lm, texts, [ask], max_tokens=self.max_tokens)[0][self.pool]

    def predict_proba(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities ``[n, n_classes]``, columns in the order of `classes`."""
        return np.asarray(self.pipeline.predict_proba(self.features(texts)))

    def predict(self, texts: Sequence[str]) -> np.ndarray:
        """Names of the most probable classes ``[n]``.

        Raises
        ------
        DataError
            No text, or one without tokens.
        ConfigError
            The language model is another than the classifier's.
        """
        return np.array(self.classes, dtype=object)[self.predict_proba(texts).argmax(1)]

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients per unit of (binarized) pooled activation ``[n_classes, n_latents]`` and intercepts.

        Latents that do not reach the classifier have 0. For two classes the logits are those of a softmax with the
        first one's fixed at 0.
        """
        rule = LinearRule.of(self.pipeline, self.sae.n_latents)
        return rule.coefficients, rule.intercepts

    def top_latents(self, n: int = TOP_LATENTS) -> dict[str, list[tuple[int, float, str]]]:
        """Per class the `n` latents that speak for it most: number, coefficient over the mean class, label."""
        coefficients, _ = self.weights()
        centred = coefficients - coefficients.mean(0)
        return {
            name: [
                (int(j), float(row[j]), self.labels.get(int(j), ""))
                for j in np.argsort(-row, kind="stable")[:n]
                if row[j] > 0
            ]
            for name, row in zip(self.classes, centred)
        }

    def explain(self, text: str, *, top: int = TOP_LATENTS) -> Explanation:
        """Return the latents that decided about a text, with the tokens where they fired.

        For two classes the logit is that of the predicted class against the other; for more, against the mean class.
        Where many latents add a little each, those shown may carry little of the logit (``logit_fraction``,
        ``shown_fraction``); the ``sparse`` part explains the text by the sparse arm, which reads a few latents only.

        Parameters
        ----------
        text
            One text.
        top
            Latents to name.

        Raises
        ------
        DataError
            The text has no tokens.
        """
        X = self.features([text])
        found = self._explained(text, X, self.pipeline, top)
        return found if self.sparse is None else replace(found, sparse=self._explained(text, X, self.sparse, top))

    def _explained(self, text: str, X: Any, pipeline: Any, top: int) -> Explanation:
        """Return the latents that decided in one of the pipelines."""
        rule = LinearRule.of(pipeline, self.sae.n_latents)
        probabilities = np.asarray(pipeline.predict_proba(X))[0]
        chosen = int(probabilities.argmax())
        row, intercept = rule.against_rest(chosen)
        values = np.asarray(rule.read(X).todense()).ravel()
        contributions = row * values
        largest = np.argsort(-np.abs(contributions), kind="stable")[:top]
        order = [int(j) for j in largest if contributions[j] != 0]
        fired = self._firings(text, order)
        reasons = tuple(
            Reason(j, self.labels.get(j, ""), float(values[j]), float(row[j]), float(contributions[j]), tuple(fired[j]))
            for j in order
        )
        total, size = float(contributions.sum()), float(np.abs(contributions).sum())
        shown = contributions[order]
        return Explanation(
            text=text,
            predicted=self.classes[chosen],
            probabilities=dict(zip(self.classes, map(float, probabilities))),
            logit=total + intercept,
            intercept=intercept,
            reasons=reasons,
            rest=total - sum(each.contribution for each in reasons),
            logit_fraction=float(shown.sum()) / total if total else None,
            shown_fraction=float(np.abs(shown).sum()) / size if size else None,
            n_latents=rule.n_selected,
        )

    def _firings(self, text: str, latents: Sequence[int]) -> dict[int, list[Firing]]:
        """Return the tokens where these latents fired, strongest first."""
        found: dict[int, list[Firing]] = {j: [] for j in latents}
        if not latents:
            return found
        lm = self._lm
        source = capture(lm, [text], hook=self.hook, settings=CaptureSettings(outliers=None))
        for batch in source.batches(4096):
            assert batch.token is not None
            assert batch.position is not None
            with torch.no_grad():
                codes = self.sae.encode(batch.x.to(self.sae.device, self.sae.dtype))
            rows, columns, values = codes.row_of().cpu(), codes.indices.cpu(), codes.values.float().cpu()
            for j in latents:
                for place in (columns == j).nonzero().ravel().tolist():
                    row = int(rows[place])
                    token = lm.tokenizer.decode([int(batch.token[row])])
                    found[j].append(Firing(int(batch.position[row]), token, float(values[place])))
        return {j: sorted(firings, key=lambda each: -abs(each.activation)) for j, firings in found.items()}


def is_savable(arm: Arm | ArmScore) -> bool:
    """Return whether an arm is a linear probe of an SAE's latents: what can be saved and explained."""
    return arm.family in ("sae", "control") and arm.kind not in ("random", "untrained") and arm.probe == "logistic"


def check_savable(plan: Plan, name: str) -> None:
    """Refuse to save an arm that is no linear probe of the latents of an SAE of a language model.

    Raises
    ------
    ConfigError
        With what must be named.
    """
    found = [job.arm for job in plan.jobs if job.arm.name == name]
    if not found:
        names = list(dict.fromkeys(job.arm.name for job in plan.jobs))
        raise ConfigError(f"--save-arm must name an arm; got `{name}`. {did_you_mean(name, names)}")
    if not is_savable(found[0]) or plan.data.images is not None:
        raise ConfigError(
            "--save-arm must name a linear probe of an SAE's latents of texts: only these can be explained by latents; "
            f"got `{name}`. Name another, such as the same arm without its tree."
        )


def fit_classifier(plan: Plan, result: Classification, arm: str | None = None) -> TextClassifier:
    """Fit one arm of a classification on its training rows, with the hyperparameters that were chosen for it.

    Parameters
    ----------
    plan, result
        What was run, and what came out.
    arm
        Name of an SAE arm with a linear probe; None: the best one by inner cross-validation.

    Raises
    ------
    ConfigError
        No such arm, or one that is no linear probe of a trained SAE's latents.
    """
    scored = _to_save(result, arm)
    found = next(job.arm for job in plan.jobs if job.arm.name == scored.name)
    origin, model, data = plan.origins[found.source], plan.reader.model, plan.data
    assert origin.sae is not None
    assert not isinstance(model, VisionModel)
    sae = origin.sae if origin.sae.provenance.get("hook") else _with_hook(origin.sae, origin.hook)
    train = data.parts[0][0]
    lm = load_language_model(model)
    texts = [data.texts[row] for row in train]
    max_tokens = plan.how.max_tokens
    ask = Ask((found.pool,), sae=sae, hook=origin.hook)
    X = pool_texts(lm, data.texts, [ask], max_tokens=max_tokens, cache=plan.reader.cache)[0][found.pool]
    fitted = fit_arm(found, X[train], data.y[train], budget=plan.budget, chosen=scored.chosen[0])
    few = sparse_arm(plan, fitted, X)
    card = {
        "kind": "classifier",
        "schema": SCHEMA,
        "saekit": result.saekit,
        "versions": result.versions,
        "arm": scored.name,
        "model": {**result.model, "path": lm.name if isinstance(model, LanguageModel) else os.fspath(model)},
        "hook": origin.hook,
        "pool": found.pool,
        "max_tokens": max_tokens,
        "classes": list(data.classes),
        "settings": scored.chosen[0],
        "data": result.data,
        "macro_f1": scored.macro_f1.to_json(),
        "difference": scored.difference.to_json(),
        "verdict": scored.verdict,
        "sparse": None if few is None else few.about,
    }
    draft = TextClassifier(
        fitted.pipeline, sae, data.classes, origin.hook, found.pool, max_tokens, {}, card, model,
        None if few is None else few.pipeline,
    )  # fmt: skip
    return replace(draft, labels=_latent_labels(lm, draft, texts))


def _to_save(result: Classification, arm: str | None) -> ArmScore:
    if arm is None:
        linear = [a for a in result.arms if a.family == "sae" and a.probe == "logistic" and a.inner is not None]
        if not linear:
            raise ConfigError("to save a classifier, a linear arm of an SAE must be among the arms; there is none.")
        arm = max(linear, key=lambda each: each.inner or 0.0).name
    scored = result.arm(arm)
    if not is_savable(scored):
        raise ConfigError(f"only a linear probe of an SAE's latents can be saved and explained; `{arm}` is none.")
    return scored


def _with_hook(sae: SAE, hook: str) -> SAE:
    return sae.replace(provenance={**sae.provenance, "hook": hook})


def _latent_labels(lm: LanguageModel, classifier: TextClassifier, texts: Sequence[str]) -> dict[int, str]:
    """Labels of the latents that reach the classifier, from the training texts."""
    coefficients, _ = classifier.weights()
    wanted = np.flatnonzero(np.abs(coefficients).sum(0) > 0)
    scores = TokenScores(classifier.sae.n_latents)
    for batch in capture(lm, list(texts), hook=classifier.hook, tokens=LABEL_TOKENS).batches(4096):
        with torch.no_grad():
            codes = classifier.sae.encode(batch.x.to(classifier.sae.device, classifier.sae.dtype))
        assert batch.token is not None
        scores.update(codes, batch.token, batch.document)
    labels = labels_of(scores, lambda token: lm.tokenizer.decode([token]))
    return {int(j): labels[j] for j in wanted if labels[j]}


def save_classifier(classifier: TextClassifier, folder: str | os.PathLike[str]) -> Path:
    """Write a classifier as a folder; see the module.

    Returns
    -------
    pathlib.Path
        The folder.
    """
    folder, data = check_path(folder), dump_pipeline(classifier.pipeline)
    few = None if classifier.sparse is None else dump_pipeline(classifier.sparse)
    top = {
        name: [{"latent": j, "weight": weight, "label": label} for j, weight, label in rows]
        for name, rows in classifier.top_latents().items()
    }
    card = {
        **classifier.card,
        "pipeline": digest_bytes(data),
        "sparse": None if few is None else {**classifier.card["sparse"], "pipeline": digest_bytes(few)},
        "sae": classifier.sae.digest(),
        "labels": {str(j): label for j, label in classifier.labels.items()},
        "top_latents": top,
    }
    with replaced_together(folder, CARD, PARTS) as next_to:
        classifier.sae.save(next_to(SAE_FOLDER))
        write_bytes(next_to(PIPELINE), data)
        if few is not None:
            write_bytes(next_to(SPARSE), few)
        write_sealed(next_to(CARD), card)
    return folder


def load_classifier(folder: str | os.PathLike[str], *, model: Any = None) -> TextClassifier:
    """Read what `save_classifier` wrote; no code is run from the files.

    Parameters
    ----------
    folder
        The folder, or the output folder of ``saekit classify`` that holds it as ``classifier``.
    model
        The language model, where it does not lie any more where the card says.

    Raises
    ------
    FormatError
        The folder holds no classifier, a newer one, an altered one, or types that saekit does not write.
    """
    folder = check_path(folder)
    if not is_there(folder, CARD) and is_there(folder / "classifier", CARD):
        folder = folder / "classifier"
    if not is_there(folder, CARD):
        raise MissingFileError(
            f"`{folder}` must hold a classifier ({CARD}); it holds none. Make one with `saekit classify`."
        )
    return read_together(folder, CARD, PARTS, lambda path_of: _read(path_of, model))


def _read(path_of: Callable[[str], Path], model: Any) -> TextClassifier:
    card = _read_card(path_of(CARD))
    pipeline = load_pipeline(path_of(PIPELINE), card["pipeline"])
    few = card.get("sparse")
    sae = SAE.load(path_of(SAE_FOLDER))
    if card["schema"] > 1 and sae.digest() != card["sae"]:
        raise FormatError(f"`{path_of(SAE_FOLDER)}` must be the SAE of the classifier; {CARD} states another digest.")
    labels = {int(j): label for j, label in card["labels"].items()}
    return TextClassifier(
        pipeline, sae, tuple(card["classes"]), card["hook"], card["pool"],
        card["max_tokens"], labels, card, card["model"]["path"] if model is None else model,
        None if few is None else load_pipeline(path_of(SPARSE), few["pipeline"]),
    )  # fmt: skip


_FORM = {
    "pipeline": str, "labels": dict, "classes": [str], "hook": str, "pool": str, "max_tokens": (COUNT, None),
    "model": {"name": str, "digest": str, "path": str},
}  # fmt: skip


_SPARSE_FORM: tuple[dict[str, Any], dict[str, Any]] = ({}, {"sparse": (dict, None)})


def _read_card(path: Path) -> dict[str, Any]:
    """Return what ``classifier.json`` says, checked."""
    card: dict[str, Any] = read_sealed(path, since=2)
    if not isinstance(card, dict) or card.get("kind") != "classifier":
        raise FormatError(f"`{path}` must describe a classifier; it does not.")
    check_form(card, {"schema": NATURAL}, path)
    if card["schema"] > SCHEMA:
        raise FormatError(
            f"this classifier has schema {card['schema']}; this saekit reads up to {SCHEMA}. Install the newer release."
        )
    check_form(card, _FORM | ({"sae": str} if card["schema"] > 1 else {}) | _SPARSE_FORM[card["schema"] > 2], path)
    if card.get("sparse") is not None:
        check_form(card["sparse"], {"pipeline": str}, path, "sparse")
    if not all(key.isdecimal() for key in card["labels"]):
        raise FormatError(f"`{path}`: `labels` must be by numbers of latents; got {listed(card['labels'])}.")
    return card
