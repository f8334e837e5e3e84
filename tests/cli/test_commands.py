"""The commands from end to end, in one process: what they print where, what they leave, how they fail."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from saekit import SAE, files
from saekit.cli import app
from saekit.rows.synthetic import SyntheticRows
from saekit.sae.rules import TopKRule
from saekit.store.native import save

WIDTH = 12


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.npy"
    source = SyntheticRows(d_in=WIDTH, n_features=24, n_rows=2048, seed=0)
    np.save(path, next(iter(source.batches(2048))).x.numpy())
    return path


@pytest.fixture
def sae_folder(tmp_path) -> Path:
    g = torch.Generator().manual_seed(0)
    sae = SAE(
        W_enc=torch.randn(32, WIDTH, generator=g), b_enc=torch.zeros(32), W_dec=torch.randn(32, WIDTH, generator=g),
        b_dec=torch.zeros(WIDTH), rule=TopKRule(4), provenance={"model": "m", "hook": "layers.2", "seed": 7},
    )  # fmt: skip
    return save(sae, tmp_path / "sae")


TRAIN = ("--arch", "topk", "--latents", 32, "--k", 4, "--set", "batch_rows=256")


# ------------------------------------------------------------------ the way through


def test_train_evaluate_report(call, rows):
    status, out, err = call("train", "--rows", rows, *TRAIN, "--seeds", "0,1", "--out", "run")
    assert status == 0, err
    assert "run/topk-32-k4-seed1" in out
    assert "train: 2,048 in" in err
    assert "rows/s" in err
    for seed in (0, 1):
        assert Path(f"run/topk-32-k4-seed{seed}/sae.json").is_file()
    assert Path("run/run.json").is_file()
    assert Path("run/log.jsonl").is_file()

    status, out, err = call("evaluate", "run", "--rows", rows, "--out", "run")
    assert status == 0, err
    assert out.splitlines()[0].split()[:3] == ["fvu", "l0", "dead"]
    assert "topk-32-k4-seed0" in out
    assert "untrained" in out
    assert "pca" in out

    status, out, err = call("report", "run")
    assert (status, out.strip()) == (0, "run/report.html")
    page = Path("run/report.html").read_text()
    assert "Fidelity" in page
    assert "Training" in page


def test_compare_and_its_report(call, rows, sae_folder, tmp_path):
    sae = SAE.load(sae_folder)
    for seed in (1, 2):
        save(sae.permute(torch.arange(31, -1, -1)).replace(provenance={"seed": seed}), tmp_path / f"more/seed{seed}")
    status, out, err = call("compare", sae_folder, "more", "--rows", rows, "--out", "out")
    assert status == 0, err
    lines = [line.split()[:4] for line in out.splitlines()]
    assert lines[0][:3] == ["shared", "equal", "PW-MCC"]
    assert lines[2][:3] == ["3", "pairs", "1.00"]
    assert "random" in out
    assert "both cosines > 0.7" in out
    assert "match: 10 in" in err
    figures = ("cosines", "decoder-encoder", "in-exactly", "donut", "frequency")
    names = {f"comparison-{name}.{ending}" for name in figures
             for ending in ("svg", "png")}  # fmt: skip
    assert {path.name for path in Path("out").iterdir()} == names | {"comparison.json"}
    assert Path("out/comparison-cosines.png").read_bytes().startswith(b"\x89PNG")

    assert call("report", "out")[0] == 0
    page = Path("out/report.html").read_text()
    assert "Which latents SAEs share" in page
    assert "↳ permuted" in page

    status, _, err = call("compare", "more", "--along")
    assert status == 2
    assert "must hold snapshots of its SAEs; it holds none. Train with --snapshots 4" in " ".join(err.split())

    status, out, err = call("compare", "more", "--threshold", "1.0", "--no-controls", "--json")
    assert (status, err) == (0, "")
    value = json.loads(out)
    assert value["equal"]["value"] == 1
    assert value["shared_null"] is None
    assert value["settings"]["threshold"] == 1.0


def test_stability_is_written_and_orphans_are_measured(call, rows, tmp_path):
    status, _, err = call("train", "--rows", rows, *TRAIN, "--seeds", "0,1,2", "--out", "run")
    assert status == 0, err
    options = ("--threshold", "0.3", "--no-controls")
    status, out, err = call("compare", "run", *options, "--write", "--orphans", "--rows", rows, "--out", "run")
    assert status == 0, err
    assert "detection" not in out
    assert "orphans and" in out
    assert "prune SAE --by stability" in err
    status, out, _ = call("report", "run")
    assert status == 0
    assert "What orphans are" in Path("run/report.html").read_text()

    two = ("run/topk-32-k4-seed0", "run/topk-32-k4-seed1", "--no-controls", "--out", "run")
    status, _, err = call("compare", "run", *options, "--out", "run")
    assert status == 0, err
    assert Path("run/orphans.json").is_file()  # the same SAEs: it still holds
    before = Path("run/comparison.json").read_bytes()
    status, _, err = call("compare", *two)
    assert status == 0, err
    assert not Path("run/orphans.json").exists()
    assert "measured on other SAEs" in err
    Path("run/comparison.json").write_bytes(before)

    first = Path("run/topk-32-k4-seed0")
    stored = SAE.load(first).scores["stability"]
    assert stored.tolist() == pytest.approx(json.loads(Path("run/comparison.json").read_text())["saes"][0]["stability"])
    status, out, _ = call("show", first)
    assert "scores" in out
    assert "alignment, alignment_self, stability" in out
    assert "compared_with  topk-32-k4-seed1, topk-32-k4-seed2" in out
    options = ("--rows", rows, "--sizes", "8", "--set", "intervals=false", "--set", "sample_rows=60")
    status, out, err = call("prune", first, "--by", "stability", *options, "--out", "small")
    assert status == 0, err
    assert SAE.load("small/8").scores["stability"].tolist() == stored.sort(descending=True).values[:8].tolist()
    status, _, err = call("prune", first, "--by", "stabilty", *options, "--out", "again")
    assert status == 2
    assert "Did you mean `stability`" in err


def test_orphans_of_copies_are_none(call, rows, sae_folder):
    save(SAE.load(sae_folder), "copy")
    status, out, err = call("compare", sae_folder, "copy", "--orphans", "--rows", rows, "--no-controls")
    assert status == 0, err
    assert "needs at least 2 orphans" in out + err


def test_compare_takes_two(call, sae_folder):
    status, out, err = call("compare", sae_folder)
    assert (status, out) == (2, "")
    assert "at least two SAEs must be given" in err


def test_json_is_one_object_and_all_there_is(call, rows, sae_folder):
    commands = [
        ("train", "--rows", rows, *TRAIN, "--out", "run"),
        ("evaluate", sae_folder, "--rows", rows),
        ("evaluate", sae_folder, "--rows", rows, "--no-controls"),
        ("show", sae_folder),
        ("show", sae_folder, sae_folder),
        ("report", "run"),
    ]
    values = []
    for command in commands:
        status, out, err = call(*command, "--json")
        assert status == 0, err
        assert out.count("\n") == 1
        assert err == ""
        values.append(json.loads(out))
    assert values[0]["saes"][0]["sae"] == "run/topk-32-k4-seed0"
    assert values[1]["metrics"]["fvu"]["value"] > 0
    assert values[1]["metrics"]["fvu"].keys() >= {"value", "low", "high", "unit"}
    assert values[1]["entries"][0]["controls"].keys() == {"untrained", "pca"}
    assert values[2]["entries"][0]["controls"] == {}
    assert values[3]["n_latents"] == 32
    assert len(values[4]["saes"]) == 2


def test_the_same_run_from_a_file(call, rows, tmp_path):
    (tmp_path / "run.toml").write_text(
        f'rows = "{rows}"\nout = "a"\nseeds = [3]\nbatch_rows = 256\n[config]\nlatents = 32\n'
        "[[configs]]\narch = 'topk'\nk = 4\n[[configs]]\narch = 'relu'\ntarget_l0 = 4\n"
    )
    status, _, err = call("train", "--config", "run.toml", "--set", "config.lr=2e-3")
    assert status == 0, err
    status, _, err = call(
        "train", "--rows", rows, "--arch", "topk,relu", "--latents", 32, "--k", 4, "--seeds", 3, "--out", "b",
        "--set", "batch_rows=256", "--set", "config.lr=2e-3",
    )  # fmt: skip
    assert status == 0, err
    names = sorted(path.parent.name for path in Path("a").glob("*/sae.json"))
    assert names == sorted(path.parent.name for path in Path("b").glob("*/sae.json"))
    assert len(names) == 2
    for name in names:
        left, right = (SAE.load(Path(folder) / name) for folder in "ab")
        assert torch.equal(left.W_dec, right.W_dec)
        assert left.provenance["config"]["lr"] == 2e-3


def test_resume_of_a_finished_run_reads_it_back(call, rows):
    arguments = ("train", "--rows", rows, *TRAIN, "--out", "run")
    status, _, err = call(*arguments, "--resume")
    assert status == 0
    assert "there is no run in run to continue: a new one begins" in err
    before = Path("run/topk-32-k4-seed0/sae.safetensors").read_bytes()
    status, _, err = call(*arguments)
    assert status == 2
    assert "--resume" in err
    status, out, err = call(*arguments, "--resume")
    assert status == 0
    assert "a new one begins" not in err
    assert "topk-32-k4-seed0" in out
    assert Path("run/topk-32-k4-seed0/sae.safetensors").read_bytes() == before


def test_capture_then_train_on_a_language_model(call):
    model = ("--model", "builtin", "--data", "builtin")
    status, out, err = call("capture", *model, "--layer", 2, "--tokens", 3000, "--out", "rows", "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert (facts["n_rows"], facts["model"], facts["hook"]) == (3000, "builtin", "layers.2")
    status, _, err = call("train", "--rows", "rows", *TRAIN, "--out", "run")
    assert status == 0, err
    status, out, err = call("evaluate", "run", *model, "--tokens", 500, "--set", "max_rows=1000", "--json")
    assert status == 0, err
    metrics = json.loads(out)["metrics"]
    assert {"fvu", "l0", "dead_fraction", "ce_clean", "ce_sae", "ce_recovered_zero", "ce_recovered_mean"} <= set(
        metrics
    )
    status, _, err = call("train", *model, "--layer", 2, "--tokens", 2048, *TRAIN, "--out", "run2")
    assert status == 0, err
    provenance = json.loads(call("show", "run2", "--json")[1])["provenance"]
    assert provenance["hook"] == "layers.2"


def test_several_layers_are_trained_in_one_command(call, tmp_path):
    model = ("--model", "builtin", "--data", "builtin", "--set", "stream.block_tokens=2048")
    status, out, err = call("train", *model, "--layers", "0,2", "--tokens", 2048, *TRAIN, "--out", "run", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [Path(each["sae"]).parent.name for each in found["saes"]] == ["layers.0", "layers.2"]
    assert found["out"] == "run"
    assert [SAE.load(each["sae"]).provenance["layer"] for each in found["saes"]] == [0, 2]


def test_show_tells_what_is_in_a_file(call, sae_folder):
    status, out, err = call("show", sae_folder)
    assert (status, err) == (0, "")
    assert "topk(k=4)" in out
    assert "layers.2" in out


def test_show_takes_a_whole_run(call, sae_folder, tmp_path):
    shutil.copytree(sae_folder, tmp_path / "run" / "a")
    shutil.copytree(sae_folder, tmp_path / "run" / "b")
    status, out, _ = call("show", "run")
    assert status == 0
    assert "run/a" in out
    assert "run/b" in out


def test_version_and_help(call):
    assert call("--version")[1].startswith("saekit 0.")
    for command in ("capture", "train", "evaluate", "show", "report", "demo"):
        status, out, _ = call(command, "--help")
        assert status == 0
        assert f"saekit {command} " in out
        assert "--json" in out


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "No such command"),
        (("train", "--latents", "many"), "Invalid value"),
        (("train", "--nope"), "No such option"),
        (("show",), "Missing argument"),
        (("train", "--arch", "topk", "--latents", 8, "--k", 2), "`--out` must be given"),
        (("train", "--rows", "R", "--out", "o"), "architectures must come from --arch .* neither came"),
        (("train", "--rows", "R", "--out", "o", "--arch", "topkk", "--latents", 8), "Did you mean `topk`"),
        (("train", "--rows", "R", "--out", "o", "--arch", "topk"), "--latents must be given"),
        (("train", "--rows", "R", "--out", "o", "--arch", "topk", "--latents", 8), r"`TopK.k` must be given"),
        (("train", "--rows", "R", "--out", "o", "--arch", "topk", "--latents", 8, "--k", 9), "at most n_latents=8"),
        (("train", "--out", "o", *TRAIN), "must come from --rows or from --model"),
        (("train", "--rows", "R", "--data", "D", "--out", "o", *TRAIN), "`--data` are about --model"),
        (("train", "--model", "M", "--out", "o", *TRAIN), "`--data` must be given with --model"),
        (("train", "--model", "M", "--data", "D", "--out", "o", *TRAIN), "exactly one of --layer, --layers and --hook"),
        (("train", "--rows", "R", "--out", "o", *TRAIN, "--seeds", "a"), "--seeds must be whole numbers"),
        (("train", "--rows", "R", "--out", "o", *TRAIN, "--set", "batchrows=3"), "Did you mean `batch_rows`"),
        (
            (
                "train", "--rows", "R", "--out", "o", "--arch", "matryoshka", "--latents", 8, "--k", 2,
                "--set", "config.sizes=[4,2,8]",
            ),
            "must increase",
        ),
        (("capture", "--model", "M"), "`--data`, `--out` must be given"),
        (("capture", "--model", "M", "--data", "D", "--out", "o", "--layers", "1,x"), "--layers must be whole"),
        (("train", "--model", "M", "--data", "D", "--layers", "1,x", "--out", "o", *TRAIN), "--layers must be whole"),
        (("train", "--rows", "R", "--layers", "1", "--out", "o", *TRAIN), "`--layers` are about --model"),
        (("capture", "--model", "M", "--data", "D", "--out", "o"), "exactly one of --layer, --layers and --hook"),
        (("evaluate", "S"), "either --rows, or --model and --data"),
        (("show", "nowhere"), "does not exist"),
        (("report", "nowhere"), "is not a folder"),
    ],
)  # fmt: skip
def test_a_wrong_call_ends_with_2_and_writes_nothing(call, tmp_path, arguments, message):
    status, out, err = call(*arguments)
    assert status == 2, (out, err)
    assert out == ""
    assert re.search(message, " ".join(err.split())), err
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_settings_contradict_the_options(call, tmp_path):
    (tmp_path / "run.toml").write_text("rows = 'R'\nout = 'o'\n[[configs]]\narch = 'topk'\nlatents = 8\nk = 2\n")
    status, _, err = call("train", "--config", "run.toml", "--arch", "topk", "--latents", 8, "--k", 2)
    assert (status, "both came" in err) == (2, True)
    status, _, err = call("train", "--config", "run.toml", "--latents", 8)
    assert (status, "go with --arch" in err) == (2, True)


def test_width_of_another_model(call, sae_folder, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((64, WIDTH + 1), np.float32))
    status, _, err = call("evaluate", sae_folder, "--rows", "wide.npy")
    assert status == 2
    assert str(WIDTH + 1) in err


def test_rows_with_nan_end_with_1(call, rows):
    x = np.load(rows)
    x[100, 3] = np.nan
    np.save(rows, x)
    status, _, err = call("train", "--rows", rows, *TRAIN, "--out", "run")
    assert status == 1
    assert "row 100 of `rows.npy` has nan" in err


def test_altered_weights_end_with_1(call, rows, sae_folder):
    data = bytearray((sae_folder / "sae.safetensors").read_bytes())
    data[-1] ^= 1
    (sae_folder / "sae.safetensors").write_bytes(data)
    status, out, err = call("evaluate", sae_folder, "--rows", rows)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "altered or damaged" in err


def test_no_network_says_so_and_names_the_offline_way(call):
    status, _, err = call("capture", "--model", "nobody/nothing", "--data", "builtin", "--layer", 0, "--out", "rows")
    assert status == 1
    assert "local" in err or "folder" in err


def test_hook_that_does_not_exist_lists_near_ones(call):
    status, _, err = call(
        "capture", "--model", "builtin", "--data", "builtin", "--hook", "layers.2.mpl", "--out", "rows"
    )
    assert status == 2
    assert "layers.2.mlp" in err


def test_a_column_that_is_not_there(call, tmp_path):
    (tmp_path / "texts.csv").write_text("body,label\nhello,1\n")
    status, _, err = call(
        "capture", "--model", "builtin", "--data", "texts.csv", "--text", "bodi", "--layer", 1, "--out", "rows"
    )
    assert status == 2
    assert "`body`" in err


def test_a_full_disk_is_told_in_one_line(call, rows, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "run/x")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        status, _, err = call("train", "--rows", rows, *TRAIN, "--out", "run")
    assert status == 1
    assert "No space left on device" in err


def test_an_out_that_is_a_file_is_refused_before_anything_is_read(call, tmp_path):
    (tmp_path / "file").touch()
    for command in (("evaluate", "nothing"), ("train", *TRAIN), ("prune", "nothing", "--sizes", "8")):
        status, _, err = call(*command, "--out", "file")
        assert (status, "`file` must be a folder; a file is there" in err) == (2, True)


def test_an_unforeseen_error_points_to_debug(call, sae_folder, monkeypatch):
    def broken(path):
        raise KeyError("odd")

    with monkeypatch.context() as patch:
        patch.setattr("saekit.store.native.describe", broken)
        status, _, err = call("show", sae_folder)
        assert status == 1
        assert "--debug" in err
        with pytest.raises(KeyError, match="odd"):
            app.run(["show", str(sae_folder), "--debug"])


def test_two_runs_in_one_folder(call, rows, tmp_path):
    with files.locked_folder(tmp_path / "run"):
        status, _, err = call("train", "--rows", rows, *TRAIN, "--out", "run")
    assert status == 1
    assert "in use by another run" in err
