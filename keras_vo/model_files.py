"""Files of models that are trained with a `VOOptimizer`."""

from __future__ import annotations

import contextlib
from typing import Any

from absl import logging as absl_logging

from keras_vo.keras_compat import layers_of
from keras_vo.layers import as_dense, convert_dense
from keras_vo.optimizer import find_vo_optimizer
from keras_vo.pretrained import is_trained
from keras_vo.replicas.model import ReplicatedModel

__all__ = ["ModelFiles"]

_DENSE = "keras_vo_dense"


class ModelFiles(ReplicatedModel):
    """Mixin: saves and loads a model with its search."""

    _dense: str | None = None  # what `make_variational(dense=)` has made

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """As in Keras, under the names that layers of Dense would have.

        A `.weights.h5` file names each layer by its class.
        """
        self._introduce()
        with as_dense(self):
            super().save_weights(filepath, *args, **kwargs)

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """As in Keras, but never leaves out the state of the search.

        Keras skips an optimizer that is not built yet. The layers of
        `keras_vo.layers` load `.weights.h5` files of Dense, and their own.
        """
        if self.compiled and self.built:
            self._build_vo_optimizer()
        self._introduce()
        whole_model = str(filepath).endswith(".keras")
        with contextlib.nullcontext() if whole_model else as_dense(self):
            super().load_weights(filepath, *args, **kwargs)

    def compile_from_config(self, config: Any) -> None:
        """As in Keras."""
        super().compile_from_config(config)
        self._introduce()

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """As in Keras."""
        self._introduce()
        return super().save(*args, **kwargs)

    def _introduce(self) -> None:
        """Tells the optimizer, if there is one, what it trains."""
        optimizer = find_vo_optimizer(getattr(self, "optimizer", None))
        if optimizer is not None:
            optimizer.belong_to(self)

    def get_build_config(self) -> Any:
        """As in Keras; with what has become of Dense layers.

        What a model's constructor makes is Dense again when it is loaded.
        """
        config = super().get_build_config()
        if config is None or self._dense is None:
            return config
        return {**config, _DENSE: self._dense}

    def build_from_config(self, config: dict[str, Any]) -> None:
        """As in Keras."""
        config = dict(config)
        dense = config.pop(_DENSE, None)
        super().build_from_config(config)
        if dense is not None:
            convert_dense(self, dense)
            self._dense = dense

    def _build_vo_optimizer(self) -> None:
        """Builds a `VOOptimizer` that is not built yet, and no other."""
        if find_vo_optimizer(self.optimizer) and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)

    def _begin_search(self) -> None:
        """Builds the search; one of trained weights begins with small steps."""
        optimizer = find_vo_optimizer(self.optimizer)
        if optimizer is not None and all(
            layer.built for layer in layers_of(self)
        ):
            self._build_vo_optimizer()
            if optimizer.built and is_trained(self) and optimizer.start_small():
                absl_logging.warning(
                    "The model is trained already: what is chosen by default, "
                    "sigma with stddev='auto' and the learning rate of an "
                    "inner optimizer given by name, is a tenth. For others, "
                    "give numbers: stddev=0.2, keras.optimizers.Adam(0.02)."
                )
