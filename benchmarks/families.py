"""Try saekit on a tiny random model of every text and vision family that the installed transformers can build.

Each family is built from its default config made small (`tiny_families`), saved, and put through capture, training and
evaluation; what saekit gives is compared with forward passes and hooks of this file, one unpadded text at a time.
Writes ``benchmarks/families.json`` and ``docs/models.md``::

    python benchmarks/families.py                    # everything, about half an hour on two cores
    python benchmarks/families.py bloom vit_mae      # some families; the others keep their results
    python benchmarks/families.py --table            # the page alone, from the JSON
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiny_families as tiny
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "families.json"
PAGE = ROOT / "docs" / "models.md"
TOLERANCE = 1e-5
"""Largest difference that counts as equal, relative to the largest value."""

SECONDS = 180
"""Time limit of one family."""

# ----------------------------------------------------------------------------------------------------- the reference


@dataclasses.dataclass
class Pass:
    """One forward pass of the model itself."""

    blocks: list[Tensor]
    """Output of every block, in the order of execution."""
    first_input: Tensor | None
    """Input of the first block."""
    calls: int
    modules: int
    output: Any


def _recorded_classes(model: nn.Module) -> list[type]:
    """Return the classes whose outputs transformers itself calls hidden states."""
    found: list[type] = []
    for module in model.modules():
        record = (getattr(module, "_can_record_outputs", None) or {}).get("hidden_states")
        for entry in record if isinstance(record, list | tuple) else [record]:
            kind = getattr(entry, "target_class", entry)
            if isinstance(kind, type) and kind not in found:
                found.append(kind)
    return found


def _block_modules(model: nn.Module, layers: int) -> list[nn.Module]:
    """Return the blocks, by what transformers says of its own model rather than by names."""
    kinds = tuple(_recorded_classes(model))
    recorded = [module for module in model.modules() if kinds and isinstance(module, kinds)]
    if recorded:
        return recorded
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == layers]
    if len(lists) == 1:
        return list(lists[0])
    names = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
        if "Embedding" not in name
    }
    split = [module for module in model.modules() if type(module).__name__ in names]
    if len(split) >= layers:
        return split
    return list(lists[0]) if lists else []


def _first(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list) and value:
        return _first(value[0])
    if isinstance(value, dict):
        return _first(next(iter(value.values()), None))
    return None


def run_reference(model: nn.Module, layers: int, inputs: dict[str, Any]) -> Pass:
    """Run the model with hooks of this file on its blocks."""
    outputs: list[Tensor] = []
    firsts: list[Tensor | None] = []
    seen: set[int] = set()
    inside: list[int] = [0]

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        inside[0] += 1
        if inside[0] == 1:
            firsts.append(_first(args) if args else kwargs.get("hidden_states"))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        inside[0] -= 1
        if inside[0] == 0:  # blocks within blocks are parts of them
            found = _first(output)
            if found is not None:
                outputs.append(found.detach().clone())
                seen.add(id(module))

    handles = []
    for module in _block_modules(model, layers):
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        with torch.no_grad():
            output = model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    first = firsts[0] if firsts else None
    return Pass(outputs, first, len(outputs), len(seen), output)


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest value that is wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    scale = float(wanted.abs().max()) if wanted.numel() else 1.0
    return float((found.double() - wanted.double()).abs().max()) / max(scale, 1e-12) if wanted.numel() else 0.0


# ------------------------------------------------------------------------------------------------- saekit's interface


def captured(model: Any, data: Any, hooks: list[str], **how: Any) -> dict[str, Any]:
    """Return the rows that saekit captures, by hook."""
    from saekit.rows.capture import capture

    kwargs = {"hook": hooks, "outliers": None, **how}
    try:
        from saekit.rows.settings import CaptureSettings
    except ImportError:
        return capture(model, data, **kwargs)
    fields = {field.name for field in dataclasses.fields(CaptureSettings)}
    settings = CaptureSettings(**{key: value for key, value in kwargs.items() if key in fields})
    return capture(model, data, **{k: v for k, v in kwargs.items() if k not in fields}, settings=settings)


def captured_images(model: Any, data: Any, hooks: list[str], **how: Any) -> dict[str, Any]:
    """Return the rows that saekit captures from images, by hook."""
    from saekit.errors import ModelError

    try:
        return captured(model, data, hooks, **how)
    except ModelError as error:
        if "Capture them one by one" not in str(error):
            raise
        return {name: captured(model, data, [name], **how)[name] for name in hooks}


def trained(rows: Any) -> Any:
    """Return an SAE after a few steps."""
    import saekit

    config = saekit.TopK(n_latents=16, k=4)
    try:
        from saekit.training.settings import TrainSettings
    except ImportError:
        return saekit.train(config, rows, batch_rows=64, seeds=[0])[0]
    return saekit.train(config, rows, seeds=[0], settings=TrainSettings(batch_rows=64))[0]


# ------------------------------------------------------------------------------------------------------------- laws


class Laws:
    """What was found about one family."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    def put(self, law: str, status: str, value: float | None = None, note: str = "") -> None:
        """Record a law: exact, refused, wrong, or noted."""
        self.found[law] = {"status": status, "value": value, "note": " ".join(note.split())[:400]}

    def number(self, law: str, value: float, note: str = "") -> None:
        """Record a difference that must be zero."""
        status = "exact" if value <= TOLERANCE else "wrong"
        self.put(
            law,
            status,
            None if value == float("inf") else value,
            note or ("shapes differ" if value == float("inf") else ""),
        )

    @contextlib.contextmanager
    def law(self, law: str) -> Iterator[None]:
        """Record a refusal of saekit, or a crash, as what this law gave."""
        from saekit.errors import SaekitError

        try:
            yield
        except SaekitError as error:
            self.put(law, "refused", None, f"{error}")
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "saekit" in frame.filename and "/benchmarks/" not in frame.filename]
            place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else " in the harness"
            self.put(law, "wrong" if ours else "harness", None, f"{type(error).__name__}: {error}{place}")


def _ids(text: str, before: int = 1) -> list[int]:
    vocabulary = {word: i for i, word in enumerate(tiny.WORDS, 4)}
    return [1] * before + [vocabulary[word] for word in text.split()]


def examine_text(family: str, folder: Path) -> dict[str, Any]:
    """Put a family of texts through every law."""
    import transformers
    from transformers.models.auto import modeling_auto as autos

    laws = Laws()
    config = tiny.tiny_config(family)
    masked, causal = autos.MODEL_FOR_MASKED_LM_MAPPING_NAMES, autos.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind = (
        transformers.AutoModel
        if config.is_encoder_decoder
        else transformers.AutoModelForMaskedLM
        if family in masked
        else transformers.AutoModelForCausalLM
        if family in causal
        else transformers.AutoModel
    )
    own = tiny.build(config, kind)
    about: dict[str, Any] = {"class": type(own).__name__, "parameters": sum(p.numel() for p in own.parameters())}
    with torch.no_grad():
        own.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    if own.config.is_encoder_decoder:
        own = own.get_encoder()
    if isinstance(getattr(own, "vision_model", None), nn.Module):
        own = getattr(own, "text_model", own)  # of CLIP and its kind
    from saekit.models.loading import load_language_model

    with laws.law("load"):
        lm = load_language_model(str(folder))
        # some families have a tokenizer class of their own, which would read these files in its own way
        lm = dataclasses.replace(lm, tokenizer=tiny.tokenizer())
        laws.put("load", "exact")
    if laws.found["load"]["status"] != "exact":
        return {**about, "laws": laws.found}
    _text_laws(laws, about, lm, own, folder)
    return {**about, "laws": laws.found}


FIRST = "layers.0"


def _tried(laws: Laws, passes: list[Callable[[], Pass]], ours: Callable[[], Any]) -> list[Pass]:
    """Return the passes of the model itself; where it takes no such input, saekit must say so, and there are none."""
    try:
        return [one() for one in passes]
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        if isinstance(error, RuntimeError):  # the small model does not fit together: that says nothing
            laws.put("alone", "harness", None, reason)
            return []
    with laws.law("alone"):
        ours()
        laws.put("alone", "harness", None, reason)  # it fails behind the block
    return []


def _text_laws(laws: Laws, about: dict[str, Any], lm: Any, own: Any, folder: Path) -> None:
    texts = tiny.texts()
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(own.forward).parameters else {}

    def alone(text: str) -> Pass:
        ids = torch.tensor([_ids(text)])
        one = run_reference(own, tiny.LAYERS, {"input_ids": ids, **no_cache})
        one.blocks = [_of_text(own, block, ids.shape[1]) for block in one.blocks]
        return one

    passes = _tried(laws, [lambda text=text: alone(text) for text in texts], lambda: captured(lm, texts[:1], [FIRST]))
    if not passes:
        return
    about["block_calls"], about["block_modules"] = passes[0].calls, passes[0].modules
    if not passes[0].calls:
        laws.put("reference", "harness", None, "no blocks found by the harness")
        return
    layers = None
    with laws.law("blocks"):
        layers = lm.n_layers
        note = f"{layers} layers; the model runs {passes[0].calls} blocks ({passes[0].modules} modules)"
        laws.put("blocks", "exact" if layers == passes[0].calls else "wrong", None, note)
    if layers is None:
        return
    names = [f"layers.{i}" for i in range(layers)]

    def wanted(some: list[Pass], layer: int) -> Tensor:
        return torch.cat([_rows(p.blocks[layer]) for p in some])

    def compare(rows: dict[str, Any], some: list[Pass]) -> float:
        return max(
            difference(rows[name].x[:].float() if hasattr(rows[name], "x") else rows[name].rows, wanted(some, i))
            for i, name in enumerate(names)
            if i < passes[0].calls
        )

    rows = None
    with laws.law("alone"):
        single = [captured(lm, [text], names) for text in texts]
        worst = max(compare(rows_, [p]) for rows_, p in zip(single, passes))
        laws.number("alone", worst)
        about["width"] = int(single[0][names[0]].d_in)
    even = [" ".join(text.split()[:4]) for text in tiny.texts((4, 4, 4, 4, 4))]
    if laws.found["alone"]["status"] == "refused":
        with laws.law("square"):  # as many texts as tokens: what is refused otherwise must be refused here too
            laws.number("square", compare(captured(lm, even, names), [alone(text) for text in even]))
        return
    with laws.law("batch"):
        rows = captured(lm, texts, names)
        laws.number("batch", compare(rows, passes))
    with laws.law("left"):
        laws.number("left", compare(captured(lm, texts, names, padding="left"), passes))
    with laws.law("square"):
        laws.number("square", compare(captured(lm, even, names), [alone(text) for text in even]))
    with laws.law("repeat"):
        again = captured(lm, texts, names)
        laws.number("repeat", max(difference(again[n].x, rows[n].x) for n in names) if rows else 0.0)
    with laws.law("width"):
        laws.put(
            "width",
            "exact" if lm.d_model == about["width"] else "wrong",
            None,
            f"d_model {lm.d_model}, rows {about['width']}",
        )
    with laws.law("hidden_states"):
        _hidden_states(laws, own, texts, passes, no_cache)
    if passes[0].calls == layers:
        _short_names(laws, lm, own, texts, layers, passes, no_cache)
    with laws.law("causal"):
        first, second = texts[3], " ".join([*texts[3].split()[:-1], "today"])
        a, b = alone(first), alone(second)
        ahead = max(difference(_rows(x)[:-1], _rows(y)[:-1]) for x, y in zip(a.blocks, b.blocks))
        sees = ahead > TOLERANCE
        wrong = lm.is_causal and sees
        laws.put(
            "causal",
            "wrong" if wrong else "exact",
            ahead if wrong else None,
            f"is_causal={lm.is_causal}, sees later tokens: {sees}",
        )
    if lm.is_causal:
        with laws.law("splice"):
            _splice(laws, lm, texts, names, no_cache)
    with laws.law("context"):
        _long_context(laws, folder, lm, alone, names)
    with laws.law("train"):
        _train(laws, lm, own, passes, no_cache)


PROMPT_FIRST = ("cpmant",)
"""Families that put tokens of their own before those of the text; others that have more put padding behind."""


def _of_text(own: Any, x: Tensor, length: int) -> Tensor:
    """Return the states of the text where the model made it longer: padded to whole windows, behind a prompt."""
    if x.ndim != 3 or x.shape[0] != 1 or x.shape[1] <= length:
        return x
    return x[:, -length:] if own.config.model_type in PROMPT_FIRST else x[:, :length]


def _rows(x: Tensor) -> Tensor:
    """Return the rows of the words of a single text, whatever the order of the axes; the first token is BOS."""
    x = x.detach().float()
    if x.ndim == 3 and x.shape[0] != 1 and x.shape[1] == 1:  # sequence first
        x = x.transpose(0, 1)
    return x.reshape(-1, x.shape[-1])[1:]


def _hidden_states(laws: Laws, own: Any, texts: list[str], passes: list[Pass], no_cache: dict[str, Any]) -> None:
    """Check the reference itself against the hidden states that the model returns."""
    output = own(input_ids=torch.tensor([_ids(texts[3])]), output_hidden_states=True, **no_cache)
    states = getattr(output, "hidden_states", None) or getattr(output, "encoder_hidden_states", None)
    if states is None or len(states) != passes[0].calls + 1:
        laws.put(
            "hidden_states", "noted", None, f"{None if states is None else len(states)} for {passes[0].calls} blocks"
        )
        return
    worst = max(difference(_rows(states[i + 1]), _rows(block)) for i, block in enumerate(passes[3].blocks[:-1]))
    laws.put(
        "hidden_states",
        "exact" if worst <= TOLERANCE else "noted",
        worst,
        "output_hidden_states[L + 1] is the block's output",
    )


def _sums(own: Any, layer: int, inputs: dict[str, Any]) -> list[Tensor]:
    """Return what is seen inside a block, its own input and output first: inputs and outputs of all its modules."""
    block = _called_blocks(own, inputs)[layer]
    seen: list[Tensor] = []

    def keep(value: Tensor | None) -> None:
        if value is not None and value.is_floating_point():
            text = inputs.get("input_ids")
            value = value if text is None else _of_text(own, value, text.shape[1])
            seen.append(value.detach().double().clone())

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        keep(_first(args) if args else _first(list(kwargs.values())))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        keep(_first(output))

    handles = []
    for module in block.modules():
        handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        with torch.no_grad():
            own(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _called_blocks(own: Any, inputs: dict[str, Any]) -> list[nn.Module]:
    """Return the blocks in the order of execution."""
    found: list[nn.Module] = []
    depth = [0]

    def before(module: nn.Module, args: Any) -> None:
        depth[0] += 1
        if depth[0] == 1:
            found.append(module)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        depth[0] -= 1

    handles = []
    for module in _block_modules(own, tiny.LAYERS):
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with torch.no_grad():
            own(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _is_added(part: Tensor, seen: list[Tensor]) -> bool:
    """Return whether some tensor inside the block is another one plus `part`: what is added before a norm."""
    shape = part.shape
    rows = [x.reshape(-1, x.shape[-1])[-shape[0] :] for x in seen if x.shape[-1] == shape[-1]]
    rows = [x for x in rows if x.shape == shape]
    scale = float(part.abs().max())
    # the stream was there before the part: what comes later is added to it, not it to that
    end = next((at for at, x in enumerate(rows) if torch.equal(x.float(), part.float())), len(rows))
    return any(
        float((total - before - part).abs().max()) <= 1e-5 * max(float(total.abs().max()), scale)
        for total in rows
        for before in rows[:end]
        if total is not before and float(before.abs().max()) > 1e-3 * scale
    )


def _sub_layers(
    layer: int, read: Callable[[str], Tensor], before: Tensor, after: Tensor, seen: Callable[[], list[Tensor]]
) -> tuple[str, float | None, str]:
    """Judge the short names of one block: what they name must be what is added to the residual stream."""
    from saekit.errors import SaekitError

    parts: dict[str, Tensor] = {}
    refusals = []
    for name in ("attn", "mlp"):
        try:
            parts[name] = read(f"layers.{layer}.{name}").double()
        except SaekitError as error:
            refusals.append(f"{name}: {error}")
    if not parts:
        return "refused", None, refusals[0]
    note = " + ".join(parts) + (f"; refused: {refusals[0]}" if refusals else "")
    if any(part.shape != after.shape for part in parts.values()):
        return "wrong", None, f"another shape than the residual stream: {note}"
    rest = after.double() - before.double() - torch.stack(list(parts.values())).sum(0)
    error = float(rest.abs().max() / after.abs().max())
    if error <= TOLERANCE:
        return "exact", error, note
    tensors = seen()
    bad = [name for name, part in parts.items() if not _is_added(part, tensors)]
    if not bad:
        return "added before a norm", None, note
    return "wrong", error, f"not what is added: {', '.join(bad)}" + (f"; refused: {refusals[0]}" if refusals else "")


def _worst_of(laws: Laws, found: list[tuple[str, float | None, str]]) -> None:
    """Record the short names of all blocks as one law."""
    if not found:
        return
    worst = max(found, key=lambda each: (each[0] == "wrong", each[0] == "refused", each[1] or 0))
    kinds = sorted({each[0] for each in found})
    laws.put("short names", "wrong" if "wrong" in kinds else " / ".join(kinds), worst[1], worst[2])


def _short_names(
    laws: Laws, lm: Any, own: Any, texts: list[str], layers: int, passes: list[Pass], no_cache: dict[str, Any]
) -> None:
    inputs = {"input_ids": torch.tensor([_ids(texts[3])]), **no_cache}
    with laws.law("short names"):
        found = [
            _sub_layers(
                layer,
                lambda name: captured(lm, texts[3:4], [name])[name].x,
                _rows(passes[3].blocks[layer - 1]),
                _rows(passes[3].blocks[layer]),
                lambda: _sums(own, layer, inputs),  # noqa: B023
            )
            for layer in range(1, layers)
        ]
        _worst_of(laws, found)


def _splice(laws: Laws, lm: Any, texts: list[str], names: list[str], no_cache: dict[str, Any]) -> None:
    from saekit.models.intervene import splice

    inputs = {"input_ids": torch.tensor([_ids(texts[3])]), **no_cache}
    with torch.no_grad():
        clean = lm.model(**inputs).logits
        worst, moved = 0.0, True
        for name in names:
            with splice(lm, name, lambda x: x):
                worst = max(worst, difference(lm.model(**inputs).logits, clean))
            with splice(lm, name, torch.zeros_like):
                moved &= difference(lm.model(**inputs).logits, clean) > 1e-3
    laws.number("splice", worst if moved else float("inf"), "" if moved else "zeros at a block change no logit")


def _long_context(laws: Laws, folder: Path, lm: Any, alone: Callable[[str], Pass], names: list[str]) -> None:
    """Check that the longest context that saekit takes can be run, with a tokenizer that names no limit."""
    tiny.tokenizer(limit=int(1e30)).save_pretrained(folder)
    from saekit.models.loading import load_language_model

    lm = dataclasses.replace(load_language_model(str(folder)), tokenizer=tiny.tokenizer(limit=int(1e30)))
    if lm.context > 300:
        laws.put("context", "noted", None, f"{lm.context} tokens: not tried")
        return
    (text,) = tiny.texts((lm.context + 40,))
    rows = captured(lm, [text], names[:1])[names[0]].x
    part = " ".join(text.split()[: lm.context - 1])
    laws.number(
        "context", difference(rows[: lm.context - 1].float(), _rows(alone(part).blocks[0])), f"{lm.context} tokens"
    )


def _train(laws: Laws, lm: Any, own: Any, passes: list[Pass], no_cache: dict[str, Any]) -> None:
    """Train a few steps, evaluate, and compare the cross-entropy of the clean model."""
    import saekit

    texts = tiny.texts(tuple(4 + i % 13 for i in range(30)))
    rows = captured(lm, texts, ["layers.1" if lm.n_layers > 1 else "layers.0"])
    (source,) = rows.values()
    sae = trained(source)
    result = saekit.evaluate(sae, source, model=lm, data=texts)
    metrics = result.metrics
    if not 0 <= metrics.fvu.value < 10:
        laws.put("train", "wrong", metrics.fvu.value, "FVU out of range")
        return
    laws.put("train", "exact", None, f"FVU {metrics.fvu.value:.3f}")
    if not lm.is_causal:
        return
    costs = []
    for text in texts:
        ids = torch.tensor([_ids(text)])
        with torch.no_grad():
            logits = own(input_ids=ids, **no_cache).logits[0, :-1].double()
        costs.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    laws.number("cross-entropy", abs(metrics.ce_clean.value / float(torch.cat(costs).mean()) - 1))


# ------------------------------------------------------------------------------------------------------------ vision


def _has_model(family: str) -> bool:
    from transformers.models.auto import modeling_auto as autos

    return family in autos.MODEL_MAPPING_NAMES


def _vision_model(family: str, kind: Any) -> Any:
    """Return a small model; one of the default size, for images of its size, where the rules make none that runs."""
    import transformers

    own = None
    try:
        own = tiny.build(tiny.tiny_config(family), kind)
        part = getattr(own, "vision_model", None)  # of CLIP and its kind
        with torch.no_grad():
            (part if isinstance(part, nn.Module) else own)(pixel_values=torch.zeros(1, 3, tiny.IMAGE, tiny.IMAGE))
        return own
    except ImportError:  # a package that is not there
        raise
    except TypeError:  # other arguments than images alone: that must be said by saekit
        if own is None:
            raise
        return own
    except Exception:  # kernels larger than the image, widths that no longer divide: whatever the rules spoiled
        config = transformers.CONFIG_MAPPING[family]()
        size = getattr(config, "image_size", None) or 224
        patch = getattr(config, "patch_size", None) or 32
        tiny.IMAGE, tiny.PATCH = (x[-1] if isinstance(x, list | tuple) else int(x) for x in (size, patch))
        return tiny.build(config, kind)


def examine_vision(family: str, folder: Path) -> dict[str, Any]:
    """Put a family of images through every law."""
    import transformers
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    laws = Laws()
    kind = transformers.AutoModel if _has_model(family) else transformers.AutoBackbone
    own = _vision_model(family, kind)
    about: dict[str, Any] = {"class": type(own).__name__, "parameters": sum(p.numel() for p in own.parameters())}
    own.save_pretrained(folder)
    size = tiny.IMAGE
    ViTImageProcessorPil(size={"height": size, "width": size}, resample=0).save_pretrained(folder)
    from saekit.models.loading import load_vision_model

    with laws.law("load"):
        model = load_vision_model(str(folder))
        laws.put("load", "exact")
    if laws.found["load"]["status"] != "exact":
        return {**about, "laws": laws.found}
    if isinstance(getattr(own, "vision_model", None), nn.Module):
        own = own.vision_model
    _vision_laws(laws, about, model, own)
    return {**about, "laws": laws.found}


def _vision_laws(laws: Laws, about: dict[str, Any], model: Any, own: Any) -> None:
    from PIL import Image

    images = tiny.pixels(size=tiny.IMAGE)

    def pixels(image: Any) -> Tensor:
        inputs = model.processor(images=[Image.fromarray(image)], return_tensors="pt")
        return inputs["pixel_values"]

    def alone(x: Tensor) -> Pass:
        return run_reference(own, tiny.LAYERS, {"pixel_values": x, **_in_order(own, x)})

    passes = _tried(
        laws,
        [lambda image=image: alone(pixels(image)) for image in images],
        lambda: captured_images(model, images[:1], [FIRST]),
    )
    if not passes:
        return
    about["block_calls"], about["block_modules"] = passes[0].calls, passes[0].modules
    layers = None
    with laws.law("blocks"):
        layers = model.n_layers
        note = f"{layers} layers; the model runs {passes[0].calls} blocks ({passes[0].modules} modules)"
        fits = passes[0].calls == layers or not passes[0].calls
        laws.put("blocks", "exact" if fits else "wrong", None, note)
    if layers is None:
        return
    names = [f"layers.{i}" for i in range(layers)]
    every = None
    with laws.law("alone"):
        everything = [captured_images(model, image[None], names, skip_special=False) for image in images]
        every = everything
        worst = 0.0
        for rows, one in zip(everything, passes):
            for i, name in enumerate(names[: one.calls]):
                worst = max(
                    worst, difference(rows[name].x.float(), one.blocks[i].float().reshape(-1, one.blocks[i].shape[-1]))
                )
        laws.number("alone", worst)
        about["width"] = int(everything[0][names[0]].d_in)
        if not passes[0].calls:
            laws.put("alone", "harness", None, "no blocks found by the harness")
    if laws.found["alone"]["status"] == "refused" or every is None:
        return
    with laws.law("batch"):
        together = captured_images(model, images, names, skip_special=False)
        worst = max(difference(together[name].x, torch.cat([rows[name].x for rows in every])) for name in names)
        laws.number("batch", worst)
    with laws.law("repeat"):
        again = captured_images(model, images, names, skip_special=False)
        laws.number("repeat", max(difference(again[n].x, together[n].x) for n in names))
    with laws.law("width"):
        last = int(every[0][names[-1]].d_in)  # stages may have several: the model's is that of the last
        laws.put("width", "exact" if model.d_model == last else "wrong", None, f"d_model {model.d_model}, rows {last}")
    with laws.law("patches"):
        _patch_numbers(laws, model, images, names, pixels, alone)
    if passes[0].calls == layers:
        _short_names_vision(
            laws,
            model,
            own,
            images,
            layers,
            passes[0],
            {"pixel_values": pixels(images[0]), **_in_order(own, pixels(images[0]))},
        )
    with laws.law("train"):
        import saekit

        (source,) = captured_images(model, tiny.pixels(24, tiny.IMAGE), names[:1]).values()
        found = saekit.evaluate(trained(source), source).metrics.fvu.value
        laws.put("train", "exact" if 0 <= found < 10 else "wrong", None, f"FVU {found:.3f}")


def _in_order(own: Any, x: Tensor) -> dict[str, Tensor]:
    """Return what makes a masked autoencoder see all patches in their order: the noise that it sorts them by."""
    if own.config.model_type != "vit_mae":
        return {}
    own.config.mask_ratio = 0.0
    return {"noise": torch.arange((tiny.IMAGE // tiny.PATCH) ** 2)[None].expand(len(x), -1).float()}


def _patch_numbers(laws: Laws, model: Any, images: Any, names: list[str], pixels: Any, alone: Any) -> None:
    """Check that row p is the token that patch p alone changes at the input of the first block."""
    side = tiny.IMAGE // tiny.PATCH
    clean = alone(pixels(images[0]))
    rows = captured_images(model, images[:1], names[:1])[names[0]]
    position = rows.position.tolist()
    if clean.first_input is None or clean.first_input.ndim != 3:
        laws.put("patches", "noted", None, f"{len(position)} rows; the input of the first block is no list of tokens")
        return
    hidden = clean.blocks[0].float().reshape(-1, clean.blocks[0].shape[-1])
    if len(position) != side * side or clean.first_input.shape[1] != len(hidden):  # cut otherwise, or merged
        laws.put("patches", "noted", None, f"{len(position)} rows of {side * side} patches ({len(hidden)} tokens)")
        return
    for patch in (0, 5, side * side - 1):
        changed = images[0].copy()
        top, left = divmod(patch, side)
        area = (slice(top * tiny.PATCH, (top + 1) * tiny.PATCH), slice(left * tiny.PATCH, (left + 1) * tiny.PATCH))
        changed[area] = 255 - changed[area]
        other = alone(pixels(changed))
        moved = (other.first_input - clean.first_input).abs().amax(-1).reshape(-1)
        token = int(((hidden - rows.x[position.index(patch)].float()).abs().amax(-1)).argmin())
        if int(moved.argmax()) != token or float(moved[token]) == 0:
            laws.put(
                "patches", "wrong", None, f"patch {patch} is token {int(moved.argmax())}, row {patch} is token {token}"
            )
            return
    laws.put("patches", "exact")


def _short_names_vision(
    laws: Laws, model: Any, own: Any, images: Any, layers: int, one: Pass, inputs: dict[str, Any]
) -> None:
    def read(name: str) -> Tensor:
        return captured_images(model, images[:1], [name], skip_special=False)[name].x

    with laws.law("short names"):
        blocks = [block.reshape(-1, block.shape[-1]) for block in one.blocks]
        _worst_of(
            laws,
            [
                _sub_layers(layer, read, blocks[layer - 1], blocks[layer], lambda: _sums(own, layer, inputs))  # noqa: B023
                for layer in range(1, layers)
                if blocks[layer].shape == blocks[layer - 1].shape
            ],
        )


# ------------------------------------------------------------------------------------------------------------ running


def examined(family: str, group: str) -> dict[str, Any]:
    """Examine a family in a process of its own, with a time limit."""
    begin = time.time()
    with tempfile.TemporaryDirectory(prefix="families") as root:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            with os.fdopen(write, "w") as pipe:
                pipe.write(json.dumps(_examined_here(family, group, Path(root) / f"tiny-{family}")))
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
    found = json.loads(text) if text else {"not_built": f"ended without a word (time limit {SECONDS} s, or a crash)"}
    return {"group": group, **found, "seconds": round(time.time() - begin, 1)}


def _examined_here(family: str, group: str, folder: Path) -> dict[str, Any]:
    signal.alarm(SECONDS)
    try:
        return (examine_vision if group == "vision" else examine_text)(family, folder)
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        # Paths of this machine say nothing about the family.
        message = re.sub(r"/\S*/site-packages/", "", " ".join(str(error).split()))[:250]
        return {"not_built": f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"}


def verdict(found: dict[str, Any]) -> str:
    """Return exact, refused, wrong or not tried."""
    if "not_built" in found:
        return "not tried"
    laws = {name: law["status"] for name, law in found["laws"].items()}
    if "harness" in laws.values():
        return "not tried"
    refused = any(laws.get(name) == "refused" for name in ("load", "blocks", "alone"))
    if any(status == "wrong" for name, status in laws.items() if name != "blocks" or not refused):
        return "wrong"
    return "refused" if refused else "exact"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", help="model types [all]")
    parser.add_argument("--group", choices=("text", "vision", "image-text"), help="one group of families [all]")
    parser.add_argument("--table", action="store_true", help="write the page from stored results, and run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results [benchmarks/families.json]")
    options = parser.parse_args()
    known = {family: group for group, names in tiny.families().items() for family in names}
    unknown = sorted(set(options.families) - set(known))
    if unknown:
        sys.exit(f"no such families: {', '.join(unknown)}")
    results: dict[str, Any] = json.loads(options.results.read_text())["families"] if options.results.is_file() else {}
    if not options.table:
        _warm_up()
        for family, group in known.items():
            if (not options.families or family in options.families) and options.group in (None, group):
                results[family] = examined(family, group)
                print(_line(family, results[family]), flush=True)
                _write(options.results, results)
    if options.results == RESULTS:
        PAGE.write_text(page(json.loads(RESULTS.read_text())))


def _line(family: str, found: dict[str, Any]) -> str:
    """Return what is printed about a family."""
    bad = {
        name: (law["status"], law["value"], law["note"][:120])
        for name, law in found.get("laws", {}).items()
        if law["status"] in ("wrong", "harness", "refused")
    }
    return f"{family:28} {verdict(found):9} {found['seconds']:5} s  {bad or found.get('not_built', '')}"


def _warm_up() -> None:
    """Import in this process whatever the families share, so that each child begins with it."""
    warnings.simplefilter("ignore")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(50)
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="families") as root:
        examine_text("llama", Path(root) / "llama")
        examine_vision("vit", Path(root) / "vit")


def _write(path: Path, results: dict[str, Any]) -> None:
    """Write the results, one family on a line."""
    from importlib.metadata import version

    from saekit.places import without_local_paths

    results = without_local_paths(results)
    versions = {name: version(name) for name in ("torch", "transformers")}
    head = f'"versions": {json.dumps(versions)},\n"tolerance": {TOLERANCE},\n"families": {{\n'
    lines = (f"{json.dumps(family)}: {json.dumps(found)}" for family, found in sorted(results.items()))
    path.write_text("{\n" + head + ",\n".join(lines) + "\n}}\n")


LAWS = {
    "blocks": "as many layers as the model runs blocks",
    "alone": "rows of one text or image equal the output of the block",
    "batch": "rows in a batch with others equal those alone",
    "left": "rows with padding on the left equal those alone",
    "square": "rows of as many texts as tokens equal those alone",
    "repeat": "two identical calls agree",
    "width": "the width of the model is that of its rows",
    "short names": "`layers.L.attn` and `layers.L.mlp` are what is added to the residual stream",
    "causal": "a model with a cross-entropy sees no later tokens",
    "splice": "rows put back unchanged change no logit, zeros change some",
    "context": "the longest context that is taken can be run",
    "train": "an SAE can be trained and evaluated on the rows",
    "cross-entropy": "the cross-entropy equals that of the model's own logits",
    "patches": "row p is the token of patch p",
}
"""What is checked of every family, where it applies."""


INTRODUCTION = """\
What saekit does on a tiny random model of every text and vision family of transformers ({versions}).
Written by `make families` (`python benchmarks/families.py`); do not edit. Each family is built from its default config,
made small, and compared with forward passes and hooks that are not saekit's, one unpadded text or image at a time, in
float32; equal means within {tolerance:g} of the largest value. "Refused" means an error that says why; "wrong" means a
number that is not what it is said to be."""

SHORT_NAMES = """\
*Short names*: `exact` when the two add up to what the block adds; `added before a norm` when a norm comes after the
sum; `refused` when the module that has such a name gives something else (name it by its path then)."""


def page(stored: dict[str, Any]) -> str:
    """Return docs/models.md."""
    families = stored["families"]
    groups = {
        name: [f for f in families if verdict(families[f]) == name]
        for name in ("exact", "refused", "wrong", "not tried")
    }
    versions = ", ".join(f"{name} {version}" for name, version in stored["versions"].items())
    lines = [
        "# Model families",
        "",
        *INTRODUCTION.format(versions=versions, tolerance=stored["tolerance"]).splitlines(),
        "",
        *_table(
            ("", *groups),
            [
                (group, *(str(sum(families[f]["group"] == group for f in names)) for names in groups.values()))
                for group in ("text", "vision", "image-text")
            ],
        ),
        "",
        "Image-text models are tried as language models, with texts alone. What is checked:",
        "",
        *(f"- *{name}*: {meaning}" for name, meaning in LAWS.items()),
        "",
        "## Wrong",
        "",
        *(
            _table(("family", "law", "by (relative)", "what"), _wrong(families, groups["wrong"]))
            if groups["wrong"]
            else ["None."]
        ),
        "",
        "## Refused",
        "",
        *_table(("family", "reason"), [(f"`{f}`", _cell(_refusal(families[f]))) for f in groups["refused"]]),
        "",
        "## Exact",
        "",
        *SHORT_NAMES.splitlines(),
        "",
        *_table(
            ("family", "short names", "cross-entropy", "refused"),
            [
                (
                    f"`{f}`",
                    families[f]["laws"].get("short names", {}).get("status", "-"),
                    families[f]["laws"].get("cross-entropy", {}).get("status", "none"),
                    _also_refused(families[f]),
                )
                for f in groups["exact"]
            ],
        ),
        "",
        "## Not tried",
        "",
        *_table(("family", "why"), [(f"`{f}`", _cell(_untried(families[f]))) for f in groups["not tried"]]),
    ]
    return "\n".join(lines) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def _cell(text: str, length: int = 200) -> str:
    """Return a note without line breaks, bars and names of temporary folders."""
    text = re.sub(r"/tmp/\S*?(tiny-[\w-]+)", r"\1", " ".join(text.split())).replace("|", "/")
    return text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …"


def _wrong(families: dict[str, Any], names: list[str]) -> list[tuple[str, ...]]:
    return [
        (f"`{f}`", law, "" if found["value"] is None else f"{found['value']:.3g}", _cell(found["note"], 120))
        for f in names
        for law, found in families[f]["laws"].items()
        if found["status"] == "wrong"
    ]


def _refusal(found: dict[str, Any]) -> str:
    return next(law["note"] for law in found["laws"].values() if law["status"] == "refused")


def _untried(found: dict[str, Any]) -> str:
    return found.get("not_built") or next(law["note"] for law in found["laws"].values() if law["status"] == "harness")


def _also_refused(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{name}: {_cell(law['note'], 80)}"
        for name, law in found["laws"].items()
        if law["status"] == "refused" and name != "short names"
    )


if __name__ == "__main__":
    main()
