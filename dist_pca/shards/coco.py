"""Index of a COCO JSON file: which bytes of it are about which image.

The file is parsed once, one element of its lists at a time, and the byte offsets of its annotations are kept for
each image. Drawing an image reads those bytes alone, so time and memory do not grow with images times file size.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dist_pca.errors import UserError

_SPACE = re.compile(r"[ \t\n\r]*")
_BYTE_ORDER_MARK = "\xef\xbb\xbf"
_LISTS = ("images", "annotations", "categories")
_LONGEST_ID = 80
_REMEDY = "correct the file"


@dataclass(frozen=True)
class CocoImage:
    """One image in a COCO file and where its annotations are."""

    id: int | str
    width: int
    height: int
    spans: tuple[tuple[int, int], ...]
    """First and last byte (exclusive) of each annotation, in the order of the file."""
    categories: dict[int, str]
    """Name of each category of the file, by id."""
    digest: str
    """Digest of all that the label is drawn from."""

    @property
    def bytes(self) -> int:
        """Size of its annotations."""
        return sum(end - start for start, end in self.spans)


def index_coco(path: Path, images: Sequence[str]) -> dict[str, CocoImage]:
    """Find the entries of images in a COCO file, by the image's path relative to the root.

    An entry is of the image whose path its `file_name` is, or the end of whose path it is. Images without an entry are
    left out.

    Raises:
        UserError: the file is not COCO's JSON, an entry is listed twice or has a name outside the root, an annotation
            is of no image, or two images have the same entry.
    """
    with json_errors(path, _REMEDY):
        text = path.read_bytes().decode("latin-1")  # one character for each byte, so places are offsets
        return _matched(path, images, *_parsed(path, text), text)


@contextmanager
def json_errors(path: Path, remedy: str) -> Iterator[None]:
    """Turn the errors of reading a label's JSON file into a `UserError` that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror}); {remedy}") from error
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for a label; {remedy}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the JSON of such labels ({reason}); {remedy}") from None


def read_annotations(path: Path, image: CocoImage) -> Iterator[dict[str, Any]]:
    """Read an image's annotations, in the order of the file.

    Raises:
        UserError: the file has changed since it was indexed.
    """
    try:
        with path.open("rb") as file:
            for start, end in image.spans:
                file.seek(start)
                yield json.loads(file.read(end - start))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: image {image.id}: the file has changed meanwhile; start again") from error


_Spans = dict[int | str, list[tuple[int, int]]]


def _parsed(path: Path, text: str) -> tuple[dict[str, dict[str, Any]], _Spans, dict[int, str]]:
    """Image entries by file name, places of annotations by image id, and names of categories by id."""
    entries: dict[str, dict[str, Any]] = {}
    ids: set[int | str] = set()
    spans: _Spans = {}
    categories: dict[int, str] = {}
    for key, value, start, end in _elements(text):
        if not isinstance(value, dict):
            raise ValueError(f"{key} has an element that is no object at byte {start}")
        if key == "annotations":
            spans.setdefault(_id(value, "image_id", start), []).append((start, end))
            continue
        number = _id(value, "id", start)
        value = json.loads(text[start:end].encode("latin-1")) | {"id": number}
        if key == "categories":
            if number in categories or not isinstance(number, int) or not value.get("name"):
                raise UserError(f"{path}: category {number}: listed twice, or its id or name is missing; {_REMEDY}")
            categories[number] = str(value["name"])
            continue
        name = _file_name(path, value)
        if name in entries or number in ids:
            raise UserError(f"{path}: image {number}: its id or its name {name[:80]!r} is listed twice; {_REMEDY}")
        entries[name] = value
        ids.add(number)
    for number in spans:
        if number not in ids:
            raise UserError(f"{path}: image {number}: has annotations but is not in `images`; {_REMEDY}")
    return entries, spans, categories


def _matched(
    path: Path,
    images: Sequence[str],
    entries: dict[str, dict[str, Any]],
    spans: _Spans,
    categories: dict[int, str],
    text: str,
) -> dict[str, CocoImage]:
    found: dict[str, CocoImage] = {}
    users: dict[str, str] = {}
    for image in images:
        parts = PurePosixPath(image).parts
        tails = ("/".join(parts[start:]) for start in range(len(parts)))
        name = next((tail for tail in tails if tail in entries), None)
        if name is None:
            continue
        entry, places = entries[name], spans.get(entries[name]["id"], [])
        if name in users:
            raise UserError(
                f"{path}: image {entry['id']}: its name {name!r} is the end of both {users[name]} and {image}; write "
                "paths relative to the root"
            )
        users[name] = image
        size = (entry.get("width"), entry.get("height"))
        if not all(type(edge) is int and edge > 0 for edge in size):
            raise UserError(f"{path}: image {entry['id']}: its width and height are no whole numbers; {_REMEDY}")
        digest = hashlib.sha256(json.dumps([*size, sorted(categories.items())]).encode())
        for start, end in places:
            digest.update(text[start:end].encode("latin-1"))
        found[image] = CocoImage(entry["id"], *size, tuple(places), categories, digest.hexdigest())  # type: ignore[arg-type]
    return found


def _file_name(path: Path, entry: dict[str, Any]) -> str:
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: image {entry['id']}: has no file_name; {_REMEDY}")
    if name.startswith("/") or PureWindowsPath(name).drive or ".." in PureWindowsPath(name).parts:
        raise UserError(
            f"{path}: image {entry['id']}: file_name {name[:80]!r} is absolute or outside the root; write it relative "
            "to the root"
        )
    return str(PurePosixPath(name))


def _id(value: dict[str, Any], key: str, start: int) -> int | str:
    number = value.get(key)
    if type(number) is int and number.bit_length() < 64:
        return number
    if isinstance(number, str) and number.isprintable() and len(number) <= _LONGEST_ID:
        return number
    raise ValueError(f"no {key}, a number or a short text, in the object at byte {start}")


def _elements(text: str) -> Iterator[tuple[str, Any, int, int]]:
    """Elements of the lists of a COCO file: list, element, and its first and last place (exclusive) in the text.

    Raises:
        ValueError: the text is not JSON, or not an object.
    """
    decode = json.JSONDecoder().raw_decode
    at = _after(text, len(_BYTE_ORDER_MARK) if text.startswith(_BYTE_ORDER_MARK) else 0, "{")
    while True:
        key, at = decode(text, at)
        at = _after(text, at, ":")
        if key in _LISTS:
            at = _after(text, at, "[")
            while text[at : at + 1] != "]":
                value, end = decode(text, at)
                yield key, value, at, end
                at = _skip(text, end)
                if text[at : at + 1] != "]":
                    at = _after(text, at, ",")
            at += 1
        else:
            _, at = decode(text, at)
        at = _skip(text, at)
        if text[at : at + 1] == "}":
            break
        at = _after(text, at, ",")
    if _skip(text, at + 1) != len(text):
        raise ValueError(f"more text after its end at byte {at + 1}")


def _skip(text: str, at: int) -> int:
    """Place of the next character that is no space."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]


def _after(text: str, at: int, mark: str) -> int:
    at = _skip(text, at)
    if text[at : at + 1] != mark:
        raise ValueError(f"{mark!r} expected at byte {at}")
    return _skip(text, at + 1)
