"""One mask update over the groups that are due: select, read back once, put in force, say what deserves a look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from tritprune.pruners.group import LayerGroup, Proposal
from tritprune.pruners.reports import LayerCount
from tritprune.selection import refuse_non_finite

THIN = 0.01
"""A layer whose density falls below this is worth a warning."""


@dataclass(frozen=True)
class Update:
    """What a mask update did.

    Args:
        counts: of the layers whose masks were updated, by name.
        changed: units that went or came back.
        skipped: gradient elements left out of scores since the last update because they were not finite.
    """

    counts: dict[str, LayerCount]
    changed: int
    skipped: int


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
    device = proposals[0].numbers.device
    host = iter(torch.cat([proposal.numbers.to(device) for proposal in proposals]).tolist())
    numbers = [[next(host) for _ in range(proposal.numbers.numel())] for proposal in proposals]
    for group, own in zip(groups, numbers, strict=True):
        refuse_non_finite(group.non_finite(own), [site.name for site in group.sites], step)
    return list(zip(proposals, numbers, strict=True))


def put_in_force(due: Sequence[LayerGroup], proposals: Sequence[Read], step: int) -> Update:
    """Make proposals the masks; after a group's last prune step its scores are freed."""
    counts: dict[str, LayerCount] = {}
    changed = skipped = 0
    for group, (proposal, own) in zip(due, proposals, strict=True):
        group_counts, group_changed, group_skipped = group.commit(proposal, own)
        counts |= group_counts
        changed, skipped = changed + group_changed, skipped + group_skipped
        if step >= group.times.last:
            group.forget_scores()
    return Update(counts, changed, skipped)


def warnings_of(due: Sequence[LayerGroup], counts: Mapping[str, LayerCount], step: int) -> dict[str, str]:
    """Layers without a gradient and layers that nearly vanish: a key per layer and kind -> a sentence."""
    found: dict[str, str] = {}
    for group in due:
        for name in sorted(group.without_gradient):
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
