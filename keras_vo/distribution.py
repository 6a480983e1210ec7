"""Several devices, several machines: see the README."""

from keras_vo.replicas.workers import is_first_worker, multi_worker_strategy

__all__ = ["is_first_worker", "multi_worker_strategy"]
