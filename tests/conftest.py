"""Quiet TensorFlow, and a fresh, seeded Keras for every test."""

import gc
import os
import signal

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest
import tensorflow as tf

# Three devices for tests of replicas; the others use the first.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0],
    [tf.config.LogicalDeviceConfiguration()] * 3,
)
# "n out of the last n calls triggered retracing": every test is a new model.
tf.get_logger().setLevel("ERROR")


def pytest_collection_finish():
    """What is imported stays: no collection of garbage need look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_keras():
    keras.backend.clear_session(free_memory=False)  # else .5 s for each test
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, also where a shell that runs this in the background
    has it ignored."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)
