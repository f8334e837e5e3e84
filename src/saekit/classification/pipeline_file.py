"""A scikit-learn pipeline as bytes: without pickle, of known types only, and the same bytes for the same pipeline."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files import digest_bytes, parse_json, read_bytes

SCHEMA_FILE = "schema.json"

TRUSTED = (
    "saekit.estimators.binarize.Binarize",
    "saekit.estimators.select.SelectLatents",
    "saekit.classification.sklearn_steps.DensityMatched",
)
"""Types of saekit's own that a stored pipeline may hold, besides those of scikit-learn and numpy that skops knows."""

MOVED = {
    ("saekit.estimators", "Binarize"): "saekit.estimators.binarize",
    ("saekit.estimators", "SelectLatents"): "saekit.estimators.select",
    ("saekit.study.steps", "DensityMatched"): "saekit.classification.sklearn_steps",
}
"""Modules of these types in classifiers that saekit 0.1 saved, and where they are now."""


MAX_PIPELINE = 2**28
"""Size of a stored pipeline after decompression; a small file can claim any. Unit: bytes."""


def dump_pipeline(pipeline: Any) -> bytes:
    """Return a pipeline as skops writes it, with numbers in place of memory addresses and no times."""
    from skops.io import dumps

    return _rewritten(dumps(pipeline), _number_objects)


def load_pipeline(path: Path, digest: str) -> Any:
    """Return the pipeline in a file; no code is run from it.

    Raises
    ------
    FormatError
        It has another digest, is damaged, or holds types that saekit does not write.
    """
    from skops.io import get_untrusted_types, loads

    data = read_bytes(path) if path.is_file() else b""
    if digest_bytes(data) != digest:
        raise FormatError(f"`{path}` must have the digest that its description says; it was altered.")
    try:
        data = _rewritten(data, _rename_modules)
        strange = sorted(set(get_untrusted_types(data=data)) - set(TRUSTED))
        if not strange:
            return loads(data, trusted=list(TRUSTED))
    except Exception as error:  # the library raises whatever a damaged file leads it to
        raise FormatError(f"`{path}` must be a stored pipeline; it cannot be read: {error!r:.200}.") from error
    raise FormatError(f"`{path}` must hold types of scikit-learn and saekit only; it holds {strange}.")


def _rewritten(data: bytes, change: Callable[[Any], dict[str, str]]) -> bytes:
    """Return the archive with a changed schema; `change` alters it and returns the new names of files."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        if sum(each.file_size for each in old.infolist()) > MAX_PIPELINE:
            raise FormatError(f"it holds more than {MAX_PIPELINE:,} bytes")
        if SCHEMA_FILE not in old.namelist():
            return data
        schema = parse_json(old.read(SCHEMA_FILE), SCHEMA_FILE)
        names = change(schema)
        written = io.BytesIO()
        with zipfile.ZipFile(written, "w") as new:
            for name in old.namelist():
                content = json.dumps(schema) if name == SCHEMA_FILE else old.read(name)
                new.writestr(zipfile.ZipInfo(names.get(name, name)), content)  # of 1980, whenever it is
    return written.getvalue()


def _number_objects(schema: Any) -> dict[str, str]:
    """Give the objects of a schema numbers in their order, and their files names to match."""
    numbers: dict[int, int] = {}
    names: dict[str, str] = {}
    for node in _nodes(schema):
        if "__id__" in node:
            node["__id__"] = numbers.setdefault(node["__id__"], len(numbers))
        if isinstance(node.get("file"), str):
            node["file"] = names.setdefault(node["file"], f"{len(names)}{Path(node['file']).suffix}")
    return names


def _rename_modules(schema: Any) -> dict[str, str]:
    """Put the present modules of the types of `MOVED` into a schema."""
    for node in _nodes(schema):
        now = MOVED.get((str(node.get("__module__")), str(node.get("__class__"))))
        if now is not None:
            node["__module__"] = now
    return {}


def _nodes(schema: Any) -> list[dict[str, Any]]:
    """Return every object of a tree, in its order."""
    found, waiting = [], [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            found.append(node)
        parts = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        waiting += reversed(list(parts))
    return found
