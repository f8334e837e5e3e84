"""The model card of SAEs on the hub: what they are, what was measured, with intervals and verdicts, what was not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..evaluation.result import Evaluation
from ..measure.metrics import METRICS
from ..measure.results import Measured, Result
from ..measure.verdicts import Stored, verdict
from ..progress import plain
from ..provenance import known_place
from ..version import __version__

QUESTIONS = {
    "evaluation": ("Fidelity", "how well they reconstruct held-out rows, and what they cost the model"),
    "comparison": ("Stability", "whether another random seed finds the same latents"),
    "orphans": ("Latents that only one SAE has", ""),
    "size_curve": ("Sizes", "how many of the latents are needed"),
    "progressive": ("Ways to fewer latents", ""),
    "classification": ("Classification", "whether the latents classify as well as hidden states and words do"),
    "classification_summary": ("Classification over data sets", ""),
    "transfer": ("Transfer", "whether classifiers on the latents carry over to other data"),
    "actions": ("Answers of the model", ""),
}  # fmt: skip
"""Kind of result -> heading, and what remains open without it (empty: it is told with another)."""

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def card(repository: str, saes: Mapping[str, Mapping[str, Any]], results: Mapping[str, Result]) -> str:
    """Return the text of ``README.md``.

    Parameters
    ----------
    repository
        ``owner/name``, with ``@branch`` where it is not the main one.
    saes
        Folder in the repository (empty for its root) -> description, as `describe` returns it.
    results
        File in the repository -> what it holds.
    """
    title = repository.partition("@")[0].split("/")[-1]
    parts = [_header(saes), f"# {title}", _summary(saes), "## Use", _snippet(repository, saes), "## What is here"]
    parts.append(_facts(saes))
    for file, result in sorted(results.items(), key=lambda each: [*QUESTIONS].index(each[1].KIND)):
        parts += _measured(file, result)
    parts += ["## Not measured", _open_questions(saes, results)]
    parts.append(f"*Written by saekit {__version__} from the files of this repository.*")
    return "\n\n".join(parts) + "\n"


def hub_model(known: Mapping[str, Any]) -> str | None:
    """Return the model that SAEs belong to, where its name is one of the hub's and it was not read from a folder."""
    name = known.get("model")
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not known.get("model_path") else None


def _header(saes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the metadata that the hub reads."""
    import yaml

    known = [facts["provenance"] for facts in saes.values()]
    models = sorted({name for each in known if (name := hub_model(each)) is not None})
    data = sorted({str(each["data"]) for each in known if _HUB_NAME.fullmatch(str(each.get("data")))})
    rules = sorted({str(facts["rule"]["name"]) for facts in saes.values()})
    header: dict[str, Any] = {
        "library_name": "saekit",
        "tags": ["saekit", "sparse-autoencoder", "interpretability", *rules],
    }
    if models:
        header["base_model"] = models if len(models) > 1 else models[0]
    if data:
        header["datasets"] = data
    return f"---\n{yaml.safe_dump(header, sort_keys=False).rstrip()}\n---"


def _summary(saes: Mapping[str, Mapping[str, Any]]) -> str:
    facts = next(iter(saes.values()))
    many = f"{len(saes)} sparse autoencoders" if len(saes) > 1 else "A sparse autoencoder"
    return f"{many} for {_place(facts['provenance'])}, to be read with saekit."


def _place(known: Mapping[str, Any]) -> str:
    """Return model and hook in words."""
    hook, model = known_place(known), known.get("model")
    of = f"`{_code(model)}`" if model else "a model that its file does not name"
    return (
        f"rows of {of} at `{_code(hook)}`" if hook else f"rows of {of}" if model else "rows that its file does not name"
    )


def _snippet(repository: str, saes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return code that runs: the rows come from the model where it can be had, or else are random ones."""
    name, _, branch = repository.partition("@")
    inside, facts = next(iter(saes.items()))
    address = f"hf:{name}{f'/{inside}' if inside else ''}{f'@{branch}' if branch else ''}"
    known = facts["provenance"]
    hook = known_place(known)
    model = "builtin" if known.get("model") == "builtin" else hub_model(known)
    lines = ["```python", "import saekit as sk", "", f"sae = sk.SAE.load({_quoted(address)})"]
    if model is not None and hook is not None:
        lines += [
            f'rows = sk.capture({_quoted(model)}, ["A few words of text."], hook={_quoted(hook)})',
            "x = next(rows.batches(1024)).x",
        ]
    else:
        lines += ["import torch", f"x = torch.randn(4, {facts['d_in']})    # put activations of the model here"]
    return "\n".join([*lines, "codes = sae.encode(x)    # sparse; codes.to_scipy() is a CSR matrix", "```"])


def _facts(saes: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["SAE", "latents", "width", "rule", "place", "data", "rows seen", "seed", "digest"]
    return _table([head, *(_facts_of(inside or "(here)", facts) for inside, facts in saes.items())])


def _facts_of(name: str, facts: Mapping[str, Any]) -> list[str]:
    rule, known = facts["rule"], facts["provenance"]
    settings = ", ".join(f"{key}={value}" for key, value in rule.items() if key != "name")
    width = f"{facts['d_in']}" if facts["d_in"] == facts["d_out"] else f"{facts['d_in']} → {facts['d_out']}"
    place = " ".join(str(each) for each in (known.get("model"), known_place(known)) if each)
    rest = [str(known.get(key, "–")) for key in ("data", "rows_seen", "seed")]
    digest = f"{facts['content'][:19]}…"
    return [name, f"{facts['n_latents']:,}", width, f"{rule['name']}({settings})", place, *rest, digest]


def _measured(file: str, result: Result) -> Iterator[str]:
    """Yield the parts about one result: its table, what it says under it, differences to baselines."""
    yield f"## {QUESTIONS.get(result.KIND, (result.KIND, ''))[0]}"
    yield f"From `{_code(file)}`, made by saekit {_text(result.saekit)}."
    yield _table(result.table())
    yield from (_text(line) for line in result.caption().splitlines())
    if isinstance(result, Evaluation):
        yield from _differences(result)
    if result.warnings:
        yield "\n".join(f"- **{_text(str(each))}**" for each in result.warnings)


def _differences(result: Evaluation) -> Iterator[str]:
    """Yield what an evaluation says against its baselines, with verdicts."""
    lines = [["SAE − baseline", "FVU (lower is better)", "verdict"]]
    for entry in result.entries:
        for name, control in entry.controls.items():
            if "fvu" in control.differences:
                gap = control.differences["fvu"]
                word = control.verdicts.get("fvu") or _word(gap)
                lines.append([f"{entry.name} − {name}", f"{gap:+.3f}" if gap.is_defined else "–", word])
    if len(lines) > 1:
        yield _table(lines)


def _word(gap: Measured) -> str:
    """Return the verdict of a difference of FVU, of which less is better, in a result of schema 2 or before."""
    return verdict(Stored(gap).oriented(-1).difference, METRICS["fvu"].margin)


def _open_questions(saes: Mapping[str, Mapping[str, Any]], results: Mapping[str, Result]) -> str:
    kinds = _answered(saes, results)
    lines = [f"- {name}: {what}." for kind, (name, what) in QUESTIONS.items() if what and kind not in kinds]
    evaluations = {file: each for file, each in results.items() if isinstance(each, Evaluation)}
    lines += [line for file, each in evaluations.items() for line in _open_in(file, each)]
    return "\n".join([*lines, "- What single latents mean."])


_ANSWERS_TOO = {"progressive": "size_curve", "classification_summary": "classification"}


def _answered(saes: Mapping[str, Mapping[str, Any]], results: Mapping[str, Result]) -> set[str]:
    """Return the kinds of results whose question is answered, by one of them or by what the SAEs themselves hold."""
    kinds = {result.KIND for result in results.values()}
    kinds |= {_ANSWERS_TOO.get(kind, kind) for kind in kinds}
    kinds |= {"size_curve" for facts in saes.values() if facts.get("sizes")}
    return kinds


def _open_in(file: str, result: Evaluation) -> Iterator[str]:
    if result.language_model is None:
        yield f"- What the SAEs cost the language model: `{_code(file)}` holds no cross-entropies."
    if any(entry.on_training_rows for entry in result.entries):
        yield f"- Held-out rows: those of `{_code(file)}` were part of the training."
    if not any(entry.controls for entry in result.entries):
        yield f"- Baselines: `{_code(file)}` compares with none."


# ---------------------------------------------------------------------------------------------------------- markdown


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = [[_text(cell) or " " for cell in line] for line in lines]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *rest])


def _text(text: str) -> str:
    """Return text that is no markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", plain(text).strip()).replace("&", "&amp;")


def _quoted(text: str) -> str:
    """Return a text as Python writes it, on one line and within the block of code."""
    return json.dumps(text).replace("`", "\\u0060")


def _code(text: object) -> str:
    """Return what can stand between backticks, also in a table."""
    return plain(str(text)).replace("`", "'").replace("|", "/")
