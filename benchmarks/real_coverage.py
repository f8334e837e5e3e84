"""How often intervals hold the truth on rows of real texts, where length decides the value as well.

``python benchmarks/real_coverage.py`` (second half of ``make coverage``) reads stories and encyclopedia articles with
a small language model that was trained on stories. Articles are longer, by a factor that varies, and everything about
them is another: reconstruction error, number of active latents, cross-entropy. Documents are drawn from one or from
both, what `saekit evaluate` measures is measured on their rows, and the intervals are compared with the value over
all documents. saekit prints those from 40 documents on. The cells go to ``real_coverage.json``; a test runs a few.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import saekit as sk
from saekit.measure.accumulators import Reconstruction, Sparsity
from saekit.measure.controls import untrained_like
from saekit.measure.fidelity import predicted_tokens
from saekit.measure.intervals import LEAST_DOCUMENTS, Estimate, Sample
from saekit.measure.metrics import METRICS
from saekit.rows.tokens import tokenize
from saekit.sae.codes import Codes
from saekit.sae.model import SAE
from saekit.sae.rules import ReLURule

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("SAEKIT_SHARED_DATA", HERE.parents[1] / "shared" / "data"))
LAYER = 2
LATENTS = 512
L0 = 12.0
EVERY = 4
"""Every fourth row is kept: which documents are drawn decides the spread, not how many of their rows."""
METRICS_MEASURED = ("fvu", "l0", "cosine", "dense_fraction", "ce_clean")
DOCUMENTS = (20, 30, 40, 50)
"""Of fewer than `LEAST_DOCUMENTS` saekit prints no interval: what those would cover is why."""
MIXTURES = {
    "stories": 0.0,
    "encyclopedia": 1.0,
    "half of each": 0.5,
    "one in five an article": 0.2,
    "one in ten an article": 0.1,
}
"""Probability that a document is an article."""


@dataclass(frozen=True)
class Document:
    """Rows of one document, and the sum of the cross-entropies of its predicted tokens."""

    x: Tensor
    x_hat: Tensor
    codes: Codes
    ce: float
    tokens: int


@dataclass(frozen=True)
class Population:
    """Stories, then articles."""

    documents: list[Document]
    is_article: np.ndarray

    @cached_property
    def truths(self) -> dict[str, dict[str, float]]:
        """By mixture and metric, the value over all documents, weighted as they are drawn."""
        found = {}
        for mixture, share in MIXTURES.items():
            stories, articles = (int((~self.is_article).sum()), int(self.is_article.sum()))
            weight = np.where(self.is_article, share / articles, (1 - share) / stories)
            found[mixture] = self._weighted(weight * len(weight))
        return found

    def _weighted(self, weight: np.ndarray) -> dict[str, float]:
        n = np.array([len(each.x) for each in self.documents]) * weight
        total = n.sum()
        mean = sum(w * each.x.double().sum(0) for w, each in zip(weight, self.documents)) / total
        spread = sum(w * float((each.x.double() - mean).square().sum()) for w, each in zip(weight, self.documents))
        error = sum(w * float((each.x - each.x_hat).double().square().sum()) for w, each in zip(weight, self.documents))
        cosines = [torch.cosine_similarity(each.x.double(), each.x_hat.double(), dim=1) for each in self.documents]
        fires = sum(
            w * torch.bincount(each.codes.indices, minlength=LATENTS).double()
            for w, each in zip(weight, self.documents)
        )
        tokens = weight * np.array([each.tokens for each in self.documents])
        return {
            "fvu": error / spread,
            "l0": float(fires.sum()) / total,
            "cosine": sum(w * float(each.sum()) for w, each in zip(weight, cosines)) / total,
            "dense_fraction": float((fires / total > 0.1).double().mean()),
            "ce_clean": float(weight @ [each.ce for each in self.documents] / tokens.sum()),
        }

    def choose(self, mixture: str, n: int, generator: np.random.Generator) -> np.ndarray:
        """Return indices of documents drawn with replacement."""
        articles, stories = np.flatnonzero(self.is_article), np.flatnonzero(~self.is_article)
        is_one = generator.random(n) < MIXTURES[mixture]
        return np.array([generator.choice(articles if each else stories) for each in is_one])


def measured(documents: Sequence[Document]) -> dict[str, Estimate]:
    """Return what `evaluate` measures on these documents."""
    x, x_hat = (torch.cat([getattr(each, name) for each in documents]) for name in ("x", "x_hat"))
    group = torch.repeat_interleave(torch.tensor([len(each.x) for each in documents]))
    reconstruction = Reconstruction(x.shape[1], n_groups=len(documents))
    reconstruction.update(x, x_hat, group)
    sparsity = Sparsity(LATENTS, n_groups=len(documents))
    sparsity.update(Codes.cat([each.codes for each in documents]), group)
    tokens = np.array([each.tokens for each in documents], dtype=float)
    ce = Sample.over(tokens).ratio(np.array([each.ce for each in documents]), tokens)
    return reconstruction.compute() | sparsity.compute() | {"ce_clean": ce}


@dataclass(frozen=True)
class Found:
    """One cell of the table."""

    metric: str
    mixture: str
    documents: int
    trials: int
    tried: int
    """Trials with an interval."""
    hits: int
    below: int
    """Intervals that end below the truth."""
    width: float
    """Median width, as a fraction of the value."""
    with_all: int = 0
    """Trials with an interval whose documents are of every kind in the mixture."""
    hits_with_all: int = 0

    @property
    def coverage(self) -> float:
        """Fraction of the intervals that hold the truth."""
        return self.hits / max(self.tried, 1)


def simulate(population: Population, mixture: str, n: int, trials: int, seed: int = 0) -> list[Found]:
    """Return how often the interval of each metric holds the truth."""
    generator = np.random.default_rng([seed, n, list(MIXTURES).index(mixture)])
    ends: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in METRICS_MEASURED}
    kinds = {0.0: 1, 1.0: 1}.get(MIXTURES[mixture], 2)
    for _ in range(trials):
        chosen = population.choose(mixture, n, generator)
        has_all = len(np.unique(population.is_article[chosen])) == kinds
        estimates = measured([population.documents[at] for at in chosen])
        for name in METRICS_MEASURED:
            metric = METRICS[name]
            each = estimates[name].measured("", least=metric.least, most=metric.most)
            if each.low is not None and each.high is not None:
                ends[name].append((each.low, each.high, has_all))
    found = []
    for name, intervals in ends.items():
        truth = population.truths[mixture][name]
        low, high, all_kinds = np.array(intervals).reshape(-1, 3).T
        hit = (low <= truth) & (truth <= high)
        of_all, hits_of_all = int(all_kinds.sum()), int((hit & (all_kinds > 0)).sum())
        hits, below = int(hit.sum()), int((high < truth).sum())
        width = float(np.median((high - low) / truth)) if len(low) and truth else float("nan")
        found.append(Found(name, mixture, n, trials, len(low), hits, below, width, of_all, hits_of_all))
    return found


def read_articles(name: str) -> list[str]:
    """Return the articles of a file of WikiText, one text each."""
    with gzip.open(SHARED / "text" / name, "rt", encoding="utf-8") as stream:
        parts = re.split(r"\n (?== [^=].*[^=] = \n)", stream.read())
    return [part for part in parts if len(part) > 400]


def read_population(stories: int, articles: int, kept: float = 0.2) -> Population:
    """Read documents with the language model; the first fifth of every article, so that lengths stay in proportion."""
    lm = sk.load_model(SHARED / "stories260K")
    told = list(sk.read_texts(SHARED / "text" / "tinystories_truecased_3678.jsonl.gz", columns=()))[:stories]
    known = [*read_articles("wikitext2_valid.txt.gz"), *read_articles("wikitext2_test.txt.gz")][:articles]
    known = [text[: max(int(kept * len(text)), 200)] for text in known]
    source = sk.capture(lm, [*told, *known], layer=LAYER, progress=False)
    batches = list(source.batches(4096))
    x, document = torch.cat([each.x for each in batches]).float(), torch.cat([each.document for each in batches])
    blank = SAE(
        W_enc=torch.ones(LATENTS, x.shape[1]), b_enc=torch.zeros(LATENTS), W_dec=torch.ones(LATENTS, x.shape[1]),
        b_dec=torch.zeros(x.shape[1]), rule=ReLURule(),
    )  # fmt: skip
    sae = untrained_like(blank, x.mean(0), x[:: max(len(x) // 4096, 1)], L0, seed=0)
    documents = []
    for at, text in enumerate([*told, *known]):
        rows = x[document == at][::EVERY]
        codes = sae.encode(rows)
        documents.append(Document(rows, sae.decode(codes), codes, *_cross_entropy(lm, text)))
    return Population(documents, np.arange(len(documents)) >= len(told))


def _cross_entropy(lm: sk.LanguageModel, text: str) -> tuple[float, int]:
    """Return the sum over the predicted tokens of a text, and their number."""
    contexts = tokenize(lm.tokenizer, [text], context=lm.context)
    total, tokens = 0.0, int(predicted_tokens(contexts).sum())
    for start, end in zip(contexts.offsets[:-1], contexts.offsets[1:]):
        ids = torch.as_tensor(contexts.ids[start:end], dtype=torch.long)[None]
        with torch.no_grad():
            log_p = lm.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        total -= float(log_p.gather(1, ids[0, 1:, None])[_predicted(contexts.position[start:end])].sum())
    return total, tokens


def _predicted(position: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(position[1:]) >= 0)


def headed(n: int) -> str:
    """Return the heading of a column: whether an interval from so many documents is printed."""
    return f"{n} documents" if n >= LEAST_DOCUMENTS else f"{n} documents (not printed)"


def table(cells: Sequence[Found]) -> list[str]:
    """Return the cells as lines of Markdown: coverage (and refused)."""
    counts = sorted({cell.documents for cell in cells})
    lines = ["| metric | documents from | " + " | ".join(map(headed, counts)) + " |"]
    lines.append("|" + " --- |" * (len(counts) + 2))
    for key in dict.fromkeys((cell.metric, cell.mixture) for cell in cells):
        by = {cell.documents: cell for cell in cells if (cell.metric, cell.mixture) == key}
        shown = []
        for n in counts:
            if n not in by:
                shown.append("–")
                continue
            cell = by[n]
            more = [f"{1 - cell.tried / cell.trials:.0%} refused"] if cell.tried < cell.trials else []
            if 0 < cell.with_all < cell.tried:
                more.append(
                    f"{cell.hits_with_all / cell.with_all:.3f} of {cell.with_all / cell.tried:.0%} with both kinds"
                )
            shown.append(f"{cell.coverage:.3f}" + (f" ({'; '.join(more)})" if more else ""))
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(shown) + " |")
    return lines


def main() -> None:
    """Print the table and write ``real_coverage.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=250)
    parser.add_argument("--stories", type=int, default=400)
    parser.add_argument("--articles", type=int, default=121)
    arguments = parser.parse_args()
    if not SHARED.is_dir():
        print(f"skipped: there is no sample data at `{SHARED}`; set SAEKIT_SHARED_DATA to its folder")
        return
    begun = time.time()
    population = read_population(arguments.stories, arguments.articles)
    cells: list[Found] = []
    for mixture in MIXTURES:
        for n in DOCUMENTS:
            cells += simulate(population, mixture, n, arguments.trials)
        print("\n".join(table(cells)[2:][-len(METRICS_MEASURED) :]), flush=True)
    cells.sort(key=lambda cell: (METRICS_MEASURED.index(cell.metric), list(MIXTURES).index(cell.mixture)))
    print("\n".join(table(cells)))
    print(f"{time.time() - begun:.0f} s")
    (HERE / "real_coverage.json").write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n")


if __name__ == "__main__":
    main()
