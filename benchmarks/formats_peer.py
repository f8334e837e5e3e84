"""Write SAEs of every class of the other libraries, with their own code, and what they compute; runs beside them.

    .venv-peers/bin/python benchmarks/formats_peer.py write OUT
    .venv-peers/bin/python benchmarks/formats_peer.py read OUT

``write`` leaves ``OUT/<library>/<case>`` (what the library saved), ``OUT/<library>/<case>.safetensors`` (rows of
norm 1 and 30, the library's dense codes and reconstructions) and ``OUT/index.json``. ``read`` loads saekit's
``OUT/exports/<format>/<case>`` and leaves ``<case>.safetensors`` next to it. `benchmarks/formats.py` calls both.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

N, D, K = 32, 8, 4
Encode = Callable[[Tensor], Tensor]
Case = tuple[str, str, Encode, Encode]  # name, address below the case's folder, dense codes, reconstruction

warnings.filterwarnings("ignore")


def rows() -> Tensor:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(7)) + 0.3
    x = x / x.norm(dim=1, keepdim=True)
    return torch.cat([x, 30 * x])


def fill(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter and floating buffer random numbers: an initialization would hide what a zero bias does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.dtype.is_floating_point:
                continue
            value = torch.randn(tensor.shape, generator=generator)
            positive = "threshold" in name and "log" not in name
            tensor.copy_(value.abs() * 0.4 + 0.1 if positive else value * (1.0 if value.ndim > 1 else 0.3))


def sae_lens_cases(folder: Path) -> Iterator[Case]:
    import sae_lens as lens
    from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKSAEConfig

    def make(name: str, cls: Any, config: Any) -> Case:
        sae = cls(config)
        fill(sae)
        if name.endswith("folded"):  # the library's own fold of expected_average_only_in
            sae.fold_activation_norm_scaling_factor(0.37)
        sae.save_model(folder / name)
        return name, "", sae.encode, sae.forward

    common: dict[str, Any] = {"d_in": D, "d_sae": N}
    for normalize in ("none", "layer_norm"):
        for subtract in (True, False):
            own = {**common, "apply_b_dec_to_input": subtract, "normalize_activations": normalize}
            tail = f"{normalize}-{'b_dec' if subtract else 'raw'}"
            yield make(f"standard-{tail}", lens.StandardSAE, lens.StandardSAEConfig(**own))
            yield make(f"gated-{tail}", lens.GatedSAE, lens.GatedSAEConfig(**own))
            yield make(f"jumprelu-{tail}", lens.JumpReLUSAE, lens.JumpReLUSAEConfig(**own))
            for rescale in (True, False):
                name = f"{'rescaled-' if rescale else ''}{tail}"
                options = {**own, "k": K, "rescale_acts_by_decoder_norm": rescale}
                yield make(f"topk-{name}", lens.TopKSAE, lens.TopKSAEConfig(**options))
                yield make(f"abstopk-{name}", AbsTopKSAE, AbsTopKSAEConfig(**options))
    folded = {**common, "normalize_activations": "expected_average_only_in"}
    yield make("standard-folded", lens.StandardSAE, lens.StandardSAEConfig(**folded))
    yield make("topk-folded", lens.TopKSAE, lens.TopKSAEConfig(**folded, k=K))
    yield make("jumprelu-folded", lens.JumpReLUSAE, lens.JumpReLUSAEConfig(**folded))
    yield make("gated-folded", lens.GatedSAE, lens.GatedSAEConfig(**folded))
    coder = {**common, "d_out": D + 2, "apply_b_dec_to_input": False}
    yield make("transcoder", lens.Transcoder, lens.TranscoderConfig(**coder))
    yield make("jumprelu_transcoder", lens.JumpReLUTranscoder, lens.JumpReLUTranscoderConfig(**coder))
    yield make("skip_transcoder", lens.SkipTranscoder, lens.SkipTranscoderConfig(**coder))
    yield make("jumprelu_skip_transcoder", lens.JumpReLUSkipTranscoder, lens.JumpReLUSkipTranscoderConfig(**coder))
    yield from _sae_lens_training(folder, common)


def _sae_lens_training(folder: Path, common: dict[str, Any]) -> Iterator[Case]:
    """Yield inference exports of the training classes: BatchTopK becomes JumpReLU with one threshold."""
    import sae_lens as lens

    for name, cls, config in (
        ("batchtopk", lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig),
        ("matryoshka_batchtopk", lens.MatryoshkaBatchTopKTrainingSAE, lens.MatryoshkaBatchTopKTrainingSAEConfig),
    ):
        extra = {"matryoshka_widths": [N // 2, N]} if "matryoshka" in name else {}
        sae = cls(config(**common, k=K, **extra))
        fill(sae)
        sae.topk_threshold.fill_(0.6)
        sae.save_inference_model(folder / name)
        loaded = lens.SAE.load_from_disk(folder / name)
        yield name, "", loaded.encode, loaded.forward


def eai_sparsify_cases(folder: Path) -> Iterator[Case]:
    from sparsify import SparseCoder, SparseCoderConfig

    for activation in ("topk", "groupmax"):
        for transcode in (False, True):
            for skip in (False, True):
                name = "-".join([activation, *(["transcode"] if transcode else []), *(["skip"] if skip else [])])
                config = SparseCoderConfig(
                    activation=activation, num_latents=N, k=K, transcode=transcode, skip_connection=skip
                )
                coder = SparseCoder(D, config, device="cpu", dtype=torch.float32)
                fill(coder)
                coder.save_to_disk(folder / name)

                def encode(x: Tensor, coder: Any = coder) -> Tensor:
                    out = coder.encode(x)
                    return torch.zeros(len(x), N).scatter_(1, out.top_indices.long(), out.top_acts.float())

                def decode(x: Tensor, coder: Any = coder) -> Tensor:
                    return coder(x).sae_out

                yield name, "", encode, decode


def dictionary_learning_cases(folder: Path) -> Iterator[Case]:
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = [
        (classes.AutoEncoder, (D, N)), (classes.AutoEncoderNew, (D, N)), (classes.GatedAutoEncoder, (D, N)),
        (classes.JumpReluAutoEncoder, (D, N)), (AutoEncoderTopK, (D, N, K)), (BatchTopKSAE, (D, N, K)),
        (MatryoshkaBatchTopKSAE, (D, N, K, [N // 2, N // 2])),
    ]  # fmt: skip
    for cls, arguments in made:
        for scaled in (False, True):
            if scaled and not hasattr(cls, "scale_biases"):
                continue
            sae = cls(*arguments)
            fill(sae)
            if scaled:
                sae.scale_biases(4.2)  # what training with normalize_activations does before it saves
            name = f"{cls.__name__}{'-scaled' if scaled else ''}"
            (folder / name).mkdir(parents=True)
            torch.save(sae.state_dict(), folder / name / "ae.pt")
            trainer = {"dict_class": cls.__name__, "activation_dim": D, "dict_size": N, "k": K, "layer": 3}
            (folder / name / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
            yield name, "", sae.encode, (lambda x, sae=sae: sae(x))


def llamascopium_cases(folder: Path) -> Iterator[Case]:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    hooks = {False: ("blocks.3.hook_resid_post",) * 2, True: ("blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out")}
    for act_fn in ("relu", "topk", "jumprelu"):
        for norm in ("inference", "dataset-wise", "token-wise"):
            for with_norm in (True, False):
                for transcoder in (False, True):
                    if transcoder and norm == "token-wise":
                        continue
                    hook_in, hook_out = hooks[transcoder]
                    config = SAEConfig(
                        d_model=D, expansion_factor=N / D, hook_point_in=hook_in, hook_point_out=hook_out,
                        act_fn=act_fn, norm_activation=norm, sparsity_include_decoder_norm=with_norm, top_k=K,
                        dtype=torch.float32, device="cpu",
                    )  # fmt: skip
                    sae = SparseAutoEncoder(config)
                    fill(sae)
                    sae.set_dataset_average_activation_norm({hook_in: 5.0, hook_out: 2.0 if transcoder else 5.0})
                    name = "-".join(
                        [act_fn, norm, "norms" if with_norm else "plain", *(["transcoder"] if transcoder else [])]
                    )
                    (folder / name).mkdir(parents=True)
                    sae.save_pretrained(str(folder / name))
                    config.save_hyperparameters(folder / name)
                    yield name, "", *_llamascopium_calls(sae, hook_in, hook_out, norm)


def _llamascopium_calls(sae: Any, hook_in: str, hook_out: str, norm: str) -> tuple[Encode, Encode]:
    """Return codes and reconstructions on raw rows: normalized, encoded, decoded and scaled back by the library."""

    def scaled(x: Tensor) -> tuple[Tensor, Any, Any]:
        batch = {hook_in: x, hook_out: x} if hook_in != hook_out else {hook_in: x}
        normalized, factors = sae.normalize_activations(batch, return_scale_factor=True)
        return normalized[hook_in], factors[hook_in], factors[hook_out]

    def encode(x: Tensor) -> Tensor:
        u, s_in, _ = scaled(x)
        codes = sae.encode(u)
        # A fold into raw rows divides the codes by the factor of the rows: compared on that scale.
        return codes / s_in if norm == "dataset-wise" else codes

    def reconstruct(x: Tensor) -> Tensor:
        u, _, s_out = scaled(x)
        return sae.decode(sae.encode(u)) / s_out

    return encode, reconstruct


def latentsae_cases(folder: Path) -> Iterator[Case]:
    from latentsae.sae import Sae
    from latentsae.utils.config import SaeConfig, SaeType

    options: dict[str, dict[str, Any]] = {
        "topk": {}, "topk-centred": {"mean_center": True}, "abstopk": {"sae_type": "abstopk"},
        "matryoshka": {"sae_type": "matryoshka", "matryoshka_sizes": f"{N // 2},{N}", "matryoshka_ks": f"2,{K}"},
        "jumprelu": {"sae_type": "jumprelu"}, "topk-skip": {"use_skip": True},
        "topk-low-rank-skip": {"use_skip": True, "skip_rank": 2, "mean_center": True},
        "refused-gated": {"sae_type": "gated"}, "refused-lista": {"sae_type": "lista"},
        "refused-cosine": {"sae_type": "cosine"}, "batchtopk": {"sae_type": "batchtopk"},
    }  # fmt: skip
    for name, own in options.items():
        kind = SaeType(own.pop("sae_type", "topk"))
        config = SaeConfig(sae_type=kind, num_latents=N, k=K, **own)
        sae = Sae(D, config).eval()
        fill(sae)
        sae.save_to_disk(folder / name)

        def encode(x: Tensor, sae: Any = sae) -> Tensor:
            out = sae.encode(x)
            return torch.zeros(len(x), N).scatter_(1, out.top_indices, out.top_acts)

        yield name, "", encode, (lambda x, sae=sae: sae(x).sae_out)


def hypothesaes_cases(folder: Path) -> Iterator[Case]:
    from hypothesaes.sae import SparseAutoencoder

    folder.mkdir(parents=True, exist_ok=True)
    for name, own in {
        "topk": {},
        "matryoshka": {"prefix_lengths": [N // 2, N]},
        "batchtopk": {"use_batch_topk": True},
    }.items():
        sae = SparseAutoencoder(D, N, K, **own)
        fill(sae)
        sae.eval()
        sae.save(str(folder / f"{name}.pt"))

        def encode(x: Tensor, sae: Any = sae) -> Tensor:
            return sae(x)[1]["activations"]

        yield name, f"../{name}.pt", encode, (lambda x, sae=sae: sae(x)[0])


def circuit_tracer_cases(folder: Path) -> Iterator[Case]:
    from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    for activation in ("relu", "jumprelu", "topk"):
        for skip in (False, True):
            function: Any = {
                "relu": torch.nn.functional.relu,
                "jumprelu": JumpReLU(torch.full((N,), 0.4), 0.1),
                "topk": TopK(K),
            }[activation]
            coder = SingleLayerTranscoder(D, N, function, 4, skip_connection=skip, dtype=torch.float32)
            fill(coder)
            name = f"{activation}{'-skip' if skip else ''}"
            (folder / name).mkdir(parents=True)
            coder.to_safetensors(str(folder / name / "layer_4.safetensors"))
            extra = f"activation: topk\nk: {K}\n" if activation == "topk" else ""
            (folder / name / "config.yaml").write_text(
                f"model_name: gpt2\nfeature_input_hook: ln2.hook_normalized\nfeature_output_hook: hook_mlp_out\n{extra}"
            )
            yield name, "layer_4.safetensors", coder.encode, (lambda x, coder=coder: coder(x))


def sentence_transformers_cases(folder: Path) -> Iterator[Case]:
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    for normalize in (False, True):
        sae = SparseAutoEncoder(D, N, k=K, k_aux=8, normalize=normalize)
        fill(sae)
        name = f"csr{'-normalized' if normalize else ''}"
        (folder / name).mkdir(parents=True)
        sae.save(str(folder / name))
        sae.eval()

        def encode(x: Tensor, sae: Any = sae) -> Tensor:
            return sae({"sentence_embedding": x})["sentence_embedding"].to_dense()

        def reconstruct(x: Tensor, sae: Any = sae) -> Tensor:
            return sae.decode(encode(x), sae.prepare(x)[1])

        yield name, "", encode, reconstruct


LIBRARIES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "sae-lens": sae_lens_cases, "eai-sparsify": eai_sparsify_cases, "dictionary-learning": dictionary_learning_cases,
    "llamascopium": llamascopium_cases, "latentsae": latentsae_cases, "hypothesaes": hypothesaes_cases,
    "circuit-tracer": circuit_tracer_cases, "sentence-transformers": sentence_transformers_cases,
}  # fmt: skip


def load(kind: str, folder: Path) -> tuple[Encode, Encode]:
    """Return dense codes and reconstruction of an exported SAE, as its library loads it."""
    if kind == "saelens":
        from sae_lens import SAE

        sae = SAE.load_from_disk(str(folder))
        return sae.encode, sae.forward
    if kind == "sparsify":
        from sparsify import SparseCoder

        coder = SparseCoder.load_from_disk(folder, device="cpu")

        def encode(x: Tensor) -> Tensor:
            out = coder.encode(x)
            return torch.zeros(len(x), coder.num_latents).scatter_(1, out.top_indices.long(), out.top_acts.float())

        return encode, lambda x: coder(x).sae_out
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    name = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    cls: Any = AutoEncoderTopK if name == "AutoEncoderTopK" else getattr(classes, name)
    autoencoder = cls.from_pretrained(str(folder / "ae.pt"))
    return autoencoder.encode, autoencoder


def read(out: Path) -> None:
    x = rows()
    for folder in sorted((out / "exports").glob("*/*/")):
        with torch.no_grad():
            encode, reconstruct = load(folder.parent.name, folder)
            found = {"x": x, "codes": encode(x.clone()).contiguous(), "x_hat": reconstruct(x.clone()).contiguous()}
        save_file(found, folder.with_name(f"{folder.name}.safetensors"))


def write(out: Path) -> None:
    x = rows()
    index: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for library, cases in LIBRARIES.items():
        try:
            for name, inside, encode, reconstruct in cases(out / library):
                with torch.no_grad():
                    codes, x_hat = encode(x.clone()), reconstruct(x.clone())
                expected = {"x": x, "codes": codes.float().contiguous(), "x_hat": x_hat.float().contiguous()}
                save_file(expected, out / library / f"{name}.safetensors")
                index.append({"library": library, "version": version(library), "case": name, "inside": inside})
        except Exception:
            failed[library] = traceback.format_exc(limit=3)
            print(f"{library}: {failed[library]}", file=sys.stderr)
    (out / "index.json").write_text(json.dumps({"cases": index, "failed": failed}, indent=1))


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
