"""Metadata of the package; tools are configured in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (HERE / "keras_vo" / "version.py").read_text(encoding="utf-8"),
    re.MULTILINE,
).group(1)

TEST = ["pytest>=8", "scipy", "hypothesis"]
RL = ["gymnasium[classic-control]"]
EXAMPLES = [
    "scikit-learn",
    "scipy",
    "matplotlib",
    "distributed",  # Dask's
    *RL,
]
TENSORBOARD = ["tensorboard"]
PLOTS = ["matplotlib"]

setuptools.setup(
    name="keras_vo",
    version=VERSION,
    description=(
        "Train Keras models by variational optimization: natural evolution "
        "strategies over the weights, from forward passes only"
    ),
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=setuptools.find_packages(include=["keras_vo", "keras_vo.*"]),
    package_data={"keras_vo": ["py.typed"]},
    python_requires=">=3.10,<3.14",
    # The lowest are tested: make test-lowest, tests/constraints-lowest.txt.
    install_requires=[
        "tensorflow>=2.18",
        "keras>=3.10",
        "tensorflow-probability[tf]>=0.25",
        "numpy>=1.26",
        "absl-py>=1.0",
        # TensorFlow Probability imports distutils.
        'setuptools; python_version >= "3.12"',
    ],
    extras_require={
        "examples": EXAMPLES,
        "plots": PLOTS,
        "rl": RL,
        "tensorboard": TENSORBOARD,
        "test": TEST,
        "dev": [
            *TEST,
            *EXAMPLES,
            *PLOTS,
            *TENSORBOARD,
            "pytest-xdist",
            "ruff",
            "mypy",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
