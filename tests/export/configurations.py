"""What the configuration of each architecture can say of a slim model's widths, as a page; found out by building.

scripts/architectures writes docs/from_pretrained.md from it; a test fails while the page is stale.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tritprune.export.config_fields import FEED_FORWARD_FIELDS, built, has_each_layer, sized_fields

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "from_pretrained.md"

LAYERS = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4}
LAYERS |= {"num_key_value_heads": 2, "intermediate_size": 24, "layer_types": ["full_attention"] * 2}
GEMMA = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 32, "num_kv_shared_layers": 0}
EACH_LAYER: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 3n": (
        "Gemma3nForCausalLM",
        LAYERS | GEMMA | {"intermediate_size": [24, 24], "laurel_rank": 2, "activation_sparsity_pattern": [0.0, 0.0]},
    ),
    "Gemma 4": ("Gemma4ForCausalLM", LAYERS | GEMMA),
    "Step 3.7": ("Step3p7TextModel", LAYERS | {"mlp_layer_types": ["dense"] * 2, "sliding_window": 8}),
}
"""Architectures whose configurations have values for single layers: name -> class, configuration."""


def architectures() -> Iterator[tuple[str, Any, Any]]:
    """Name, library class and configuration of each."""
    import transformers

    source = ROOT / "tests" / "slimming" / "architectures.py"
    spec = importlib.util.spec_from_file_location("small_models", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {name: (kind, settings) for name, (kind, settings, _) in module.TRANSFORMERS.items()}
    for name, (kind, settings) in {**small, **EACH_LAYER}.items():
        if name in EACH_LAYER and not hasattr(transformers, kind):
            continue
        library_class = getattr(transformers, kind)
        config = transformers.Gemma4TextConfig if kind == "Gemma4ForCausalLM" else library_class.config_class
        config = transformers.Gemma3nTextConfig if kind == "Gemma3nForCausalLM" else config
        yield name, library_class, config(**settings)


def row(name: str, library_class: Any, config: Any) -> list[str]:
    """What can be said of the width of feed-forward layers, and of the number of heads."""
    cells: dict[bool, list[str]] = {True: [], False: []}
    bare = built(config, library_class)
    shapes = {key: tensor.shape for key, tensor in bare.state_dict().items()}
    for sized in sized_fields(config, library_class, bare):
        feed_forward = sized.field in FEED_FORWARD_FIELDS
        if not feed_forward and all(shapes[key][dim] == count for (key, dim), count in sized.values.items()):
            continue  # heads that share a fixed width: only what there is one of for each head grows with them
        each = sized.listed or has_each_layer(config, sized, library_class)
        cells[feed_forward].append(f"`{sized.field}`{', **one for each layer**' if each else ''}")
    keys = getattr(config, "num_key_value_heads", None)
    if isinstance(keys, int) and not any("num_key_value_heads" in cell for cell in cells[False]):
        cells[False] = []  # keys in one linear with the queries do not grow with their number, and go with query heads
    return [name, *("; ".join(cells[kind]) or "cannot be said" for kind in (True, False))]


HEAD = """\
# Which slim models load with plain from_pretrained

`tritprune.load` builds every slim model. Plain `from_pretrained`, with no tritprune installed, builds those whose
configuration can say their widths. A value for all layers says it where the layers were pruned alike, as
`pruner.scope=local` does; `uniform=true` pads the others (`tritprune.save(slim, folder, uniform=True)`, or
`slimmer.uniform=true` in a run). Where heads cannot be said, the library divides the model's width by their number.
A feed-forward block that was removed has width 0; an attention that was removed cannot be said, and is padded, too.

The table is found out by building the models of transformers {version} with other values. Written by
`scripts/architectures`; a test fails while it is stale.

| architecture | width of feed-forward layers | number of heads |
|---|---|---|
"""


def page() -> str:
    """The page as text."""
    import transformers

    rows = [row(*architecture) for architecture in architectures()]
    return HEAD.format(version=transformers.__version__) + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
