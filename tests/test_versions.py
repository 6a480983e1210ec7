"""The lowest versions: those of setup.py are those that are tested."""

import pathlib
import re

from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]


def versions(text, sign):
    found = re.findall(rf"([\w-]+)(?:\[\w+\])?{sign}([\d.]+)", text)
    return {name: Version(version) for name, version in found}


def test_setup_constraints_and_readme_agree():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    required = re.search(r"install_requires=\[(.*?)\n    \]", setup, re.S)[1]
    floors = versions(required, ">=")
    assert len(floors) == 5  # each but setuptools has one
    constraints = ROOT / "tests" / "constraints-lowest.txt"
    pins = versions(constraints.read_text(encoding="utf-8"), "==")
    assert pins.pop("tf_keras").release[:2] == pins["tensorflow"].release[:2]
    assert pins == floors
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, floor in ("TensorFlow", "tensorflow"), ("Keras", "keras"):
        claimed = re.search(rf"# Python 3.*\b{name} ([\d.]+\d)", readme)[1]
        assert Version(claimed) == floors[floor]
