"""Words of the page, explained at its end: those that occur on it."""

from __future__ import annotations

from collections.abc import Sequence

GLOSSARY = (
    ("AUC", "area under the ROC curve: the chance that a positive ranks above a negative; 0.5 is chance"),
    ("baseline", "a simple method that anything worth its effort is better than"),
    ("CE", "next-token cross-entropy of the language model, in nats per token"),
    ("codes", "the activations of the latents on a row; nearly all are zero"),
    ("control", "a check that must show nothing: shuffled labels, random dictionaries, permuted coordinates"),
    ("cosine", "cosine of the angle between two directions: 1 is the same direction, 0 a right angle"),
    ("dead", "a latent that fires on no row"),
    ("density", "fraction of tokens at which a latent fires"),
    ("FVU", "fraction of variance unexplained by the reconstruction: 0 is perfect, 1 as good as the mean row"),
    ("held out", "texts that neither the SAE, nor a label, nor a classifier was made from"),
    ("interval", "confidence interval: of 100 such intervals about 95 contain the true value"),
    ("KL", "Kullback–Leibler divergence between next-token distributions, in nats"),
    ("L0", "latents that fire on a row, on average"),
    ("latent", "one unit of an SAE: a direction, and how strongly a row has it"),
    ("macro-F1", "mean over classes of the F1 score: every class counts the same"),
    ("matched", "paired one to one so that the sum of cosines is the largest possible"),
    ("orphan", "a latent that none of the other SAEs has"),
    ("purity", "largest fraction of a latent's activation that falls on one token"),
    ("recovered", "fraction of the language model's performance that is left with the reconstruction in its place"),
    ("row", "one activation vector: one token, patch or embedding"),
    ("seed", "number that fixes the random weights that training begins from"),
    ("shared", "found by two SAEs: decoder and encoder agree on the partner, both cosines above the threshold"),
    ("undecided", "the interval allows both sides of the margin: these data cannot tell"),
)
"""Word -> meaning, by the alphabet."""


def glossary_of(text: str) -> Sequence[tuple[str, str]]:
    """Return the words that occur in a text."""
    lower = text.lower()
    return [(word, meaning) for word, meaning in GLOSSARY if word.lower() in lower]
