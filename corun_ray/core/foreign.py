"""Files that hold another thing than their name says: a page, a pointer, an answer of a server, an archive.

Downloads that went wrong leave such files in the place of images and of weights.
"""

import codecs
import re
from typing import NamedTuple

HEAD_BYTES = 512
"""The bytes from which such a file is recognised."""
MAX_TEXT_CHARS = 120
"""Characters of a text that a message quotes."""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PAGE_MARKS = (b"<!doctype html", b"<html", b"<head>", b"<body")
LFS_START = b"version https://git-lfs"
"""The first bytes of the small text file that stands for a large file in a Git repository."""
GZIP_START = b"\x1f\x8b\x08"
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"})
"""Kinds of HEIF files that cameras of telephones write (ISO/IEC 23008-12)."""

ANSWER = re.compile(r"[<{[]|\d{3}\b|not found\b|forbidden\b|access ?denied\b|unauthorized\b", re.IGNORECASE)
"""How JSON, XML, and the plain refusals of servers begin."""

AGAIN = "the file must be downloaded again"


class Foreign(NamedTuple):
    """What a file is instead, and what helps."""

    what: str
    advice: str


def recognise_foreign(head: bytes) -> Foreign | None:
    """Recognise a file that is neither an image nor weights by its first `HEAD_BYTES`; None for all others."""
    if not head:
        return Foreign("an empty file", AGAIN)
    if head.startswith(GZIP_START):
        return Foreign("a compressed file (gzip)", "unpack it first")
    if not HEIC_BRANDS.isdisjoint(list_brands(head)):
        return Foreign("a HEIC photograph, which is not read", "convert it to JPEG or PNG")

    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if start.startswith(LFS_START):
        return Foreign("a Git LFS pointer", "`git lfs pull` fetches the file itself")
    if start.startswith(b"<") and any(mark in start.lower() for mark in PAGE_MARKS):
        return Foreign("a web page (HTML) that was saved under this name", AGAIN)

    # Of texts, only answers of servers are known for what they are.
    text = _read_text(head)
    if text is None or not ANSWER.match(text):
        return None
    return Foreign(f"a server's answer that was saved under this name ({text[:MAX_TEXT_CHARS]})", AGAIN)


def list_brands(data: bytes) -> list[bytes]:
    """List the brands of a file of ISO/IEC 14496-12 (HEIC, AVIF); empty for any other file."""
    if data[4:8] != b"ftyp":
        return []

    # The length of the box, its name, the main brand, a version, and the brands that the file also fits.
    length = min(int.from_bytes(data[:4], "big"), len(data))
    return [data[8:12], *(data[place : place + 4] for place in range(16, length, 4))]


def _read_text(head: bytes) -> str | None:
    """Read the beginning of a text as one line; None for anything else."""
    try:
        # The last character may be cut.
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character.isspace() for character in text):
        return None
    return " ".join(text.split())
