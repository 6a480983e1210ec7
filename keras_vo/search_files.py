"""A search in files: what its variables are called, and what has to fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from keras_vo import saved_search
from keras_vo.search import noise
from keras_vo.search_variables import SearchVariables

__all__ = ["SearchFiles"]


class SearchFiles(SearchVariables):
    """Variables of a search that are saved and restored by name."""

    _model_weights: Callable[[], list[Any]] | None = None
    _wrapped = False

    def save_own_variables(self, store: Any) -> None:
        """Writes the search, unless what wraps this optimizer does."""
        if not self._wrapped:
            self.write_search(store)

    def load_own_variables(self, store: Any) -> None:
        """Restores the search, unless what wraps this optimizer does."""
        if not self._wrapped:
            self.read_search(store)

    def belong_to(self, model: Any) -> None:
        """Tells which model's weights are trained, before it is saved or
        loaded.

        Under mixed_float16 Keras puts a LossScaleOptimizer around this one. It
        would save and load all variables by position: it gets those of the
        search, by name, instead.

        Args:
            model: whose `optimizer` is this one, or wraps it.
        """
        self._model_weights = lambda: model.weights
        wrapper = model.optimizer
        if wrapper is not self:
            self._wrapped = True
            wrapper.save_own_variables = self.write_search
            wrapper.load_own_variables = self.read_search

    def write_search(self, store: Any) -> None:
        """Writes the search, by name."""
        variables = self._named_variables() if self.built else {}
        saved_search.save(store, self._manifest(), variables)

    def read_search(self, store: Any) -> None:
        """Restores the search; where it does not fit, warns and leaves it."""
        if self.built:
            newer = [
                id(variable)
                for name, variable in self._rule_state.items()
                if name in saved_search.NEWER
            ]
            former = [v for v in self.variables if id(v) not in newer]
            problems = saved_search.restore(
                store, self._manifest(), self._named_variables(), former
            )
        else:
            problems = saved_search.restore(store, self._manifest(), {}, [])
        if problems:
            warnings.warn(
                "The weights are loaded, but not the state of the search, "
                f"which does not fit: {'; '.join(problems)}. A new search "
                "starts from these weights.",
                stacklevel=2,
            )

    def _named_variables(self) -> dict[str, Any]:
        own = {
            "generations": self.generations,
            "seed": self._seed,
            "log_variance": self._log_variance,
            **self._kept_means,
            **self._rule_state,
        }
        if self._sensitivity is not None:
            own["sensitivity"] = self._sensitivity
        inner = self.inner_optimizer.variables
        moved = self._moved(self._trained())
        return saved_search.named_variables(own, inner, moved)

    def _manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = {
            "noise": noise.GENERATOR,
            "inner_optimizer": type(self.inner_optimizer).__name__,
            "variance": self.search_distribution.variance,
        }
        if self._model_weights is not None and self.built:
            order = {id(v): i for i, v in enumerate(self._model_weights())}
            manifest["weights"] = [order.get(id(v)) for v in self._trained()]
        return manifest
