"""What a pruner's mask updates did: counts by layer, events, warnings, and whom to tell."""

from collections.abc import Callable, Sequence

from tritprune.pruners.reading import capturing
from tritprune.pruners.reports import LayerCount, PrunedLayer, PruneEvent
from tritprune.pruners.update import Unread, Update


class Record:
    """The record of a pruner. On a GPU an update is told one step later: nobody waits for its numbers.

    Args:
        layers: what is pruned.
        units: all units that can change, over all sites.
    """

    def __init__(self, layers: Sequence[PrunedLayer], units: int) -> None:
        self.counts = {layer.name: LayerCount(layer.units, layer.units, 0, layer.elements, 0) for layer in layers}
        self.last_event: PruneEvent | None = None
        self.warned: set[str] = set()
        self.callbacks: list[Callable[[PruneEvent], None]] = []
        self._units = units
        self._unread: list[tuple[Unread, float]] = []  # several only where some are captured in a CUDA graph

    def note(self, update: Update, target: float) -> PruneEvent:
        """Take up what an update did, at a target sparsity over all layers."""
        unchanged = {n: LayerCount(c.units, c.kept, 0, c.elements, c.zeros) for n, c in self.counts.items()}
        self.counts = unchanged | update.counts
        fresh = tuple(text for key, text in update.warnings.items() if key not in self.warned)
        self.warned |= update.warnings.keys()
        counts = self.counts.values()
        self.last_event = PruneEvent(
            step=update.step,
            target=target,
            sparsity=sum(count.zeros for count in counts) / sum(count.elements for count in counts),
            flip_rate=update.changed / self._units,
            layers=dict(self.counts),
            skipped_gradients=update.skipped,
            warnings=fresh,
        )
        return self.last_event

    def expect(self, unread: Unread, target: float) -> None:
        """Take up later what an update did; those before it are taken up now, if they have not been and can be."""
        self.settle()
        self._unread.append((unread, target))

    def settle(self) -> None:
        """Take up updates that have not been read, and tell them. Not while a CUDA graph is captured.

        Raises:
            NonFiniteScoreError: its scores were NaN or infinite; the masks before it have stayed in force.
        """
        while self._unread and not capturing():
            unread, target = self._unread.pop(0)
            self.tell(self.note(unread.read(), target))

    def tell(self, event: PruneEvent) -> None:
        """Call everybody who wants to know."""
        for callback in self.callbacks:
            callback(event)
