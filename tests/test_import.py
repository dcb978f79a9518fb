import json
import subprocess
import sys

HEAVY = (
    "triton",
    "wandb",
    "hydra",
    "omegaconf",
    "transformers",
    "accelerate",
    "matplotlib",
    "rich",
    "datasets",
    "lightning",
    "pytorch_lightning",
)


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nimport json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_importing_tritprune_loads_nothing_heavy():
    extra = loaded_by("import tritprune") - loaded_by("import torch")
    assert not extra.intersection(HEAVY)


def test_the_library_api_loads_no_plumbing():
    extra = loaded_by("import tritprune; tritprune.Pruner; tritprune.slim") - loaded_by("import torch")
    assert not extra.intersection(HEAVY)


def test_integrations_load_nothing_before_they_are_used():
    extra = loaded_by("import tritprune.integrations") - loaded_by("import torch")
    assert not extra.intersection(HEAVY)


def test_the_check_itself_can_fail():
    assert "wandb" in loaded_by("import wandb")


def test_every_public_name_is_there():
    import tritprune

    for name in tritprune.__all__:
        assert getattr(tritprune, name) is not None
    assert set(dir(tritprune)) == set(tritprune.__all__)
