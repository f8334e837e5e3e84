"""SAEs that are known to exist: releases by model, and single SAEs of an installed SAELens' registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ConfigError, FormatError, MissingExtraError, did_you_mean

REGISTRY = "saelens:"
"""Prefix of an address by the names of SAELens' registry: ``saelens:gpt2-small-res-jb/blocks.8.hook_resid_pre``."""


@dataclass(frozen=True)
class Release:
    """One release: SAEs of one kind of one model."""

    model: str
    """Model, by its name on the hub."""
    place: str
    """What the SAEs read: residual stream, mlp out, attention (hook_z), transcoder."""
    layers: str
    """Layers that it has, from 0."""
    widths: str
    """Numbers of latents; – where only the files say it."""
    address: str
    """Address of one of its SAEs; the parts that differ stand in braces."""
    format: str
    """Format, as `saekit.store.formats` names it."""
    example: str
    """An address that can be loaded as it is."""

    def matches(self, words: tuple[str, ...]) -> bool:
        """Return whether every word stands in one of its facts, whatever the case."""
        text = " ".join((self.model, self.place, self.address, self.format, self.example)).lower()
        return all(word.lower() in text for word in words)


def _gemma_scope() -> Iterator[Release]:
    rows = [
        ("2b-pt-res", "google/gemma-2-2b", "residual", "0–25", "16k–1m", "layer_12/width_16k/average_l0_82"),
        ("2b-pt-mlp", "google/gemma-2-2b", "mlp out", "0–25", "16k, 65k", "layer_{L}/width_16k/average_l0_{l0}"),
        ("2b-pt-att", "google/gemma-2-2b", "attention (hook_z)", "0–25", "16k, 65k",
         "layer_{L}/width_16k/average_l0_{l0}"),
        ("2b-pt-transcoders", "google/gemma-2-2b", "transcoder", "0–25", "16k", "layer_{L}/width_16k/average_l0_{l0}"),
        ("9b-pt-res", "google/gemma-2-9b", "residual", "0–41", "16k–1m",
         "layer_{L}/width_16k/average_l0_{l0}"),
        ("9b-pt-mlp", "google/gemma-2-9b", "mlp out", "0–41", "16k, 131k", "layer_{L}/width_16k/average_l0_{l0}"),
        ("9b-pt-att", "google/gemma-2-9b", "attention (hook_z)", "0–41", "16k, 131k",
         "layer_{L}/width_16k/average_l0_{l0}"),
        ("9b-it-res", "google/gemma-2-9b-it", "residual", "9, 20, 31", "16k, 131k",
         "layer_{L}/width_16k/average_l0_{l0}"),
        ("27b-pt-res", "google/gemma-2-27b", "residual", "10, 22, 34", "131k", "layer_{L}/width_131k/average_l0_{l0}"),
    ]  # fmt: skip
    for name, model, place, layers, widths, example in rows:
        repository = f"hf:google/gemma-scope-{name}"
        pattern = f"{repository}/layer_{{layer}}/width_{{width}}/average_l0_{{l0}}"
        yield Release(model, place, layers, widths, pattern, "gemma_scope", f"{repository}/{example}")
    for size, l0 in (("2b", 6), ("9b", 14)):
        repository = f"hf:google/gemma-scope-{size}-pt-res"
        yield Release(f"google/gemma-2-{size}", "embedding", "–", "4k",
                      f"{repository}/embedding/width_4k/average_l0_{{l0}}", "gemma_scope",
                      f"{repository}/embedding/width_4k/average_l0_{l0}")  # fmt: skip


def _gemma_scope_2() -> Iterator[Release]:
    for size in ("270m", "1b", "4b", "12b", "27b"):
        for tuned in ("pt", "it"):
            for folder, place in (("resid_post", "residual"), ("mlp_out", "mlp out"),
                                  ("attn_out", "attention (hook_z)"), ("transcoder", "transcoder")):  # fmt: skip
                if (size, tuned) == ("27b", "pt") and folder in ("mlp_out", "attn_out"):
                    continue  # no such release
                repository = f"hf:google/gemma-scope-2-{size}-{tuned}"
                pattern = f"{repository}/{folder}[_all]/layer_{{layer}}_width_{{width}}_l0_{{small,medium,big}}"
                pattern += "[_affine]" if folder == "transcoder" else ""
                example = f"{repository}/{folder}_all/layer_{{layer}}_width_16k_l0_small"
                model = "google/gemma-3-270m" if (size, tuned) == ("270m", "pt") else f"google/gemma-3-{size}-{tuned}"
                yield Release(model, place, "all", "16k–1m", pattern, "gemma_scope_2", example)


def _llama_scope() -> Iterator[Release]:
    for letter, place in (("R", "residual"), ("M", "mlp out"), ("A", "attention out")):
        for times, width in ((8, "32k"), (32, "131k")):
            repository = f"hf:fnlp/Llama3_1-8B-Base-LX{letter}-{times}x"
            pattern = f"{repository}/Llama3_1-8B-Base-L{{layer}}{letter}-{times}x"
            yield Release("meta-llama/Llama-3.1-8B", place, "0–31", width, pattern, "llama_scope",
                          pattern.replace("{layer}", "15"))  # fmt: skip
    pattern = "hf:fnlp/Llama-Scope-R1-Distill/{data}/L{layer}R"
    yield Release("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "residual", "0–31", "–", pattern, "llama_scope", pattern)


def _qwen_scope() -> Iterator[Release]:
    for model, width in (("Qwen3-1.7B-Base", 32), ("Qwen3-8B-Base", 64), ("Qwen3-30B-A3B-Base", 32),
                         ("Qwen3-30B-A3B-Base", 128), ("Qwen3.5-2B-Base", 32), ("Qwen3.5-9B-Base", 64),
                         ("Qwen3.5-27B", 80), ("Qwen3.5-35B-A3B-Base", 32), ("Qwen3.5-35B-A3B-Base", 128)):  # fmt: skip
        pattern = f"hf:Qwen/SAE-Res-{model}-W{width}K-L0_{{50,100}}/layer{{layer}}.sae.pt"
        example = pattern.replace("{50,100}", "100" if width == 128 else "50").replace("{layer}", "10")
        yield Release(f"Qwen/{model}", "residual", "all", f"{width}k", pattern, "qwen_scope", example)


def _others() -> Iterator[Release]:
    yield Release("openai-community/gpt2", "residual (before the block)", "0–11, and 11 after it", "24,576",
                  "hf:jbloom/GPT2-Small-SAEs-Reformatted/blocks.{layer}.hook_resid_pre", "saelens",
                  "hf:jbloom/GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre")  # fmt: skip
    for site in ("resid-post", "mlp-out", "attn-out", "resid-mid"):
        for width in ("32k", "128k"):
            pattern = f"hf:jbloom/GPT2-Small-OAI-v5-{width}-{site}-SAEs/v5_{width}_layer_{{layer}}"
            example = pattern.replace("{layer}", "6") + (".pt" if (site, width) == ("resid-post", "32k") else "")
            yield Release("openai-community/gpt2", site.replace("-", " "), "0–11", width, pattern, "saelens", example)
    yield Release("openai-community/gpt2", "attention (hook_z)", "0–11", "24,576",
                  "hf:ckkissane/attn-saes-gpt2-small-all-layers/{name}.pt", "hook_z",
                  "hf:ckkissane/attn-saes-gpt2-small-all-layers/{name}.pt")  # fmt: skip
    for model, place, layer, file in (("Llama-3.1-8B-Instruct", "residual", "19", "l19.pth"),
                                      ("Llama-3.3-70B-Instruct", "residual", "50", "l50.pt")):  # fmt: skip
        address = f"hf:Goodfire/{model}-SAE-l{layer}/{model}-SAE-{file}"
        yield Release(f"meta-llama/{model}", place, layer, "65,536", address, "single_file", address)
    address = "hf:qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19/DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    yield Release(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "residual", "19", "65,536", address, "single_file", address
    )
    pattern = "hf:EleutherAI/sae-llama-3-8b-32x/layers.{layer}"
    yield Release("meta-llama/Meta-Llama-3-8B", "residual", "–", "131,072", pattern, "sparsify",
                  pattern.replace("{layer}", "10"))  # fmt: skip
    for model in ("0.6b-transcoders-lowl0", "1.7b-transcoders-lowl0", "4b-transcoders", "8b-transcoders",
                  "14b-transcoders", "14b-transcoders-lowl0"):  # fmt: skip
        pattern = f"hf:mwhanna/qwen3-{model}/layer_{{layer}}.safetensors"
        yield Release(f"Qwen/Qwen3-{model.split('-')[0].upper()}", "transcoder", "all", "–", pattern,
                      "circuit_tracer", pattern.replace("{layer}", "10"))  # fmt: skip
    for model, repository in (("meta-llama/Llama-3.1-8B-Instruct", "saes-llama-3.1-8b-instruct"),
                              ("Qwen/Qwen2.5-7B-Instruct", "saes-qwen2.5-7b-instruct"),
                              ("openai/gpt-oss-20b", "saes-gpt-oss-20b")):  # fmt: skip
        pattern = f"hf:andyrdt/{repository}/resid_post_layer_{{layer}}/trainer_{{trainer}}"
        yield Release(model, "residual", "3, 7, 11, …", "–", pattern, "dictionary_learning", pattern)
    for model, place, layers, width, pattern in (
        ("EleutherAI/pythia-70m-deduped", "residual", "3, 4", "–",
         "hf:canrager/lm_sae/pythia70m_sweep_{gated,panneal,standard,topk}_ctx128_{date}/resid_post_layer_{layer}/trainer_{n}"),
        ("google/gemma-2-2b", "residual", "12", "4,096", "hf:adamkarvonen/saebench_gemma-2-2b_width-2pow12_date-0108/"
         "MatryoshkaBatchTopK_gemma-2-2b__0108/resid_post_layer_12/trainer_{n}"),
    ):  # fmt: skip
        yield Release(model, place, layers, width, pattern, "dictionary_learning", pattern)
    pattern = (
        "hf:canrager/saebench_gemma-2-2b_width-2pow{12,14,16}_date-{date}/{run}/resid_post_layer_{layer}/trainer_{n}"
    )
    yield Release("google/gemma-2-2b", "residual", "5, 12, 19", "4,096–65,536", pattern, "dictionary_learning", pattern)


_OF_SAELENS = (
    ("openai-community/gpt2", "mlp out", "0–11", "24,576", "tommmcgrath/gpt2-small-mlp-out-saes",
     "sae_group_gpt2_blocks.{layer}.hook_mlp_out_24576:{version}"),
    ("openai-community/gpt2", "residual (before the block)", "8", "768–98,304",
     "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8", "blocks.8.hook_resid_pre_{768,1536,3072,…}"),
    *(("openai-community/gpt2", "residual (before the block)", "2, 6, 10", "–",
       f"neuronpedia/gpt2-small__res_{kind}-ajt", f"{{2,6,10}}-res_{kind}-ajt")
      for kind in ("sce", "scefr", "scl", "sle", "slefr", "sll")),
    ("meta-llama/Meta-Llama-3-8B-Instruct", "residual", "25", "–", "Juliushanhanhan/llama-3-8b-it-res",
     "blocks.25.hook_resid_post"),
    ("mistralai/Mistral-7B-v0.1", "residual (before the block)", "8, 16, 24", "–",
     "JoshEngels/Mistral-7B-Residual-Stream-SAEs", "mistral_7b_layer_{8,16,24}"),
    *(("EleutherAI/pythia-70m-deduped", place, "0–5", "–", f"ctigges/pythia-70m-deduped__{kind}-sm_processed",
       f"{{layer}}-{kind}-sm") for kind, place in (("res", "residual"), ("mlp", "mlp out"), ("att", "attn out"))),
    ("google/gemma-2b", "residual", "0, 6, 10, 12, 17", "16,384", "jbloom/Gemma-2b-Residual-Stream-SAEs",
     "gemma_2b_blocks.{layer}.hook_resid_post_16384{training}"),
    ("google/gemma-2b-it", "residual", "12", "16,384", "jbloom/Gemma-2b-IT-Residual-Stream-SAEs",
     "gemma_2b_it_blocks.12.hook_resid_post_16384"),
    ("google/gemma-2-2b", "residual", "0–24", "32k", "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40",
     "{standard,snap}/blocks.{layer}.hook_resid_post"),
    ("google/gemma-2-9b", "residual", "0–40", "32k", "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60",
     "blocks.{layer}.hook_resid_post"),
    ("google/gemma-3-1b-pt", "residual", "0–24", "32k", "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40",
     "blocks.{layer}.hook_resid_post"),
)  # fmt: skip
"""Smaller releases in SAELens' format: model, place, layers, widths, repository, SAEs in it."""


def _of_saelens() -> Iterator[Release]:
    for model, place, layers, widths, repository, inside in _OF_SAELENS:
        address = f"hf:{repository}/{inside}"
        yield Release(model, place, layers, widths, address, "saelens", address)


@cache
def releases() -> tuple[Release, ...]:
    """Return every release that saekit knows, from facts written down here; no network is asked."""
    return (*_gemma_scope(), *_gemma_scope_2(), *_llama_scope(), *_qwen_scope(), *_others(), *_of_saelens())


def find_releases(*words: str) -> list[Release]:
    """Return the releases whose facts hold every word: ``find_releases("gemma", "transcoder")``.

    Parameters
    ----------
    *words
        Parts of a model's name, a place, a format; none returns all.
    """
    return [release for release in releases() if release.matches(words)]


# --------------------------------------------------------------------------------------------------------- SAELens


@cache
def registry() -> Mapping[str, Mapping[str, Any]]:
    """Return the registry of the installed SAELens: release -> its entry. Read as text; the package is not imported.

    Raises
    ------
    MissingExtraError
        `sae-lens` is not installed.
    """
    import yaml

    spec = find_spec("sae_lens")
    file = Path(spec.origin).parent / "pretrained_saes.yaml" if spec is not None and spec.origin else None
    if file is None or not file.is_file():
        raise MissingExtraError(
            f"names that begin with `{REGISTRY}` come from the registry of SAELens, which is not installed: "
            "pip install sae-lens. `saekit catalog` lists addresses that need no other package."
        )
    value = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise FormatError(f"`{file}` must be a mapping of releases; it is not. Install sae-lens again.")
    return {name: entry for name, entry in value.items() if isinstance(entry, dict) and "repo_id" in entry}


def resolve(address: str) -> str:
    """Return the hub address of ``saelens:<release>/<sae id>``; any other address as it is.

    Raises
    ------
    ConfigError
        There is no such release or SAE.
    FormatError
        The release holds no SAEs.
    MissingExtraError
        `sae-lens` is not installed.
    """
    if not address.startswith(REGISTRY):
        return address
    entry, sae = _entry_of(address)
    return f"hf:{entry['repo_id']}/{sae['path']}"


def corrections(address: str) -> dict[str, Any]:
    """Return what SAELens' registry says instead of the configuration of an SAE, or in addition to it.

    Without them some files mean something else: their rows were scaled, and only the registry knows it.
    """
    if not address.startswith(REGISTRY):
        return {}
    entry, sae = _entry_of(address)
    factor = sae.get("norm_scaling_factor")
    if entry.get("conversion_func") is not None:  # other libraries' files, which hold their own
        return {}
    return {**(entry.get("config_overrides") or {}), **({} if factor is None else {"norm_scaling_factor": factor})}


def _entry_of(address: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the entries of a release and of one of its SAEs in the registry."""
    release, _, wanted = address.removeprefix(REGISTRY).partition("/")
    known = registry()
    if release not in known:
        raise ConfigError(f"SAELens has no release `{release}`. {did_you_mean(release, known)}")
    if "clt" in str(known[release].get("conversion_func")):
        raise FormatError(
            f"the release `{release}` of SAELens is a cross-layer transcoder, which saekit does not read: it writes to "
            "many layers."
        )
    saes = {str(sae["id"]): sae for sae in known[release].get("saes", []) if "id" in sae}
    if wanted not in saes:
        raise ConfigError(f"the release `{release}` of SAELens has no SAE `{wanted}`. {did_you_mean(wanted, saes)}")
    return known[release], saes[wanted]
