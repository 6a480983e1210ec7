"""Golden trajectories: what five steps of many configurations come to.

    python tests/golden.py --store [name ...]      # writes golden.npz
    python tests/golden.py --compare [name ...]    # this code against it

Without names: those that are not extra, in about a minute; with the name
"all", all of them. pytest runs a few of them.

They hold a change that is to change nothing to it, bit by bit on one machine.
Only the public interface is used. Where a change of the numbers is meant, the
commit that stores them says why.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import keras_vo
from keras_vo.layers import LocalReparamDense, LowRankDense
from keras_vo.search.generators import FIRST

Arrays = dict[str, np.ndarray]

PATH = pathlib.Path(__file__).with_name("golden.npz")
STEPS = 5
BATCH = 16
WHOLE = 64  # larger arrays are stored as this many entries and a summary
FLOAT32, FLOAT64, FLOAT16 = 2e-4, 1e-9, 2e-2
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
Dense = keras.layers.Dense


@dataclasses.dataclass(frozen=True)
class Config:
    """A configuration.

    Attributes:
        run: makes it anew and returns the arrays of its trajectory.
        tolerance: largest difference to what is stored, in parts of the
            largest entry of an array, on any machine.
        exact: whether two runs on one machine agree bit by bit.
        extra: whether it only runs if it is asked for.
    """

    run: Callable[[], Arrays]
    tolerance: float = FLOAT32
    exact: bool = True
    extra: bool = False


# --- data and layers ---


def tabular(features: int = 8, classes: int = 3) -> tuple[np.ndarray, ...]:
    """A batch for each step."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS * BATCH, features))
    return x, (x @ rng.normal(size=(features, classes))).argmax(1)


def weighted() -> tuple[np.ndarray, ...]:
    return (*tabular(), np.linspace(0.0, 2.0, STEPS * BATCH))


def sequences() -> tuple[np.ndarray, ...]:
    """Rows of six features; the last ones of some sequences are 0."""
    x, y = tabular(4 * 6)
    x = x.reshape(-1, 4, 6)
    x[::3, 2:] = 0.0
    return x, y


def images() -> tuple[np.ndarray, ...]:
    x, y = tabular(36)
    return x.reshape(-1, 6, 6, 1), y


def tokens() -> tuple[np.ndarray, ...]:
    x, y = tabular(5)
    return (2.0 * x).astype("int32") % 11, y


def two_targets() -> tuple[Any, ...]:
    x, y = tabular()
    return x, (y // 2, x[:, :1] * x[:, 1:2])


def dense(units: int = 6, classes: int = 3) -> list[Any]:
    return [Dense(units, "relu"), Dense(classes)]


def low_rank(rank: int = 1) -> list[Any]:
    return [LowRankDense(6, "relu", rank=rank), LowRankDense(3, rank=rank)]


def local() -> list[Any]:
    return [LocalReparamDense(6, "relu"), LocalReparamDense(3)]


def mixed() -> list[Any]:
    return [
        LocalReparamDense(6, "tanh"),
        LowRankDense(5, "relu", rank=2),
        Dense(3),
    ]


def mixed_reversed() -> list[Any]:
    """The noise of activations comes on top of that of weights."""
    return [Dense(6, "tanh"), LowRankDense(5, "relu"), LocalReparamDense(3)]


def positions() -> list[Any]:
    return [
        LocalReparamDense(5, "relu"),
        keras.layers.GlobalAveragePooling1D(),
        LocalReparamDense(3),
    ]


def masked() -> list[Any]:
    return [keras.layers.Masking(), *positions()]


def convolution() -> list[Any]:
    return [
        keras.layers.Conv2D(2, 3, activation="relu"),
        keras.layers.MaxPooling2D(2),
        keras.layers.Flatten(),
        Dense(3),
    ]


def recurrent() -> list[Any]:
    return [keras.layers.Embedding(11, 3), keras.layers.GRU(4), Dense(3)]


def stateful() -> list[Any]:
    return [keras.layers.SimpleRNN(4, stateful=True), Dense(3)]


def normalized() -> list[Any]:
    batch_norm = keras.layers.BatchNormalization(momentum=0.5)
    return [Dense(6), batch_norm, keras.layers.ReLU(), Dense(3)]


def local_normalized() -> list[Any]:
    batch_norm = keras.layers.BatchNormalization(momentum=0.5)
    return [LowRankDense(6), batch_norm, LocalReparamDense(3)]


def dropout() -> list[Any]:
    return [Dense(6, "relu"), keras.layers.Dropout(0.3), Dense(3)]


def regularized() -> list[Any]:
    return [
        Dense(6, "relu", kernel_regularizer="l2", bias_regularizer="l1"),
        Dense(3, activity_regularizer="l2"),
    ]


def sequential(layers: Callable[[], list[Any]], shape: Any) -> Any:
    return keras_vo.VOSequential([keras.Input(shape), *layers()])


def stateful_model(layers: Callable[[], list[Any]], shape: Any) -> Any:
    inputs = keras.Input(batch_shape=(BATCH, *shape))
    return keras_vo.VOSequential([inputs, *layers()])


def integers(layers: Callable[[], list[Any]], shape: Any) -> Any:
    return keras_vo.VOSequential([keras.Input(shape, dtype="int32"), *layers()])


def two_heads(layers: Callable[[], list[Any]], shape: Any) -> Any:
    """A functional model of two outputs, its first layer frozen."""
    inputs = keras.Input(shape)
    hidden = Dense(5, "tanh", trainable=False)(inputs)
    for layer in layers():
        hidden = layer(hidden)
    heads = [Dense(2, name="one")(hidden), Dense(1, name="other")(hidden)]
    return keras_vo.VOModel(inputs, heads)


def converted(kind: str, layers: Callable[[], list[Any]], shape: Any) -> Any:
    model = keras.Sequential([keras.Input(shape), *layers()])
    return keras_vo.make_variational(model, dense=kind)


# --- optimizers ---


def sgd() -> Any:
    return keras.optimizers.SGD(0.5, momentum=0.5)


def adam() -> Any:
    return keras.optimizers.Adam(0.05)


def adamw() -> Any:
    """A schedule, weight decay, clipping and a moving average."""
    return keras.optimizers.AdamW(
        keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.7),
        weight_decay=0.1,
        global_clipnorm=0.01,
        use_ema=True,
        ema_overwrite_frequency=2,
    )


def squashed(losses: tf.Tensor) -> tf.Tensor:
    """A fitness shaping that keras_vo does not have."""
    return tf.tanh(keras_vo.fitness_shaping.standardize(losses))


def make_optimizer(
    inner: Callable[[], Any] = adam,
    structure: str = "layerwise",
    distribution: dict[str, Any] | None = None,
    noise_generator: str | None = None,
    **arguments: Any,
) -> keras_vo.VOOptimizer:
    """Little that a trajectory depends on is left to the defaults."""
    settings = {"stddev": 0.1, "learning_rate": 0.5} | (distribution or {})
    arguments = {
        "population_size": 8,
        "fitness_shaping": "centered_rank",
        "seed": 3,
    } | arguments
    size = arguments["population_size"]
    arguments.setdefault("examples_population_size", size)
    optimizer = keras_vo.VOOptimizer(
        inner(),
        search_distribution=keras_vo.GaussianSearchDistribution(
            structure, **settings
        ),
        **arguments,
    )
    if noise_generator is not None:
        optimizer.noise_generator = noise_generator
    return optimizer


def by_default(
    population_size: int, stddev: float = 0.2
) -> keras_vo.VOOptimizer:
    """With the sigma and rate of a new network.

    Biases that are set from NumPy look trained.
    """
    return keras_vo.VOOptimizer(
        keras.optimizers.Adam(0.02),
        population_size=population_size,
        search_distribution=keras_vo.GaussianSearchDistribution(stddev=stddev),
        seed=3,
    )


# --- runs ---


def mirrored(replicas: int) -> Any:
    """A strategy of as many logical CPUs; `None` for one."""
    if replicas == 1:
        return None
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def scope(strategy: Any) -> Any:
    return strategy.scope() if strategy else contextlib.nullcontext()


@contextlib.contextmanager
def fresh(policy: str) -> Any:
    """A seeded Keras of a dtype policy."""
    floatx = keras.config.floatx()
    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(1)
    if policy == "float64":
        keras.config.set_floatx("float64")
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(before)


def typed(data: Any) -> Any:
    """Floats in the dtype of Keras, integers in 32 bits."""
    return keras.tree.map_structure(
        lambda a: a.astype(
            keras.config.floatx() if a.dtype.kind == "f" else "int32"
        ),
        data,
    )


def whole_batches(batches: Any, strategy: Any) -> Any:
    """Batches, of which each replica has every whole one."""
    replicas = strategy.num_replicas_in_sync
    batches = batches.flat_map(
        lambda *batch: tf.data.Dataset.from_tensors(batch).repeat(replicas)
    )
    return strategy.distribute_datasets_from_function(lambda _: batches)


def set_weights(model: Any) -> None:
    """From NumPy: initializers may draw other weights in other versions."""
    rng = np.random.default_rng(7)
    for variable in model.trainable_variables:
        fan_in = np.prod(variable.shape[:-1]) or 1
        value = rng.normal(size=variable.shape) / np.sqrt(fan_in)
        if variable.name == "gamma":
            value = 1 + 0.1 * value
        variable.assign(value.astype(keras.config.floatx()))


def searched(
    optimizer: keras_vo.VOOptimizer, weights: list[Any], **losses: Any
) -> Arrays:
    """The arrays of a trajectory."""
    arrays = {name: np.asarray(values) for name, values in losses.items()}
    arrays |= {f"weight{i}": np.asarray(w) for i, w in enumerate(weights)}
    return arrays | {
        f"stddev{i}": s.numpy() for i, s in enumerate(optimizer.stddevs)
    }


def trained(
    layers: Callable[[], list[Any]] = dense,
    data: Callable[[], Any] = tabular,
    *,
    build: Callable[..., Any] = sequential,
    optimizer: Callable[..., Any] = make_optimizer,
    replicas: int = 1,
    sharded: bool = False,
    batch_size: int = BATCH,
    policy: str = "float32",
    compiling: dict[str, Any] | None = None,
    class_weight: dict[int, float] | None = None,
    by_batch: bool = False,
    monitored: bool = False,
    steps: int = STEPS,
    **arguments: Any,
) -> Arrays:
    """A model trained by `fit`, a step an epoch, or by `train_on_batch`."""
    strategy = mirrored(replicas)
    with fresh(policy):
        arrays = typed(data())
        with scope(strategy):
            model = build(layers, arrays[0].shape[1:])
            search = optimizer(**arguments)
            model.compile(
                **{"optimizer": search, "loss": LOSS, "jit_compile": False}
                | (compiling or {})
            )
        set_weights(model)
        model.optimizer.build(model.trainable_variables)
        batches = tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size)
        if steps > STEPS:
            batches = batches.repeat()
        monitor = keras_vo.callbacks.SearchMonitor(every="step")
        if by_batch:
            history: dict[str, list[float]] = {}
            for batch in batches:
                model.reset_metrics()
                logs = model.train_on_batch(
                    *(a.numpy() for a in batch),
                    class_weight=class_weight,
                    return_dict=True,
                )
                for name, value in logs.items():
                    history.setdefault(name, []).append(float(value))
        else:
            if strategy and not sharded:
                batches = whole_batches(batches, strategy)
            history = model.fit(
                batches,
                epochs=steps,
                steps_per_epoch=1,
                shuffle=False,
                class_weight=class_weight,
                callbacks=[monitor] if monitored else [],
                verbose=0,
            ).history
        return searched(
            search, model.get_weights(), **history, **numbers(monitor.history)
        )


def numbers(history: dict[str, list[float]]) -> dict[str, Any]:
    """What a monitor saw, but for the time and for sigma, by layer's name."""
    return {
        f"monitor-{name}": values
        for name, values in history.items()
        if "/" not in name and name != "evaluations_per_second"
    }


def wavy(weights: list[tf.Tensor]) -> tf.Tensor:
    a, b = weights
    return (
        tf.reduce_sum(tf.cos(3 * a))
        + tf.reduce_sum((b - tf.reduce_mean(a)) ** 4)
        + tf.reduce_sum(a * a)
    )


def with_holes(weights: list[tf.Tensor]) -> tf.Tensor:
    """NaN for some members."""
    return wavy(weights) + tf.sqrt(0.45 - weights[0][0, 0])


def minimized(
    objective: Callable[..., Any] = wavy,
    *,
    eager: bool = False,
    dtype: str = "float32",
    replicas: int = 1,
    monitored: bool = False,
    **arguments: Any,
) -> Arrays:
    """A search on a function, without a model."""
    strategy = mirrored(replicas)
    with fresh(dtype), scope(strategy):
        weights = [
            tf.Variable(np.array([[0.5, -1.0], [2.0, 0.3]], dtype)),
            tf.Variable(np.array([0.1, 0.2, 0.3], dtype)),
        ]
        search = make_optimizer(**arguments)
    step = functools.partial(search.minimize, objective, weights)
    if not eager:
        step = tf.function(step, autograph=False)
    monitor = keras_vo.callbacks.SearchMonitor(every="step")
    losses = []
    attached = monitor.attached(search) if monitored else None
    with attached or contextlib.nullcontext():
        for _ in range(STEPS):
            losses.append(step().numpy())
            if monitored:
                monitor.record()
    return searched(
        search,
        [w.numpy() for w in weights],
        population_loss=losses,
        **numbers(monitor.history),
    )


# --- the configurations ---

CONFIGS: dict[str, Config] = {}


def add(
    name: str,
    run: Callable[..., Arrays],
    *positional: Any,
    tolerance: float = FLOAT32,
    exact: bool = True,
    extra: bool = False,
    **arguments: Any,
) -> None:
    CONFIGS[name] = Config(
        functools.partial(run, *positional, **arguments),
        tolerance,
        exact,
        extra,
    )


def model(name: str, *positional: Any, **arguments: Any) -> None:
    add(name, trained, *positional, **arguments)


def function(name: str, *positional: Any, **arguments: Any) -> None:
    add(name, minimized, *positional, **arguments)


INDEPENDENT = {"antithetic": False, "population_size": 7}
PLAIN = {"natural_gradient": False}
TINY = {"memory_budget": 1}
EXTRA = {"extra": True}
EAGERLY = {"run_eagerly": True}
REDRAWN = {"structure": "separable", "max_kl": 0.05} | INDEPENDENT | TINY

# Noise, structures, sampling, shapings.
model("full-fixed", structure="fixed", inner=sgd, fitness_shaping="standardize")
model("full-isotropic", structure="isotropic", **INDEPENDENT)
model("full-layerwise")
model(
    "full-separable",
    structure="separable",
    fitness_shaping="nes",
    **INDEPENDENT,
)
# As the only version with one generator drew, whose numbers are stored.
model(
    "first-generator",
    structure="separable",
    fitness_shaping="nes",
    noise_generator=FIRST,
    **INDEPENDENT,
)
model("full-identity", fitness_shaping="identity", inner=sgd, **EXTRA)
model("full-callable-plain", fitness_shaping=squashed, inner=sgd, **PLAIN)
model("full-max-kl", max_kl=0.02, structure="separable")
model("low-rank1-layerwise", low_rank)
model(
    "low-rank1-isotropic-plain",
    low_rank,
    structure="isotropic",
    fitness_shaping="standardize",
    **PLAIN,
    **EXTRA,
)
model(
    "low-rank2-separable",
    functools.partial(low_rank, 2),
    structure="separable",
    fitness_shaping="nes",
    **INDEPENDENT,
)
model(
    "low-rank2-fixed",
    functools.partial(low_rank, 2),
    structure="fixed",
    inner=sgd,
    **EXTRA,
)
model("local-layerwise", local, fitness_shaping="identity")
model(
    "local-fixed",
    local,
    structure="fixed",
    fitness_shaping="standardize",
    **EXTRA,
)
model(
    "local-isotropic-plain",
    local,
    structure="isotropic",
    fitness_shaping=squashed,
    inner=sgd,
    **PLAIN,
    **EXTRA,
)
model(
    "local-separable",
    local,
    structure="separable",
    fitness_shaping="nes",
    **INDEPENDENT,
)
model(
    "local-positions",
    positions,
    sequences,
    fitness_shaping="identity",
    **EXTRA,
)
model("local-masked", masked, sequences, structure="separable", **INDEPENDENT)
model(
    "first-generator-local",
    masked,
    sequences,
    structure="separable",
    noise_generator=FIRST,
    **INDEPENDENT,
)
model("mixed-layerwise", mixed, fitness_shaping="identity", **EXTRA)
model("mixed-isotropic", mixed, structure="isotropic", **INDEPENDENT, **EXTRA)
model(
    "mixed-separable-max-kl",
    mixed,
    structure="separable",
    max_kl=0.05,
    fitness_shaping="standardize",
)
model("mixed-plain", mixed, inner=sgd, **PLAIN, **EXTRA)
model("mixed-reversed", mixed_reversed, **EXTRA)
model(
    "mixed-reversed-independent",
    mixed_reversed,
    structure="separable",
    **INDEPENDENT,
    **EXTRA,
)
model("convolution", convolution, images, population_size=4)
model(
    "embedding-gru",
    recurrent,
    tokens,
    build=integers,
    structure="separable",
    population_size=4,
)

# Sigma follows the mean in layers of more than 100 weights.
WIDE = {
    "layers": functools.partial(dense, 32, 10),
    "data": functools.partial(tabular, 16, 10),
}
model("follow-mean", **WIDE)
model("follow-mean-off", **WIDE, distribution={"follow_mean": False})
model(
    "follow-mean-isotropic-max-kl", **WIDE, structure="isotropic", max_kl=50.0
)
model(
    "follow-mean-separable-local",
    lambda: [LocalReparamDense(32, "relu"), Dense(10)],
    functools.partial(tabular, 16, 10),
    structure="separable",
    fitness_shaping="identity",
)
# The default sigma is 0.2 in the first, 1 / sqrt(fan in) in the others.
WIDE_STDDEV = ((16 + 10) / (784 * 16 + 16 * 10)) ** 0.5
model(
    "defaults-64-32-10",
    functools.partial(dense, 32, 10),
    functools.partial(tabular, 64, 10),
    optimizer=functools.partial(by_default, 16),
)
model(
    "defaults-784-16-10",
    functools.partial(dense, 16, 10),
    functools.partial(tabular, 784, 10),
    optimizer=functools.partial(by_default, 16, WIDE_STDDEV),
)
model(
    "defaults-local-784-16-10",
    lambda: [LocalReparamDense(16, "relu"), LowRankDense(10)],
    functools.partial(tabular, 784, 10),
    optimizer=functools.partial(by_default, 16, WIDE_STDDEV),
    **EXTRA,
)

# Chunks; noise that is drawn again; activations evaluated again. In
# `train_on_batch` the size of the batch is known when a step is traced.
model("full-chunks", chunk_size=4, population_size=14)
model("full-redrawn", structure="separable", **TINY)
model("low-rank-redrawn", low_rank, chunk_size=4, **TINY)
model("local-chunks", local, chunk_size=4, population_size=14, **EXTRA)
model("local-evaluated-twice", local, structure="separable", **TINY)
model("mixed-chunks", mixed, chunk_size=4, population_size=14, **EXTRA)
model("mixed-redrawn-by-batch", mixed, by_batch=True, **TINY)
model("mixed-redrawn-eager", mixed, compiling=EAGERLY, **REDRAWN)
model("convolution-chunks", convolution, images, chunk_size=4, **TINY, **EXTRA)

# What Keras has around it.
CLASSES = {0: 0.5, 1: 2.0, 2: 1.0}
model("class-weight", class_weight=CLASSES)
model("class-weight-mixed", mixed, class_weight=CLASSES, **EXTRA)
model("sample-weight", data=weighted, fitness_shaping="identity", **EXTRA)
model("sample-weight-local", local, weighted)
model("batch-normalization", normalized)
model(
    "batch-normalization-mixed",
    local_normalized,
    structure="separable",
    **EXTRA,
)
model("regularized", regularized, fitness_shaping="identity")
TWO = {
    "data": two_targets,
    "build": two_heads,
    "compiling": {"loss": [LOSS, "mse"], "loss_weights": [1.0, 0.3]},
}
model("two-outputs-frozen", lambda: [Dense(5, "tanh")], **TWO)
model(
    "two-outputs-frozen-local",
    lambda: [LocalReparamDense(5, "tanh")],
    **TWO,
    **EXTRA,
)
model("inner-adamw", inner=adamw)
model("eager-mixed", mixed, compiling=EAGERLY, population_size=4)
model("jit-mixed", mixed, compiling={"jit_compile": True}, **EXTRA)
model("by-batch", by_batch=True, **EXTRA)
model("by-batch-class-weight-local", local, by_batch=True, class_weight=CLASSES)
model("float64-mixed", mixed, policy="float64", tolerance=FLOAT64)
model(
    "float16-mixed",
    mixed,
    policy="mixed_float16",
    fitness_shaping="identity",
    tolerance=FLOAT16,
)
model(
    "converted-low-rank",
    build=functools.partial(converted, "low_rank"),
    **EXTRA,
)
model(
    "converted-local",
    build=functools.partial(converted, "local_reparam"),
    **EXTRA,
)
# The ratio of signal to noise is measured in one of eight steps.
model("monitored-mixed", mixed, monitored=True, steps=9, **EXTRA)
model("dropout", dropout)
model(
    "stateful-rnn",
    stateful,
    sequences,
    build=stateful_model,
    population_size=4,
)

# Without a model.
function("minimize-eager", eager=True)
function("minimize-eager-seed-of-keras", eager=True, seed=None)
function(
    "minimize-eager-float64",
    eager=True,
    dtype="float64",
    structure="separable",
    tolerance=FLOAT64,
    **INDEPENDENT,
)
function("minimize-float32", structure="separable", fitness_shaping="nes")
function(
    "minimize-float64",
    dtype="float64",
    fitness_shaping="identity",
    inner=sgd,
    max_kl=0.1,
    tolerance=FLOAT64,
)
function(
    "minimize-float64-chunks",
    dtype="float64",
    structure="isotropic",
    chunk_size=3,
    tolerance=FLOAT64,
    **INDEPENDENT,
    **TINY,
)
function("minimize-nonfinite", with_holes)
function("minimize-all-nonfinite", lambda w: np.nan * wavy(w))
function(
    "minimize-bounds",
    distribution={"min_stddev": 0.099, "max_stddev": 0.101},
    structure="separable",
)
function("minimize-monitored", monitored=True, max_kl=0.1)

# Replicas that all have the same batch.
function("replicas2-minimize-fitness", replicas=2, exchange="fitness")
function(
    "replicas3-minimize-gradient-float64",
    replicas=3,
    exchange="gradient",
    dtype="float64",
    structure="separable",
    tolerance=FLOAT64,
    **INDEPENDENT,
)
model("replicas2-full-fitness", replicas=2, exchange="fitness", **EXTRA)
model("replicas2-full-gradient", replicas=2, exchange="gradient")
model(
    "replicas3-full-fitness-redrawn",
    replicas=3,
    exchange="fitness",
    **REDRAWN,
)
model(
    "replicas3-low-rank-gradient",
    low_rank,
    replicas=3,
    exchange="gradient",
    population_size=10,
    **EXTRA,
)
model("replicas2-low-rank-auto", low_rank, replicas=2, **EXTRA)
model("replicas2-local-fitness", local, replicas=2, exchange="fitness", **EXTRA)
model("replicas2-mixed-fitness", mixed, replicas=2, exchange="fitness")
model(
    "replicas2-mixed-gradient",
    mixed_reversed,
    replicas=2,
    exchange="gradient",
    **EXTRA,
)
model(
    "replicas3-mixed-fitness-chunks",
    mixed,
    replicas=3,
    exchange="fitness",
    population_size=14,
    chunk_size=4,
    **EXTRA,
)
model("replicas2-follow-mean", **WIDE, replicas=2, max_kl=50.0, **EXTRA)
model("replicas2-batch-normalization", normalized, replicas=2, **EXTRA)
model("replicas2-monitored", replicas=2, monitored=True, **EXTRA)

# What the optimizer chooses for Keras's layers.
model("chosen-local", perturbation="local_reparam")
model(
    "chosen-local-recurrent",
    recurrent,
    tokens,
    perturbation="local_reparam",
    **EXTRA,
)
model("chosen-low-rank-recurrent", recurrent, tokens, perturbation="low_rank")

# Replicas that share a batch.
SHARDED = {"replicas": 2, "sharded": True}
model("sharded2-full-fitness", exchange="fitness", **SHARDED)
model(
    "sharded2-full-gradient",
    exchange="gradient",
    **SHARDED,
    **EXTRA,
)
model("sharded2-local", local, **SHARDED, **EXTRA)
model(
    "sharded2-mixed",
    mixed,
    exchange="fitness",
    **SHARDED,
    **EXTRA,
)
model(
    "sharded2-sample-weight",
    local_normalized,
    weighted,
    **SHARDED,
    **EXTRA,
)
model(
    "sharded3-empty",
    replicas=3,
    sharded=True,
    batch_size=2,
    **EXTRA,
)


# --- what is stored ---


def summary(array: np.ndarray) -> np.ndarray:
    """A whole array, or a part of it and a checksum of all of it.

    The checksum is the mean, the root mean square and the mean product with a
    fixed random vector, all of the size of the entries.
    """
    flat = array.ravel()
    if flat.size <= WHOLE:
        return array
    wide = flat.astype("float64")
    signs = np.random.default_rng(11).uniform(-1.0, 1.0, flat.size)
    checks = [wide.mean(), np.sqrt((wide**2).mean()), (wide * signs).mean()]
    return np.concatenate([checks, wide[:WHOLE]])


def run(name: str) -> Arrays:
    """What is stored of a configuration, of today's code."""
    return {key: summary(a) for key, a in CONFIGS[name].run().items()}


def stored(name: str, path: pathlib.Path = PATH) -> Arrays:
    """What was stored of it."""
    prefix = f"{name}/"
    with np.load(path) as file:
        return {
            key.removeprefix(prefix): file[key]
            for key in file.files
            if key.startswith(prefix)
        }


def stored_names(path: pathlib.Path = PATH) -> set[str]:
    """Of what is stored."""
    with np.load(path) as file:
        return {key.split("/")[0] for key in file.files}


def bit_equal(one: np.ndarray, other: np.ndarray) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and one.tobytes() == other.tobytes()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference in parts of the largest entry of `other`."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return np.inf
    one, other = one.astype("float64"), other.astype("float64")
    if not np.array_equal(np.isfinite(one), np.isfinite(other)):
        return np.inf
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
        return np.inf
    largest = np.abs(one - other)[finite].max(initial=0.0)
    return largest / (np.abs(other[finite]).max(initial=0.0) or 1.0)


def differences(arrays: Arrays, expected: Arrays) -> dict[str, float]:
    """Those of all arrays that are not equal bit by bit."""
    found = {}
    for key in {**expected, **arrays}:
        if key not in arrays or key not in expected:
            found[key] = np.inf
        elif not bit_equal(arrays[key], expected[key]):
            found[key] = difference(arrays[key], expected[key])
    return found


def store(names: list[str]) -> None:
    """Replaces what is stored of `names`."""
    kept = {}
    if PATH.exists():
        with np.load(PATH) as file:
            kept = {
                key: file[key]
                for key in file.files
                if key.split("/")[0] in CONFIGS
            }
    for name in names:
        began = time.time()
        kept = {k: v for k, v in kept.items() if k.split("/")[0] != name}
        kept |= {f"{name}/{key}": value for key, value in run(name).items()}
        print(f"{name}: {time.time() - began:.1f} s", flush=True)
    np.savez_compressed(PATH, **dict(sorted(kept.items())))
    print(f"{PATH}: {PATH.stat().st_size / 1024:.0f} KiB")


def compare(names: list[str]) -> bool:
    """Prints how `names` differ; whether all are within their tolerances."""
    fine = True
    for name in names:
        began = time.time()
        found = differences(run(name), stored(name))
        seconds = f"{time.time() - began:.1f} s"
        if not found:
            print(f"{name}: bit-equal, {seconds}", flush=True)
            continue
        parts = [f"{key} {value:.1e}" for key, value in found.items()]
        config = CONFIGS[name]
        differs = max(found.values()) > config.tolerance
        fine = fine and not differs
        words = "DIFFERS" if differs else "within tolerance"
        if config.exact and not differs:
            words += " (but not bit-equal)"
        print(f"{name}: {words}, {seconds}: {', '.join(parts)}", flush=True)
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--store", nargs="*", metavar="name")
    group.add_argument("--compare", nargs="*", metavar="name")
    options = parser.parse_args()
    names = options.compare if options.store is None else options.store
    if names == ["all"]:
        names = list(CONFIGS)
    unknown = sorted(set(names) - set(CONFIGS))
    if unknown:
        parser.error(f"no such configurations: {unknown}")
    names = names or [n for n, c in CONFIGS.items() if not c.extra]
    # As in conftest.py: devices for three replicas.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 3,
    )
    tf.get_logger().setLevel("ERROR")
    gc.collect()
    gc.freeze()
    began = time.time()
    if options.store is not None:
        store(names)
        fine = True
    else:
        fine = compare(names)
    print(f"{len(names)} configurations: {time.time() - began:.0f} s")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
