"""A loopback proxy before an S3 endpoint that lets a role do what companies grant: read and write below one prefix.

    with RoleS3("http://127.0.0.1:5000", "bucket", "team/alice") as s3:
        ... s3.url ...
        assert s3.denied == []

Granted are ListBucket where the asked prefix begins with `team/alice/`, and GetObject, PutObject and DeleteObject of
keys below it. Everything else is answered with 403: HeadBucket, CreateBucket, ListBuckets, GetBucketLocation, an object
named `team/alice`, other buckets.
"""

import re
from urllib.parse import parse_qs, unquote, urlsplit

from tests.faulty_s3 import FaultyS3


class RoleS3(FaultyS3):
    """The proxy; a context manager."""

    denied: list[str]
    """`METHOD TARGET` of every request that was answered with 403."""
    asked: list[str]
    """`METHOD TARGET` of every request."""

    def __init__(self, upstream_url: str, bucket: str, prefix: str) -> None:
        super().__init__(upstream_url)
        self.bucket, self.below = bucket, f"{prefix}/"
        self.denied, self.asked = [], []

    def denies(self, method: str, target: str, body: bytes) -> bool:
        """Whether the role may not do this; remembers it."""
        self.asked.append(f"{method} {target}")
        is_denied = not self._is_granted(method, target, body)
        if is_denied:
            self.denied.append(f"{method} {target}")
        return is_denied

    def _is_granted(self, method: str, target: str, body: bytes) -> bool:
        parts = urlsplit(target)
        bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        if bucket != self.bucket:
            return False
        if key:
            return key.startswith(self.below)

        # Of the bucket itself: a list of what is below the prefix, and the deletion of several keys there.
        if method == "GET":
            return query.get("prefix", [""])[0].startswith(self.below)
        keys = re.findall(r"<Key>(.*?)</Key>", body.decode())
        return method == "POST" and "delete" in query and all(name.startswith(self.below) for name in keys)
