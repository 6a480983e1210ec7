"""examples/rl.py: a short search, its plots and what it saves."""

import functools
import re

import example_scripts
import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
from absl import app

run = functools.partial(example_scripts.run, "rl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "env, seeds", [("CartPole-v1", "3,4"), ("Pendulum-v1", "3")]
)
def test_search_within_its_budget(env, seeds, tmp_path, monkeypatch):
    """Discrete and continuous actions."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    output = run(
        f"--env={env}",
        f"--seeds={seeds}",
        "--budget=2000",
        "--population_size=4",
        "--evaluation_episodes=3",
        f"--out={tmp_path}",
    )
    rows = re.findall(
        r"seed (\d): mean return (\S+) .* of 3 episodes, (\d+) time steps",
        output,
    )
    assert [row[0] for row in rows] == seeds.split(",")
    assert all(0 < int(row[2]) <= 2000 for row in rows)
    means = [float(row[1]) for row in rows]
    summary = re.search(r"median over seeds (\S+), worst (\S+)", output)
    assert float(summary.group(1)) == pytest.approx(np.median(means), abs=0.02)
    assert float(summary.group(2)) == pytest.approx(min(means), abs=0.02)
    for name in (f"rl_{env}.png", f"rl_{env}_frames.png"):
        assert plt.imread(tmp_path / name).std() > 0.02
    loaded = keras.models.load_model(tmp_path / f"rl_{env}.keras")
    assert int(loaded.optimizer.generations) > 0
    assert float(loaded.layers[0].count) > 0


@pytest.mark.slow
def test_what_is_beyond_the_budget_is_not_used():
    """Not even the first generation fits: the policy is what it was."""
    module = example_scripts.load("rl")
    module.FLAGS(["rl", "--env=Pendulum-v1", "--budget=100", "--out="])
    policy, curve, _ = module.train(0)
    assert curve == []
    np.testing.assert_array_equal(policy.get_weights()[-1], [0])
    assert float(policy.layers[0].count) == 0
    for name in ("env", "budget", "out"):
        module.FLAGS[name].unparse()


def test_settings_of_environments():
    module = example_scripts.load("rl")
    module.FLAGS(["rl", "--env=CartPole-v1", "--episodes=7"])
    assert module.setting("budget") == 50_000
    assert module.setting("episodes") == 7
    assert module.setting("stddev") == module.DEFAULTS["stddev"]
    assert module.decayed(0) == module.DEFAULTS["learning_rate"]
    assert module.decayed(1) == 0
    module.FLAGS["episodes"].unparse()


@pytest.mark.parametrize("argument", ["--seeds=a", "--seeds=", "--seeds=-1"])
def test_flags_name_what_was_expected_and_received(argument):
    with pytest.raises(app.UsageError, match="integers for --seeds") as caught:
        run(argument)
    assert argument in str(caught.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env=FrozenLake-v1"], "observations are Box.*Discrete.16."),
        (["--env=Pendulum-v1", "--budget=100"], "one generation.*--budget=100"),
    ],
)
def test_what_can_not_be_trained(arguments, message, tmp_path):
    with pytest.raises(app.UsageError, match=message):
        run(*arguments, f"--out={tmp_path}")
    assert not list(tmp_path.iterdir())
