import sys

import pytest
import torch
from torch import nn

import tritprune
from tritprune.errors import CertificateError, ConfigError, MissingPackageError, RunFolderError, TraceError
from tritprune.export import artifacts, export_onnx, export_program
from tritprune.slimming.model_inputs import ModelInputs
from tritprune.tasks.digits import DigitsViT


class Net(nn.Module):
    """Takes names, returns a mapping: what a library's model does."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, input_ids, attention_mask=None):
        hidden = torch.relu(self.up(self.embed(input_ids)))
        hidden = (hidden * attention_mask[..., None]).sum(1)
        return {"logits": self.down(hidden), "pooled": hidden}


TOKENS = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def net(dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype)


def test_a_program_runs_with_other_shapes_and_no_code_of_the_model(tmp_path):
    model = net()
    model.train()
    found = tritprune.export_program(model, TOKENS, tmp_path / "deep" / "net.pt2")
    assert model.training
    assert (found.kind, found.inputs, found.tolerance) == ("torch_export", 4, 2e-5)
    assert found.max_abs_difference <= 1e-6
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["net.pt2"]
    assert found.bytes == (tmp_path / "deep" / "net.pt2").stat().st_size
    with artifacts.quiet():
        program = torch.export.load(tmp_path / "deep" / "net.pt2").module()
    other = {"input_ids": torch.ones(5, 9, dtype=torch.long), "attention_mask": torch.ones(5, 9, dtype=torch.long)}
    logits, pooled = program(*other.values())
    expected = model(**other)
    torch.testing.assert_close((logits, pooled), (expected["logits"], expected["pooled"]))


def test_an_onnx_file_runs_in_onnxruntime_with_other_shapes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = net()
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    found = tritprune.export_onnx(model, TOKENS, path)
    assert (found.kind, found.inputs) == ("onnx", 4)
    assert found.max_abs_difference <= 2e-5
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]  # one file, the weights in it
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == list(TOKENS)
    assert [entry.name for entry in session.get_outputs()] == ["logits", "pooled"]
    other = {"input_ids": torch.ones(5, 9, dtype=torch.long), "attention_mask": torch.ones(5, 9, dtype=torch.long)}
    logits, _ = session.run(None, {name: tensor.numpy() for name, tensor in other.items()})
    torch.testing.assert_close(torch.from_numpy(logits), model(**other)["logits"])


def test_a_model_whose_dead_blocks_are_gone_is_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsViT(width=8, depth=1, heads=2, hidden=12).eval()
    for layer in (model.blocks[0].attention.value, model.blocks[0].mlp.down):
        nn.init.zeros_(layer.weight)
    inputs = torch.rand(2, 8, 8)
    result = tritprune.slim_model(model, inputs)
    assert [cut.after for cut in result.cuts] == [0, 0]
    for kind, export in artifacts.EXPORTERS.items():
        assert export(result.model, inputs, tmp_path / kind).max_abs_difference <= 1e-5
        expected = [(ModelInputs.of(inputs), {"output": model(inputs)})]
        assert artifacts.check_artifact(kind, tmp_path / kind, expected) <= 1e-5


def test_a_file_that_differs_is_refused_with_numbers_and_the_old_one_stays(tmp_path, monkeypatch):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"old")
    load = torch.export.load

    def wrong(*arguments):
        program = load(*arguments)
        with torch.no_grad():
            program.state_dict["model.down.bias"] += 0.01
        return program

    monkeypatch.setattr(torch.export, "load", wrong)
    with pytest.raises(CertificateError, match=r"'logits' differs by 1\.00e-02 where 2\.\d+e-05 is allowed, on inputs"):
        export_program(net(), TOKENS, path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.pt2"]


def test_what_cannot_be_exported_is_refused(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x * float(x.sum().item()) if x.sum().item() > 0 else x

    with pytest.raises(TraceError, match="Fixed cannot be exported as torch_export: "):
        export_program(Fixed(), torch.ones(2, 3), tmp_path / "x.pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        export_program(nn.Linear(3, 2), torch.ones(2, 3), tmp_path / "file" / "x.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_onnx_refuses_before_time_is_spent(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="bfloat16, which onnxruntime's inputs and outputs do not know"):
        export_onnx(net(torch.bfloat16), TOKENS, tmp_path / "x.onnx")
    monkeypatch.setattr(artifacts, "ONNX_LIMIT", 100)
    with pytest.raises(ConfigError, match="one ONNX file holds 2; use export_program"):
        export_onnx(net(), TOKENS, tmp_path / "x.onnx")
    with pytest.raises(ConfigError, match=r"slimmer\.save_as: unknown kind of file 'onxx'; did you mean 'onnx'"):
        artifacts.require("onxx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r"needs onnxruntime .*pip install 'tritprune\[onnx\]'"):
        export_onnx(net(), TOKENS, tmp_path / "x.onnx")
