"""Cross-entropies with spliced reconstructions: blocks before the hook run once per batch, against the whole model.

python benchmarks/reuse.py                 # CPU time side by side, hook early and late (about 4 minutes)
python benchmarks/reuse.py --families      # equality on a tiny model of every causal family of transformers
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from unittest.mock import patch

import tiny_families as tiny
import torch
from torch import Tensor

from saekit.models.hooks import find_hook
from saekit.models.intervene import splice
from saekit.models.language import LanguageModel
from saekit.models.prefix import Prefix

BLOCKS, WIDTH, TOKENS, SAES = 26, 128, 8192, 2


def timed(layer: int, repetitions: int) -> tuple[list[float], list[float], float]:
    """CPU seconds of `measure_fidelity` with and without reuse, in turns, and the largest difference of an estimate."""
    import transformers

    from saekit.inputs.texts import read_texts
    from saekit.measure.controls import Reconstructor
    from saekit.measure.fidelity import SplicedModel, measure_fidelity
    from saekit.models.loading import load_model

    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    builtin = load_model("builtin", device="cpu", dtype="float32")
    assert isinstance(builtin, LanguageModel)
    lm = LanguageModel(**{**vars(builtin), "model": model})
    shrunk = [Reconstructor(f"shrunk {i}", lambda x, i=i: (x * (0.9 - 0.1 * i), None)) for i in range(3 * SAES)]
    texts = read_texts("builtin", characters=TOKENS * 12)
    spliced = SplicedModel(lm, f"layers.{layer}", texts, TOKENS, {"context": 128})
    times: tuple[list[float], list[float]] = ([], [])
    found = {}
    for _ in range(repetitions):
        for at, reuses in enumerate((True, False)):
            start = time.process_time()
            with patch.object(Prefix, "before", Prefix.before if reuses else (lambda *_: Prefix(()))):
                found[reuses], _ = measure_fidelity(spliced, shrunk, torch.zeros(WIDTH), intervals=False)
            times[at].append(time.process_time() - start)
    gap = max(
        abs(one[name].value - other[name].value)
        for one, other in zip(found[True], found[False], strict=True)
        for name in one
    )
    return *times, gap


def agreement(family: str) -> str:
    """Return how a tiny model of a family resumes: `bitwise`, a difference, or `whole model` where it does not."""
    from transformers import AutoModelForCausalLM

    own = tiny.build(tiny.tiny_config(family), AutoModelForCausalLM).eval()
    ids = torch.arange(4, 40).reshape(2, 18)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    hook = find_hook(own, layer=1)
    prefix = Prefix.before(own, [hook])

    def run(function: object) -> Tensor:
        with torch.no_grad(), splice(own, hook, function):  # type: ignore[arg-type]
            return own(**inputs).logits

    with torch.no_grad(), prefix.recorded():
        own(**inputs)
    if not prefix.agrees(lambda: run(torch.zeros_like)):
        return "whole model"
    whole = run(lambda x: 0.9 * x + 0.1)
    with prefix.replayed():
        resumed = run(lambda x: 0.9 * x + 0.1)
    if torch.equal(whole, resumed):
        return "bitwise"
    return f"difference {float((whole - resumed).abs().max() / whole.abs().max()):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", action="store_true", help="equality on every causal family")
    parser.add_argument("--repetitions", type=int, default=1)
    options = parser.parse_args()
    if not options.families:
        print(f"{BLOCKS} blocks of width {WIDTH}, {TOKENS:,} tokens, {SAES} SAEs with two controls each")
        print("layer  blocks once  whole model  ratio  largest difference")
        for layer in (5, 12, 20):
            once, whole, gap = timed(layer, options.repetitions)
            a, b = statistics.median(once), statistics.median(whole)
            print(f"{layer:5}  {a:9.2f} s  {b:9.2f} s  {b / a:5.2f}  {gap:.1e}", flush=True)
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    warnings.simplefilter("ignore")
    counts: dict[str, list[str]] = {}
    for family in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            found = agreement(family)
        except Exception as error:  # a tiny model that transformers itself does not run
            found = f"not run: {type(error).__name__}"
        counts.setdefault(found.split(":")[0], []).append(family)
        print(f"{family:30} {found}", flush=True)
    print(*(f"{name}: {len(members)}" for name, members in counts.items()), sep="\n")
    print("whole model:", ", ".join(counts.get("whole model", [])))


main()
