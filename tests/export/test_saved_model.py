import copy
import importlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tritprune
from tritprune.errors import CheckpointError, ConfigError, RunFolderError
from tritprune.export import load_model, save_model
from tritprune.registry import models
from tritprune.slimming import check_saved, slim_model

BERT = {"kind": "transformers", "class": "BertForSequenceClassification"}


@models.register("export_test_net")
class Net(nn.Module):
    """Two linears, a buffer, a tied pair and one attribute that counts."""

    def __init__(self, width=6, tied=False):
        super().__init__()
        self.num_heads = 4
        self.up = nn.Linear(3, width)
        self.down = nn.Linear(width, 2, bias=False)
        self.twin = nn.Linear(3, width, bias=False)
        self.scale = nn.Buffer(torch.rand(2))
        if tied:
            self.twin.weight = self.up.weight

    def forward(self, x):
        return self.down(torch.sigmoid(self.up(x)) * self.twin(x)) * self.scale


NET = {"kind": "registered", "name": "export_test_net", "arguments": {"width": 6}}


def bert(**settings):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=40, num_labels=3, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


TOKENS = {"input_ids": torch.arange(16).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


def kill(linear, rows):
    with torch.no_grad():
        linear.weight[rows] = 0


def assert_same_state(one, other):
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor, right[name]), name


def test_registered_model_round_trip(tmp_path):
    model = Net()
    folder = save_model(model, tmp_path / "deep" / "net", builder=NET, extra={"metrics": {"accuracy": 0.5}})
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["net"]
    random_state = torch.random.get_rng_state()
    loaded = load_model(folder)
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert_same_state(loaded, model)
    assert not loaded.training
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["extra"] == {"metrics": {"accuracy": 0.5}}
    assert manifest["versions"]["tritprune"] == tritprune.__version__
    assert set(manifest["files"]) == {"model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype, tmp_path):
    model = Net().to(dtype)
    assert_same_state(load_model(save_model(model, tmp_path / "net", builder=NET)), model)


def test_tied_parameters_are_stored_once_and_tied_again(tmp_path):
    builder = {"kind": "registered", "name": "export_test_net", "arguments": {"tied": True}}
    folder = save_model(Net(tied=True), tmp_path / "net", builder=builder)
    assert set(load_file(folder / "model.safetensors")) == {"up.weight", "up.bias", "down.weight", "scale"}
    loaded = load_model(folder)
    assert loaded.twin.weight is loaded.up.weight


def test_widths_biases_and_attributes(tmp_path):
    model = Net()
    model.up, model.twin = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
    model.down = nn.Linear(4, 2, bias=True)
    model.num_heads = 3
    widths = {
        "linears": {
            "up": {"out": 4, "in": 3, "bias": True},
            "twin": {"out": 4, "in": 3, "bias": False},
            "down": {"out": 2, "in": 4, "bias": True},
        },
        "attributes": {"": {"num_heads": 3}},
    }
    loaded = load_model(save_model(model, tmp_path / "net", builder=NET, widths=widths))
    assert_same_state(loaded, model)
    assert loaded.num_heads == 3
    assert (loaded.down.in_features, loaded.up.out_features) == (4, 4)
    x = torch.rand(5, 3)
    assert torch.equal(loaded(x), model(x))


def test_widths_of_any_layer(tmp_path):
    model = Net()
    model.up = nn.Linear(3, 5, bias=False)
    layer = {"tensors": {"weight": [5, 3], "bias": None}, "sizes": {"out_features": 5, "in_features": 3}}
    widths = {"layers": {"up": layer, "down": {"tensors": {"weight": [2, 5]}, "sizes": {"in_features": 5}}}}
    model.down = nn.Linear(5, 2, bias=model.down.bias is not None)
    widths["layers"]["twin"] = {"tensors": {"weight": [5, 3]}, "sizes": {"out_features": 5}}
    model.twin = nn.Linear(3, 5, bias=model.twin.bias is not None)
    if model.twin.bias is not None:
        widths["layers"]["twin"]["tensors"]["bias"] = [5]
    loaded = load_model(save_model(model, tmp_path / "net", builder=NET, widths=widths))
    assert_same_state(loaded, model)
    assert (loaded.up.out_features, loaded.down.in_features) == (5, 5)
    edit_manifest(
        tmp_path / "net", widths={"layers": {"up": {"tensors": {"wait": [5]}, "sizes": {}}}, "attributes": {}}
    )
    with pytest.raises(CheckpointError, match=r"sizes 'up\.wait', which is no tensor of Linear"):
        load_model(tmp_path / "net")


def test_slim_bert_loads_in_a_new_process_and_gives_its_certificate(tmp_path):
    model = bert()
    kill(model.bert.encoder.layer[0].intermediate.dense, slice(0, 6))
    kill(model.bert.encoder.layer[1].attention.self.value, slice(0, 6))
    result = slim_model(model, TOKENS)
    assert {cut.kind for cut in result.cuts} == {"feed-forward units", "heads"}
    save_model(result.model, tmp_path / "slim", builder=BERT, widths=result.widths)
    result.certificate.save(tmp_path)
    assert json.loads((tmp_path / "slim" / "manifest.json").read_text())["from_pretrained"] is False
    program = """
import sys, torch
torch.set_num_threads(1)
import tritprune
from tritprune.slimming import check_saved
model = tritprune.load(sys.argv[1] + "/slim")
print(check_saved(model, sys.argv[1]), sum(p.numel() for p in model.parameters()))
"""
    made = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert made.stdout.split() == ["True", str(result.parameters_after)]


def test_slim_vision_transformer_loads(tmp_path):
    from tritprune.tasks.digits import DigitsViT

    model = DigitsViT(width=16, depth=1, heads=2, hidden=12)
    kill(model.blocks[0].mlp.up, [0, 3])
    kill(model.blocks[0].attention.value, slice(8, 16))
    result = slim_model(model, torch.rand(2, 8, 8))
    builder = {"kind": "registered", "name": "digits_vit"}
    builder["arguments"] = {"width": 16, "depth": 1, "heads": 2, "hidden": 12}
    folder = save_model(result.model, tmp_path / "slim", builder=builder, widths=result.widths)
    result.certificate.save(tmp_path)
    loaded = tritprune.load(folder)
    assert loaded.blocks[0].attention.num_heads == 1
    assert check_saved(loaded, tmp_path)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_uniform_widths_load_with_plain_from_pretrained(implementation, tmp_path):
    model = bert(attn_implementation=implementation)
    for layer in model.bert.encoder.layer:
        kill(layer.intermediate.dense, slice(0, 10))
    result = slim_model(model, TOKENS)
    folder = save_model(result.model, tmp_path / "slim", builder=BERT, widths=result.widths)
    result.certificate.save(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["intermediate_size"] == 30
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert json.loads((folder / "manifest.json").read_text())["from_pretrained"] is True
    assert model.config.intermediate_size == 40
    plain = type(model).from_pretrained(folder)
    assert_same_state(plain, result.model)
    assert check_saved(plain, tmp_path)
    loaded = load_model(folder)
    assert loaded.config._attn_implementation == implementation
    assert_same_state(loaded, result.model)


def test_widths_that_differ_keep_the_config_and_load_with_tritprune(tmp_path):
    model = bert()
    kill(model.bert.encoder.layer[0].intermediate.dense, slice(0, 10))
    result = slim_model(model, TOKENS)
    folder = save_model(result.model, tmp_path / "slim", builder=BERT, widths=result.widths)
    assert json.loads((folder / "config.json").read_text())["intermediate_size"] == 40
    assert json.loads((folder / "manifest.json").read_text())["from_pretrained"] is False
    assert_same_state(load_model(folder), result.model)


def test_saving_again_replaces_the_model(tmp_path):
    old, new = Net(), Net()
    save_model(old, tmp_path / "net", builder=NET)
    (tmp_path / "net" / "manifest.json").unlink()  # a damaged model may be replaced too
    save_model(new, tmp_path / "net", builder=NET)
    assert_same_state(load_model(tmp_path / "net"), new)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_failure_leaves_the_old_model(tmp_path, monkeypatch):
    old = Net()
    save_model(old, tmp_path / "net", builder=NET)

    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tritprune.export.saved_model.save_file", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        save_model(Net(), tmp_path / "net", builder=NET)
    assert_same_state(load_model(tmp_path / "net"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    with pytest.raises(RunFolderError):
        save_model(Net(), tmp_path / "new", builder=NET)
    assert not (tmp_path / "new").exists()


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds notes\.txt: it is not replaced"):
        save_model(Net(), tmp_path, builder=NET)
    with pytest.raises(RunFolderError, match="is not a folder"):
        save_model(Net(), tmp_path / "notes.txt", builder=NET)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        ({}, "unknown builder kind 'None'; known: class, registered, transformers"),
        ({"kind": "registred"}, "unknown builder kind 'registred'; did you mean 'registered'"),
        ({"kind": "registered", "name": "export_test_ne"}, "no model is registered as 'export_test_ne'; did you mean"),
        ({"kind": "transformers", "class": "AutoModel"}, "has no model class 'AutoModel'"),
        ({"kind": "transformers", "class": "BertModel"}, "the builder makes a BertModel, the model is a Net"),
    ],
)
def test_bad_builders_are_refused_before_anything_is_written(builder, message, tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(ConfigError, match=message):
        save_model(Net(), tmp_path / "net", builder=builder)
    assert not (tmp_path / "net").exists()


def test_odd_states_and_extras_are_refused(tmp_path):
    class Odd(Net):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(ConfigError, match="'_extra_state' in the model's state is dict, not a tensor"):
        save_model(Odd(), tmp_path / "net", builder=NET)
    with pytest.raises(ConfigError, match="plain values only"):
        save_model(Net(), tmp_path / "net", builder=NET, extra={"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    model = bert()
    kill(model.bert.encoder.layer[0].intermediate.dense, slice(0, 6))
    result = slim_model(model, TOKENS)
    return save_model(result.model, tmp_path_factory.mktemp("saved") / "slim", builder=BERT, widths=result.widths)


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**manifest, **changes}.items() if v is not None}))


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"no saved model in .*manifest\.json cannot be read \(No such file"),
        (lambda f: (f / "manifest.json").unlink(), r"no saved model in .*manifest\.json cannot be read"),
        (lambda f: halve(f / "manifest.json"), r"manifest\.json is damaged: JSONDecodeError"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json is damaged: TypeError"),
        (lambda f: edit_manifest(f, widths=None), r"manifest\.json is damaged: it lacks widths"),
        (lambda f: edit_manifest(f, files={}), r"manifest\.json is damaged: it lacks model\.safetensors"),
        (lambda f: edit_manifest(f, format=2), "has format 2; this version of tritprune reads format 1"),
        (lambda f: edit_manifest(f, builder={"kind": "pickle"}), "unknown builder kind 'pickle'"),
        (lambda f: edit_manifest(f, builder={"kind": "transformers", "class": "Trainer"}), "no model class 'Trainer'"),
        (lambda f: edit_manifest(f, widths={"linears": {}, "attributes": {}}), r"'bert\.encoder.*is \[24, 34\], the m"),
        (lambda f: edit_manifest(f, widths={}), r"cannot be built: KeyError: 'attributes'"),
        (lambda f: edit_manifest(f, aliases={"a": "b"}), "is damaged: no tensor 'b'"),
        (lambda f: (f / "model.safetensors").unlink(), r"is incomplete: model\.safetensors is missing"),
        (lambda f: (f / "config.json").unlink(), r"is incomplete: config\.json is missing"),
        (lambda f: halve(f / "model.safetensors"), r"model\.safetensors is damaged: its SHA-256 is"),
        (lambda f: (f / "config.json").write_text("{}"), r"config\.json is damaged: its SHA-256 is"),
    ],
)
def test_damaged_folders(damage, message, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "slim")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def resign(folder, tensors):
    from tritprune.export.saved_model import sha256_of

    save_file(tensors, folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    edit_manifest(folder, files={**manifest["files"], "model.safetensors": sha256_of(folder / "model.safetensors")})


def test_missing_and_unknown_tensors_are_named(tmp_path):
    folder = save_model(Net(), tmp_path / "net", builder=NET)
    tensors = load_file(folder / "model.safetensors")
    tensors["stranger"] = tensors.pop("scale").clone()
    resign(folder, tensors)
    with pytest.raises(CheckpointError, match="do not fit the model: no tensor 'scale'; unknown tensor 'stranger'"):
        load_model(folder)


def test_attributes_are_counts_only(tmp_path):
    folder = save_model(Net(), tmp_path / "net", builder=NET)
    edit_manifest(folder, widths={"linears": {}, "attributes": {"": {"forward": 1}}})
    with pytest.raises(CheckpointError, match=r"sets '\.forward' to 1, which is not a count"):
        load_model(folder)


def test_saved_model_is_not_the_live_one(tmp_path):
    model = Net()
    before = copy.deepcopy(model)
    folder = save_model(model, tmp_path / "net", builder=NET)
    with torch.no_grad():
        model.up.weight.zero_()
    assert_same_state(load_model(folder), before)


MY_NETS = """
from torch import nn

class Mine(nn.Sequential):
    def __init__(self, width=6):
        super().__init__(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(MY_NETS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    model = importlib.import_module("my_nets").Mine(width=8)
    kill(model[0], [1, 2])
    with torch.no_grad():
        model[0].bias[1:3] = 1.0
    return model.eval()


def test_a_class_of_ones_own_loads_when_its_module_is_named(mine, tmp_path):
    result = slim_model(mine, torch.rand(2, 3))
    folder = tritprune.save(result, tmp_path / "slim", arguments={"width": 8})
    assert tritprune.loads_with(folder) == (
        "from_pretrained: no, because it is no transformers model; tritprune.load loads it"
    )
    with pytest.raises(CheckpointError, match=r"code is imported only when you ask for it: .*plugins=\['my_nets'\]"):
        tritprune.load(folder)
    loaded = tritprune.load(folder, plugins=["my_nets"])
    assert (type(loaded), loaded[0].out_features) == (type(mine), 6)
    assert_same_state(loaded, result.model)
    built = tritprune.load(folder, build=lambda width: nn.Sequential(*type(mine)(width)))
    assert type(built) is nn.Sequential
    assert_same_state(built, result.model)


def test_a_class_of_ones_own_loads_after_it_was_slimmed_twice(mine, tmp_path):
    arguments = {"width": 8}
    first = slim_model(mine, torch.rand(2, 3))
    loaded = tritprune.load(tritprune.save(first, tmp_path / "first", arguments=arguments), plugins=["my_nets"])
    unchanged = slim_model(loaded, torch.rand(2, 3))
    kill(loaded[0], [0])
    twice = slim_model(loaded, torch.rand(2, 3))
    assert (unchanged.widths["layers"], twice.model[0].out_features) == ({}, 5)
    for number, saved in enumerate((unchanged, twice, twice.model)):
        folder = tritprune.save(saved, tmp_path / str(number), arguments=arguments)
        assert_same_state(tritprune.load(folder, plugins=["my_nets"]), getattr(saved, "model", saved))


def test_what_the_manifest_names_is_not_imported(mine, tmp_path, monkeypatch):
    folder = tritprune.save(mine, tmp_path / "net", arguments={"width": 8})
    edit_manifest(folder, builder={"kind": "class", "class": "evil.Net"})
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    for plugins in ([], ["my_nets"]):
        with pytest.raises(CheckpointError, match=r"is a evil\.Net; code is imported only when you ask for it"):
            tritprune.load(folder, plugins=plugins)
    assert "evil" not in sys.modules
    edit_manifest(folder, builder={"kind": "class", "class": "my_nets.Other"})
    with pytest.raises(CheckpointError, match="'my_nets' has no such class"):
        tritprune.load(folder, plugins=["my_nets"])
    with pytest.raises(ConfigError, match="plugins: cannot import 'not_there'"):
        tritprune.load(folder, plugins=["not_there"])


def test_saving_finds_the_builder_itself(tmp_path):
    from tritprune.export import builder_of

    assert builder_of(bert()) == BERT
    assert builder_of(Net(), {"width": 6}) == NET

    class Local(nn.Linear):
        pass

    with pytest.raises(ConfigError, match="cannot be imported again"):
        tritprune.save(Local(2, 2), tmp_path / "net")
    with pytest.raises(ConfigError, match="uniform is for models of transformers; Net has no configuration"):
        tritprune.save(Net(), tmp_path / "net", uniform=True)
    assert list(tmp_path.iterdir()) == []


def test_uniform_widths_load_with_from_pretrained_and_hold_the_certificate(tmp_path):
    model = bert()
    kill(model.bert.encoder.layer[0].intermediate.dense, slice(0, 10))
    kill(model.bert.encoder.layer[1].intermediate.dense, slice(0, 4))
    result = slim_model(model, TOKENS)
    result.certificate.save(tmp_path)
    folder = tritprune.save(result, tmp_path / "slim", uniform=True)
    assert tritprune.loads_with(folder) == "from_pretrained: yes, BertConfig says all of its widths"
    plain = type(model).from_pretrained(folder)
    assert plain.bert.encoder.layer[0].intermediate.dense.out_features == 36
    assert check_saved(plain, tmp_path)
    assert check_saved(tritprune.load(folder), tmp_path)
