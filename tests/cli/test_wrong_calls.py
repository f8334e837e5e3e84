"""Bad input ends with 2 and one plain message, before anything is computed or written, in every command alike."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit import SAE
from saekit.cli import app
from saekit.sae.rules import TopKRule
from saekit.store.native import save

WIDTH = 192  # of the built-in model


def sae_of(d: int, seed: int) -> SAE:
    w = torch.randn(16, d, generator=torch.Generator().manual_seed(seed))
    where = {"model": "builtin", "hook": "layers.2", "layer": 2, "seed": seed}
    return SAE(W_enc=w, b_enc=torch.zeros(16), W_dec=w, b_dec=torch.zeros(d), rule=TopKRule(4), provenance=where)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with what users have: rows, texts, SAEs, and things that are none of these."""
    folder = tmp_path_factory.mktemp("place")
    x = np.random.default_rng(0).standard_normal((600, WIDTH)).astype(np.float32)
    np.save(folder / "rows.npy", x)
    np.save(folder / "one.npy", x[:1])
    np.save(folder / "none.npy", x[:0])
    np.save(folder / "flat.npy", x[0])
    save(sae_of(WIDTH, 0), folder / "sae")
    save(sae_of(WIDTH, 1), folder / "sae1")
    save(sae_of(12, 0), folder / "narrow")
    lines = [f"text number {i} about {i % 7},{'ab'[i % 2]},{i // 4},{'xy'[i // 20]}" for i in range(40)]
    (folder / "texts.csv").write_text("\n".join(["text,label,group,part", *lines]) + "\n")
    (folder / "empty.csv").write_text("text,label\n")
    (folder / "single.csv").write_text("text,label\nhello world,a\n")
    rare = [*(f"text {i},{'ab'[i % 2]}" for i in range(12)), "z,c", "y,c"]
    (folder / "rare.csv").write_text("\n".join(["text,label", *rare]))
    few = [f"text {i},{'ab'[i % 2]},{'u' if i % 2 else i}" for i in range(12)]
    (folder / "few_groups.csv").write_text("\n".join(["text,label,group", *few]))
    (folder / "unlabelled.csv").write_text("text,label\nx,a\ny,\nz,b\n")
    (folder / "notes.md").write_text("# notes\n")
    (folder / "bad.toml").write_text("rows = = 3\n")
    (folder / "empty").mkdir()
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("keep\n")
    return folder


ROWS = ("--rows", "rows.npy")
TEXTS = ("--model", "builtin", "--data", "texts.csv")
TRAIN = ("train", *ROWS, "--arch", "topk", "--latents", "16", "--k", "4", "--batch-rows", "64", "--out", "o")
CAPTURE = ("capture", *TEXTS, "--layer", "2", "--out", "o")
EVALUATE = ("evaluate", "sae", *ROWS)
COMPARE = ("compare", "sae", "sae1")
PRUNE = ("prune", "sae", *ROWS, "--sizes", "4,8", "--out", "o")
PROGRESSIVE = ("progressive", "sae", "sae1", *ROWS)
CLASSIFY = ("classify", *TEXTS, "--sae", "sae", "--out", "o")
TRANSFER = ("transfer", *TEXTS, "--sae", "sae", "--across", "part", "--out", "o")
PREDICT = ("predict", "found")
ACTIONS = ("actions", "--model", "builtin", "--out", "o")


def changed(call: tuple[str, ...], **changes: str | None) -> tuple[str, ...]:
    """A call with options changed; None leaves one out."""
    left = list(call)
    for name, value in changes.items():
        option = f"--{name.replace('_', '-')}"
        if option in left:
            at = left.index(option)
            left[at : at + 2] = []
        left += [] if value is None else [option, value]
    return tuple(left)


def without_sae(call: tuple[str, ...], *saes: str) -> tuple[str, ...]:
    """A call on other SAEs."""
    return (call[0], *saes, *[each for each in call[1:] if each not in ("sae", "sae1")])


CALLS: dict[str, list[tuple[str, ...]]] = {
    "train": [
        changed(TRAIN, rows="nowhere.npy"), changed(TRAIN, rows="notes.md"), changed(TRAIN, rows="empty"),
        changed(TRAIN, rows="flat.npy"), changed(TRAIN, rows="none.npy"), changed(TRAIN, rows="sae"),
        changed(TRAIN, arch="topkk"), changed(TRAIN, arch=""), changed(TRAIN, latents="0"),
        changed(TRAIN, latents="-4"),
        changed(TRAIN, latents="1.5"),  changed(TRAIN, k="0"),
        changed(TRAIN, k="-1"), changed(TRAIN, k="17"), changed(TRAIN, seeds="0,0"), changed(TRAIN, seeds="-1"),
        changed(TRAIN, seeds="x"),
         changed(TRAIN, tokens="0"), changed(TRAIN, tokens="-5"), changed(TRAIN, tokens="10"),
        changed(TRAIN, batch_rows="0"), changed(TRAIN, batch_rows="100000"), changed(TRAIN, lr="-1"),
        changed(TRAIN, lr="nan"), changed(TRAIN, out="notes.md"), changed(TRAIN, device="gpu"),
        changed(TRAIN, config="bad.toml"), changed(TRAIN, config="nowhere.toml"), changed(TRAIN, config="empty"),
        changed(TRAIN, set="start=nowhere"), changed(TRAIN, set="nothing"), changed(TRAIN, set="precision=fp8"),
        changed(TRAIN, rows=None), changed(TRAIN, out=None),
    ],
    "capture": [
        changed(CAPTURE, model="nowhere/at/all"), changed(CAPTURE, model="empty"), changed(CAPTURE, model="notes.md"),
        changed(CAPTURE, data="nowhere.csv"), changed(CAPTURE, data="empty"), changed(CAPTURE, data="notes.exe"),
        changed(CAPTURE, text="body"), changed(CAPTURE, layer="99"), changed(CAPTURE, layer="-1"),
        changed(CAPTURE, layer=None, hook="layers.2.mpl"), changed(CAPTURE, tokens="0"),
        changed(CAPTURE, tokens="-1"),
        changed(CAPTURE, hook="layers.2"), changed(CAPTURE, out="notes.md"),
        changed(CAPTURE, set="context=0"), changed(CAPTURE, set="dtype=int8"), changed(CAPTURE, device="gpu"),
        changed(CAPTURE, data=None), changed(CAPTURE, layer="two"), changed(CAPTURE, data="empty.csv"),
        changed(CAPTURE, out="taken"), changed(CAPTURE, set="limit=5"), changed(CAPTURE, set="image='picture'"),
    ],
    "evaluate": [
        without_sae(EVALUATE, "nowhere"), without_sae(EVALUATE, "empty"), without_sae(EVALUATE, "notes.md"),
        without_sae(EVALUATE, "rows.npy"), without_sae(EVALUATE, "narrow"), without_sae(EVALUATE, "sae", "narrow"),
        changed(EVALUATE, rows="nowhere.npy"), changed(EVALUATE, rows="notes.md"), changed(EVALUATE, rows="empty"),
        changed(EVALUATE, rows="flat.npy"), changed(EVALUATE, rows="none.npy"), changed(EVALUATE, set="max_rows=0"),
        changed(EVALUATE, set="max_rows=-1"), changed(EVALUATE, set="batch_rows=0"), changed(EVALUATE, tokens="-1"),
        changed(EVALUATE, out="notes.md"), changed(EVALUATE, rows=None), changed(EVALUATE, set="fit=nowhere.npy"),
        changed(EVALUATE, set="frozen=nowhere"), changed(EVALUATE, rows=None, model="builtin"),
    ],
    "compare": [
        ("compare",), ("compare", "sae"), ("compare", "sae", "./sae"),
        ("compare", "sae", "sae1", "sae"),
        ("compare", "sae", "nowhere"), ("compare", "sae", "empty"),
        ("compare", "sae", "notes.md"), ("compare", "sae", "narrow"),
        (*COMPARE, "--threshold", "2"), (*COMPARE, "--threshold", "-2"), (*COMPARE, "--threshold", "x"),
        (*COMPARE, "--threshold", "nan"), (*COMPARE, "--rows", "nowhere.npy"), (*COMPARE, "--rows", "notes.md"),
        (*COMPARE, "--rows", "flat.npy"), (*COMPARE, "--rows", "none.npy"), (*COMPARE, "--out", "notes.md"),
        (*COMPARE, "--nope"), (*COMPARE, "--set", "treshold=1"), (*COMPARE, "--config", "nowhere.toml"),
    ],
    "prune": [
        without_sae(PRUNE, "nowhere"), without_sae(PRUNE, "empty"), without_sae(PRUNE, "notes.md"), ("prune",),
        changed(PRUNE, sizes="0"), changed(PRUNE, sizes="-4"), changed(PRUNE, sizes="17"), changed(PRUNE, sizes="x"),
        changed(PRUNE, sizes=""), changed(PRUNE, sizes=None), changed(PRUNE, by="energie"),
        changed(PRUNE, by="nowhere.npy"),
        changed(PRUNE, rows="nowhere.npy"), changed(PRUNE, rows="none.npy"), changed(PRUNE, rows="flat.npy"),
        changed(PRUNE, out="notes.md"), changed(PRUNE, selection="beside"), without_sae(PRUNE, "narrow"),
        changed(PRUNE, set="max_rows=0"), changed(PRUNE, by="cross_entropy"),
    ],
    "progressive": [
        without_sae(PROGRESSIVE, "nowhere"), without_sae(PROGRESSIVE, "empty"), without_sae(PROGRESSIVE, "notes.md"),
        without_sae(PROGRESSIVE, "sae", "narrow"), ("progressive",), changed(PROGRESSIVE, sizes="0"),
        changed(PROGRESSIVE, sizes="-1"), changed(PROGRESSIVE, sizes="x"), changed(PROGRESSIVE, sizes="17"),
        changed(PROGRESSIVE, rows="nowhere.npy"), changed(PROGRESSIVE, rows="none.npy"),
        changed(PROGRESSIVE, by="energie"),
        changed(PROGRESSIVE, rows="flat.npy"), changed(PROGRESSIVE, out="notes.md"),
        changed(PROGRESSIVE, set="seed=x"),
    ],
    "classify": [
        changed(CLASSIFY, sae="nowhere"), changed(CLASSIFY, sae="empty"), changed(CLASSIFY, sae="notes.md"),
        changed(CLASSIFY, sae="narrow"), changed(CLASSIFY, sae=None), changed(CLASSIFY, data="nowhere.csv"),
        changed(CLASSIFY, data="empty.csv"), changed(CLASSIFY, data="single.csv"), changed(CLASSIFY, data="empty"),
        changed(CLASSIFY, label="lable"), changed(CLASSIFY, group="grop"), changed(CLASSIFY, pool="summ"),
        changed(CLASSIFY, arms="densee"), changed(CLASSIFY, ks="0"), changed(CLASSIFY, ks="x"),
        changed(CLASSIFY, folds="1"),
        changed(CLASSIFY, folds="-1"), changed(CLASSIFY, limit="0"), changed(CLASSIFY, out="notes.md"),
        changed(CLASSIFY, model="nowhere/at/all"), changed(CLASSIFY, model=None), changed(CLASSIFY, text="body"),
        changed(CLASSIFY, select_by="f2"), changed(CLASSIFY, margin="-1"), ("classify", "--summary", "nowhere"),
        changed(CLASSIFY, set="layer=99"), changed(CLASSIFY, data="rare.csv"), changed(CLASSIFY, folds="30"),
        changed(CLASSIFY, data="few_groups.csv", group="group"), changed(CLASSIFY, min_rows="30"),
        changed(CLASSIFY, data="unlabelled.csv"), changed(CLASSIFY, split_column="spilt"),
    ],
    "transfer": [
        changed(TRANSFER, sae="nowhere"), changed(TRANSFER, sae="narrow"), changed(TRANSFER, data="nowhere.csv"),
        changed(TRANSFER, data="empty.csv"), changed(TRANSFER, across="grop"), changed(TRANSFER, label="lable"),
        changed(TRANSFER, pool="summ"), changed(TRANSFER, arms="densee"), changed(TRANSFER, out="notes.md"),
        changed(TRANSFER, values="z"), changed(TRANSFER, to="sae1"), changed(TRANSFER, across=None, to="nowhere"),
        changed(TRANSFER, model="nowhere/at/all"), changed(TRANSFER, rows="0"), changed(TRANSFER, to_model="builtin"),
    ],
    "predict": [
        ("predict",), ("predict", "nowhere"), ("predict", "empty"), ("predict", "notes.md"),
        ("predict", "sae", "a text"),
        ("predict", "sae", "a text", "--data", "texts.csv"),
    ],
    "actions": [
        changed(ACTIONS, task="nowhere.jsonl"), changed(ACTIONS, task="notes.md"), changed(ACTIONS, questions="0"),
        changed(ACTIONS, questions="-1"), changed(ACTIONS, choices="1"), changed(ACTIONS, normalize="words"),
        changed(ACTIONS, set="words=[1]"), changed(ACTIONS, model="nowhere/at/all"),
        changed(ACTIONS, data="nowhere.csv"),
        changed(ACTIONS, out="notes.md"), changed(ACTIONS, model=None), changed(ACTIONS, seed="x"),
    ],
    "show": [("show",), ("show", "nowhere"), ("show", "empty"), ("show", "notes.md"), ("show", "rows.npy")],
    "report": [("report",), ("report", "nowhere"), ("report", "empty"), ("report", "notes.md")],
    "demo": [("demo",), ("demo", "--out", "notes.md"), ("demo", "--out", "o", "--model", "nowhere/at/all"),
             ("demo", "--out", "o", "--data", "nowhere.csv")],
}  # fmt: skip
EVERY = [*itertools.chain.from_iterable(CALLS.values())]


@pytest.mark.parametrize("call", EVERY, ids=" ".join)
def test_a_wrong_call_ends_with_2_and_one_message(call, place, monkeypatch, capsys):
    before = contents(place)
    with monkeypatch.context() as patch:
        patch.chdir(place)
        status = app.run(list(call))
    out, err = capsys.readouterr()
    after = contents(place)
    shutil.rmtree(place / "o", ignore_errors=True)
    assert status == 2, err
    assert out == ""
    assert "Traceback" not in err
    assert "Unexpected error" not in err
    assert len(re.findall(r"^(?:error|Error): |│ ", err, re.MULTILINE)) <= 3
    assert after == before


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


ODD = {"long": "x" * 5000, "deep": "/".join(["d" * 200] * 30), "NUL": "a\0b", "empty": ""}
IN_CALLS = [
    ("show", "{}"), ("evaluate", "{}", *ROWS), ("evaluate", "sae", "--rows", "{}"), ("compare", "sae", "{}"),
    (*EVALUATE, "--out", "{}"), (*COMPARE, "--out", "{}"), (*PROGRESSIVE, "--out", "{}"), changed(PRUNE, out="{}"),
    changed(PRUNE, by="{}"), changed(CAPTURE, out="{}"), changed(CAPTURE, data="{}"), changed(CAPTURE, model="{}"),
    changed(TRAIN, rows="{}"), changed(TRAIN, out="{}"), changed(TRAIN, set="start={}"), changed(TRAIN, config="{}"),
    changed(CLASSIFY, sae="{}"), changed(CLASSIFY, data="{}"), changed(CLASSIFY, out="{}"),
    changed(CLASSIFY, set="cache={}"), changed(TRANSFER, out="{}"), changed(ACTIONS, out="{}"),
    changed(ACTIONS, task="{}"), ("predict", "{}", "x"), ("report", "{}"), ("convert", "{}", "o"),
    ("convert", "sae", "{}"),
    ("verify", "{}", *TEXTS), ("classify", "--summary", "{}"), ("demo", "--out", "{}"),
    ("demo", "--out", "o", "--data", "{}"), changed(CAPTURE, set="chat_template={}"), changed(TRANSFER, to_model="{}"),
    ("transfer", *TEXTS, "--sae", "sae", "--to", "sae1", "--to-model", "{}", "--out", "o"),
    ("explain", "sae", *TEXTS, "--null", "{}", "--out", "o"), (*EVALUATE, "--data", "{}"), (*COMPARE, "--data", "{}"),
    (*PROGRESSIVE, "--data", "{}"), changed(PRUNE, data="{}"),
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("call", IN_CALLS, ids=" ".join)
def test_a_path_that_no_system_can_have_is_refused(call, odd, place, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.chdir(place)
        status = app.run([each.replace("{}", ODD[odd]) for each in call])
    out, err = capsys.readouterr()
    is_there = (place / "o").exists()
    shutil.rmtree(place / "o", ignore_errors=True)
    assert (status, out) == (2, ""), err
    assert "Unexpected" not in err
    assert not is_there
