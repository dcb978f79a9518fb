"""A run that is stopped or killed goes on bit for bit."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tritprune.errors import CheckpointError, InterruptedRunError

sys.path.insert(0, str(Path(__file__).parent))
from runs import make_driver, make_run, settings
from toy import ToyTask


def finish(folder, cache, stop_after=None, **changes):
    """Run to the end, being stopped once after ``stop_after`` calls of the stop check."""
    calls = itertools.count(1)
    stop = (lambda: "SIGTERM" if next(calls) == stop_after else None) if stop_after else None
    task = ToyTask(dropout=0.3)
    options = settings(**changes)
    if stop_after:
        with pytest.raises(InterruptedRunError, match="resume=auto"):
            make_driver(make_run(folder, task, options, stop=stop), cache).execute()
    return make_driver(make_run(folder, task, options), cache).execute()


def outcome(folder):
    masks = load_file(folder / "masks.safetensors")
    weights = load_file(folder / "pruned" / "model.safetensors")
    curves = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    numbers = [{k: v for k, v in record.items() if not k.startswith("time/")} for record in curves]
    return masks, weights, numbers


@pytest.mark.parametrize(
    "stop_after", [1, 3, 8, 11, 18, 22]
)  # before, in the dense phase, between, pruning, recovering
def test_a_stopped_run_ends_with_the_same_masks_weights_and_curves(tmp_path, stop_after):
    finish(tmp_path / "whole", tmp_path / "cache-a")
    finish(tmp_path / "stopped", tmp_path / "cache-b", stop_after=stop_after)
    whole, stopped = outcome(tmp_path / "whole"), outcome(tmp_path / "stopped")
    for mine, theirs in zip(whole[:2], stopped[:2], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert whole[2] == stopped[2]


def test_the_comparison_can_fail(tmp_path):
    finish(tmp_path / "a", tmp_path / "cache")
    task = ToyTask(dropout=0.3)
    make_driver(make_run(tmp_path / "b", task, settings(), seed=1), tmp_path / "cache").execute()
    assert not torch.equal(outcome(tmp_path / "a")[1]["first.weight"], outcome(tmp_path / "b")[1]["first.weight"])


def test_a_run_killed_between_checkpoints_goes_on_from_the_last_one(tmp_path):
    """As after kill -9: nothing is saved at the moment of death, lines of the curves are past the checkpoint."""
    finish(tmp_path / "whole", tmp_path / "cache")
    task = ToyTask(dropout=0.3)

    class Killed(BaseException):
        pass

    calls = itertools.count(1)

    def die():
        if next(calls) == 8:
            raise Killed

    with pytest.raises(Killed):
        make_driver(make_run(tmp_path / "killed", task, settings(), stop=die), tmp_path / "cache").execute()
    last = json.loads((tmp_path / "killed" / "curves.jsonl").read_text().splitlines()[-1])
    state = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert state["offset"] + state["step"] < last["step"]
    make_driver(make_run(tmp_path / "killed", task, settings()), tmp_path / "cache").execute()
    for mine, theirs in zip(outcome(tmp_path / "whole")[:2], outcome(tmp_path / "killed")[:2], strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_checkpoint_cut_in_half_stops_the_resume(tmp_path):
    task = ToyTask()
    calls = itertools.count(1)
    stop = lambda: "SIGTERM" if next(calls) == 9 else None  # noqa: E731
    with pytest.raises(InterruptedRunError):
        make_driver(make_run(tmp_path / "run", task, settings(), stop=stop), tmp_path / "cache").execute()
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged"):
        make_driver(make_run(tmp_path / "run", task, settings()), tmp_path / "cache").execute()


def test_the_dense_model_is_trained_once(tmp_path):
    first = finish(tmp_path / "a", tmp_path / "cache")
    second = finish(tmp_path / "b", tmp_path / "cache")
    assert (first["dense_cached"], second["dense_cached"]) == (False, True)
    assert first["rows"][0]["metrics"] == second["rows"][0]["metrics"]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    finish(tmp_path / "c", tmp_path / "cache", batch_size=16)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_accumulation_gives_the_same_masks_as_one_batch(tmp_path):
    """Micro-batches are not steps: the schedule and the masks are those of the whole batch."""
    for name, accumulate in (("one", 1), ("four", 4)):
        task = ToyTask(linear_loss=True)
        options = settings(accumulate=accumulate)
        make_driver(make_run(tmp_path / name, task, options), tmp_path / f"cache-{name}").execute()
    one, four = (load_file(tmp_path / name / "masks.safetensors") for name in ("one", "four"))
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_a_finished_run_leaves_no_checkpoint(tmp_path):
    result = finish(tmp_path / "run", tmp_path / "cache")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert result["status"] == "finished"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert [row["model"] for row in result["rows"]] == ["dense", "pruned"]


def test_the_random_control_has_the_same_budget(tmp_path):
    task = ToyTask()
    run = make_run(tmp_path / "run", task, settings())
    result = make_driver(run, tmp_path / "cache", control="random").execute()
    rows = {row["model"]: row for row in result["rows"]}
    assert rows["random control"]["sparsity"]["prunable"] == rows["pruned"]["sparsity"]["prunable"]
    assert rows["random control"]["metrics"] != rows["pruned"]["metrics"]
