"""What people would use without an SAE: a sentence embedding with logistic regression, and a small neural head.

    python studies/classify/context.py            # a minute or two per set; needs no other run

For context only: no verdict rests on these rows. The embedding is what all-MiniLM-L6-v2 is used for: the mean over the
tokens of the states after its last block, of length 1. The head has one hidden layer, is trained with torch on these
embeddings (the encoder stays as it is: nothing in it is fine-tuned), and keeps the weights of the epoch that was best
on a tenth of the training rows. Both are fitted on the training rows of the study and score its test rows once.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from run import HERE, SHARED, chosen, model_path, smaller, split_of, table_of, tell, write_page

import saekit as sk
from saekit.classification.arms import Arm
from saekit.classification.fit import fit_arm, predict_arm
from saekit.classification.settings import Budget
from saekit.files import read_json, write_json
from saekit.inputs.labelled import Labelled
from saekit.measure.paired_scores import HeldOut, Predictions, macro_f1_of, score
from saekit.rows.pooling import Ask, pool_texts

LAST = "layers.5"
"""The last of MiniLM's six blocks."""
HEAD_ROWS = 500
"""Training rows from which a head is trained."""
HIDDEN, EPOCHS, BATCH, PATIENCE, LR, DECAY, DROPOUT = 256, 100, 64, 10, 1e-3, 1e-2, 0.2
"""Of the head: hidden units; most epochs; rows per step; epochs without a better score after which it stops; AdamW."""


def main() -> int:
    """Score both on every set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "classify")
    parser.add_argument("--sets", help="names of data sets, with commas between [all]")
    parser.add_argument("--quick", action="store_true", help="on the quick run")
    options, _ = parser.parse_known_args()  # run.py has more
    config = tomllib.loads((HERE / "config.toml").read_text(encoding="utf-8"))
    folder = HERE
    if options.quick:
        config, folder = smaller(config), options.out / "quick"
    path = model_path(config["models"]["minilm"]["path"])
    if path is None or not (SHARED / "labelled").is_dir():
        tell("skipped: it needs MiniLM and the sample data")
        return 0
    lm = sk.load_model(path)
    file = folder / "results" / "context.json"
    kept = read_json(file)["sets"] if file.is_file() else {}
    for each in chosen(config["sets"], options.sets):
        data = split_of(each, table_of(each), config)
        kept[each["name"]] = rows_of(lm, data, each, int(config["seed"]))
        write_json(file, {"head": {"hidden": HIDDEN, "rows": HEAD_ROWS}, "sets": kept})
        tell(f"{each['name']}: {kept[each['name']]}")
    if any((folder / "results").glob("minilm-*.json")):
        write_page(config, folder)
    return 0


def rows_of(lm: Any, data: Labelled, each: dict[str, Any], seed: int) -> dict[str, Any]:
    """Scores of both on one set."""
    (train, test), *_ = data.parts
    pooled = pool_texts(lm, list(data.texts), [Ask(("mean",), hook=LAST)], max_tokens=each.get("max_tokens"))
    x = np.asarray(pooled[0]["mean"], dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    groups = None if data.groups is None else data.groups[test]
    held_out = HeldOut.over(data.y[test], groups=groups, names=[data.keys[row] for row in test])
    together = None if data.together is None else data.together[train]
    logistic = fit_arm(Arm("embedding", "dense"), x[train], data.y[train], groups=together, budget=Budget(seed=seed))
    said = {"embedding": predict_arm(logistic, x[test], len(data.classes)).probabilities}
    if len(train) >= HEAD_ROWS:
        said["head"] = head(x[train], data.y[train], together, seed)(x[test])
    scores = {name: score(Predictions(guess), held_out, ("macro_f1", "auc")) for name, guess in said.items()}
    return {
        name: {"macro_f1": each.measured("macro_f1").to_json(), "auc": each.measured("auc").to_json()}
        for name, each in scores.items()
    }


def head(x: np.ndarray, y: np.ndarray, groups: np.ndarray | None, seed: int) -> Any:
    """Return a trained head, as a function from rows to probabilities."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    units = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    is_kept_out = (generator.permutation(int(units.max()) + 1) % 10 == 0)[units]
    A, B = (torch.from_numpy(x[rows]) for rows in (~is_kept_out, is_kept_out))
    labels, right = torch.from_numpy(y[~is_kept_out]), y[is_kept_out]
    model = torch.nn.Sequential(
        torch.nn.Linear(x.shape[1], HIDDEN), torch.nn.GELU(), torch.nn.Dropout(DROPOUT),
        torch.nn.Linear(HIDDEN, int(y.max()) + 1),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    best, weights, since = -1.0, model.state_dict(), 0
    for _ in range(EPOCHS):
        model.train()
        for rows in torch.from_numpy(generator.permutation(len(A))).split(BATCH):
            loss = torch.nn.functional.cross_entropy(model(A[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            guess = model(B).argmax(1).numpy()
        found, since = float(macro_f1_of(right, guess, np.ones((1, len(right)), np.float32))[0]), since + 1
        if found > best:
            best, since = found, 0
            weights = {name: each.clone() for name, each in model.state_dict().items()}
        if since >= PATIENCE:
            break
    model.load_state_dict(weights)

    @torch.no_grad()
    def apply(rows: np.ndarray) -> np.ndarray:
        return model.eval()(torch.from_numpy(rows)).softmax(1).numpy()

    return apply


if __name__ == "__main__":
    sys.exit(main())
