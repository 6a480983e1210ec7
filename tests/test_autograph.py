"""`minimize` in a `tf.function`: AutoGraph converts the objective only."""

import functools
import inspect
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from models import mirrored, scope

import keras_vo


def objective(weights):
    """Python's control flow on tensors, which AutoGraph converts."""
    total = tf.zeros([])
    for value in weights[0]:
        if value > 0:
            total += value**2
        else:
            total -= value
    return total


def vectorized(weights):
    w = weights[0]
    return tf.reduce_sum(tf.where(w > 0, w**2, -w))


def branching(weights):
    total = tf.reduce_sum(weights[0])
    if total > 0:
        total = total**2
    return total


@functools.cache
def vectorized_search():
    return searched(vectorized)


def searched(f, replicas=None, **options):
    with scope(replicas and mirrored(replicas)):
        w = tf.Variable([3.0, -2.0, 1.0])
        optimizer = keras_vo.VOOptimizer(population_size=8, seed=1)
    step = tf.function(lambda: optimizer.minimize(f, [w]), **options)
    return [float(step()) for _ in range(3)], w.numpy()


@pytest.mark.parametrize("replicas", [None, 2])
def test_an_objective_with_python_control_flow(replicas):
    for one, two in zip(
        searched(objective, replicas), vectorized_search(), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_step_and_callables_of_other_kinds():
    class Objective:
        def __call__(self, weights):
            return branching(weights)

        def method(self, weights):
            return branching(weights)

    def where(weights):
        total = tf.reduce_sum(weights[0])
        return tf.where(total > 0, total**2, total)

    want = searched(where)
    for f in (Objective(), Objective().method, tf.function(branching)):
        for one, two in zip(searched(f), want, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5)
    w = tf.Variable([3.0, -2.0, 1.0])
    optimizer = keras_vo.VOOptimizer(population_size=8, seed=1)
    step = tf.function(lambda: optimizer.step(branching, [w]).mean_loss)
    losses = [float(step()) for _ in range(3)]
    np.testing.assert_allclose(losses, want[0], rtol=1e-5)


def test_without_autograph_nothing_is_converted():
    with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
        searched(objective, autograph=False)


def test_nothing_of_the_package_is_converted():
    """The code that AutoGraph writes is in files of its own."""
    callers = []

    def f(weights):
        callers.extend(frame.filename for frame in inspect.stack()[1:])
        return vectorized(weights)

    searched(f)
    generated = {name for name in callers if "__autograph_generated" in name}
    written = "".join(pathlib.Path(name).read_text() for name in generated)
    assert "tf__f" in written and "tf__minimize" in written
    assert "tf__step" not in written and "tf__evaluate" not in written
