"""Every yaml of the config tree is composed and built; every experiment's pruner fits its model."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tritprune.app.composition import PrunerMaker, inline_files
from tritprune.criteria import get_criterion
from tritprune.errors import ConfigError
from tritprune.patterns import get_pattern
from tritprune.pruners import pruners
from tritprune.schedules import get_schedule
from tritprune.tasks import get_task
from tritprune.tracking import get_tracker
from tritprune.training.settings import TrainingSettings

CONF = Path(__file__).parent.parent / "conf"
FILES = sorted(p.relative_to(CONF) for p in CONF.glob("*/*.yaml"))
GROUPS = {
    "criterion": get_criterion,
    "pattern": get_pattern,
    "schedule": get_schedule,
    "task": get_task,
    "tracker": get_tracker,
}


def composed(*overrides: str) -> dict:
    with initialize_config_dir(config_dir=str(CONF.resolve()), version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)  # type: ignore[return-value]


def test_the_tree_has_what_the_readme_names():
    assert len(FILES) > 25
    assert {p.parent.name for p in FILES} == {*GROUPS, "pruner", "slimmer", "experiment", "sweep"}


@pytest.mark.parametrize("file", [*FILES, Path("config.yaml")], ids=str)
def test_a_yaml_begins_with_its_command_and_comments_each_key(file):
    lines = (CONF / file).read_text().splitlines()
    if lines[0].startswith("# @package"):  # hydra reads its directive on the first line only
        lines = lines[1:]
    assert re.match(r"# python -m tritprune (-m )?(\S+=\S+ ?)+$", lines[0]), lines[0]
    group, name = file.parent.name, file.stem
    if group:
        assert re.search(rf"\b{group}={re.escape(name)}\b", lines[0])
    settings = [line for line in lines if re.match(r"\s*(- )?[A-Za-z_.]+: *[^ #]", line)]
    assert [line for line in settings if " # " not in line and "override /" not in line] == []


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name in GROUPS], ids=str)
def test_a_group_file_builds_its_object(file):
    values = composed(f"{file.parent.name}={file.stem}")[file.parent.name]
    assert GROUPS[file.parent.name](values) is not None


@pytest.mark.parametrize("name", [f.stem for f in FILES if f.parent.name == "experiment"])
def test_an_experiment_composes_and_its_pruner_fits_its_model(name):
    config = composed(f"experiment={name}")
    assert config["name"] == name
    settings = TrainingSettings.from_config(config["training"])
    task = get_task(config["task"])
    model = task.build_model(0)
    pruner = PrunerMaker(config, settings, task)(model)
    assert 0 < pruner.final_step <= settings.prune.steps
    assert pruner.layers


@pytest.mark.parametrize("name", [f.stem for f in FILES if f.parent.name == "pruner"])
def test_a_pruner_file_builds_on_the_smoke_model(name, tmp_path):
    assert name in pruners
    file = tmp_path / "nc.yaml"
    file.write_text("{target_sparsity: 0.5, start_step: 1, end_step: 5}")
    own = f"pruner.config={file}" if name == "neural_compressor" else "pruner.target_sparsity=0.5"
    locks = name == "pattern_lock"
    config = composed(*([] if locks else ["experiment=smoke"]), f"pruner={name}", *([] if locks else [own]))
    settings = TrainingSettings.from_config(config["training"])
    task = get_task(config["task"])
    if locks:
        with pytest.raises(ConfigError, match="nothing to lock"):
            PrunerMaker(config, settings, task)(task.build_model(0))
        return
    assert PrunerMaker(config, settings, task)(task.build_model(0)).final_step >= 1


def test_the_contents_of_a_neural_compressor_file_are_part_of_the_run(tmp_path):
    file = tmp_path / "nc.yaml"
    file.write_text("{pruners: [], end_step: 5}")
    config = composed("experiment=smoke", "pruner=neural_compressor", f"pruner.config={file}")
    with pytest.raises(ConfigError, match="write pruning_configs"):
        inline_files(config)
    file.write_text("{pruning_type: magnitude, end_step: 5}")
    inline_files(config)
    assert config["pruner"]["config"] == {"pruning_type": "magnitude", "end_step": 5, "pruning_configs": [{}]}
    file.unlink()
    maker = PrunerMaker(config, TrainingSettings.from_config(config["training"]), task := get_task(config["task"]))
    model = task.build_model(0)
    assert [maker(model, **more).groups[0].criterion for more in ({}, {"criterion": "random"})] == [
        "magnitude",
        "random",
    ]


def test_a_control_of_a_named_pruner_has_the_control_criterion():
    config = composed("experiment=smoke", "pruner=magnitude", "criterion=snip_momentum")
    maker = PrunerMaker(config, TrainingSettings.from_config(config["training"]), task := get_task(config["task"]))
    model = task.build_model(0)
    assert [maker(model, **more).groups[0].criterion for more in ({}, {"criterion": "random"})] == [
        "magnitude",
        "random",
    ]


@pytest.mark.parametrize("name", [f.stem for f in FILES if f.parent.name == "sweep"])
def test_a_sweep_names_keys_that_exist(name):
    with initialize_config_dir(config_dir=str(CONF.resolve()), version_base="1.3"):
        config = compose("config", overrides=["experiment=smoke", f"sweep={name}"], return_hydra_config=True)
        for key, values in config.hydra.sweeper.params.items():
            for value in str(values).split(","):
                assert compose("config", overrides=["experiment=smoke", f"{key}={value}"]) is not None
