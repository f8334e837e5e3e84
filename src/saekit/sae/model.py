"""The sparse autoencoder as a value."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..errors import ConfigError, ShapeError
from ..terminal import plain
from .codes import Codes
from .digest import compute_digest
from .finite import as_rows, as_tensor, check_codes, check_held
from .rules import Rule, TopKRule
from .scaling import Scaling


@dataclass(frozen=True, eq=False, repr=False)
class SAE:
    """A sparse autoencoder: two weight matrices, their biases and a rule. It never changes; methods return new values.

    ::

        u     = scaling.apply(x)
        pre   = (u - b_pre) @ W_enc.T + b_enc
        codes = rule(pre)
        x_hat = scaling.undo(codes @ W_dec + b_dec [+ u @ W_skip])

    The latent axis is first in every tensor. Encoding a row never depends on the other rows.

    Raises
    ------
    ShapeError
        The tensors do not fit together.
    ConfigError
        The rule cannot work with this number of latents.
    """

    W_enc: Tensor
    """Encoder, ``[n_latents, d_in]``."""
    b_enc: Tensor
    """Encoder bias, ``[n_latents]``."""
    W_dec: Tensor
    """Decoder, ``[n_latents, d_out]``; row j is what latent j writes."""
    b_dec: Tensor
    """Decoder bias, ``[d_out]``."""
    rule: Rule
    """What turns pre-activations into codes."""
    b_pre: Tensor | None = None
    """Subtracted before the encoder, ``[d_in]``; None for no subtraction. Many SAEs have ``b_pre = b_dec``."""
    scaling: Scaling = field(default_factory=Scaling)
    """Applied to rows before the encoder and undone after the decoder."""
    W_skip: Tensor | None = None
    """Linear path around the latents, ``[d_in, d_out]``; None for none."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """JSON-able facts about where the SAE comes from: model, hook, data, config, seed, versions."""
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    """Numbers about the latents, by name (``"energy"``, ``"stability"``): float32 ``[n_latents]`` on the CPU, whatever
    was given. They follow the latents through `take` and `permute` and into the file, and play no part in encoding."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", {name: _score(self, name, value) for name, value in self.scores.items()})
        for name, tensor in self.tensors().items():
            if tensor.requires_grad and name in _FIELDS:
                object.__setattr__(self, name, tensor.detach())
        self._check()

    def _check(self) -> None:
        if self.W_enc.ndim != 2 or self.W_dec.ndim != 2:
            raise ShapeError(
                "SAE: `W_enc` and `W_dec` must be matrices [n_latents, d]; "
                f"got {tuple(self.W_enc.shape)} and {tuple(self.W_dec.shape)}."
            )
        (n, d_in), d_out = self.W_enc.shape, self.W_dec.shape[1]
        expected = {
            "b_enc": (n,), "W_dec": (n, d_out), "b_dec": (d_out,), "b_pre": (d_in,), "W_skip": (d_in, d_out),
            "rule.threshold": (n,), "rule.rank": (n,), "rule.group": (n,), "scaling.mean": (d_in,),
        }  # fmt: skip
        for name, tensor in self.tensors().items():
            if name in expected and tuple(tensor.shape) != expected[name]:
                raise ShapeError(
                    f"SAE: `{name}` must be {expected[name]} with W_enc {(n, d_in)}; got {tuple(tensor.shape)}. "
                    "The latent axis comes first; transpose a decoder stored as [d_out, n_latents]."
                )
        k = self.rule.settings().get("k", 1)
        if k > n:
            raise ConfigError(f"SAE: `k` must be at most n_latents={n}; got k={k}. Lower k or widen the SAE.")

    # ------------------------------------------------------------------ what it is

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the rows that go in."""
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the rows that come out; equal to `d_in` for an autoencoder."""
        return self.W_dec.shape[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts the rows of another module (``hook_out`` in `provenance`) from those that it reads."""
        return predicts_other_rows(self.d_in, self.d_out, self.provenance)

    @property
    def has_signs(self) -> bool:
        """Whether codes have signs and are chosen by size, so that a latent and its negative are the same (AbsTopK)."""
        return self.rule.settings().get("sign") == "magnitude"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.W_enc.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name (``rule.`` and ``scaling.`` prefixed): all that is needed at inference."""
        own = {name: t for name in _FIELDS if (t := getattr(self, name)) is not None}
        rule = {f"rule.{name}": t for name, t in self.rule.tensors().items()}
        return own | rule | {f"scaling.{name}": t for name, t in self.scaling.tensors().items()}

    def digest(self) -> str:
        """Return ``"sha256:<hex>"``, which identifies this function; the file of the SAE states it as `content`.

        It covers the rule, the scaling and every tensor with its dtype, not scores and provenance. Computed once.
        """
        known: str | None = self.__dict__.get("_digest")
        if known is None:
            known = self.__dict__["_digest"] = compute_digest(self)
        return known

    # ------------------------------------------------------------------ what it does

    def pre(self, x: object) -> Tensor:
        """Compute the dense pre-activations ``[n, n_latents]`` of rows ``[n, d_in]``. Large: meant for few rows."""
        return torch.addmm(self.b_enc, self._centred(x, "pre"), self.W_enc.T)

    def encode(self, x: object, *, block_rows: int | None = None) -> Codes:
        """Encode rows to sparse codes.

        Parameters
        ----------
        x
            Rows ``[..., d_in]``: a tensor, an array, a list or a frame; leading axes are flattened. Cast to the SAE's
            dtype and device.
        block_rows
            Rows computed at a time; None keeps one dense block within a few tens of MiB.

        Raises
        ------
        ShapeError
            The width of the rows is not `d_in`.
        DataError
            NaN or infinity in the rows, or numbers too large for the SAE's dtype.
        """
        return self.rule.encode(self._centred(x, "encode"), self.W_enc, self.b_enc, block_rows)

    def decode(self, codes: Codes, x: object = None) -> Tensor:
        """Decode codes to rows ``[n, d_out]``.

        Codes with fewer latents than the SAE are taken as codes of its first latents, so
        ``sae.decode(sae.encode(x).take(m))`` is the reconstruction by a prefix chosen after the selection.

        Parameters
        ----------
        codes
            What `encode` returned, or a part of it.
        x
            The rows that were encoded. Needed only by an SAE with `W_skip` or with per-row scaling.

        Raises
        ------
        ShapeError
            More latents than the SAE has, or `x` is needed and missing.
        DataError
            NaN or infinity in the codes or the rows.
        """
        if codes.n_latents > self.n_latents:
            raise ShapeError(
                f"decode: codes must have at most n_latents={self.n_latents} latents; got {codes.n_latents}. "
                "Decode with the SAE that made them."
            )
        check_codes(codes)
        u_hat = kernels.csr_decode(codes.offsets, codes.indices, codes.values, self.W_dec) + self.b_dec
        context = None
        if x is not None:
            u, context = self._scaled(x, "decode")
            u_hat = u_hat if self.W_skip is None else u_hat + u @ self.W_skip
        elif self.W_skip is not None:
            raise ShapeError(
                "decode: this SAE has a skip path, so it needs the rows; got none. Call sae.decode(codes, x)."
            )
        return self.scaling.undo(u_hat, context)

    def reconstruct(self, x: object, *, block_rows: int | None = None) -> Tensor:
        """Return ``decode(encode(x))`` in the shape of `x` (last axis `d_out`)."""
        x = as_tensor(x, "reconstruct")
        return self.decode(self.encode(x, block_rows=block_rows), x).reshape(*x.shape[:-1], self.d_out)

    # ------------------------------------------------------------------ other SAEs from this one

    def take(self, which: int | Tensor) -> SAE:
        """Return a smaller SAE: the first `which` latents, or those of an index tensor in its order.

        The selection happens BEFORE the rule: a TopK SAE chooses its k among the latents kept. For the other reading
        (choose among all, then keep a prefix) decode ``sae.encode(x).take(m)``.

        Raises
        ------
        ConfigError
            More latents than there are, or none.
        """
        count = which if isinstance(which, int) else len(which)
        if not 1 <= count <= self.n_latents:
            raise ConfigError(f"take: must keep 1 to n_latents={self.n_latents} latents; got {count}.")
        index = torch.arange(which) if isinstance(which, int) else torch.as_tensor(which)
        index = index.to(self.device)
        latents = {name: getattr(self, name)[index] for name in ("W_enc", "b_enc", "W_dec")}
        scores = {name: score[index.cpu()] for name, score in self.scores.items()}
        provenance = self.provenance
        if not isinstance(which, int):  # facts about prefixes hold no more
            provenance = {key: value for key, value in provenance.items() if key not in _ABOUT_ORDER}
        rule = self.rule.take(index, self.n_latents)
        return self.replace(**latents, rule=rule, provenance=provenance, scores=scores)

    def with_k(self, k: int) -> SAE:
        """Return the same latents with another k; for a TopK SAE, best one that was trained for many k.

        An SAE trained with `HierarchicalTopK` reconstructs from any k up to its own as well as it can; others were
        trained for one k.

        Raises
        ------
        ConfigError
            The rule has no number of latents per row, or `k` is not within 1..n_latents.
        """
        if not isinstance(self.rule, TopKRule):
            raise ConfigError(f"with_k: the rule must be TopK; it is {self.rule.name}. Thresholds decide there.")
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.n_latents:
            raise ConfigError(f"with_k: `k` must be a whole number within 1..{self.n_latents}; got {k!r}.")
        return self.replace(rule=dataclasses.replace(self.rule, k=k))

    def permute(self, order: Tensor) -> SAE:
        """Return the same SAE with new latent j = old latent ``order[j]``; reconstructions stay the same.

        Raises
        ------
        ConfigError
            `order` is not a permutation of the latents.
        """
        order = torch.as_tensor(order)
        if not torch.equal(order.sort().values.cpu(), torch.arange(self.n_latents)):
            raise ConfigError(
                f"permute: `order` must hold each of 0..{self.n_latents - 1} once; got {len(order)} entries. "
                "Use take() to keep some latents."
            )
        return self.take(order)

    def fold_norms(self) -> SAE:
        """Return the same SAE with decoder rows of length 1: encoder, thresholds and codes are multiplied by the norms.

        Reconstructions and L0 stay as they were under every rule. A row of length 0 stays.
        """
        norms = self.W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        return self.replace(
            W_enc=self.W_enc * norms[:, None],
            b_enc=self.b_enc * norms,
            W_dec=self.W_dec / norms[:, None],
            rule=self.rule.fold(norms),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """Return the same SAE on another device or in another floating type."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        own = {name: move(t) for name, t in self.tensors().items() if name in _FIELDS}
        rule_tensors = {name: move(t) for name, t in self.rule.tensors().items()}
        rule = dataclasses.replace(self.rule, **rule_tensors)  # type: ignore[type-var]
        return self.replace(**own, rule=rule, scaling=self.scaling.to(device, dtype))

    def replace(self, **changes: Any) -> SAE:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_scores(self, **scores: Any) -> SAE:
        """Return a copy with `scores` (each ``[n_latents]``) added to those it has; equal names are replaced.

        Raises
        ------
        ShapeError
            Not one number per latent.
        """
        return self.replace(scores={**self.scores, **scores})

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder `path` with ``sae.safetensors`` and ``sae.json``; see `saekit.store.save`."""
        from ..store.native import save

        save(self, path)

    @staticmethod
    def load(
        address: str | os.PathLike[str],
        *,
        latents: int | None = None,
        fvu: float | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **stated: Any,
    ) -> SAE:
        """Read an SAE, saekit's own or another library's, or a prefix of its latents.

        Parameters
        ----------
        address
            A folder, a file of weights, or ``hf:owner/name/folder[@revision]``.
        latents, fvu, dtype, device
            See `saekit.store.opening.load`.
        **stated
            What a foreign file does not say: ``format``, ``orientation``, ``k``; see
            `saekit.store.formats.canonical.Stated`.
        """
        from ..store.formats.canonical import Stated
        from ..store.opening import load

        return load(address, latents=latents, fvu=fvu, dtype=dtype, device=device, stated=Stated(**stated))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the SAE into a folder, as `save` does: the name that Hugging Face's libraries use."""
        self.save(folder)

    @staticmethod
    def from_pretrained(
        name: str | os.PathLike[str], *, revision: str | None = None, latents: int | None = None
    ) -> SAE:
        """Read an SAE by the name that Hugging Face's libraries use.

        Parameters
        ----------
        name
            A local folder, or ``owner/name[/folder]`` of a hub repository, with or without ``hf:`` before it.
        revision
            Branch, tag or commit of the repository.
        latents
            Number of latents to read; see `load`.
        """
        text = os.fspath(name)
        if not os.path.exists(text) and re.match(r"(hf:)?[\w.-]*\w/\w", text):
            text = f"hf:{text.removeprefix('hf:')}{f'@{revision}' if revision else ''}"
        elif revision is not None:
            raise ConfigError(f"from_pretrained: a local folder has no `revision`; got {revision!r} for `{text}`.")
        return SAE.load(text, latents=latents)

    def push_to_hub(self, name: str, *, private: bool = False, message: str | None = None) -> str:
        """Upload the SAE with a model card to a repository of the hub, and return the address of the commit.

        Results come along with `saekit.report.sharing.push`, which uploads a folder.

        Parameters
        ----------
        name
            ``owner/name[@branch]``, with or without ``hf:`` before it.
        private, message
            See `saekit.report.sharing.push`.
        """
        from tempfile import TemporaryDirectory

        from ..report.sharing import push

        with TemporaryDirectory() as folder:
            self.save(folder)
            return push(folder, f"hf:{name.removeprefix('hf:')}", private=private, message=message)

    # ------------------------------------------------------------------ inside

    def __deepcopy__(self, memo: dict[int, Any]) -> SAE:
        return self  # a value needs no copies: clones of an estimator share it

    def _scaled(self, x: object, where: str) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return rows scaled, and what undoing it needs."""
        rows = as_rows(x, self.d_in, self.dtype, self.device, where)
        u, context = self.scaling.apply(rows)
        if context is not None and not bool(torch.isfinite(context[1].sum())):
            check_held(context[1], rows, where)
        return u, context

    def _centred(self, x: object, where: str) -> Tensor:
        u, _ = self._scaled(x, where)
        return u if self.b_pre is None else u - self.b_pre

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.rule.settings().items())
        width = f"{self.d_in}" if self.d_in == self.d_out else f"{self.d_in} → {self.d_out}"
        hook, out = self.provenance.get("hook"), self.provenance.get("hook_out")
        place = f", {self.provenance.get('model', '?')} at {hook}{f' to {out}' if out else ''}" if hook else ""
        kind = "Transcoder" if self.is_transcoder else "SAE"
        return plain(f"{kind}({self.n_latents:,} latents on width {width}, {self.rule.name}({settings}){place})")

    def _repr_html_(self) -> str:
        facts = {"latents": f"{self.n_latents:,}", "width": self.d_in, "rule": self.rule.name, **self.rule.settings()}
        shown = ("model", "hook", "hook_out", "data", "seed")
        facts |= {key: self.provenance[key] for key in shown if key in self.provenance}
        cells = "".join(
            f"<tr><th>{escape(plain(str(k)))}</th><td>{escape(plain(str(v)))}</td></tr>" for k, v in facts.items()
        )
        return f"<table><caption>{'Transcoder' if self.is_transcoder else 'SAE'}</caption>{cells}</table>"


def predicts_other_rows(d_in: int, d_out: int, provenance: Mapping[str, Any]) -> bool:
    """Return whether an SAE of these widths and this provenance is a transcoder; see `SAE.is_transcoder`."""
    elsewhere = provenance.get("hook_out") not in (None, provenance.get("hook"))
    return d_in != d_out or elsewhere or bool(provenance.get("transcoder"))


def _score(sae: SAE, name: str, value: object) -> Tensor:
    """Return one of the scores in the form they all have."""
    if not name.isidentifier():
        raise ConfigError(f"SAE: the name of a score must be letters, digits and underscores; got {name!r}.")
    score = torch.as_tensor(value).detach().to("cpu", torch.float32).contiguous()
    if score.shape != (sae.n_latents,):
        raise ShapeError(
            f"SAE: `scores[{name!r}]` must hold one number per latent, ({sae.n_latents},); got {tuple(score.shape)}."
        )
    return score


_FIELDS = ("W_enc", "b_enc", "W_dec", "b_dec", "b_pre", "W_skip")
_ABOUT_ORDER = ("latent_order", "ranking", "sizes")  # provenance that belongs to the order of the latents
