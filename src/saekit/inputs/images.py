"""Images from wherever they lie: a folder, an array, an IDX file, a data set; each opened when it is asked for."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from torch import Tensor

from ..errors import FormatError, InputError, listed
from ..files import digest_bytes, open_file
from ..randomness import random_order
from ..settings import brief, check_whole
from .hub_datasets import HubName, choose_split, is_saved, one_split, open_hub, open_saved
from .readers import ENDINGS as TEXT_ENDINGS
from .readers import SPLITS, files_of_split, find_local, open_bytes
from .records import one_column, open_values, records_of
from .tables import Table, first_line, no_column, shortened

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # no other decoder sees what comes from outside
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
"""What image files in a folder end in."""


@dataclass(frozen=True, eq=False)
class Images(Table, Sequence["Image"]):
    """Images in a fixed order, with the other columns of their table; an image is opened when it is asked for.

    Examples
    --------
    >>> images = read_images(np.zeros((3, 8, 8), np.uint8))
    >>> len(images), images[0].size, images.ids
    (3, (8, 8), ('0', '1', '2'))
    """

    __repr__ = brief

    ids: tuple[str, ...] = field(repr=False)
    """One name per image: its path in the folder, or its number."""
    columns: dict[str, tuple[Any, ...]] = field(repr=False)
    """The other columns, one entry per image; ``label`` where the source has labels."""
    info: dict[str, Any]
    """Where they come from (plain JSON): kind, name, n_images, complete, digest."""
    _open: Callable[[int], Image] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> Image: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...
    def __getitem__(self, index: int | slice) -> Image | Images:
        """Return one image (``PIL.Image.Image``), or some of them as `Images`."""
        if isinstance(index, slice):
            return self.pick(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._open(range(len(self))[index])

    def pick(self, index: Sequence[int] | np.ndarray) -> Images:
        """Return the images at `index`, in that order."""
        chosen = [int(i) for i in index]
        ids = tuple(self.ids[i] for i in chosen)
        digest = digest_bytes(f"{self.digest} {chosen}".encode())
        return Images(
            ids,
            {name: tuple(values[i] for i in chosen) for name, values in self.columns.items()},
            {**self.info, "n_images": len(ids), "digest": digest},
            lambda i: self._open(chosen[i]),
        )

    def with_columns(self, **columns: Sequence[Any]) -> Images:
        """Return the same images with further columns, or others of the same name: ``with_columns(label=labels)``.

        Raises
        ------
        DataError
            A column has another length.
        """
        for name, values in columns.items():
            if len(values) != len(self):
                raise InputError(f"column `{name}` must have an entry per image, {len(self)}; got {len(values)}.")
        # numbers of numpy are no plain values
        plain = {
            name: tuple(each.item() if isinstance(each, np.generic) else each for each in values)
            for name, values in columns.items()
        }
        return Images(self.ids, {**self.columns, **plain}, self.info, self._open)


ImageData = str | os.PathLike[str] | Images | np.ndarray | Tensor | Iterable[Any]
"""What `read_images` takes."""


def are_images(data: Any) -> bool | None:
    """Return whether data are images rather than texts; None where their name does not tell.

    >>> are_images(np.zeros((3, 8, 8))), are_images(["a text"]), are_images("owner/name")
    (True, False, None)
    """
    if isinstance(data, Images | Tensor) or (isinstance(data, np.ndarray) and data.dtype.kind in "fiub"):
        return True
    if isinstance(data, str | os.PathLike):
        return _are_named_images(os.fspath(data).partition("@")[0].removesuffix(".gz"))
    if isinstance(data, Iterator):  # looking at its first entry would take it away
        return None
    if _is_pair(data):
        return are_images(data[0])
    first = next(records_of(_sequence(data)), None)
    shown = first[:1] if isinstance(first, tuple) else first.values() if isinstance(first, Mapping) else [first]
    return any(map(_is_picture, shown))


def _are_named_images(name: str) -> bool | None:
    path = Path(name)
    if name in ("builtin", "builtin:paragraphs") or path.suffix.lower() in TEXT_ENDINGS:
        return False
    return True if path.suffix in (".npy", ".npz") or "idx3" in path.name else None


def read_images(
    data: ImageData,
    *,
    image: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Images:
    """Read images and their labels.

    Parameters
    ----------
    data
        A folder of image files (the first subfolder is the label); a ``.npy`` or ``.npz`` file of arrays
        ``[n, height, width]`` or ``[n, height, width, 1 | 3]`` (other arrays of n entries in the .npz are columns); an
        IDX file, gzipped or not (``…-images-idx3-ubyte``; labels from ``…-labels-idx1-ubyte`` next to it); a folder
        that ``Dataset.save_to_disk`` wrote; a hub name ``owner/name[:config][@split]``; such an array; or a sequence of
        PIL images or arrays. Arrays hold ``uint8``, or numbers from 0 to 1.
    image
        Column of the images in a data set; None: the one that holds images.
    split
        Split of a data set; None: ``train`` where there is one.
    limit
        Maximum number of images; None: all. They are sampled by a fixed permutation, because files are often sorted by
        class; of a data set on the hub, the first ones are read.

    Returns
    -------
    Images

    Raises
    ------
    DataError
        No such file, no image in it, or arrays that are no images.
    FormatError
        An image or file is damaged.
    OfflineError
        A data set of the hub is wanted and the hub cannot be reached.
    ConfigError
        `limit` is not positive.
    """
    check_whole("read_images", limit=limit)
    images = _read(data, image, split, limit)
    if limit is not None and limit < len(images):
        images = images.pick(np.sort(random_order(len(images), "images")[:limit]))
        images.info["complete"] = False
    return images


def _read(data: object, image: str | None, split: str | None, limit: int | None) -> Images:
    if isinstance(data, Images):
        data.check_split(split)
        return data
    if not isinstance(data, str | os.PathLike):
        return _from_memory(data, image, split)
    name = os.fspath(data)
    path, named = find_local(name)
    if path is not None:
        return _from_local(path, image, one_split(split, named, name))
    hub = HubName.parse(name)
    if hub is None or Path(hub.name).suffix.lower() in (*ENDINGS, ".npy", ".npz") or find_local(hub.name)[0]:
        raise InputError(
            f"`{shortened(name)}` must be a folder of images, a .npy, .npz or IDX file, or a hub data set "
            "`owner/name`; there is no such file or folder. Check the path."
        )
    records, source = open_hub(hub, split)
    found = _from_records(list(islice(records, limit)), source, image)
    found.info["complete"] = limit is None or len(found) < limit
    return found


def _from_local(path: Path, image: str | None, split: str | None) -> Images:
    if path.is_dir() and is_saved(path):
        records, source = open_saved(path, split)
        return _from_records(list(records), source, image)
    _check_no_columns(image, f"`{path.name}`")
    place, split = _place_of_split(path, split)
    found = _from_folder(place) if place.is_dir() else _from_file(place)
    found.info.update({"name": path.resolve().name if path.is_dir() else path.name, "path": str(path.resolve())})
    if split is not None:
        found.info["split"] = split
    return found


def _check_no_columns(image: str | None, what: str) -> None:
    if image is not None:
        raise InputError(f"{what} has no columns; a column of images, `{image}`, is asked for. Leave it out.")


def _place_of_split(path: Path, split: str | None) -> tuple[Path, str | None]:
    """Return the subfolder of a split where a folder consists of such; else the path itself, if its name says so."""
    known = sorted(each.name for each in path.iterdir() if each.is_dir()) if path.is_dir() else []
    if len(known) > 1 and set(known) <= set(SPLITS):
        split = choose_split(known, split, path.name)
        return path / split, split
    return path, files_of_split([path], path, split)[1]


def _from_folder(path: Path) -> Images:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    if not files:
        raise InputError(
            f"`{path}` must hold image files ({listed(ENDINGS, 10)}), in one subfolder per label or without; it holds "
            "none. Check the path."
        )
    parts = [file.relative_to(path).parts for file in files]
    labelled = all(len(part) > 1 for part in parts)
    return _images(
        tuple("/".join(part) for part in parts),
        {"label": tuple(part[0] for part in parts)} if labelled else {},
        {"kind": "folder", "name": path.resolve().name, "digest": _digest_of_files(files, path)},
        lambda i: _open_image(files[i].read_bytes(), str(files[i])),
    )


def _digest_of_files(files: Sequence[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return "sha256:" + digest.hexdigest()


def _open_image(data: bytes, name: str) -> Image:
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            image.load()
            return image
    except Exception as error:  # the decoders of Pillow raise whatever they stumble over
        raise FormatError(
            f"`{name}` must be an image; it cannot be read: {first_line(error)}. Remove it or save it again."
        ) from None


def _from_file(path: Path) -> Images:
    if path.suffix == ".npy":
        return _from_array(_load_numpy(path), {"kind": "array", "name": path.name})
    if path.suffix == ".npz":
        return _from_arrays(_load_numpy(path), path.name)
    if "idx" in path.name:
        return _from_idx(path)
    if path.suffix.lower() in ENDINGS:
        raise InputError(f"images come in folders; `{path.name}` is a single one. Give the folder that holds it.")
    raise InputError(
        f"images come from a folder, a .npy, .npz or IDX file; got `{path.name}`. Read it yourself and pass an array."
    )


def _from_arrays(arrays: Mapping[str, np.ndarray], name: str) -> Images:
    """Return the one array of images, with the other arrays of its length as columns."""
    arrays = {key: values for key, values in arrays.items() if isinstance(values, np.ndarray)}  # else no array: bytes
    found = [key for key, values in arrays.items() if values.ndim >= 3]
    if len(found) != 1:
        raise InputError(
            f"`{name}` must hold one array of images [n, height, width(, channels)]; of its arrays "
            f"{listed(arrays)} there are {len(found)} with three axes or more. Save them in separate files."
        )
    pixels = arrays[found[0]]
    others = {key: values for key, values in arrays.items() if values.shape == (len(pixels),)}
    columns = {_COLUMN.get(key, key): tuple(values.tolist()) for key, values in others.items()}
    return _from_array(pixels, {"kind": "array", "name": name}, columns)


_COLUMN = {"labels": "label", "y": "label", "target": "label", "targets": "label"}


def _load_numpy(path: Path) -> Any:
    try:
        with open_file(path) as stream:
            found = np.load(stream, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            arrays = {name: found[name] for name in found.files}
            if wrong := [name for name, each in arrays.items() if not isinstance(each, np.ndarray)]:
                raise ValueError(f"{listed(wrong)} is no array")
            return arrays
    except Exception as error:  # numpy and zipfile raise classes of many modules
        raise FormatError(
            f"`{path}` must be a file of numpy arrays of numbers; it cannot be read: {first_line(error)}. "
            "Save it again."
        ) from None


def _from_idx(path: Path) -> Images:
    pixels = _read_idx(path)
    columns: dict[str, tuple[Any, ...]] = {}
    beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside != path and beside.is_file():
        labels = _read_idx(beside)
        if labels.shape != (len(pixels),):
            raise InputError(
                f"`{beside.name}` must hold one label per image of `{path.name}`; it holds {labels.shape} for "
                f"{len(pixels)} images. Are they of the same set?"
            )
        columns["label"] = tuple(labels.tolist())
    return _from_array(pixels, {"kind": "idx", "name": path.name}, columns)


def _read_idx(path: Path) -> np.ndarray:
    """Read an IDX array of bytes: two zero bytes, type 8, number of axes, their lengths (big-endian), values."""
    try:
        with open_bytes(path) as stream:
            data = stream.read()
        zero, kind, n_axes = struct.unpack(">HBB", data[:4])
        shape = struct.unpack(f">{n_axes}I", data[4 : 4 + 4 * n_axes])
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * n_axes)
        if zero != 0 or kind != 8 or len(values) != np.prod(shape):
            raise ValueError(f"{len(values)} values of type {kind} for shape {shape}")
    except (struct.error, ValueError, EOFError, zlib.error, OSError) as error:
        raise FormatError(
            f"`{path}` must be an IDX file of bytes; it makes no sense: {first_line(error)}. Fetch it again."
        ) from None
    return values.reshape(shape)


def _from_records(records: list[dict[str, Any]], source: dict[str, Any], image: str | None) -> Images:
    if not records:
        raise InputError(f"`{source['name']}` must hold at least one image; it has no rows.")
    name = _image_column(records[0], image, source["name"])
    columns = {
        key: tuple(record[key] for record in records)
        for key, value in records[0].items()
        if key != name and isinstance(value, str | int | float | bool | type(None))
    }
    return _from_opened([record[name] for record in records], source, columns)


def _image_column(record: Mapping[str, object], image: str | None, where: str) -> str:
    """Return the column of images: the one that is named, else the first that holds some."""
    if image is not None and image not in record:
        raise no_column(image, record, where)
    name = image or next((name for name, value in record.items() if _is_picture(value)), None)
    if name is None or not _is_picture(record[name]):
        raise InputError(
            f"`{where}` must have a column of images; its columns are {listed(record, 12)}. Name it (image=…)."
        )
    return name


def _is_image(value: object) -> bool:
    import PIL.Image

    return isinstance(value, PIL.Image.Image)


def _is_picture(value: object) -> bool:
    """Return whether a value is an image, or an array that can be one."""
    return _is_image(value) or (isinstance(value, np.ndarray | Tensor) and value.ndim > 1)


def _is_pair(data: object) -> bool:
    """Return whether the data are images and their labels: (X, y)."""
    if not isinstance(data, tuple) or len(data) != 2 or isinstance(data[1], str) or _is_picture(data[1]):
        return False
    return isinstance(data[1], Iterable) and not _is_picture(next(iter(data[1]), None))


def _sequence(data: object) -> Any:
    return list(data) if isinstance(data, tuple) else data


def _from_memory(data: Any, image: str | None, split: str | None) -> Images:
    """Return images from an array, from images with or without labels, or from a table with a column of images."""
    if isinstance(data, Tensor):
        data = data.detach().cpu().numpy()
    if isinstance(data, np.ndarray) and data.dtype != object and data.dtype.names is None:
        _check_no_columns(image, "an array")
        if split is not None:
            raise InputError(f"an array has no split `{split}`. Leave it out.")
        return _from_array(data, {"kind": "array", "name": "array"})
    if _is_pair(data):
        images = _from_memory(data[0], image, split)
        return images.with_columns(label=one_column(data[1]))
    records, source = open_values(_sequence(data), split)
    return _from_entries(list(records), source, image)


def _from_entries(entries: list[Any], source: dict[str, Any], image: str | None) -> Images:
    """Return images from records: dictionaries, pairs with a label, or the images themselves."""
    if not entries:
        raise InputError("there must be at least one image; the list is empty.")
    if isinstance(entries[0], Mapping):
        return _from_records(entries, source, image)
    _check_no_columns(image, "a list of images")
    if isinstance(entries[0], tuple):
        return _from_opened([each[0] for each in entries], source, {"label": tuple(each[1] for each in entries)})
    return _from_opened(entries, source, {})


def _from_opened(
    values: Sequence[Any], source: Mapping[str, Any], columns: dict[str, tuple[Any, ...]] | None
) -> Images:
    opened = [value if _is_image(value) else _as_image(value, f"image {i}") for i, value in enumerate(values)]
    digest = hashlib.sha256()
    for each in opened:
        digest.update(f"{each.mode} {each.size} ".encode() + each.tobytes())
    return _images(
        tuple(map(str, range(len(opened)))),
        columns or {},
        {**source, "digest": "sha256:" + digest.hexdigest()},
        lambda i: opened[i],
    )


def _from_array(pixels: Any, source: Mapping[str, Any], columns: dict[str, tuple[Any, ...]] | None = None) -> Images:
    name = f"`{source['name']}`" if source["name"] != "array" else "the array"
    if pixels.ndim not in (3, 4) or (pixels.ndim == 4 and pixels.shape[-1] not in (1, 3)) or not pixels.size:
        hint = "Move the channels to the end." if pixels.ndim == 4 and pixels.shape[1] in (1, 3) else "Reshape it."
        raise InputError(
            f"{name} must hold images [n, height, width] or [n, height, width, 1 | 3]; its shape is "
            f"{tuple(pixels.shape)}. {hint}"
        )
    pixels = _as_bytes(pixels, name)
    header = f"{pixels.shape} ".encode()
    return _images(
        tuple(map(str, range(len(pixels)))),
        columns or {},
        {**source, "digest": digest_bytes(header + np.ascontiguousarray(pixels).tobytes())},
        lambda i: _as_image(pixels[i], f"image {i}"),
    )


def _as_bytes(pixels: np.ndarray, name: str) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.dtype.kind in "fiub" else (0.0, np.inf)
    if low >= 0 and high <= 1:
        return np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    if pixels.dtype.kind in "iu" and low >= 0 and high <= 255:
        return pixels.astype(np.uint8)
    raise InputError(
        f"{name} must hold pixels as uint8, or as numbers from 0 to 1; got {pixels.dtype} from {low:g} to {high:g}. "
        "Scale them."
    )


def _as_image(value: object, name: str) -> Image:
    import PIL.Image

    try:
        pixels = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} must be an image or an array; {first_line(error)}.") from None
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[-1] != 3):
        raise InputError(
            f"{name} must be [height, width] or [height, width, 1 | 3]; its shape is {tuple(pixels.shape)}."
        )
    return PIL.Image.fromarray(_as_bytes(pixels, name))


def _images(
    ids: tuple[str, ...], columns: dict[str, tuple[Any, ...]], info: dict[str, Any], opener: Callable[[int], Image]
) -> Images:
    return Images(ids, columns, {**info, "n_images": len(ids), "complete": True}, opener)
