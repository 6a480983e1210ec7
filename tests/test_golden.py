"""Trajectories of the search are those that were stored: a few of them.

All: `python tests/golden.py --compare all`.
"""

import golden
import pytest

NAMES = [
    "full-separable",
    "first-generator",
    "first-generator-local",
    "local-masked",
    "mixed-separable-max-kl",
    "follow-mean-isotropic-max-kl",
    "defaults-784-16-10",
    "dropout",
    "minimize-float64-chunks",
    "minimize-all-nonfinite",
    "sharded2-full-fitness",
]


@pytest.mark.parametrize("name", NAMES)
def test_trajectory(name):
    expected = golden.stored(name)
    assert expected, "not stored: python tests/golden.py --store"
    found = golden.differences(golden.run(name), expected)
    assert max(found.values(), default=0.0) <= (
        golden.CONFIGS[name].tolerance
    ), found


def test_all_are_stored_and_nothing_else():
    assert golden.stored_names() == set(golden.CONFIGS)
