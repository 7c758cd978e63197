"""The file of a company's own certificate authority (CA): named once, trusted by every client of this process.

Each client reads variables of its own: `requests` (MLflow, Ray's Jobs API) REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE,
boto3 AWS_CA_BUNDLE and REQUESTS_CA_BUNDLE, Python's `ssl` (downloads) SSL_CERT_FILE, and pyarrow none but the last.
"""

import atexit
import os
import socket
import ssl
import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi

from corun_ray.core.errors import UserError

REQUESTS, CURL, AWS, PYTHON = "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CA_BUNDLE", "SSL_CERT_FILE"
DRIVER = "CORUN_DRIVER_CA_FILE"
"""Carries the driver's file to Ray's processes on other nodes, which take it where they have none of their own."""
VARIABLES = (AWS, REQUESTS, CURL, PYTHON)
"""In the order in which an S3 client takes them."""
HANDSHAKE_TIMEOUT_S = 3.0
PLAIN_ANSWER = "WRONG_VERSION_NUMBER"
"""What OpenSSL says of an answer in plain HTTP."""


class TrustError(UserError):
    """A CA file that cannot be used; the message names the variable."""


def find_ca_file(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Return the CA file that the environment names first, for a client that reads no such variable itself.

    Raises `TrustError`, naming the variable, where there is no such file or where it holds no certificate.
    """
    for variable in VARIABLES:
        path = environment.get(variable)
        if path:
            check_ca_file(path, variable)
            return path

    # The driver's file need not exist on this machine.
    path = environment.get(DRIVER)
    return path if path and Path(path).is_file() else None


def share_ca_file(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let the clients whose own variable is not set trust the CA that another variable names.

    Such a client trusts this CA beside the public ones, so that it reaches every server that it reached before. A
    client with a variable of its own is left alone. boto3 needs nothing: it reads REQUESTS_CA_BUNDLE too.

    Raises `TrustError`.
    """
    named = find_ca_file(environment)
    if named is not None:
        environment[DRIVER] = named
    lacking = [variable for variable in (REQUESTS, PYTHON) if not environment.get(variable)]

    # `requests` takes a folder of certificates too, which is no file to hand on.
    if named is None or not lacking or Path(named).is_dir():
        return
    joined = _join_with_public(Path(named))
    for variable in lacking:
        environment[variable] = joined


def check_ca_file(path: str, variable: str) -> None:
    """Raise `TrustError` where a client would find no certificate at the path that `variable` names."""
    place = Path(path)
    if place.is_dir() and variable in (REQUESTS, CURL):
        return
    try:
        content = place.read_bytes()
    except OSError as error:
        raise TrustError(f"{variable}: cannot read {path}: {error.strerror}") from None
    if b"-----BEGIN " not in content:
        raise TrustError(f"{variable}: {path} holds no certificate in PEM format")


@lru_cache(maxsize=8)
def _join_with_public(path: Path) -> str:
    """Return a file of the public CAs and those of `path`, which lasts as long as this process."""
    with tempfile.NamedTemporaryFile(prefix="corun-ray-ca-", suffix=".pem", delete=False) as file:
        file.write(Path(certifi.where()).read_bytes() + b"\n" + path.read_bytes())
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return file.name


@lru_cache(maxsize=64)
def find_certificate_fault(url: str, ca_file: str | None) -> str | None:
    """Return why a client would refuse the certificate of an `https://` server; None where it would not.

    Clients that retry take such a refusal for a failing network, and wait. A server that does not answer within
    seconds, or that is reached through a proxy, has no fault here: the client itself tells.
    """
    parts = urlsplit(url)
    host, port = parts.hostname, parts.port or 443
    if parts.scheme != "https" or host is None or ("https" in getproxies() and not proxy_bypass(host)):
        return None

    context = ssl.create_default_context(cafile=ca_file)
    with suppress(OSError), socket.create_connection((host, port), HANDSHAKE_TIMEOUT_S) as connection:
        try:
            context.wrap_socket(connection, server_hostname=host).close()
        except ssl.SSLCertVerificationError as error:
            trusted = f"{ca_file} does not vouch for it" if ca_file else "no variable names a company's own CA"
            advice = f"name the file of its CA in {AWS}, {REQUESTS} or {PYTHON}, on every node"
            return f"the certificate of {url} is refused ({error.verify_message}; {trusted}): {advice}"
        except ssl.SSLError as error:
            if error.reason == PLAIN_ANSWER:
                return f"{url} answers without TLS: its address begins with http://"
    return None
