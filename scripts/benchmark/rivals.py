"""The rivals, each in its own idiomatic form.

``foreach`` goes through torch's multi-tensor operations. ``compile`` is a loop over layers under ``torch.compile``.
``neural_compressor`` repeats the operations of Intel Neural Compressor 2.6, ``compression/pruner/criteria.py`` and
``patterns/{nxm,ninm}.py``, on prepared tensors; the package itself, with its recounts, is measured in experiments/.
``asp`` restates the mask search of NVIDIA apex ASP (``m4n2_1d``): the best pattern of a group by a matrix product.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

ALPHA, BETA = 0.9, 1.0


def snip_momentum_eager(scores: Sequence[Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """``S *= alpha; S += beta |w g|``, as Neural Compressor's SnipMomentumCriterion: five launches a layer."""
    for score, weight, gradient in zip(scores, weights, gradients, strict=True):
        score *= ALPHA
        score += BETA * torch.abs(weight * gradient)


def snip_momentum_foreach(scores: Sequence[Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """The same through ``torch._foreach_``."""
    fresh = torch._foreach_mul(list(weights), list(gradients))
    torch._foreach_abs_(fresh)
    torch._foreach_mul_(list(scores), ALPHA)
    torch._foreach_add_(list(scores), fresh, alpha=BETA)


def snip_momentum_4x1_eager(scores: Sequence[Tensor], weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """The 4x1 form of Neural Compressor: the whole layer's product, then a mean over the block."""
    for score, weight, gradient in zip(scores, weights, gradients, strict=True):
        score *= ALPHA
        blocks = torch.abs(weight * gradient).reshape(weight.shape[0] // 4, 4, weight.shape[1], 1)
        score += BETA * blocks.mean(-1).mean(1)


def snip_momentum_1x1_layer(score: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """One layer, for ``torch.compile``."""
    score.mul_(ALPHA).add_((weight * gradient).abs(), alpha=BETA)


def snip_momentum_4x1_layer(score: Tensor, weight: Tensor, gradient: Tensor) -> None:
    """One layer, for ``torch.compile``."""
    blocks = (weight * gradient).abs().view(weight.shape[0] // 4, 4, weight.shape[1])
    score.mul_(ALPHA).add_(blocks.mean(1), alpha=BETA)


def kth_by_kthvalue(scores: Sequence[Tensor], k: int) -> Tensor:
    """Neural Compressor's threshold: join everything, then ``torch.kthvalue``."""
    return torch.kthvalue(torch.cat([score.flatten() for score in scores]), k)[0]


def kth_by_topk(scores: Sequence[Tensor], k: int) -> Tensor:
    """Join everything, then ``torch.topk`` of the smallest."""
    return torch.topk(torch.cat([score.flatten() for score in scores]), k, largest=False)[0][-1]


def kth_by_sort(scores: Sequence[Tensor], k: int) -> Tensor:
    """Join everything, then ``torch.sort``."""
    return torch.sort(torch.cat([score.flatten() for score in scores]))[0][k - 1]


def two_in_four_neural_compressor(scores: Sequence[Tensor]) -> list[Tensor]:
    """``get_least_ninm_mask_from_data``: ``kthvalue`` in each group of four, then one comparison (over-prunes ties)."""
    masks: list[Tensor] = []
    for score in scores:
        groups = score.reshape(score.shape[0], score.shape[1] // 4, 4)
        threshold, _ = torch.kthvalue(groups, 2, dim=2)
        masks.append(score > threshold.unsqueeze(-1).expand_as(groups).reshape(score.shape))
    return masks


def two_in_four_asp(scores: Sequence[Tensor]) -> list[Tensor]:
    """ASP's ``m4n2_1d``: the group's scores times the six patterns of two in four, the largest sum wins."""
    patterns = torch.tensor(sorted(set(itertools.permutations([1.0, 1.0, 0.0, 0.0]))), device=scores[0].device)
    masks: list[Tensor] = []
    for score in scores:
        best = torch.argmax(score.view(-1, 4).abs() @ patterns.t(), dim=1)
        masks.append(patterns[best].view(score.shape).bool())
    return masks


def two_in_four_tile(scores: Sequence[Tensor]) -> list[Tensor]:
    """The semi-structured tile kernel of torch, CUDA only: 2:4 along rows and columns of 4x4 tiles (another mask)."""
    return [torch._sparse_semi_structured_tile(score)[0] for score in scores]


def two_in_four_topk(scores: Sequence[Tensor]) -> list[Tensor]:
    """``topk`` of two in each group and a scatter."""
    masks: list[Tensor] = []
    for score in scores:
        groups = score.view(-1, 4)
        mask = torch.zeros_like(groups, dtype=torch.bool)
        masks.append(mask.scatter_(1, groups.topk(2, dim=1).indices, True).view(score.shape))
    return masks


def group_scores_by_topk(scores: Sequence[Tensor]) -> list[Tensor]:
    """The sum of the two smallest of each group."""
    return [score.view(score.shape[0], -1, 4).topk(2, dim=2, largest=False).values.sum(2) for score in scores]


def group_scores_by_sort(scores: Sequence[Tensor]) -> list[Tensor]:
    """The same from sorted groups."""
    return [score.view(score.shape[0], -1, 4).sort(dim=2).values[..., :2].sum(2) for score in scores]


def violations_by_product(tensors: Sequence[Tensor], pruned: Sequence[Tensor]) -> Tensor:
    """A product of the size of each layer, and what of it is not zero."""
    return torch.stack([(tensor * gone).count_nonzero() for tensor, gone in zip(tensors, pruned, strict=True)])


def violations_by_comparison(tensors: Sequence[Tensor], pruned: Sequence[Tensor]) -> Tensor:
    """Two masks of elements, and how many places are in both."""
    return torch.stack([((tensor != 0) & gone).sum() for tensor, gone in zip(tensors, pruned, strict=True)])


def apply_by_product(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Neural Compressor's ``mask_weights``: a new product, put in the weight's place."""
    for weight, mask in zip(weights, masks, strict=True):
        weight.data = weight.data * mask


def apply_by_mul_(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """In place, with a mask of elements."""
    for weight, mask in zip(weights, masks, strict=True):
        weight.mul_(mask)


def apply_by_foreach(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """In place through ``torch._foreach_mul_``."""
    torch._foreach_mul_(list(weights), list(masks))
