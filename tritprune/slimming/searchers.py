"""What can be cut, searched in the traced graph: names and return values as users of model slimming know them."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tritprune.errors import ConfigError
from tritprune.slimming.attention import common_parent, find_attention
from tritprune.slimming.elementwise import ELEMENTWISE
from tritprune.slimming.feed_forward import FeedForward, find_feed_forward
from tritprune.slimming.graph import Graph, Node, trace
from tritprune.slimming.made_inputs import first_layer, inputs_for, make_inputs
from tritprune.slimming.model_inputs import ModelInputs
from tritprune.slimming.recipes import RECIPES

log = logging.getLogger(__name__)


def get_attributes(module: nn.Module, attributes: str) -> Any:
    """The nested attribute ``"a.b.0.c"`` of ``module``.

    Raises:
        ConfigError: no such attribute; the message says how far the path goes.
    """
    current: Any = module
    passed: list[str] = []
    for part in attributes.split("."):
        try:
            current = getattr(current, part)
        except AttributeError:
            raise ConfigError(
                f"{type(module).__name__} has no '{attributes}': '{'.'.join(passed) or type(module).__name__}' "
                f"({type(current).__name__}) has no '{part}'"
            ) from None
        passed.append(part)
    return current


def get_common_module(layer1: str, layer2: str) -> str:
    """The dotted name of the nearest module that holds both layers; empty for the model itself."""
    return common_parent([layer1, layer2])


def print_iterables(items: Iterable[Any]) -> None:
    """Log a list of findings, one a line."""
    for item in items:
        log.info("%s", item)


class RecipeSearcher:
    """Modules by class name and relative path.

    Args:
        model: the model.
        recipe: class name -> paths below a module of that class, e.g.
            ``{"BertAttention": ["self.query", "self.key", "self.value", "output.dense"]}``; by default the one of
            :data:`~tritprune.slimming.recipes.RECIPES` for the model's type.

    Raises:
        ConfigError: no recipe is given, and none is known for the model.
    """

    def __init__(self, model: nn.Module, recipe: Mapping[str, Sequence[str]] | None = None) -> None:
        self.model = model
        if recipe is None:
            kind = getattr(getattr(model, "config", None), "model_type", None)
            if kind not in RECIPES:
                known = f"known: {', '.join(RECIPES)}"
                raise ConfigError(f"no recipe for {type(model).__name__} (model type {kind}): give one; {known}")
            recipe = RECIPES[kind]
        self.recipe = recipe
        self.targets = set(recipe)
        self.searching_results: list[list[nn.Module]] = []

    def search(self, target_name: str | None = None) -> list[list[nn.Module]]:
        """For each module of a class in the recipe (or of ``target_name`` alone), the list of its recipe's modules.

        Raises:
            ConfigError: ``target_name`` is not in the recipe, or a path leads nowhere.
        """
        if target_name is not None and target_name not in self.recipe:
            raise ConfigError(f"the recipe has no '{target_name}'; it has: {', '.join(sorted(self.recipe))}")
        targets = self.targets if target_name is None else {target_name}
        self.searching_results = [
            [get_attributes(module, path) for path in self.recipe[type(module).__name__]]
            for module in self.model.modules()
            if type(module).__name__ in targets
        ]
        return self.searching_results


class JitBasicSearcher:
    """Base of the searchers that read the traced graph.

    Args:
        model: the model; left as it is.
        dataloader: its first batch is the input: a tensor, a mapping (labels are taken out), or (inputs, labels).
        placeholder_shape: shape of one made-up input of ones where there is no dataloader; by default inputs are made
            from the model's configuration and its forward's signature, see :func:`tritprune.slimming.make_inputs`.
        placeholder_dtype: its dtype.
        example_inputs: the inputs themselves; goes before the other two.
        tracer: how to read the model: "jit" or "export".

    Attributes:
        static_graph: the traced :class:`Graph`.
        flatten_static_graph: its operations, as a list of :class:`Node`.
        device: where the model is.
        target_layers: class names of the layers that are searched for.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any] | None = None,
        placeholder_shape: Sequence[int] | None = None,
        placeholder_dtype: torch.dtype | None = None,
        *,
        example_inputs: Any = None,
        tracer: str = "jit",
    ) -> None:
        self.model = model
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.target_layers = ["Linear"]
        if example_inputs is None:
            made = placeholder_shape is not None or placeholder_dtype is not None
            example_inputs = (
                self._placeholder(placeholder_shape, placeholder_dtype)
                if made and dataloader is None
                else inputs_for(model, dataloader)
            )
        self.static_graph: Graph = trace(model, example_inputs, tracer)
        self.flatten_static_graph: list[Node] = list(self.static_graph.nodes)

    def _placeholder(self, shape: Sequence[int] | None, dtype: torch.dtype | None) -> torch.Tensor:
        if shape is None:
            shape = next(iter(ModelInputs.of(make_inputs(self.model)).tensors().values())).shape
        if dtype is None:
            dtype = torch.int64 if isinstance(first_layer(self.model), nn.Embedding) else torch.float32
        return torch.ones(tuple(shape), dtype=dtype, device=self.device)


class Linear2LinearSearcher(JitBasicSearcher):
    """Linears that follow one another with nothing but element-wise operations in between; gated blocks too.

    Attributes:
        target_op_lut: operation name -> the graph's operations of that name, for those that may stand in between.
        current_pattern: the block that was found last.
    """

    target_op_lut: dict[str, list[Node]]
    current_pattern: FeedForward | None = None

    def search(self) -> list[dict[str, Any]]:
        """``[{"root_linear": name, "target_frontier_linears": [names]}]``.

        The root reads the units that the frontier linears make: prune the root's input channels, then the frontier's
        output channels can go.
        """
        self.target_op_lut = {
            kind: [node for node in self.flatten_static_graph if node.kind == kind] for kind in ("linear", *ELEMENTWISE)
        }
        found: list[dict[str, Any]] = []
        for block in find_feed_forward(self.static_graph, self.model):
            self.current_pattern = block
            found.append({"root_linear": block.root, "target_frontier_linears": list(block.frontier)})
        log.info("found %d chains of linears in %s", len(found), type(self.model).__name__)
        return found

    def from_layer_name_to_object(self, l2l_search_layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The result of :meth:`search` with modules in the place of names."""
        return [
            {
                "root_linear": get_attributes(self.model, item["root_linear"]),
                "target_frontier_linears": [get_attributes(self.model, n) for n in item["target_frontier_linears"]],
            }
            for item in l2l_search_layers
        ]


class SelfMHASearcher(JitBasicSearcher):
    """Query, key, value and output linears of every attention, whatever they are called."""

    def search(self, split_qkv_ffn: bool = False) -> Any:
        """``[{"qkv": [names], "ffn": [names]}]``, ``ffn`` being the linear that reads the heads.

        Args:
            split_qkv_ffn: return two flat lists instead: all query, key and value linears, and all output linears.
        """
        found = [
            {
                "qkv": list(dict.fromkeys([*block.query, *block.key, *block.value])),
                "ffn": [block.output] if block.output else [],
            }
            for block in find_attention(self.static_graph, self.model)
        ]
        log.info("found %d attention blocks in %s", len(found), type(self.model).__name__)
        if not split_qkv_ffn:
            return found
        return [name for item in found for name in item["qkv"]], [name for item in found for name in item["ffn"]]

    def from_layer_name_to_object(self, mha_search_layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The result of :meth:`search` with names and modules, and the module that holds each attention."""
        objects: list[dict[str, Any]] = []
        for item in mha_search_layers:
            parent = common_parent([*item["qkv"], *item["ffn"]])
            objects.append(
                {
                    "qkv_name": list(item["qkv"]),
                    "ffn_name": list(item["ffn"]),
                    "mha_name": [parent],
                    "qkv_module": [get_attributes(self.model, name) for name in item["qkv"]],
                    "ffn_module": [get_attributes(self.model, name) for name in item["ffn"]],
                    "mha_module": [self.model.get_submodule(parent)],
                }
            )
        return objects


class ClassifierHeadSearcher:
    """The final classifier, so that it can be left out of pruning.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.pruning_ops = ["Linear", "Conv2d"]

    def search(self, return_name: bool = True) -> Any:
        """The last layer if it is a linear or a convolution: its name, or the module; None if it is something else."""
        leaves = [(n, m) for n, m in self.model.named_modules() if n and next(m.children(), None) is None]
        if not leaves or type(leaves[-1][1]).__name__ not in self.pruning_ops:
            return None
        return leaves[-1][0] if return_name else leaves[-1][1]
