"""Settings of capturing, streaming and pooling rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError
from ..settings import check_choice, check_whole, suggest_keywords

if TYPE_CHECKING:
    from ..models.loading import Device, Dtype

OUTLIER_TIMES = 10.0
"""A token is an outlier when its norm is more than this many times the median norm."""

CE_TOKENS = 32_768
"""Tokens that cross-entropies are measured on by default."""

BLOCK_TOKENS = 32_768
"""Tokens in a shuffled block of a stream. Unit: tokens."""


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class TokenMask:
    """Which tokens of a text become rows, and how conversations become texts. The model reads all tokens either way.

    Raises
    ------
    ConfigError
        A setting cannot work.
    """

    roles: tuple[str, ...] = ()
    """Roles whose tokens become rows, of conversations, such as assistant [all roles]."""
    skip_tokens: tuple[str, ...] = ()
    """Tokens that become no rows, as the tokenizer writes them [none]."""
    positions: str | None = None
    """Positions in the text whose tokens become rows, FIRST:LAST as in Python, such as 4: or :128 [all]."""
    chat_template: str | None = None
    """Jinja template of conversations: a file, or the template itself [that of the tokenizer]."""

    def __post_init__(self) -> None:
        for name in ("roles", "skip_tokens"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif not isinstance(value, tuple) or not all(isinstance(each, str) and each for each in value):
                raise ConfigError(f"`{name}` must be texts, such as ('assistant',); got {value!r}.")
        self.range()
        if self.chat_template is not None:
            from ..inputs.chat import template_of

            template_of(self.chat_template)  # now, not after the output folder is made

    def range(self) -> tuple[int, float]:
        """Return the first position that becomes a row, and the one after the last.

        >>> TokenMask(positions="4:").range(), TokenMask().range()
        ((4, inf), (0, inf))
        """
        if self.positions is None:
            return 0, math.inf
        first, colon, last = self.positions.partition(":")
        numbers = [int(each) if each.isdigit() else None for each in (first or "0", last or "1")]
        if not colon or None in numbers or (last and int(last) <= int(first or 0)):
            raise ConfigError(
                f"`positions` must be FIRST:LAST with FIRST below LAST, either of them left out; got "
                f"{self.positions!r}. Write 4: for all but the first four tokens."
            )
        return int(first or 0), int(last) if last else math.inf

    def facts(self) -> dict[str, Any]:
        """Return what differs from the default, as plain JSON; the template itself, not its file."""
        from ..inputs.chat import template_of

        found = {name: list(getattr(self, name)) for name in ("roles", "skip_tokens") if getattr(self, name)}
        return {
            **found,
            **({} if self.positions is None else {"positions": self.positions}),
            **({} if self.chat_template is None else {"chat_template": template_of(self.chat_template)}),
        }

    @classmethod
    def by(cls, known: Mapping[str, Any]) -> TokenMask:
        """Return the mask that the `info` of rows, or the provenance of an SAE, records."""
        mask = known.get("mask")
        return cls(**mask) if isinstance(mask, Mapping) else cls()


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class ReadingSettings(TokenMask):
    """How a model reads texts, and which tokens become rows.

    Raises
    ------
    ConfigError
        A setting cannot work.
    """

    site: Literal["resid", "mlp", "attn"] = "resid"
    """With a layer: the residual stream after it (resid), or what its mlp or attn adds [resid]."""
    target: str | None = None
    """Module whose rows a transcoder predicts, taken with each row, in memory or as they are read only; of several
    layers ``layers.{layer}.mlp``, say [none]."""
    split: str | None = None
    """Split of the data [train where there is one]."""
    context: int | None = None
    """Maximum number of tokens in one context; longer texts are cut into several [1024, or what the model takes]."""
    pack: bool = False
    """Whether contexts are filled with text after text [false]."""
    skip_special: bool = True
    """Whether what is added to the data is left out: BOS, CLS, SEP, registers, tokens around an image [true]."""
    outliers: float | None = OUTLIER_TIMES
    """Largest norm of a row, in medians; rows above it are left out; None keeps all [10]."""
    padding: Literal["right", "left"] = "right"
    """Side of the padding; changes no row beyond rounding [right]."""
    batch_tokens: int | None = None
    """Tokens in one forward pass; changes no row beyond rounding [2048 on a CPU, else 16384]."""
    model_dtype: Dtype = None
    """Number type that the model is loaded in: float32, bfloat16 or float16 [as its weights are stored]."""
    device: Device = None
    """Device that the model runs on [the GPU where there is one]."""
    device_map: str | Mapping[str, Any] | None = None
    """Distribution over devices, for transformers; instead of a device [none]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = type(self).__name__
        if not self.skip_special and self.mask != TokenMask(chat_template=self.chat_template):
            raise ConfigError(
                f"{where}: `skip_special` must stay true where `roles`, `skip_tokens` or `positions` choose tokens."
            )
        check_whole(where, context=self.context, batch_tokens=self.batch_tokens)
        check_choice(where, ("right", "left"), padding=self.padding)
        if self.outliers is not None and not self.outliers > 1:
            raise ConfigError(
                f"{where}: `outliers` must be above 1 (times the median norm), or None to keep all; "
                f"got {self.outliers!r}."
            )

    @property
    def mask(self) -> TokenMask:
        """Which tokens become rows."""
        return TokenMask(**{each.name: getattr(self, each.name) for each in fields(TokenMask)})

    @property
    def placement(self) -> dict[str, Any]:
        """Keyword arguments of `load_model`."""
        return {"dtype": self.model_dtype, "device": self.device, "device_map": self.device_map}


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class PatchSettings:
    """How a model looks at images, and which tokens become rows.

    Raises
    ------
    ConfigError
        A setting cannot work.
    """

    skip_special: bool = True
    """Whether what the model adds is left out: CLS, registers, the tokens around an image [true]."""
    special: int | None = None
    """Tokens before the patches of a vision model [found by counting]."""
    prompt: str | None = None
    """Text with the image, for a vision-language model, with the token that stands for the image [the image alone]."""
    batch_images: int | None = None
    """Images in one forward pass; changes no row beyond rounding [by the number of patches]."""

    def __post_init__(self) -> None:
        check_whole(type(self).__name__, batch_images=self.batch_images)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class CaptureSettings(ReadingSettings):
    """How rows are captured from texts or images.

    Raises
    ------
    ConfigError
        A setting cannot work.
    """

    dtype: Dtype = None
    """Number type of the rows: float32, bfloat16 or float16 [that of the model]."""
    shard_rows: int | None = None
    """Rows in one file [about 64 MiB]."""
    special: int | None = None
    """Tokens before the patches of a vision model [found by counting]."""
    prompt: str | None = None
    """Text with the image, for a vision-language model, with the token that stands for the image [the image alone]."""
    batch_images: int | None = None
    """Images in one forward pass; changes no row beyond rounding [by the number of patches]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(type(self).__name__, shard_rows=self.shard_rows, batch_images=self.batch_images)

    @property
    def patches(self) -> PatchSettings:
        """What concerns images."""
        return PatchSettings(
            skip_special=self.skip_special, special=self.special, prompt=self.prompt, batch_images=self.batch_images
        )


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class StreamSettings(ReadingSettings):
    """How rows are computed while they are read.

    Raises
    ------
    ConfigError
        A setting cannot work.
    """

    block_tokens: int = BLOCK_TOKENS
    """Tokens that are computed and shuffled together [32768]."""
    prefetch: bool = True
    """Whether a second thread computes the next block while one is used [true]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(type(self).__name__, block_tokens=self.block_tokens)


@suggest_keywords
@dataclass(frozen=True, kw_only=True)
class PoolingSettings(PatchSettings):
    """How texts or images are read when their rows are pooled.

    Raises
    ------
    ConfigError
        A setting cannot work.
    """

    batch_tokens: int | None = None
    """Tokens in one forward pass; changes no result beyond rounding [2048 on a CPU, else 16384]."""
    empty: Literal["refuse", "zero"] = "refuse"
    """Documents without a token: refuse them, or give a row of zeros [refuse]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(type(self).__name__, batch_tokens=self.batch_tokens)
        check_choice(type(self).__name__, ("refuse", "zero"), empty=self.empty)
