"""Read `s3://` URIs: bucket, key and options. A spelling that would name another key than it seems to is refused."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

S3_SCHEME = "s3://"
OPTIONS = ("endpoint_override", "region", "scheme", "tls_ca_file_path")
"""Options that may follow a question mark."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UNREADABLE_PARTS = ("", ".", "..")
"""Parts of a key that clients drop or resolve on the way, so that they ask for another key."""


@dataclass(frozen=True)
class S3Uri:
    """A place in an S3 store: `BUCKET` or `BUCKET/KEY`, and the options of the URI."""

    path: str
    options: Mapping[str, str]

    @property
    def bucket(self) -> str:
        """The name of the bucket."""
        return self.path.split("/")[0]


def parse_s3_uri(uri: str) -> S3Uri:
    """Parse `s3://BUCKET/KEY?OPTION=VALUE`.

    Spaces, `#` and letters of any language stand for themselves. `%20` is a space, `%3F` a question mark, `%25` a
    percent sign. One slash at the end, or several, mean nothing.

    Raises `ValueError` with the reason alone.
    """
    place, _, query = uri.removeprefix(S3_SCHEME).partition("?")
    path = unquote(place).rstrip("/")
    bucket, *parts = path.split("/")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"{bucket!r} is no name of a bucket (expected s3://BUCKET/KEY)")

    if has_unreadable_part("/".join(parts)):
        clean = "/".join(part for part in parts if part not in _UNREADABLE_PARTS)
        hint = "" if ".." in parts else f"; did you mean {S3_SCHEME}{bucket}/{clean}?"
        raise ValueError(f"a key with an empty part (//), with . or with .. cannot be read{hint}")

    options = dict(parse_qsl(query, keep_blank_values=True)) if query else {}
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown or (query and not options):
        named = ", ".join(unknown) or query
        raise ValueError(f"unknown option {named} (expected {', '.join(OPTIONS)}; %3F is a question mark in a key)")
    return S3Uri(path, options)


def has_unreadable_part(key: str) -> bool:
    """Return whether no client of ours can read a key: it has an empty part, `.` or `..`."""
    return bool(key) and any(part in _UNREADABLE_PARTS for part in key.split("/"))


def find_s3_mistake(text: str) -> str | None:
    """Return what is wrong with the place that an `s3://` URI names; None for any other text.

    Options are left to whoever opens the place.
    """
    if not text.startswith(S3_SCHEME):
        return None
    try:
        parse_s3_uri(text.partition("?")[0])
    except ValueError as error:
        return str(error)
    return None
