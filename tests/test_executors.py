"""`minimize` by executors: threads, processes, what goes wrong in them."""

import concurrent.futures as futures
import multiprocessing
import os
import signal
import threading
import warnings

import models
import numpy as np
import objectives
import pytest
import slow_objective
import tensorflow as tf

import keras_vo
from keras_vo import remote_objective
from keras_vo.evaluation import executor as executor_lib
from keras_vo.evaluation.pools import Pool

FORKED = multiprocessing.get_context("forkserver")
# Else each new worker imports TensorFlow: as in test_multi_worker.
FORKED.set_forkserver_preload(["keras_vo"])


def processes(count=2):
    return futures.ProcessPoolExecutor(count, FORKED)


def search(executor, objective, steps=1, variables=None, **kwargs):
    """Steps of 32 members: the state, and the optimizer."""
    if variables is None:
        start = np.random.default_rng(0).normal(size=(4, 3))
        variables = [tf.Variable(start.astype("float32"))]
    optimizer = models.make_optimizer(population_size=32)
    for _ in range(steps):
        if executor is None:
            optimizer.minimize(objective, variables, **kwargs)
        else:
            optimizer.minimize(
                objective, variables, executor=executor, **kwargs
            )
    return [v.numpy() for v in [*variables, *optimizer.variables]], optimizer


def told(objective, steps=1):
    """The same, where `chosen` members are missing."""
    start = np.random.default_rng(0).normal(size=(4, 3))
    variables = [tf.Variable(start.astype("float32"))]
    optimizer = models.make_optimizer(population_size=32)
    for _ in range(steps):
        population = optimizer.ask(variables)
        missing = [objectives.chosen(w) for w in population]
        optimizer.tell(
            population,
            [
                None if gone else objective(w)
                for w, gone in zip(population, missing, strict=True)
            ],
        )
    assert any(missing) and not all(missing)
    return [v.numpy() for v in [*variables, *optimizer.variables]]


class Now(futures.Executor):
    """The least that an executor can be."""

    def submit(self, function, /, *args, **kwargs):
        future = futures.Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def test_the_same_steps_by_threads_and_others():
    expected, _ = search(None, objectives.plain, steps=3)
    for executor in (Now(), futures.ThreadPoolExecutor(3)):
        with executor:
            for terms in ({}, {"timeout": 60, "retries": 1}):
                got, _ = search(executor, objectives.plain, steps=3, **terms)
                models.assert_same_state(got, expected)


def test_a_float32_loss_stays_one():
    """As without an executor: losses are ranked in their precision."""

    def objective(weights):
        return tf.reduce_sum(tf.square(weights[0])) + 2.0**20

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of losses that can't be told apart
        expected, _ = search(None, objective)
        with futures.ThreadPoolExecutor(2) as threads:
            got, optimizer = search(threads, objective)
    assert optimizer.report.losses.dtype == np.float32
    models.assert_same_state(got, expected)


def test_scores():
    with futures.ThreadPoolExecutor(2) as threads:
        got, optimizer = search(
            threads, lambda w: -objectives.plain(w), maximize=True
        )
    assert optimizer.report.best_loss > 0
    models.assert_same_state(got, search(None, objectives.plain)[0])


@pytest.mark.parametrize(
    "objective, error",
    [
        (objectives.raises, "ArithmeticError"),
        (objectives.exits, "SystemExit"),
        (objectives.says_nothing, "ValueError"),
    ],
)
def test_failures_in_threads_are_missing(objective, error):
    with futures.ThreadPoolExecutor(2) as threads:
        with pytest.warns(UserWarning, match=rf"of 32 members.* by {error}"):
            got, optimizer = search(threads, objective, steps=2)
    models.assert_same_state(got, told(objectives.plain, steps=2))
    assert optimizer.report.missing > 0


def test_an_undefined_loss_is_the_worst():
    """As without an executor: the objective has said something."""
    with futures.ThreadPoolExecutor(2) as threads:
        got, optimizer = search(threads, objectives.undefined)
        scored, _ = search(threads, objectives.undefined, maximize=True)
    assert optimizer.report.nonfinite > 0
    models.assert_same_state(got, search(None, objectives.undefined)[0])
    expected, _ = search(None, objectives.undefined, maximize=True)
    models.assert_same_state(scored, expected)


def test_hanging_threads_are_given_up():
    """More of them than the pool has threads; it can be used again."""
    with futures.ThreadPoolExecutor(1) as threads:
        release = threading.Event()

        def hangs(weights):
            if objectives.chosen(weights):
                release.wait(60)
            return objectives.plain(weights)

        with pytest.warns(UserWarning, match="by TimeoutError"):
            got, _ = search(threads, hangs, timeout=0.2)
        release.set()
        models.assert_same_state(got, told(objectives.plain))
        again, _ = search(threads, objectives.plain)
        models.assert_same_state(again, search(None, objectives.plain)[0])


def test_a_late_result_is_none(monkeypatch):
    """Where nothing could interrupt it, and no one looked meanwhile."""
    monkeypatch.delattr(signal, "setitimer")
    with pytest.raises(TimeoutError, match="no result within 0.01 s"):
        executor_lib._limited(threading.Event().wait, 0.01, 0.05)


@pytest.mark.parametrize("retries, missing", [(0, True), (1, True), (2, False)])
def test_retries(retries, missing):
    """Each member fails twice before it succeeds."""
    seen, lock = {}, threading.Lock()

    def objective(weights):
        key = weights[0].tobytes()
        with lock:
            seen[key] = seen.get(key, 0) + 1
        if objectives.chosen(weights) and seen[key] < 3:
            raise OSError("not yet")
        return objectives.plain(weights)

    with futures.ThreadPoolExecutor(2) as threads:
        if missing:
            with pytest.warns(UserWarning, match="by OSError"):
                _, optimizer = search(threads, objective, retries=retries)
        else:
            _, optimizer = search(threads, objective, retries=retries)
    assert (optimizer.report.missing > 0) == missing
    assert set(seen.values()) == {1, min(retries + 1, 3)}


def test_all_failed():
    """An error, from that of the first; nothing has changed."""
    start = [tf.Variable(tf.zeros([2]))]
    optimizer = models.make_optimizer()
    optimizer.build(start)
    before = [v.numpy() for v in [*start, *optimizer.variables]]
    with futures.ThreadPoolExecutor(2) as threads:
        with pytest.raises(RuntimeError, match=r"All.*8 by KeyError") as error:
            optimizer.minimize(objectives.always_fails, start, executor=threads)
    cause = error.value.__cause__
    assert isinstance(cause, KeyError)
    assert cause.__traceback__.tb_next is not None  # where it was raised
    models.assert_same_state(
        [v.numpy() for v in [*start, *optimizer.variables]], before
    )


@pytest.mark.usefixtures("ctrl_c")
def test_interrupted_between_and_in_the_midst(monkeypatch):
    """Ctrl-C while members are evaluated: no step, and none is begun. While
    the step is taken: it is whole, and the error comes after it."""
    variables = [tf.Variable(tf.zeros([3]))]
    optimizer = models.make_optimizer()
    optimizer.build(variables)
    before = [v.numpy() for v in [*variables, *optimizer.variables]]
    begun = []

    def objective(weights):
        begun.append(1)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)
        return objectives.plain(weights)

    with futures.ThreadPoolExecutor(1) as threads:
        with pytest.raises(KeyboardInterrupt):
            optimizer.minimize(objective, variables, executor=threads)
    assert len(begun) <= 5
    models.assert_same_state(
        [v.numpy() for v in [*variables, *optimizer.variables]], before
    )

    apply = optimizer.inner_optimizer.apply

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return apply(*args)

    monkeypatch.setattr(optimizer.inner_optimizer, "apply", interrupted)
    for step in (
        lambda: optimizer.minimize(objectives.plain, variables),
        lambda: optimizer.tell(optimizer.ask(variables), np.arange(8.0)),
    ):
        with pytest.raises(KeyboardInterrupt):
            step()
    monkeypatch.undo()
    whole = [tf.Variable(tf.zeros([3]))]
    other = models.make_optimizer()
    other.minimize(objectives.plain, whole)
    other.tell(other.ask(whole), np.arange(8.0))
    models.assert_same_state(
        [v.numpy() for v in [*variables, *optimizer.variables]],
        [v.numpy() for v in [*whole, *other.variables]],
    )


@pytest.mark.slow
def test_processes():
    """One pool for all that can happen to its workers."""
    expected, _ = search(None, objectives.plain, steps=2)
    with processes() as pool:
        got, _ = search(pool, objectives.plain, steps=2)
        models.assert_same_state(got, expected)
        for objective, error, terms in (
            (objectives.raises, "ArithmeticError", {}),
            (objectives.crashes, "BrokenProcessPool", {}),
            (objectives.exits, "SystemExit", {}),
            (objectives.hangs, "TimeoutError", {"timeout": objectives.LIMIT}),
        ):
            with pytest.warns(UserWarning, match=rf"\d by {error}"):
                got, optimizer = search(pool, objective, **terms)
            models.assert_same_state(got, told(objectives.plain))
        remote = keras_vo.RemoteObjective(objectives.made, 1.0)
        got, _ = search(pool, remote, steps=2, timeout=60.0)
        models.assert_same_state(got, expected)


@pytest.mark.slow
def test_processes_that_no_signal_wakes(monkeypatch):
    """They are killed, and no one's result is lost but theirs."""
    monkeypatch.setattr(executor_lib, "_GRACE", 2.0)
    with processes() as pool:
        with pytest.warns(UserWarning, match="by TimeoutError"):
            _, optimizer = search(pool, objectives.hangs_deaf, timeout=1.0)
        start = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
        population = models.make_optimizer(population_size=32).ask(
            [tf.Variable(start)]
        )
        deaf = [objectives.deaf(weights) for weights in population]
        assert np.flatnonzero(deaf)[0] < 28  # others come after it
        np.testing.assert_array_equal(np.isnan(optimizer.report.losses), deaf)
        got, _ = search(pool, objectives.plain)
    models.assert_same_state(got, search(None, objectives.plain)[0])


@pytest.mark.slow
def test_processes_that_begin_slowly(monkeypatch):
    """What a new worker imports is no member's time."""
    monkeypatch.setattr(executor_lib, "_GRACE", 0.5)
    with processes() as pool:
        with pytest.warns(UserWarning, match=r"\d by BrokenProcessPool"):
            got, _ = search(pool, slow_objective.crashes, timeout=0.5)
    models.assert_same_state(got, told(objectives.plain))


@pytest.mark.slow
def test_a_pool_that_was_replaced_ends_with_the_first():
    with processes(1) as pool:
        with pytest.warns(UserWarning, match="by BrokenProcessPool"):
            search(pool, objectives.crashes)
        children = set(multiprocessing.active_children())
        assert children
    assert not children & set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="after shutdown"):
        search(pool, objectives.plain)


def broken_start():
    raise ArithmeticError("no worker can begin")


@pytest.mark.slow
def test_workers_that_cannot_begin():
    """All is missing at once, not one after another."""
    with futures.ProcessPoolExecutor(2, FORKED, broken_start) as pool:
        with pytest.raises(RuntimeError, match="32 by BrokenProcessPool"):
            search(pool, objectives.plain)


class Interrupting(BaseException):
    pass


@pytest.mark.parametrize(
    "error, kind",
    [
        (Interrupting(), "Interrupting"),
        (GeneratorExit(), "GeneratorExit"),
        (StopIteration(), "StopIteration"),
    ],
)
def test_whatever_is_raised_is_missing(error, kind):
    def objective(weights):
        if objectives.chosen(weights):
            raise error
        return objectives.plain(weights)

    with futures.ThreadPoolExecutor(2) as threads:
        with pytest.warns(UserWarning, match=rf"\d by {kind}"):
            got, _ = search(threads, objective)
    models.assert_same_state(got, told(objectives.plain))


def test_what_others_cancel_is_submitted_again():
    """As by another search that makes a new pool of the same executor."""

    class Cancels(Now):
        cancelled = 0

        def submit(self, function, /, *args, **kwargs):
            if self.cancelled < 5:
                self.cancelled += 1
                future = futures.Future()
                future.cancel()
                future.set_running_or_notify_cancel()
                return future
            return super().submit(function, *args, **kwargs)

    got, _ = search(Cancels(), objectives.plain)
    models.assert_same_state(got, search(None, objectives.plain)[0])


@pytest.mark.usefixtures("ctrl_c")
def test_objectives_that_assign_the_variables():
    """One at a time they may; at the same time they would see each other's."""
    variables = [tf.Variable(tf.zeros([3]))]

    def assigning(weights):
        variables[0].assign(weights[0])
        return objectives.plain([variables[0].numpy()])

    def fails(weights):
        variables[0].assign(weights[0])
        raise ArithmeticError

    def interrupts(weights):
        variables[0].assign(weights[0])
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)
        return 0.0

    optimizer = models.make_optimizer()
    for objective, error in (
        (fails, RuntimeError),
        (interrupts, KeyboardInterrupt),
    ):
        with futures.ThreadPoolExecutor(1) as threads:
            with pytest.raises(error):
                optimizer.minimize(objective, variables, executor=threads)
        np.testing.assert_array_equal(variables[0], np.zeros(3))
    with futures.ThreadPoolExecutor(2) as threads:
        with pytest.raises(RuntimeError, match="leaves the variables alone"):
            optimizer.minimize(assigning, variables, executor=threads)
    np.testing.assert_array_equal(variables[0], np.zeros(3))
    assert int(optimizer.generations) == 0
    with futures.ThreadPoolExecutor(1) as threads:
        optimizer.minimize(assigning, variables, executor=threads)
    other, expected = [tf.Variable(tf.zeros([3]))], models.make_optimizer()
    expected.minimize(objectives.plain, other)
    np.testing.assert_array_equal(variables[0], other[0])


def test_a_pool_that_cannot_be_replaced():
    """What breaks stays missing, and the rest goes on."""

    class Breaks(Now):
        def submit(self, function, /, *args, **kwargs):
            if objectives.chosen(args[0]):
                raise futures.BrokenExecutor("lost")
            return super().submit(function, *args)

    with pytest.warns(UserWarning, match="by BrokenExecutor"):
        got, _ = search(Breaks(), objectives.plain)
    models.assert_same_state(got, told(objectives.plain))


def test_a_new_pool_is_as_the_former_one():
    started = []
    pool = futures.ThreadPoolExecutor(3, "name", started.append, (7,))
    wrapper = Pool(pool)
    wrapper.replace()
    thread = wrapper.submit(threading.current_thread).result()
    assert thread.name.startswith("name")
    assert (wrapper.workers, started) == (3, [7])
    assert Pool(Now()).workers is None


def test_progress(capsys):
    with futures.ThreadPoolExecutor(2) as threads:
        search(threads, objectives.plain, progress=True)
    assert "32/32" in capsys.readouterr().out


def test_an_error_names_the_member():
    """Without an executor it is raised, with its traceback."""
    with pytest.raises(ArithmeticError, match="^a member that") as error:
        search(None, objectives.raises)
    start = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    population = models.make_optimizer(population_size=32).ask(
        [tf.Variable(start)]
    )
    pairs = [(i + half) for i in range(16) for half in (0, 16)]
    first = next(i for i in pairs if objectives.chosen(population[i]))
    note = f"(keras_vo: member {first} of 32, generation 0)"
    assert error.value.__notes__ == [note]
    assert error.traceback[-1].name == "raises"


WRONG = {
    "no executor": ({"executor": 3}, TypeError, "concurrent.futures"),
    "alone": ({"timeout": 3.0}, ValueError, "those of an executor"),
    "retries": ({"retries": -1, "executor": Now()}, ValueError, "of 0 or more"),
    "timeout": ({"timeout": 0, "executor": Now()}, ValueError, "`timeout`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    arguments, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        models.make_optimizer().minimize(
            objectives.plain, [tf.Variable(1.0)], **arguments
        )


def test_remote_objectives():
    """Made once in each thread; and errors."""
    with pytest.raises(TypeError, match="function that makes the objective"):
        keras_vo.RemoteObjective(3)
    with pytest.raises(TypeError, match="a function from a list of weights"):
        keras_vo.RemoteObjective(lambda: 3)([])
    count = []

    def make(scale, shift=0):
        count.append(threading.current_thread())
        return lambda weights: scale * objectives.plain(weights) + shift

    remote = keras_vo.RemoteObjective(make, 1, shift=0)
    other = keras_vo.RemoteObjective(make, 0, shift=5)
    with futures.ThreadPoolExecutor(2) as threads:
        got, _ = search(threads, remote, steps=3)
        assert len(count) == len(set(count)) <= 2
        assert threads.submit(other, [np.zeros(2)]).result() == 5
    with futures.ThreadPoolExecutor(1) as thread:
        for _ in range(10):
            thread.submit(keras_vo.RemoteObjective(make, 1), [1.0]).result()
        kept = thread.submit(lambda: len(remote_objective._built.__dict__))
        assert kept.result() <= 4
    models.assert_same_state(got, search(None, objectives.plain, steps=3)[0])
