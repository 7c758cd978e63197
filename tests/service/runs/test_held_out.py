"""A run's held-out values, through a file and through a run that repeats steps."""

import pytest

from corun_ray.service.runs.held_out import MeasuredImage, ValidationLog


def test_values_come_back_from_the_file_and_a_repeated_step_replaces_itself():
    log = ValidationLog()
    log.add(10, [MeasuredImage("val", "a, b.png", {"fade": 1.5}), MeasuredImage("val/night", "c.png", {"psnr": 20.0})])
    log.add(20, [MeasuredImage("val", "a, b.png", {"fade": 1.25})])
    log.add(20, [MeasuredImage("val", "a, b.png", {"fade": 1.0}), MeasuredImage("val", "d.png", {"fade": 3.0})])
    again = ValidationLog.from_csv(log.to_csv())
    assert again.values == log.values and again.last_step == 20
    assert again.at(20) == {("val", "fade"): {"a, b.png": 1.0, "d.png": 3.0}}
    assert again.at(10) == {("val", "fade"): {"a, b.png": 1.5}, ("val/night", "psnr"): {"c.png": 20.0}}


def test_an_empty_log_has_no_last_step_and_another_file_is_refused():
    assert ValidationLog().last_step is None
    assert ValidationLog.from_csv(ValidationLog().to_csv()).values == {}
    with pytest.raises(ValueError, match="columns are a, b"):
        ValidationLog.from_csv(b"a,b\n1,2\n")
