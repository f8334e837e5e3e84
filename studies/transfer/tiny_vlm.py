"""A vision–language model of 0.3 million parameters: a trained ViT, a small language model and a projector between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import saekit as sk

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def pixels_of(images: Any) -> Tensor:
    """Return grey images as a ViT takes them: [n, 1, height, width], from -1 to 1."""
    x = np.stack([np.asarray(image.convert("L")) for image in images])
    return torch.from_numpy((x.astype(np.float32) / 255 - 0.5) / 0.5)[:, None]


def image_processor(side: int) -> Any:
    """Return the image processor of such images."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=[0.5], image_std=[0.5])


def train_vlm(
    images: Any, vit_folder: Path, lm_folder: Path, folder: Path, *, side: int, patch: int, epochs: int
) -> tuple[Any, Callable[[Any], np.ndarray]]:
    """Train a LLaVA of a ViT and a language model to say the digit that an image shows.

    As in LLaVA's first stage only the projector is trained (2304.08485): both models stay as they are, so an SAE of the
    language model's text is an SAE of the same weights.

    Returns
    -------
    VisionModel, callable
        The model as saekit loads it, and which of the ten words it finds likeliest after each of some images.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(lm_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": tokenizer.eos_token})
    lm = transformers.AutoModelForCausalLM.from_pretrained(lm_folder)
    vit = transformers.ViTModel.from_pretrained(vit_folder, add_pooling_layer=False)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=vit.config.to_dict(), text_config=lm.config.to_dict(), vision_feature_layer=-1,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
    )  # fmt: skip
    model.model.vision_tower.load_state_dict(vit.state_dict(), strict=False)  # its pooler is not used
    model.model.language_model.load_state_dict(lm.model.state_dict())
    model.lm_head.load_state_dict(lm.lm_head.state_dict())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.eval().requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)

    words = [torch.tensor(tokenizer.encode(word, add_special_tokens=False)) for word in DIGITS]
    tokens = torch.nn.utils.rnn.pad_sequence(words, batch_first=True)
    wanted = torch.nn.utils.rnn.pad_sequence(words, batch_first=True, padding_value=-100)

    def patches(chosen: Any) -> Tensor:
        with torch.no_grad():
            parts = pixels_of(chosen).split(500)
            seen = [model.model.vision_tower(part, output_hidden_states=True).hidden_states[-1] for part in parts]
            return torch.cat(seen)[:, 1:]

    def log_likelihood(seen: Tensor, digits: Tensor) -> Tensor:
        begin = model.get_input_embeddings()(torch.full((len(seen), 1), tokenizer.bos_token_id))
        said = model.get_input_embeddings()(tokens[digits])
        read = torch.cat([begin, projector(seen), said], 1)
        states = model.model.language_model(inputs_embeds=read).last_hidden_state[:, -tokens.shape[1] - 1 : -1]
        losses = torch.nn.functional.cross_entropy(
            model.lm_head(states).transpose(1, 2), wanted[digits], ignore_index=-100, reduction="none"
        )
        return -losses.sum(1)

    x, y = patches(images), torch.tensor(images.column("label"))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            loss = -log_likelihood(x[part], y[part]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    projector.requires_grad_(False)
    model.save_pretrained(folder)
    transformers.LlavaProcessor(
        image_processor(side), tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip

    def says(chosen: Any) -> np.ndarray:
        with torch.no_grad():
            seen = patches(chosen)
            likely = [log_likelihood(seen, torch.full((len(seen),), digit)) for digit in range(10)]
            return torch.stack(likely, 1).argmax(1).numpy()

    return sk.load_model(folder), says
