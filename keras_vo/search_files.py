"""A search in files: what its variables are called, and what has to fit."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from keras_vo import saved_search
from keras_vo.search.generators import FIRST, GENERATORS, NEWEST
from keras_vo.search_variables import SearchVariables

__all__ = ["BESIDE", "SearchFiles"]

# What configs have beside the arguments.
BESIDE = ("rate_by_name", "noise_generator")


class SearchFiles(SearchVariables):
    """Variables of a search that are saved and restored by name."""

    _model_weights: Callable[[], list[Any]] | None = None
    _wrapped = False
    _retrace: Callable[[], None] | None = None
    _noise_generator = NEWEST

    @property
    def noise_generator(self) -> str:
        """The name of what draws the noise: the newest one's, or that which a
        search that is loaded from files of Keras had (see
        `keras_vo.search.generators`). It can be set before `build`.

        Raises:
            ValueError: there is none of that name, or the optimizer is built.
        """
        return self._noise_generator

    @noise_generator.setter
    def noise_generator(self, name: str) -> None:
        if self.built:
            raise ValueError(
                "Expected a noise generator that is set before the optimizer "
                f"is built. Received: {name!r} when it was"
            )
        if not isinstance(name, str) or name not in GENERATORS:
            raise ValueError(
                f"Expected a noise generator, one of {sorted(GENERATORS)}. "
                f"Received: {name!r}"
            )
        self._noise_generator = name

    def beside_arguments(self) -> dict[str, Any]:
        """What there is in configs under the names `BESIDE`."""
        return {
            "rate_by_name": self._rate_by_name,  # the inner one is an object
            "noise_generator": self.noise_generator,
        }

    def set_beside_arguments(
        self, beside: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> None:
        """Takes it from a config, as far as it has it.

        Args:
            beside: of `BESIDE`.
            arguments: what else the config has: all arguments, unless it was
                written by hand.
        """
        if "rate_by_name" in beside:
            self._rate_by_name = beside["rate_by_name"]
        # Files had none as long as there was one generator.
        former = FIRST if "memory_budget" in arguments else NEWEST
        self.noise_generator = beside.get("noise_generator", former)

    def _draw_by(self, name: str) -> None:
        """Goes on with the noise of another generator."""
        if name == self._noise_generator:
            return
        self._noise_generator = name
        if self.built:
            self._settings = dataclasses.replace(
                self._settings, noise_generator=name
            )
        if self._retrace is not None:
            self._retrace()  # its steps draw by the former one

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

        def retrace() -> None:
            if model.train_function is not None:  # in `fit`, too
                model.make_train_function(force=True)

        self._retrace = retrace
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
        """Restores the search, with the generator of its noise; where it does
        not fit, warns and leaves it.
        """
        here = self.noise_generator
        there = saved_search.noise_generator(store)
        if there in GENERATORS:
            self._draw_by(there)
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
            self._draw_by(here)
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
            "noise": self.noise_generator,
            "inner_optimizer": type(self.inner_optimizer).__name__,
            "variance": self.search_distribution.variance,
        }
        if self._model_weights is not None and self.built:
            order = {id(v): i for i, v in enumerate(self._model_weights())}
            manifest["weights"] = [order.get(id(v)) for v in self._trained()]
        return manifest
