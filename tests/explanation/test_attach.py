"""An attached SAE changes what its edits say, where they say, and nothing else."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers

import saekit as sk
from saekit.errors import ConfigError, MissingModelError, PlaceWarning, ShapeError
from saekit.explanation.attach import attach
from saekit.explanation.edits import AblateTop, Edit
from saekit.models.hooks import activations, find_hook
from saekit.models.intervene import splice
from saekit.models.quiet import quiet_transformers
from saekit.sae.model import SAE
from saekit.sae.rules import TopKRule

WIDTH, N = 16, 40
SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 40}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def _decoders():
    rest = {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    t = transformers
    return {
        "gpt2": t.GPT2Config(n_embd=WIDTH, n_layer=3, n_head=2, n_positions=64, vocab_size=40, **IDS),
        "llama": t.LlamaConfig(**SMALL, **rest, **IDS),
        "gemma2": t.Gemma2Config(**SMALL, **rest, **IDS, sliding_window=8),
        "qwen3": t.Qwen3Config(**SMALL, **rest, **IDS),
        "mamba": t.MambaConfig(vocab_size=40, hidden_size=WIDTH, num_hidden_layers=3, state_size=4, **IDS),
    }


KINDS = list(_decoders())


@pytest.fixture(scope="module")
def decoders():
    made = {}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        for kind, config in _decoders().items():
            torch.manual_seed(1)
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            made[kind] = model
    return made


@pytest.fixture(scope="module")
def sae():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(N, WIDTH, generator=generator)
    W = W / W.norm(dim=1, keepdim=True)
    return SAE(W, torch.zeros(N), W, torch.zeros(WIDTH), TopKRule(6), provenance={"hook": "layers.1"})


def ids(batch=2, length=7, seed=3):
    return torch.randint(4, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def hidden(model, inputs, layer=1):
    (found,) = activations(model, [find_hook(model, layer=layer)], inputs)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_edit_changes_no_bit(decoders, sae, kind):
    model = decoders[kind]
    with torch.no_grad():
        clean = model(ids()).logits
        with attach(model, sae):
            assert torch.equal(model(ids()).logits, clean)
        with attach(model, sae, {3: Edit.scale(1), 4: Edit.clamp()}):
            assert torch.equal(model(ids()).logits, clean)
        with attach(model, sae, {3: 5.0}):
            assert not torch.equal(model(ids()).logits, clean)
        assert torch.equal(model(ids()).logits, clean)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_the_edited_reconstruction_plus_the_error(decoders, sae, kind):
    model = decoders[kind]
    x = hidden(model, {"input_ids": ids()}).reshape(-1, WIDTH)
    z = sae.encode(x).to_dense()
    edited = z.clone()
    edited[:, 5], edited[:, 9] = 4.0, 0.0
    expected = x + (edited - z) @ sae.W_dec
    with attach(model, sae, {5: 4.0, 9: Edit.ablate()}):
        torch.testing.assert_close(hidden(model, {"input_ids": ids()}).reshape(-1, WIDTH), expected)
    with attach(model, sae, {5: 4.0, 9: Edit.ablate()}, keep_error=False):
        torch.testing.assert_close(
            hidden(model, {"input_ids": ids()}).reshape(-1, WIDTH), edited @ sae.W_dec + sae.b_dec
        )


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_all_is_the_zero_reconstruction(decoders, sae, kind):
    model = decoders[kind]
    zero = sae.b_dec.expand(1, -1)
    with torch.no_grad():
        with splice(model, "layers.1", lambda x: zero.expand(len(x), -1)):
            expected = model(ids()).logits
        with attach(model, sae, AblateTop(sae.n_latents), keep_error=False):
            torch.testing.assert_close(model(ids()).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", ["all", "prompt", "generated", "last"])
def test_generation_is_the_same_with_and_without_a_cache(decoders, sae, kind, at):
    model = decoders[kind]
    how = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mask = torch.ones_like(ids())
    runs = []
    with quiet_transformers(), attach(model, sae, {3: 6.0, 11: Edit.add(2)}, at=at) as attached:
        for use_cache in (True, False):
            runs.append(model.generate(ids(), attention_mask=mask, use_cache=use_cache, **how))
    plain = model.generate(ids(), attention_mask=mask, **how)
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    for one, other in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert len(attached.change) >= (11 if at in ("all", "generated") else 1)
    assert not all(torch.equal(one, other) for one, other in zip(runs[0].logits, plain.logits, strict=True))
    if at == "generated":  # the prompt is as it was
        torch.testing.assert_close(runs[0].logits[0], plain.logits[0], atol=1e-5, rtol=1e-5)


def edited_columns(model, sae, at, inputs, **options):
    """Return at which tokens the hidden states changed."""
    before = hidden(model, inputs)
    with attach(model, sae, {3: 50.0}, at=at, **options):
        after = hidden(model, inputs)
    return (after != before).any(-1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_which_tokens(decoders, sae, side):
    model = decoders["llama"]
    tokens = ids(2, 6)
    tokens[:, 0] = 1  # BOS
    mask = torch.ones_like(tokens)
    mask[1, slice(4, 6) if side == "right" else slice(0, 2)] = 0
    if side == "left":
        tokens[1] = torch.tensor([0, 0, 1, 9, 8, 7])
    inputs = {"input_ids": tokens, "attention_mask": mask}
    real = mask.bool() & (tokens != 1)
    assert torch.equal(edited_columns(model, sae, "all", inputs), real)
    assert torch.equal(edited_columns(model, sae, "all", inputs, special=True), mask.bool())
    assert torch.equal(edited_columns(model, sae, "prompt", inputs), real)
    assert not edited_columns(model, sae, "generated", inputs).any()
    last = torch.zeros_like(real)
    last[0, 5] = last[1, 3 if side == "right" else 5] = True
    assert torch.equal(edited_columns(model, sae, "last", inputs), last)
    chosen = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(edited_columns(model, sae, chosen, inputs), real & chosen)


def test_a_mask_is_read_however_it_is_given_or_refused(decoders, sae):
    model, tokens = decoders["llama"], ids(2, 6)
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    found = []
    for args, kwargs in (((tokens, mask), {}), ((), {"input_ids": tokens, "attention_mask": mask})):
        with attach(model, sae, {3: 50.0}):
            found.append(model(*args, **kwargs).logits)
    assert torch.equal(*found)
    with attach(model, sae, {3: 50.0}), pytest.raises(ShapeError, match=r"matrix \[batch, sequence\].*\(2, 1, 6, 6\)"):
        model(tokens, attention_mask=torch.zeros(2, 1, 6, 6))


def test_special_tokens_of_a_config_may_be_several(decoders, sae, monkeypatch):
    model, tokens = decoders["llama"], torch.tensor([[9, 9, 5, 9, 7, 9]])
    monkeypatch.setattr(model.config, "eos_token_id", [5, 7])
    changed = edited_columns(model, sae, "all", {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    assert changed.tolist() == [[True, True, False, True, False, True]]


def test_a_loop_over_the_cache_by_hand(decoders, sae):
    model = decoders["qwen3"]
    tokens = ids(1, 8)
    with torch.no_grad():
        with attach(model, sae, {3: 6.0}, at="generated"):
            first = model(tokens[:, :5], use_cache=True)
            second = model(tokens[:, 5:], past_key_values=first.past_key_values).logits
        generated = torch.arange(8)[None] >= 5
        with attach(model, sae, {3: 6.0}, at=generated):
            whole = model(tokens).logits
    torch.testing.assert_close(second, whole[:, 5:], atol=1e-4, rtol=1e-4)


def test_a_recurrent_cache_by_hand_is_refused(decoders, sae):
    model = decoders["mamba"]
    with torch.no_grad(), attach(model, sae, {3: 6.0}):
        first = model(ids(1, 5), use_cache=True)
        with pytest.raises(ConfigError, match="recurrent"):
            model(ids(1, 1), cache_params=first.cache_params)


def test_a_mask_follows_texts_that_are_continued_several_times(decoders, sae):
    model, tokens = decoders["llama"], ids(2, 5)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[1, 2] = True
    how = {"max_new_tokens": 3, "do_sample": True, "output_logits": True, "return_dict_in_generate": True}
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        plain = model.generate(tokens, attention_mask=torch.ones_like(tokens), num_return_sequences=2, **how)
        with attach(model, sae, {3: 50.0}, at=mask):
            edited = model.generate(tokens, attention_mask=torch.ones_like(tokens), num_return_sequences=2, **how)
    differs = (plain.logits[0] != edited.logits[0]).any(-1)
    assert differs.tolist() == [False, False, True, True]


def test_attachments_nest(decoders, sae):
    model = decoders["gpt2"]
    x = hidden(model, {"input_ids": ids()})
    with attach(model, sae, {3: Edit.add(2)}), attach(model, sae, {3: Edit.add(3)}):
        twice = hidden(model, {"input_ids": ids()})
    torch.testing.assert_close(twice, x + 5 * sae.W_dec[3], atol=1e-4, rtol=1e-4)
    other = sae.replace(provenance={"hook": "layers.0"})
    with torch.no_grad():
        with attach(model, sae, {3: 6.0}), attach(model, other, {5: 6.0}):
            both = model(ids()).logits
            generated = model.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=5, do_sample=False)
        with attach(model, other, {5: 6.0}), attach(model, sae, {3: 6.0}):
            assert torch.equal(model(ids()).logits, both)
            again = model.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, again)
    assert "generate" not in vars(model)


def test_an_encoder_decoder(sae):
    config = transformers.T5Config(
        vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    how = {"attention_mask": torch.ones_like(ids()), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    with quiet_transformers():
        clean = model.generate(ids(), **how)
        with attach(model, sae):
            same = model.generate(ids(), **how)
        runs = []
        for hook in ("layers.1", "decoder.block.1"):
            for use_cache in (True, False):
                with attach(model, sae, {3: 30.0}, hook=hook):
                    runs.append(model.generate(ids(), use_cache=use_cache, **how))
    assert all(torch.equal(one, other) for one, other in zip(clean.logits, same.logits, strict=True))
    for cached, whole in (runs[:2], runs[2:]):
        for one, other in zip(cached.logits, whole.logits, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        assert not torch.equal(cached.logits[-1], clean.logits[-1])
    encoder = model.get_encoder()
    before = hidden(encoder, {"input_ids": ids()})
    with attach(model, sae, {3: 30.0}):
        after = hidden(encoder, {"input_ids": ids()})
    z = sae.encode(before.reshape(-1, WIDTH)).to_dense()[:, 3]
    torch.testing.assert_close(
        after.reshape(-1, WIDTH), before.reshape(-1, WIDTH) + (30 - z)[:, None] * sae.W_dec[3], atol=1e-4, rtol=1e-4
    )


def test_images(sae):
    config = transformers.ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.ViTModel(config).eval()
        images = torch.randn(2, 3, 8, 8)
    inputs = {"pixel_values": images}
    before = hidden(model, inputs)
    with attach(model, sae):
        assert torch.equal(hidden(model, inputs), before)
    patches = torch.tensor([False, True, True, True, True]).expand(2, 5)
    for options, expected in (({}, patches), ({"special": True}, torch.ones_like(patches))):
        with attach(model, sae, {3: 50.0}, **options):
            assert torch.equal((hidden(model, inputs) != before).any(-1), expected)
    with pytest.raises(ConfigError, match="generated"), attach(model, sae, at="generated"):
        pass
    with pytest.raises(ShapeError), attach(model, sae, {3: 1.0}, at=torch.ones(2, 4, dtype=torch.bool)):
        model(**inputs)


def test_half_precision_changes_nothing_where_nothing_is_edited(decoders, sae):
    import copy

    model = copy.deepcopy(decoders["llama"]).to(torch.bfloat16)
    with torch.no_grad():
        clean = model(ids()).logits
        with attach(model, sae, {3: Edit.scale(1)}):
            assert torch.equal(model(ids()).logits, clean)
        with attach(model, sae, {3: 30.0}):
            assert model(ids()).logits.dtype == torch.bfloat16
            assert not torch.equal(model(ids()).logits, clean)


def test_a_loaded_language_model_gives_its_tokenizer(models, sae):
    lm = models["llama"]
    with pytest.warns(PlaceWarning), attach(lm, sae.replace(provenance={"hook": "layers.1", "model_digest": "x"})):
        pass
    inputs = lm.tokenizer("the cat sat", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    before = hidden(lm.model, inputs)
    with attach(lm, sae, {3: 50.0}) as attached:
        after = hidden(attached.model, inputs)
    assert attached.tokenizer is lm.tokenizer
    assert (after != before).any(-1).tolist() == [[False, True, True, True]]  # not the BOS
    assert attached.change[0] > 0


def test_other_threads_are_left_alone(decoders, sae):
    model, found = decoders["llama"], []
    before = hidden(model, {"input_ids": ids()})
    with attach(model, sae, {3: 50.0}):
        thread = threading.Thread(target=lambda: found.append(hidden(model, {"input_ids": ids()})))
        thread.start()
        thread.join()
    assert torch.equal(found[0], before)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"generation_config": transformers.GenerationConfig(num_beams=3)},
    ],
    ids=["beams", "lookup", "config"],
)
def test_generation_whose_tokens_move_is_refused(decoders, sae, options):
    model = decoders["llama"]
    with attach(model, sae, {3: 1.0}), pytest.raises(ConfigError, match="token after token"):
        model.generate(ids(), attention_mask=torch.ones_like(ids()), max_new_tokens=3, **options)


def test_refusals_come_before_the_model_runs(decoders, sae):
    model = decoders["llama"]
    transcoder = sae.replace(W_dec=torch.zeros(N, 8), b_dec=torch.zeros(8))
    cases = [
        ((model, transcoder), {}, ConfigError),
        ((model, sae, {N: 1.0}), {}, ConfigError),
        ((model, sae), {"at": "first"}, ConfigError),
        ((model, sae), {"at": torch.ones(2, 7)}, ShapeError),
        ((model, sae), {"layer": 3}, MissingModelError),
        ((model, sae.replace(provenance={})), {}, ConfigError),
        ((3, sae), {}, ConfigError),
    ]
    for args, options, error in cases:
        with pytest.raises(error), attach(*args, **options):
            raise AssertionError("the block ran")
    narrow = SAE(torch.eye(8), torch.zeros(8), torch.eye(8), torch.zeros(8), TopKRule(2), provenance={"layer": 1})
    with attach(model, narrow, {3: 1.0}), pytest.raises(ShapeError):
        model(ids())
    with attach(model, sae, {3: 1.0}), pytest.raises(ConfigError, match="embeddings"):
        model(inputs_embeds=torch.zeros(1, 3, WIDTH))
    with pytest.raises(ConfigError, match="keep_error"):
        attach(model, sae, keep_eror=True)


def test_a_transcoder_reads_at_one_module_and_changes_the_output_of_another(decoders):
    model = decoders["llama"]
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(2, N, WIDTH, generator=generator) / 4
    place = {"hook": "layers.1.mlp.input", "hook_out": "layers.1.mlp"}
    transcoder = SAE(W[0], torch.zeros(N), W[1], torch.ones(WIDTH), TopKRule(6), provenance=place)
    read, out = (find_hook(model, name) for name in place.values())
    before, clean = activations(model, [read, out], {"input_ids": ids()})
    with attach(model, transcoder, {3: "+2"}, special=True) as found:
        (changed,) = activations(model, [out], {"input_ids": ids()})
    torch.testing.assert_close(changed, clean + 2 * W[1][3])
    assert found.hook.name == "layers.1.mlp"
    with attach(model, transcoder, {3: "+2"}, special=True, keep_error=False):
        (changed,) = activations(model, [out], {"input_ids": ids()})
    torch.testing.assert_close(changed, transcoder.reconstruct(before) + 2 * W[1][3])
    with attach(model, transcoder, special=True):
        assert torch.equal(activations(model, [out], {"input_ids": ids()})[0], clean)
    silent = transcoder.replace(provenance={"hook": "layers.1", "transcoder": True})
    with pytest.raises(ConfigError, match="must say which module's output it predicts"), attach(model, silent):
        raise AssertionError("the block ran")


def test_the_public_name(decoders, sae):
    with sk.attach(decoders["gpt2"], sae, {3: "+2"}) as attached:
        assert attached.hook.name == "layers.1"
