"""How labelled data is read and split: columns, groups, training and test rows."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..settings import check_fraction, check_whole, suggest_keywords


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class Split:
    """Which columns of a table are read, and which of its rows are training and test rows.

    A drawn split depends on the seed and on the groups' names (the texts themselves without groups) only: the order of
    the rows changes nothing, and equal texts are never on both sides. Groups of any size are dealt out so that the test
    set, or every fold, has about its fraction of the rows of every class; large groups tend to be training rows.
    """

    text: str = "text"
    """Column of the texts [text]."""
    label: str = "label"
    """Column of the classes [label]."""
    group: str | None = None
    """Group column: rows with equal values stay on one side of the split [none]."""
    values: tuple[str, ...] | None = None
    """Values of the column `across` to use, in this order [all, sorted]."""
    split_column: str | None = None
    """Column that marks the test rows (`test`) [random split]."""
    test_split: str = "test"
    """Value of the split column that marks test rows [test]."""
    test_share: float = 0.25
    """Fraction of the rows of every class in the test set, where no split is given [0.25]."""
    folds: int | None = None
    """Number of folds of a nested cross-validation, in which every row is a test row once [one locked test set]."""
    max_rows: int | None = None
    """Maximum number of rows (of each value), sampled at random [all]."""
    train_rows: int | None = None
    """Maximum number of training rows (of each value) [all]."""
    test_rows: int | None = None
    """Maximum number of test rows (of each value) [all]."""
    min_rows: int | None = None
    """Leave out classes with fewer rows (groups, where there are any) [refuse rare ones]."""
    hub_split: str | None = None
    """Split of a hub data set, or of a folder whose files name theirs [train where there is one]."""
    seed: int = 0
    """Random seed (split, folds) [0]."""

    def __post_init__(self) -> None:
        names = {"text": self.text, "label": self.label, "group": self.group, "split_column": self.split_column}
        for name, value in names.items():
            if not isinstance(value, str | None):
                raise ConfigError(
                    f"split: `{name}` must be the name of a column; got {type(value).__name__}. Values are given with "
                    "the data: data=(texts, labels)."
                )
        if self.values is not None:
            values = (self.values,) if isinstance(self.values, str) else self.values
            object.__setattr__(self, "values", tuple(str(value) for value in values))
            if len(set(self.values)) < len(self.values):
                raise ConfigError(f"split: `values` must differ; got {list(self.values)}.")
        check_fraction("split", test_share=self.test_share)
        check_whole("split", 2, folds=self.folds)
        check_whole("split", max_rows=self.max_rows, train_rows=self.train_rows, test_rows=self.test_rows)
        check_whole("split", min_rows=self.min_rows)
        check_whole("split", 0, seed=self.seed)
        if self.folds is not None and self.split_column is not None:
            raise ConfigError("split: at most one of `folds` and `split_column` may be given; got both.")
