"""How pytest-xdist deals the tests out to the processes of `make test`."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests import ROOT


class FilesTogether(LoadFileScheduling):
    """Deals files out: all that use the one local Ray to one process, others as they come.

    A second local Ray costs more than an even share gains: on two cores, two Rays wait for each other.
    """

    def _split_scope(self, nodeid: str) -> str:
        """Return what goes to one process: a file, or all files that use the local Ray."""
        file = nodeid.split("::")[0]
        text = (ROOT / file).read_text("utf-8")
        uses_ray = any(fixture in text for fixture in ("local_ray", "watched_colabator", "own_class"))
        return "local_ray" if uses_ray else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> FilesTogether:
    """Return the scheduler of pytest-xdist."""
    return FilesTogether(config, log)
