"""The result of a comparison: plain data, its table and its notebook view."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..errors import FormatError
from ..matching.matching import Certificate
from ..measure.intervals import no_intervals
from ..measure.results import Measured, Result
from ..settings import brief
from .concept_groups import Groups, SharingLaw, offset_verdict

FUNCTION_COLUMNS = ("partners", "exchanged partners", "at best")
"""What a table of what partners do says of each measure."""

FUNCTION_ROWS = {
    "FVU, partners' decoder rows": ("fvu_partners", "fvu_random", "fvu_own"),
    "cross-entropy, partners' decoder rows": ("ce_partners", "ce_random", "ce_own"),
    "same top rows": ("top_overlap", "top_overlap_random", ""),
    "fire together (cosine of codes)": ("coactivation", "coactivation_random", "coactivation_best"),
    "matched so by firing together, too": ("coactivation_agrees", "", ""),
    "ablation moves the model alike": ("fingerprint", "fingerprint_random", "fingerprint_ceiling"),
    "  of shared latents": ("fingerprint_shared", "", ""),
    "  of others": ("fingerprint_orphans", "", ""),
}
"""Measures of `saekit.comparison.function.FUNCTION` in the order of the table."""


@dataclass(frozen=True)
class Side:
    """The matching of the decoders, or of the encoders, of two SAEs."""

    __repr__ = brief

    partner: list[int] = field(repr=False)
    """Per latent of the first SAE: the latent of the second that it is matched with, -1 for none."""
    cosine: list[float | None] = field(repr=False)
    """Cosine of each pair, rounded to 6 decimals; None for none. Absolute where the codes of both SAEs have signs."""
    mean_cosine: Measured
    """Mean over the pairs."""
    max_cosine: Measured
    """Mean over both directions of the mean largest cosine with any latent of the other: no matching, larger."""
    max_absolute_cosine: Measured
    """The same with absolute cosines."""
    certificate: Certificate
    """Proof that no other one-to-one matching has a larger sum of cosines."""


@dataclass(frozen=True)
class OnRows:
    """How alike two SAEs act on the same rows."""

    __repr__ = brief

    correlation: Measured
    """Mean Pearson correlation of the codes of pairs (matched by decoder) of which both fire."""
    n_pairs: int
    """Pairs of which both fire on the rows seen."""
    cka: Measured
    """Linear CKA of the codes (debiased), over a sample of rows; it needs no matching."""
    rsa: Measured
    """Spearman correlation of the dissimilarities of codes between rows, over the same sample."""
    shared_alive: Measured | None = None
    """Shared pairs of which both fire on the rows, as a fraction of the latents that fire, in the SAE that has fewer of
    those. None in files of schema 1 and 2."""
    pw_mcc_alive: Measured | None = None
    """Mean cosine of pairs matched by decoder of which both fire. None in files of schema 1 to 4."""


@dataclass(frozen=True)
class Pair:
    """Two SAEs compared."""

    __repr__ = brief

    first: str
    """Name of one SAE."""
    second: str
    """Name of the other."""
    same_seed: bool
    """Whether both began from the same random weights (same seed and shape): what they share says nothing then."""
    shared: Measured
    """Fraction of latents whose partners agree on both sides with both cosines over the threshold."""
    aligned: Measured
    """Fraction of latents with both cosines over the threshold, whether or not the partners agree."""
    equal: Measured
    """Fraction of latents whose decoder and encoder partners agree, at any cosine."""
    decoder: Side
    """Matching of the decoder rows."""
    encoder: Side
    """Matching of the encoder rows, found independently."""
    on_rows: OnRows | None
    """What the two do on rows; None where none were given."""
    function: dict[str, Measured] = field(default_factory=dict, repr=False)
    """Whether partners do the same, on the rows and in a language model: `saekit.comparison.function.FUNCTION` says
    what each name means. Empty where no rows were given, and in files of schema 1 to 4."""

    def cells(self) -> list[str]:
        """Return the line of a table: names (* of SAEs that began alike), fractions and cosines."""
        mark = " *" if self.same_seed else ""
        sides = (self.decoder.mean_cosine, self.encoder.mean_cosine, self.decoder.max_cosine)
        return [f"{self.first} | {self.second}{mark}", *map(str, (self.shared, self.equal, *sides))]


@dataclass(frozen=True)
class Null:
    """The same quantities for dictionaries that have nothing in common: what chance gives."""

    __repr__ = brief

    made: str
    """How the two dictionaries were made."""
    shared: Measured
    equal: Measured
    mean_cosine: Measured
    max_cosine: Measured


@dataclass(frozen=True)
class AlongPoint:
    """What the SAEs of a run shared when they had seen so many rows."""

    __repr__ = brief

    rows_seen: int
    """Rows that they were trained on until then."""
    shared: Measured
    equal: Measured
    mean_cosine: Measured


@dataclass(frozen=True)
class Compared:
    """One of the SAEs, latent by latent."""

    __repr__ = brief

    name: str
    """What tables call it; unique within a comparison."""
    sae: dict[str, Any]
    """n_latents, d_in, rule, digest of all tensors, provenance."""
    found_in: list[int] = field(repr=False)
    """Per latent: the number of SAEs that have it, itself included."""
    stability: list[float] = field(repr=False)
    """Per latent: the fraction of the other SAEs that have it, the probability that another seed finds it. SAEs that
    began from the same random weights do not count where others exist."""
    alignment: list[float | None] = field(default_factory=list, repr=False)
    """Per latent: mean over those SAEs, and over decoder and encoder, of the cosine with its partner; None where it has
    none."""
    frequency: list[float] = field(default_factory=list, repr=False)
    """Per latent: fraction of the rows on which it fires; empty where no rows were given."""
    alignment_self: list[float] = field(default_factory=list, repr=False)
    """Per latent: cosine of its own encoder row and decoder row, which needs no other SAE; empty for transcoders and in
    files of schema 1 to 4."""


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Which latents SAEs share, compared with chance.

    Fractions are of the latents of the narrower SAE of a pair: only so many can have a partner.

    Examples
    --------
    ::

        result = sk.compare(saes)
        result.shared                       # with its interval; result.shared_null is chance
        result.saes[0].stability            # of each latent
        result.pairs[0].decoder.certificate.gap
    """

    KIND: ClassVar[str] = "comparison"
    SCHEMA: ClassVar[int] = 5
    PARTS: ClassVar[tuple[str, ...]] = ("pairs",)

    rows: dict[str, Any] | None
    """``info`` of the rows; None where none were given."""
    n_rows: int
    """Rows seen."""
    shared: Measured
    """Fraction of latents that two SAEs have in common: mean over pairs of SAEs, as all means below. Pairs that began
    from the same random weights do not count where others exist."""
    shared_null: Measured | None
    """The same for random dictionaries of the same shape (None without controls)."""
    equal: Measured
    """Fraction of latents whose decoder and encoder partners agree: mean over pairs. Compare it with its null: where
    encoders still resemble decoders, as after little training, partners agree whether or not the SAEs do."""
    equal_null: Measured | None
    """The same for the first pair with the coordinates of the second permuted, which keeps how much each encoder
    resembles its decoder; of dictionaries without that resemblance 1 / n_latents would agree."""
    mean_cosine: Measured
    """Mean cosine of matched decoder rows: mean over pairs."""
    mean_cosine_null: Measured | None
    mean_cosine_encoder: Measured
    """Mean cosine of matched encoder rows: mean over pairs."""
    max_cosine: Measured
    """Mean largest cosine of decoder rows, without matching: mean over pairs."""
    max_cosine_null: Measured | None
    max_absolute_cosine: Measured
    """Mean largest absolute cosine of decoder rows, without matching: mean over pairs."""
    certificate: dict[str, Certificate]
    """``decoder`` and ``encoder``: objective, dual bound and gap, summed over the pairs."""
    in_exactly: list[Measured]
    """Fraction of latents that exactly 1, 2, … m of the m SAEs have: mean over the SAEs."""
    only_in_one: list[Measured]
    """Fraction of latents that none of the others has, among any 2, 3, … m of the SAEs."""
    saes: list[Compared]
    """One per SAE, in the order given."""
    pairs: list[Pair]
    """All pairs of SAEs: (0, 1), (0, 2), …, (1, 2), …"""
    nulls: dict[str, Null]
    """``random``: random directions; ``permuted``: the second SAE with its coordinates permuted."""
    groups: Groups | None = None
    """Latents clustered over all SAEs into concepts. None in files of schema 1."""
    law: SharingLaw | None = None
    """How `only_in_one` falls with the number of SAEs; None below five of them."""
    shared_alive: Measured | None = None
    """`shared` among latents that fire on the rows: those that never do cannot be found again, and lower `shared`. None
    without rows, and in files of schema 1 and 2."""

    pw_mcc: Measured | None = None
    """PW-MCC (2505.20254): mean cosine of decoder rows under the one-to-one matching with the largest sum of them, mean
    over pairs of SAEs. The same number as `mean_cosine`, under the name by which papers state it."""
    pw_mcc_null: Measured | None = None
    """The same for random dictionaries of the same shape."""
    pw_mcc_alive: Measured | None = None
    """The same over the pairs of latents of which both fire on the rows; None without rows."""
    predictors: dict[str, Measured] = field(default_factory=dict)
    """How well a number of one SAE alone predicts the stability of its latents: Spearman correlation, mean over the
    SAEs; ``alignment_self``, ``encoder_norm`` and, with rows, ``frequency``. Empty in files of schema 1 to 4."""
    function: dict[str, Measured] = field(default_factory=dict)
    """Whether partners do the same: means of `Pair.function` over pairs, by name."""
    along: list[AlongPoint] = field(default_factory=list)
    """What snapshots of the run shared, the finished SAEs last; empty where that was not asked for."""
    shared_rise: Measured | None = None
    """How much the last doubling of the rows added to `shared`; None without a snapshot at half of them."""

    @classmethod
    def migrate(cls, plain: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON object of an older schema in this layout, its law decided by today's rule."""
        return cls._migrate_law(_migrate_pw_mcc(plain))

    @staticmethod
    def _migrate_law(plain: dict[str, Any]) -> dict[str, Any]:
        law, saes = plain.get("law"), plain.get("saes")
        if not isinstance(law, dict) or not isinstance(saes, list):
            return plain
        try:
            is_better = law["held_out"] < law["plain_held_out"]
            word = offset_verdict(len(saes), Measured.from_json(law["offset"]), is_better=is_better)
        except (KeyError, TypeError, FormatError):  # what is wrong with it is said when it is read
            return plain
        return plain | {"law": {**law, "verdict": word}}

    def check(self) -> None:
        """Refuse what contradicts itself; raises `FormatError`."""
        m = len(self.saes)
        if m < 2 or len(self.pairs) != m * (m - 1) // 2 or len(self.in_exactly) != m:
            raise FormatError(
                f"a saved comparison of {m} SAEs must hold every pair of at least two SAEs; it holds "
                f"{len(self.pairs)} pairs. The file was altered."
            )

    def table(self) -> list[list[str]]:
        """Return rows of text, headings first: all pairs together, what chance gives, then each pair."""
        with_rows = any(pair.on_rows for pair in self.pairs)
        head = ["", "shared", "equal", "PW-MCC", "cosine enc", "max cosine"]
        lines = [head + (["shared alive", "correlation", "cka"] if with_rows else [])]
        if len(self.pairs) > 1:
            means = (self.shared, self.equal, self.mean_cosine, self.mean_cosine_encoder, self.max_cosine)
            alive = "" if self.shared_alive is None else str(self.shared_alive)
            lines.append([f"{self.n_counted} pairs", *map(str, means), *([alive, "", ""] if with_rows else [])])
        for pair in self.pairs:
            lines.append(pair.cells() + (_cells_on_rows(pair.on_rows) if with_rows else []))
        for name, null in self.nulls.items():
            found = (null.shared, null.equal, null.mean_cosine)
            line = [f"  {name}", *map(str, found), "", str(null.max_cosine)]
            lines.append(line + ([""] * 3 if with_rows else []))
        return lines

    def function_table(self) -> list[list[str]]:
        """Return whether partners do the same as rows of text, headings first; no rows where that was not tested."""
        lines = [
            [words, *("–" if name not in self.function else str(self.function[name]) for name in names)]
            for words, names in FUNCTION_ROWS.items()
            if names[0] in self.function
        ]
        return [["do partners do the same?", *FUNCTION_COLUMNS], *lines] if lines else []

    def along_table(self) -> list[list[str]]:
        """Return what snapshots shared as rows of text, headings first; no rows where that was not asked for."""
        lines = [
            [f"{point.rows_seen:,}", *map(str, (point.shared, point.equal, point.mean_cosine))] for point in self.along
        ]
        nulls = (self.shared_null, self.equal_null, self.mean_cosine_null)
        if lines and nulls[0] is not None:
            lines.append(["  chance", *map(str, nulls)])
        return [["rows seen", "shared", "equal", "PW-MCC"], *lines] if lines else []

    @property
    def n_counted(self) -> int:
        """Pairs that the means are over: those that began apart, or all where none did."""
        return sum(not pair.same_seed for pair in self.pairs) or len(self.pairs)

    def caption(self) -> str:
        """One line under the table: what counts as shared, where intervals come from, how exact the matching is."""
        operator = ">" if self.settings["strict"] else ">="
        gap = max(certificate.gap for certificate in self.certificate.values())
        found = ", ".join(f"{each:.1%}".split(" [")[0] for each in self.in_exactly)
        many = f"; in exactly 1 … {len(self.saes)} of {len(self.saes)} SAEs: {found}" if len(self.saes) > 2 else ""
        marked = any(pair.same_seed for pair in self.pairs)
        warning = "; * began from the same random weights, no test of stability" if marked else ""
        warning += ": not in the means" if marked and self.n_counted < len(self.pairs) else ""
        alive = (
            "" if self.shared_alive is None else f"; of latents that fire on the rows {self.shared_alive} are shared"
        )
        about = no_intervals((self.shared, self.equal, self.mean_cosine)) or (
            f"{self.settings['intervals']['level']:.0%} intervals {self.settings['intervals']['over']}"
        )
        return (
            f"shared: decoder and encoder partners agree, both cosines {operator} {self.settings['threshold']}; "
            f"PW-MCC: mean cosine of decoder partners; {about}; "
            f"matching exact within {gap:.0e} in all{alive}{many}{warning}"
        )


def _migrate_pw_mcc(plain: dict[str, Any]) -> dict[str, Any]:
    """Up to schema 4 `pw_mcc` was the mean largest absolute cosine, which is no PW-MCC."""
    version = plain.get("schema")
    if not isinstance(version, int) or version > 4 or "pw_mcc" not in plain:
        return plain
    sides = ("decoder", "encoder")
    pairs = [pair | {side: _renamed(pair[side]) for side in sides} for pair in plain["pairs"]]
    mean = {"pw_mcc": plain["mean_cosine"], "pw_mcc_null": plain.get("mean_cosine_null")}
    return _renamed(plain) | {"pairs": pairs} | mean


def _renamed(plain: dict[str, Any]) -> dict[str, Any]:
    return {"max_absolute_cosine" if name == "pw_mcc" else name: value for name, value in plain.items()}


def _cells_on_rows(seen: OnRows | None) -> list[str]:
    """Return what two SAEs do on rows, as cells of a table."""
    if seen is None:
        return ["–"] * 3
    return ["–" if each is None else str(each) for each in (seen.shared_alive, seen.correlation, seen.cka)]
