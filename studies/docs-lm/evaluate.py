"""Bits per byte of the built-in language model on held-out modules, beside what it must beat.

    python studies/docs-lm/evaluate.py --model src/saekit/assets/docs-lm --out runs/docs-lm/evaluation.json

Four compressors of one text, the documents of the held-out modules; lower is better:

- the language model: every document by itself, after BOS, its end (EOS) included;
- an interpolated 5-gram model with modified Kneser-Ney discounts over the same tokens, counted on the train split,
  scored on the same documents in the same way;
- ``xz -9e`` of the held-out documents alone, joined by a zero byte;
- ``xz -9e`` of the train documents and the held-out ones in one stream, less that of the train documents: how well it
  does when it, too, has seen the train split.

Each is divided by the UTF-8 bytes of the held-out texts, joints and ends not counted.
"""

from __future__ import annotations

import argparse
import lzma
import math
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn
from train import encode

from saekit.files import write_json
from saekit.inputs.corpus import Document, corpus_digest, docs

ORDER = 5
BITS = 12  # of a token in the key of an n-gram: five of them fit into 64
PROMPTS = (
    "Compute the ",
    "Return a new array",
    "Parameters\n----------\n",
    "Raises\n------\n",
    ">>> import numpy as np\n>>> ",
    "Open a file",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    arguments = parser.parse_args()
    results = evaluate(arguments.model)
    write_json(arguments.out, results)
    for name, value in results["bits_per_byte"].items():
        print(f"{name:28} {value:.4f} bits per byte")
    for sample in results["samples"]:
        print("-" * 60, sample, sep="\n")


def evaluate(folder: Path) -> dict:
    train_documents, heldout = docs(split="train"), docs(split="heldout")
    n_bytes = sum(len(document.text.encode()) for document in heldout)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    train_texts, texts = encode(tokenizer, train_documents), encode(tokenizer, heldout)
    n_tokens = sum(len(text) - 1 for text in texts)
    print(f"{len(heldout)} held-out documents, {n_bytes:,} bytes, {n_tokens:,} tokens", flush=True)

    by_text = np.zeros(len(texts))

    def count_model() -> float:
        by_text[:] = model_bits(model, texts)
        return float(by_text.sum())

    bits, seconds = {}, {}
    for name, count in {
        "language model": count_model,
        "5-gram, modified Kneser-Ney": lambda: NGrams(train_texts, len(tokenizer)).bits(texts),
        "xz -9e, held-out alone": lambda: xz_bits(heldout),
        "xz -9e, after the train split": lambda: xz_bits(train_documents + heldout) - xz_bits(train_documents),
    }.items():
        started = time.monotonic()
        bits[name] = round(count() / n_bytes, 4)
        seconds[name] = round(time.monotonic() - started, 1)
        print(name, bits[name], f"{seconds[name]} s", flush=True)
    return {
        "bits_per_byte": bits,
        "seconds": seconds,
        "heldout": {
            "digest": corpus_digest(heldout),
            "documents": len(heldout),
            "modules": len({document.module for document in heldout}),
            "bytes": n_bytes,
            "tokens": n_tokens,
            "bytes_per_token": round(n_bytes / n_tokens, 3),
        },
        "by_library": by_library(heldout, by_text),
        "parameters": model.num_parameters(),
        "samples": samples(model, tokenizer),
    }


def by_library(documents: list[Document], by_text: np.ndarray) -> dict[str, float]:
    """Bits per byte of the language model, library by library."""
    found = {}
    for library in dict.fromkeys(document.library for document in documents):
        chosen = [index for index, document in enumerate(documents) if document.library == library]
        n_bytes = sum(len(documents[index].text.encode()) for index in chosen)
        found[library] = round(float(by_text[chosen].sum()) / n_bytes, 4)
    return found


@torch.no_grad()
def model_bits(model: transformers.PreTrainedModel, texts: list[np.ndarray], batch: int = 16) -> np.ndarray:
    """Bits of each text: of all its tokens after the first, in float32.

    A text longer than the context is read in windows that overlap by half: beyond its beginning, every token is
    predicted from at least half a context.
    """
    context = model.config.max_position_embeddings
    windows = []  # (number of the text, tokens, index of the first token to score)
    for number, text in enumerate(texts):
        starts = range(0, max(1, len(text) - 1 - context // 2), context // 2)
        for start in starts:
            tokens = text[start : start + context + 1].astype(np.int64)
            windows.append((number, tokens, 1 if start == 0 else context // 2 + 1))
    windows.sort(key=lambda window: len(window[1]))
    total = np.zeros(len(texts))
    for place in range(0, len(windows), batch):
        part = windows[place : place + batch]
        rows = nn.utils.rnn.pad_sequence([torch.from_numpy(tokens) for _, tokens, _ in part], batch_first=True)
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        nats = nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        for row, (number, tokens, first) in zip(nats.double(), part, strict=True):
            total[number] += float(row[first - 1 : len(tokens) - 1].sum())
    return total / math.log(2)


class NGrams:
    """Interpolated n-gram model with modified Kneser-Ney discounts (Chen and Goodman 1999), counted on `texts`.

    Every text begins with BOS, which is repeated so that its first token has a full context, and ends with EOS. Lower
    orders count distinct left neighbours, except for n-grams that begin with BOS: those have none and keep their
    counts. The lowest order is interpolated with the uniform distribution.
    """

    def __init__(self, texts: list[np.ndarray], n_tokens: int) -> None:
        if n_tokens > 1 << BITS:
            raise ValueError(f"a key holds tokens below {1 << BITS}; the tokenizer has {n_tokens}")
        self.n_tokens = n_tokens
        keys, counts = np.unique(np.concatenate([self.keys(text) for text in texts]), return_counts=True)
        self.orders: list[dict[str, np.ndarray]] = []
        for order in range(ORDER, 0, -1):
            self.orders.append(self.order(keys, counts))
            if order > 1:
                keys, counts = self.lower(keys, counts, order)
        self.orders.reverse()

    @staticmethod
    def keys(text: np.ndarray) -> np.ndarray:
        """The 5-gram that ends at each token after the first, as one number."""
        padded = np.concatenate([np.repeat(text[:1], ORDER - 2), text]).astype(np.uint64)
        n = len(text) - 1
        total = np.zeros(n, np.uint64)
        for place in range(ORDER):
            total = (total << np.uint64(BITS)) | padded[place : place + n]
        return total

    @staticmethod
    def lower(keys: np.ndarray, counts: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
        """N-grams one shorter: how many different tokens stand before each; at a text's beginning, their counts."""
        suffixes = keys & np.uint64((1 << BITS * (order - 1)) - 1)
        shorter, where = np.unique(suffixes, return_inverse=True)
        n_before = np.bincount(where, minlength=len(shorter))
        if order > 2:
            first = shorter >> np.uint64(BITS * (order - 2))
            n_before = np.where(first == 0, np.bincount(where, weights=counts, minlength=len(shorter)), n_before)
        return shorter, n_before.astype(np.int64)

    @staticmethod
    def order(keys: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Discounted counts of one order's n-grams; of each context, the count and what it leaves to lower orders."""
        n = [np.count_nonzero(counts == value) for value in (1, 2, 3, 4)]
        discounts = np.array([0.0, 0.5, 1.0, 1.5])  # where the counts are too few or too large to estimate them
        if all(n):
            y = n[0] / (n[0] + 2 * n[1])
            discounts[1:] = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
        discount = discounts[np.minimum(counts, 3)]
        contexts, first = np.unique(keys >> np.uint64(BITS), return_index=True)
        return {
            "keys": keys,
            "counts": counts - discount,
            "contexts": contexts,
            "totals": np.add.reduceat(counts.astype(np.float64), first),
            "left": np.add.reduceat(discount, first),
        }

    def probabilities(self, keys: np.ndarray) -> np.ndarray:
        """Probability of the last token of each 5-gram after the four before."""
        p = np.full(len(keys), 1.0 / self.n_tokens)
        for order, table in enumerate(self.orders, start=1):
            own = keys & np.uint64((1 << BITS * order) - 1)
            context = own >> np.uint64(BITS)
            at = np.minimum(np.searchsorted(table["contexts"], context), len(table["contexts"]) - 1)
            known = table["contexts"][at] == context
            place = np.minimum(np.searchsorted(table["keys"], own), len(table["keys"]) - 1)
            count = np.where(table["keys"][place] == own, table["counts"][place], 0.0)
            p = np.where(known, (count + table["left"][at] * p) / table["totals"][at], p)
        return p

    def bits(self, texts: list[np.ndarray]) -> float:
        keys = np.concatenate([self.keys(text) for text in texts])
        for key in keys[:: max(1, len(keys) // 20)]:  # it is a distribution: over all tokens it sums to one
            context = (key >> np.uint64(BITS)) << np.uint64(BITS)
            total = self.probabilities(context | np.arange(self.n_tokens, dtype=np.uint64)).sum()
            assert abs(total - 1) < 1e-9, total
        return float(-np.log2(self.probabilities(keys)).sum())


def xz_bits(documents: list[Document]) -> float:
    """Bits of ``xz -9e`` over the texts, joined by a zero byte."""
    text = "\0".join(document.text for document in documents).encode()
    return 8.0 * len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME))


def samples(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> list[str]:
    """What the model writes after a few prompts: temperature 0.8, nucleus 0.95, seed 0, 80 tokens at most."""
    written = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")
            made = model.generate(**ids, max_new_tokens=80, do_sample=True, temperature=0.8, top_p=0.95, top_k=0)
            written.append(tokenizer.decode(made[0], skip_special_tokens=True))
    return written


if __name__ == "__main__":
    main()
