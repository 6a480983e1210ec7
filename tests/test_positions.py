"""Credit by position: closed forms, what has it, and what is refused."""

import warnings

import keras
import models
import numpy as np
import pytest
import reference
import tensorflow as tf
import test_local_reparameterization as local
from keras import layers

import keras_vo
from keras_vo.layers import LocalReparamDense
from keras_vo.perturbations.local import LocalReparam
from keras_vo.replicas.communicator import current_replicas
from keras_vo.search.credit import EXAMPLE, POSITION, Outcomes, Rows
from keras_vo.search.example_credit import Scale, later, utilities
from keras_vo.search.local_reparameterization import ActivationNoise
from keras_vo.search.operands import Matrix

BATCH, TIME, IN = 3, 4, 2


def sequences(seed=0, batch=BATCH):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, TIME, IN)), rng.normal(size=(batch, TIME, 2))


def squared_error(y_true, y_pred):
    """[batch, time]."""
    return tf.reduce_sum(tf.square(y_pred - y_true), axis=-1)


def discounted(values, discount):
    """g_t = f_t + discount g_(t+1), along the last axis."""
    values = np.array(values, np.float64)
    for t in range(values.shape[-1] - 2 if discount else -1, -1, -1):
        values[..., t] += discount * values[..., t + 1]
    return values


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_later(discount):
    values = np.random.default_rng(0).normal(size=(2, 3, 5, 4))
    values[0, 0, 2] = np.inf  # and of earlier ones alone
    got = later(tf.constant(values), discount, axis=2)
    want = np.swapaxes(discounted(np.swapaxes(values, 2, 3), discount), 2, 3)
    np.testing.assert_allclose(got, want)


# --- the reference ---


@pytest.mark.parametrize(
    "shaping, discount, option",
    [
        ("identity", 0.0, "run_eagerly"),
        ("identity", 0.6, None),
        ("centered_rank", 0.0, None),
        ("centered_rank", 0.6, "jit_compile"),
        ("standardize", 1.0, "run_eagerly"),
    ],
)
def test_positions_are_examples_of_their_own(shaping, discount, option):
    """Where none sees another: those of the reference, which has no positions.

    Exactly, up to the order of summation. Utilities of one scale have it with
    T times as many "examples"; those of the losses' scale are 1/T.
    """
    x, y = sequences()
    model = local.make_model(
        local.two_layers(),
        x,
        loss=squared_error,
        fitness_shaping=shaping,
        credit="position",
        position_discount=discount,
        **({option: True} if option else {}),
    )
    sigma = local.separable_sigma(model, np.random.default_rng(1))
    weights = model.get_weights()
    xi = [
        models.draw_noise(5, 0, 4, (BATCH, TIME, n), stream=k).reshape(
            4, BATCH * TIME, n
        )
        for k, n in enumerate([3, 2])
    ]
    relu = lambda a: np.maximum(a, 0)  # noqa: E731

    def losses(z):
        own = ((z.reshape(y.shape) - y) ** 2).sum(-1)
        return discounted(own, discount).ravel()

    found, want = reference.local_reparameterization(
        x.reshape(-1, IN),
        losses,
        [
            (*weights[:2], *sigma[:2], relu),
            (*weights[2:], *sigma[2:], lambda a: a),
        ],
        xi,
    )
    factor = 1.0  # losses are means over positions, as those of the reference
    if shaping != "identity":  # one scale, a mean by what parts weigh
        changes = [reference.identity(column, True) for column in found.T]
        weight = np.tile(discounted(np.ones(TIME), discount), BATCH)
        weight /= weight.mean()
        squares = np.mean(np.square(changes), axis=1)
        factor = TIME / np.sqrt(np.mean(squares / weight))
    for part, got in zip(
        (slice(2), slice(2, None)), local.gradients(model, x, y), strict=True
    ):
        flat = [np.ravel(p) for parts in want for p in parts[part]]
        np.testing.assert_allclose(
            got, factor * np.concatenate(flat), rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("recorded", [False, True])
def test_columns_are_parts_of_the_sums(recorded):
    """Of a layer of one unit: what the search monitor measures noise by."""
    rng = np.random.default_rng(0)
    chunk, signs = 5, 2
    shape = (BATCH, TIME)
    site = ActivationNoise(
        Matrix(),
        tf.constant(rng.normal(size=(*shape, IN))),
        1,
        [tf.constant(0.3, tf.float64), tf.constant(0.2, tf.float64)],
        adapts=False,
    )
    noise = tf.constant(rng.normal(size=(chunk, *shape, 1)))
    utilities = tf.constant(rng.normal(size=(chunk, signs, *shape)))
    record = ()
    if recorded:
        inputs = tf.constant(rng.normal(size=(chunk, signs, *shape, IN)))
        record = inputs, site.variance_of(inputs)
    rows = Rows(utilities, tf.ones([chunk], tf.float64))
    sums = site.sums(noise, record, rows)
    units = tf.zeros([chunk], tf.int32)
    columns = site.columns(noise, record, utilities, units)
    for total, parts in zip(sums, columns, strict=True):
        assert parts.shape[0] == chunk
        np.testing.assert_allclose(
            np.ravel(total), np.sum(parts, 0), rtol=1e-10
        )


# --- what has it ---


def summarized(layer=LocalReparamDense):
    """Positions, beside a layer that sees all of them at once."""
    inputs = keras.Input((TIME, IN))
    whole = layer(2, name="whole")(layers.Flatten()(inputs))
    each = layer(3, activation="relu", name="each")(inputs)
    both = layers.Concatenate()([each, layers.RepeatVector(TIME)(whole)])
    return keras.Model(inputs, layer(2, name="last")(both))


def step_of(credit, x, y, **kwargs):
    """Changes of the weights by one step down their gradients."""
    keras.utils.set_random_seed(1)
    model = keras_vo.make_variational(summarized())
    model.compile(
        optimizer=models.make_optimizer(
            inner_optimizer=keras.optimizers.SGD(1.0),
            fitness_shaping="identity",
            credit=credit,
            **kwargs,
        ),
        loss=squared_error,
        run_eagerly=True,
    )
    before = model.get_weights()
    model.train_on_batch(x, y)
    changes = zip(model.get_weights(), before, strict=True)
    return dict(
        zip(
            [v.path for v in model.trainable_variables],
            [new - old for new, old in changes],
            strict=True,
        )
    )


def test_layers_without_the_axes_of_the_loss_have_credit_by_example():
    x, y = sequences()
    by_position, by_example = (
        step_of(credit, x, y) for credit in ("position", "example")
    )
    for path, change in by_example.items():
        same = np.allclose(by_position[path], change, rtol=1e-4, atol=1e-7)
        assert same == path.startswith("whole"), path
        assert np.any(change != 0)


def test_less_variance_where_no_position_sees_another():
    """The same mean, and the noise of one position in the place of eight."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 8, IN)), rng.normal(size=(4, 8, 2))

    def samples(credit):
        model = local.make_model(
            [lambda: LocalReparamDense(2)],
            x,
            loss=squared_error,
            credit=credit,
            seed=1005,
        )
        return [local.gradients(model, x, y)[0] for _ in range(60)]

    by_position, by_example = samples("position"), samples("example")
    variances = [np.var(s, 0, ddof=1) for s in (by_position, by_example)]
    # 60 samples of 6 numbers each: the ratio of variances varies by 11 %.
    assert 5 < variances[1].sum() / variances[0].sum() < 12
    error = np.sqrt((variances[0] + variances[1]) / 60)
    gap = np.abs(np.mean(by_position, 0) - np.mean(by_example, 0))
    # Beyond 5 with a probability of 2e-6 of each of 6.
    assert np.all(gap < 5 * error)


def transformer(time=TIME):
    inputs = keras.Input((time,), dtype="int32")
    places = keras.ops.cumsum(keras.ops.ones_like(inputs), axis=1) - 1
    hidden = layers.Embedding(7, 8)(inputs) + layers.Embedding(9, 8)(places)
    attention = layers.MultiHeadAttention(2, 4)
    hidden += attention(hidden, hidden, use_causal_mask=True)
    hidden = layers.LayerNormalization()(hidden)
    return keras.Model(inputs, layers.Dense(7)(hidden))


FROM_LOGITS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_transformer(time=TIME, **kwargs):
    keras.utils.set_random_seed(1)
    model = keras_vo.make_variational(transformer(time))
    settings = {"perturbation": "local_reparam", "credit": "position"}
    model.compile(
        optimizer=models.make_optimizer(**settings | kwargs),
        loss=FROM_LOGITS,
    )
    return model


def tokens(batch=8, time=TIME, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 7, (batch, time + 1))
    return codes[:, :-1], codes[:, 1:]


@pytest.fixture
def claims(monkeypatch):
    """Layers of the steps that are traced, and whether by position."""
    seen = []
    init = LocalReparam.__init__

    def noted(self, claims, space):
        seen.append({c.call.name: c.by_position for c in claims})
        init(self, claims, space)

    monkeypatch.setattr(LocalReparam, "__init__", noted)
    return seen


def test_all_of_a_transformer_has_it(claims):
    """And nothing is left to noise on weights."""
    model = make_transformer()
    models.fit(model, *tokens())
    seen = {k: v for layer in claims for k, v in layer.items()}
    assert len(seen) == 8 and all(seen.values()), seen


def make_summarized(network=summarized, run_eagerly=False, **kwargs):
    keras.utils.set_random_seed(1)
    model = keras_vo.make_variational(network())
    model.compile(
        optimizer=models.make_optimizer(credit="position", **kwargs),
        loss=squared_error,
        run_eagerly=run_eagerly,
    )
    return model


def test_chunks_and_a_file(tmp_path):
    """They change nothing; and a model that was saved has the same credit."""
    x, y = sequences(batch=8)
    keras.saving.register_keras_serializable("test")(squared_error)
    plain, chunked = (
        make_summarized(position_discount=0.5, chunk_size=size)
        for size in (None, 2)
    )
    for model in (plain, chunked):
        models.fit(model, x, y)
    np.testing.assert_allclose(
        models.weights(plain), models.weights(chunked), rtol=1e-4, atol=1e-6
    )
    plain.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.credit == "position"
    assert loaded.optimizer.position_discount == 0.5
    for model in (plain, loaded):
        models.fit(model, x, y)
    np.testing.assert_array_equal(models.weights(plain), models.weights(loaded))


def test_two_replicas():
    """Shards of 4 and 4, then of 1 and 1: the same weights, and they learn."""
    x, y = sequences(batch=10)

    def network():
        return keras.Sequential([keras.Input((TIME, IN)), LocalReparamDense(2)])

    with models.mirrored(2).scope():
        model = make_summarized(network)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    history = models.fit(model, batches.repeat(4), batch_size=None)["loss"]
    assert history[-1] < history[0]
    for variable in model.trainable_variables:
        first, second = variable.value.values
        np.testing.assert_array_equal(first, second)


def test_positions_of_weight_0():
    """What is said there changes nothing, whatever the discount."""
    x, y = sequences(batch=8)
    weight = np.ones((8, TIME))
    weight[:, -1] = weight[2] = 0
    steps = []
    model = make_summarized(position_discount=0.5)
    model.optimizer.build(model.trainable_variables)
    rewind = models.rewinder(model)
    for wrong in (0.0, 5.0):
        rewind()
        target = y + wrong * (weight == 0)[..., None]
        models.fit(model, x, target, sample_weight=weight)
        steps.append(models.weights(model))
    np.testing.assert_array_equal(*steps)


def test_encoder_and_decoder_of_any_length():
    """Lengths that differ: the encoder has credit by example, as before."""
    encoded = keras.Input((None, IN))
    decoded = keras.Input((None, IN))
    whole = layers.GlobalAveragePooling1D()(
        LocalReparamDense(2, name="encoder")(encoded)
    )
    each = LocalReparamDense(2, name="decoder")(decoded)
    network = keras.Model([encoded, decoded], each + whole[:, None])
    x, y = sequences(batch=8)
    longer = np.concatenate([x, x[:, :2]], 1)

    def step(credit):
        keras.utils.set_random_seed(1)
        model = keras_vo.make_variational(keras.models.clone_model(network))
        model.compile(
            optimizer=models.make_optimizer(
                inner_optimizer=keras.optimizers.SGD(1.0),
                fitness_shaping="identity",
                credit=credit,
            ),
            loss=squared_error,
        )
        before = model.get_weights()
        models.fit(model, [longer, x], y, epochs=1)
        return [a - b for a, b in zip(model.get_weights(), before, strict=True)]

    by_position, by_example = step("position"), step("example")
    for one, other in zip(by_position[:2], by_example[:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert not np.allclose(by_position[2], by_example[2], rtol=1e-2)


def test_one_position_and_none():
    """Batches of other lengths, the last ones of no example, eagerly."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((None, IN))
    model = keras_vo.make_variational(
        keras.Model(inputs, LocalReparamDense(2)(inputs))
    )
    model.compile(
        optimizer=models.make_optimizer(
            credit="position",
            inner_optimizer=keras.optimizers.SGD(0.1),
        ),
        loss=squared_error,
        run_eagerly=True,
    )
    x, y = sequences(batch=8)
    for size, time in ((8, TIME), (8, 1), (1, 2)):
        before = models.weights(model)
        model.train_on_batch(x[:size, :time], y[:size, :time])
        assert np.all(models.weights(model) != before)
    before = models.weights(model)
    model.train_on_batch(x[:0], y[:0])
    np.testing.assert_array_equal(models.weights(model), before)


def test_sizes_that_only_the_inputs_know():
    """Targets of unknown length, layers of a known one."""
    x, y = sequences(batch=8)
    specs = tf.TensorSpec([None, TIME, IN]), tf.TensorSpec([None, None, 2])
    data = tf.data.Dataset.from_generator(
        lambda: iter([(x, y)]), output_signature=specs
    )
    results = []
    for eagerly in (False, True):  # where all shapes are known
        model = make_summarized(run_eagerly=eagerly)
        model.fit(data.repeat(), steps_per_epoch=1, shuffle=False, verbose=0)
        results.append(models.weights(model))
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)


def test_scale_of_weighted_positions():
    """A mean square of 1, by weights of mean 1, wherever padding is."""
    rng = np.random.default_rng(0)
    weights = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]], np.float64)
    weights /= weights.mean()
    losses = rng.normal(size=(8, 3, 4)) * weights
    outcomes = Outcomes(
        {EXAMPLE: tf.constant(losses.sum(-1)), POSITION: tf.constant(losses)},
        {POSITION: tf.constant(weights)},
    )
    scale = Scale(2, False, True, current_replicas(), tf.float64)
    got = utilities(outcomes, 0.5, scale)["positions"].numpy()
    weight = discounted(weights, 0.5)
    weight /= weight.mean()
    assert np.all(got[:, weight == 0] == 0)
    share = np.where(weight > 0, weight, 1)
    assert np.mean(got**2 / share) == pytest.approx(1)


# --- refused ---


@pytest.mark.parametrize("shape", [(), (3,), (TIME, 3)])
def test_losses_of_other_positions(shape):
    """They would be added along axes that are not theirs."""
    inputs = keras.Input((TIME, IN))
    each = LocalReparamDense(2)(inputs)
    size = int(np.prod(shape))
    other = layers.Reshape((*shape, 1))(
        LocalReparamDense(size)(layers.Flatten()(inputs))
    )
    model = keras_vo.VOModel(inputs, [each, other])
    model.compile(
        optimizer=models.make_optimizer(credit="position"),
        loss=[squared_error, squared_error],
    )
    x, y = sequences(batch=8)
    with pytest.raises(ValueError, match="same positions.*beside one of"):
        model.train_on_batch(x, [y, np.zeros((8, *shape, 1))])


def test_the_arguments_are_checked():
    with pytest.raises(ValueError, match="`credit` must be one of.*'token'"):
        keras_vo.VOOptimizer(credit="token")
    for discount in (-0.1, 1.1, "half", float("nan")):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            keras_vo.VOOptimizer(position_discount=discount)
    with pytest.raises(ValueError, match='Expected: credit="position"'):
        keras_vo.VOOptimizer(position_discount=0.5)


@pytest.mark.parametrize(
    "loss, perturbation, message",
    [
        ("pooled", "local_reparam", r"\[batch, time\].*Received.*\(8,\)"),
        (lambda y, p: tf.reduce_mean(p), "local_reparam", "shape \\(\\)"),
        ("mse", "full", "is that of noise on activations.*'full'"),
        ("mse", "low_rank", "is that of noise on activations"),
    ],
)
def test_what_has_no_positions(loss, perturbation, message):
    x, y = sequences(batch=8)
    network = [layers.Dense(2)]
    if loss == "pooled":
        network.append(layers.GlobalAveragePooling1D())
        y, loss = y[:, 0], "mse"
    model = models.make_model(
        network,
        models.make_optimizer(perturbation=perturbation, credit="position"),
        shape=(TIME, IN),
        loss=loss,
    )
    before = model.get_weights()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        model.train_on_batch(x, y)
    models.assert_same_state(before, model.get_weights())


def test_no_layer_has_the_axes_of_the_loss():
    """It says so, with their shapes."""
    x, _ = sequences(batch=8)
    model = models.make_model(
        [layers.Flatten(), layers.Dense(6), layers.Reshape((3, 2))],
        models.make_optimizer(perturbation="local_reparam", credit="position"),
        shape=(TIME, IN),
        loss="mse",
    )
    match = r"changes nothing.*'batch', 3, 'units'.*\['batch', 6\]"
    with pytest.warns(UserWarning, match=match):
        models.fit(model, x, np.zeros((8, 3, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        losses = models.fit(model, x, np.zeros((8, 3, 2)))["loss"]
    assert losses[-1] < losses[0]


def test_minimize_has_no_positions():
    optimizer = models.make_optimizer(
        perturbation="local_reparam", credit="position"
    )
    with pytest.raises(ValueError, match="of `minimize` has one loss"):
        optimizer.minimize(lambda w: tf.reduce_sum(w[0]), [tf.Variable([1.0])])
    assert not optimizer.built
