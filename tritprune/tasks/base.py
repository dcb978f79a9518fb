"""A task: a model, its data and its metric in one object.

A new task is one class: subclass :class:`Task`, write ``load``, ``build_model`` and ``builder``, and file it with
``@register_task("name")``. Batches, loss, evaluation and example inputs come from here and can be overridden.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tritprune.errors import ConfigError, DataError, MissingPackageError
from tritprune.registry import Registry

Split = Literal["train", "eval"]


@dataclass(frozen=True)
class TaskData:
    """What a task's ``load`` returns.

    Args:
        train: the training split, one tensor per column; the first dimension is the example, ``labels`` is int64 [N].
        eval: the held-out split, same columns.
        labels: the class names; ``labels[i]`` is class i.
        data_hash: SHA-256 over the content of both splits.
        model_hash: SHA-256 over what the model starts from.
        description: one line for the report.
    """

    train: Mapping[str, Tensor]
    eval: Mapping[str, Tensor]
    labels: tuple[str, ...]
    data_hash: str
    model_hash: str
    description: str


class Task(ABC):
    """Base of every task: classification with cross-entropy and accuracy.

    Data are whole splits as CPU tensors. They load on first use, or when :meth:`prepare` is called.
    """

    name: ClassVar[str] = "task"
    primary_metric: ClassVar[str] = "accuracy"

    @abstractmethod
    def load(self) -> TaskData:
        """Read data and tokenizer; called once.

        Raises:
            DataError: data or weights are missing or are not what they should be.
            MissingPackageError: an optional package is needed; the message has the pip command.
        """

    @abstractmethod
    def build_model(self, seed: int) -> nn.Module:
        """The model to train, on the CPU, in training mode: pretrained weights if any, the rest drawn from ``seed``.

        The same seed gives the same bits; the global random state is left as it was.
        """

    @abstractmethod
    def builder(self) -> dict[str, Any]:
        """How to build the bare model again, as ``tritprune.export.save_model`` wants it."""

    @cached_property
    def data(self) -> TaskData:
        """The loaded data."""
        data = self.load()
        _check(self.name, data)
        return data

    def prepare(self) -> None:
        """Load the data now; a second call does nothing.

        Raises:
            DataError: data or weights are missing or are not what they should be.
            MissingPackageError: an optional package is needed; the message has the pip command.
        """
        _ = self.data

    @property
    def train(self) -> Mapping[str, Tensor]:
        """The training split, one tensor per column."""
        return self.data.train

    @property
    def eval(self) -> Mapping[str, Tensor]:
        """The held-out split, one tensor per column."""
        return self.data.eval

    @property
    def labels(self) -> tuple[str, ...]:
        """The class names."""
        return self.data.labels

    @property
    def data_hash(self) -> str:
        """SHA-256 over the content of both splits."""
        return self.data.data_hash

    @property
    def model_hash(self) -> str:
        """SHA-256 over what the model starts from."""
        return self.data.model_hash

    @property
    def description(self) -> str:
        """One line for the report."""
        return self.data.description

    @property
    def n_train(self) -> int:
        """Number of training examples."""
        return len(self.train["labels"])

    @property
    def n_eval(self) -> int:
        """Number of held-out examples."""
        return len(self.eval["labels"])

    def split(self, split: str) -> Mapping[str, Tensor]:
        """The columns of ``train`` or ``eval``.

        Raises:
            ConfigError: another name.
        """
        if split not in ("train", "eval"):
            raise ConfigError(f"{self.name} has no split '{split}'; known: eval, train")
        return self.train if split == "train" else self.eval

    def collate(self, split: Split, indices: Tensor) -> dict[str, Tensor]:
        """A batch: the rows ``indices`` (int64 [B]) of every column."""
        return {name: column.index_select(0, indices) for name, column in self.split(split).items()}

    def model_inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's keyword arguments: the batch without its labels."""
        return {name: column for name, column in batch.items() if name != "labels"}

    def logits(self, output: Any) -> Tensor:
        """The logits [B, classes] of a model's output: a tensor, a mapping or object with ``logits``, or a tuple."""
        if isinstance(output, Tensor):
            return output
        if isinstance(output, Mapping):
            return output["logits"]
        return output.logits if hasattr(output, "logits") else output[0]

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean cross-entropy in nats, in fp32: -1/B sum_b log softmax(logits_b)[label_b]."""
        return F.cross_entropy(logits.float(), batch["labels"])

    def metrics(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """Metrics over a whole split from predicted and true classes (int64 [N]); here the accuracy, in [0, 1]."""
        return {"accuracy": float((predictions == labels).double().mean())}

    def evaluate(
        self, model: nn.Module, *, device: str | torch.device = "cpu", batch_size: int = 64
    ) -> dict[str, float]:
        """Metrics and mean loss over the whole held-out split.

        The model stays on its device, which ``device`` must name; every module's train/eval mode is restored.

        Returns:
            ``{"loss": nats per example, "accuracy": ..., ...}``
        """
        predictions: list[Tensor] = []
        losses: list[Tensor] = []
        with evaluating(model), torch.no_grad():
            for indices in torch.arange(self.n_eval).split(batch_size):
                batch = {name: column.to(device) for name, column in self.collate("eval", indices).items()}
                logits = self.logits(model(**self.model_inputs(batch)))
                predictions.append(logits.argmax(dim=-1))
                losses.append(self.loss(logits, batch).double() * len(indices))
        loss = float(torch.stack(losses).sum()) / self.n_eval
        return {"loss": loss, **self.metrics(torch.cat(predictions).cpu(), self.eval["labels"])}

    def placeholder_inputs(self) -> dict[str, Tensor] | None:
        """Made-up model inputs, without any data, for a first look at the model; None: its configuration tells them."""
        return None

    def example_inputs(self, batch_size: int = 2) -> dict[str, Tensor]:
        """Model inputs made of the first held-out examples, from the start again when there are too few."""
        return self.model_inputs(self.collate("eval", torch.arange(batch_size) % self.n_eval))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` into evaluation mode; on leaving, each module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from the CPU generator as seeded with ``seed``; on leaving, its state is what it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that seeds the GPUs too
        yield


def trim_padding(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cut the columns on the right that are padding in every row: [B, L] -> [B, L'] by ``attention_mask``."""
    mask = batch["attention_mask"]
    kept = int(mask.any(dim=0).nonzero().max()) + 1
    return {name: column[:, :kept] if column.shape == mask.shape else column for name, column in batch.items()}


def require(package: str, extra: str) -> Any:
    """Import an optional package.

    Raises:
        MissingPackageError: it is not installed or does not import; the message has the pip command.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise MissingPackageError(
            f"'{package}' is needed and cannot be imported ({error}); pip install 'tritprune[{extra}]'"
        ) from error


def stratified_split(keys: Sequence[str], labels: Sequence[Hashable], fraction: float) -> tuple[list[int], list[int]]:
    """Split examples by the hash of their content, class by class.

    In each class the round(fraction * n) examples with the lowest SHA-256 are held out, so that the side of an example
    depends on the contents alone, not on their order.

    Args:
        keys: the content of each example; equal keys are one example and must have been merged before.
        labels: the class of each example.
        fraction: share that is held out, in (0, 1).

    Returns:
        Indices of the training and of the held-out examples, each in hash order (classes are mixed).

    Raises:
        ConfigError: the fraction is not in (0, 1).
        DataError: two examples have the same key.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the held-out share must be in (0, 1), got {fraction}")
    if len(set(keys)) != len(keys):
        raise DataError(f"{len(keys) - len(set(keys))} examples occur twice; merge them before the split")
    by_hash = sorted(range(len(keys)), key=lambda i: hash_text(keys[i]))
    ranked: dict[Hashable, list[int]] = {}
    for index in by_hash:
        ranked.setdefault(labels[index], []).append(index)
    held_out = {index for members in ranked.values() for index in members[: round(fraction * len(members))]}
    return [i for i in by_hash if i not in held_out], [i for i in by_hash if i in held_out]


def hash_text(*parts: str) -> str:
    """SHA-256 of texts; each part is prefixed by its length, so that parts cannot run into one another."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def hash_tensors(splits: Mapping[str, Mapping[str, Tensor]]) -> str:
    """SHA-256 over named splits of named tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for split, columns in sorted(splits.items()):
        for name, column in sorted(columns.items()):
            digest.update(f"{split}/{name} {column.dtype} {tuple(column.shape)}\n".encode())
            digest.update(column.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(name: str, data: TaskData) -> None:
    for split, columns in (("train", data.train), ("eval", data.eval)):
        if "labels" not in columns or not len(columns["labels"]):
            raise DataError(f"task '{name}' has no examples in its {split} split")
        sizes = {column: len(tensor) for column, tensor in columns.items()}
        if len(set(sizes.values())) != 1:
            raise DataError(f"task '{name}': columns of the {split} split differ in length: {sizes}")
        low, high = int(columns["labels"].min()), int(columns["labels"].max())
        if low < 0 or high >= len(data.labels):
            raise DataError(f"task '{name}': {split} labels run from {low} to {high}, there are {len(data.labels)}")


tasks: Registry[Task] = Registry("task")
"""Tasks by name."""

register_task = tasks.register
get_task = tasks.build
