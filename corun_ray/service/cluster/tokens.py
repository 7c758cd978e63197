"""The token of a cluster, as Ray finds it here."""

import os
from pathlib import Path

WHERE = "RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token with what `ray get-auth-token` prints on its head"


def read_token() -> str:
    """Return the token that Ray would find here; it is empty where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    try:
        return Path(path).expanduser().read_text("utf-8").strip()
    except (OSError, RuntimeError, UnicodeError):
        # No file, none that can be read, or no home folder.
        return ""


def send_token() -> None:
    """Let Ray's clients in this process send the token that is found here, if there is one."""
    if read_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def describe_token_trouble() -> str:
    """Return why a cluster with a token refuses what it gets from here."""
    if not read_token():
        return f"the cluster wants its token, and there is none here ({WHERE}; and RAY_AUTH_MODE=token)"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "the cluster wants its token, and it is not sent from here: set RAY_AUTH_MODE=token"
    return f"the cluster wants its token, and the token here is another ({WHERE})"
