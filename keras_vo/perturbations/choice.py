"""What the optimizer chooses for all layers that do not say so themselves."""

from __future__ import annotations

import dataclasses

__all__ = ["Choice"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A choice of the optimizer's; `registry.chosen` makes it.

    Attributes:
        kind: of perturbation, its name.
        convolutions: whether noise on activations is that of convolutions
            too: "full", no; "local_reparam"; or "auto", where that of other
            layers alone would not pay.
    """

    kind: str = "full"
    convolutions: str = "full"
