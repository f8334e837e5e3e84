"""What is asked for: poolings that exist, and a hook that is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fixtures.pooling_checks import random_sae
from saekit.errors import ConfigError, ModelError
from saekit.rows.pooling import Ask, pool_batches, pool_texts


@pytest.mark.parametrize(
    ("pools", "sae", "message"),
    [
        (("sums",), True, "`pool` must be a pooling of codes.*got 'sums'.*Did you mean `sum`"),
        (("top",), True, "`top` needs a number: `top5`"),
        (("top0",), True, "got 'top0'"),
        (("sum", 3), True, "got 3"),
        (("count",), False, "pooling of hidden states.*got 'count'"),
        (("top5",), False, "pooling of hidden states"),
        ((), True, "at least one pooling"),
    ],
)
def test_unknown_poolings(pools: Any, sae: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ask(pools, random_sae() if sae else None, layer=0)


def test_bad_asks(models: Any, texts: list[str]) -> None:
    lm = models["llama"]
    with pytest.raises(ConfigError, match="at most one of `layer` and `hook`"):
        Ask(("sum",), layer=1, hook="layers.1")
    with pytest.raises(ConfigError, match=r"`layer` or `hook` must say where.*the SAE does not say where in the model"):
        pool_texts(lm, texts, [Ask(("sum",), random_sae())])
    with pytest.raises(ConfigError, match=r"where the rows come from; got neither\."):
        pool_texts(lm, texts, [Ask(("sum",))])
    with pytest.raises(ConfigError, match="at least one ask"):
        pool_texts(lm, texts, [])
    with pytest.raises(ModelError, match="`layer` must lie between 0 and 2"):
        pool_texts(lm, texts, [Ask(("sum",), layer=7)])
    with pytest.raises(ConfigError, match="activations must be given for the hook `b`"):
        pool_batches([({"a": torch.ones(1, 2)}, torch.tensor([0]))], 1, [Ask(("sum",), hook="b")])
