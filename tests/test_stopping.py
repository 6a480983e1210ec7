"""When a loop without `fit` ends."""

import models
import numpy as np
import pytest
import tensorflow as tf

import keras_vo


def stops_after(stop, reports):
    for number, report in enumerate(reports, 1):
        if stop(report):
            return number
    return None


def reports(*losses):
    """Of a search that is told these losses, one population after another."""
    variables, optimizer = [tf.Variable([1.0, 2.0])], models.make_optimizer()
    return [optimizer.tell(optimizer.ask(variables), told) for told in losses]


def test_a_loss_below():
    told = reports(np.arange(8.0) + 2, np.arange(8.0) + 1, np.arange(8.0))
    stop = keras_vo.stop_when(loss_below=1)
    assert stops_after(stop, told) == 3
    assert stop.reason == "loss 0 below 1"


def test_no_progress():
    """By the mean or by the best; a step without losses is no progress."""
    best = np.array([1.0, *[5.0] * 7])
    told = reports(
        np.full(8, 4.6) + np.eye(8)[0],
        best,  # a better member
        best + 0.5,
        best - np.eye(8)[3],  # a better mean
        [np.inf] * 8,
        best,
        best,
    )
    stop = keras_vo.stop_when(no_progress_for=3)
    assert stops_after(stop, told) == 7
    assert stop.reason == "no progress for 3 steps"
    assert stops_after(keras_vo.stop_when(no_progress_for=4), told) is None
    assert stop(told[-1])  # it goes on saying so
    assert stop.reason == "no progress for 4 steps"


def test_evaluations():
    """Those that have a result."""
    told = reports(np.ones(8), {0: 1.0, 3: 2.0}, np.ones(8), np.ones(8))
    stop = keras_vo.stop_when(evaluations=18, loss_below=0)
    assert stops_after(stop, told) == 3
    assert (stop.evaluations, stop.reason) == (18, "18 evaluations")


def test_of_minimize_and_step():
    variables, optimizer = [tf.Variable([1.0, 2.0])], models.make_optimizer()

    def objective(weights):
        return tf.reduce_sum(weights[0] ** 2)

    stop = keras_vo.stop_when(loss_below=1.0)
    steps = 0
    while not stop(optimizer.minimize(objective, variables)):
        steps += 1
    assert 5 < steps < 200
    counted = keras_vo.stop_when(evaluations=16)
    assert not counted(optimizer.step(objective, variables))
    assert counted(optimizer.step(objective, variables))


def test_wrong_arguments():
    for arguments in ({}, {"evaluations": 0}):
        with pytest.raises(ValueError, match="criterion|`evaluations` must"):
            keras_vo.stop_when(**arguments)
    with pytest.raises(ValueError, match="`no_progress_for` must be an int"):
        keras_vo.stop_when(no_progress_for=0.5)
    with pytest.raises(ValueError, match="`loss_below` must be a number"):
        keras_vo.stop_when(loss_below=float("nan"))
    with pytest.raises(TypeError, match="the report of a step. Received: 3.0"):
        keras_vo.stop_when(evaluations=5)(3.0)
    with pytest.raises(TypeError, match="or its mean loss. Received: 'x'"):
        keras_vo.stop_when(loss_below=5)("x")
