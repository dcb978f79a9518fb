"""Blocks of N outputs by M inputs, down to single weights and up to whole channels."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from tritprune.errors import ConfigError
from tritprune.patterns.base import Block, Pattern, Site, count
from tritprune.patterns.views import WeightView

Extent = int | Literal["channel"]


class BlockPattern(Pattern):
    """``n x m``: N outputs by M inputs of the weight view stay or go together.

    ``4x1`` is 4 outputs of one input; ``channelx1`` a whole column of the view, ``1xchannel`` a whole row. A column is
    one input channel of a Linear, and one kernel position of one input channel of a convolution. Units at edges that
    the block does not divide are smaller and count their true elements.

    Args:
        n: outputs per unit, or "channel" for all of them.
        m: inputs per unit, or "channel" for all of them.

    Raises:
        ConfigError: n or m is neither a whole number of at least 1 nor "channel".
    """

    def __init__(self, n: Extent = 4, m: Extent = 1) -> None:
        self._config = f"block {n}x{m}"
        self.n = _extent("n", n, self._config)
        self.m = _extent("m", m, self._config)

    @property
    def block_size(self) -> list[int | str]:
        """``[N outputs, M inputs]``."""
        return [self.n, self.m]

    @property
    def label(self) -> str:
        """``4x1``."""
        return f"{self.n}x{self.m}"

    def block(self, view: WeightView) -> Block:
        """``(n, m)`` with channels resolved."""
        rows, columns = view.shape
        return (rows if isinstance(self.n, str) else self.n), (columns if isinstance(self.m, str) else self.m)

    def sites(self, views: Sequence[WeightView], model: nn.Module) -> list[Site]:
        """A site per layer.

        Raises:
            ConfigError: the block is larger than every layer, so that it would divide none of them.
        """
        for axis, (extent, what) in enumerate(((self.n, "outputs"), (self.m, "inputs"))):
            largest = max(views, key=lambda view: view.shape[axis], default=None)
            if largest is not None and not isinstance(extent, str) and extent > largest.shape[axis]:
                raise ConfigError(
                    f"pattern {self.label} divides no layer: it wants {extent} {what} and the largest layer, "
                    f"{largest.name}, has {largest.shape[axis]}; all of them are '{'nm'[axis]}=channel'"
                )
        return super().sites(views, model)


def _extent(what: str, value: object, config: str) -> Extent:
    return "channel" if value == "channel" else count(f"{what} (or 'channel')", value, config)
