"""One mask update over the groups that are due: select, put in force, read the numbers, say what deserves a look.

On the CPU the numbers are read at once. On a GPU the masks are in force before anything is known of them on the host:
:func:`begin_update` leaves the numbers on their way, and :meth:`Unread.read` takes them up at a later step. What must
not wait, scores that are not finite, is decided on the device: then the masks before stay in force.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tritprune.kernels import restore_masks_
from tritprune.pruners.group import LayerGroup, Proposal
from tritprune.pruners.reading import Reading
from tritprune.pruners.reports import LayerCount
from tritprune.selection import refuse_non_finite

THIN = 0.01
"""A layer whose density falls below this is worth a warning."""


@dataclass(frozen=True)
class Update:
    """What a mask update did.

    Args:
        step: optimizer steps done.
        counts: of the layers whose masks were updated, by name.
        changed: units that went or came back.
        skipped: gradient elements left out of scores since the last update because they were not finite.
        warnings: what deserves a look: a key per layer and kind -> a sentence.
    """

    step: int
    counts: dict[str, LayerCount]
    changed: int
    skipped: int
    warnings: dict[str, str]


Read = tuple[Proposal, list[int]]
"""A proposal and its numbers on the host."""


def update_masks(due: Sequence[LayerGroup], step: int) -> Update:
    """Choose the masks of ``step`` and put them in force.

    Raises:
        NonFiniteScoreError: a score is NaN or infinite; the masks before it stay in force.
    """
    return put_in_force(due, read_proposals(due, [step] * len(due), step), step)


def read_proposals(groups: Sequence[LayerGroup], targets: Sequence[int], step: int) -> list[Read]:
    """What the scores of ``step`` and the schedule of each group's target step ask for. One read for all numbers.

    Raises:
        NonFiniteScoreError: a score is NaN or infinite.
    """
    return read(groups, [group.propose(target) for group, target in zip(groups, targets, strict=True)], step)


def read(groups: Sequence[LayerGroup], proposals: Sequence[Proposal], step: int) -> list[Read]:
    """Proposals with their numbers on the host, in one read.

    Raises:
        NonFiniteScoreError: a score is NaN or infinite.
    """
    return _apart(groups, proposals, _joined(proposals).tolist(), step)


def put_in_force(due: Sequence[LayerGroup], proposals: Sequence[Read], step: int) -> Update:
    """Make proposals the masks; after a group's last prune step its scores are freed."""
    lacking = [frozenset(group.without_gradient) for group in due]
    for group, (proposal, _) in zip(due, proposals, strict=True):
        group.put_in_force(proposal, step)
    return _told(due, proposals, lacking, step)


def begin_update(due: Sequence[LayerGroup], step: int) -> "Unread":
    """Choose the masks of ``step`` and put them in force, without a host read."""
    proposals = [group.propose(step) for group in due]
    numbers = _joined(proposals)
    parts = numbers.split([proposal.numbers.numel() for proposal in proposals])
    broken = torch.stack([part[group.non_finite].sum() for group, part in zip(due, parts, strict=True)]).sum()
    unread = Unread(
        tuple(due), tuple(proposals), tuple(frozenset(group.without_gradient) for group in due),
        tuple(group.prunes for group in due), Reading(numbers), step,
    )  # fmt: skip
    for group, proposal in zip(due, proposals, strict=True):
        new = [mask for masks in proposal.masks for mask in masks]
        restore_masks_(new, group.flat_masks, broken.to(group.device))
        group.put_in_force(proposal, step)
    return unread


@dataclass(frozen=True)
class Unread:
    """An update whose masks are in force and whose numbers are on their way.

    Args:
        due: the groups that were updated.
        proposals: their masks.
        lacking: layers of each that had no gradient.
        pruned: whether each pruned anything before.
        reading: the numbers of all.
        step: optimizer steps done.
    """

    due: tuple[LayerGroup, ...]
    proposals: tuple[Proposal, ...]
    lacking: tuple[frozenset[str], ...]
    pruned: tuple[bool, ...]
    reading: Reading
    step: int

    def read(self) -> Update:
        """What the update did; waits for its numbers if they are still under way.

        Raises:
            NonFiniteScoreError: a score was NaN or infinite; the masks before it have stayed in force.
        """
        try:
            found = _apart(self.due, self.proposals, self.reading.wait(), self.step)
        except ArithmeticError:
            for group, pruned in zip(self.due, self.pruned, strict=True):
                group.prunes = pruned
            raise
        return _told(self.due, found, self.lacking, self.step)


def _joined(proposals: Sequence[Proposal]) -> torch.Tensor:
    device = proposals[0].numbers.device
    return torch.cat([proposal.numbers.to(device) for proposal in proposals])


def _apart(
    groups: Sequence[LayerGroup], proposals: Sequence[Proposal], numbers: Sequence[int], step: int
) -> list[Read]:
    """Every proposal with its own numbers.

    Raises:
        NonFiniteScoreError: a score is NaN or infinite.
    """
    host = iter(numbers)
    own = [[next(host) for _ in range(proposal.numbers.numel())] for proposal in proposals]
    for group, counted in zip(groups, own, strict=True):
        refuse_non_finite(counted[group.non_finite], [site.name for site in group.sites], step)
    return list(zip(proposals, own, strict=True))


def _told(due: Sequence[LayerGroup], proposals: Sequence[Read], lacking: Sequence[frozenset[str]], step: int) -> Update:
    counts: dict[str, LayerCount] = {}
    warnings: dict[str, str] = {}
    changed = skipped = 0
    for group, read, without in zip(due, proposals, lacking, strict=True):
        group_counts, group_changed, group_skipped = group.told(*read)
        counts |= group_counts
        changed, skipped = changed + group_changed, skipped + group_skipped
        warnings |= _warnings(group, without, group_counts, step)
    return Update(step, counts, changed, skipped, warnings)


def _warnings(
    group: LayerGroup, lacking: frozenset[str], counts: Mapping[str, LayerCount], step: int
) -> dict[str, str]:
    """Layers without a gradient and layers that nearly vanish."""
    found: dict[str, str] = {}
    for name in sorted(lacking):
        found[f"gradient {name}"] = f"{name} has no gradient at step {step}: nothing more of it is pruned now"
    for view in group.views:
        count = counts[view.name]
        kept = count.elements - count.zeros
        if kept < THIN * count.elements:
            found[f"thin {view.name}"] = (
                f"{view.name} keeps {kept:,} of {count.elements:,} weights (density {kept / count.elements:.2%}) "
                f"at step {step}; max_layer_sparsity would hold it"
            )
    return found
