import json
from pathlib import Path

import pytest
import torch

from tritprune.errors import ConfigError, DataError, UnknownNameError
from tritprune.tasks import Glue, get_task
from tritprune.tasks.glue import GLUE

SENTENCES = [
    "the film was good",
    "a very bad film",
    "it is really not good",
    "fine",
    "dull and bad and dull",
    "a good film",
]


def rows_of(task_name: str, count: int = 6) -> list[dict]:
    spec = GLUE[task_name]
    return [
        {
            **{column: SENTENCES[(i + k) % len(SENTENCES)] for k, column in enumerate(spec.texts)},
            "label": i % len(spec.labels),
            "idx": i,
        }
        for i in range(count)
    ]


def write(folder: Path, task_name: str, train: list[dict] | None = None, held_out: list[dict] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    spec = GLUE[task_name]
    (folder / "train.json").write_text(json.dumps(train or rows_of(task_name)))
    (folder / f"{spec.validation[0]}.json").write_text(json.dumps(held_out or rows_of(task_name, 5)))
    return folder


def glue(tmp_path: Path, model: Path, task_name: str = "sst2", **settings) -> Glue:
    folder = tmp_path / task_name
    if not folder.exists():
        write(folder, task_name)
    return Glue(task_name=task_name, model=str(model), data=str(folder), **{"max_length": 16, **settings})


@pytest.mark.parametrize("task_name", sorted(GLUE))
def test_every_task_loads_trains_and_evaluates(tmp_path: Path, tiny_bert: Path, task_name: str) -> None:
    task = glue(tmp_path, tiny_bert, task_name)
    assert (task.n_train, task.n_eval, task.labels) == (6, 5, GLUE[task_name].labels)
    assert task.train["labels"].tolist() == [i % len(task.labels) for i in range(6)]
    assert f"GLUE {task_name}, 6 + 5 examples" in task.description
    model = task.build_model(0)
    assert model.config.num_labels == len(task.labels)
    batch = task.collate("train", torch.arange(6))
    loss = task.loss(task.logits(model(**task.model_inputs(batch))), batch)
    loss.backward()
    assert torch.isfinite(loss)
    found = task.evaluate(model, batch_size=2)
    assert set(found) == {"loss", "accuracy"} | ({"f1"} if task_name in ("mrpc", "qqp") else set())


def test_pairs_are_encoded_as_pairs(tmp_path: Path, tiny_bert: Path) -> None:
    task = glue(tmp_path, tiny_bert, "mrpc")
    row = {name: column[0].tolist() for name, column in task.train.items()}
    text = task.tokenizer.decode([i for i in row["input_ids"] if i])
    assert text == "[CLS] the film was good [SEP] a very bad film [SEP]"
    assert row["token_type_ids"][:11] == [0] * 6 + [1] * 5


def test_batches_are_trimmed_to_their_longest(tmp_path: Path, tiny_bert: Path) -> None:
    task = glue(tmp_path, tiny_bert)
    assert task.train["input_ids"].shape == (6, 7)  # the longest of the split, not max_length
    short = task.collate("train", torch.tensor([3]))
    assert {name: tuple(column.shape) for name, column in short.items()} == {
        "input_ids": (1, 3),
        "token_type_ids": (1, 3),
        "attention_mask": (1, 3),
        "labels": (1,),
    }
    assert {column.dtype for column in short.values()} == {torch.int64}
    fixed = glue(tmp_path, tiny_bert, trim=False)
    assert fixed.collate("train", torch.tensor([3]))["input_ids"].shape == (1, 7)
    model = task.build_model(0).eval()
    with torch.no_grad():
        trimmed, padded = (
            model(**some.model_inputs(some.collate("train", torch.tensor([3])))).logits for some in (task, fixed)
        )
    torch.testing.assert_close(trimmed, padded)


def test_long_examples_are_cut(tmp_path: Path, tiny_bert: Path) -> None:
    task = glue(tmp_path, tiny_bert, max_length=8)
    folder = write(tmp_path / "long", "sst2", train=[{"sentence": "good " * 40, "label": 1}] * 2)
    task = Glue("sst2", str(tiny_bert), str(folder), max_length=8)
    assert task.train["input_ids"].shape == (2, 8)
    with pytest.raises(ConfigError, match=r"max_length is 64, but '.*' takes at most 32 tokens"):
        glue(tmp_path, tiny_bert, max_length=64).prepare()


def test_f1_by_hand(tmp_path: Path, tiny_bert: Path) -> None:
    task = glue(tmp_path, tiny_bert, "mrpc")
    predictions, labels = torch.tensor([1, 1, 0, 0, 1]), torch.tensor([1, 0, 1, 0, 1])
    assert task.metrics(predictions, labels) == {
        "accuracy": pytest.approx(0.6),
        "f1": pytest.approx(2 * 2 / (4 + 1 + 1)),
    }
    nothing = torch.zeros(5, dtype=torch.int64)
    assert task.metrics(nothing, nothing) == {"accuracy": 1.0, "f1": 0.0}


def test_the_head_is_drawn_from_the_seed_and_nothing_is_printed(
    tmp_path: Path, tiny_bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    task = glue(tmp_path, tiny_bert)
    state = torch.get_rng_state()
    first, again, other = (task.build_model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert [key for key in first if not torch.equal(first[key], other[key])] == ["classifier.weight"]
    stored = load_file(tiny_bert / "model.safetensors")
    assert all(torch.equal(first[f"bert.{key}"], value) for key, value in stored.items())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert task.builder() == {"kind": "transformers", "class": "BertForSequenceClassification"}


def test_a_fine_tuned_checkpoint_keeps_a_head_that_fits(tmp_path: Path, tiny_bert: Path) -> None:
    two = glue(tmp_path, tiny_bert).build_model(5)
    two.bfloat16().save_pretrained(tmp_path / "tuned")
    for path in tiny_bert.glob("*token*"):
        (tmp_path / "tuned" / path.name).write_bytes(path.read_bytes())
    kept = glue(tmp_path, tmp_path / "tuned").build_model(0)
    assert kept.dtype == torch.float32
    assert torch.equal(kept.state_dict()["classifier.weight"], two.float().state_dict()["classifier.weight"])
    three = glue(tmp_path, tmp_path / "tuned", "mnli").build_model(0)
    assert three.state_dict()["classifier.weight"].shape == (3, 16)


def test_a_checkpoint_without_part_of_its_encoder_is_refused(tmp_path: Path, tiny_bert: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_bert.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 tensors.*bert\.encoder\.layer\.1\.output\.dense\.weight"):
        glue(tmp_path, broken).build_model(0)


def test_hashes_follow_data_and_model(tmp_path: Path, tiny_bert: Path) -> None:
    one = glue(tmp_path, tiny_bert)
    same = glue(tmp_path, tiny_bert)
    assert (one.data_hash, one.model_hash) == (same.data_hash, same.model_hash)
    other_rows = rows_of("sst2")
    other_rows[0]["label"] = 1
    other = Glue("sst2", str(tiny_bert), str(write(tmp_path / "other", "sst2", train=other_rows)), max_length=16)
    assert other.data_hash != one.data_hash
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tiny_bert.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert glue(tmp_path, copy).model_hash == one.model_hash
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert glue(tmp_path, copy).model_hash != one.model_hash


def test_fewer_examples_are_evenly_spaced(tmp_path: Path, tiny_bert: Path) -> None:
    task = glue(tmp_path, tiny_bert, "mnli", train_examples=3, eval_examples=100)
    assert (task.n_train, task.n_eval) == (3, 5)
    assert task.train["labels"].tolist() == [0, 2, 1]  # rows 0, 2, 4


def test_labels_by_name(tmp_path: Path, tiny_bert: Path) -> None:
    rows = [{**row, "label": GLUE["mnli"].labels[row["label"]]} for row in rows_of("mnli")]
    task = Glue("mnli", str(tiny_bert), str(write(tmp_path / "named", "mnli", train=rows)), max_length=16)
    assert task.train["labels"].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": -1}, r"train, row 2: label -1 is not one of 0 or negative, 1 or positive"),
        ({"label": "good"}, r"row 2: label 'good' is not one of"),
        ({"label": None}, r"row 2: label None"),
        ({"sentence": None}, r"row 2: no text in column 'sentence'; its columns: sentence, label, idx"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, tiny_bert: Path, change: dict, message: str) -> None:
    rows = rows_of("sst2")
    rows[1] = {**rows[1], **change}
    task = Glue("sst2", str(tiny_bert), str(write(tmp_path / "bad", "sst2", train=rows)), max_length=16)
    with pytest.raises(DataError, match=message):
        task.prepare()


def test_from_the_hub_and_offline(tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(source: str, task_name: str, *, split: str) -> datasets.Dataset:
        asked.append((source, task_name, split))
        return datasets.Dataset.from_list(rows_of(task_name))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = Glue("mnli", str(tiny_bert), max_length=16)
    assert task.n_eval == 6
    assert asked == [("nyu-mll/glue", "mnli", "train"), ("nyu-mll/glue", "mnli", "validation_matched")]

    def offline(*arguments: str, split: str) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    expected = (
        r"tried datasets\.load_dataset\('nyu-mll/glue', 'rte', split='train'\), which failed: Couldn't reach the Hub; "
        r"pass a local folder with task\.data=<folder>: files train and validation .* sentence1, sentence2, label"
    )
    with pytest.raises(DataError, match=expected):
        Glue("rte", str(tiny_bert), max_length=16).prepare()


def test_names_that_lead_nowhere(tmp_path: Path, tiny_bert: Path) -> None:
    with pytest.raises(ConfigError, match="unknown glue task 'sst'; did you mean 'sst2'"):
        get_task({"name": "glue", "task_name": "sst"})
    with pytest.raises(UnknownNameError, match="did you mean 'glue'"):
        get_task("glu")
    with pytest.raises(DataError, match=r"there is no folder /no/such/data; pass a local folder"):
        Glue("sst2", str(tiny_bert), "/no/such/data", max_length=16).prepare()
    with pytest.raises(DataError, match=r"there is no folder /no/such/model"):
        Glue("sst2", "/no/such/model").prepare()
    with pytest.raises(DataError, match=r"model 'acme/none' could not be loaded"):
        Glue("sst2", "acme/none").prepare()
    with pytest.raises(DataError, match=r"model '.*' could not be loaded"):
        Glue("sst2", str(tmp_path)).prepare()
    with pytest.raises(ConfigError, match="train_examples must be at least 1 or null, got 0"):
        Glue(train_examples=0)
    with pytest.raises(ConfigError, match="at least 8, got 2"):
        Glue(max_length=2)
