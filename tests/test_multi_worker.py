"""Two worker processes under MultiWorkerMirroredStrategy.

They fail here if Keras changes what `replicas/model.py` overrides: its own
`fit` does not work under this strategy.
"""

import csv
import json
import multiprocessing
import os
import socket
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
import worker as worker_program

from keras_vo.replicas import cluster as cluster_lib
from keras_vo.replicas import workers


def free_addresses(count):
    servers = [socket.create_server(("localhost", 0)) for _ in range(count)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in servers]
    for server in servers:
        server.close()
    return addresses


PROCESSES = multiprocessing.get_context("forkserver")
# One process imports TensorFlow, of which the others are made.
PROCESSES.set_forkserver_preload(["keras_vo"])


def work(options, environment, output):
    """What a process does; all that it prints goes to the file `output`."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    worker_program.main(worker_program.OPTIONS | options)


def run(folder, *options, timeout=240):
    """One process for each dict of options: return codes and outputs."""
    addresses = free_addresses(len(options))
    outputs = [folder / f"output{index}" for index in range(len(options))]
    processes = []
    for index, (own, output) in enumerate(zip(options, outputs, strict=True)):
        config = {
            "cluster": {"worker": addresses},
            "task": {"type": "worker", "index": index},
        }
        environment = {"TF_CONFIG": json.dumps(config)}
        processes.append(
            PROCESSES.Process(target=work, args=(own, environment, output))
        )
    end = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            assert process.exitcode is not None, [
                output.read_text() for output in outputs
            ]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
    return (
        [process.exitcode for process in processes],
        [output.read_text() for output in outputs],
    )


def results(path):
    with np.load(path) as stored:
        return dict(stored)


def assert_all_equal(*runs):
    first, *others = runs
    for other in others:
        assert other.keys() == first.keys()
        for name, value in first.items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.slow
def test_two_workers_one_lost_and_both_resumed(tmp_path):
    """A killed worker ends the other; both go on, and end as one replica.

    10 steps on batches that both workers have, of which the first run takes
    7.
    """
    backup = tmp_path / "shared" / "backup"
    checkpoint = tmp_path / "made" / "best.keras"
    sensitivity = {"sensitivity": "sum", "sensitivity_period": 3}
    options = {
        "units": [],
        "optimizer": sensitivity,
        "fit": {"epochs": 2},
        "evaluate": False,
        "backup": str(backup),
        "checkpoint": str(checkpoint),
    }

    def two(name, **changes):
        own = options | {"result": str(tmp_path / f"{name}{{}}.npz")} | changes
        return run(tmp_path, own, own)

    began = time.monotonic()
    codes, outputs = two("killed", kill=[1, 7])
    assert codes[1] == -9
    assert codes[0] == 1
    assert "RuntimeError: A worker was lost" in outputs[0]
    assert time.monotonic() - began < 120
    assert backup.exists()

    codes, outputs = two("resumed")
    assert codes == [0, 0], outputs
    assert not backup.exists()
    resumed = [results(tmp_path / f"resumed{i}.npz") for i in range(2)]
    assert_all_equal(*resumed)
    own = {"units": [], "optimizer": sensitivity}
    one = worker_program.model(worker_program.OPTIONS | own)
    x, y = worker_program.data()
    history = one.fit(
        x, y, batch_size=16, epochs=2, shuffle=False, verbose=0
    ).history
    for index, weight in enumerate(one.weights):
        np.testing.assert_allclose(resumed[0][f"w{index}"], weight, rtol=1e-5)
    for index, stddev in enumerate(one.optimizer.stddevs):
        np.testing.assert_allclose(resumed[0][f"s{index}"], stddev, rtol=1e-5)
    for name, values in history.items():
        # That of a resumed run begins where it resumes.
        np.testing.assert_allclose(
            resumed[0][f"history {name}"], values[1:], rtol=1e-5
        )
    loaded = keras.models.load_model(checkpoint)
    for index, weight in enumerate(loaded.weights):
        np.testing.assert_array_equal(resumed[0][f"w{index}"], weight)
    assert int(loaded.optimizer.generations.numpy()) == 10


@pytest.mark.slow
def test_shards_and_gradients_across_processes(tmp_path):
    """TensorFlow's own constructor, uneven batches, three steps at once.

    And ask and tell, and episodes, each worker with its members.
    """
    options = {
        "strategy": "tensorflow",
        "same_batch": False,
        "optimizer": {"exchange": "gradient", "sensitivity": "inputs"},
        "compile": {"steps_per_execution": 3},
        "monitor": str(tmp_path / "search{}.csv"),
        "told": True,
        "result": str(tmp_path / "{}.npz"),
    }
    codes, outputs = run(tmp_path, options, options)
    assert codes == [0, 0], outputs
    first, second = (results(tmp_path / f"{i}.npz") for i in range(2))
    assert_all_equal(first, second)
    with (tmp_path / "search0.csv").open() as file:
        rows = list(csv.DictReader(file))  # of all steps, however executed
    assert [float(row["step"]) for row in rows] == [*range(1, len(rows) + 1)]
    assert float(rows[-1]["evaluations"]) == 12 * len(rows) > 0
    assert np.isfinite(float(rows[-1]["gradient_snr"]))
    assert not (tmp_path / "search1.csv").exists()  # the first one writes
    assert first["history loss"][-1] < first["history loss"][0]
    np.testing.assert_allclose(first["told"], worker_program.told()[0], 1e-4)
    np.testing.assert_allclose(first["mixed"], worker_program.mixed(), 1e-4)
    played, interactions = worker_program.play()
    assert first["interactions"] == interactions
    for index, value in enumerate(played):
        np.testing.assert_allclose(first[f"played{index}"], value, rtol=1e-4)
    one = worker_program.model(worker_program.OPTIONS)
    x, y = worker_program.data()
    one.set_weights([first[f"w{i}"] for i in range(len(one.weights))])
    np.testing.assert_allclose(
        first["evaluated"], one.evaluate(x, y, verbose=0), rtol=1e-5
    )
    np.testing.assert_allclose(
        first["predicted"], one.predict(x, verbose=0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_workers_that_differ_are_told_in_what(tmp_path):
    same = {"fit": {"epochs": 1}}
    other = {
        "fit": {"epochs": 2},
        "optimizer": {"seed": 4, "population_size": 14},
    }
    codes, outputs = run(tmp_path, same, other)
    assert codes == [1, 1]
    for output in outputs:
        message = output.splitlines()[-1]
        assert "worker 1 has epochs=2, worker 0 1" in message
        assert "worker 1 has population_size=14, worker 0 12" in message
        assert "worker 1 has seed=4, worker 0 3" in message


@pytest.mark.slow
def test_models_of_other_shapes_do_not_hang(tmp_path):
    """TensorFlow itself finds out, when the weights are made.

    Worker 0 stops too; what it says is sometimes that of an operation before.
    """
    codes, outputs = run(tmp_path, {}, {"units": [7]})
    assert codes == [1, 1]
    assert "task:1" in outputs[1]
    assert "expected shape [4,7]" in outputs[1]
    assert "expected shape [4,5]" in outputs[1]


# --- the meeting of workers: threads in place of processes ---


def meet(*clusters, timeout=20.0):
    """What each of the clusters' workers raises, or None."""
    raised = [None] * len(clusters)

    def attend(index, cluster):
        try:
            cluster_lib.meet(cluster, timeout)
        except Exception as error:
            raised[index] = error

    threads = [
        threading.Thread(target=attend, args=item)
        for item in enumerate(clusters)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def clusters(count):
    addresses = tuple(free_addresses(count))
    names = tuple(f"worker:{i}" for i in range(count))
    return [cluster_lib.Cluster(names, addresses, i) for i in range(count)]


def test_three_workers_meet():
    assert meet(*clusters(3)) == [None, None, None]


def test_a_worker_that_does_not_come():
    first, second, _ = clusters(3)
    errors = meet(first, second, timeout=0.7)
    for error in errors:
        assert isinstance(error, TimeoutError)
        assert "nothing from worker:2 within 0.7 seconds" in str(error)


def test_the_first_worker_does_not_come():
    _, second = clusters(2)
    (error,) = meet(second, timeout=0.5)
    assert isinstance(error, TimeoutError)
    assert f"worker:0 to answer at {second.addresses[0]}" in str(error)


def test_workers_of_different_clusters():
    first, second = clusters(2)
    other = cluster_lib.Cluster(
        (*second.names, "worker:2"), (*second.addresses, "far:1"), 1
    )
    for error in meet(first, other):
        assert isinstance(error, ValueError)
        assert "of worker 1" in str(error)
        assert "far:1" in str(error)


def test_two_processes_that_are_the_same_worker():
    first, second, _ = clusters(3)
    errors = meet(first, second, second, timeout=1.0)
    assert "two processes that are worker 1" in str(errors[0])


def test_strangers_do_not_disturb_the_meeting(monkeypatch):
    """A silent one, one that is gone, one that says something else.

    All patience is a tenth of what it is.
    """
    settimeout = socket.socket.settimeout
    monkeypatch.setattr(
        socket.socket,
        "settimeout",
        lambda self, seconds: settimeout(self, seconds and seconds / 10),
    )
    first, second = clusters(2)
    raised = []
    host = threading.Thread(target=lambda: raised.extend(meet(first)))
    host.start()
    address = ("localhost", int(first.addresses[0].rpartition(":")[2]))
    strangers = []
    for words in (None, b"", b"GET / HTTP/1.1\r\n\r\n", b'{"index": []}\n'):
        while True:
            try:
                stranger = socket.create_connection(address)
                break
            except OSError:
                time.sleep(0.05)
        strangers.append(stranger)
        if words is not None:
            stranger.sendall(words)
            stranger.close()
    assert meet(second) == [None]
    host.join()
    assert raised == [None]
    strangers[0].close()


def test_an_address_in_brackets():
    first, second = clusters(2)
    port = first.addresses[0].rpartition(":")[2]
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    addresses = (f"[::1]:{port}", second.addresses[1])
    both = [
        cluster_lib.Cluster(first.names, addresses, index) for index in (0, 1)
    ]
    assert meet(*both) == [None, None]


@pytest.mark.parametrize(
    ("config", "received"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"cluster": {"worker": ["a:1"]}}', "task"),
        (
            '{"cluster": {"worker": ["a:1"]},'
            ' "task": {"type": "worker", "index": 1}}',
            "not in tuple",
        ),
        (
            '{"cluster": {"worker": ["a"]},'
            ' "task": {"type": "worker", "index": 0}}',
            "without host and port",
        ),
        (
            '{"cluster": {"worker": ["a:1", "a:1"]},'
            ' "task": {"type": "worker", "index": 0}}',
            "share",
        ),
        (
            '{"cluster": {"worker": ["a:1"], "ps": ["b:1"]},'
            ' "task": {"type": "worker", "index": 0}}',
            "ps",
        ),
    ],
)
def test_a_wrong_tf_config(config, received, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match="Expected TF_CONFIG") as error:
        cluster_lib.Cluster.from_environment()
    assert received in str(error.value)


def test_a_chief_is_the_first_worker(monkeypatch):
    config = {
        "cluster": {"worker": ["b:2", "c:3"], "chief": ["a:1"]},
        "task": {"type": "worker", "index": 1},
    }
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    cluster = cluster_lib.Cluster.from_environment()
    assert cluster.names == ("chief:0", "worker:0", "worker:1")
    assert cluster.addresses == ("a:1", "b:2", "c:3")
    assert cluster.index == 2


def test_a_lost_worker_is_not_any_error():
    with pytest.raises(tf.errors.UnavailableError):
        with workers.lost_workers_explained(None):
            raise tf.errors.UnavailableError(None, None, "another one")
