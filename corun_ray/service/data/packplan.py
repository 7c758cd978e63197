"""The plan of a pack: which images, with which depth, go into which of its shards."""

import hashlib
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field

from corun_ray.service.data.manifest import DEPTH_SUFFIXES, ManifestError, image_files, pair_by_stem, with_suffix
from corun_ray.service.storage import locate

FORMAT = 1


@dataclass(frozen=True)
class Source:
    """One image to be packed."""

    key: str
    depth_key: str | None
    num_bytes: int
    """Of both files."""
    changed_ns: int
    """When the newer of them was written."""


@dataclass(frozen=True)
class Plan:
    """What goes where."""

    images: str
    depth: str | None
    output: str
    keep_png: bool
    shards: tuple[tuple[Source, ...], ...]
    left_out: dict[str, str] = field(default_factory=dict)
    """URI → reason, of images without a depth map and of depth maps without an image."""

    def shard_name(self, shard: int) -> str:
        """Of its file, without the suffix: another one for any other content, as far as sizes and dates tell."""
        content = [FORMAT, self.images, self.depth, self.keep_png]
        content += [(one.key, one.depth_key, one.num_bytes, one.changed_ns) for one in self.shards[shard]]
        return f"images-{shard:05d}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}"

    @property
    def num_images(self) -> int:
        """In all shards."""
        return sum(map(len, self.shards))

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(source.num_bytes for shard in self.shards for source in shard)


def plan_pack(images: str, output: str, depth: str | None, shard_mib: int, keep_png: bool) -> Plan:
    """Lists, pairs and cuts; raises `StorageError` and `ManifestError`."""
    files, maps, left_out = image_files(images, "IMAGES"), {}, {}
    keys: dict[str, str | None] = dict.fromkeys(files)
    if depth is not None:
        maps = locate(depth).listing()
        named = with_suffix([*maps], DEPTH_SUFFIXES)
        pairs, unpaired, unused = pair_by_stem([*keys], named, "depth map")
        if not pairs:
            raise ManifestError(f"--depth: none of the {len(named)} depth maps below {depth} matches an image")
        keys = dict(pairs)
        left_out = {posixpath.join(images, key): reason for key, reason in unpaired.items()}
        left_out |= {posixpath.join(depth, key): reason for key, reason in unused.items()}
    sources = []
    for key, depth_key in keys.items():
        infos = [files[key]] if depth_key is None else [files[key], maps[depth_key]]
        sources.append(
            Source(key, depth_key, sum(info.size for info in infos), max(info.mtime_ns or 0 for info in infos))
        )
    return Plan(images, depth, output, keep_png, tuple(_cut(sources, shard_mib * 2**20)), left_out)


def _cut(sources: list[Source], shard_bytes: int) -> Iterator[tuple[Source, ...]]:
    shard: list[Source] = []
    num_bytes = 0
    for source in sources:
        if shard and num_bytes + source.num_bytes > shard_bytes:
            yield tuple(shard)
            shard, num_bytes = [], 0
        shard.append(source)
        num_bytes += source.num_bytes
    yield tuple(shard)
