"""What replicas communicate in a step, and which way is cheaper."""

from keras_vo.replicas.cost import CostModel

__all__ = ["CostModel"]
