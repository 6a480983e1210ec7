"""Several devices, several machines: see the README."""

from keras_vo.replicas.workers import multi_worker_strategy

__all__ = ["multi_worker_strategy"]
