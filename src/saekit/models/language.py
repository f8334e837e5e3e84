"""Language models as they are in transformers: decoders and encoders with their tokenizers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ModelError
from .pretrained import ModelFiles, Placement, PretrainedModel, accepts, read_weights, readable, settle, width
from .probe import facts_of, sees_later_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_HEADS = ("pooler", "classifier", "lm_head", "cls.", "score", "head")  # parts that no row comes from


@dataclass(frozen=True, eq=False, kw_only=True)
class LanguageModel(PretrainedModel):
    """A transformers model with its tokenizer; the encoder alone of an encoder-decoder."""

    tokenizer: Any = field(repr=False)
    """Its tokenizer."""
    context: int
    """Maximum number of tokens at once."""
    is_causal: bool
    """True for a causal LM with its head, whose output depends on no later token: then there is a cross-entropy."""

    @property
    def info(self) -> dict[str, Any]:
        """What every model says, and the maximum number of tokens at once."""
        return {**super().info, "model_context": self.context}

    @property
    def vocabulary(self) -> int | None:
        """Number of tokens that the model has an embedding of; None where that is no table."""
        model: Any = self.model
        try:
            embedding = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            return None
        return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def read_language_model(files: ModelFiles, config: PretrainedConfig, how: Placement) -> LanguageModel:
    """Read a language model and its tokenizer.

    Raises
    ------
    ModelError
        The files are damaged or incomplete.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    is_causal = is_causal_lm(config)
    with readable(files, "tokenizer files"):
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **files.options)
        weights = read_weights(AutoModelForCausalLM if is_causal else AutoModel, files, how, _HEADS)
    model = settle(_reads_text(weights.model, files.short_name), how)
    text_config = getattr(model, "config", weights.model.config).get_text_config()
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        name=files.short_name,
        digest=files.digest,
        d_model=width(text_config, model),
        context=_context(text_config, tokenizer, model),
        is_causal=is_causal and not weights.ignored and not sees_later_tokens(model),
        revision=files.revision,
        path=files.path,
    )


def _reads_text(model: Any, name: str) -> nn.Module:
    """Return the part of a model that reads a text alone: the encoder, or the text tower of the CLIP kind.

    Raises
    ------
    ModelError
        There is none.
    """
    part: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    tower = getattr(part, "text_model", None)
    if isinstance(tower, nn.Module) and accepts(part, "pixel_values") and facts_of(part) is None:
        part = tower
    if not accepts(part, "input_ids"):
        raise ModelError(
            f"`{name}` must read texts; `{type(part).__name__}` takes `{getattr(part, 'main_input_name', '?')}`. "
            "Give another model."
        )
    return part


def is_causal_lm(config: PretrainedConfig) -> bool:
    """Return whether the checkpoint holds a causal LM: its architecture is the one AutoModelForCausalLM would build."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as causal,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as masked,
    )

    if config.model_type not in causal or config.is_encoder_decoder:
        return False
    if config.architectures:
        return causal[config.model_type] in config.architectures
    return config.model_type not in masked


def _context(config: PretrainedConfig, tokenizer: object, model: object) -> int:
    """Return the smaller of what the position embedding and the tokenizer allow; 2048 where neither says."""
    first = first_position(model)
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_sequence_length")]
    limits = [limit - first if isinstance(limit, int) else limit for limit in limits]
    limits.append(getattr(tokenizer, "model_max_length", None))
    # tokenizers without a limit say 1e30
    return min((int(n) for n in limits if isinstance(n, int | float) and 0 < n < 10**8), default=2048)


def first_position(model: Any) -> int:
    """Return the number of the first position: above 0 in the RoBERTa family, which counts on from its padding."""
    return max(
        (
            int(module.padding_idx) + 1
            for module in model.modules()
            if getattr(module, "padding_idx", None) is not None and hasattr(module, "position_embeddings")
        ),
        default=0,
    )
