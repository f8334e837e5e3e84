"""SAEs in the formats of other libraries: written so that the library computes the same, or refused with the reason."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..errors import ConfigError, FormatError
from ..files import check_new_folder, write_bytes, write_json
from ..sae.model import SAE
from ..sae.rules import GroupMaxRule, JumpReLURule, ReLURule, TopKRule
from ..sae.scaling import Scaling
from ..settings import check_choice
from .formats.canonical import word_of
from .native import save
from .opening import load

_CHECKED_ROWS = 64


class Difference(NamedTuple):
    """How far what was written and read again is from the SAE, as fractions of the largest value."""

    codes: float
    reconstruction: float


def export(sae: SAE, folder: str | os.PathLike[str], to: str) -> Difference:
    """Write an SAE in the format of a library, read it back and compare codes and reconstructions on random rows.

    Parameters
    ----------
    sae
        The SAE.
    folder
        Where to write; must not exist, or be empty.
    to
        ``native``, ``saelens``, ``sparsify`` or ``dictionary_learning``.

    Returns
    -------
    Difference
        Largest differences between `sae` and what the files hold, measured on random rows of norm 1 and 30. Scaling by
        constants and a separate input bias are folded into the weights, so they are of the order of rounding.

    Raises
    ------
    ConfigError
        The format cannot express this SAE (says what), or the folder is not empty.
    FormatError
        What was written computes something else.
    """
    check_choice("convert", EXPORTS, to=to)
    folder = check_new_folder(folder, "convert")
    EXPORTS[to](sae, folder)
    difference = compare_with_file(sae, folder)
    limit = 1e-4 if sae.dtype == torch.float32 else 0.05
    if not max(difference) <= limit:
        raise FormatError(
            f"convert: `{folder}` computes something else than the SAE: codes differ by {difference.codes:.1e} and "
            f"reconstructions by {difference.reconstruction:.1e} of their largest value. Do not use it; report this."
        )
    return difference


def compare_with_file(sae: SAE, address: str | os.PathLike[str]) -> Difference:
    """Return the largest differences between an SAE and what a file holds, on random rows of norm 1 and 30.

    A unit whose pre-activation is within rounding of its threshold, or of the k-th largest, may differ: such rows are
    left out (those where the active latents are not the same).
    """
    again = load(address).to(sae.device, sae.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_CHECKED_ROWS, sae.d_in, generator=generator).to(sae.device, sae.dtype)
    x = x / x.norm(dim=1, keepdim=True)
    worst = [0.0, 0.0]
    for rows in (x, 30 * x):
        ours, theirs = sae.encode(rows).to_dense().float(), again.encode(rows).to_dense().float()
        same = ((ours != 0) == (theirs != 0)).all(1)
        if int((~same).sum()) > _CHECKED_ROWS // 8:
            return Difference(float("inf"), float("inf"))
        pairs = ((ours, theirs), (sae.reconstruct(rows).float(), again.reconstruct(rows).float()))
        for place, (a, b) in enumerate(pairs):
            gap = (a - b)[same].abs().max() / a.abs().max().clamp(min=1e-30)
            worst[place] = max(worst[place], float(gap))
    return Difference(*worst)


def fold_constants(sae: SAE) -> SAE:
    """Return the same function without scaling by constants: ``scalar`` and ``standardize`` become part of the weights.

    ``u = (x - mean) * scale``: ``W_enc *= scale`` (columns), ``b_enc -= W_enc @ mean``, ``b_pre /= scale``,
    ``W_dec /= scale``, ``b_dec = b_dec / scale + mean``. Pre-activations, and so rules and codes, stay as they are.
    """
    if sae.scaling.kind not in ("scalar", "standardize"):
        return sae
    scale, mean = sae.scaling.scale, sae.scaling.mean
    assert scale is not None  # these kinds have one
    W_enc = sae.W_enc * scale
    shift = torch.zeros_like(sae.b_enc) if mean is None else W_enc @ mean
    skip, b_dec = sae.W_skip, sae.b_dec / scale
    if skip is not None:
        skip = scale.expand(sae.d_in)[:, None] * skip / scale
        b_dec = b_dec - (0 if mean is None else mean @ skip)
    return sae.replace(
        W_enc=W_enc, b_enc=sae.b_enc - shift, b_pre=None if sae.b_pre is None else sae.b_pre / scale,
        W_dec=sae.W_dec / scale, b_dec=b_dec if mean is None else b_dec + mean, W_skip=skip, scaling=Scaling(),
    )  # fmt: skip


def _with_b_pre(sae: SAE, b_pre: Tensor | None) -> SAE:
    """Return the same function with another input bias: the difference goes into the encoder's bias."""
    old = torch.zeros_like(sae.W_enc[0]) if sae.b_pre is None else sae.b_pre
    new = torch.zeros_like(old) if b_pre is None else b_pre
    if torch.equal(old, new):
        return sae.replace(b_pre=b_pre)
    return sae.replace(b_pre=b_pre, b_enc=sae.b_enc + sae.W_enc @ (new - old))


def _refuse(to: str, what: str) -> ConfigError:
    return ConfigError(f"convert: the format {to} has no {what}; this SAE needs it. Nothing was written.")


def _tensor_file(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    # Tensors of an SAE may share memory (tied weights, a bias that is a row), which safetensors refuses.
    own = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
    write_bytes(folder / name, safetensors_bytes(own))


def _state_file(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save({key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}, buffer)
    write_bytes(folder / name, buffer.getvalue())


# ---------------------------------------------------------------------------------------------------------- formats


def _native(sae: SAE, folder: Path) -> None:
    save(sae, folder)


def _saelens(sae: SAE, folder: Path) -> None:
    sae = fold_constants(sae)
    transcoder = sae.W_skip is not None or sae.is_transcoder
    architecture, settings, tensors = _saelens_rule(sae, transcoder)
    subtract = not transcoder and sae.b_pre is not None and torch.equal(sae.b_pre, sae.b_dec)
    sae = _with_b_pre(sae, sae.b_dec if subtract else None)
    if sae.scaling.kind != "none" and transcoder:
        raise _refuse("saelens", "transcoder with scaled rows")
    normalize = {"none": "none", "layer_norm": "layer_norm", "row_norm": "constant_norm_rescale"}[sae.scaling.kind]
    known = sae.provenance
    metadata = {
        "model_name": known.get("model"), "hook_name": _hook_name(known),
        "context_size": known.get("context"), "prepend_bos": known.get("prepend_bos", True),
        "dataset_path": known.get("data"), "sae_lens_version": "6.0.0", "sae_lens_training_version": None,
        **({"hook_name_out": known.get("hook_out_stated") or known.get("hook_out")} if transcoder else {}),
    }  # fmt: skip
    config = {
        "architecture": architecture, "d_in": sae.d_in, "d_sae": sae.n_latents, "dtype": _dtype_name(sae),
        "device": "cpu", "apply_b_dec_to_input": subtract, "normalize_activations": normalize,
        "reshape_activations": "none", **({"d_out": sae.d_out} if transcoder else {}), **settings, "metadata": metadata,
    }  # fmt: skip
    own = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, **tensors}
    _tensor_file(folder, "sae_weights.safetensors", own)
    write_json(folder / "cfg.json", config)


def _hook_name(known: Mapping[str, Any]) -> str | None:
    """Return SAELens' name of the hook, or else whatever it was called."""
    stated = known.get("hook_stated")
    return word_of(known.get("hook"), stated) or stated or known.get("hook")


def _saelens_rule(sae: SAE, transcoder: bool) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return SAELens' name of the architecture, its settings, and the tensors of the rule and the skip."""
    rule = sae.rule
    skip = {} if sae.W_skip is None else {"W_skip": sae.W_skip.T}
    kind = ("skip_" if skip else "") + "transcoder"
    if isinstance(rule, ReLURule):
        return (kind if transcoder else "standard"), {}, skip
    if isinstance(rule, JumpReLURule):
        return (f"jumprelu_{kind}" if transcoder else "jumprelu"), {}, {"threshold": rule.threshold, **skip}
    if transcoder or not isinstance(rule, TopKRule):
        raise _refuse("saelens", f"{'transcoder' if transcoder else 'SAE'} with the rule {rule.name}")
    if rule.rank is not None:
        raise _refuse("saelens", "TopK that weighs latents in its choice; fold_norms() may remove the weights")
    if rule.threshold is not None:
        raise _refuse("saelens", "TopK with thresholds")
    if rule.sign == "signed":
        raise _refuse("saelens", "TopK with negative codes")
    name = "topk" if rule.sign == "positive" else "abstopk"
    return name, {"k": rule.k, "rescale_acts_by_decoder_norm": False}, {}


def _sparsify(sae: SAE, folder: Path) -> None:
    sae, rule = fold_constants(sae), sae.rule
    if sae.scaling.kind != "none":
        raise _refuse("sparsify", "scaling of rows by their own statistics")
    topk = isinstance(rule, TopKRule) and not rule.tensors() and rule.sign == "positive"
    groups = isinstance(rule, GroupMaxRule) and rule.rank is None and rule.group is None
    if not (topk or groups):
        raise _refuse("sparsify", f"rule {rule.name} with these settings (it has TopK and groupmax)")
    transcode = sae.is_transcoder
    sae = _with_b_pre(sae, None if transcode else sae.b_dec)
    config = {
        "activation": "topk" if topk else "groupmax", "expansion_factor": max(sae.n_latents // sae.d_in, 1),
        "normalize_decoder": False, "num_latents": sae.n_latents, "k": rule.settings()["k"], "multi_topk": False,
        "skip_connection": sae.W_skip is not None, "transcode": transcode, "d_in": sae.d_in,
    }  # fmt: skip
    own = {"encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    skip = {} if sae.W_skip is None else {"W_skip": sae.W_skip.T}
    _tensor_file(folder, "sae.safetensors", {**own, **skip})
    write_json(folder / "cfg.json", config)


def _dictionary_learning(sae: SAE, folder: Path) -> None:
    sae, rule = fold_constants(sae), sae.rule
    if sae.scaling.kind != "none" or sae.W_skip is not None or sae.is_transcoder:
        raise _refuse("dictionary_learning", "skip, transcoder or scaling of rows by their own statistics")
    layers = {"encoder.weight": sae.W_enc, "decoder.weight": sae.W_dec.T}
    if isinstance(rule, ReLURule):  # AutoEncoderNew: AutoEncoder would be rescaled when the library loads it
        sae = _with_b_pre(sae, None)
        kind, own = "AutoEncoderNew", {**layers, "encoder.bias": sae.b_enc, "decoder.bias": sae.b_dec}
    elif isinstance(rule, TopKRule) and not rule.tensors() and rule.sign == "positive":
        sae = _with_b_pre(sae, sae.b_dec)
        kind = "AutoEncoderTopK"
        own = {**layers, "encoder.bias": sae.b_enc, "b_dec": sae.b_dec, "k": torch.tensor(rule.k, dtype=torch.int),
               "threshold": torch.tensor(-1.0)}  # fmt: skip
    elif isinstance(rule, JumpReLURule):
        sae = _with_b_pre(sae, None)
        own = {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec,
               "threshold": rule.threshold}  # fmt: skip
        kind = "JumpReluAutoEncoder"
    else:
        raise _refuse("dictionary_learning", f"rule {rule.name} with these settings")
    known = sae.provenance
    trainer = {
        "dict_class": kind, "activation_dim": sae.d_in, "dict_size": sae.n_latents, "layer": known.get("layer"),
        "lm_name": known.get("model"), "submodule_name": known.get("hook"), "seed": known.get("seed"),
        **({"k": rule.k} if isinstance(rule, TopKRule) else {}),
    }  # fmt: skip
    _state_file(folder, "ae.pt", own)
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": known.get("context")}})


def _dtype_name(sae: SAE) -> str:
    return str(sae.dtype).removeprefix("torch.")


EXPORTS: dict[str, Callable[[SAE, Path], None]] = {
    "native": _native, "saelens": _saelens, "sparsify": _sparsify, "dictionary_learning": _dictionary_learning,
}  # fmt: skip
"""Writers by the name of their format."""
