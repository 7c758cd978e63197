"""The S3 store of this process: where it is, by whom it is trusted, and the only requests that it gets.

Endpoint, region and profile are found by boto3 itself, so that pyarrow, MLflow's artifacts (boto3) and the doctor ask
one store: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL, then the profile's services section and endpoint_url.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from corun_ray.config.s3_uri import S3Uri
from corun_ray.service.trust import DRIVER, check_ca_file, find_ca_file, find_certificate_fault

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
DRIVER_ENDPOINT, DRIVER_REGION = "CORUN_DRIVER_S3_ENDPOINT", "CORUN_DRIVER_S3_REGION"
"""Carry what the driver found in its profile to Ray's processes on other nodes, which take it where they find none."""
DEFAULT_REGION = "us-east-1"
CONNECT_TIMEOUT_S = 3.0
SILENCE_TIMEOUT_S = 15.0
"""How long a connection may carry no data. pyarrow's default of 3 s fails every attempt at a store that is slow to
send its first byte."""
SINGLE_REQUEST_BYTES = 8 * 2**20
"""The most that is sent in a single request. pyarrow sends more than 10 MiB in parts."""
DENIED = "ACCESS_DENIED"
"""How pyarrow's errors name an answer 403."""


@dataclass(frozen=True)
class S3Settings:
    """What the environment and the AWS profile say about S3; None where they say nothing."""

    endpoint_url: str | None
    region: str | None
    ca_file: str | None


def read_s3_settings() -> S3Settings:
    """Return the settings of S3, as boto3 finds them.

    Raises `ValueError` for a profile that does not exist, a file that cannot be parsed or an endpoint that is no URL,
    and `TrustError` for a CA file that cannot be used.
    """
    # Tests and long-lived processes change the environment: it is the key of the cache.
    relevant = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "CORUN_DRIVER_", "HOME"))}
    found = _ask_boto(tuple(sorted(relevant.items())))

    # boto3 takes the file of the environment or of the profile; then come the variables of other clients.
    if found.ca_file:
        check_ca_file(found.ca_file, "AWS_CA_BUNDLE, or ca_bundle of the AWS profile")
    ca_file = found.ca_file or find_ca_file()
    if ca_file is not None and Path(ca_file).is_dir():
        raise ValueError(f"{ca_file} is a folder of certificates; S3 needs one file of them (AWS_CA_BUNDLE)")
    return S3Settings(found.endpoint_url, found.region, ca_file)


@lru_cache(maxsize=8)
def _ask_boto(environment: tuple[tuple[str, str], ...]) -> S3Settings:
    """Ask boto3 for its endpoint, region and the profile's CA file, without a request and without credentials."""
    # Imported late: most processes never use S3.
    import botocore.session
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        session = botocore.session.Session()
        client = session.create_client("s3", DEFAULT_REGION, config=Config(signature_version=UNSIGNED))
        unconfigured = session.create_client(
            "s3", DEFAULT_REGION, config=Config(signature_version=UNSIGNED, ignore_configured_endpoint_urls=True)
        )
        region, ca_file = session.get_config_variable("region"), session.get_config_variable("ca_bundle")
    except (BotoCoreError, ValueError) as error:
        raise ValueError(f"the AWS configuration cannot be used: {error}") from None

    # An endpoint that differs from Amazon's own was configured.
    endpoint_url = client.meta.endpoint_url
    if endpoint_url == unconfigured.meta.endpoint_url:
        endpoint_url = os.environ.get(DRIVER_ENDPOINT)

    # The AWS tools of other languages read AWS_REGION.
    region = region or os.environ.get("AWS_REGION") or os.environ.get(DRIVER_REGION)
    return S3Settings(endpoint_url, region, ca_file)


def make_node_environment() -> dict[str, str]:
    """Return the variables that carry the driver's settings to Ray's processes on other nodes.

    A node's own settings have precedence. Credentials are not carried: each node needs its own. Nothing is carried
    where the AWS configuration cannot be used: `locate` says so to a job that needs it.
    """
    try:
        settings = read_s3_settings()
    except ValueError:
        return {}

    # An endpoint by environment is the cluster's matter, as are the credentials: nodes may have another.
    carried = {}
    if settings.endpoint_url and not any(os.environ.get(name) for name in ENDPOINT_VARIABLES):
        carried[DRIVER_ENDPOINT] = settings.endpoint_url
        if settings.region:
            carried[DRIVER_REGION] = settings.region
    ca_file = os.environ.get(DRIVER) or settings.ca_file
    if ca_file:
        carried[DRIVER] = ca_file
    return carried


def share_s3_endpoint() -> None:
    """Let boto3 (MLflow's artifacts) ask the driver's store where this process's own settings name none."""
    endpoint = os.environ.get(DRIVER_ENDPOINT)
    if not endpoint:
        return
    # Settings that cannot be used are told to a job that needs them.
    with suppress(ValueError):
        if read_s3_settings().endpoint_url == endpoint:
            os.environ.setdefault(ENDPOINT_VARIABLES[0], endpoint)


# --- The filesystem ---


class S3Store(fs.FileSystemHandler):
    """pyarrow's filesystem of an S3 store, asked only for what is used: list, get, put and delete below a place.

    A role that may do this below one prefix, and nothing else, is enough. pyarrow's own filesystem also asks whether
    the bucket exists, and writes an empty object for every folder. Wrapped in a `PyFileSystem`, this handler also
    stands between the store and pyarrow's C++ functions, such as `copy_files`. It survives pickling.
    """

    def __init__(self, options: Mapping[str, Any], num_retries: int) -> None:
        """Prepare to ask the store; `options` are those of pyarrow's `S3FileSystem`. Nothing is asked yet."""
        self.options, self.num_retries = dict(options), num_retries

        # Retry each request on its own. The "standard" strategy shares one budget of retries among all requests, and
        # gives up early when many fail at once.
        patient = {
            **self.options,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "request_timeout": SILENCE_TIMEOUT_S,
            "retry_strategy": fs.AwsDefaultS3RetryStrategy(max_attempts=num_retries),
        }
        self._unchecked = fs.S3FileSystem(**patient)
        self._for_small_files = fs.S3FileSystem(**patient, allow_delayed_open=True, background_writes=False)

    def __reduce__(self) -> tuple[type, tuple]:
        return S3Store, (self.options, self.num_retries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Store) and (self.options, self.num_retries) == (other.options, other.num_retries)

    @property
    def endpoint_url(self) -> str:
        """The URL of the store's server."""
        endpoint = self.options["endpoint_override"]
        if not endpoint:
            return f"https://s3.{self.options['region']}.amazonaws.com"
        return endpoint if "://" in endpoint else f"{self.options['scheme']}://{endpoint}"

    @cached_property
    def _s3(self) -> fs.S3FileSystem:
        """pyarrow's filesystem, once the server's certificate has been looked at."""
        # A certificate that is refused is no failing network, and waiting does not help.
        fault = find_certificate_fault(self.endpoint_url, self.options.get("tls_ca_file_path"))
        if fault is not None:
            raise OSError(fault)
        return self._unchecked

    # --- What pyarrow asks of a handler ---

    def get_type_name(self) -> str:
        """Return the name of this kind of filesystem."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        """Return the path as it is."""
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        """Return what lies at each path."""
        return [self._look_at(path) for path in paths]

    def _look_at(self, path: str) -> fs.FileInfo:
        try:
            return self._s3.get_file_info(path)
        except OSError as error:
            if DENIED not in str(error):
                raise

        # A role for `PREFIX/*` may not ask for an object named PREFIX, and may list what lies below.
        below = self._s3.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return fs.FileInfo(path, fs.FileType.Directory if below else fs.FileType.NotFound)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        """Return what lies below a path."""
        lenient = fs.FileSelector(selector.base_dir, allow_not_found=True, recursive=selector.recursive)
        found = self._s3.get_file_info(lenient)
        if found or selector.allow_not_found:
            return found

        # An object of this name is no folder either.
        kind = self._look_at(selector.base_dir).type
        if kind == fs.FileType.NotFound:
            raise FileNotFoundError("no such folder")
        if kind == fs.FileType.File:
            raise FileNotFoundError("a file, not a folder")
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        """Do nothing: an object store has no folders, only keys with slashes."""

    def delete_dir(self, path: str) -> None:
        """Delete everything below a path."""
        self._s3.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        """Delete everything below a path."""
        self._s3.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        """Refuse to delete all buckets."""
        raise ValueError("all buckets of a store are never deleted")

    def delete_file(self, path: str) -> None:
        """Delete an object."""
        self._s3.delete_file(path)

    def move(self, source: str, target: str) -> None:
        """Copy an object and delete the first."""
        self._s3.move(source, target)

    def copy_file(self, source: str, target: str) -> None:
        """Copy an object within the store."""
        self._s3.copy_file(source, target)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """Open an object for reading from its beginning."""
        return self._s3.open_input_stream(path, compression=None)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Open an object for reading anywhere."""
        return self._s3.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Mapping[str, str] | None) -> pa.NativeFile:
        """Open an object for writing; it appears when the stream is closed."""
        return pa.PythonFile(_Upload(path, self._for_small_files, self._s3), mode="w")

    def open_append_stream(self, path: str, metadata: Mapping[str, str] | None) -> pa.NativeFile:
        """Refuse: objects cannot grow."""
        raise NotImplementedError("an object of an S3 store cannot be appended to")


class _Upload:
    """An object that is being written: a small one goes in a single request when it is closed.

    A single request leaves no unfinished upload behind, and is made by the thread that closes. pyarrow's uploads in
    parts need threads of a small pool, whose threads would wait for each other where many files are copied at once.
    Without that pool they are no choice: pyarrow then finishes an upload of which a part has failed.
    """

    def __init__(self, path: str, store: fs.S3FileSystem, store_in_parts: fs.S3FileSystem) -> None:
        self._path, self._store, self._store_in_parts = path, store, store_in_parts
        self._buffer = bytearray()
        self._parts: pa.NativeFile | None = None
        self.closed = False

    def write(self, data: bytes) -> None:
        """Add bytes to the end."""
        if self._parts is not None:
            self._parts.write(data)
            return

        self._buffer += data
        if len(self._buffer) > SINGLE_REQUEST_BYTES:
            self._parts = self._store_in_parts.open_output_stream(self._path, compression=None)
            self._parts.write(self._buffer)
            self._buffer = bytearray()

    def flush(self) -> None:
        """Do nothing: nobody sees an object before it is closed."""

    def close(self) -> None:
        """Let the object appear."""
        if self.closed:
            return
        self.closed = True
        if self._parts is not None:
            self._parts.close()
            return
        with self._store.open_output_stream(self._path, compression=None) as stream:
            stream.write(self._buffer)


def open_s3(uri: S3Uri, num_retries: int) -> fs.PyFileSystem:
    """Return the filesystem of a URI's store.

    Options of the URI have precedence over the environment and the AWS profile.

    Raises `OSError` where Amazon does not tell the bucket's region, and the errors of `read_s3_settings`.
    """
    settings = read_s3_settings()
    endpoint = uri.options.get("endpoint_override") or settings.endpoint_url or ""
    options: dict[str, Any] = {
        # Empty, not None: pyarrow would take an endpoint from the environment that boto3 has been told to ignore.
        "endpoint_override": endpoint,
        "scheme": uri.options.get("scheme", "https"),
        "region": uri.options.get("region") or _find_region(uri.bucket, settings, is_amazon=not endpoint),
    }
    ca_file = uri.options.get("tls_ca_file_path") or settings.ca_file
    if ca_file:
        options["tls_ca_file_path"] = ca_file
    return fs.PyFileSystem(S3Store(options, num_retries))


def _find_region(bucket: str, settings: S3Settings, is_amazon: bool) -> str:
    """Return the region of a bucket; of Amazon's buckets Amazon knows it best."""
    if is_amazon:
        try:
            return fs.resolve_s3_region(bucket)
        except OSError:
            if settings.region is None:
                raise
    return settings.region or DEFAULT_REGION
