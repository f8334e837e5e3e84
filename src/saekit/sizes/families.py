"""The SAEs of a run by architecture: which are pruned, which are nested, which were trained separately."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..sae.model import SAE
from ..sae.naming import named_saes, training_config
from ..settings import is_whole
from .size_curve import default_sizes

NESTED = "matryoshka"
"""The architecture whose prefixes are trained."""


@dataclass(frozen=True)
class Family:
    """The SAEs of one architecture."""

    arch: str
    widest: dict[str, SAE]
    """To be pruned (or measured at their prefixes), one per seed."""
    separate: dict[int, dict[int, SAE]]
    """By seed, then size; empty for nested ones and where there is one size only."""

    @property
    def is_nested(self) -> bool:
        """Return whether prefixes of these SAEs were trained."""
        return self.arch == NESTED

    def sizes(self) -> set[int]:
        """Return the sizes that were trained, as prefixes or separately."""
        found = {size for trained in self.separate.values() for size in trained}
        for sae in self.widest.values() if self.is_nested else ():
            parts = [sae.n_latents // part for part in (8, 4, 2, 1)]
            found |= {size for size in training_config(sae).get("sizes") or parts if size >= 1}
        return found


def name_saes(saes: Any) -> dict[str, SAE]:
    """Return the SAEs that are no controls, each with a name of its own.

    Raises
    ------
    ConfigError
        There is none, or they have different widths.
    """
    named = dict(saes) if isinstance(saes, Mapping) else dict(named_saes(saes, "progressive"))
    named = {name: sae for name, sae in named.items() if not training_config(sae).get("control")}
    if not named:
        raise ConfigError("progressive: at least one SAE that is no control must be given; got none.")
    widths = {sae.d_in for sae in named.values()}
    if len(widths) > 1:
        raise ConfigError(f"progressive: all SAEs must have one width; they have {sorted(widths)}. Compare them apart.")
    return named


def arch_of(sae: SAE) -> str:
    """Return the architecture that an SAE was trained as."""
    return str(training_config(sae).get("arch") or sae.rule.name)


def seed_of(sae: SAE) -> int:
    """Return the random seed of the training; 0 where it is not known."""
    seed = sae.provenance.get("seed")
    return seed if isinstance(seed, int) else 0


def families_of(named: Mapping[str, SAE]) -> list[Family]:
    """Return the SAEs by architecture.

    Raises
    ------
    ConfigError
        Two SAEs of one architecture and size have the same seed.
    """
    _check_seeds(named)
    return [
        _family(arch, {name: sae for name, sae in named.items() if arch_of(sae) == arch})
        for arch in sorted({arch_of(sae) for sae in named.values()})
    ]


def _check_seeds(named: Mapping[str, SAE]) -> None:
    known: dict[tuple[str, int, int], str] = {}
    for name, sae in named.items():
        other = known.setdefault((arch_of(sae), sae.n_latents, seed_of(sae)), name)
        if other != name:
            raise ConfigError(
                f"progressive: SAEs of one architecture and size must differ in their seed, over which they are "
                f"averaged; `{other}` and `{name}` do not. Compare different settings apart."
            )


def _family(arch: str, saes: Mapping[str, SAE]) -> Family:
    sizes = {sae.n_latents for sae in saes.values()}
    family = Family(arch, {name: sae for name, sae in saes.items() if sae.n_latents == max(sizes)}, {})
    if not family.is_nested and len(sizes) > 1:
        for sae in saes.values():
            family.separate.setdefault(seed_of(sae), {})[sae.n_latents] = sae
    return family


def sizes_of(sizes: Sequence[int] | None, families: Sequence[Family]) -> list[int]:
    """Return the sizes to compare: those that are wanted, else those that were trained.

    Raises
    ------
    ConfigError
        Sizes that do not increase, or that no SAE has.
    """
    most = max(sae.n_latents for family in families for sae in family.widest.values())
    if sizes is None:
        return sorted(set().union(*(family.sizes() for family in families))) or default_sizes(most)
    wanted = list(sizes)
    if not wanted or wanted != sorted(set(wanted)) or not all(is_whole(each) and 1 <= each <= most for each in wanted):
        raise ConfigError(
            f"progressive: `sizes` must be increasing whole numbers within 1..{most}, the widest SAE; got {wanted}."
        )
    return wanted
