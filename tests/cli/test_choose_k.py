"""``saekit train --k auto``: the curve, the run that follows, resuming, refusals."""

from __future__ import annotations

import json

import torch

from saekit import SAE


def test_the_command_chooses_and_is_then_the_run_with_that_k(call):
    address = "synthetic:d_in=24,n_features=16,l0=3,power=0,parting=100,n_rows=40000"
    run = (
        "train", "--rows", address, "--arch", "topk", "--latents", "16", "--tokens", "20000", "--batch-rows", "64",
        "--json",
    )  # fmt: skip
    choice = ("--k", "auto", "--set", "k_choice.ks=[1,3,8]", "--set", "k_choice.share=0.6", "--out", "run")
    status, out, err = call(*run, *choice)
    assert status == 0, err
    assert "lowest at k = 3" in err
    assert json.loads(out)["saes"][0]["sae"] == "run/topk-16-k3-seed0"
    assert json.loads(out)["k_choice"] == {"k": 3, "rows_used": 12_000, "n_saes": 6}
    status, given, err = call(*run, "--k", "3", "--out", "given")
    assert status == 0, err
    assert json.loads(out)["rows"] == json.loads(given)["rows"] == 20_000 // 64 * 64
    of_auto, of_given = (SAE.load(f"{folder}/topk-16-k3-seed0").tensors() for folder in ("run", "given"))
    assert of_auto.keys() == of_given.keys()
    assert all(torch.equal(tensor, of_given[name]) for name, tensor in of_auto.items())
    status, again, _ = call(*run, *choice, "--resume")
    assert (status, again) == (0, out)


def test_calls_that_cannot_choose_are_refused(call):
    rows = ("--rows", "synthetic:d_in=24,n_features=16,n_rows=40000", "--latents", "16", "--out", "run")
    for arguments, said in (
        (("--arch", "topk,batchtopk", "--k", "auto"), "one architecture"),
        (("--arch", "relu", "--k", "auto"), "must have a k"),
        (("--arch", "topk", "--k", "some"), "whole number, or `auto`"),
        (("--arch", "topk", "--k", "3", "--set", "k_choice.seeds=3"), "about --k auto"),
        (("--arch", "topk", "--k", "auto", "--set", "config.k=3"), "both came"),
        (("--arch", "topk", "--k", "auto", "--latents", "1"), "must leave three or more k to try"),
        (("--arch", "topk", "--k", "auto", "--latents", "3"), "must leave three or more k to try"),
    ):
        status, _, err = call("train", *rows, *arguments)
        assert status == 2
        assert said in err
