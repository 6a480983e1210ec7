"""The example on NDCG@10: its lists, its losses, its choices, its table."""

import re

import example_scripts
import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import app
from absl.testing import flagsaver
from sklearn.datasets import load_digits
from sklearn.metrics import ndcg_score

import keras_vo

SHORT = "--epochs=1", "--rival_epochs=2", "--batch_size=600"


@pytest.fixture
def module():
    """The example with short trainings; its flags are reset afterwards."""
    example = example_scripts.load("ranking")
    saved = flagsaver.save_flag_values(example.FLAGS)
    example.FLAGS(["ranking", *SHORT])
    example.LISTS = 1
    yield example
    example.LISTS = 5
    flagsaver.restore_flag_values(saved, example.FLAGS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run of two seeds prints, its results by seed, its figure.

    The first one trains three of the arms, all else is made up.
    """
    example = example_scripts.load("ranking")
    runs, starts = [], []
    run_seed, train = example.run_seed, example.train
    rng = np.random.default_rng(0)
    trained = example.RIVALS[1], example.FROM_NEW[0], example.GOING_ON[1]

    def kept(seed):
        runs.append(run_seed(seed))
        return runs[-1]

    def watched(arm, data, seed, start=None):
        if seed == 0 and arm in trained:
            model, result = train(arm, data, seed, start)
        else:
            curve = list(rng.uniform(0.4, 0.9, 3))
            model = example.scorer()
            result = example.Result(
                rng.uniform(0.5, 0.9), max(curve), curve, 2.5
            )
        starts.append((seed, arm, start, model))
        return model, result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "run_seed", kept)
        patch.setattr(example, "train", watched)
        patch.setattr(example, "LISTS", 1)
        with example_scripts.kept_figures() as figures:
            folder = tmp_path_factory.mktemp("ranking") / "plots"
            output = example_scripts.run(
                "ranking", *SHORT, "--seeds=2", f"--plot_dir={folder}"
            )
    return output, runs, starts, figures["ranking.png"]


@pytest.fixture
def lists():
    """Relevance and scores [20, 30]; the last query has nothing relevant."""
    rng = np.random.default_rng(0)
    relevance = rng.integers(0, 3, (20, 30)).astype("float32")
    relevance[-1] = 0
    scores = rng.normal(size=(20, 30)).astype("float32")
    return relevance, scores


# --- losses ---


def test_ndcg_is_that_of_sklearn(module, lists):
    relevance, scores = lists
    expected = [
        ndcg_score(2 ** r[None] - 1, s[None], k=10)
        for r, s in zip(relevance, scores, strict=True)
    ]
    found = module.ndcg(relevance, scores)
    assert found.shape == (20,)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(
        module.ndcg_loss(relevance, scores), 1 - found, atol=1e-6
    )
    np.testing.assert_allclose(module.ndcg(relevance, relevance)[:-1], 1)


def test_ndcg_sees_the_first_ten_only(module):
    relevance = np.eye(1, 30, dtype="float32")
    for place in range(30):
        scores = -np.abs(np.arange(30.0) - 0.1)
        scores[0] = scores[place] - 0.5 if place else 0.0
        # As many documents are before it as `place`, and it is relevant.
        value = float(module.ndcg(relevance, scores[None].astype("float32"))[0])
        before = np.sum(scores[1:] > scores[0])
        assert before == place
        expected = 1 / np.log2(place + 2) if place < 10 else 0
        assert value == pytest.approx(expected, abs=1e-6)


def test_rivals_are_as_written_by_loops(module, lists):
    relevance, scores = lists
    r, s = relevance[:3].astype(float), scores[:3].astype(float)
    for q in range(3):
        pairs = [
            (i, j) for i in range(30) for j in range(30) if r[q, i] > r[q, j]
        ]
        losses = [np.log1p(np.exp(s[q, j] - s[q, i])) for i, j in pairs]
        found = module.ranknet(relevance, scores)[q]
        assert float(found) == pytest.approx(np.mean(losses), rel=1e-5)
        gain = 2 ** r[q] - 1
        log_softmax = s[q] - np.log(np.exp(s[q]).sum())
        expected = -np.sum(gain / gain.sum() * log_softmax)
        found = module.softmax(relevance, scores)[q]
        assert float(found) == pytest.approx(expected, rel=1e-5)
        # LambdaRank's weights, by doing what they say: swapping two scores.
        base = ndcg_score(gain[None], s[q][None], k=10)
        total = 0.0
        for (i, j), loss in zip(pairs, losses, strict=True):
            swapped = s[q].copy()
            swapped[[i, j]] = swapped[[j, i]]
            change = ndcg_score(gain[None], swapped[None], k=10) - base
            total += abs(change) * loss
        found = module.lambdarank(relevance, scores)[q]
        assert float(found) == pytest.approx(total, rel=1e-4)


def test_rivals_can_be_differentiated(module, lists):
    relevance, scores = lists
    for loss in module.RIVAL_LOSSES.values():
        x = tf.Variable(scores)
        with tf.GradientTape() as tape:
            value = loss(relevance, x)
        gradient = tape.gradient(value, x).numpy()
        assert value.shape == (20,)
        assert np.all(np.isfinite(gradient)) and np.any(gradient[:-1] != 0)
        np.testing.assert_array_equal(gradient[-1], 0)
        # Down the gradient, more relevant documents go up.
        assert np.sum(gradient * relevance) < 0


# --- data ---


def test_lists_are_what_the_docstring_says(module):
    images, labels = load_digits(return_X_y=True)
    images, labels = images[:100] / 16, labels[:100]
    module.LISTS = 5
    alike = module.look_alikes(images, labels)
    assert np.all(alike != np.arange(10))
    means = [images[labels == c].mean(0) for c in range(10)]
    distances = [np.linalg.norm(means[3] - m) for m in means]
    assert alike[3] == np.argsort(distances)[1]
    lists = module.make_lists(images, labels, alike, np.random.default_rng(0))
    assert lists.x.shape == (500, 30, 64) and lists.y.shape == (500, 30)
    for row in range(0, 500, 77):
        q, documents = row % 100, set()
        for x, relevance in zip(lists.x[row], lists.y[row], strict=True):
            fits = np.abs(np.abs(images - images[q]) - x).max(1) < 1e-6
            (d,) = np.flatnonzero(fits)
            documents.add(d)
            same, similar = (
                labels[d] == labels[q],
                labels[d] == alike[labels[q]],
            )
            assert relevance == (2 if same else 1 if similar else 0)
        assert len(documents) == 30 and q not in documents


def test_parts_have_images_of_their_own(module, monkeypatch):
    parts, made = [], module.make_lists

    def kept(images, labels, alike, rng):
        parts.append(images)
        return made(images, labels, alike, rng)

    monkeypatch.setattr(module, "make_lists", kept)
    module.LISTS = 5
    data = module.load(0)
    assert [len(images) for images in parts] == [1078, 359, 360]
    every = np.concatenate(parts)
    digits = load_digits().data / 16
    np.testing.assert_array_equal(
        np.unique(every, axis=0), np.unique(digits, axis=0)
    )
    assert len(np.unique(digits, axis=0)) == len(every) == 1797
    assert data.test.x.shape == (1800, 30, 64)
    assert not np.array_equal(data.test.y[:360], data.test.y[360:720])
    pixels = data.train.x.reshape(-1, 64)
    np.testing.assert_allclose(pixels.mean(0), 0, atol=1e-3)


# --- training ---


def test_test_data_chooses_nothing(module):
    """NaN in all of it: every kind of arm learns the same."""
    data = module.load(0)
    hidden = data._replace(
        test=module.Lists(data.test.x * np.nan, data.test.y * np.nan)
    )
    start = module.scorer()
    for arm in (module.RIVALS[0], module.GOING_ON[1]):
        given = start if arm in module.GOING_ON else None
        (one, seen), (other, blind) = (
            module.train(arm, part, 0, given) for part in (data, hidden)
        )
        assert seen.curve == blind.curve
        assert np.isfinite(seen.ndcg)
        for w, v in zip(one.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_array_equal(w, v)


def test_the_best_epoch_is_kept(module):
    """Also where all are worse than what training began with."""
    data = module.load(0)
    model = module.scorer()
    best = module.Best(data.validation)
    model.compile("sgd", module.ndcg_loss)
    best.set_model(model)
    notes = []
    for scale in (1.0, -1.0, 0.5):
        weights = [scale * np.abs(w) for w in module.scorer().get_weights()]
        model.set_weights(weights)
        best._note()
        notes.append((best.curve[-1], weights))
    best.on_train_end()
    value, weights = max(notes, key=lambda note: note[0])
    for one, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert module.mean_ndcg(model, data.validation) == pytest.approx(value)


def test_arms_have_the_optimizers_they_name(module):
    module.FLAGS.batch_size = None
    for arm in module.RIVALS:
        optimizer = module.make_optimizer(arm, 1078, 0)
        assert type(optimizer) is keras.optimizers.Adam
        rate = optimizer.get_config()["learning_rate"]["config"]
        assert rate["initial_learning_rate"] == 0.01
        assert rate["decay_steps"] == 2 * 17  # epochs of 1078 / 64 steps
    for arm in (*module.FROM_NEW, *module.GOING_ON):
        optimizer = module.make_optimizer(arm, 1078, 0)
        assert isinstance(optimizer, keras_vo.VOOptimizer)
        assert arm.endswith(optimizer.perturbation)
        stddev = optimizer.search_distribution.stddev
        assert stddev == module.SETTINGS[arm].stddev
    module.FLAGS.stddev = 0.3
    optimizer = module.make_optimizer(module.GOING_ON[0], 1078, 0)
    assert optimizer.search_distribution.stddev == 0.3


# --- table and plot ---


def test_searches_go_on_from_the_best_rival_on_validation(module, run):
    _, runs, starts, _ = run
    for seed, results in enumerate(runs):
        models = {arm: m for s, arm, _, m in starts if s == seed}
        best = max(module.RIVALS, key=lambda arm: results[arm].validation)
        for s, arm, start, _ in starts:
            if s == seed:
                expected = models[best] if arm in module.GOING_ON else None
                assert start is expected


def test_table_has_the_numbers_of_the_runs(module, run):
    output, runs, _, _ = run
    assert len(runs) == 2 and runs[0] != runs[1]
    rival = max(
        module.RIVALS,
        key=lambda arm: sum(results[arm].ndcg for results in runs),
    )
    assert f"differences to '{rival}'" in output
    rows = re.findall(
        r"^(\S.*?)  +([\d.]+)  ([+-][\d.]+) \(([\d.]+)\)  +(-|[+-][\d.]+)"
        r"(?: \([\d.]+\))?  +([\d.]+)  ([\d.]+) ([\d.]+) *$",
        output,
        re.M,
    )
    assert [arm for arm, *_ in rows] == list(module.ARMS)
    for arm, mean, less, error, begun, seconds, *seeds in rows:
        values = np.array([results[arm].ndcg for results in runs])
        differences = values - [results[rival].ndcg for results in runs]
        want = [values.mean(), differences.mean()]
        assert [float(mean), float(less)] == pytest.approx(want, abs=6e-5)
        # Of two values: half their distance.
        want = abs(np.diff(differences)[0]) / 2
        assert float(error) == pytest.approx(want, abs=6e-5)
        assert list(map(float, seeds)) == pytest.approx(values, abs=6e-5)
        want = np.mean([results[arm].seconds for results in runs])
        assert float(seconds) == pytest.approx(want, abs=0.06)
        if arm in module.GOING_ON:
            starts = [
                max(
                    (results[a] for a in module.RIVALS),
                    key=lambda result: result.validation,
                ).ndcg
                for results in runs
            ]
            want = np.mean(values - starts)
            assert float(begun) == pytest.approx(want, abs=6e-5)
        else:
            assert begun == "-"


def test_plot_has_the_seeds_and_the_curves(module, run):
    _, runs, _, figure = run
    left, right = figure.axes
    dots = [
        path.get_offsets()
        for path in left.collections
        if len(path.get_offsets()) == 2
    ]
    for i, (arm, points) in enumerate(zip(module.ARMS, dots, strict=True)):
        values = [results[arm].ndcg for results in runs]
        np.testing.assert_allclose(points[:, 1], i)
        np.testing.assert_allclose(points[:, 0], values)
    curves = [line.get_ydata() for line in right.lines]
    for arm, curve in zip(module.ARMS, curves, strict=True):
        np.testing.assert_allclose(curve, runs[0][arm].curve)
        assert max(curve) == pytest.approx(runs[0][arm].validation)


# --- flags ---


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--seeds=0", "--seeds of 1 or more"),
        ("--documents=9", "--documents in [10, 300]"),
        ("--learning_rate=nan", "a positive, finite --learning_rate"),
        ("--rival_rate=0.0", "a positive, finite --rival_rate"),
    ],
)
def test_flags_name_what_was_expected_and_received(argument, expected):
    with pytest.raises(app.UsageError) as caught:
        example_scripts.run("ranking", argument)
    assert f"Expected {expected}" in str(caught.value)
    assert str(caught.value).endswith(f"Received: {argument}")
