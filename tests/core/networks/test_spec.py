"""The description of a network as plain data."""

import json

import pytest
from torch import nn

from corun_ray.core.networks.spec import NetworkError, NetworkSpec


def test_a_description_survives_json_and_compares_by_value() -> None:
    spec = NetworkSpec("NAFNet", {"width": 8, "enc_blk_nums": (1, 2), "nested": {"a": None}})
    assert spec.args["enc_blk_nums"] == [1, 2]
    assert NetworkSpec.from_json(spec.to_json()) == spec
    assert NetworkSpec("NAFNet", {"width": 16}) != NetworkSpec("NAFNet", {"width": 8})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "exactly `type` and `args`"),
        ('{"type": "corun"}', "exactly `type` and `args`"),
        ('{"type": "corun", "args": {}, "more": 1}', "exactly `type` and `args`"),
        ('{"type": 3, "args": {}}', "3 is no network type"),
        ('{"type": "../net:A", "args": {}}', "is no network type"),
        ('{"type": "a:b:c", "args": {}}', "is no network type"),
        ('{"type": "corun", "args": [4]}', "args are list"),
        ('{"type": "corun", "args": {"width": NaN}}', "args are not plain values"),
    ],
)
def test_other_descriptions_are_refused(text: str, expected: str) -> None:
    with pytest.raises(NetworkError, match=expected):
        NetworkSpec.from_json(text)
    with pytest.raises(NetworkError, match="args are not plain values"):
        NetworkSpec("NAFNet", {"norm_layer": nn.LayerNorm})


def test_descriptions_are_json_for_people() -> None:
    assert json.loads(NetworkSpec("corun", {"stages": 4}).to_json()) == {"type": "corun", "args": {"stages": 4}}
