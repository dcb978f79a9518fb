"""glue: sentence classification on six tasks of the GLUE benchmark, with any Hugging Face model.

Source: Wang et al., GLUE (ICLR 2019), arXiv 1804.07461; data set ``nyu-mll/glue`` or local files.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError, DataError
from tritprune.registry import did_you_mean
from tritprune.tasks.base import (
    Split,
    Task,
    TaskData,
    hash_file,
    hash_text,
    register_task,
    require,
    seeded,
    trim_padding,
)
from tritprune.tasks.tables import Row, read_split

DATASET = "nyu-mll/glue"
CHUNK = 4096
MODEL_FILES = (".bin", ".json", ".model", ".safetensors", ".txt")


@dataclass(frozen=True)
class GlueTask:
    """One task of the benchmark.

    Args:
        texts: the one or two text columns.
        labels: class names; ``labels[i]`` is class i.
        validation: names of the held-out split, first choice first.
        f1: whether the F1 of class 1 is reported beside the accuracy.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    validation: tuple[str, ...] = ("validation", "dev")
    f1: bool = False


GLUE = {
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), f1=True),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), f1=True),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment")),
    "rte": GlueTask(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation=("validation_matched", "dev_matched"),
    ),
}
"""Columns, classes and metrics per task, as ``nyu-mll/glue`` has them."""


@register_task("glue")
class Glue(Task):
    """Sentences -> class.

    Args:
        task_name: sst2, mrpc, qqp, qnli, rte or mnli (evaluated on the matched part).
        model: a Hugging Face model name, or a local folder with config, weights and tokenizer.
        data: None for ``nyu-mll/glue`` from the hub or its cache; another data set name with the same columns; or a
            local folder with ``train`` and ``validation`` files (mnli: ``validation_matched``; ``dev`` for
            ``validation`` is understood) that end in json, jsonl, csv, tsv or parquet. Labels are numbers or names.
        max_length: tokens per example, special ones included; longer ones are cut.
        train_examples: use this many training examples, evenly spaced over the split; None for all.
        eval_examples: the same for the held-out split.
        trim: cut batches to their longest example. Faster, as most sentences are far shorter than ``max_length``; the
            outputs of an example may then differ in the last bits with the batch that it is in.
    """

    name = "glue"

    def __init__(
        self,
        task_name: str = "sst2",
        model: str = "bert-base-uncased",
        data: str | None = None,
        max_length: int = 128,
        train_examples: int | None = None,
        eval_examples: int | None = None,
        trim: bool = True,
    ) -> None:
        if task_name not in GLUE:
            raise ConfigError(f"unknown glue task '{task_name}'; {did_you_mean(str(task_name), tuple(GLUE))}")
        if max_length < 8:
            raise ConfigError(f"glue: max_length must be at least 8, got {max_length}")
        for key, count in (("train_examples", train_examples), ("eval_examples", eval_examples)):
            if count is not None and count < 1:
                raise ConfigError(f"glue: {key} must be at least 1 or null, got {count}")
        self.task_name = task_name
        self.task = GLUE[task_name]
        self.model = _expanded(str(model))
        self.source = DATASET if data is None else _expanded(str(data))
        self.max_length = max_length
        self.limits = {"train": train_examples, "eval": eval_examples}
        self.trim = trim

    @cached_property
    def config(self) -> Any:
        """The checkpoint's configuration.

        Raises:
            DataError: the model cannot be found.
        """
        with self._reading_model():
            return require("transformers", "hf").AutoConfig.from_pretrained(self.model)

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, padding on the right.

        Raises:
            DataError: it cannot be found, or has no token to pad with.
            ConfigError: ``max_length`` is more than the model takes.
        """
        limit = getattr(self.config, "max_position_embeddings", None)
        with self._reading_model():
            tokenizer = require("transformers", "hf").AutoTokenizer.from_pretrained(self.model)
        limit = min(tokenizer.model_max_length, limit or tokenizer.model_max_length)
        if self.max_length > limit:
            raise ConfigError(f"glue: max_length is {self.max_length}, but '{self.model}' takes at most {limit} tokens")
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise DataError(f"the tokenizer of '{self.model}' has neither a padding nor an end token")
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        return tokenizer

    def load(self) -> TaskData:
        """Read and encode both splits.

        Raises:
            MissingPackageError: the extra ``hf`` is not installed.
            DataError: model or data cannot be had; the message says what was tried and how to pass local files.
        """
        _ = self.tokenizer  # a wrong model name shows before the data are read
        texts: dict[str, list[tuple[str, ...]]] = {}
        targets: dict[str, list[int]] = {}
        for split, names in (("train", ("train",)), ("eval", self.task.validation)):
            rows = _spread(self._rows(names), self.limits[split])
            where = f"{self.source}, {names[0]}"
            texts[split] = [_texts(row, self.task.texts, f"{where}, row {i}") for i, row in enumerate(rows, 1)]
            targets[split] = [_label(row, self.task.labels, f"{where}, row {i}") for i, row in enumerate(rows, 1)]
        columns = {
            split: {**self._encode(texts[split]), "labels": torch.tensor(targets[split])} for split in ("train", "eval")
        }
        return TaskData(
            train=columns["train"],
            eval=columns["eval"],
            labels=self.task.labels,
            data_hash=_content_hash(self.max_length, self.task.labels, texts, targets),
            model_hash=self._model_hash(),
            description=(
                f"GLUE {self.task_name}, {len(targets['train'])} + {len(targets['eval'])} examples "
                f"({self.task.validation[0]}), {self.max_length} tokens, model {self.model}"
            ),
        )

    def collate(self, split: Split, indices: Tensor) -> dict[str, Tensor]:
        """A batch: the rows ``indices`` (int64 [B]) as int64, cut to the longest when ``trim`` is set."""
        batch = {name: column.long() for name, column in super().collate(split, indices).items()}
        return trim_padding(batch) if self.trim else batch

    def metrics(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """Accuracy, for mrpc and qqp also F1 = 2 TP / (2 TP + FP + FN) of class 1 (0 where nothing is positive)."""
        found = super().metrics(predictions, labels)
        if self.task.f1:
            positive, true = predictions == 1, labels == 1
            denominator = int(positive.sum() + true.sum())
            found["f1"] = 2 * int((positive & true).sum()) / denominator if denominator else 0.0
        return found

    def build_model(self, seed: int) -> nn.Module:
        """The checkpoint with a sequence classification head, in fp32; what it lacks is drawn from ``seed``.

        A head of another size is drawn anew.

        Raises:
            DataError: the checkpoint cannot be found, or lacks part of the encoder.
        """
        transformers = require("transformers", "hf")
        labels = self.task.labels
        with self._reading_model(), quiet(transformers), seeded(seed):
            model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
                self.model,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={name: index for index, name in enumerate(labels)},
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        drawn = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
        lacking = sorted(
            key for key in drawn if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key
        )
        if lacking:
            shown = ", ".join(lacking[:3])
            raise DataError(
                f"'{self.model}' lacks {len(lacking)} tensors of its encoder, or has them in other shapes: {shown}"
            )
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.train()

    def builder(self) -> dict[str, Any]:
        """The checkpoint's sequence classification class, from ``config.json``."""
        mapping = require("transformers", "hf").AutoModelForSequenceClassification._model_mapping
        if type(self.config) not in mapping:
            raise DataError(f"transformers has no sequence classification model for '{self.config.model_type}'")
        return {"kind": "transformers", "class": mapping[type(self.config)].__name__}

    def _rows(self, names: Sequence[str]) -> Sequence[Row]:
        if Path(self.source).is_dir():
            return read_split(Path(self.source), names)
        remedy = (
            "pass a local folder with task.data=<folder>: files train and "
            f"{names[0] if names[0] != 'train' else self.task.validation[0]} (json, jsonl, csv, tsv or parquet) "
            f"with the columns {', '.join((*self.task.texts, 'label'))}"
        )
        if _looks_like_path(self.source):
            raise DataError(f"there is no folder {self.source}; {remedy}")
        datasets = require("datasets", "hf")
        try:
            return datasets.load_dataset(self.source, self.task_name, split=names[0])
        except (OSError, ValueError) as error:
            raise DataError(
                f"glue: tried datasets.load_dataset('{self.source}', '{self.task_name}', split='{names[0]}'), "
                f"which failed: {error}; {remedy}"
            ) from error

    def _encode(self, texts: list[tuple[str, ...]]) -> dict[str, Tensor]:
        """Columns as int32 [N, L], L the longest example of the split (int32, as N is 400,000 in the largest tasks)."""
        chunks: list[dict[str, Tensor]] = []
        for start in range(0, len(texts), CHUNK):
            encoded = self.tokenizer(
                *(list(column) for column in zip(*texts[start : start + CHUNK], strict=True)),
                truncation=True,
                max_length=self.max_length,
                padding="max_length",
                return_tensors="pt",
            )
            chunks.append({name: column.to(torch.int32) for name, column in encoded.items()})
        return trim_padding({name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]})

    def _model_hash(self) -> str:
        folder = Path(self.model)
        if not folder.is_dir():
            cached = require("transformers.utils.hub", "hf").cached_file(self.model, "config.json")
            return hash_text(self.model, Path(cached).parent.name)  # <cache>/snapshots/<commit>/config.json
        files = sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES)
        return hash_text(*(f"{path.name}={hash_file(path)}" for path in files))

    @contextmanager
    def _reading_model(self) -> Iterator[None]:
        if _looks_like_path(self.model) and not Path(self.model).is_dir():
            raise DataError(f"there is no folder {self.model}; task.model is a Hugging Face name or a local folder")
        try:
            yield
        except (OSError, ValueError) as error:
            raise DataError(
                f"glue: the model '{self.model}' could not be loaded: {error}; a local folder with config.json, "
                "model.safetensors and tokenizer files can be passed with task.model=<folder>"
            ) from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' progress bars and load report off the terminal."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".")) or name.count("/") > 1


def _spread(rows: Sequence[Row], count: int | None) -> Iterable[Row]:
    """``count`` rows, evenly spaced, or all."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i * len(rows) // count] for i in range(count)]


def _texts(row: Row, columns: tuple[str, ...], where: str) -> tuple[str, ...]:
    for column in columns:
        if not isinstance(row.get(column), str):
            raise DataError(f"{where}: no text in column '{column}'; its columns: {', '.join(map(str, row))}")
    return tuple(row[column] for column in columns)


def _label(row: Row, labels: tuple[str, ...], where: str) -> int:
    value = row.get("label")
    if value in labels:
        return labels.index(value)
    if str(value) in map(str, range(len(labels))):
        return int(str(value))
    known = ", ".join(f"{index} or {name}" for index, name in enumerate(labels))
    raise DataError(f"{where}: label {value!r} is not one of {known}")


def _content_hash(
    max_length: int,
    labels: tuple[str, ...],
    texts: Mapping[str, list[tuple[str, ...]]],
    targets: Mapping[str, list[int]],
) -> str:
    digest = hashlib.sha256(json.dumps([max_length, labels]).encode())
    for split in sorted(texts):
        for text, target in zip(texts[split], targets[split], strict=True):
            digest.update(json.dumps([split, target, text]).encode() + b"\n")
    return digest.hexdigest()
