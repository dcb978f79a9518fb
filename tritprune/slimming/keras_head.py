"""The final classifier of a Keras 3 model, on whichever backend Keras runs. Keras is imported on use only."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from tritprune.errors import ConfigError, MissingPackageError

PASSING = (
    *("Activation", "Softmax", "ReLU", "LeakyReLU", "ELU", "PReLU", "Dropout", "Flatten", "Reshape", "Identity"),
    "Rescaling",
)
"""Classes of layers that may follow the classifier: they only reshape or rescale what it says."""


class ClassifierHeadSearcherTF:
    """The final classifier of a ``keras.Model``, so that it can be left out of pruning.

    In a functional model it is the layer that makes the model's one output; in a sequential or subclassed model the
    last layer in their order. Layers that only reshape or rescale (softmax, dropout, flatten) may follow it.

    Args:
        model: a functional, sequential or subclassed Keras 3 model.

    Raises:
        MissingPackageError: Keras is not installed.
        ConfigError: something else than a ``keras.Model``.
    """

    def __init__(self, model: Any) -> None:
        self._keras = _keras()
        if not isinstance(model, self._keras.Model):
            hint = "; for a torch module use ClassifierHeadSearcher" if hasattr(model, "named_modules") else ""
            raise ConfigError(f"ClassifierHeadSearcherTF takes a keras.Model, got {type(model).__name__}{hint}")
        self.model = model
        self.pruning_ops = ["Dense", "Conv2D"]

    def search(self, return_name: bool = True) -> Any:
        """The classifier's name, or the layer itself; None if the model ends in something else."""
        layer = self._last(self.model)
        if layer is None or type(layer).__name__ not in self.pruning_ops:
            return None
        return layer.name if return_name else layer

    def _last(self, model: Any) -> Any:
        """The last layer that is no :data:`PASSING` one; None if it cannot be told."""
        if isinstance(model, self._keras.Sequential) or not _is_functional(model):
            return self._last_of(model.layers)
        outputs = model.outputs
        return self._maker(outputs[0]) if len(outputs) == 1 else None

    def _last_of(self, layers: Sequence[Any]) -> Any:
        for layer in reversed(layers):
            if type(layer).__name__ not in PASSING:
                return self._last(layer) if isinstance(layer, self._keras.Model) else layer
        return None

    def _maker(self, tensor: Any) -> Any:
        """The layer that makes a symbolic tensor, looking through passing layers and into models."""
        while True:
            history = tensor._keras_history
            operation = history.operation
            if isinstance(operation, self._keras.Model):
                return self._last(operation)
            inputs = operation._inbound_nodes[history.node_index].input_tensors
            if type(operation).__name__ not in PASSING or len(inputs) != 1:
                return operation
            tensor = inputs[0]


def _is_functional(model: Any) -> bool:
    """Whether the model knows its outputs as symbolic tensors; a subclassed one does not."""
    outputs = getattr(model, "outputs", None)
    return isinstance(outputs, list) and all(hasattr(tensor, "_keras_history") for tensor in outputs)


def _keras() -> Any:
    try:
        keras = import_module("keras")
    except ImportError as error:
        raise MissingPackageError(
            f"a Keras model needs keras ({error}); pip install 'tritprune[keras]'; KERAS_BACKEND=torch runs it on torch"
        ) from error
    if int(str(keras.__version__).partition(".")[0]) < 3:
        raise MissingPackageError(f"Keras 3 is needed, found {keras.__version__}; pip install 'tritprune[keras]'")
    return keras
