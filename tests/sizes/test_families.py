"""SAEs of a run by architecture, and the sizes that they have."""

from __future__ import annotations

import pytest

from fixtures.known_saes import random_sae
from saekit.errors import ConfigError
from saekit.sae.model import SAE
from saekit.sizes.families import arch_of, families_of, name_saes, seed_of, sizes_of


def trained(arch: str, n: int, seed: int, **config: object) -> SAE:
    return random_sae(n=n).replace(provenance={"config": {"arch": arch, **config}, "seed": seed})


def test_the_widest_are_pruned_and_all_sizes_are_separate_ones():
    saes = [trained("topk", n, seed) for n in (8, 24) for seed in (0, 1)]
    nested = trained("matryoshka", 24, 0, sizes=[6, 24])
    nest, topk = families_of(name_saes([*saes, nested, trained("topk", 24, 2, control="frozen-decoder")]))
    assert (nest.arch, nest.is_nested, nest.separate) == ("matryoshka", True, {})
    assert list(topk.widest) == ["topk-24-k4-seed0", "topk-24-k4-seed1"]
    assert {seed: sorted(found) for seed, found in topk.separate.items()} == {0: [8, 24], 1: [8, 24]}
    assert sizes_of(None, [nest, topk]) == [6, 8, 24]
    assert sizes_of([3, 5], [topk]) == [3, 5]


def test_one_size_is_not_separate_and_gets_default_sizes():
    (family,) = families_of(name_saes(trained("relu", 24, 0)))
    assert family.separate == {}
    assert sizes_of(None, [family]) == [1, 3, 6, 12, 24]


def test_a_nested_sae_that_does_not_know_its_sizes_gets_halves():
    assert families_of(name_saes(trained("matryoshka", 24, 0)))[0].sizes() == {3, 6, 12, 24}


def test_names_are_unique_and_a_run_stands_for_its_saes(tmp_path):
    for seed in (0, 1):
        trained("topk", 24, seed).save(tmp_path / f"seed{seed}")
    named = name_saes([tmp_path, tmp_path / "seed1"])
    assert list(named) == ["seed0", "seed1", "seed1 (2)"]
    assert [seed_of(sae) for sae in named.values()] == [0, 1, 1]


def test_what_nothing_is_known_about():
    assert (arch_of(random_sae("jumprelu")), seed_of(random_sae())) == ("jumprelu", 0)


def test_two_of_one_seed():
    with pytest.raises(ConfigError, match=r"must differ in their seed.*`a` and `b` do not"):
        families_of({"a": trained("topk", 24, 0), "b": trained("topk", 24, 0)})
