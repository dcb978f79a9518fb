import pytest
import torch

from tritprune.errors import ConfigError, MissingPackageError
from tritprune.registry import models
from tritprune.tasks import Digits, DigitsViT, get_task
from tritprune.tasks import digits as module


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_data(digits: Digits) -> None:
    assert digits.n_train + digits.n_eval == 1797
    assert digits.n_eval == 359
    assert digits.labels == tuple("0123456789")
    assert digits.train["pixels"].shape == (1438, 8, 8)
    assert digits.train["pixels"].dtype == torch.float32
    assert (digits.train["pixels"].min(), digits.train["pixels"].max()) == (0, 1)
    rows = torch.cat([digits.train["pixels"], digits.eval["pixels"]]).flatten(1)
    assert len(rows.unique(dim=0)) == 1797
    again = get_task("digits")
    assert again.data_hash == digits.data_hash
    assert torch.equal(again.train["pixels"], digits.train["pixels"])


def test_reaches_its_accuracy(digits: Digits) -> None:
    model = digits.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    batches = [b for epoch in range(10) for b in shuffled(digits.n_train, epoch).split(32) if len(b) == 32]
    warm_up = len(batches) // 10
    for step, indices in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min((step + 1) / warm_up, (len(batches) - step) / (len(batches) - warm_up))
        batch = digits.collate("train", indices)
        digits.loss(digits.logits(model(**digits.model_inputs(batch))), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert digits.evaluate(model)["accuracy"] > 0.93


def shuffled(size: int, seed: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def test_model_is_deterministic_and_builds_again(digits: Digits) -> None:
    first, again, other = (digits.build_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["blocks.0.mlp.up.weight"], other["blocks.0.mlp.up.weight"])
    builder = digits.builder()
    assert (builder["kind"], builder["name"]) == ("registered", "digits_vit")
    rebuilt = models.build({"name": builder["name"], **builder["arguments"]})
    assert {key: value.shape for key, value in rebuilt.state_dict().items()} == {
        key: value.shape for key, value in first.items()
    }
    assert Digits(width=32).model_hash != digits.model_hash


def test_names_that_recipes_look_for() -> None:
    names = {name for name, part in DigitsViT().named_modules() if isinstance(part, torch.nn.Linear)}
    for block in ("blocks.0", "blocks.1"):
        assert {f"{block}.attention.{part}" for part in ("query", "key", "value", "output")} <= names
        assert {f"{block}.mlp.up", f"{block}.mlp.down"} <= names
    assert "classifier" in names
    assert DigitsViT(heads=2).get_submodule("blocks.1.attention").num_heads == 2


def test_patches_are_the_squares_of_the_image() -> None:
    model = DigitsViT(width=4, heads=1, depth=1).eval()
    seen = []
    model.patches.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    image = torch.arange(64.0).view(1, 8, 8)
    model(image)
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 0].tolist() == [0, 1, 8, 9]
    assert seen[0][0, 1].tolist() == [2, 3, 10, 11]
    assert seen[0][0, 15].tolist() == [54, 55, 62, 63]


def test_a_head_can_be_cut() -> None:
    """A head whose output columns are zero goes without a change of the outputs."""
    torch.manual_seed(0)
    model = DigitsViT().eval()
    attention = model.get_submodule("blocks.0.attention")
    assert isinstance(attention, module.Attention)
    pixels = torch.rand(3, 8, 8)
    kept = torch.cat([torch.arange(0, 16), torch.arange(32, 64)])  # head 1 goes
    with torch.no_grad():
        attention.output.weight[:, 16:32] = 0
        expected = model(pixels)
        for part in (attention.query, attention.key, attention.value):
            part.weight, part.bias = torch.nn.Parameter(part.weight[kept]), torch.nn.Parameter(part.bias[kept])
        attention.output.weight = torch.nn.Parameter(attention.output.weight[:, kept])
        attention.num_heads = 3
        torch.testing.assert_close(model(pixels), expected)


def test_settings_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="width=30, depth=2, heads=4, hidden=128"):
        get_task({"name": "digits", "width": 30})
    with pytest.raises(ConfigError, match="depth=0"):
        Digits(depth=0)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(package: str, extra: str):
        raise MissingPackageError(f"{package} {extra}")

    monkeypatch.setattr(module, "require", absent)
    with pytest.raises(MissingPackageError, match=r"sklearn\.datasets demo"):
        Digits().prepare()
