"""Laws of the native format: round trips, prefixes, crashes, and files that must be refused."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from fixtures.forks import call_in_forks
from saekit import files
from saekit.errors import ConfigError, FormatError, OfflineError
from saekit.hub import ask_hub
from saekit.sae.model import SAE
from saekit.sae.rules import GroupMaxRule, JumpReLURule, ReLURule, TopKRule
from saekit.sae.scaling import Scaling
from saekit.store import hub, native, tensorfile
from saekit.store.description import SCHEMA
from saekit.store.native import describe, load, save

RULES = ("relu", "topk", "topk-rank", "jumprelu", "groupmax", "groupmax-group")
SCALINGS = ("none", "scalar", "standardize", "layer_norm")


def make_sae(rule="topk", scaling="none", n=96, d_in=8, d_out=None, dtype=torch.float32, skip=False, seed=0) -> SAE:
    g = torch.Generator().manual_seed(seed)
    d_out = d_out or d_in

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    rules = {
        "relu": ReLURule(),
        "topk": TopKRule(5),
        "topk-rank": TopKRule(5, rank=rand(n).abs() + 0.1),
        "jumprelu": JumpReLURule(rand(n).abs()),
        "groupmax": GroupMaxRule(8),
        "groupmax-group": GroupMaxRule(7, group=torch.arange(n) % 7),
    }
    scalings = {
        "none": Scaling(),
        "scalar": Scaling("scalar", scale=torch.tensor(0.5, dtype=dtype)),
        "standardize": Scaling("standardize", scale=rand(d_in).abs() + 0.5, mean=rand(d_in)),
        "layer_norm": Scaling("layer_norm", eps=1e-6),
    }
    return SAE(
        W_enc=rand(n, d_in), b_enc=rand(n), W_dec=rand(n, d_out), b_dec=rand(d_out),
        b_pre=rand(d_in) if rule != "relu" else None,
        rule=rules[rule], scaling=scalings[scaling], W_skip=rand(d_in, d_out) if skip else None,
        provenance={"model": "test", "hook": "layers.2", "seed": 3, "config": {"k": 5, "note": "größer </script>"}},
    )  # fmt: skip


def assert_same(a: SAE, b: SAE) -> None:
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        other = b.tensors()[name]
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other), name
    assert a.scores.keys() == b.scores.keys()
    assert all(torch.equal(score, b.scores[name]) for name, score in a.scores.items())
    assert a.rule.name == b.rule.name
    assert a.rule.settings() == b.rule.settings()
    assert a.scaling.settings() == b.scaling.settings()
    assert a.provenance == b.provenance


def scored(sae: SAE) -> SAE:
    g = torch.Generator().manual_seed(9)
    return sae.with_scores(stability=torch.rand(sae.n_latents, generator=g), energy=range(sae.n_latents))


# ------------------------------------------------------------------ round trips


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_save_load_save_is_byte_equal(tmp_path, rule, scaling):
    sae = make_sae(rule, scaling)
    save(sae, tmp_path / "a")
    again = load(tmp_path / "a")
    assert_same(sae, again)
    save(again, tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["sae.json", "sae.safetensors"]
    for name in ("sae.json", "sae.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_and_the_skip_path_survive(tmp_path, dtype):
    sae = make_sae("groupmax-group", dtype=dtype, d_in=7, d_out=5, skip=True)
    save(sae, tmp_path)
    assert_same(sae, load(tmp_path))
    assert describe(tmp_path)["dtype"] == str(dtype).removeprefix("torch.")


def test_methods_of_the_value_use_the_store(tmp_path):
    sae = make_sae()
    sae.save(tmp_path)
    assert_same(SAE.load(tmp_path), sae)
    assert_same(SAE.load(tmp_path, latents=10), load(tmp_path).take(10))
    assert_same(SAE.load(tmp_path / "sae.json"), sae)


def test_names_that_hugging_face_uses(tmp_path):
    make_sae().save_pretrained(tmp_path)
    assert_same(SAE.from_pretrained(tmp_path), make_sae())
    assert_same(SAE.from_pretrained(tmp_path, latents=10), make_sae().take(10))
    with pytest.raises(ConfigError, match="a local folder has no `revision`"):
        SAE.from_pretrained(tmp_path, revision="v1")
    with pytest.raises(ConfigError, match=r"`\./nowhere/sae` does not exist"):
        SAE.from_pretrained("./nowhere/sae")


def test_other_libraries_read_the_tensors(tmp_path):
    sae = make_sae("jumprelu", "standardize", dtype=torch.bfloat16)
    save(sae, tmp_path)
    read = load_file(tmp_path / "sae.safetensors")
    assert read.keys() == sae.tensors().keys()
    assert all(torch.equal(read[name], t) for name, t in sae.tensors().items())


def test_json_is_strict_and_carries_the_digest_of_the_tensor_file(tmp_path):
    save(make_sae(), tmp_path)
    value = json.loads((tmp_path / "sae.json").read_text(encoding="utf-8"))
    assert value["schema"] == SCHEMA == 4
    assert value["sizes"] is None
    assert value["file"]["digest"] == files.digest_file(tmp_path / "sae.safetensors")
    assert value["rule"] == {"name": "topk", "k": 5}
    assert value["provenance"]["config"]["note"] == "größer </script>"


@pytest.mark.parametrize("rule", RULES)
def test_the_digest_of_a_value_is_the_content_of_its_file(tmp_path, rule):
    sae = scored(make_sae(rule, "standardize", skip=True))
    save(sae, tmp_path)
    assert describe(tmp_path)["content"] == sae.digest() == load(tmp_path).digest()
    assert load(tmp_path, latents=70).digest() == sae.take(70).digest() != sae.digest()


def test_scores_of_the_same_sae_saved_over_it_belong_to_their_own_file(tmp_path, monkeypatch):
    """The digest is the same; a folder cut off between the renames still holds one SAE, whole."""
    old, new = make_sae(), scored(make_sae())
    save(old, tmp_path)
    rename = os.replace

    def replace_until_the_description(source, target):
        if Path(source).name == "sae.json.next":
            raise OSError(5, "killed")
        rename(source, target)

    monkeypatch.setattr(native.os, "replace", replace_until_the_description)
    with pytest.raises(OSError, match="killed"):
        save(new, tmp_path)
    assert old.digest() == new.digest()
    assert_same(load(tmp_path), new)


def test_every_released_schema_opens():
    for folder in sorted((Path(__file__).parent / "released").iterdir()):
        sae = load(folder)
        assert sae.rule.name == "jumprelu"
        codes = sae.encode(torch.linspace(-1, 1, 4 * sae.d_in).reshape(4, sae.d_in))
        expected = json.loads((folder / "expected.json").read_text())
        assert codes.indices.tolist() == expected["indices"]
        assert codes.values.tolist() == pytest.approx(expected["values"], abs=1e-5)


# ------------------------------------------------------------------ prefixes


@given(n=st.integers(1, 300), m=st.integers(1, 300), rule=st.sampled_from(RULES), seed=st.integers(0, 3))
def test_prefix_load_is_take_after_load(tmp_path_factory, n, m, rule, seed):
    n = max(n, 8) // 8 * 8
    m = min(m, n)
    folder = tmp_path_factory.mktemp("sae")
    save(make_sae(rule, n=n, seed=seed), folder)
    whole = load(folder)
    assert_same(load(folder, latents=m), whole.take(m) if m < n else whole)


def test_topk_of_a_prefix_keeps_at_most_the_prefix(tmp_path):
    save(make_sae("topk"), tmp_path)
    assert load(tmp_path, latents=3).rule.settings() == {"k": 3}


class CountedReads:
    """Counts the bytes that are read from tensor files."""

    def __init__(self, monkeypatch):
        self.bytes = 0
        real = tensorfile.read_rows

        def counted(stream, entry, rows=None):
            tensor = real(stream, entry, rows)
            self.bytes += tensor.nbytes
            return tensor

        monkeypatch.setattr(tensorfile, "read_rows", counted)


def _read_by_this_process() -> int:
    """Bytes that this process has asked the system to read, as Linux counts them."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs Linux's /proc/self/io")
def test_prefix_load_reads_only_the_first_rows(tmp_path):
    n, d, m = 4096, 64, 256
    save(make_sae("topk", n=n, d_in=d), tmp_path)
    load(tmp_path, latents=m)  # imports are done
    before = _read_by_this_process()
    load(tmp_path, latents=m)
    read = _read_by_this_process() - before
    prefix = 4 * (2 * m * d + m + 2 * d)  # bytes: two matrices, b_enc, b_dec and b_pre
    total = os.path.getsize(tmp_path / "sae.safetensors")
    overhead = os.path.getsize(tmp_path / "sae.json") + 4096  # the description, the header, the counter itself
    assert prefix <= read <= prefix + overhead
    assert read < total / 8


def test_describe_reads_no_tensor(tmp_path, monkeypatch):
    save(make_sae(), tmp_path)
    counted = CountedReads(monkeypatch)
    facts = describe(tmp_path)
    assert counted.bytes == 0
    assert facts["n_latents"] == 96
    assert facts["provenance"]["hook"] == "layers.2"
    json.dumps(facts)


@pytest.mark.parametrize("latents", [0, -1, 97, 1.5])
def test_prefix_out_of_range(tmp_path, latents):
    save(make_sae(), tmp_path)
    with pytest.raises(ConfigError, match=r"`latents` must be a whole number from 1 to n_latents=96"):
        load(tmp_path, latents=latents)


# ------------------------------------------------------------------ measured sizes


def with_sizes(sae, fvu_at):
    points = [
        {"latents": size, "metrics": {"fvu": {"value": value, "low": None, "high": None, "unit": "fraction"}}}
        for size, value in fvu_at.items()
    ]
    sizes = {"measured_on": {"n_rows": 100}, "points": points}
    return sae.replace(provenance={**sae.provenance, "latent_order": "energy", "sizes": sizes})


@pytest.fixture
def progressive(tmp_path):
    """A folder whose SAE says what 8, 32 and 96 of its latents are worth."""
    save(with_sizes(make_sae(), {8: 0.6, 32: 0.31, 96: 0.2}), tmp_path / "progressive")
    return tmp_path / "progressive"


def test_sizes_are_a_key_of_their_own_and_survive(progressive, tmp_path):
    value = json.loads((progressive / "sae.json").read_text())
    assert [point["latents"] for point in value["sizes"]["points"]] == [8, 32, 96]
    assert "sizes" not in value["provenance"]
    assert describe(progressive)["sizes"] == value["sizes"]
    assert load(progressive).provenance["sizes"] == value["sizes"]
    save(load(progressive), tmp_path / "again")
    assert (tmp_path / "again" / "sae.json").read_bytes() == (progressive / "sae.json").read_bytes()


@pytest.mark.parametrize(("target", "latents"), [(0.9, 8), (0.6, 8), (0.4, 32), (0.2, 96)])
def test_load_the_smallest_size_that_meets_a_target(progressive, target, latents):
    assert_same(load(progressive, fvu=target), load(progressive, latents=latents))
    assert_same(SAE.load(progressive, fvu=target), load(progressive, latents=latents))


def test_target_that_no_size_meets_names_the_best(progressive):
    with pytest.raises(ConfigError, match=r"reaches an FVU of 0.1; the best is 0.2 with 96 latents"):
        load(progressive, fvu=0.1)


def test_target_without_measured_sizes(tmp_path):
    save(make_sae(), tmp_path)
    with pytest.raises(ConfigError, match=r"picks a size from the measured ones, .* holds none. Measure it first"):
        load(tmp_path, fvu=0.5)


def test_latents_and_target_together(progressive):
    with pytest.raises(ConfigError, match="give `latents` or `fvu`, not both"):
        load(progressive, latents=8, fvu=0.5)


def test_a_prefix_keeps_its_part_of_the_curve(progressive, tmp_path):
    save(load(progressive, latents=40), tmp_path / "small")
    assert [point["latents"] for point in describe(tmp_path / "small")["sizes"]["points"]] == [8, 32]
    save(load(progressive, latents=4), tmp_path / "tiny")
    assert describe(tmp_path / "tiny")["sizes"] is None


@pytest.mark.parametrize("change", ["permute", "take"])
def test_another_order_has_no_curve(progressive, change):
    sae = load(progressive)
    other = getattr(sae, change)(torch.arange(sae.n_latents - 1, -1, -1))
    assert not {"sizes", "latent_order"} & set(other.provenance)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(sizes=3),
        lambda v: v["sizes"].update(more=1),
        lambda v: v["sizes"].update(points=[]),
        lambda v: v["sizes"]["points"].reverse(),
        lambda v: v["sizes"]["points"][0].update(latents="8"),
        lambda v: v["sizes"]["points"][0].update(metrics={"fvu": 0.6}),
    ],
)
def test_sizes_that_are_not_a_curve(progressive, change):
    edit(progressive, change)
    with pytest.raises(FormatError, match="`sizes` must be"):
        load(progressive)


def test_sizes_that_are_not_a_curve_are_not_written(tmp_path):
    sae = make_sae()
    with pytest.raises(ConfigError, match="`sizes` must be"):
        save(sae.replace(provenance={"sizes": [1, 2]}), tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_survive_byte_for_byte(tmp_path, dtype):
    sae = scored(make_sae("jumprelu", dtype=dtype))
    save(sae, tmp_path / "a")
    again = load(tmp_path / "a")
    assert_same(sae, again)
    assert {name: score.dtype for name, score in again.scores.items()} == dict.fromkeys(
        ("energy", "stability"), torch.float32
    )
    save(again, tmp_path / "b")
    for name in ("sae.json", "sae.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert describe(tmp_path / "a")["tensors"]["scores.stability"] == {"dtype": "float32", "shape": [96]}


@given(n=st.integers(1, 40), m=st.integers(1, 300), seed=st.integers(0, 3))
def test_prefix_load_takes_the_scores_along(tmp_path_factory, n, m, seed):
    folder = tmp_path_factory.mktemp("sae")
    whole = scored(make_sae(n=8 * n, seed=seed))
    save(whole, folder)
    m = min(m, 8 * n)
    assert_same(load(folder, latents=m), whole.take(m))


def test_prefix_load_reads_only_the_first_scores(tmp_path, monkeypatch):
    save(scored(make_sae(n=4096)), tmp_path)
    counted = CountedReads(monkeypatch)
    assert len(load(tmp_path, latents=64).scores["energy"]) == 64
    assert counted.bytes == 4 * (64 * (2 * 8 + 1 + 2) + 2 * 8)


@pytest.mark.parametrize("latents", [None, 10])
def test_one_flipped_bit_of_a_score_is_found(tmp_path, latents):
    save(scored(make_sae()), tmp_path)
    path = tmp_path / "sae.safetensors"
    data = bytearray(path.read_bytes())
    data[tensorfile.read_header(path).entries["scores.stability"].start + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="altered or damaged"):
        load(tmp_path, latents=latents)


def test_a_score_that_is_no_number_per_latent(tmp_path, monkeypatch):
    sae = make_sae()
    tensors = {**sae.tensors(), "scores.odd": torch.ones(3)}
    monkeypatch.setattr(SAE, "tensors", lambda self: tensors)
    save(sae, tmp_path)
    with pytest.raises(FormatError, match=r"tensor `scores.odd` must be float32 \(96,\), a number per latent"):
        load(tmp_path)


def test_older_schemas_have_no_scores():
    for schema in (1, 2):
        folder = Path(__file__).parent / "released" / f"schema-{schema}"
        assert json.loads((folder / "sae.json").read_text())["schema"] == schema
        assert load(folder).scores == {}
    newest = load(Path(__file__).parent / "released" / "schema-3")
    assert newest.scores["stability"].tolist() == pytest.approx([latent / 4 for latent in range(5)] * 2 + [0, 0.25])
    assert load(Path(__file__).parent / "released" / "schema-3", latents=3).scores["stability"].tolist() == [
        0,
        0.25,
        0.5,
    ]


def test_schema_1_has_no_sizes():
    folder = Path(__file__).parent / "released" / "schema-1"
    assert json.loads((folder / "sae.json").read_text())["schema"] == 1
    assert describe(folder)["sizes"] is None
    assert "sizes" not in load(folder).provenance


# ------------------------------------------------------------------ crashes


def test_a_full_disk_leaves_the_old_sae(tmp_path, monkeypatch):
    old, new = make_sae(seed=0), make_sae(seed=1)
    save(old, tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    for module, name in ((tensorfile, "write"), (native, "write_bytes"), (files.os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left"):
                save(new, tmp_path)
        assert_same(load(tmp_path), old)
        assert sorted(p.name for p in tmp_path.iterdir()) == before


KILLED_SAVE = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_native import make_sae, save
real = os.replace
count = 0

def work(folder, at):
    def replace(*args):
        global count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        real(*args)
    os.replace = replace
    save(make_sae(seed=1), folder)
"""


@pytest.mark.parametrize("first", [True, False], ids=["nothing-before", "over-an-older-one"])
def test_killed_between_any_two_renames_the_folder_loads_as_old_or_new(tmp_path, first):
    """A process is killed at its n-th rename, for every n; what is left is one of the two SAEs, whole."""
    old, new = make_sae(seed=0), make_sae(seed=1)
    folders = [tmp_path / str(at) for at in range(5)]
    for folder in folders:
        if not first:
            save(old, folder)
    assert call_in_forks(KILLED_SAVE, [(str(folder), at) for at, folder in enumerate(folders)])[:2] == ["killed"] * 2
    seen = set()
    for folder in folders:
        try:
            sae = load(folder)
        except ConfigError:
            assert first
            seen.add("nothing")
            continue
        except FormatError:
            assert first  # a description without tensors: refused, not misread
            seen.add("nothing")
            continue
        assert_same(sae, new if torch.equal(sae.W_enc, new.W_enc) else old)
        seen.add("new" if torch.equal(sae.W_enc, new.W_enc) else "old")
    assert seen == ({"nothing", "new"} if first else {"old", "new"})


# ------------------------------------------------------------------ what must be refused


@pytest.fixture
def stored(tmp_path) -> Path:
    save(make_sae("jumprelu"), tmp_path / "sae")
    return tmp_path / "sae"


def edit(folder: Path, change, *, sealed: bool = True) -> None:
    value = json.loads((folder / "sae.json").read_text(encoding="utf-8"))
    change(value)
    value = files.seal(value) if sealed else value
    (folder / "sae.json").write_text(json.dumps(value), encoding="utf-8")


def readers(folder: Path):
    return (lambda: load(folder), lambda: load(folder, latents=10), lambda: describe(folder))


def test_truncated_weights(stored):
    data = (stored / "sae.safetensors").read_bytes()
    for cut in (len(data) - 1, len(data) // 2, 200, 9, 3, 0):
        (stored / "sae.safetensors").write_bytes(data[:cut])
        for read in readers(stored):
            with pytest.raises(FormatError, match="must be a whole safetensors file"):
                read()


def test_longer_weights(stored):
    with open(stored / "sae.safetensors", "ab") as stream:
        stream.write(b"\0")
    with pytest.raises(FormatError, match="longer than it should be"):
        load(stored)


@pytest.mark.parametrize("latents", [None, 10])
@pytest.mark.parametrize("tensor", ["W_enc", "b_enc", "W_dec", "b_dec", "rule.threshold"])
def test_one_flipped_bit_is_found(stored, tensor, latents):
    path = stored / "sae.safetensors"
    data = bytearray(path.read_bytes())
    data[tensorfile.read_header(path).entries[tensor].start + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="altered or damaged"):
        load(stored, latents=latents)


def test_weights_of_another_sae(stored, tmp_path):
    save(make_sae("jumprelu", seed=5), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "sae.safetensors", stored / "sae.safetensors")
    for read in readers(stored):
        with pytest.raises(FormatError, match="content digests differ"):
            read()


def test_missing_weights(stored):
    (stored / "sae.safetensors").unlink()
    with pytest.raises(FormatError, match=r"must hold `sae.safetensors` next to `sae.json`"):
        load(stored)


def test_truncated_description(stored):
    text = (stored / "sae.json").read_text()
    (stored / "sae.json").write_text(text[: len(text) // 2])
    with pytest.raises(FormatError, match="must be JSON"):
        load(stored)


def test_newer_schema_says_which_release_to_install(stored):
    def newer(value):
        value.update(schema=5, saekit="0.9.0", something_new=1)

    edit(stored, newer)
    for read in readers(stored):
        with pytest.raises(FormatError, match=r"has schema 5; .* Install saekit 0\.9\.0 or later"):
            read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(scalling=1), r"unknown key `scalling`. Did you mean `scaling`\?"),
        (lambda v: v["rule"].update(kk=3), r"unknown key `rule.kk`"),
        (lambda v: v["scaling"].update(epss=3), r"unknown key `scaling.epss`. Did you mean `eps`\?"),
        (lambda v: v["file"].update(size=3), r"unknown key `file.size`"),
        (lambda v: v["blocks"].update(rows=3), r"unknown key `blocks.rows`"),
        (lambda v: v.pop("scaling"), r"must have the keys `scaling`"),
        (lambda v: v.update(rule={"name": "topp"}), r"`rule.name` must be one of"),
        (lambda v: v.update(rule=3), r"`rule` must be an object"),
        (lambda v: v.update(scaling=3), r"`scaling` must be an object"),
        (lambda v: v.update(file=3), r"`file` must be an object"),
        (lambda v: v.update(format="other"), r"must be the description of a saekit SAE"),
        (lambda v: v.update(schema="one"), r"`schema` must be a whole number"),
        (lambda v: v.update(n_latents=97), r"must hold `W_enc` \(97, 8\)"),
        (lambda v: v["tensors"]["W_dec"].update(shape=[8, 96]), r"tensor `W_dec` must be"),
        (lambda v: v["tensors"].pop("b_dec"), r"tensor `b_dec` must be absent"),
        (lambda v: v["scaling"].update(kind="odd"), r"describes an SAE that cannot be: Scaling: `kind` must be one of"),
    ],
)
def test_edited_description(stored, change, message):
    edit(stored, change)
    with pytest.raises(FormatError, match=message):
        load(stored)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["rule"].update(k=4),
        lambda v: v.update(pre_bias=False),
        lambda v: v.update(rule={"name": "relu"}),
        lambda v: v["provenance"].update(hook="layers.3"),
        lambda v: v.update(latent_order="energy"),
        lambda v: v.update(sizes={"measured_on": {}, "points": [{"latents": 8, "metrics": {"fvu": {"value": 0.1}}}]}),
        lambda v: v.pop("seal"),
        lambda v: v.update(seal="sha256:" + "0" * 64),
        lambda v: v.update(seal=None),
    ],
)
def test_any_edit_of_the_description_breaks_its_seal(tmp_path, change):
    save(make_sae("topk"), tmp_path)
    edit(tmp_path, change, sealed=False)
    for read in readers(tmp_path):
        with pytest.raises(FormatError, match="its seal does not fit"):
            read()


def test_without_a_seal_the_digest_of_the_function_binds_the_rule(tmp_path):
    """What releases before the seal wrote is checked as far as it can be: by `content`."""

    def unseal(value):
        value.update(schema=3)
        del value["seal"]

    save(make_sae("topk"), tmp_path)
    edit(tmp_path, unseal, sealed=False)
    assert_same(load(tmp_path), make_sae("topk"))
    for change in ({"k": 4}, {"k": 96}):
        edit(tmp_path, lambda v, change=change: v["rule"].update(change), sealed=False)
        with pytest.raises(FormatError, match="its `content` is another"):
            load(tmp_path)


def test_k_beyond_the_latents(tmp_path):
    save(make_sae("topk"), tmp_path)
    edit(tmp_path, lambda v: v["rule"].update(k=97))
    with pytest.raises(FormatError, match=r"`k` must be at most n_latents=96"):
        load(tmp_path)


def test_tensors_of_an_unknown_kind(tmp_path, monkeypatch):
    sae = make_sae()
    monkeypatch.setattr(SAE, "tensors", lambda self: {**{"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec,
                                                         "b_dec": self.b_dec}, "W_extra": self.b_dec})  # fmt: skip
    save(sae, tmp_path)
    with pytest.raises(FormatError, match="holds `W_extra`, which saekit does not know"):
        load(tmp_path)


def test_no_sae_there(tmp_path, stored):
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no `sae.json`"):
        load(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        load(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"must be the folder of one SAE; it holds 1: .*Name one of them"):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_provenance_that_is_not_json_writes_nothing(tmp_path, value):
    sae = make_sae().replace(provenance={"seed": value})
    with pytest.raises(ConfigError, match="must be plain JSON"):
        save(sae, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"not json", "its header cannot be read"),
        (b'{"W":{"dtype":"F8","shape":[1],"data_offsets":[0,1]}}', "element type 'F8'"),
        (b'{"W":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "does not fill data_offsets"),
        (b'{"W":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "begins at byte"),
    ],
)
def test_odd_safetensors_headers(tmp_path, header, message):
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(FormatError, match=message):
        tensorfile.read_header(tmp_path / "x.safetensors")


# ------------------------------------------------------------------ hub


def test_hub_without_network_names_the_offline_way():
    with pytest.raises(OfflineError, match=r"cannot be reached .* give its local path instead"):
        load("hf:nobody/nothing/layer_12")


@pytest.mark.parametrize("address", ["hf:", "hf:owner", "hf:owner/", "hf:a/b/../../c"])
def test_hub_address_that_cannot_be(address):
    with pytest.raises(ConfigError, match="a hub address must look like"):
        load(address)


def test_hub_folder_is_read_like_a_local_one(stored, monkeypatch):
    import huggingface_hub

    asked = []

    def fake(repository, name, subfolder=None, revision=None, local_files_only=False):
        asked.append((repository, name, subfolder, revision))
        return str(stored / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    assert_same(load("hf:me/saes/layers.6/topk@v1"), load(stored))
    assert_same(SAE.from_pretrained("me/saes/layers.6/topk", revision="v1"), load(stored))
    assert_same(SAE.from_pretrained("hf:me/saes/layers.6/topk", revision="v1"), load(stored))
    assert set(asked) == {("me/saes", name, "layers.6/topk", "v1") for name in ("sae.json", "sae.safetensors")}


class RangeRequests(io.FileIO):
    """A remote file: every read is one request for exactly those bytes."""

    asked: list[int]

    def __init__(self, path):
        super().__init__(path)
        self.asked = []

    def readinto(self, buffer):
        self.asked.append(len(buffer))
        return super().readinto(buffer)

    def read(self, size=-1):
        self.asked.append(size)
        return super().read(size)


@pytest.fixture
def remote(monkeypatch):
    """Makes a hub that holds a folder, `sae.json` of it in the cache; gives what was opened, as (place, stream)."""
    import huggingface_hub

    def make(folder, snapshot):
        opened = []

        class FileSystem:
            def open(self, place, mode, cache_type):
                assert (mode, cache_type) == ("rb", "none")
                opened.append((place, RangeRequests(folder / "sae.safetensors")))
                return opened[-1][1]

        def download(repository, name, subfolder=None, revision=None, local_files_only=False):
            assert name == "sae.json", "the tensors must not be downloaded whole"
            snapshot.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, snapshot / name)
            return str(snapshot / name)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        monkeypatch.setattr(huggingface_hub, "HfFileSystem", FileSystem)
        monkeypatch.setattr(hub, "ask_hub", lambda *_: None)
        return opened

    return make


def test_prefix_from_the_hub_asks_only_for_its_bytes(tmp_path, remote):
    n, d, m = 4096, 64, 256
    save(with_sizes(make_sae("topk", n=n, d_in=d), {256: 0.3, 4096: 0.1}), tmp_path / "there")
    opened = remote(tmp_path / "there", tmp_path / "snapshots" / "abc123" / "topk")
    for asked in ({"latents": m}, {"fvu": 0.3}):
        assert_same(load("hf:me/saes/topk", **asked), load(tmp_path / "there", latents=m))
    place, stream = opened[0]
    assert place == "me/saes@abc123/topk/sae.safetensors"  # the commit of the description
    prefix = 4 * (2 * m * d + m + 2 * d)
    assert prefix <= sum(stream.asked) <= prefix + 2048
    assert sum(stream.asked) < os.path.getsize(tmp_path / "there" / "sae.safetensors") / 8
    assert len(stream.asked) <= 8
    assert stream.closed


def test_prefix_from_the_hub_reads_the_cache_when_it_has_the_file(tmp_path, remote, monkeypatch):
    import huggingface_hub

    save(make_sae(), tmp_path / "there")
    opened = remote(tmp_path / "there", tmp_path / "cache")
    cached = str(tmp_path / "there" / "sae.safetensors")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: cached)
    assert_same(load("hf:me/saes", latents=12), load(tmp_path / "there", latents=12))
    assert not opened


def test_prefix_from_the_hub_offline(tmp_path, remote, monkeypatch):
    save(make_sae(), tmp_path / "there")
    remote(tmp_path / "there", tmp_path / "cache")
    monkeypatch.setattr(hub, "ask_hub", ask_hub)
    with pytest.raises(OfflineError, match="cannot be reached"):
        load("hf:me/saes", latents=12)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("GatedRepoError", "is gated: its owner must grant access"),
        ("RepositoryNotFoundError", "the hub has no repository `me/saes`"),
        ("RevisionNotFoundError", "has no revision `v1`"),
        ("EntryNotFoundError", "must hold `sae.json` and `sae.safetensors`"),
        ("HfHubHTTPError", "the hub refused"),
        ("LocalEntryNotFoundError", "cannot be reached"),
        ("OfflineModeIsEnabled", "cannot be reached"),
        ("HFValidationError", "is no hub address"),
    ],
)
def test_hub_errors_in_our_words(monkeypatch, error, message):
    import huggingface_hub
    from huggingface_hub import errors

    from saekit.errors import SaekitError

    kind = getattr(errors, error)

    def fail(*_, **__):
        exception = kind.__new__(kind)
        Exception.__init__(exception, "no")
        raise exception

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(SaekitError, match=message):
        hub.download("hf:me/saes/x@v1", ("sae.json", "sae.safetensors"))
