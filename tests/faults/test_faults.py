"""Every fault of the matrix once, several in one run; `make faults` runs each by itself, at random moments."""

import numpy as np
import pytest

from tests.faults.inject import FAULTS
from tests.faults.matrix import run_under, stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def theatre():
    with stage() as everything:
        yield everything


def held_under(theatre, **blows):
    """Runs a job struck by the faults at these steps; fails with what it printed if anything did not hold."""
    named = [(FAULTS[name.replace("_", " ")], step) for name, step in blows.items()]
    outcome = run_under(*theatre, named, np.random.default_rng(0))
    assert not outcome.problems, f"{outcome.problems}\n{outcome.output[-5000:]}"
    return outcome


def test_shard_worker_controller_and_node_die_in_one_run(theatre):
    outcome = held_under(theatre, pool_shard=4, training_worker=8, controller=14, worker_node=20)
    assert outcome.resumed == 0 and outcome.restarts >= 2
    assert outcome.labels_held == 6


def test_the_object_store_is_away_for_20_s_and_then_the_driver_is_killed(theatre):
    outcome = held_under(theatre, object_store_outage=7, driver=16)
    assert outcome.resumed == 1 and "resumes this run" in outcome.output


def test_the_disk_of_the_checkpoints_is_full_for_a_while(theatre):
    try:
        outcome = held_under(theatre, disk_full=14)
    except OSError as error:
        pytest.skip(str(error))
    assert "cannot write" in outcome.output and "No space left on device" in outcome.output


def test_a_second_driver_is_refused_and_then_nobody_reads_the_first(theatre):
    outcome = held_under(theatre, second_driver=7, reader_gone=14)
    assert outcome.resumed == outcome.restarts == 0
