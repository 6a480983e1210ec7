"""The example on F1: its metric, its choices, its table and its plot."""

import re

import example_scripts
import numpy as np
import pytest
import tensorflow as tf
from absl import app
from absl.testing import flagsaver
from sklearn.metrics import f1_score

SHORT = "--data=breast_cancer", "--epochs=2", "--most_epochs=4"


@pytest.fixture
def module():
    """The example with short trainings; its flags are reset afterwards."""
    example = example_scripts.load("f1")
    saved = flagsaver.save_flag_values(example.FLAGS)
    example.FLAGS(["f1", *SHORT])
    yield example
    flagsaver.restore_flag_values(saved, example.FLAGS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run of two seeds prints, its results by seed, its figure.

    The second one is made up: its F1 is less, by another amount for each arm.
    """
    example = example_scripts.load("f1")
    runs, original = [], example.run_seed

    def made_up(results):
        numbers = np.random.default_rng(0).uniform(0.5, 0.9, (len(results), 4))
        return dict(
            zip(results, map(example.Result._make, numbers), strict=True)
        )

    def kept(name, seed):
        runs.append(made_up(runs[0]) if runs else original(name, seed))
        return runs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "run_seed", kept)
        with example_scripts.kept_figures() as figures:
            folder = tmp_path_factory.mktemp("f1") / "plots"
            output = example_scripts.run(
                "f1", *SHORT, "--seeds=2", f"--plot_dir={folder}"
            )
    return output, runs, figures["f1.png"]


# --- metric ---


def test_loss_is_one_less_f1(module):
    rng = np.random.default_rng(0)
    for share in (0.05, 0.3, 0.8):
        labels = (rng.random(200) < share).astype("float32")
        p = rng.random((200, 1)).astype("float32")
        expected = 1 - f1_score(labels, p[:, 0] > 0.5)
        for shape in ((200,), (200, 1)):
            loss = module.f1_loss(tf.constant(labels.reshape(shape)), p)
            assert loss.shape == ()
            assert float(loss) == pytest.approx(expected, abs=1e-6)
    none = tf.zeros([5, 1])
    assert float(module.f1_loss(none, none)) == 1


def test_best_threshold_is_that_of_all_that_could_be_taken(module):
    rng = np.random.default_rng(1)
    for _ in range(30):
        labels = rng.integers(0, 2, 40)
        labels[0] = 1
        # Many are equal: they can't be told apart by any threshold.
        p = rng.integers(1, 12, 40) / 12
        candidates = np.append((np.arange(0, 12) + 0.5) / 12, 0.0)
        best = max(f1_score(labels, p > t) for t in candidates)
        threshold = module.best_threshold(labels, p)
        assert 0 < threshold < 1
        assert f1_score(labels, p > threshold) == pytest.approx(best)


def test_moved_threshold_makes_the_same_decisions(module):
    data = module.load("breast_cancer", 0)
    model = module.network(data)
    before = module.predict(model, data.test.x)
    threshold = float(np.quantile(before, 0.8))
    module.move_threshold(model, threshold)
    after = module.predict(model, data.test.x)
    clear = np.abs(before - threshold) > 1e-5
    np.testing.assert_array_equal(
        (before > threshold)[clear], (after > 0.5)[clear]
    )
    assert 0 < np.sum(after > 0.5) < len(after)


# --- data and choices ---


@pytest.mark.parametrize(
    "name, sizes, least, most",
    [
        ("make_classification", (4000, 2000, 10000), 0.07, 0.09),
        ("breast_cancer", (284, 142, 143), 0.36, 0.39),
    ],
)
def test_parts_are_stratified_and_apart(module, name, sizes, least, most):
    data = module.load(name, 3)
    rows = np.concatenate([part.x for part in data])
    assert len(np.unique(rows, axis=0)) == len(rows) == sum(sizes)
    for part, size in zip(data, sizes, strict=True):
        assert len(part.x) == len(part.y) == size
        assert least < part.y.mean() < most
    np.testing.assert_allclose(data.train.x.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(data.train.x.std(0), 1, atol=1e-3)
    other = module.load(name, 4)
    assert not np.array_equal(data.train.x, other.train.x)


def test_test_data_chooses_nothing(module):
    """NaN in all of it: every arm learns and chooses the same."""
    data = module.load("breast_cancer", 0)
    hidden = data._replace(
        test=module.Part(data.test.x * np.nan, data.test.y * np.nan)
    )
    for arm in (module.RIVALS[1], module.OURS[0]):
        chosen = []
        for given in (data, hidden):
            start = module.network(given)
            start.set_weights(
                [np.full(w.shape, 0.01) for w in start.get_weights()]
            )
            model = module.trained(arm, start, given, 0)
            threshold = module.tuned_threshold(model, given)
            chosen.append([*model.get_weights(), threshold])
        for one, other in zip(*chosen, strict=True):
            np.testing.assert_array_equal(one, other)
            assert np.all(np.isfinite(one))


def test_class_weights_make_classes_equal(module):
    """Bias and weights of zero: p stays near .5 only if classes are equal."""
    data = module.load("make_classification", 0)
    module.FLAGS.most_epochs = 5
    shares = {
        weighted: module.predict(
            module.by_backpropagation(data, 0, weighted), data.test.x
        ).mean()
        for weighted in (False, True)
    }
    assert shares[False] < 0.15 < 0.25 < shares[True]


# --- table and plot ---


def test_f1_is_that_of_the_network_on_test_data(module):
    data = module.load("breast_cancer", 1)
    model = module.by_backpropagation(data, 1, False)
    result = module.result(model, data, 7.0)
    hidden, bias, kernel, last = model.get_weights()
    outputs = np.maximum(data.test.x @ hidden + bias, 0) @ kernel + last
    p = 1 / (1 + np.exp(-outputs[:, 0]))
    half, tuned = (
        f1_score(data.test.y, p > t) for t in (0.5, result.threshold)
    )
    assert result == pytest.approx((half, tuned, result.threshold, 7.0))


def test_table_has_the_numbers_of_the_runs(module, run):
    output, runs, _ = run
    assert len(runs) == 2 and runs[0] != runs[1]
    rival = max(
        module.RIVALS,
        key=lambda arm: sum(results[arm].tuned for results in runs),
    )
    assert f"less that of '{rival}'" in output
    table = output[output.index("less rival") :]
    rows = re.findall(
        r"^(\S.*?)  +([\d.]+)  +([\d.]+)  +[\d.]+  ([+-][\d.]+) \(([\d.]+)\)"
        r"  +([\d.]+) ([\d.]+) *$",
        table,
        re.M,
    )
    assert [arm for arm, *_ in rows] == list(module.ARMS)
    for arm, *numbers in rows:
        half, mean, less, error, *seeds = map(float, numbers)
        values = np.array([results[arm].tuned for results in runs])
        halves = np.mean([results[arm].half for results in runs])
        differences = values - [results[rival].tuned for results in runs]
        want = [halves, values.mean(), differences.mean()]
        assert [half, mean, less] == pytest.approx(want, abs=6e-4)
        # Of two values: half their distance.
        want = abs(np.diff(differences)[0]) / 2
        assert error == pytest.approx(want, abs=6e-4)
        assert seeds == pytest.approx(values, abs=6e-4)


def test_plot_has_a_dot_for_each_seed(module, run):
    _, runs, figure = run
    (axes,) = figure.axes
    dots = [
        path.get_offsets()
        for path in axes.collections
        if len(path.get_offsets()) == 2
    ]
    for i, (arm, points) in enumerate(zip(module.ARMS, dots, strict=True)):
        values = [results[arm].tuned for results in runs]
        np.testing.assert_allclose(points[:, 0], i)
        np.testing.assert_allclose(points[:, 1], values)


def test_searches_begin_where_the_first_arm_ended(module):
    data = module.load("breast_cancer", 0)
    start = module.network(data)
    module.move_threshold(start, 0.3)
    module.FLAGS.learning_rate = 1e-12
    module.FLAGS.epochs = 1
    for arm in (module.CONTROL, module.OURS[0]):
        model = module.trained(arm, start, data, 0)
        *weights, bias = model.get_weights()
        *expected, first = start.get_weights()
        for one, other in zip(weights, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
        # The decisions of the tuned threshold, for F1 only.
        threshold = module.tuned_threshold(start, data)
        moved = np.log(threshold / (1 - threshold))
        moved = moved if arm in module.OURS else 0
        assert bias[0] == pytest.approx(first[0] - moved, abs=1e-4)


# --- flags ---


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--seeds=0", "--seeds of 1 or more"),
        ("--stddev=0.0", "a positive, finite --stddev"),
        ("--learning_rate=nan", "a positive, finite --learning_rate"),
        ("--weight_decay=-1.0", "a finite --weight_decay of 0 or more"),
    ],
)
def test_flags_name_what_was_expected_and_received(argument, expected):
    with pytest.raises(app.UsageError) as caught:
        example_scripts.run("f1", argument)
    assert f"Expected {expected}" in str(caught.value)
    assert str(caught.value).endswith(f"Received: {argument}")
