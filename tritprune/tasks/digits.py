"""digits: scikit-learn's 8x8 handwritten digits with a small vision transformer; a run takes seconds.

For sweeps, documentation and tests. No download: the images come with scikit-learn.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritprune.errors import ConfigError
from tritprune.registry import models
from tritprune.tasks.base import (
    Task,
    TaskData,
    hash_tensors,
    hash_text,
    register_task,
    require,
    seeded,
    stratified_split,
)

IMAGE = 8
PATCH = 2
CLASSES = 10
EVAL_SHARE = 0.2


class Attention(nn.Module):
    """Multi-head self-attention: softmax(Q K^T / sqrt(head_dim)) V per head, then the output linear.

    The heads' width is fixed and their number is an attribute, so that heads can be cut: ``num_heads * head_dim`` is
    the output width of ``query``, ``key``, ``value`` and the input width of ``output``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.head_dim = width // heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        query, key, value = (
            linear(tokens).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)  # [B, heads, T, head_dim]
            for linear in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.down(self.act(self.up(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        tokens = tokens + self.attention(self.attention_norm(tokens))
        return tokens + self.mlp(self.mlp_norm(tokens))


@models.register("digits_vit")
class DigitsViT(nn.Module):
    """A small vision transformer for 8x8 images: 16 patches of 2x2, mean over the tokens, one linear classifier.

    Args:
        width: width of the tokens; a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads per block.
        hidden: width of the feed-forward layer.
    """

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4, hidden: int = 128) -> None:
        super().__init__()
        if min(width, depth, heads, hidden) < 1 or width % heads:
            raise ConfigError(
                "digits_vit needs positive sizes and a width that heads divides, "
                f"got width={width}, depth={depth}, heads={heads}, hidden={hidden}"
            )
        self.patches = nn.Linear(PATCH * PATCH, width)
        self.positions = nn.Parameter(torch.randn((IMAGE // PATCH) ** 2, width) * 0.2)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 8, 8] in [0, 1] -> logits [B, 10]."""
        grid = (IMAGE // PATCH, PATCH)
        patches = pixels.unflatten(2, grid).unflatten(1, grid).transpose(2, 3)  # [B, 4, 4, 2, 2]
        tokens = self.patches(patches.flatten(3).flatten(1, 2)) + self.positions  # [B, 16, width]
        for block in self.blocks:
            tokens = block(tokens)
        return self.classifier(self.norm(tokens).mean(dim=1))


@register_task("digits")
class Digits(Task):
    """Image -> digit: 1,797 images of 8x8 pixels, a fifth held out.

    AdamW with lr 2e-3, weight decay 0.01, batch 32, 440 steps (10 epochs), linear warm-up over a tenth and linear decay
    gives 0.96 held-out accuracy, in about 4 s on one CPU core.

    Args:
        width: width of the tokens; a multiple of ``heads``.
        depth: number of blocks.
        heads: attention heads per block.
        hidden: width of the feed-forward layer.
    """

    name = "digits"

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4, hidden: int = 128) -> None:
        self.arguments = {"width": width, "depth": depth, "heads": heads, "hidden": hidden}
        with seeded(0):
            DigitsViT(**self.arguments)  # refuses bad sizes now, not after the data are loaded

    def load(self) -> TaskData:
        """Read the images and split them by content.

        Raises:
            MissingPackageError: scikit-learn is not installed.
        """
        bunch = require("sklearn.datasets", "demo").load_digits()
        images = torch.from_numpy(bunch.images.astype("float32") / 16)  # [N, 8, 8] in [0, 1]
        targets = torch.from_numpy(bunch.target.astype("int64"))  # [N]
        keys = [hash_text(image.numpy().tobytes().hex()) for image in images]
        distinct = sorted({key: index for index, key in reversed(list(enumerate(keys)))}.values())
        train, held_out = stratified_split([keys[i] for i in distinct], [int(targets[i]) for i in distinct], EVAL_SHARE)
        splits = {
            name: {"pixels": images[rows], "labels": targets[rows]}
            for name, part in (("train", train), ("eval", held_out))
            for rows in [torch.tensor([distinct[i] for i in part])]
        }
        return TaskData(
            train=splits["train"],
            eval=splits["eval"],
            labels=tuple(str(digit) for digit in range(CLASSES)),
            data_hash=hash_tensors(splits),
            model_hash=hash_text("digits_vit", *(f"{key}={value}" for key, value in sorted(self.arguments.items()))),
            description=f"scikit-learn digits, {len(train)} + {len(held_out)} images of 8x8, ten classes",
        )

    def build_model(self, seed: int) -> nn.Module:
        """A :class:`DigitsViT` drawn from ``seed``."""
        with seeded(seed):
            return DigitsViT(**self.arguments)

    def placeholder_inputs(self) -> dict[str, Tensor]:
        """One black image."""
        return {"pixels": torch.zeros(1, 8, 8)}

    def builder(self) -> dict[str, Any]:
        """``digits_vit`` of :data:`tritprune.registry.models`, with its sizes."""
        return {"kind": "registered", "name": "digits_vit", "arguments": dict(self.arguments)}
