"""HTTP proxies of the environment: loopback never goes through one, and an error names the one that was used."""

import os
from urllib.parse import urlsplit

from corun_ray.config.credentials import mask_credentials

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")
"""Read in both spellings, by requests (Ray's Jobs API, MLflow) and boto3. pyarrow's S3 and Ray's gRPC use no proxy."""
EXCEPTIONS = ("no_proxy", "NO_PROXY")
"""Hosts that are reached directly; the first that is set counts."""
LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")


def reach_loopback_directly() -> None:
    """Take loopback out of the proxies of this process and its children.

    A proxy is another machine, which would look for the server on itself.
    """
    spellings = [*PROXY_VARIABLES, *(name.upper() for name in PROXY_VARIABLES)]
    if not any(os.environ.get(name) for name in spellings):
        return

    # Programs differ in which spelling they read, so both get the same list.
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    hosts += [host for host in LOOPBACK if host not in hosts]
    for name in EXCEPTIONS:
        os.environ[name] = ",".join(hosts)


def describe_proxy(url: str) -> str:
    """Return which proxy requests to `url` go through, and how to go around it.

    The text is empty where they go through none.
    """
    place = urlsplit(url)
    if not place.hostname or place.scheme not in ("http", "https"):
        return ""

    # Imported late: it takes a while, and errors are rare.
    from requests.utils import get_environ_proxies, select_proxy

    proxy = select_proxy(url, get_environ_proxies(url))
    if not proxy:
        return ""
    return (
        f"; asked through the proxy {mask_credentials(proxy)} of {_find_variable(proxy)} "
        f"(NO_PROXY={place.hostname} goes around it)"
    )


def _find_variable(proxy: str) -> str:
    """Return the environment variable that names a proxy."""
    for name in PROXY_VARIABLES:
        for spelling in (name, name.upper()):
            value = os.environ.get(spelling)
            if value and value.rpartition("://")[2].rstrip("/") == proxy.rpartition("://")[2].rstrip("/"):
                return spelling
    return "the environment"
