"""Mask rearrangement: units that go are exchanged for others while that lowers the layer's Fisher loss.

Prune a set ``P`` of a layer's units. With the mask gradients ``g_b = dL/dm`` of batch b, the layer's block of the
empirical Fisher information says, up to a factor, what that costs:

    loss(P) = sum_b (sum_{i in P} g_bi)^2

The diagonal alone, ``sum_{i in P} sum_b g_bi^2``, does not see that units make up for each other.
"""

import torch
from torch import Tensor


def fisher_loss(keep: Tensor, gradients: Tensor) -> float:
    """``sum_b (sum_{i pruned} g_bi)^2`` in fp64.

    Args:
        keep: bool ``[units]``, True = keep.
        gradients: ``[batches, units]``.
    """
    return float(gradients.double()[:, ~keep].sum(1).square().sum())


def rearrange(keep: Tensor, gradients: Tensor, sizes: Tensor, fixed: Tensor | None = None) -> Tensor:
    """Greedy exchanges, one per kept unit (Kwon et al. 2022, arXiv:2204.09656, section 4.2, their Algorithm 2).

    Kept units come in ascending order of their diagonal (among equals the higher index first). Each joins those that
    go, and of these the one comes back whose return lowers the loss most (among equals the newcomer, then the lower
    index). So the loss never grows, and as many units of each size go as before.

    Args:
        keep: bool ``[units]``, True = keep.
        gradients: ``[batches, units]``; computed with in fp64 on the CPU, so that every process finds the same.
        sizes: int64 ``[units]``; only units of one size are exchanged.
        fixed: bool ``[units]``, units that stay as they are; None: none.

    Returns:
        bool ``[units]``.
    """
    own = keep.cpu().clone()
    vectors = gradients.detach().cpu().double().t().contiguous()  # [units, batches]
    diagonal = vectors.square().sum(1)
    free = torch.ones_like(own) if fixed is None else ~fixed.cpu()
    for size in sizes.cpu().unique().tolist():
        _exchange_(own, vectors, diagonal, free & (sizes.cpu() == size))
    return own.to(keep.device)


def _exchange_(keep: Tensor, vectors: Tensor, diagonal: Tensor, free: Tensor) -> None:
    """Exchange units of ``free``, in place."""
    gone = (~keep & free).nonzero().flatten()
    total = vectors[~keep].sum(0)  # [batches]
    if not gone.numel():
        return
    kept = (keep & free).nonzero().flatten().flip(0)
    for new in kept[diagonal[kept].argsort(stable=True)].tolist():
        joined = total + vectors[new]
        losses = (joined - vectors[gone]).square().sum(1)  # if that one came back
        best = int(losses.argmin())
        if losses[best] < total.square().sum():
            keep[gone[best]], keep[new] = True, False
            total = joined - vectors[gone[best]]
            gone[best] = new
            gone = gone.sort().values
