"""Trajectories of the search are those that were stored."""

import golden
import pytest


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if config.extra else [])
        for name, config in golden.CONFIGS.items()
    ],
)
def test_trajectory(name):
    expected = golden.stored(name)
    assert expected, "not stored: python tests/golden.py --store"
    found = golden.differences(golden.run(name), expected)
    assert max(found.values(), default=0.0) <= (
        golden.CONFIGS[name].tolerance
    ), found
