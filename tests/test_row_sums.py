"""Losses of the whole batch that are taken apart at their sums over rows."""

import functools

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo
from keras_vo.evaluation import whole_batch
from keras_vo.evaluation.row_sums import RowSums
from keras_vo.evaluation.whole_batch import WholeBatch

B, K = 12, 4
LABELS = tf.constant(np.arange(B) % K)
ONE_HOT = tf.one_hot(LABELS, K, dtype=tf.float64)
EYE = tf.eye(K, dtype=tf.float64)
PER_ROW = tf.linspace(tf.constant(0.5, tf.float64), 2.0, B)


def predictions(seed, shape=(B, K)):
    rng = np.random.default_rng(seed)
    return tf.constant(rng.uniform(0.05, 0.95, shape))


def said(p):
    return tf.one_hot(tf.argmax(p, -1), K, dtype=p.dtype)


def score(name, c):
    """The macro F1, Matthews' correlation or kappa of counts [K, K]."""
    total, hits = tf.reduce_sum(c), tf.linalg.trace(c)
    rows, columns = tf.reduce_sum(c, 1), tf.reduce_sum(c, 0)
    by_chance = tf.reduce_sum(rows * columns)
    return {
        "f1": tf.reduce_mean(2 * tf.linalg.diag_part(c) / (rows + columns)),
        "kappa": (total * hits - by_chance) / (total**2 - by_chance),
        "mcc": (total * hits - by_chance)
        / tf.sqrt(total**2 - tf.reduce_sum(rows**2))
        / tf.sqrt(total**2 - tf.reduce_sum(columns**2)),
    }[name]


def confusion(p):
    counts = tf.math.confusion_matrix(LABELS, tf.argmax(p, -1), K)
    return tf.cast(counts, p.dtype)


def at_rank(p):
    """Mean NDCG@2, a row being a query's documents."""
    best = tf.math.top_k(p, 2).indices
    gains = tf.gather(ONE_HOT, best, batch_dims=1)
    return tf.reduce_mean(gains @ tf.constant([[1.0], [0.63]], p.dtype))


def expected_cost(p):
    costs = tf.constant(np.arange(K * K, dtype=float).reshape(K, K))
    which = tf.stack([LABELS, tf.argmax(p, -1)], axis=-1)
    return tf.reduce_mean(tf.gather_nd(costs, which))


@tf.function
def traced_dice(p):
    hits = tf.reduce_sum(p * ONE_HOT)
    return 1 - 2 * hits / (tf.reduce_sum(p) + tf.reduce_sum(ONE_HOT))


def shaped(p):
    """Much of what may be done to a row."""
    p = tf.transpose(tf.tile(p[:, None, :], [1, 3, 1]), [0, 2, 1])
    p = tf.concat([p, tf.cumsum(p, axis=1)], axis=-1)[..., 1:5]
    p = tf.pad(tf.reverse(p, [2]), [[0, 0], [1, 0], [0, 0]], constant_values=2)
    p = tf.stack(tf.unstack(p, axis=2), axis=1)
    p = tf.squeeze(p[:, :, None], axis=[2])
    p = tf.gather(
        tf.reshape(p, [-1, p.shape[1] * p.shape[2]]), [1, 5, 3], axis=1
    )
    a, b = tf.split(p, [1, 2], axis=1)
    weights = tf.constant([[0.3], [0.9]], p.dtype)
    return tf.reduce_mean(tf.sigmoid(a + b @ weights)) ** 3


APART = {
    "F1 by sums": lambda p: score(
        "f1", tf.einsum("bi,bj->ij", ONE_HOT, said(p))
    ),
    "F1 by a confusion matrix": lambda p: score("f1", confusion(p)),
    "kappa by a product": lambda p: score(
        "kappa", tf.matmul(ONE_HOT, said(p), transpose_a=True)
    ),
    "Matthews by a product": lambda p: score(
        "mcc", tf.transpose(ONE_HOT) @ said(p)
    ),
    "tensordot": lambda p: tf.linalg.det(
        EYE + tf.tensordot(ONE_HOT, p, [[0], [0]])
    ),
    "product of predictions": lambda p: tf.linalg.logdet(
        tf.matmul(p, p, transpose_a=True)
    ),
    "balanced error": lambda p: tf.norm(
        tf.reduce_sum(ONE_HOT * (1 - said(p)), 0) / tf.reduce_sum(ONE_HOT, 0)
    ),
    "segments": lambda p: tf.norm(
        tf.math.unsorted_segment_sum(p, tf.argmax(p, -1), K)
    ),
    "NDCG of rows": at_rank,
    "costs": expected_cost,
    "costs of what was said": lambda p: tf.reduce_mean(
        tf.gather(tf.constant([0.5, 1, 2, 7]), tf.argmax(p, -1))
    ),
    "root mean square": lambda p: tf.sqrt(
        tf.reduce_mean(tf.square(p[:, 1] - ONE_HOT[..., 1]) * PER_ROW)
    ),
    "kept axes": lambda p: tf.reduce_sum(
        tf.reduce_mean(p, axis=[0, 1], keepdims=True) ** 2
    ),
    "integers": lambda p: (
        tf.cast(tf.reduce_sum(tf.cast(10 * p, tf.int32)), tf.float64) / 7
    ),
    "half the squares": lambda p: tf.sqrt(tf.nn.l2_loss(p)),
    "classes of a softmax": lambda p: tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(LABELS, p)
    ),
    "in top k": lambda p: tf.reduce_mean(
        tf.cast(tf.math.in_top_k(LABELS, tf.cast(p, tf.float32), 2), p.dtype)
    ),
    "traced by the user": traced_dice,
    "Keras's mean": lambda p: keras.losses.MeanSquaredError()(ONE_HOT, p),
    "shapes": shaped,
    "parts of rows against all labels": lambda p: tf.reduce_mean(
        tf.abs(p[:, :1] - PER_ROW)
    ),
    "two sums in one": lambda p: tf.reduce_sum(p) + tf.reduce_mean(p) ** 2,
    "a sum of sums": lambda p: tf.reduce_logsumexp(tf.reduce_sum(p, 0)),
    "rows moved": lambda p: tf.reduce_mean(
        tf.scatter_nd(tf.range(B)[::-1, None], p, [B, K]) * ONE_HOT
    ),
    "classes from the shape": lambda p: score(
        "kappa",
        tf.cast(
            tf.math.confusion_matrix(LABELS, tf.argmax(p, -1), tf.shape(p)[1]),
            p.dtype,
        ),
    ),
    "size": lambda p: tf.reduce_sum(p) / tf.cast(tf.size(p), p.dtype),
}
# What mixes rows but by a sum, or may.
TOGETHER = {
    "pairs": lambda p: tf.reduce_mean(
        tf.nn.relu(p[:, 0][None] - p[:, 1][:, None])
    ),
    "pairs by broadcasting": lambda p: tf.reduce_mean(
        tf.nn.relu(p[:, 0] - p[:, :1])
    ),
    "product with the transposed": lambda p: tf.reduce_mean(
        tf.matmul(p, p, transpose_b=True) ** 2
    ),
    "less the mean": lambda p: tf.reduce_mean(tf.abs(p - tf.reduce_mean(p, 0))),
    "deviation": tf.math.reduce_std,
    "worst": lambda p: tf.reduce_max(tf.reduce_sum(p, -1)),
    "sorted": lambda p: tf.reduce_sum(tf.sort(p[:, 0]) * PER_ROW),
    "softmax over rows": lambda p: tf.reduce_mean(
        tf.nn.softmax(p, axis=0) ** 2
    ),
    "cumulated": lambda p: tf.reduce_mean(tf.cumsum(p, axis=0) ** 2),
    "reversed": lambda p: tf.reduce_mean(p * p[::-1]),
    "every other row": lambda p: tf.reduce_mean(p[::2]) ** 2,
    "but the first": lambda p: tf.reduce_mean(p[1:] * p[:-1]),
    "rows side by side": lambda p: tf.reduce_mean(
        tf.reduce_prod(tf.reshape(p, [-1, 2 * K]), -1)
    ),
    "flat": lambda p: tf.reduce_mean(tf.reshape(p, [-1])[3:]),
    "tiled": lambda p: tf.reduce_mean(
        tf.tile(p, [2, 1]) * tf.constant(np.arange(2 * B)[:, None] * 1.0)
    ),
    "rows gathered": lambda p: tf.reduce_mean(tf.gather(p, [0, 0, 3])) ** 2,
    "winners of classes": lambda p: tf.reduce_mean(
        tf.gather(PER_ROW, tf.argmax(p, 0))
    ),
    "convolution over rows": lambda p: tf.reduce_mean(
        tf.nn.conv1d(p[None], tf.ones([3, K, 1], p.dtype), 1, "SAME") ** 2
    ),
    "integer mean": lambda p: tf.cast(
        tf.reduce_mean(tf.cast(10 * p, tf.int32)), p.dtype
    ),
    "an axis of its own": lambda p: tf.reduce_sum(
        tf.reduce_prod(p, tf.cast(tf.reduce_sum(p) * 0, tf.int32))
    ),
    "a loop over sums": lambda p: tf.reduce_sum(
        tf.map_fn(lambda a: a**2, tf.reduce_sum(p, 0))
    ),
    "gathered by no axis": lambda p: (
        tf.reduce_mean(tf.gather(p[:, 0], [0, 0, 3, 1, 1], batch_dims=-1)) ** 2
    ),
    "logical or of rows": lambda p: tf.reduce_mean(
        tf.cast(tf.scatter_nd(LABELS[:, None], p[:, 0] > 0.8, [K]), tf.float64)
    ),
    "a loop": lambda p: tf.foldl(lambda a, row: a * 0.5 + row[0], p, p[0, 0]),
}
ALL = {**APART, **TOGETHER}


def of_all(loss, mean, member):
    """f_b by the code of the package, in a graph, as steps of training are."""

    @functools.partial(tf.function, autograph=False)
    def found():
        return WholeBatch.of(loss, mean, mean).by_example(loss, member)

    return found().numpy()


def replaced(loss, mean, member):
    """f_b by the definition."""
    values = []
    for b in range(B):
        row = tf.equal(tf.range(B), b)[:, None]
        values.append(B * float(loss(tf.where(row, member, mean))))
    return np.array(values)


def check_definition(name):
    """rtol is that of float64, or of a loss's own float32."""
    loss, mean, member = ALL[name], predictions(0), predictions(1)
    got = of_all(loss, mean, member)
    want = replaced(loss, mean, member)
    rtol = 1e-10 if got.dtype == np.float64 else 1e-5
    np.testing.assert_allclose(got, want, rtol=rtol)
    assert np.ptp(want) > 0


@pytest.mark.parametrize("name", ALL)
def test_the_definition(name):
    check_definition(name)


@pytest.mark.parametrize("numbers", [5 * K, 1])
@pytest.mark.parametrize("name", ["F1 by a confusion matrix", "pairs"])
def test_some_examples_at_once(name, numbers, monkeypatch):
    monkeypatch.setattr(whole_batch, "_NUMBERS_AT_ONCE", numbers)
    check_definition(name)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *((name, True) for name in ALL),
        # "tiled" and the loop are no losses of any other number of examples.
        *((name, False) for name in ALL if name not in ("tiled", "a loop")),
    ],
)
def test_what_is_taken_apart(name, known, monkeypatch):
    """Also where the number of examples is not known when it is traced; then
    tf.tensordot says nothing of the shape of its product.
    """
    found = []

    @functools.partial(tf.function, autograph=False)
    def traced(mean, *fixed):
        names = ("LABELS", "ONE_HOT", "PER_ROW")
        for fixed_name, tensor in zip(names, fixed, strict=True):
            monkeypatch.setitem(globals(), fixed_name, tensor)
        found.append(RowSums.of(ALL[name], mean))

    tensors = (predictions(0), LABELS, ONE_HOT, PER_ROW)
    batch = B if known else None
    traced.get_concrete_function(
        *(tf.TensorSpec([batch, *t.shape[1:]], t.dtype) for t in tensors)
    )
    apart = name in APART and (known or name != "tensordot")
    assert (found[0] is not None) == apart


@pytest.mark.parametrize("name", ["F1 by sums", "NDCG of rows", "shapes"])
def test_all_is_vectorized(name):
    """One loop, over chunks; an op without a vectorized form is one more."""
    loss = APART[name]

    @functools.partial(tf.function, autograph=False)
    def found(mean, member):
        return WholeBatch.of(loss, mean, mean).by_example(loss, member)

    graph = found.get_concrete_function(predictions(0), predictions(1)).graph
    functions = graph.as_graph_def().library.function
    types = [op.type for op in graph.get_operations()]
    types += [node.op for function in functions for node in function.node_def]
    assert sum("While" in type_ for type_ in types) == 1


@pytest.mark.parametrize("batch", [1, None])
def test_one_example_is_broadcast(batch):
    """As only one can be: the last batch of an epoch, say."""
    fixed = tf.constant(np.arange(5.0)[:, None] * np.ones(K))

    def loss(p):
        return tf.reduce_mean((tf.broadcast_to(p, [5, K]) - fixed) ** 2) ** 0.5

    @tf.function(input_signature=[tf.TensorSpec([batch, K], tf.float64)] * 2)
    def found(mean, member):
        return WholeBatch.of(loss, mean, mean).by_example(loss, member)

    member = predictions(1, (1, K))
    got = found(predictions(0, (1, K)), member)
    np.testing.assert_allclose(got, [loss(member)], rtol=1e-12)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e30])
def test_one_row_of_the_mean_is_not_finite_or_huge(value):
    """It is not there where it is replaced."""
    mean = predictions(0).numpy().astype("float32")
    mean[3] = value
    member = tf.cast(predictions(1), tf.float32)
    got = of_all(
        lambda p: tf.sqrt(tf.reduce_mean(tf.square(p))),
        tf.constant(mean),
        member,
    )
    mean[3] = member[3]
    want = B * np.sqrt(np.mean(np.square(mean)))
    assert got[3] == pytest.approx(want, rel=1e-5)


def test_sums_of_what_is_not_negative_are_not():
    """A hinge that one row alone violates: 0 without it, and not NaN."""
    rng = np.random.default_rng(0)
    mean = rng.uniform(1, 2, [200, 3]).astype("float32")
    mean[7] -= rng.uniform(1, 3, 3)
    member = tf.ones([200, 3])

    def loss(p):
        return tf.sqrt(tf.reduce_mean(tf.nn.relu(1 - p) ** 2))

    got = of_all(loss, tf.constant(mean), member)
    assert got[7] == 0
    np.testing.assert_allclose(np.delete(got, 7), got[0], rtol=1e-6)


def test_half_precision():
    """Counts of 300 examples are exact; in bfloat16 they would stop at 256."""
    mean = tf.ones([300, 1], tf.bfloat16)

    def loss(p):
        return tf.cast(tf.reduce_sum(p), tf.float32)

    got = of_all(loss, mean, tf.zeros_like(mean))
    want = 300 * float(tf.cast(299.0, tf.bfloat16))
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
    "loss",
    ["random", "assigned", "constant", "fixed rows", "no rank", "large"],
)
def test_what_is_never_taken_apart(loss):
    """Random ops, effects, constants, numbers of rows that only one batch has,
    and sums that are too large to be kept for each example.
    """
    variable = tf.Variable(0.0)

    def assigned(p):
        variable.assign(2.0)
        return variable * tf.reduce_mean(p) ** 2

    losses = {
        "random": lambda p: tf.reduce_mean(p * tf.random.uniform([K], 0, 1)),
        "assigned": assigned,
        "constant": lambda p: tf.constant(1.0),
        "fixed rows": lambda p: tf.reduce_mean(p * tf.ones([5, 1])) ** 2,
        "no rank": lambda p: tf.reduce_mean(
            tf.compat.v1.placeholder_with_default(p, None)
        ),
        "large": lambda p: tf.norm(
            tf.scatter_nd(tf.argmax(p, -1)[:, None], p, [2**13, K])
        ),
    }
    found = []

    @tf.function(input_signature=[tf.TensorSpec([None, K])])
    def traced(mean):
        found.append(RowSums.of(losses[loss], mean))

    traced.get_concrete_function()
    assert found == [None]


class OfWeights(keras_vo.VOSequential):
    """A loss of the batch with a factor that the weights decide."""

    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        size = tf.reduce_mean(tf.square(self.layers[-1].kernel))
        hits = tf.reduce_sum(tf.sigmoid(y_pred) * y)
        total = tf.reduce_sum(tf.sigmoid(y_pred)) + tf.reduce_sum(y)
        return (1 - 2 * hits / total) * (1 + size)


def test_training_is_the_same(monkeypatch):
    """As by evaluating the loss as it is, up to the rounding of float32."""

    def trained(run_eagerly=False):
        keras.utils.set_random_seed(0)
        model = OfWeights(
            [
                keras.Input((3,)),
                keras.layers.Dense(4, activation="tanh"),
                keras.layers.Dense(2),
            ]
        )
        model.compile(
            keras_vo.VOOptimizer(
                population_size=8, seed=3, perturbation="local_reparam"
            ),
            run_eagerly=run_eagerly,
        )
        rng = np.random.default_rng(1)
        x = rng.normal(size=(21, 3)).astype("float32")
        model.fit(x, (x[:, :2] > 0) * 1.0, batch_size=8, verbose=0)
        return model.get_weights()

    calls = []
    of = RowSums.of

    def noted(*arguments):
        calls.append(of(*arguments))
        return calls[-1]

    monkeypatch.setattr(RowSums, "of", noted)
    apart = trained()
    assert calls and None not in calls
    monkeypatch.setattr(RowSums, "of", lambda *_: None)
    for got, want in zip(apart, trained(run_eagerly=True), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def dice(y_true, y_pred):
    scored = tf.sigmoid(y_pred)
    hits = tf.reduce_sum(scored * y_true)
    return 1 - 2 * hits / (tf.reduce_sum(scored) + tf.reduce_sum(y_true))


def pairs(y_true, y_pred):
    wrong = (y_pred - tf.transpose(y_pred)) * (y_true - tf.transpose(y_true))
    return tf.reduce_sum(tf.nn.relu(-wrong))


@pytest.mark.parametrize(
    ("loss", "replicas", "xla"),
    [(dice, 1, True), (pairs, 1, False), (dice, 2, False)],
)
def test_no_examples(loss, replicas, xla):
    """An empty batch changes nothing, and a replica without examples (that of
    the last batch, often) leaves the step to the others.
    """
    strategy = models.mirrored(2) if replicas == 2 else None
    with models.scope(strategy):
        model = keras_vo.VOSequential(
            [keras.Input((3,)), keras.layers.Dense(1)]
        )
        optimizer = keras_vo.VOOptimizer(perturbation="local_reparam", seed=0)
        model.compile(optimizer, loss=loss, jit_compile=xla)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3)).astype("float32")
    y = (x[:, :1] > 0).astype("float32")
    before = model.get_weights()
    if strategy:
        model.fit(x, y, batch_size=4, verbose=0)
    else:
        model.train_on_batch(x[:0], y[:0])
    for got, want in zip(model.get_weights(), before, strict=True):
        assert np.array_equal(got, want) == (strategy is None)
        assert np.isfinite(got).all()
