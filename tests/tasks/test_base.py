import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tritprune.errors import ConfigError, DataError, MissingPackageError, UnknownNameError
from tritprune.tasks import Task, TaskData, get_task, register_task, tasks
from tritprune.tasks.base import (
    evaluating,
    hash_file,
    hash_tensors,
    hash_text,
    require,
    seeded,
    stratified_split,
    trim_padding,
)


class Signs(Task):
    """What a user writes: is the sum of two numbers positive?"""

    name = "signs"
    loads = 0

    def __init__(self, n_eval: int = 5) -> None:
        self.held_out = n_eval

    def load(self) -> TaskData:
        self.loads += 1
        points = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [3.0, -1.0], [-3.0, 1.0], [0.5, 0.5], [-2.0, 1.0]])
        targets = (points.sum(1) > 0).long()
        held_out = slice(0, self.held_out)
        return TaskData(
            train={"x": points, "labels": targets},
            eval={"x": points[held_out], "labels": targets[held_out]},
            labels=("no", "yes"),
            data_hash="d",
            model_hash="m",
            description="signs of sums",
        )

    def build_model(self, seed: int) -> nn.Module:
        with seeded(seed):
            return Sum()

    def builder(self) -> dict:
        return {"kind": "registered", "name": "sum", "arguments": {}}


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.9)
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.drop(x))


def test_loads_once_and_on_first_use() -> None:
    task = Signs()
    assert task.loads == 0
    assert (task.n_train, task.n_eval, task.labels) == (6, 5, ("no", "yes"))
    task.prepare()
    assert task.loads == 1
    assert (task.data_hash, task.model_hash, task.description) == ("d", "m", "signs of sums")


def test_evaluate_is_the_mean_over_examples_and_does_not_depend_on_the_batches() -> None:
    task, model = Signs(), Sum()
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))  # looks at the first number alone
        model.linear.bias.zero_()
    x, labels = task.eval["x"], task.eval["labels"]
    expected = [
        math.log(1 + math.exp(-(a if label else -a))) for a, label in zip(x[:, 0].tolist(), labels, strict=True)
    ]
    for batch_size in (1, 2, 5, 64):
        found = task.evaluate(model, batch_size=batch_size)
        assert found["accuracy"] == pytest.approx(1.0)
        assert found["loss"] == pytest.approx(sum(expected) / 5, rel=1e-6)
    with torch.no_grad():
        model.linear.weight.neg_()
    assert task.evaluate(model)["accuracy"] == 0.0


def test_evaluate_gives_each_module_its_mode_back() -> None:
    task, model = Signs(), Sum().train()
    model.linear.eval()
    task.evaluate(model)
    assert (model.training, model.drop.training, model.linear.training) == (True, True, False)


def test_modes_come_back_after_an_error() -> None:
    model = Sum().train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), evaluating(model):
        model(torch.ones(1, 3))
    assert model.drop.training


def test_batches_are_rows() -> None:
    task = Signs()
    batch = task.collate("train", torch.tensor([4, 0]))
    assert torch.equal(batch["x"], torch.tensor([[0.5, 0.5], [1.0, 2.0]]))
    assert batch["labels"].tolist() == [1, 1]
    assert list(task.model_inputs(batch)) == ["x"]
    with pytest.raises(ConfigError, match="no split 'test'; known: eval, train"):
        task.collate("test", torch.tensor([0]))  # pyright: ignore[reportArgumentType]


def test_example_inputs_start_again_when_there_are_too_few() -> None:
    inputs = Signs().example_inputs(7)
    assert inputs["x"].shape == (7, 2)
    assert torch.equal(inputs["x"][5:], inputs["x"][:2])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: (logits, "more"),
        lambda logits: {"logits": logits},
        lambda logits: SimpleNamespace(logits=logits),
    ],
)
def test_logits_of_any_output(wrap) -> None:
    logits = torch.randn(2, 3)
    assert Signs().logits(wrap(logits)) is logits


def test_loss_is_computed_in_fp32() -> None:
    logits = torch.randn(8, 5).bfloat16()
    labels = torch.arange(8) % 5
    loss = Signs().loss(logits, {"labels": labels})
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nn.functional.cross_entropy(logits.float(), labels))


def test_data_that_make_no_sense_are_refused() -> None:
    with pytest.raises(DataError, match="no examples in its eval split"):
        Signs(n_eval=0).prepare()

    class Short(Signs):
        def load(self) -> TaskData:
            data = super().load()
            return TaskData({**data.train, "x": data.train["x"][:2]}, data.eval, ("no", "yes"), "d", "m", "")

    with pytest.raises(DataError, match=r"differ in length: \{'x': 2, 'labels': 6\}"):
        Short().prepare()

    class Few(Signs):
        def load(self) -> TaskData:
            data = super().load()
            return TaskData(data.train, data.eval, ("no",), "d", "m", "")

    with pytest.raises(DataError, match="labels run from 0 to 1, there are 1"):
        Few().prepare()


def test_registry_builds_from_a_mapping() -> None:
    register_task("signs")(Signs)
    assert "signs" in tasks
    task = get_task({"name": "signs", "n_eval": 3})
    assert task.n_eval == 3
    with pytest.raises(UnknownNameError, match="did you mean 'pydocs'"):
        get_task("pydoc")
    with pytest.raises(ConfigError, match="did you mean 'max_length'"):
        get_task({"name": "pydocs", "max_lenght": 32})


def test_seeded_is_deterministic_and_leaves_the_global_state() -> None:
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.rand(4)
    with seeded(3):
        again = torch.rand(4)
    with seeded(4):
        other = torch.rand(4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_trim_padding() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]),
        "labels": torch.tensor([0, 1]),
    }
    trimmed = trim_padding(batch)
    assert trimmed["input_ids"].tolist() == [[5, 6, 0], [5, 6, 7]]
    assert trimmed["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert trimmed["labels"].tolist() == [0, 1]


def test_a_missing_package_names_the_extra() -> None:
    assert require("json", "demo").dumps([1]) == "[1]"
    with pytest.raises(MissingPackageError, match=r"'no_such_package' is needed .* pip install 'tritprune\[demo\]'"):
        require("no_such_package", "demo")


@given(st.sets(st.text(min_size=1), min_size=1, max_size=40), st.integers(1, 4), st.randoms(use_true_random=False))
def test_split_is_stratified_and_depends_on_contents_alone(texts: set[str], classes: int, random) -> None:
    keys = sorted(texts)
    labels = [int(hash_text(key)[:4], 16) % classes for key in keys]
    train, held_out = stratified_split(keys, labels, 0.2)
    assert sorted(train + held_out) == list(range(len(keys)))
    for label in set(labels):
        assert sum(labels[i] == label for i in held_out) == round(0.2 * labels.count(label))
    order = list(range(len(keys)))
    random.shuffle(order)
    moved, moved_out = stratified_split([keys[i] for i in order], [labels[i] for i in order], 0.2)
    assert [keys[order[i]] for i in moved] == [keys[i] for i in train]
    assert [keys[order[i]] for i in moved_out] == [keys[i] for i in held_out]


def test_split_refuses_duplicates_and_odd_shares() -> None:
    with pytest.raises(DataError, match="1 examples occur twice"):
        stratified_split(["a", "a", "b"], [0, 0, 0], 0.2)
    with pytest.raises(ConfigError, match=r"in \(0, 1\), got 1.5"):
        stratified_split(["a"], [0], 1.5)


def test_hashes_see_every_part(tmp_path: Path) -> None:
    assert hash_text("ab", "c") != hash_text("a", "bc")
    columns = {"x": torch.tensor([1.0, 2.0])}
    base = hash_tensors({"train": columns, "eval": columns})
    assert base == hash_tensors({"eval": columns, "train": columns})
    assert base != hash_tensors({"train": columns, "eval": {"x": torch.tensor([1.0, 3.0])}})
    assert base != hash_tensors({"train": columns, "eval": {"y": columns["x"]}})
    assert base != hash_tensors({"train": columns, "eval": {"x": columns["x"].view(torch.int32)}})
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
