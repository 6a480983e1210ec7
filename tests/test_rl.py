"""keras_vo.rl: episodes against a plain loop, spaces, statistics, budgets."""

import signal
import sys

import gymnasium
import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from gymnasium import spaces

import keras_vo
from keras_vo.rl.environments import Environments, maker
from keras_vo.rl.normalization import Statistics
from keras_vo.rl.spaces import actions_of


class Walk(gymnasium.Env):
    """A random walk that ends beyond 3; the reward is the last action.

    Copies write down what happens to them.
    """

    made = []

    def __init__(self, actions=None, observations=None):
        box = spaces.Box
        self.action_space = box(-1, 1, (1,)) if actions is None else actions
        if observations is None:
            observations = box(-9, 9, (2,))
        self.observation_space = observations
        self.seeds, self.steps = [], 0
        self.closed = False
        Walk.made.append(self)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.place, self.time = 0.0, 0
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        self.time += 1
        push = float(np.sum(action))
        self.place += push + 0.5 * self.np_random.normal()
        over = abs(self.place) > 3
        return self._observation(), push, over, self.time >= 20, {}

    def _observation(self):
        return np.array([self.place, 1.0], np.float32)

    def close(self):
        self.closed = True


@pytest.fixture(autouse=True)
def no_copies():
    Walk.made.clear()


def policy(outputs=1, normalized=False, inputs=(2,), seed=0):
    keras.utils.set_random_seed(seed)
    first = [keras_vo.rl.ObservationNormalization()] if normalized else []
    return keras.Sequential(
        [keras.Input(inputs), *first, keras.layers.Dense(outputs)]
    )


def optimizer(**kwargs):
    settings = {"inner_optimizer": keras_vo.rl.ClipUp(0.1)} | kwargs
    return models.make_optimizer(**settings)


def played_one_by_one(model, population, seeds, make=Walk):
    """Returns and lengths of members, each by itself."""
    before = model.get_weights()
    returns, lengths, seen = [], [], []
    for weights, own in zip(population, seeds, strict=True):
        for variable, w in zip(model.trainable_variables, weights, strict=True):
            variable.assign(w)
        for seed in own:
            environment = make()
            observation, _ = environment.reset(seed=int(seed))
            total, length, ended = 0.0, 0, False
            while not ended:
                seen.append(observation)
                output = np.asarray(model(observation[None]))[0]
                action = np.clip(output, -1, 1)
                observation, reward, over, late, _ = environment.step(action)
                total, length = total + reward, length + 1
                ended = over or late
            returns.append(total)
            lengths.append(length)
    model.set_weights(before)
    shape = (len(population), -1)
    return np.reshape(returns, shape), np.reshape(lengths, shape), seen


# --- episodes ---


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("episodes", [1, 3])
def test_all_at_once_are_one_by_one(episodes, common):
    model = policy()
    rollouts = keras_vo.rl.Rollouts(
        Walk, model, episodes=episodes, common_random_numbers=common, seed=3
    )
    population = optimizer().ask(model.trainable_variables)
    played = rollouts.play(population, range(8))
    seeds = [
        [copy.seeds[0] for copy in Walk.made[n * episodes :][:episodes]]
        for n in range(8)
    ]
    assert all(len(copy.seeds) == 1 for copy in Walk.made)
    assert len({tuple(own) for own in seeds}) == (1 if common else 8)
    assert len(set(seeds[0])) == episodes
    # Those that have ended are not stepped.
    assert [copy.steps for copy in Walk.made] == list(played.lengths.flat)
    assert len(set(played.lengths.flat)) > 2
    returns, lengths, seen = played_one_by_one(model, population, seeds)
    np.testing.assert_allclose(played.returns, returns, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(played.lengths, lengths)
    assert played.statistics.count == len(seen)
    np.testing.assert_allclose(
        played.statistics.mean, np.mean(seen, axis=0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        played.statistics.squares,
        len(seen) * np.var(seen, axis=0),
        rtol=1e-3,
        atol=1e-6,
    )
    # Some of them alone are the same.
    some = rollouts.play(population, [6, 2])
    np.testing.assert_allclose(some.returns, played.returns[[6, 2]], rtol=1e-5)


def test_a_step_is_that_of_mean_returns():
    model, other = policy(), policy()
    rollouts = keras_vo.rl.Rollouts(Walk, model, episodes=2)
    search, told = optimizer(), optimizer()
    for _ in range(3):
        population = told.ask(other.trainable_variables)
        scores = rollouts.play(population, range(8)).returns.mean(1)
        told.tell(population, scores, maximize=True)
        report = rollouts.step(search)
        np.testing.assert_allclose(report.losses, -scores)
    models.assert_same_state(model.get_weights(), other.get_weights())
    steps = sum(copy.steps for copy in Walk.made)
    assert rollouts.interactions == steps / 2  # played twice


def test_generations_have_episodes_of_their_own():
    model, search = policy(), optimizer()
    rollouts = keras_vo.rl.Rollouts(Walk, model, seed=1)
    rollouts.step(search)
    rollouts.step(search)
    rollouts.evaluate(episodes=4, seed=0)
    rollouts.evaluate(episodes=2, seed=1)
    seeds = [seed for copy in Walk.made for seed in copy.seeds]
    assert len(set(Walk.made[0].seeds)) == 4
    assert len(set(seeds)) == 1 + 1 + 4 + 2
    again = keras_vo.rl.Rollouts(Walk, model, seed=1)
    first = Walk.made[-1]
    again.play(optimizer().ask(model.trainable_variables), [0])
    assert first.seeds == Walk.made[0].seeds[:1]
    other = keras_vo.rl.Rollouts(Walk, model, seed=2)
    other.play(optimizer().ask(model.trainable_variables), [0])
    assert Walk.made[-1].seeds != first.seeds


def test_evaluation_is_that_of_the_model():
    model = policy()
    rollouts = keras_vo.rl.Rollouts(Walk, model, action_noise=5.0)
    returns = rollouts.evaluate(episodes=5, seed=7)
    seeds = [[copy.seeds[0] for copy in Walk.made[:5]]]
    expected, _, _ = played_one_by_one(
        model, [[v.numpy() for v in model.trainable_variables]], seeds
    )
    np.testing.assert_allclose(returns, expected[0], rtol=1e-5, atol=1e-5)
    assert rollouts.interactions == 0
    rollouts.close()
    assert all(copy.closed for copy in Walk.made[:5])


def test_a_budget_of_time_steps():
    """Members are evaluated until it is spent, pairs together."""
    model = policy()
    search = optimizer(population_size=64)
    rollouts = keras_vo.rl.Rollouts(Walk, model, num_interactions=200)
    for generation in range(3):
        before = rollouts.interactions
        report = rollouts.step(search)
        spent = rollouts.interactions - before
        known = ~np.isnan(report.losses)
        assert 200 <= spent <= 200 + 8 * 20  # 8 members were under way
        np.testing.assert_array_equal(known[:32], known[32:])
        assert 8 <= report.evaluations < 64
        assert report.generation == generation
        assert report.updated
    all_of_them = keras_vo.rl.Rollouts(Walk, model, num_interactions=10**6)
    assert all_of_them.step(search).missing == 0


def test_time_limits():
    model = policy()
    for env, options in ((Walk, {}), ("CartPole-v1", {"inputs": (4,)})):
        own = model if env is Walk else policy(2, **options)
        rollouts = keras_vo.rl.Rollouts(env, own, max_episode_steps=4)
        population = optimizer().ask(own.trainable_variables)
        lengths = rollouts.play(population, range(8)).lengths
        assert lengths.max() == 4


def test_action_noise_is_common_too():
    model = policy()
    zeros = [np.zeros_like(w) for w in model.get_weights()]
    model.set_weights(zeros)
    tiny = keras_vo.GaussianSearchDistribution("fixed", stddev=1e-6)
    population = optimizer(search_distribution=tiny).ask(
        model.trainable_variables
    )
    returns = {}
    for common in (True, False):
        rollouts = keras_vo.rl.Rollouts(
            Walk,
            model,
            action_noise=0.5,
            common_random_numbers=common,
        )
        returns[common] = rollouts.play(population, range(8)).returns
        repeated = rollouts.play(population, range(8)).returns
        np.testing.assert_allclose(repeated, returns[common], rtol=1e-5)
    assert np.ptp(returns[True]) < 1e-3 < np.ptp(returns[False])
    assert np.all(np.abs(returns[True]) > 0)


def test_resumed_in_mid_search_from_a_keras_file(tmp_path):
    """The same trajectory, statistics of observations included."""

    def made():
        model = policy(normalized=True)
        model.compile(optimizer=optimizer(keep_best=True))
        return model

    def steps(model, count):
        rollouts = keras_vo.rl.Rollouts(Walk, model, num_interactions=60)
        for _ in range(count):
            rollouts.step(model.optimizer)

    model = made()
    steps(model, 2)
    model.save(tmp_path / "policy.keras")
    loaded = keras.models.load_model(tmp_path / "policy.keras")
    steps(model, 2)
    steps(loaded, 2)
    models.assert_same_state(
        [v.numpy() for v in loaded.variables],
        [v.numpy() for v in model.variables],
    )
    models.assert_same_state(
        models.search_state(loaded), models.search_state(model)
    )


def test_the_monitor_sees_it():
    model, search = policy(), optimizer()
    rollouts = keras_vo.rl.Rollouts(Walk, model)
    search.build(model.trainable_variables)
    monitor = keras_vo.callbacks.SearchMonitor("step")
    with monitor.attached(search):
        for _ in range(3):
            report = rollouts.step(search)
            monitor.record()
    assert monitor.history["evaluations"] == [8, 16, 24]
    np.testing.assert_allclose(monitor.history["kl"][-1], report.kl)


@pytest.mark.slow
def test_cart_pole_is_learned():
    """Eight seeds gave 319 to 500 within 20,000 time steps; at first it is
    9."""
    model = policy(2, normalized=True, inputs=(4,))
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    search = optimizer(population_size=32)
    rollouts = keras_vo.rl.Rollouts("CartPole-v1", model)
    while rollouts.interactions < 20_000:
        rollouts.step(search)
    assert rollouts.evaluate(20).mean() > 200


# --- spaces ---

SPACES = {
    "box": (
        spaces.Box(-1.0, 2.0, (2,)),
        [[-3.0, 5.0], [0.5, -0.5]],
        [[-1.0, 2.0], [0.5, -0.5]],
    ),
    "integers": (
        spaces.Box(-128, 127, (2,), np.int8),
        [[0.6, -300.0], [126.7, 3.4]],
        [[1, -128], [127, 3]],
    ),
    "unbounded": (spaces.Box(-np.inf, np.inf, (1,)), [[7.0]], [[7.0]]),
    "discrete": (spaces.Discrete(3), [[1, 5, 2], [9, 0, 0]], [1, 0]),
    "from -1": (spaces.Discrete(3, start=-1), [[1, 5, 2]], [0]),
    "several": (spaces.MultiDiscrete([2, 3]), [[0, 1, 5, 2, 3]], [[1, 0]]),
    "binary": (spaces.MultiBinary(3), [[-1.0, 2.0, 0.5]], [[0, 1, 1]]),
}


@pytest.mark.parametrize("name", SPACES)
def test_outputs_become_actions(name):
    """And with noise some others, all of the space."""
    space, outputs, expected = SPACES[name]
    outputs = np.array(outputs, float)
    rng = np.random.default_rng(0)
    actions = actions_of(space, 0.0)
    assert actions.shape == outputs.shape[1:]
    np.testing.assert_array_equal(actions.choose(outputs, None), expected)
    noise = np.stack([actions.noise(rng) for _ in outputs])
    chosen = actions.choose(outputs, noise)  # whose size is 0
    np.testing.assert_array_equal(chosen, expected)
    noisy = actions_of(space, 0.7)
    others = 0
    for _ in range(100):
        noise = np.stack([noisy.noise(rng) for _ in outputs])
        for action, without in zip(
            noisy.choose(outputs, noise), expected, strict=True
        ):
            assert space.contains(action)
            others += np.any(action != without)
    # Of 3 choices, with probability .7, 47% are others: 93 of 200 or more.
    assert others > 20


def test_episodes_of_each_space():
    for actions, outputs in (
        (spaces.Discrete(2), 2),
        (spaces.MultiDiscrete([2, 3]), 5),
        (spaces.MultiBinary(2), 2),
        (spaces.Box(-1, 1, (2, 3)), None),
    ):
        for noise in (0.0, 0.3):
            model = policy(outputs or 6)
            if outputs is None:
                model.add(keras.layers.Reshape((2, 3)))
            rollouts = keras_vo.rl.Rollouts(
                lambda a=actions: Walk(a), model, action_noise=noise
            )
            assert rollouts.step(optimizer()).missing == 0


class Discretely(Walk):
    def _observation(self):
        return np.int64(5 + np.clip(round(self.place), -3, 3))


def test_discrete_observations_are_one_hot():
    observations = spaces.Discrete(7, start=2)
    environments = Environments(
        maker(Discretely, None, {"observations": observations})
    )
    assert environments.shape == (7,)
    np.testing.assert_array_equal(
        environments.reset(np.array([1])), [np.eye(7)[3]]
    )
    rollouts = keras_vo.rl.Rollouts(
        Discretely,
        policy(inputs=(7,), normalized=True),
        env_options={"observations": observations},
    )
    assert rollouts.step(optimizer()).missing == 0


WRONG = {
    "outputs": (
        {"policy": policy(3, inputs=(4,))},
        ValueError,
        r"outputs \(1, 2\), for.*Discrete\(2\). Received: outputs \(1, 3\)",
    ),
    "inputs": (
        {"policy": policy(2, inputs=(5,))},
        ValueError,
        r"from inputs \(1, 4\).*whose inputs are \(None, 5\)",
    ),
    "observations": (
        {"env": lambda: Walk(observations=spaces.Tuple([]))},
        ValueError,
        r"FlattenObservation.*Received: observation_space=Tuple",
    ),
    "actions": (
        {"env": lambda: Walk(spaces.Tuple([]))},
        ValueError,
        "Received: action_space=Tuple",
    ),
    "an environment": ({"env": Walk()}, TypeError, "a function that makes"),
    "a number": ({"env": 3}, TypeError, "Received: env=3"),
    "episodes": ({"episodes": 0}, ValueError, "`episodes`"),
    "budget": ({"num_interactions": 0.5}, ValueError, "`num_interactions`"),
    "limit": ({"max_episode_steps": -1}, ValueError, "`max_episode_steps`"),
    "noise": ({"action_noise": -1}, ValueError, "`action_noise`"),
    "infinite": ({"action_noise": np.inf}, ValueError, "`action_noise`"),
    "probability": ({"action_noise": 1.5}, ValueError, "a probability"),
    "a layer": (
        {"policy": keras.layers.Dense(2)},
        TypeError,
        "a Keras model as the policy",
    ),
    "seed": ({"seed": -1}, ValueError, "`seed`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    arguments, error, message = WRONG[name]
    arguments = {
        "env": "CartPole-v1",
        "policy": policy(2, inputs=(4,)),
    } | arguments
    with pytest.raises(error, match=message):
        keras_vo.rl.Rollouts(**arguments)


def test_without_gymnasium(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"pip install keras_vo\[rl\]"):
        keras_vo.rl.Rollouts("CartPole-v1", policy(2, inputs=(4,)))


class Noisy(Walk):
    """Its own draws, and the actions that it is given."""

    pairs = []

    def step(self, action):
        Noisy.pairs.append((self.np_random.normal(), float(action[0])))
        self.time += 1
        return self._observation(), 0.0, False, self.time >= 20, {}


def test_action_noise_is_not_the_environments():
    model = policy()
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    tiny = keras_vo.GaussianSearchDistribution("fixed", stddev=1e-6)
    rollouts = keras_vo.rl.Rollouts(Noisy, model, action_noise=0.2, episodes=9)
    rollouts.step(optimizer(search_distribution=tiny, population_size=2))
    draws, actions = np.transpose(Noisy.pairs)
    # 180 independent pairs: beyond .4 in one of 10^7 runs; it was 1.
    assert abs(np.corrcoef(draws, actions)[0, 1]) < 0.4


class Undefined(Walk):
    """Of members that go far, observations are NaN at last."""

    def _observation(self):
        lost = abs(self.place) > 2
        return np.array([np.nan if lost else self.place, 1.0], np.float32)


def test_observations_that_are_not_finite():
    """Members that see them are the worst; statistics leave them out."""
    model, search = policy(normalized=True), optimizer()
    rollouts = keras_vo.rl.Rollouts(Undefined, model)
    reports = [rollouts.step(search) for _ in range(3)]
    assert 0 < sum(report.nonfinite for report in reports) < 24
    assert all(report.missing == 0 for report in reports)
    assert np.all(np.isfinite(model.layers[0].statistics.mean))
    assert np.all(np.isfinite(model.get_weights()[-1]))


def test_rewards_and_spaces_of_other_types():
    class Box(spaces.Box):
        pass

    class Arrays(Walk):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            return observation, np.array([reward], np.float32), *rest

    rollouts = keras_vo.rl.Rollouts(
        lambda: Arrays(Box(-1, 1, (1,)), Box(-9, 9, (2,))), policy()
    )
    assert rollouts.step(optimizer()).missing == 0

    class Scalars(Walk):
        def _observation(self):
            return 3.0

    rollouts = keras_vo.rl.Rollouts(Scalars, policy())
    with pytest.raises(ValueError, match=r"space, \(2,\). Received: 3.0"):
        rollouts.step(optimizer())


def test_where_observations_are_normalized():
    """In a model of the model too; once, and first."""

    def nested():
        inner = policy(3, normalized=True)
        return keras.Sequential(
            [keras.Input((2,)), inner, keras.layers.Dense(1)]
        )

    model = nested()
    rollouts = keras_vo.rl.Rollouts(Walk, model)
    rollouts.step(optimizer())
    count = model.layers[0].layers[0].statistics.count
    assert count == rollouts.interactions
    layer = keras_vo.rl.ObservationNormalization
    for layers in (
        [keras.layers.Dense(3), layer(), keras.layers.Dense(1)],
        [layer(), keras.layers.Dense(2), layer(), keras.layers.Dense(1)],
    ):
        wrong = keras.Sequential([keras.Input((2,)), *layers])
        with pytest.raises(ValueError, match="one ObservationNormalization"):
            keras_vo.rl.Rollouts(Walk, wrong)
    # As wide as the observations, but they are others.
    behind = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(2), layer(name="second")]
    )
    behind.add(keras.layers.Dense(1))
    with pytest.raises(ValueError, match="Received: 'second', whose inputs"):
        keras_vo.rl.Rollouts(Walk, behind)


def test_what_environments_may_not_return():
    """What is wrong after a step names the member whose step it was."""

    class Short(Walk):
        def step(self, action):
            observation, *rest = super().step(action)
            return observation[:1], *rest

    class Pair(Walk):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, np.zeros(2), *rest

    for env, message in (
        (Short, r"space, \(2,\). Received: .* of shape \(1,\)"),
        (Pair, r"a reward of one number. Received: .* of shape \(2,\)"),
    ):
        search = optimizer()
        with pytest.raises(ValueError, match=message) as caught:
            keras_vo.rl.Rollouts(env, policy()).step(search)
        assert "member 0 of 8, generation 0, episode 0" in str(
            caught.value.__notes__
        )
    same = Walk()
    rollouts = keras_vo.rl.Rollouts(lambda: same, policy())
    with pytest.raises(ValueError, match="returned .*Walk.* again"):
        rollouts.step(optimizer())


class Unrewarded(Walk):
    """Rewards of those that go far to one side are NaN."""

    def step(self, action):
        observation, reward, *rest = super().step(action)
        return observation, np.nan if self.place > 2 else reward, *rest


def test_rewards_that_are_nan():
    """Such members are the worst ones, and it is said."""
    rollouts = keras_vo.rl.Rollouts(Unrewarded, policy())
    search = optimizer()
    with pytest.warns(RuntimeWarning, match="Rewards of an environment are"):
        reports = [rollouts.step(search) for _ in range(3)]
    assert 0 < sum(report.nonfinite for report in reports) < 24
    assert all(report.missing == 0 for report in reports)


def test_a_policy_that_never_acts():
    """A loop over time steps would not end."""
    model = policy()
    model.set_weights([np.full_like(w, np.nan) for w in model.get_weights()])
    rollouts, search = keras_vo.rl.Rollouts(Walk, model), optimizer()
    with pytest.raises(ValueError, match="so no one has acted"):
        rollouts.step(search)
    model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    assert rollouts.step(search).generation == 0


def test_mixed_precision_wraps_the_optimizer():
    keras.config.set_dtype_policy("mixed_float16")
    model = policy(normalized=True)
    model.compile(optimizer=optimizer())
    assert not hasattr(model.optimizer, "ask")
    report = keras_vo.rl.Rollouts(Walk, model).step(model.optimizer)
    assert report.updated


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_until_the_statistics_are_those_of_the_step():
    class Interrupted(keras_vo.VOOptimizer):
        def tell(self, *args, **kwargs):
            report = super().tell(*args, **kwargs)
            signal.raise_signal(signal.SIGINT)
            return report

    model = policy(normalized=True)
    search = Interrupted(keras_vo.rl.ClipUp(0.1), population_size=8, seed=0)
    rollouts = keras_vo.rl.Rollouts(Walk, model)
    with pytest.raises(KeyboardInterrupt):
        rollouts.step(search)
    assert int(search.generations) == 1
    assert rollouts.interactions > 0
    assert model.layers[0].statistics.count == rollouts.interactions


def test_a_budget_below_an_episode():
    """Two members at least: one alone is compared with no one."""
    for antithetic in (True, False):
        search = optimizer(antithetic=antithetic)
        rollouts = keras_vo.rl.Rollouts(Walk, policy(), num_interactions=1)
        report = rollouts.step(search)
        assert report.updated
        assert report.evaluations == 2


def test_a_frozen_policy_is_evaluated():
    model = policy()
    model.trainable = False
    rollouts = keras_vo.rl.Rollouts(Walk, model)
    assert rollouts.evaluate(3).shape == (3,)
    for arguments in ({"episodes": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match="must be"):
            rollouts.evaluate(**arguments)
    with pytest.raises(TypeError, match="Expected a VOOptimizer"):
        rollouts.step(keras.optimizers.Adam())


def test_an_environment_that_raises():
    class Fails(Walk):
        def step(self, action):
            raise ArithmeticError("of the environment")

    rollouts = keras_vo.rl.Rollouts(Fails, policy())
    search = optimizer()
    with pytest.raises(ArithmeticError, match="^of the env") as error:
        rollouts.step(search)
    note = "(keras_vo: member 0 of 8, generation 0, episode 0)"
    assert error.value.__notes__ == [note]
    assert int(search.generations) == 0


# --- statistics of observations ---


def test_statistics_of_parts_are_those_of_all():
    rng = np.random.default_rng(0)
    x = 1e4 + rng.normal(size=(50, 3)) * [1, 10, 0]
    parts = [
        Statistics.of_sums(
            len(p), (p - c).sum(0), ((p - c) ** 2).sum(0), np.full(3, c)
        )
        for p, c in ((x[:7], 0.0), (x[7:8], 1e4), (x[8:], 1e4))
    ]
    both = parts[0].and_also(parts[1]).and_also(parts[2])
    assert both.count == 50
    np.testing.assert_allclose(both.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(both.squares, 50 * x.var(0), atol=1e-4)


def test_normalization(tmp_path):
    model = policy(normalized=True, inputs=(3,))
    layer = model.layers[0]
    x = np.random.default_rng(0).normal(size=(40, 3)) * [1, 50, 0] + [3, 0, 7]
    x = x.astype("float32")
    np.testing.assert_array_equal(layer(x / 20), x / 20)  # before an update
    layer.update(
        Statistics(np.float64(40), x.mean(0, float), 40.0 * x.var(0, float))
    )
    outputs = np.asarray(layer(x))
    np.testing.assert_allclose(outputs.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(outputs.std(0), [1, 1, 0], atol=1e-4)
    assert np.max(np.asarray(layer(100 * x))) == 10
    assert len(model.trainable_variables) == 2
    model.save(tmp_path / "policy.keras")
    loaded = keras.models.load_model(tmp_path / "policy.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    half = keras_vo.rl.ObservationNormalization(dtype="mixed_float16")
    half.build((None, 1))
    half.update(Statistics(np.float64(9), np.array([5e3]), np.array([9.0])))
    got = half(np.array([[5000.5], [5001.0]]))
    assert got.dtype == "float16"
    np.testing.assert_allclose(got[:, 0], [0.5, 1.0])
    free = keras_vo.rl.ObservationNormalization(clip=None)
    np.testing.assert_array_equal(free(100 * x), 100 * x)
    assert free.get_config()["clip"] is None


def test_statistics_are_updated_after_the_generation():
    model, search = policy(normalized=True), optimizer()
    layer = model.layers[0]
    rollouts = keras_vo.rl.Rollouts(Walk, model)
    rollouts.step(search)
    assert layer.statistics.count == rollouts.interactions
    rollouts.step(search)
    assert layer.statistics.count == rollouts.interactions
    np.testing.assert_allclose(layer.statistics.mean[1], 1.0)
    assert tf.math.is_finite(layer.statistics.mean[0])
