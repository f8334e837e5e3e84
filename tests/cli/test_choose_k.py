"""``saekit train --k auto``: the curve, the rows that are left, resuming, refusals."""

from __future__ import annotations

import json


def test_the_command_chooses_and_trains_on_what_is_left(call, tmp_path):
    address = "synthetic:d_in=24,n_features=16,l0=3,power=0,parting=100,n_rows=40000"
    asked = (
        "train", "--rows", address, "--arch", "topk", "--latents", "16", "--k", "auto", "--tokens", "20000",
        "--batch-rows", "64", "--set", "k_choice.ks=[1,3,8]", "--set", "k_choice.share=0.6", "--out", "run", "--json",
    )  # fmt: skip
    status, out, err = call(*asked)
    assert status == 0, err
    assert "lowest at k = 3" in err
    assert json.loads(out)["saes"][0]["sae"] == "run/topk-16-k3-seed0"
    assert json.loads(out)["rows"] == 8_000 // 64 * 64
    status, again, _ = call(*asked, "--resume")
    assert (status, again) == (0, out)


def test_calls_that_cannot_choose_are_refused(call):
    rows = ("--rows", "synthetic:d_in=24,n_features=16,n_rows=40000", "--latents", "16", "--out", "run")
    for arguments, said in (
        (("--arch", "topk,batchtopk", "--k", "auto"), "one architecture"),
        (("--arch", "relu", "--k", "auto"), "must have a k"),
        (("--arch", "topk", "--k", "some"), "whole number, or `auto`"),
        (("--arch", "topk", "--k", "3", "--set", "k_choice.seeds=3"), "about --k auto"),
        (("--arch", "topk", "--k", "auto", "--set", "config.k=3"), "both came"),
    ):
        status, _, err = call("train", *rows, *arguments)
        assert status == 2
        assert said in err
