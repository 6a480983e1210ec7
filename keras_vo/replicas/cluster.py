"""The start of a cluster: TF_CONFIG, read and compared between workers.

TensorFlow waits for ever for a worker that another one's TF_CONFIG does not
name. Here the workers first meet at the address of the first one and compare
what they were told, so that each ends with an error that names the worker.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from typing import Any

import keras
import tensorflow as tf

from keras_vo.version import __version__

__all__ = ["Cluster", "meet"]

_JOBS = ("chief", "worker")
_NOTHING = "nothing from"
_LONGEST = 2**20  # bytes of a message


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a cluster, and which of them this process is.

    Attributes:
        names: "chief:0", "worker:0", ... in TensorFlow's order.
        addresses: "host:port" of each.
        index: of this process among them.
    """

    names: tuple[str, ...]
    addresses: tuple[str, ...]
    index: int

    @classmethod
    def from_environment(cls) -> Cluster:
        """The cluster that the environment variable TF_CONFIG describes.

        Raises:
            ValueError: it is missing, or does not describe one.
        """
        text = os.environ.get("TF_CONFIG", "")
        example = json.dumps(
            {
                "cluster": {"worker": ["host0:12345", "host1:12345"]},
                "task": {"type": "worker", "index": 0},
            }
        )
        try:
            config = json.loads(text)
            jobs = config["cluster"]
            task = config["task"]
            named = [
                (f"{job}:{i}", str(address))
                for job in _JOBS
                for i, address in enumerate(jobs.get(job, []))
            ]
            names, addresses = zip(*named, strict=True)
            index = names.index(f"{task['type']}:{int(task['index'])}")
            for address in addresses:
                _host_and_port(address)
            if set(jobs) - set(_JOBS):
                raise ValueError(f"jobs {sorted(set(jobs) - set(_JOBS))}")
            if len(set(addresses)) < len(addresses):
                raise ValueError("an address that two workers share")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                "Expected TF_CONFIG to name the addresses of the workers "
                "('chief' and 'worker' jobs) and which of them this process "
                f"is, such as {example}. Received: TF_CONFIG={text!r} "
                f"({type(error).__name__}: {error})"
            ) from error
        return cls(names, addresses, index)


def meet(cluster: Cluster, timeout: float) -> None:
    """Waits for all workers and compares their clusters and versions.

    Args:
        cluster: of this process.
        timeout: seconds to wait for the others.

    Raises:
        TimeoutError: not all of them came.
        ValueError: they were not told the same.
    """
    deadline = time.monotonic() + timeout
    own = {
        "index": cluster.index,
        "names": list(cluster.names),
        "addresses": list(cluster.addresses),
        "versions": {
            "keras_vo": __version__,
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
        },
    }
    if cluster.index == 0:
        problem = _host_meeting(cluster, own, deadline, timeout)
    else:
        problem = _attend_meeting(cluster, own, deadline, timeout)
    if problem.startswith(_NOTHING):
        raise TimeoutError(
            f"Expected all of {list(cluster.names)} to start. "
            f"Received: {problem}"
        )
    if problem:
        raise ValueError(
            "Expected workers of one cluster with the same versions. "
            f"Received: {problem}"
        )


def _host_meeting(
    cluster: Cluster, own: dict[str, Any], deadline: float, timeout: float
) -> str:
    """Hears all workers, and tells them whether they agree with this one."""
    guests: list[socket.socket] = []
    problems: list[str] = []
    missing = set(range(1, len(cluster.names)))
    with _server(_host_and_port(cluster.addresses[0])[1]) as server:
        while missing:
            server.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                names = [cluster.names[i] for i in sorted(missing)]
                problems.append(
                    f"{_NOTHING} {', '.join(names)} within {timeout} seconds"
                )
                break
            told = _heard(connection)
            if told is None:  # not one of us
                connection.close()
                continue
            guests.append(connection)
            differences = _differences(cluster, own, told)
            if told["index"] not in missing and not differences:
                differences = [f"two processes that are worker {told['index']}"]
            missing.discard(told["index"])
            problems += differences
            if differences:  # the others shall hear of it, if they are there
                deadline = min(deadline, time.monotonic() + 5)
        differing = [p for p in problems if not p.startswith(_NOTHING)]
        problem = "; ".join(differing or problems)
        for connection in guests:
            with connection, contextlib.suppress(OSError):
                connection.sendall(json.dumps(problem).encode() + b"\n")
    return problem


def _attend_meeting(
    cluster: Cluster, own: dict[str, Any], deadline: float, timeout: float
) -> str:
    """Tells the first worker what this one was told, and hears its verdict."""
    address = _host_and_port(cluster.addresses[0])
    cause: Exception | None = None
    while True:
        try:
            with socket.create_connection(address, timeout=1) as connection:
                connection.sendall(json.dumps(own).encode() + b"\n")
                # It answers when it has heard all, or its own time is over.
                connection.settimeout(timeout + 10)
                with connection.makefile("rb") as answers:
                    answer = json.loads(answers.readline(_LONGEST))
                if isinstance(answer, str):
                    return answer
                cause = ValueError(f"an answer that is no string: {answer!r}")
        except (OSError, ValueError) as error:
            cause = error
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"Expected {cluster.names[0]} to answer at "
                f"{cluster.addresses[0]}. Received: no answer to "
                f"{cluster.names[cluster.index]} within {timeout} seconds "
                f"({type(cause).__name__}: {cause})"
            ) from cause
        time.sleep(0.1)


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", port), family=socket.AF_INET6, dualstack_ipv6=True
        )
    return socket.create_server(("", port))


def _heard(connection: socket.socket) -> dict[str, Any] | None:
    """What a worker says of itself; `None`: it is no worker."""
    connection.settimeout(5)
    try:
        with connection.makefile("rb") as lines:
            told = json.loads(lines.readline(_LONGEST))
    except (OSError, ValueError):
        return None
    known = isinstance(told, dict) and isinstance(told.get("index"), int)
    return told if known else None


def _differences(
    cluster: Cluster, own: dict[str, Any], told: dict[str, Any]
) -> list[str]:
    """In what another worker differs from the first one, in words."""
    return [
        f"{key} {told.get(key)} of worker {told.get('index')}, but "
        f"{own[key]} of {cluster.names[0]}"
        for key in ("names", "addresses", "versions")
        if told.get(key) != own[key]
    ]


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host:
        raise ValueError(f"address {address!r} without host and port")
    return host.strip("[]"), int(port)
