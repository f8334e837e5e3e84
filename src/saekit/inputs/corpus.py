"""The built-in corpus: the documentation that every installation of saekit already has.

The docstrings of the standard library, numpy, scipy, scikit-learn, torch and transformers, about 20 MB of
technical English and code, with nothing to download and nothing to license. The files are found without
importing the packages and read with `ast`; a package that is not installed is left out. Texts are
de-duplicated, their order is fixed, and whole modules are held out by a hash of the module's name.

Two functions return it: `docs` (documents, to capture rows from) and `paragraphs` (text with
two labels, numpydoc section and library, to classify).
"""

from __future__ import annotations

import ast
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, InputError, did_you_mean
from ..files import cache_folder, write_bytes

LIBRARIES = ("python", "numpy", "scipy", "sklearn", "torch", "transformers")
"""Names of the libraries read, in the order of the corpus; ``python`` is the standard library."""

HELD_OUT_FRACTION = 0.04
"""Share of module names that are held out."""

SECTIONS = (
    "Summary",
    "Description",
    "Parameters",
    "Attributes",
    "Methods",
    "Returns",
    "Yields",
    "Raises",
    "Warnings",
    "See Also",
    "Notes",
    "References",
    "Examples",
)
"""Labels of a paragraph; ``Summary`` is the first one, ``Description`` what follows it before any heading."""

Split = Literal["all", "train", "heldout"]

_SPLITS = ("all", "train", "heldout")
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_FORMAT = 2  # of the cache; raise it whenever the rules of this file change what is read
_MIN_CHARACTERS = 40
_MIN_PARAGRAPH_CHARACTERS = 20
_SEEN_BEFORE = 0.8  # a text of which this fraction of characters lies in lines seen earlier adds nothing
_SKIPPED_FOLDERS = frozenset(
    # lib2to3 is a deprecated copy of an old grammar that Python 3.13 no longer has.
    ("__pycache__", "_vendor", "dist-packages", "idle_test", "lib2to3", "site-packages", "test", "testing", "tests")
)
_GENERATED = b"This file was automatically generated from"
_DOC_CALLS = frozenset(("add_docstr", "add_docstr_all", "add_newdoc", "add_newdoc_for_scalar_type", "_add_docstr"))
_WORD = re.compile(r"[A-Za-z]{3}")
_PLACEHOLDER_LINE = re.compile(r"^[ \t]*\{\w+\}[ \t]*\n?", re.MULTILINE)
_HEADINGS = {
    heading: section
    for section, headings in {
        "Parameters": "parameters,other parameters,args,arguments,keyword args,keyword arguments",
        "Attributes": "attributes",
        "Methods": "methods",
        "Returns": "returns,return",
        "Yields": "yields,yield",
        "Raises": "raises,raise",
        "Warnings": "warnings,warning,warns",
        "See Also": "see also",
        "Notes": "notes,note",
        "References": "references,reference",
        "Examples": "examples,example,example usage,usage",
    }.items()
    for heading in headings.split(",")
}
_DIRECTIVE = re.compile(r"\.\. (?:rubric:: )?([\w ]+?)(?:::|$)\s*(.*)")
_UNDERLINE = re.compile(r"\s*([-=~^])\1{2,}\s*")


@dataclass(frozen=True, slots=True)
class Document:
    """One docstring."""

    id: str
    """``module:qualified name``, unique in the corpus; the module's own docstring ends with the colon."""
    module: str
    """Dotted name of the module."""
    library: str
    """One of `LIBRARIES`."""
    text: str
    """The docstring, its indentation removed."""


@dataclass(frozen=True, slots=True)
class Paragraph:
    """One paragraph of a docstring with its two labels."""

    id: str
    """The document's id, ``/`` and the paragraph's number in it, from 0."""
    module: str
    """Dotted name of the module: the group by which to split."""
    library: str
    """Label: one of `LIBRARIES`."""
    section: str
    """Label: one of `SECTIONS`."""
    text: str
    """A part of the document's text, without its heading."""


def docs(*, split: Split = "all") -> list[Document]:
    """Read the documentation corpus.

    The first call parses the installed packages for some 15 seconds and keeps the result in the cache folder
    (``~/.cache/saekit``, or what the environment variable ``SAEKIT_CACHE`` names) under a key made of the
    libraries' versions; later calls read that, in less than one.

    Parameters
    ----------
    split
        ``"all"``; ``"train"`` or ``"heldout"``: about 4% of the modules, chosen by `is_held_out`.

    Returns
    -------
    list of Document
        In a fixed order: by library, module, then place in the file.

    Raises
    ------
    ConfigError
        `split` is none of the three.
    DataError
        No documentation was found.
    """
    _check_split(split)
    return [document for document in _all_documents() if _belongs(document.module, split)]


def paragraphs(*, split: Split = "all") -> list[Paragraph]:
    """Read the corpus as labelled paragraphs: which section of the docstring, and which library.

    Split train from test by `Paragraph.module`, so that what one author wrote twice does not stand on both
    sides. A paragraph that occurs again, in whatever module, is left out.

    Parameters
    ----------
    split
        As for `docs`.

    Returns
    -------
    list of Paragraph
        In the order of the documents.

    Raises
    ------
    ConfigError, DataError
        As for `docs`.
    """
    _check_split(split)
    found: list[Paragraph] = []
    seen: set[str] = set()
    for document in _all_documents():
        kept = 0
        for section, text in split_sections(document.text):
            words = " ".join(text.split())
            if len(words) < _MIN_PARAGRAPH_CHARACTERS or words in seen or not _WORD.search(words):
                continue
            seen.add(words)
            found.append(Paragraph(f"{document.id}/{kept}", document.module, document.library, section, text))
            kept += 1
    return [paragraph for paragraph in found if _belongs(paragraph.module, split)]


def is_held_out(module: str) -> bool:
    """Whether the documents of the module of this dotted name are held out: a hash of the name alone decides.

    >>> is_held_out("json.decoder"), is_held_out("json.decoder")
    (False, False)
    """
    return _hash(module) < HELD_OUT_FRACTION * 2**64


def corpus_digest(documents: Iterable[Document]) -> str:
    """SHA-256 over ids and texts in their order, as ``"sha256:<hex>"``; corpora of one digest are equal."""
    total = hashlib.sha256()
    for document in documents:
        for part in (document.id, document.text):
            data = part.encode("utf-8", "surrogatepass")
            total.update(len(data).to_bytes(8, "big"))
            total.update(data)
    return "sha256:" + total.hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries of the corpus, by their names in `LIBRARIES`."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES[1:]:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    return versions


def split_sections(text: str) -> list[tuple[str, str]]:
    r"""Cut a docstring into paragraphs, each with the section it stands in.

    Understands numpydoc headings (underlined), Google ones (``Args:``), reStructuredText directives
    (``.. note::``) and field lists (``:param x:``). Headings belong to no paragraph.

    Parameters
    ----------
    text
        A docstring whose indentation has been removed.

    Returns
    -------
    list of (str, str)
        Section, one of `SECTIONS`, and paragraph, a part of `text`.

    >>> split_sections("Add.\n\nReturns\n-------\nint\n    The sum.")
    [('Summary', 'Add.'), ('Returns', 'int\n    The sum.')]
    """
    lines = text.split("\n")
    found: list[tuple[str, str]] = []
    block: list[str] = []
    section, margin = "Summary", 0  # the section lasts as long as lines are indented at least so much

    def close() -> None:
        nonlocal section
        paragraph = "\n".join(block).strip()
        block.clear()
        if paragraph:
            found.append((_field_section(paragraph) or section, paragraph))
            if section == "Summary":
                section = "Description"

    rows = iter(enumerate(lines))
    for number, line in rows:
        bare, indent = line.strip(), _indent(line)
        if not bare:
            close()
            continue
        underlined = number + 1 < len(lines) and bool(_UNDERLINE.fullmatch(lines[number + 1]))
        heading, rest = _heading(bare, underlined)
        if heading or (underlined and indent == 0 and len(bare) < 60):
            close()
            section, margin = heading or "Description", indent
            if underlined:
                next(rows)
            else:
                below = next((_indent(later) for later in lines[number + 1 :] if later.strip()), indent)
                margin = max(indent, min(indent + 1, below))
            if rest:
                block.append(rest)
        else:
            if indent < margin:
                close()
                section, margin = "Description", 0
            block.append(line)
    close()
    return found


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _heading(bare: str, underlined: bool) -> tuple[str | None, str]:
    """Return the section that a line opens, if it is a heading, and what of the line is text of that section."""
    if underlined:
        return _HEADINGS.get(bare.lower().rstrip(":")), ""
    if bare.startswith(".. "):
        match = _DIRECTIVE.match(bare)
        return (_HEADINGS.get(match[1].lower()), match[2]) if match else (None, "")
    if bare.endswith(":"):
        return _HEADINGS.get(bare.rstrip(":").lower().strip("*_ ")), ""
    return None, ""


def _field_section(paragraph: str) -> str | None:
    """Return the section of a reStructuredText field list."""
    if not paragraph.startswith(":"):
        return None
    for start, section in (
        (":param", "Parameters"),
        (":arg", "Parameters"),
        (":key", "Parameters"),
        (":return", "Returns"),
        (":rtype", "Returns"),
        (":raise", "Raises"),
        (":yield", "Yields"),
    ):
        if paragraph.startswith(start):
            return section
    return None


def _hash(text: str) -> int:
    """64 bits that are the same in every process and on every machine."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _check_split(split: str) -> None:
    if split not in _SPLITS:
        raise ConfigError(f"`split` must be all, train or heldout; got {split!r}. {did_you_mean(split, _SPLITS)}")


def _belongs(module: str, split: Split) -> bool:
    return split == "all" or is_held_out(module) == (split == "heldout")


def _all_documents() -> Sequence[Document]:
    """Return the whole corpus, from the cache when it is whole, else from the packages."""
    versions = library_versions()
    key = hashlib.sha256(json.dumps([_FORMAT, sys.prefix, versions]).encode()).hexdigest()[:16]
    path = cache_folder() / f"docs-{key}.jsonl.gz"
    documents = _load(path)
    if documents is None:
        documents = list(_without_repeats(_every_docstring()))
        if not documents:
            raise InputError(
                "the documentation corpus must find the docstrings of at least one library; found none, not "
                f"even Python's in `{sysconfig.get_path('stdlib')}`. Install Python with its `.py` files, or "
                "give your own text as data."
            )
        with suppress(OSError):  # a read-only home or a full disk: the packages are read again next time
            _store(path, documents)
    return documents


def _store(path: Path, documents: Sequence[Document]) -> None:
    head = {"format": _FORMAT, "documents": len(documents), "digest": corpus_digest(documents)}
    lines = [json.dumps(head), *(json.dumps(asdict(document)) for document in documents)]
    write_bytes(path, gzip.compress("\n".join(lines).encode(), compresslevel=4, mtime=0))


def _load(path: Path) -> Sequence[Document] | None:
    """Return the documents of a cache file; None if there is none or anything about it is wrong."""
    try:
        state = path.stat()
    except OSError:
        return None
    return _loaded(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1)
def _loaded(path: Path, *_state: int) -> Sequence[Document] | None:
    """Read a cache file, once while it stays as it is."""
    try:
        head, *rows = gzip.decompress(path.read_bytes()).split(b"\n")
        wanted = json.loads(head)
        documents = tuple(Document(**json.loads(row)) for row in rows)
        if wanted == {"format": _FORMAT, "documents": len(documents), "digest": corpus_digest(documents)}:
            return documents
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zlib.error):
        pass
    return None


def _without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop texts that are equal up to white space, and those made almost only of lines of earlier ones."""
    ids: Counter[str] = Counter()
    texts: set[str] = set()
    lines_seen: set[int] = set()
    for document in documents:
        words = " ".join(document.text.split())
        if words in texts:
            continue
        texts.add(words)
        lines = [line.strip() for line in document.text.split("\n")]
        keys = [_hash(line) for line in lines]
        seen = sum(len(line) for line, key in zip(lines, keys, strict=True) if key in lines_seen)
        if seen > _SEEN_BEFORE * sum(map(len, lines)):
            continue
        lines_seen.update(keys)
        ids[document.id] += 1
        number = ids[document.id]  # a property and its setter, a function defined under `if` and under `else`
        yield (
            document
            if number == 1
            else Document(f"{document.id}#{number}", document.module, document.library, document.text)
        )


def _every_docstring() -> Iterator[Document]:
    for library in LIBRARIES:
        for module, path in _modules(library):
            with suppress(OSError):
                data = path.read_bytes()
                if b'"""' in data or b"'''" in data:
                    yield from _docstrings(library, module, data)


def _root(library: str) -> Path | None:
    """Return the folder of a library; None if it is not installed. Only the path is looked up."""
    if library == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(library)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def _modules(library: str) -> list[tuple[str, Path]]:
    """Dotted names and files of a library's modules, sorted by name; nothing is imported to find them."""
    root = _root(library)
    if root is None:
        return []
    prefix = () if library == "python" else (library,)
    found = {}
    for folder, folders, files in os.walk(root):
        inside = (*prefix, *Path(folder).relative_to(root).parts)
        folders[:] = [name for name in folders if name.isidentifier() and name not in _SKIPPED_FOLDERS]
        for name in filter(_is_module, files):
            stem = name.removesuffix(".py")
            found[".".join(inside if stem == "__init__" else (*inside, stem))] = Path(folder, name)
    return sorted(found.items())


def _is_module(name: str) -> bool:
    stem = name.removesuffix(".py")
    return name != stem and stem.isidentifier() and not stem.startswith("test_")


def _docstrings(library: str, module: str, data: bytes) -> Iterator[Document]:
    """Return the docstrings of one file, in the order of the file; a file that does not parse has none."""
    if _GENERATED in data[:1000]:
        return  # a copy of another module of the same package
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    top = ast.get_docstring(tree, clean=False)
    for name, text in [("", top or ""), *_texts(tree.body, "")]:
        text = inspect.cleandoc(text)
        if len(text) >= _MIN_CHARACTERS and "\0" not in text:
            yield Document(f"{module}:{name}", module, library, text)


def _texts(body: Iterable[ast.stmt], inside: str) -> Iterator[tuple[str, str]]:
    """Qualified names and raw docstrings of what is defined here, by ``add_newdoc(...)`` and its like too."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = inside + node.name
            text = ast.get_docstring(node, clean=False)
            if text:
                yield name, text
            yield from _texts(node.body, name + ".")
        elif isinstance(node, (ast.Expr, ast.Assign)):
            if isinstance(node.value, ast.Call):
                yield from _documenting_call(node.value)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _texts(node.body, inside)
            if isinstance(node, ast.Try):
                for handler in node.handlers:
                    yield from _texts(handler.body, inside)
            if not isinstance(node, ast.With):
                yield from _texts(node.orelse, inside)


def _documenting_call(call: ast.Call) -> Iterator[tuple[str, str]]:
    """Name and text of ``add_docstr(torch.abs, "...")``, ``add_newdoc("numpy", "ndarray", ("T", "..."))``."""
    function = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if function not in _DOC_CALLS or len(call.args) < 2:
        return
    *owners, last = call.args
    if isinstance(last, (ast.Tuple, ast.List)) and len(last.elts) == 2:
        owners, last = [*owners, last.elts[0]], last.elts[1]
    names = [str(owner.value) if isinstance(owner, ast.Constant) else ast.unparse(owner) for owner in owners]
    yield ".".join(names), _PLACEHOLDER_LINE.sub("", _constant_text(last))


def _constant_text(node: ast.AST) -> str:
    """Return the strings in an expression, joined."""
    constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
    return "".join(value for value in constants if isinstance(value, str))
