"""Find credentials in URIs.

URIs with credentials are refused: job files, logs, reports and MLflow keep the URIs that they are given.
"""

import re

REFUSED = "holds credentials, which would be kept in logs and reports; give them by the environment"

# user:password@, but not host:port. The password may contain slashes that should have been escaped.
_USER = re.compile(r"(?<=://)[^/@:\s]+:(?!\d+(?:[/?#]|$))[^@\s]+@")
# An option of a query whose name tells that the value is a secret.
_OPTION = re.compile(r"(?<=[?&;])([^=&;?\s]*(?:secret|passw|token|signature|access_key|sig)[^=&;\s]*)=[^&;\s]+", re.I)


def holds_credentials(text: str) -> bool:
    """Return whether a text has a URI with credentials.

    Credentials are a user's password, and an option that is a secret by its name.
    """
    return bool(_USER.search(text) or _OPTION.search(text))


def mask_credentials(text: str) -> str:
    """Replace by `***` what `holds_credentials` finds."""
    without_users = _USER.sub("***@", text)
    return _OPTION.sub(r"\1=***", without_users)
