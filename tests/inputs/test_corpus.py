"""The documentation corpus: deterministic, split by module, read without importing anything."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from saekit.errors import ConfigError, DataError
from saekit.inputs import corpus

PACKAGE = {
    "__init__.py": '"""A package that exists only in this test, for one purpose: to be read."""\n',
    "shapes.py": '''
        """Shapes in the plane, their areas and their perimeters."""

        if True:
            class Square:
                """A square with its sides parallel to the axes.

                Parameters
                ----------
                side : float
                    Length of one side.

                Notes
                -----
                All four sides are equal, or at least those of them that face each other are.

                Their angles are right, and so are the angles that they make with the axes.
                """

                def area(self):
                    """Compute the area of the square, which is its side squared.

                    Returns:
                        float: the area, in square units
                    """

                def short(self):
                    """Too short."""

        raise RuntimeError("imported, though it must only be read")
    ''',
    "copies.py": '''
        """Shapes  in the plane,
        their areas and their perimeters."""

        class Rectangle:
            """A rectangle, which has two sides.

            Parameters
            ----------
            side : float
                Length of one side.

            Notes
            -----
            All four sides are equal, or at least those of them that face each other are.

            Their angles are right, and so are the angles that they make with the axes.
            """
    ''',
    "newdocs.py": '''
        add_newdoc("fake", "ndarray", ("T", """View of the transposed array, whatever its number of axes."""))
        add_docstr(fake.total, r"""
        total(input) -> Number

        Sum of all numbers in the input, in the order in which they stand.

        {placeholder}
        """.format(**common))
    ''',
    "broken.py": '"""This file does not parse, so it has no documentation at all."""\ndef (:\n',
    "generated.py": """
        # This file was automatically generated from shapes.py
        '''A copy of other documentation, made by a tool that nobody watched.'''
    """,
    "tests/shapes.py": '"""Documentation of a test, which nobody wants to read here."""\n',
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of one small package, `fake`, with a cache of its own."""
    import textwrap

    root = tmp_path / "fake"
    for name, text in PACKAGE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    monkeypatch.setattr(corpus, "LIBRARIES", ("python", "fake"))
    monkeypatch.setattr(corpus, "_root", {"fake": root, "python": tmp_path / "nothing"}.get)
    monkeypatch.setenv("SAEKIT_CACHE", str(tmp_path / "cache"))
    return root


@pytest.fixture(scope="module")
def documents() -> list[corpus.Document]:
    """The real corpus; some 15 seconds unless it is in the cache."""
    return corpus.docs()


@pytest.fixture(scope="module")
def paragraphs() -> list[corpus.Paragraph]:
    return corpus.paragraphs()


def test_docs_reads_docstrings_with_their_names(package):
    texts = {document.id: document.text for document in corpus.docs()}
    assert list(texts) == [
        "fake:",
        "fake.copies:",
        "fake.copies:Rectangle",
        "fake.newdocs:fake.ndarray.T",
        "fake.newdocs:fake.total",
        "fake.shapes:Square.area",
    ]
    assert texts["fake.shapes:Square.area"].endswith("\n\nReturns:\n    float: the area, in square units")
    assert texts["fake.newdocs:fake.total"].endswith("in which they stand.")


def test_docs_leaves_out_repeats_tests_generated_and_broken_files(package):
    read = {document.id for document in corpus.docs()}
    assert "fake.shapes:" not in read  # equal to fake.copies up to white space
    assert "fake.shapes:Square" not in read  # most of its lines stand in fake.copies:Rectangle
    assert not any("tests" in name or "generated" in name or "broken" in name for name in read)


def test_docs_numbers_what_has_one_name(package):
    (package / "twice.py").write_text(
        'if a:\n    def f():\n        """The first of two functions with one name, under if."""\n'
        'else:\n    def f():\n        """And this is the second of them, which stands under else."""\n'
    )
    names = [document.id for document in corpus.docs() if document.module == "fake.twice"]
    assert names == ["fake.twice:f", "fake.twice:f#2"]


def test_docs_without_any_library_is_an_error(package, monkeypatch):
    monkeypatch.setattr(corpus, "_root", lambda library: None)
    with pytest.raises(DataError, match="must find the docstrings of at least one library; found none"):
        corpus.docs()


@pytest.mark.parametrize("read", [corpus.docs, corpus.paragraphs])
def test_unknown_split_is_an_error(read):
    with pytest.raises(ConfigError, match="`split` must be all, train or heldout; got 'test'"):
        read(split="test")
    with pytest.raises(ConfigError, match="Did you mean `heldout`"):
        read(split="held_out")


def test_cache_is_read_and_a_broken_one_is_made_again(package, tmp_path, monkeypatch):
    first = corpus.docs()
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    monkeypatch.setattr(corpus, "_every_docstring", lambda: pytest.fail("the cache was not used"))
    assert corpus.docs() == first
    monkeypatch.undo()

    monkeypatch.setattr(corpus, "LIBRARIES", ("python", "fake"))
    monkeypatch.setattr(corpus, "_root", {"fake": package}.get)
    monkeypatch.setenv("SAEKIT_CACHE", str(tmp_path / "cache"))
    altered = gzip.compress(gzip.decompress(whole).replace(b"squared", b"rounded"))
    for damage in (whole[:-20], b"", b"not gzip", altered, gzip.compress(b"[]\n{}")):
        path.write_bytes(damage)
        assert corpus.docs() == first
        assert path.read_bytes() == whole


def test_cache_that_cannot_be_written_is_no_error(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAEKIT_CACHE", str(tmp_path / "file" / "cache"))
    assert len(corpus.docs()) == 6


def test_split_sections_understands_the_common_styles():
    text = (
        "Fit the model.\n\nMore about it.\n\nParameters\n----------\nx : array\n    The data.\n\nReturns\n-------\n"
        "self\n\nNotes\n-----\nSlow.\n\nVery slow.\n\nReferences\n----------\n.. [1] A book."
    )
    assert corpus.split_sections(text) == [
        ("Summary", "Fit the model."),
        ("Description", "More about it."),
        ("Parameters", "x : array\n    The data."),
        ("Returns", "self"),
        ("Notes", "Slow."),
        ("Notes", "Very slow."),
        ("References", ".. [1] A book."),
    ]
    google = "Add.\n\nArgs:\n    x: a number\n\n    y: another\n\nBack outside.\n\nExample::\n\n    >>> add(1, 2)\n"
    assert corpus.split_sections(google) == [
        ("Summary", "Add."),
        ("Parameters", "x: a number"),
        ("Parameters", "y: another"),
        ("Description", "Back outside."),
        ("Examples", ">>> add(1, 2)"),
    ]
    fields = "Add.\n\n.. note:: Be careful\n    with it.\n\nExample:\n\n>>> add(1)\n\n:param x: a number\n:type x: int"
    assert corpus.split_sections(fields) == [
        ("Summary", "Add."),
        ("Notes", "Be careful\n    with it."),
        ("Examples", ">>> add(1)"),
        ("Parameters", ":param x: a number\n:type x: int"),
    ]


def test_corpus_is_about_as_large_as_promised(documents):
    assert len(documents) > 30_000
    assert 15e6 < sum(len(document.text.encode("utf-8", "surrogatepass")) for document in documents) < 40e6
    assert {document.library for document in documents} == set(corpus.LIBRARIES) == set(corpus.library_versions())


def test_corpus_is_deterministic(documents):
    assert corpus.docs() == documents
    modules = [module for library in corpus.LIBRARIES for module, _ in corpus._modules(library)]
    place = {module: number for number, module in enumerate(modules)}
    places = [place[document.module] for document in documents]
    assert places == sorted(places)
    assert corpus.corpus_digest(documents) == corpus.corpus_digest(list(documents))
    assert corpus.corpus_digest(documents) != corpus.corpus_digest(documents[::-1])


def test_ids_and_texts_are_unique(documents):
    assert len({document.id for document in documents}) == len(documents)
    assert len({" ".join(document.text.split()) for document in documents}) == len(documents)
    assert all(document.id.startswith(document.module + ":") for document in documents)


def test_split_is_by_module_and_independent_of_order(documents):
    train, heldout = corpus.docs(split="train"), corpus.docs(split="heldout")
    assert {document.module for document in train}.isdisjoint(document.module for document in heldout)
    assert sorted(map(str, train + heldout)) == sorted(map(str, documents))
    modules = sorted({document.module for document in documents})
    share = len({document.module for document in heldout}) / len(modules)
    assert 0.03 < share < 0.05
    shuffled = random.Random(0).sample(modules, len(modules))
    assert {module for module in shuffled if corpus.is_held_out(module)} == {document.module for document in heldout}


def test_held_out_modules_are_the_same_on_every_machine():
    names = ("random", "numpy.lib._function_base_impl", "torch.fx.node", "transformers.optimization")
    assert all(corpus.is_held_out(name) for name in names)  # no hash that differs between processes
    assert not any(corpus.is_held_out(name) for name in ("json.decoder", "os", "zipfile"))


def test_paragraphs_stand_in_their_documents(documents, paragraphs):
    texts = {document.id: document for document in documents}
    for paragraph in paragraphs:
        document = texts[paragraph.id.rpartition("/")[0]]
        assert paragraph.text in document.text
        assert (paragraph.module, paragraph.library) == (document.module, document.library)
    assert {paragraph.section for paragraph in paragraphs} == set(corpus.SECTIONS)
    assert len({paragraph.id for paragraph in paragraphs}) == len(paragraphs)
    assert len({" ".join(paragraph.text.split()) for paragraph in paragraphs}) == len(paragraphs)


def test_paragraphs_split_as_the_documents_do(paragraphs):
    heldout = corpus.paragraphs(split="heldout")
    assert heldout == [paragraph for paragraph in paragraphs if corpus.is_held_out(paragraph.module)]


def test_reading_imports_no_package():
    code = (
        "import sys, saekit.inputs.corpus as corpus\n"
        "before = set(sys.modules)\n"
        "modules = [row for library in corpus.LIBRARIES for row in corpus._modules(library)]\n"
        "for library in corpus.LIBRARIES:\n"
        "    for module, path in corpus._modules(library)[:20]:\n"
        "        list(corpus._docstrings(library, module, path.read_bytes()))\n"
        "corpus.docs()\n"
        "print(len(modules), *sorted({name.partition('.')[0] for name in set(sys.modules) - before}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(corpus.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    count, *loaded = done.stdout.split()
    assert int(count) > 4000
    assert not {"numpy", "scipy", "sklearn", "torch", "transformers", "this", "antigravity"} & set(loaded)
