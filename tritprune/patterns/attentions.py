"""Where a model's attentions are, how many heads they have, and which rows of a fused linear belong to which head.

| layout | rows of query_key_value, heads of ``d`` | found in |
|---|---|---|
| apart | one linear each for query, key, value | BERT, ViT, DistilBERT, Llama, Mistral, Qwen2, OPT, T5, ... |
| sections | all of query, then all of key, then all of value | GPT-2, Phi-3, Falcon with multi-query attention |
| per head | query, key, value of one head (or of one group: its queries), then the next | GPT-NeoX, Bloom, Falcon |
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from tritprune.errors import ConfigError
from tritprune.patterns.names import plain_modules
from tritprune.patterns.views import WeightView

RECIPES: tuple[tuple[str, ...], ...] = (
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa, ELECTRA
    ("attention.query", "attention.key", "attention.value", "output.dense"),  # ViT
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Qwen, Mistral
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, CLIP
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("query", "key", "value", "output"),
    ("q", "k", "v", "o"),  # T5
    ("c_attn", "c_proj"),  # GPT-2
    ("query_key_value", "dense"),  # GPT-NeoX, Bloom, Falcon
    ("qkv_proj", "o_proj"),  # Phi-3
    ("qkv", "proj"),  # timm
)
"""Names of query, key, value and output within an attention, or of the linear that holds the first three and output."""

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
KEY_VALUE_COUNTS = ("num_key_value_heads", "num_kv_heads")

Layout = Literal["sections", "per head"]


@dataclass(frozen=True)
class Heads:
    """The heads of one attention.

    Args:
        queries: query heads.
        keys: key/value heads; each has ``queries / keys`` query heads that read it, one after the other.
        width: rows of a query or key head.
        value_width: rows of a value head, columns of the output.
    """

    queries: int
    keys: int
    width: int
    value_width: int

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.queries // self.keys


def find_attentions(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Every attention of a model: its dotted name and those of its linears, four or (fused) two, as in a recipe."""
    names = [name for name, _ in plain_modules(model)]
    known = set(names)
    found: list[tuple[str, tuple[str, ...]]] = []
    for name in names:
        for recipe in RECIPES:
            if name == recipe[0] or name.endswith("." + recipe[0]):
                prefix = name[: len(name) - len(recipe[0])]
                parts = tuple(prefix + part for part in recipe)
                if known.issuperset(parts):
                    found.append((prefix.rstrip(".") or "attention", parts))
                    break
    return found


def head_count(model: nn.Module, query: str) -> int | None:
    """The number of query heads: from the nearest module around ``query`` that says it, itself or by its ``config``."""
    return _count(model, query, HEAD_COUNTS)


def heads_apart(
    attention: str, views: tuple[WeightView, WeightView, WeightView, WeightView], model: nn.Module
) -> Heads:
    """The heads of an attention with a linear each for query, key, value and output.

    Raises:
        ConfigError: their number is not known, or shapes or config contradict it; the message has the numbers.
    """
    query, key, value, output = views
    queries = _known_heads(model, attention, query.name)
    _divided(query, "rows", query.shape[0], queries)
    _divided(output, "columns", output.shape[1], queries)
    width, value_width = query.shape[0] // queries, output.shape[1] // queries
    keys, rest = divmod(key.shape[0], width)
    declared = _count(model, query.name, KEY_VALUE_COUNTS)
    fits = keys > 0 and not rest and queries % keys == 0 and value.shape[0] == keys * value_width
    if not fits or (declared is not None and declared != keys):
        told = "" if declared is None else f"; the config says {declared} key/value heads"
        raise ConfigError(
            f"the heads of '{attention}' do not fit together: query has {query.shape[0]} rows for {queries} heads of "
            f"{width}, key {key.shape[0]}, value {value.shape[0]}, output {output.shape[1]} columns{told}"
        )
    return Heads(queries, keys, width, value_width)


def heads_fused(attention: str, fused: WeightView, output: WeightView, model: nn.Module) -> tuple[Heads, Layout]:
    """The heads of an attention whose query, key and value are one linear, and the order of its rows.

    Raises:
        ConfigError: the model's config does not tell the order, or the rows are not those that it tells.
    """
    queries = _known_heads(model, attention, fused.name)
    config = _config(model, fused.name)
    kind = getattr(config, "model_type", None)
    keys, layout = queries, _layout(config)
    if layout is None:
        raise ConfigError(
            f"{fused.name} holds query, key and value of '{attention}' in {fused.shape[0]} rows, and nothing says in "
            f"which order: model_type is {kind!r}; known: gpt2, gpt_neox, bloom, falcon, phi3"
        )
    if (
        kind == "falcon"
        and getattr(config, "multi_query", False)
        and not getattr(config, "new_decoder_architecture", 0)
    ):
        keys = 1
    elif kind in ("falcon", "phi3"):
        keys = _count(model, fused.name, KEY_VALUE_COUNTS) or queries
    _divided(output, "columns", output.shape[1], queries)
    width = output.shape[1] // queries
    needed = (queries + 2 * keys) * width
    if queries % keys or fused.shape[0] != needed:
        raise ConfigError(
            f"{fused.name} has {fused.shape[0]} rows; {queries} query and {keys} key/value heads of {width} need "
            f"{needed}"
        )
    return Heads(queries, keys, width, width), layout


def _layout(config: object) -> Layout | None:
    """The order of rows that a model type is known to have."""
    kind = getattr(config, "model_type", None)
    if kind in ("gpt2", "phi3"):
        return "sections"
    if kind in ("gpt_neox", "bloom"):
        return "per head"
    if kind == "falcon":
        grouped = getattr(config, "new_decoder_architecture", False) or not getattr(config, "multi_query", False)
        return "per head" if grouped else "sections"
    return None


def _known_heads(model: nn.Module, attention: str, query: str) -> int:
    heads = head_count(model, query)
    if heads is None:
        raise ConfigError(
            f"'{attention}' does not say how many heads it has: no {', '.join(HEAD_COUNTS)} on it or on model.config"
        )
    return heads


def _divided(view: WeightView, what: str, length: int, heads: int) -> None:
    if length % heads:
        raise ConfigError(f"{view.name} has {length} {what}, which {heads} heads do not divide")


def _holders(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around a layer, the nearest first, the model last."""
    parts = name.split(".")
    modules = dict(plain_modules(model, remove_duplicate=False))
    for end in range(len(parts) - 1, -1, -1):
        yield modules[".".join(parts[:end])]


def _count(model: nn.Module, name: str, attributes: tuple[str, ...]) -> int | None:
    for holder in _holders(model, name):
        for told in (holder, getattr(holder, "config", None)):
            for attribute in attributes:
                value = getattr(told, attribute, None)
                if type(value) is int and value > 0:
                    return value
    return None


def _config(model: nn.Module, name: str) -> object:
    """The config of the nearest module that has one with a ``model_type``."""
    configs = (getattr(holder, "config", None) for holder in _holders(model, name))
    return next((config for config in configs if getattr(config, "model_type", None)), None)
