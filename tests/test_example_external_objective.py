"""examples/external_objective.py: a program as the objective, its faults."""

import functools
import importlib.util
import re
import subprocess
import sys

import example_scripts
import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
from absl import app

run = functools.partial(example_scripts.run, "external_objective")
PROGRAM = example_scripts.FOLDER / "programs" / "cart_pole.py"


@functools.cache
def program():
    spec = importlib.util.spec_from_file_location("cart_pole", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def called(text, *arguments):
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        input=text,
        capture_output=True,
        text=True,
    )


# --- the program ---


def test_its_controller_is_the_networks():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(1),
        ]
    )
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=w.shape) for w in model.get_weights()]
    model.set_weights(weights)
    flat = np.concatenate([w.ravel() for w in weights])
    for state in rng.normal(size=(5, 4)):
        output = float(model(state[None])[0, 0])
        want = 10 * np.tanh(output)
        assert program().force(flat, state) == pytest.approx(want, abs=1e-4)


def test_a_pole_without_a_controller_falls():
    done = called("0 " * 31)
    assert done.returncode == 0
    # From a tilt of 0.1 it takes 0.4 to 0.6 s of 10 s to fall.
    assert 0.93 < float(done.stdout) < 0.97


def test_a_pole_that_stands_costs_nothing():
    assert program().cost([0.0] * 31, 0.0, 0.0) == 0


def test_its_faults():
    assert "Expected 31 weights. Received: 2" in called("1 2").stderr
    assert called("0 " * 31, "--crash=1").returncode == -11
    with pytest.raises(subprocess.TimeoutExpired):
        example_scripts.load("external_objective").Objective(
            [sys.executable, str(PROGRAM), "--hang=1"], 0.5
        )([np.zeros(31)])


# --- the search ---


def test_crashes_are_missing_and_a_search_goes_on(tmp_path):
    """Interrupted after two generations, or not: the same costs."""
    whole = run("--generations=3", "--population_size=6", "--plot_dir=")
    arguments = ("--population_size=6", f"--checkpoint={tmp_path / 'saved'}")
    first = run("--generations=2", "--plot_dir=", *arguments)
    rest = run(
        "--generations=3", f"--plot_dir={tmp_path / 'plots'}", *arguments
    )
    assert "goes on after generation 2" in rest
    rows = [
        re.findall(r"generation +(\d+) +cost: mean (\S+), best (\S+)", text)
        for text in (whole, first, rest)
    ]
    assert rows[0] == rows[1] + rows[2]
    assert len(rows[0]) == 3
    ends = [
        text.split("best cost ever")[1].splitlines() for text in (whole, rest)
    ]
    assert ends[0][:2] == ends[1][:2]
    pixels = plt.imread(tmp_path / "plots" / "external_objective.png")
    assert pixels.std() > 0.05

    output = run(
        "--generations=2", "--population_size=20", "--crash=0.5", "--plot_dir="
    )
    missing = [int(n) for n in re.findall(r"missing +(\d+)", output)]
    # 20 fair coins: both below 2 or above 18 in one of 10^9 runs.
    assert len(missing) == 2
    assert 1 < sum(missing) < 39
    retried = run(
        "--generations=1",
        "--population_size=4",
        "--crash=0.3",
        "--retries=50",
        "--plot_dir=",
    )
    assert re.search(r"missing +0 ", retried)


@pytest.mark.slow
def test_other_executors():
    """The same costs, by a local cluster of Dask and by processes."""
    arguments = ("--generations=2", "--population_size=6", "--plot_dir=")
    outputs = [run(*arguments), run(*arguments, "--executor=dask")]
    # Processes have to import the script.
    script = example_scripts.FOLDER / "external_objective.py"
    done = subprocess.run(
        [sys.executable, script, *arguments, "--executor=processes"],
        capture_output=True,
        text=True,
    )
    outputs.append(done.stdout)
    costs = [re.findall(r"cost: (mean \S+, best \S+)", o) for o in outputs]
    assert len(costs[0]) == 2
    assert costs[0] == costs[1] == costs[2]


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--generations=0", "--generations of 1 or more"),
        ("--workers=0", "--workers of 1 or more"),
        ("--crash=1.5", "--crash and --hang whose sum is below 1"),
    ],
)
def test_flags_name_what_was_expected_and_received(argument, expected):
    with pytest.raises(app.UsageError, match=expected) as caught:
        run(argument)
    assert argument in str(caught.value)
