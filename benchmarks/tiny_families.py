"""Tiny random models of every family that transformers knows: configs shrunk by the names of their fields.

A family is a ``model_type``. Its default config is made small by rules on names (widths, heads, layers, experts,
vocabulary, images); the few families that need more have a line in `OVERRIDES`.
"""

# ruff: noqa: E501  (one rule is one line)

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

WIDTH, HEADS, HEAD_DIM, KV_HEADS, LAYERS = 32, 4, 8, 2, 3
VOCABULARY, POSITIONS = 48, 64
IMAGE, PATCH = 16, 4
IMAGE_TOKEN = 45

# Rules by field name, first match first: a value, or a function of the default value.
_RULES: list[tuple[str, Any]] = [
    (r"pad_token_id|pad_idx|pad_index", 0),
    (r"bos_token_id|bos_index|decoder_start_token_id|cls_token_id", 1),
    (r"eos_token_id|eos_index|sep_token_id", 2),
    (r"image_token_(id|index)", IMAGE_TOKEN),
    (r".*_token_(id|index)|.*_token_ids?|unk_index|mask_index|.*_tok_id", lambda v: 3 if isinstance(v, int) and v > 3 else None),
    (r"(.*_)?vocab_size(_per_layer_input)?|vocab_size_.*|.*_vocab_size", VOCABULARY),
    (r"num_experts_per_tok|top_k|moe_top_?k|moe_k|num_experts_per_token|.*_topk|experts_per_token|num_selected_experts", 2),
    (r"n_group|topk_group|n_groups|.*_n_groups|num_expert_groups?|mamba_n_groups", 1),
    (r"n_shared_experts|num_shared_experts", 1),
    (r"(.*_)?(num|n)_(.*_)?experts|num_local_experts|(.*_)?num_experts", lambda v: 4 if v else None),
    (r"first_k_dense_replace|moe_layer_start_index", lambda v: min(v, 1)),
    (r"(q|kv|o|qk|index_q)_lora_rank|lora_rank|.*_rank", 8),
    (r"mamba_n_heads", 8),
    (r"index_head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|.*head_dim|d_kv|attention_head_size|d_head|kv_channels", HEAD_DIM),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|.*_key_value_heads|multi_query_group_num|num_key_heads|num_kv_shared_heads", KV_HEADS),
    (r"(.*_)?(num_)?attention_heads|n_heads?|(.*_)?num_heads|encoder_attention_heads|(.*_)?n_head|attn_heads|.*_num_heads", HEADS),
    (r"num_kv_shared_layers|num_nextn_predict_layers|mtp_num_layers|num_mtp_layers|num_mtp_modules", 0),
    (r"(.*_)?(num_)?hidden_layers|n_layers?|(.*_)?num_layers|(encoder|decoder)_layers|num_(encoder|decoder)_layers|depth|num_block(s)?", LAYERS),
    (r"intermediate_size(_.*)?|.*_intermediate_size|(.*_)?ffn_dim|n_inner|d_ff|.*ffn_hidden_size|ffn_.*size|dense_ffn.*|inner_dim|block_ff_dim|feed_forward_size|.*mlp_dim", lambda v: 2 * WIDTH if isinstance(v, int) else None),
    (r"hidden_size_per_layer_input|laurel_rank", 8),
    (r"rotary_dim", 4),
    (r"residual_multiplier", 0.7),
    (r"mamba_n_heads", 8),
    (r"mamba_d_head|mamba_headdim", 8),
    (r"hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|n_embed|model_dim|embedding_size|embedding_dim|(.*_)?hidden_size|projection_dim|emb_size|proj_size|word_embed_proj_dim|projector_dim|lru_width|d_embed|embed_proj_dim|vision_hidden_dim|vision_embed_dim", lambda v: WIDTH if isinstance(v, int) else None),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|max_source_positions|max_target_positions|max_2d_position_embeddings|(.*_)?max_position_embeddings", POSITIONS),
    (r"sliding_window|attention_window_size|window_size|local_attention|attention_chunk_size|block_size", lambda v: 8 if isinstance(v, int) and v > 8 else None),
    (r"image_size|img_size", lambda v: IMAGE if isinstance(v, int) else [IMAGE] * len(v) if isinstance(v, list | tuple) else None),
    (r"patch_size", lambda v: PATCH if isinstance(v, int) else [PATCH] * len(v) if isinstance(v, list | tuple) else None),
    (r".*state_size|.*d_state", 8),
    (r"num_register_tokens", lambda v: min(v, 2)),
    (r"(.*_)?(chunk_size|chunk_length)", lambda v: 8 if isinstance(v, int) and v > 8 else None),
    (r"dropout|.*_dropout(_rate|_prob)?|.*_pdrop|.*drop.*rate|layerdrop|.*_layerdrop", lambda v: 0.0 if isinstance(v, float) else None),
]  # fmt: skip

_EVEN_IF_NONE = {
    "head_dim": HEAD_DIM, "num_key_value_heads": HEADS, "num_experts_per_tok": 2, "n_routed_experts": 4,
    "n_shared_experts": 1,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}

_SWIN = {"window_size": 2, "depths": [2, 2, 2], "num_heads": [2, 2, 2], "patch_size": 2}

# fmt: off
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "donut-swin": _SWIN,
    "maskformer-swin": _SWIN,
    "led": {"attention_window": 8},
    "longformer": {"attention_window": 8},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_DIM},
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD_DIM, "use_mem_rope": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cosmos3_edge_text": _MROPE,
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": HEADS},
        "glm4v_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}},
    "glm4v_text": _MROPE,
    "glm5_next_text": {"num_key_value_heads": HEADS},
    "glm_image_text": _MROPE,
    "glm_ocr_text": _MROPE,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mobilebert": {"intra_bottleneck_size": WIDTH, "true_hidden_size": WIDTH},
    "paddleocr_vl_text": _MROPE,
    "qwen2_vl_text": _MROPE,
    "qwen2_5_vl_text": _MROPE,
    "qwen2_5_omni_text": _MROPE,
    "reformer": {
        "axial_pos_embds": False, "attn_layers": ["local", "lsh", "local"], "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8, "attention_head_size": HEAD_DIM, "num_buckets": 4,
    },
    "neomme": {"head_dim": 16},
}
# fmt: on
"""Fields of families that the rules by name do not make small, or make inconsistent."""


def shrunk(default: Any, family: str | None = None) -> dict[str, Any]:
    """Return the fields of a small config, given a default one."""
    fields: dict[str, Any] = {}
    old_layers = next(
        (
            getattr(default, name)
            for name in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "n_layers")
            if isinstance(getattr(default, name, None), int)
        ),
        None,
    )
    parts = getattr(type(default), "sub_configs", {})
    staged = isinstance(getattr(default, "depths", None), list | tuple)
    for name, value in default.to_dict().items():
        if name in parts:
            part = getattr(default, name)
            if part is not None and hasattr(part, "to_dict"):
                fields[name] = {"model_type": part.model_type, **shrunk(part)}
            continue
        if value is None and name in _EVEN_IF_NONE:
            fields[name] = _EVEN_IF_NONE[name]
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, dict) and "mrope_section" in value:
            fields[name] = {**value, "mrope_section": [1, 1, 2]}
            continue
        if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
            listed = _shrunk_list(name, list(value))
            if listed is not None:
                fields[name] = listed
                continue
        if isinstance(value, list) and value and len(value) == old_layers:
            fields[name] = _varied(value)
            continue
        if staged and name in ("num_layers", "num_hidden_layers", "hidden_size"):
            continue  # the config computes them
        for pattern, rule in _RULES:
            if re.fullmatch(pattern, name):
                found = rule(value) if callable(rule) else rule if isinstance(value, int | float) else None
                if found is not None:
                    fields[name] = found
                break
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:  # latent attention has no grouped heads
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return {**fields, **OVERRIDES.get(family or default.model_type, {})}


def _varied(values: list[Any]) -> list[Any]:
    """Return one value per remaining layer, with as many different ones as there is room for."""
    kinds: list[Any] = []
    for value in values:
        if value not in kinds:
            kinds.append(value)
    kinds = kinds[:LAYERS]
    return [kinds[min(i, len(kinds) - 1)] for i in range(LAYERS)]


def _shrunk_list(name: str, values: list[int]) -> list[int] | None:
    if name in ("depths", "encoder_depths", "num_blocks", "layers"):
        return [2] * len(values)
    if re.fullmatch("hidden_sizes|embed_dims?|encoder_hidden_sizes|backbone_out_channels|neck_hidden_sizes", name):
        return [16 * (i + 1) for i in range(len(values))]
    if name in ("num_heads", "num_attention_heads"):
        return [2] * len(values)
    return None


def tiny_config(family: str) -> Any:
    """Return a small config of a family."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    return kind(**shrunk(kind(), family))


def build(config: Any, auto: Any) -> Any:
    """Return a random model whose blocks differ and whose padding would show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn_like(parameter)
            if parameter.ndim >= 2:
                # the usual initial values make all blocks nearly alike
                parameter.data = noise * (0.3 if "embed" in name else 0.15)
            else:
                parameter.data = parameter.data + noise * 0.05
    return model.eval()


WORDS = tuple("the cat sat on a mat and then it saw one big dog run past two old trees near my house today".split())  # noqa: SIM905


def tokenizer(kind: str = "plain", limit: int = POSITIONS) -> Any:
    """Return a word-level tokenizer, BOS before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{word: i for i, word in enumerate(WORDS, 4)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind != "bare":
        around = "<s> $A" if kind == "plain" else "<s> $A </s>"
        made.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", bos_token="<s>",
        model_max_length=limit,
    )  # fmt: skip


def texts(lengths: tuple[int, ...] = (5, 1, 12, 20, 3, 7)) -> list[str]:
    """Return texts of so many words."""
    return [" ".join(WORDS[(3 * i + j * (i + 1)) % len(WORDS)] for j in range(n)) for i, n in enumerate(lengths)]


def families() -> dict[str, list[str]]:
    """Return the model types of texts, of images, and of images with texts that transformers has a model for."""
    from transformers.models.auto import configuration_auto as configs
    from transformers.models.auto import modeling_auto as autos

    def names(*mappings: str) -> set[str]:
        return {name for mapping in mappings for name in getattr(autos, f"MODEL_{mapping}MAPPING_NAMES")}

    known = set(configs.CONFIG_MAPPING_NAMES)
    text = names("FOR_CAUSAL_LM_", "FOR_MASKED_LM_", "FOR_TEXT_ENCODING_", "FOR_SEQ_TO_SEQ_CAUSAL_LM_")
    vision = names(
        "FOR_IMAGE_", "FOR_IMAGE_CLASSIFICATION_", "FOR_BACKBONE_", "FOR_MASKED_IMAGE_MODELING_",
        "FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_",
    )  # fmt: skip
    everything = names("")
    text |= {
        name
        for name in everything
        if name.endswith("_text") or name in ("splinter", "lilt", "bros", "markuplm", "canine", "dpr")
    }
    vision |= {name for name in everything if re.search("_vision(_model)?$", name)}
    both = names("FOR_IMAGE_TEXT_TO_TEXT_")
    return {
        "text": sorted(text & known),
        "vision": sorted((vision - text - both) & known),
        "image-text": sorted((both - text) & known),
    }


def pixels(n: int = 6, size: int = IMAGE) -> np.ndarray:
    """Return random images."""
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)
