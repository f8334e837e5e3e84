"""Train the built-in language model from scratch on the documentation corpus.

    python studies/docs-lm/train.py --out runs/docs-lm

Everything comes from the corpus and the seed: the tokenizer, the order of the documents, the weights. A run that was
stopped goes on where its last checkpoint stands when the same command is given again. The learning rate is constant
after the warm-up and falls to zero over the last `--decay-tokens`, so a run may also go on with fewer or more
`--tokens`, as long as its checkpoint does not lie in the part that falls; the result is that of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor, nn

from saekit.errors import ConfigError, FormatError
from saekit.files import read_json, write_bytes, write_json
from saekit.inputs.corpus import LIBRARIES, Document, corpus_digest, docs, library_versions

BOS, EOS = "<|bos|>", "<|eos|>"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the weights depend on, besides the corpus."""

    vocabulary: int = 4096
    width: int = 192
    blocks: int = 4
    heads: int = 4
    hidden: int = 640
    context: int = 512
    batch: int = 16
    """Contexts per step."""
    tokens: int = 11_000_000
    decay_tokens: int = 3_500_000
    warmup_tokens: int = 500_000
    lr_matrices: float = 0.02
    """Of Muon, for the matrices inside the blocks."""
    lr_rest: float = 3e-3
    """Of AdamW, for the embedding and the norms."""
    weight_decay: float = 0.1
    """Times the learning rate, for the matrices inside the blocks and the embedding."""
    seed: int = 0
    evaluate_every: int = 100
    """Steps between checkpoints, each with the loss on a fixed part of the held-out modules."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    for name, default in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    out, threads = arguments.pop("out"), arguments.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    train(Settings(**arguments), out)


def corpus_info(documents: Sequence[Document]) -> dict[str, object]:
    """Return what a corpus is made of, as plain JSON: digest, counts, bytes of UTF-8, versions of the libraries.

    Parameters
    ----------
    documents
        What `docs` returned.

    Returns
    -------
    dict
        Keys ``digest``, ``documents``, ``modules``, ``bytes`` and ``libraries`` (name to ``version``,
        ``documents``, ``bytes``).
    """
    versions = library_versions()
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for document in documents:
        count[document.library] += 1
        size[document.library] += len(document.text.encode("utf-8", "surrogatepass"))
    return {
        "digest": corpus_digest(documents),
        "documents": len(documents),
        "modules": len({document.module for document in documents}),
        "bytes": size.total(),
        "libraries": {
            name: {"version": versions.get(name), "documents": count[name], "bytes": size[name]}
            for name in LIBRARIES
            if name in count
        },
    }


def train(settings: Settings, out: Path) -> None:
    """Train, with a checkpoint and an exported model in `out` every `evaluate_every` steps."""
    train_documents, heldout_documents = docs(split="train"), docs(split="heldout")
    corpus = {"train": corpus_info(train_documents), "heldout": corpus_info(heldout_documents)}
    check_same_run(out, settings, corpus)
    tokenizer = make_tokenizer(train_documents, settings, out / "tokenizer")
    texts = encode(tokenizer, train_documents)
    heldout = pack(encode(tokenizer, heldout_documents), settings, epoch=0)[:32]

    model = make_model(settings)
    optimizers = make_optimizers(model, settings)
    step, seconds = load_checkpoint(out / "checkpoint.safetensors", model, optimizers)
    per_step = settings.batch * settings.context
    n_steps = settings.tokens // per_step
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {n_steps} steps, from step {step}", flush=True)

    started, running = time.monotonic() - seconds, []
    for batch in batches(texts, settings, start=step, stop=n_steps):
        factor = schedule(step * per_step, settings)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        loss = batch_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        running.append(loss.item())
        if not math.isfinite(running[-1]):
            raise FloatingPointError(
                f"the loss of step {step} is {running[-1]}; the last checkpoint in `{out}` is good"
            )
        if step % 20 == 0 or step == n_steps:
            record = {"step": step, "tokens": step * per_step, "loss": round(float(np.mean(running)), 4)}
            running = []
            if step % settings.evaluate_every == 0 or step == n_steps:
                record["heldout_loss"] = round(mean_loss(model, heldout), 4)
            seconds = time.monotonic() - started
            record |= {"lr_factor": round(factor, 4), "seconds": round(seconds, 1)}
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(record) + "\n")
            print(record, flush=True)
        if step % settings.evaluate_every == 0 or step == n_steps:
            save_checkpoint(out / "checkpoint.safetensors", model, optimizers, step, seconds)
            export(model, tokenizer, out / "model")
            done = {"tokens_seen": step * per_step, "seconds": round(seconds, 1), "threads": torch.get_num_threads()}
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            versions["tokenizers"] = tokenizers.__version__
            write_json(out / "run.json", {"settings": asdict(settings), "corpus": corpus, "versions": versions, **done})


def check_same_run(out: Path, settings: Settings, corpus: dict[str, object]) -> None:
    """Refuse to go on with a run of other settings or another corpus; only the length may change."""
    if not (out / "run.json").exists():
        return
    old = read_json(out / "run.json")
    free = {"tokens", "decay_tokens", "evaluate_every"}
    changed = [name for name, value in asdict(settings).items() if name not in free and old["settings"][name] != value]
    changed += ["corpus"] if old["corpus"] != corpus else []
    if changed:
        raise ConfigError(
            f"the run in `{out}` must go on with its own settings and corpus; changed: {changed}. Choose another --out."
        )
    before = Settings(**old["settings"])
    same_length = (settings.tokens, settings.decay_tokens) == (before.tokens, before.decay_tokens)
    begins = min(length.tokens - length.decay_tokens for length in (before, settings))
    if not same_length and old["tokens_seen"] > begins:
        raise ConfigError(
            f"the run in `{out}` has seen {old['tokens_seen']:,} tokens; to change its length, the decay must not have "
            f"begun before that, in the old settings or the new; it begins at {begins:,}. Give more --tokens or fewer "
            "--decay-tokens."
        )


def make_tokenizer(documents: list[Document], settings: Settings, folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE learned from `documents`; it puts BOS before every text, and any bytes round-trip."""
    if not (folder / "tokenizer.json").exists():
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        bpe.train_from_iterator(
            (document.text for document in documents),
            tokenizers.trainers.BpeTrainer(
                vocab_size=settings.vocabulary,
                special_tokens=[BOS, EOS],
                initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
                show_progress=False,
            ),
        )
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
        )
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=BOS,
            eos_token=EOS,
            pad_token=EOS,
            model_max_length=settings.context,
            padding_side="right",
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: transformers.PreTrainedTokenizerFast, documents: list[Document]) -> list[np.ndarray]:
    """Each document as BOS, its tokens, EOS."""
    end = tokenizer.eos_token_id
    backend = tokenizer.backend_tokenizer
    rows = backend.encode_batch_fast([document.text for document in documents], add_special_tokens=True)
    return [np.array([*row.ids, end], dtype=np.uint16) for row in rows]


def pack(texts: list[np.ndarray], settings: Settings, epoch: int) -> np.ndarray:
    """All documents in the order of this epoch, end to end, cut into rows of context + 1 tokens; ends are shared."""
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(texts))
    stream = np.concatenate([texts[index] for index in order])
    n_rows = (len(stream) - 1) // settings.context
    places = np.arange(n_rows)[:, None] * settings.context + np.arange(settings.context + 1)
    return stream[places]


def batches(texts: list[np.ndarray], settings: Settings, *, start: int, stop: int) -> Iterator[Tensor]:
    """The batches of steps `start` to `stop`; which rows a step sees depends on nothing but its number."""
    n_first = len(pack(texts, settings, 0)) // settings.batch  # every epoch has as many tokens, so as many rows
    rows, epoch = np.empty((0, 0)), -1
    for step in range(start, stop):
        if step // n_first != epoch:
            epoch = step // n_first
            rows = pack(texts, settings, epoch)
            rows = rows[np.random.default_rng([settings.seed, epoch, 1]).permutation(len(rows))]
        place = step % n_first * settings.batch
        yield torch.from_numpy(rows[place : place + settings.batch].astype(np.int64))


def make_model(settings: Settings) -> transformers.LlamaForCausalLM:
    torch.manual_seed(settings.seed)
    config = transformers.LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.hidden,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.embed_tokens.padding_idx = None  # EOS is a token to learn; that it also pads must not stop its gradient
    with torch.no_grad():  # what a block adds to the stream begins small
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return model


def make_optimizers(model: transformers.LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    inside = [p for p in model.model.layers.parameters() if p.ndim == 2]
    table = [model.model.embed_tokens.weight]
    norms = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(inside, lr=settings.lr_matrices, weight_decay=settings.weight_decay, momentum=0.95),
        torch.optim.AdamW(
            [{"params": table, "weight_decay": settings.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=settings.lr_rest,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def schedule(tokens: int, settings: Settings) -> float:
    """Factor of the learning rate after `tokens`: up over the warm-up, constant, down to zero."""
    up = (tokens + 1) / settings.warmup_tokens
    down = (settings.tokens - tokens) / settings.decay_tokens
    return max(0.0, min(1.0, up, down))


def batch_loss(model: transformers.LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the next token; products in bf16, weights and loss in fp32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: transformers.LlamaForCausalLM, rows: np.ndarray) -> float:
    parts = torch.from_numpy(rows.astype(np.int64)).split(8)
    return sum(batch_loss(model, part).item() * len(part) for part in parts) / len(rows)


def save_checkpoint(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(tensors, metadata={"step": str(step), "seconds": str(seconds)}))


def load_checkpoint(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Fill model and optimizers from a checkpoint, if there is one; its step and the seconds it took."""
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = file.metadata()
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        if f"model.{name}" not in tensors:
            raise FormatError(f"the checkpoint `{path}` must hold `model.{name}`; it does not. Choose another --out.")
        parameter.data.copy_(tensors.pop(f"model.{name}"))
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, tensor in tensors.items():
        _, number, index, key = name.split(".")
        states[int(number)].setdefault(int(index), {})[key] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    return int(facts["step"]), float(facts["seconds"])


def export(model: nn.Module, tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the ordinary transformers folder: weights stored as float16, loaded as float32 unless asked otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().to(torch.float16).contiguous() for name, p in model.named_parameters()}
    write_bytes(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    config = model.config.to_dict()
    keys = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    keys += " hidden_act max_position_embeddings initializer_range rms_norm_eps rope_parameters attention_bias mlp_bias"
    keys += " attention_dropout tie_word_embeddings bos_token_id eos_token_id pad_token_id model_type"
    plain = {"architectures": ["LlamaForCausalLM"]} | {key: config[key] for key in keys.split()}
    write_json(folder / "config.json", plain | {"dtype": "float32"})
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1})
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    plain = {key: value for key, value in settings.items() if "local" not in key and key != "backend"}
    write_json(folder / "tokenizer_config.json", plain | {"tokenizer_class": "PreTrainedTokenizerFast"})


if __name__ == "__main__":
    main()
