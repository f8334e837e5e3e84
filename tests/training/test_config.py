import dataclasses

import pytest

from saekit.errors import ConfigError
from saekit.training.config import (
    BatchTopK,
    Config,
    Gated,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    PAnneal,
    ReLU,
    TopK,
    hierarchical_levels,
    matryoshka_selection,
    matryoshka_sizes,
)

EXAMPLES = [
    TopK(64, k=4, multi_topk=0.125),
    BatchTopK(64, k=4, control="frozen-decoder"),
    JumpReLU(64, target_l0=4),
    ReLU(64, l1=3.0),
    Gated(64, target_l0=8),
    PAnneal(64, p_end=0.5),
    Matryoshka(64, k=4, sizes=(16, 64), weights=(1.0, 2.0), over="batchtopk"),
    HierarchicalTopK(64, k=12, levels=(3, 12), weights=(1.0, 2.0)),
]


def test_configs_are_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TopK(8, k=2).k = 3
    with pytest.raises(TypeError):
        TopK(8, 2)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: TopK(8, k=9), r"`TopK.k` must be at most n_latents=8; got k=9"),
        (lambda: TopK(8, k=0), r"`TopK.k` must be a whole number of at least 1; got 0"),
        (lambda: TopK(0, k=1), r"`TopK.n_latents` must be"),
        (lambda: TopK(8, k=True), r"`TopK.k`"),
        (lambda: TopK(8, k=2, lr=-1.0), r"`TopK.lr` must be a positive number or None; got -1.0"),
        (lambda: TopK(8, k=2, lr=float("nan")), r"`TopK.lr`"),
        (lambda: TopK(8, k=2, betas=(0.9, 1.0)), r"`TopK.betas` must be two numbers in \[0, 1\)"),
        (lambda: TopK(8, k=2, warmup_steps=-1), r"`TopK.warmup_steps`"),
        (lambda: TopK(8, k=2, decay_fraction=1.5), r"`TopK.decay_fraction` must be a number in \[0, 1\]"),
        (lambda: TopK(8, k=2, clip=0), r"`TopK.clip`"),
        (lambda: TopK(8, k=2, dead_after_rows=0), r"`TopK.dead_after_rows`"),
        (lambda: TopK(8, k=2, bias="median"), r"`TopK.bias` must be one of 'geometric-median', 'mean', 'zero'; got 'median'"),  # noqa: E501
        (lambda: TopK(8, k=2, scaling="standardize"), r"`TopK.scaling` must be one of"),
        (lambda: TopK(8, k=2, control="random"), r"`TopK.control` must be one of"),
        (lambda: TopK(8, k=2, aux_coefficient=-0.1), r"`TopK.aux_coefficient`"),
        (lambda: TopK(8, k=2, k_aux=0), r"`TopK.k_aux`"),
        (lambda: TopK(8, k=2, multi_topk=-1), r"`TopK.multi_topk`"),
        (lambda: JumpReLU(8, target_l0=9), r"`JumpReLU.target_l0` must be a positive number of latents per row, at most n_latents=8"),  # noqa: E501
        (lambda: JumpReLU(8, target_l0=None), r"`JumpReLU.target_l0`"),
        (lambda: JumpReLU(8, target_l0=2, bandwidth=0), r"`JumpReLU.bandwidth`"),
        (lambda: JumpReLU(8, target_l0=2, sparsity=-1), r"`JumpReLU.sparsity`"),
        (lambda: ReLU(8, l1=-1), r"`ReLU.l1`"),
        (lambda: ReLU(8, l1=0, target_l0=3), r"`ReLU.l1` must be positive with `target_l0`"),
        (lambda: Gated(8, target_l0=0), r"`Gated.target_l0`"),
        (lambda: Gated(8, resample=1), r"`Gated.resample` must be True or False"),
        (lambda: PAnneal(8, p_end=0), r"`PAnneal.p_end` must be a number in \(0, 1\]"),
        (lambda: PAnneal(8, p_start_fraction=1), r"`PAnneal.p_start_fraction`"),
        (lambda: PAnneal(8, p_updates=0), r"`PAnneal.p_updates`"),
        (lambda: Matryoshka(8, k=2, sizes=(4, 4, 8)), r"`Matryoshka.sizes` must increase and end at n_latents=8; got \[4, 4, 8\]"),  # noqa: E501
        (lambda: Matryoshka(8, k=2, sizes=(2, 4)), r"must increase and end at n_latents=8; got \[2, 4\]"),
        (lambda: Matryoshka(8, k=2, sizes=()), r"`Matryoshka.sizes` must increase"),
        (lambda: Matryoshka(8, k=2, sizes=(0, 8)), r"`Matryoshka.sizes` must increase"),
        (lambda: Matryoshka(8, k=2, sizes=(4, 8), weights=(1,)), r"`Matryoshka.weights` must be one number from 0 up for each of the 2 sizes"),  # noqa: E501
        (lambda: HierarchicalTopK(8, k=4, levels=(1, 2)), r"`HierarchicalTopK.levels` must increase and end at k=4; got \[1, 2\]"),  # noqa: E501
        (lambda: HierarchicalTopK(8, k=4, levels=(2, 2, 4)), r"`HierarchicalTopK.levels` must increase"),
        (lambda: HierarchicalTopK(8, k=4, levels=(0, 4)), r"`HierarchicalTopK.levels` must increase"),
        (lambda: HierarchicalTopK(8, k=4, levels=()), r"`HierarchicalTopK.levels` must increase"),
        (lambda: HierarchicalTopK(8, k=4, levels=(2, 4), weights=(0, 0)), r"`HierarchicalTopK.weights` must be one number from 0 up for each of the 2 levels"),  # noqa: E501
        (lambda: Matryoshka(8, k=2, over="relu"), r"`Matryoshka.over` must be one of"),
        (lambda: Matryoshka(8, k=2, k_per_size="half"), r"`Matryoshka.k_per_size` must be one of"),
        (lambda: Matryoshka(8, k=2, sampled=-1), r"`Matryoshka.sampled`"),
        (lambda: Matryoshka(8, k=2, sampled=2, sizes=(4, 8)), r"`Matryoshka.sampled` draws the sizes"),
        (lambda: Config(8), r"`Config` holds shared fields only"),
    ],
)  # fmt: skip
def test_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_matryoshka_defaults():
    assert matryoshka_sizes(Matryoshka(64, k=2)) == (8, 16, 32, 64)
    assert matryoshka_sizes(Matryoshka(2, k=1)) == (1, 2)
    assert matryoshka_selection(Matryoshka(64, k=2)) == "fixed"
    assert matryoshka_selection(Matryoshka(64, k=2, over="batchtopk")) == "truncated"


def test_hierarchical_defaults():
    assert hierarchical_levels(HierarchicalTopK(64, k=16)) == (1, 2, 4, 8, 16)
    assert hierarchical_levels(HierarchicalTopK(64, k=12)) == (1, 2, 4, 8, 12)
    assert hierarchical_levels(HierarchicalTopK(64, k=1)) == (1,)
