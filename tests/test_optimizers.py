"""ClipUp: the steps of the paper."""

import keras
import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo

SHAPES = ((2, 3), (4,), ())


def reference(gradients, rate, momentum, max_speed):
    """Algorithm 1 of the paper on one vector, step by step."""
    velocity = np.zeros(gradients.shape[1])
    place = np.zeros_like(velocity)
    for gradient, step_rate in zip(gradients, rate, strict=True):
        norm = np.linalg.norm(gradient)
        most = 2 * step_rate if max_speed is None else max_speed
        if norm > 0:
            velocity = momentum * velocity + step_rate * gradient / norm
        else:
            velocity = momentum * velocity
        speed = np.linalg.norm(velocity)
        if speed > most:
            velocity *= most / speed
        place = place - velocity
        yield place


@pytest.mark.parametrize("max_speed", [None, 0.25, 10.0])
@pytest.mark.parametrize("scheduled", [True, False])
def test_steps(max_speed, scheduled):
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(12, 11)) + 1.0
    gradients[4] *= 1e6
    gradients[5] = 0
    rate = np.full(12, 0.2)
    learning_rate = 0.2
    if scheduled:
        learning_rate = keras.optimizers.schedules.CosineDecay(0.2, 10)
        rate = np.array([float(learning_rate(t)) for t in range(12)])
    variables = [keras.Variable(np.zeros(s), dtype="float64") for s in SHAPES]
    optimizer = keras_vo.optimizers.ClipUp(learning_rate, 0.8, max_speed)
    sizes = np.cumsum([int(np.prod(s)) for s in SHAPES])[:-1]
    for gradient, expected in zip(
        gradients, reference(gradients, rate, 0.8, max_speed), strict=True
    ):
        parts = np.split(gradient, sizes)
        optimizer.apply(
            [
                tf.reshape(tf.constant(p), s)
                for p, s in zip(parts, SHAPES, strict=True)
            ],
            variables,
        )
        place = np.concatenate([v.numpy().ravel() for v in variables])
        np.testing.assert_allclose(place, expected, rtol=1e-6, atol=1e-9)
    assert int(optimizer.iterations) == 12


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e25])
def test_the_length_of_the_gradient_does_not_matter(scale):
    variables = [
        keras.Variable(np.zeros(2), dtype="float32"),
        keras.Variable(np.zeros(1), dtype="float16"),
    ]
    optimizer = keras_vo.optimizers.ClipUp(0.1)
    gradient = tf.constant([3.0, 4.0]) * tf.constant(scale, tf.float32)
    optimizer.apply([gradient, None], variables)
    np.testing.assert_allclose(variables[0], [-0.06, -0.08], rtol=1e-5)
    np.testing.assert_array_equal(variables[1], [0])


def test_gradients_of_nothing_are_keras_errors():
    with pytest.raises(ValueError, match="provide|build|built"):
        keras_vo.optimizers.ClipUp().apply([tf.ones([2])])
    with pytest.raises(ValueError, match="No gradients"):
        keras_vo.optimizers.ClipUp().apply(
            [None], [keras.Variable(np.zeros(2))]
        )


def test_it_is_saved_with_a_search(tmp_path):
    model = models.make_model(
        optimizer=models.make_optimizer(
            inner_optimizer=keras_vo.optimizers.ClipUp(0.1, max_speed=0.15)
        )
    )
    x, y = models.make_data()
    model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.inner_optimizer.max_speed == 0.15
    for each in (model, loaded):
        each.train_on_batch(x, y)
    models.assert_same_state(
        models.search_state(loaded), models.search_state(model)
    )


def test_the_scale_of_losses_does_not_matter():
    ends = []
    for scale in (1.0, 1024.0):
        w = tf.Variable([1.0, 2.0])
        optimizer = models.make_optimizer(
            "fixed",
            fitness_shaping="identity",
            inner_optimizer=keras_vo.optimizers.ClipUp(0.1),
        )
        for _ in range(4):
            optimizer.minimize(
                lambda weights, s=scale: s * tf.reduce_sum(weights[0] ** 2),
                [w],
            )
        ends.append(w.numpy())
    np.testing.assert_allclose(*ends, rtol=1e-4)


def test_it_trains_a_plain_model():
    """By backpropagation, as any Keras optimizer."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), *models.make_layers()])
    model.compile(
        optimizer=keras_vo.optimizers.ClipUp(0.1),
        loss="sparse_categorical_crossentropy",
    )
    x, y = models.make_data()
    history = model.fit(x, y, epochs=20, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"learning_rate": -0.1}, "`learning_rate` must be a finite number"),
        ({"momentum": 1.0}, "`momentum` must be a number in"),
        ({"momentum": "a"}, "`momentum` must be a number in"),
        ({"max_speed": 0}, "`max_speed` must be a positive"),
        ({"clipnorm": 1.0}, "`clipnorm` has no meaning"),
        ({"loss_scale_factor": 8.0}, "`loss_scale_factor` has no meaning"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_vo.optimizers.ClipUp(**arguments)
