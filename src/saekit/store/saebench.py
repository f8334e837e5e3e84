"""An SAE as the torch module that SAEBench and sae-probes evaluate; nothing of saekit imports this.

::

    from saekit.store.saebench import as_module

    module = as_module(sk.SAE.load("run/topk-1024-k16-seed0"), model_name="gemma-2-2b")
    sae_bench.evals.core.main.multiple_evals([("mine", module)], ...)
    sae_probes.run_sae_evals(module, ...)

It has what their own base class has (``sae_bench/custom_saes/base_sae.py`` of sae-bench 0.6.0): ``W_enc`` ``[d_in,
d_sae]``, ``W_dec`` ``[d_sae, d_in]`` with rows of length 1, ``b_enc``, ``b_dec``, dense ``encode``, ``decode``,
``forward``, ``device``, ``dtype``, ``to`` and ``cfg``. Neither package is needed to make one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..provenance import known_place
from ..sae.model import SAE
from .exports import fold_constants
from .formats.canonical import layer_of, word_of


@dataclass
class BenchConfig:
    """The fields that SAEBench reads and fills, with the names they have there (``CustomSAEConfig``)."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    architecture_str: str = ""
    apply_b_dec_to_input: bool = False
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = ""
    device: str = ""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


class BenchModule(nn.Module):
    """An SAE with dense codes, as SAEBench's ``BaseSAE`` has them; made by `as_module`."""

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, sae: SAE, config: BenchConfig) -> None:
        super().__init__()
        self.cfg = config
        self.sae = sae
        parts = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
        for name, tensor in parts.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self._follow()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.sae.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return self.sae.dtype

    def encode(self, x: Tensor) -> Tensor:
        """Return dense codes ``[..., d_sae]`` of rows ``[..., d_in]``."""
        codes = self.sae.encode(x.reshape(-1, x.shape[-1])).to_dense()
        return codes.reshape(*x.shape[:-1], self.cfg.d_sae)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return rows ``[..., d_in]`` of dense codes."""
        rows: Tensor = feature_acts.to(self.W_dec) @ self.W_dec + self.b_dec
        return rows

    def forward(self, x: Tensor) -> Tensor:
        """Return ``decode(encode(x))``."""
        return self.decode(self.encode(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the SAE along with the parameters: what ``to``, ``half`` and ``cuda`` call."""
        super()._apply(fn, recurse)
        self.sae = self.sae.to(self.W_dec.device, self.W_dec.dtype)
        self._follow()
        return self

    def _follow(self) -> None:
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)


def as_module(
    sae: SAE, *, model_name: str | None = None, hook_name: str | None = None, hook_layer: int | None = None
) -> BenchModule:
    """Return an SAE as a module for SAEBench and sae-probes.

    Constant scaling of rows becomes part of the weights, and decoder rows get length 1, as SAEBench expects it; codes
    are multiplied by the lengths that they had. Reconstructions stay as they were.

    Parameters
    ----------
    sae
        The SAE.
    model_name
        TransformerLens' name of the model [the last part of the name that the SAE states].
    hook_name, hook_layer
        TransformerLens' name of the hook, and its layer [where the SAE belongs].

    Raises
    ------
    ConfigError
        The codes alone do not give the reconstruction (a skip path, scaling of each row by itself), it is a transcoder,
        or nothing says where it belongs.
    """
    folded = _folded(sae)
    known = sae.provenance
    hook = hook_name or word_of(known_place(sae), known.get("hook_stated"))
    if hook is None:
        raise ConfigError("as_module: `hook_name` must be given, blocks.12.hook_resid_post say; the SAE states none.")
    model = model_name or str(known.get("model") or "").split("/")[-1]
    if not model:
        raise ConfigError("as_module: `model_name` must be given, gemma-2-2b say; the SAE does not state its model.")
    config = BenchConfig(
        model_name=model,
        d_in=folded.d_in,
        d_sae=folded.n_latents,
        hook_layer=layer_of(hook) if hook_layer is None else hook_layer,
        hook_name=hook,
        context_size=known.get("context"),
        hook_head_index=known.get("head"),
        architecture=folded.rule.name,
        architecture_str=folded.rule.name,
        activation_fn_str=folded.rule.name,
        activation_fn_kwargs=folded.rule.settings(),
        prepend_bos=bool(known.get("prepend_bos", True)),
        dataset_path=str(known.get("data") or ""),
        training_tokens=int(known.get("rows_seen") or -100_000),
    )
    return BenchModule(folded, config)


def _folded(sae: SAE) -> SAE:
    """Return the SAE without constants and norms of its own; refuse one whose codes alone do not give the rows."""
    folded = fold_constants(sae).fold_norms()
    if folded.scaling.kind != "none" or sae.W_skip is not None or sae.d_in != sae.d_out:
        what = "rows scaled each by itself" if folded.scaling.kind != "none" else "a skip path or other output rows"
        raise ConfigError(f"as_module: SAEBench decodes codes alone; this SAE has {what}.")
    return folded
