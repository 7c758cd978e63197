"""Credentials in URIs. They are refused: job files, logs, reports and MLflow keep the URIs that they are given."""

import re

REFUSED = "holds credentials, which would be kept in logs and reports; give them by the environment"
# user:password@, but not host:port; the password may have slashes in it that should have been escaped.
_USER = re.compile(r"(?<=://)[^/@:\s]+:(?!\d+(?:[/?#]|$))[^@\s]+@")
_OPTION = re.compile(r"(?<=[?&;])([^=&;?\s]*(?:secret|passw|token|signature|access_key|sig)[^=&;\s]*)=[^&;\s]+", re.I)


def holds_credentials(text: str) -> bool:
    """Whether a text has a URI with a user's password, or with an option that is a secret by its name."""
    return bool(_USER.search(text) or _OPTION.search(text))


def mask_credentials(text: str) -> str:
    """The text with `***` for what `holds_credentials` finds."""
    return _OPTION.sub(r"\1=***", _USER.sub("***@", text))
