"""``nn.MultiheadAttention`` with fewer heads than its width has room for: same state, same call, same outputs.

PyTorch's own module takes the size of a head to be ``embed_dim / num_heads``, so that no head can go. Here it is what
the weights say: query, key and value have ``num_heads * head_dim`` rows, the output projection as many columns.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SlimMultiheadAttention(nn.MultiheadAttention):
    """Attention of ``num_heads`` heads of size ``head_dim`` on a stream of width ``embed_dim``.

    Made from an ``nn.MultiheadAttention`` whose tensors were cut (:func:`adapt`), never from arguments. Its parameters
    have the names that they had; arguments and results of a call are those of ``nn.MultiheadAttention``.
    """

    def forward(
        self,
        query: Tensor,  # [B, L, E], [L, B, E] unless batch_first, or [L, E]
        key: Tensor,  # [B, S, kdim], ...
        value: Tensor,  # [B, S, vdim], ...
        key_padding_mask: Tensor | None = None,  # [B, S]
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # [L, S] or [B * heads, L, S]
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``.

        Raises:
            ValueError: ``is_causal`` without a mask, or masks of shapes that do not fit.
        """
        if is_causal and attn_mask is None:
            raise ValueError("is_causal needs attn_mask: it says what kind of mask that is")
        if query.is_nested:
            return self._of_sequences(query, key, value), None
        batched = query.dim() == 3
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in self._projected(query, key, value))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else self._mask(q, k, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)  # [B, heads, L, S]
            weights = F.dropout(weights, dropout) if dropout > 0 else weights
            mixed = weights @ v
        else:
            weights = None
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)  # [B, heads, L, head_dim]
        made = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            made, weights = made.squeeze(0), None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            made = made.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(-3)
        return made, weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [.., num_heads * head_dim] each; entries that every sequence gets are appended."""
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        weights = self._weights()
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
        return q, k, v

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.in_proj_weight is not None:
            q, k, v = self.in_proj_weight.chunk(3)
            return q, k, v
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """What is added to the scores, [B or 1, heads or 1, L or 1, S]; None for nothing."""
        batch, heads, tokens, source = *q.shape[:3], k.shape[2]
        made: Tensor | None = None
        if attn_mask is not None:
            made = _added(attn_mask, q.dtype)
            if made.dim() == 3:
                if made.shape[0] != batch * heads:
                    raise ValueError(f"attn_mask of three dimensions has {batch} x {heads} rows, got {made.shape[0]}")
                made = made.unflatten(0, (batch, heads))
            if made.shape[-2] != tokens:
                raise ValueError(f"attn_mask is for {made.shape[-2]} queries, there are {tokens}")
            made = F.pad(made, (0, source - made.shape[-1]))
        if padding is not None:
            added = F.pad(_added(padding, q.dtype), (0, source - padding.shape[-1]))[:, None, None]
            made = added if made is None else made + added
        return made

    def _of_sequences(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Sequences of different lengths in one nested tensor, as ``nn.TransformerEncoder`` makes of padding."""
        made = [
            self.forward(*(x.unsqueeze(0) for x in one), need_weights=False)[0].squeeze(0)
            for one in zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
        ]
        return torch.nested.as_nested_tensor(made)


def adapt(module: nn.Module) -> None:
    """Let an ``nn.MultiheadAttention`` whose heads were cut be a :class:`SlimMultiheadAttention`; leave all else."""
    if type(module) is nn.MultiheadAttention and module.out_proj.weight.shape[1] != module.embed_dim:
        module.__class__ = SlimMultiheadAttention
        module._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer from computing it in one fused operation


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added: True, which means "not this one", is -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))
