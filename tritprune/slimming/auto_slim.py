"""Which feed-forward channels and heads of a model can go, as groups for a pruner: no layer has to be named.

What is proposed is proved first: on a copy of the model one unit of every block that the searchers find is made dead,
the copy is slimmed, and only blocks that really got narrower are proposed. Everything else is refused by name.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tritprune.errors import ConfigError
from tritprune.kernels import apply_masks_
from tritprune.patterns import HeadsPattern, Site, WeightView, find_attentions
from tritprune.slimming.account import copied
from tritprune.slimming.leftovers import Refusal
from tritprune.slimming.made_inputs import inputs_for
from tritprune.slimming.searchers import Linear2LinearSearcher, SelfMHASearcher
from tritprune.slimming.slimmer import SlimResult, slim_model

CHANNELS = {"name": "block", "n": "channel", "m": 1}


class AutoSlimConfig(list[dict[str, Any]]):
    """Groups for ``tritprune.Pruner(model, groups=...)``; a list, with the account of what is not in it.

    Args:
        groups: ``name``, ``include`` (exact layer names), ``pattern`` and ``target_sparsity`` each.
        refused: blocks that cannot go, with the reason.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], refused: Sequence[Refusal] = ()) -> None:
        super().__init__(dict(group) for group in groups)
        self.refused = list(refused)

    def as_neural_compressor(self) -> list[dict[str, Any]]:
        """The same as ``pruning_configs`` of a Neural Compressor config; ``op_names`` are regular expressions there."""
        return [
            {
                "op_names": [f"^{re.escape(name)}$" for name in group["include"]],
                "pattern": "channelx1" if group["pattern"] == CHANNELS else "mha",
                "pruning_op_types": ["Linear"],
                "target_sparsity": group["target_sparsity"],
            }
            for group in self
        ]


def parse_auto_slim_config(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    ffn2_sparsity: float = 0.0,
    mha_sparsity: float = 0.0,
    *,
    example_inputs: Any = None,
    tracer: str = "jit",
    **settings: Any,
) -> AutoSlimConfig:
    """Derive the pruning groups of a model from its graph.

    Args:
        model: left as it is.
        dataloader: its first batch is the example where ``example_inputs`` is not given: a tensor, a mapping (labels
            are taken out), or (inputs, labels). Without either, inputs are made from the model's configuration and its
            forward's signature, see :func:`tritprune.slimming.make_inputs`.
        ffn2_sparsity: share of the feed-forward channels that go, in [0, 1); 0: none. A channel is pruned as a column
            of the second linear; the slimmer then cuts the row of the first, too.
        mha_sparsity: share of the attention heads that go, in [0, 1); 0: none.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        tracer: how to read the model.
        settings: further settings for each group, such as ``scope`` or ``max_layer_sparsity``.

    Raises:
        ConfigError: sparsities out of range or both 0, no inputs that could be made, or nothing in the model that can
            go; the message has the reasons.
        TraceError: the model cannot be traced.
    """
    for name, value in (("ffn2_sparsity", ffn2_sparsity), ("mha_sparsity", mha_sparsity)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise ConfigError(f"{name} is a share in [0, 1), got {value!r}")
    if not (ffn2_sparsity or mha_sparsity):
        raise ConfigError("auto-slim has nothing to do: ffn2_sparsity and mha_sparsity are both 0")
    inputs = inputs_for(model, dataloader) if example_inputs is None else example_inputs
    roots = _channels(model, inputs, tracer) if ffn2_sparsity else []
    sites, refused = _heads(model, inputs, tracer) if mha_sparsity else ([], [])
    result = _trial(model, inputs, roots, sites, tracer)
    kept = [root for root in roots if _reads_less(model, root, result)]
    cuttable = [site for site in sites if _reads_less(model, site.views[-1].name, result)]
    channels = {"name": "feed_forward", "include": kept, "pattern": CHANNELS, "target_sparsity": ffn2_sparsity}
    names = [view.name for site in cuttable for view in site.views]
    heads = {"name": "heads", "include": names, "pattern": {"name": "heads"}, "target_sparsity": mha_sparsity}
    refused += [Refusal("feed-forward", root, _why(result, root)) for root in roots if root not in kept]
    refused += [
        Refusal("heads", site.name, _why(result, site.name, *(view.name for view in site.views)))
        for site in sites
        if site not in cuttable
    ]
    groups = [group | settings for group in (channels, heads) if group["include"]]
    if not groups:
        reasons = "; ".join(f"{r.where}: {r.reason}" for r in refused[:4]) or "no two linears follow one another"
        raise ConfigError(f"auto-slim finds nothing in {type(model).__name__} that can go: {reasons}")
    return AutoSlimConfig(groups, refused)


def model_slim(
    model: nn.Module, dataloader: Iterable[Any] | None = None, *, example_inputs: Any = None, in_place: bool = False,
    **settings: Any,
) -> nn.Module:  # fmt: skip
    """Cut what is zero out of a pruned model: the second half of auto-slim.

    Args:
        model: with its masks applied.
        dataloader: its first batch is the example where ``example_inputs`` is not given; without either, inputs are
            made as for :func:`parse_auto_slim_config`.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        in_place: let ``model`` itself become the slim one, in one move at the end; its submodules are then other
            objects. Else a slim copy is returned and ``model`` stays as it is.
        settings: for :func:`slim_model`.

    Returns:
        The slim model.

    Raises:
        ConfigError, TraceError, CertificateError: as :func:`slim_model`; ``model`` is as it was.
    """
    inputs = inputs_for(model, dataloader) if example_inputs is None else example_inputs
    slim = slim_model(model, inputs, **settings).model
    if not in_place:
        return slim
    given = dict(model.named_modules())
    for name, module in slim.named_modules():
        module.training = given[name].training
    vars(model).update(vars(slim))  # one step of the interpreter: the whole slim model or none of it
    return model


def _channels(model: nn.Module, inputs: Any, tracer: str) -> list[str]:
    """The linears that read channels which other linears make."""
    return [item["root_linear"] for item in Linear2LinearSearcher(model, example_inputs=inputs, tracer=tracer).search()]


def _heads(model: nn.Module, inputs: Any, tracer: str) -> tuple[list[Site], list[Refusal]]:
    """The attentions that the graph shows and pattern heads knows; the others with the reason."""
    modules = dict(model.named_modules())
    known = {frozenset(parts): (name, parts) for name, parts in find_attentions(model)}
    sites: list[Site] = []
    refused: list[Refusal] = []
    for item in SelfMHASearcher(model, example_inputs=inputs, tracer=tracer).search():
        linears = [*item["qkv"], *item["ffn"]]
        if frozenset(linears) not in known:
            reason = "its query, key, value and output are no linears by names that pattern heads knows"
            refused.append(Refusal("heads", ", ".join(linears), reason))
            continue
        name, parts = known[frozenset(linears)]
        views = [view for part in parts if (view := WeightView.of(part, modules[part])) is not None]
        try:
            (site,) = HeadsPattern().sites(views, model)
        except ConfigError as error:
            refused.append(Refusal("heads", name, str(error)))
            continue
        if site.grid.units == 1:
            refused.append(Refusal("heads", name, "it has one head, which stays"))
        else:
            sites.append(site)
    return sites, refused


@torch.no_grad()
def _trial(model: nn.Module, inputs: Any, roots: Sequence[str], sites: Sequence[Site], tracer: str) -> SlimResult:
    """Slim a copy in which the last channel of each block and the last head of each attention are dead."""
    trial = copied(model)
    for root in roots:
        view = WeightView.of(root, trial.get_submodule(root))
        assert view is not None
        weight = view.to_2d(view.parameter.detach())
        weight[:, -1:] = 0
    for site in sites:
        keep = torch.ones(1, site.grid.units, dtype=torch.bool, device=site.views[0].parameter.device)
        keep[0, -1] = False
        masks = HeadsPattern().layer_masks(site, keep, (), ())
        for view, mask, block in zip(site.views, masks, site.blocks, strict=True):
            parameter = trial.get_parameter(f"{view.name}.weight").detach()
            stays = torch.ones(view.shape, device=parameter.device)
            apply_masks_([stays], [mask], [block])
            view.to_2d(parameter).mul_(stays)
    return slim_model(trial, inputs, tracer=tracer)


def _reads_less(model: nn.Module, linear: str, result: SlimResult) -> bool:
    """Whether inputs of the linear were cut."""
    view = WeightView.of(linear, model.get_submodule(linear))
    axis = 0 if view is not None and view.kind == "hf_conv1d" else 1
    return axis in result.selections.get(f"{linear}.weight", {})


def _why(result: SlimResult, name: str, *others: str) -> str:
    """What the slimmer says about a block, found by any of its names."""
    names = (name, *others)
    for item in result.found:
        mentioned = {item.get("where"), item.get("root_linear"), *item.get("qkv", ()), *item.get("ffn", ())}
        if mentioned.intersection(names) and item.get("obstacle"):
            return str(item["obstacle"])
    said = [refusal.reason for refusal in result.refused if refusal.where in names]
    return said[0] if said else "the slimmer does not cut it"
