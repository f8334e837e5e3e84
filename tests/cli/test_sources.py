"""``saekit sources``: train on joined rows and on their null, compare, report; refusals."""

from __future__ import annotations

import json

import numpy as np


def test_a_crosscoder_is_trained_and_its_sources_are_compared(call, tmp_path):
    draw = np.random.default_rng(0)
    codes = np.maximum(draw.normal(size=(2000, 8)), 0)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", (codes @ draw.normal(size=(8, 6))).astype(np.float32))
    for kind, out in (("joined", "run"), ("joined-null", "null")):
        status, _, err = call(
            "train", "--rows", f"{kind}:base=a.npy,tuned=b.npy", "--arch", "batchtopk", "--latents", "16", "--k", "3",
            "--out", out,
        )  # fmt: skip
        assert status == 0, err
    name = "batchtopk-16-k3-seed0"
    asked = ("sources", f"run/{name}", "--rows", "joined:base=a.npy,tuned=b.npy", "--null", f"null/{name}")
    status, out, err = call(*asked, "--out", "run", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["sources"] == ["base", "tuned"]
    assert set(found["null"]["specific"]) == {"base", "tuned"}
    status, out, _ = call(*asked)
    assert status == 0
    assert "specific to base" in out
    evaluated = ("evaluate", f"run/{name}", "--rows", "joined:base=a.npy,tuned=b.npy")
    status, out, err = call(*evaluated, "--out", "run", "--json")
    assert status == 0, err
    assert json.loads(out)["entries"][0]["sources"]["tuned"]["fvu"]["value"] < 1
    assert "tuned: fvu" in call(*evaluated)[1]
    status, _, err = call("report", "run")
    assert status == 0, err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Which latents belong to which source" in page
    assert "Each source of the rows" in page
    status, _, err = call("sources", f"run/{name}", "--rows", "a.npy")
    assert (status, "must have the width" in err) == (2, True)
    status, _, err = call(*asked, "--set", "error_limit=true")  # a setting without a flag
    assert (status, "`error_limit` (--set error_limit=…) must be a number; got True" in err) == (2, True), err
