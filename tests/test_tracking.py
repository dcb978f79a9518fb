"""Trackers: wandb on this disk, wandb that fails in every way, and nothing at all."""

import json
import logging
import os
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tritprune.errors import ConfigError, UnknownNameError
from tritprune.tracking import NoTracker, Tracker, WandbTracker, get_tracker, register_tracker, trackers

KEY = "0" * 40


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials but those that a test gives, and no wandb variables of the caller."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


class Messages(logging.Handler):
    """What the tracker said, in a list that grows."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


@pytest.fixture
def warnings_seen() -> Iterator[list[str]]:
    handler = Messages()
    logger = logging.getLogger("tritprune.tracking")
    logger.addHandler(handler)
    yield handler.seen
    logger.removeHandler(handler)


class FakeRun:
    """A wandb run that keeps what it is given, and raises in the calls that it is told to raise in."""

    def __init__(self, folder: Path, broken: set[str]) -> None:
        self.dir, self.url, self.broken = str(folder / "wandb" / "offline-run-x" / "files"), "https://x/run", broken
        self.logged: list[dict[str, Any]] = []
        self.artifacts: list[Any] = []
        self.metrics: list[tuple[str, dict[str, Any]]] = []
        self.exit_code: int | None = None
        self.tries: list[str] = []
        self.summary = types.SimpleNamespace(update=lambda values: self._call("summary"))

    def _call(self, name: str) -> None:
        self.tries.append(name)
        if name in self.broken:
            raise OSError(f"{name}: connection lost")

    def log(self, values: dict[str, Any]) -> None:
        self._call("log")
        self.logged.append(values)

    def define_metric(self, name: str, **options: Any) -> None:
        self._call("define_metric")
        self.metrics.append((name, options))

    def log_artifact(self, artifact: Any) -> None:
        self._call("log_artifact")
        self.artifacts.append(artifact)

    def finish(self, exit_code: int = 0) -> None:
        self._call("finish")
        self.exit_code = exit_code


class FakeWandb(types.ModuleType):
    """As much of wandb as the tracker touches."""

    class Settings:
        model_fields = dict.fromkeys(("mode", "silent", "console", "init_timeout", "reinit"))

        def __init__(self, **values: Any) -> None:
            self.values = values

    def __init__(self, folder: Path, broken: set[str]) -> None:
        super().__init__("wandb")
        self.run = FakeRun(folder, broken)
        self.modes: list[str] = []
        self.ids: list[str] = []
        self.broken = broken
        self.ambient = types.SimpleNamespace(mode="online", base_url="https://api.wandb.ai", api_key=None)

    def setup(self, settings: Any = None) -> Any:
        self.run._call("setup")
        return types.SimpleNamespace(settings=self.ambient)

    def init(self, *, settings: Any, id: str, **_: Any) -> FakeRun:  # noqa: A002
        self.modes.append(settings.values["mode"])
        self.ids.append(id)
        self.run._call("init")
        self.run._call(f"init {settings.values['mode']}")
        return self.run

    def Table(self, **content: Any) -> Any:  # noqa: N802
        self.run._call("Table")
        return content

    def Image(self, path: str) -> str:  # noqa: N802
        self.run._call("Image")
        return path

    def Artifact(self, name: str, type: str) -> Any:  # noqa: A002, N802
        self.run._call("Artifact")
        files: list[str] = []
        return types.SimpleNamespace(
            name=name, type=type, files=files, add_file=lambda path, name, **_: files.append(name)
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeWandb:
    wandb = FakeWandb(tmp_path, set())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def whole_run(tracker: Tracker, folder: Path, *, failed: bool = False) -> None:
    """Every call that the driver makes."""
    (folder / "heat.png").write_bytes(b"png")
    (folder / "slim").mkdir(exist_ok=True)
    (folder / "slim" / "model.safetensors").write_bytes(b"tensors")
    tracker.start(folder, {"seed": 0}, "run", ["tag"], {"commit": "abc", "dirty": False})
    tracker.log(1, {"loss/train": 1.0})
    tracker.table("layers", ["name", "shape"], [["encoder", [4, 4]]])
    tracker.image("heat map", folder / "heat.png")
    tracker.artifact("slim model", "model", [folder / "slim", folder / "heat.png"])
    tracker.summary({"accuracy": 0.7})
    tracker.finish(failed=failed)


def test_names_and_choices() -> None:
    assert trackers.names() == ("none", "wandb")
    assert isinstance(get_tracker("wandb"), WandbTracker)
    assert isinstance(get_tracker(None), NoTracker)
    assert isinstance(get_tracker({"name": "none"}), NoTracker)
    with pytest.raises(UnknownNameError, match="did you mean 'wandb'"):
        get_tracker("wandd")
    with pytest.raises(ConfigError, match="no key 'projekt'; did you mean 'project'"):
        get_tracker({"name": "wandb", "projekt": "x"})
    with pytest.raises(ConfigError, match="no mode 'offlin'; did you mean 'offline'"):
        get_tracker({"name": "wandb", "mode": "offlin"})
    with pytest.raises(ConfigError, match="timeout must be more than 0 seconds, got 0"):
        get_tracker({"name": "wandb", "timeout": 0})


def test_an_own_tracker_needs_only_what_it_uses(tmp_path: Path) -> None:
    seen: list[int] = []

    class Mine(Tracker):
        def log(self, step: int, metrics: Any) -> None:
            seen.append(step)

    register_tracker("mine")(Mine)
    try:
        whole_run(get_tracker("mine"), tmp_path)
    finally:
        trackers._entries.pop("mine")
    assert seen == [1]


def test_no_tracker_writes_nothing(tmp_path: Path) -> None:
    tracker = get_tracker("none")
    tracker.start(tmp_path / "run", {}, "run")
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert tracker.location is None
    assert list(tmp_path.iterdir()) == []


def test_all_calls_reach_wandb(fake: FakeWandb, tmp_path: Path) -> None:
    tracker = WandbTracker()
    whole_run(tracker, tmp_path, failed=True)
    assert fake.modes == ["offline"]
    assert tracker.location == "wandb/offline-run-x"
    assert fake.run.metrics == [("step", {"hidden": True}), ("*", {"step_metric": "step"})]
    assert fake.run.logged[0] == {"step": 1, "loss/train": 1.0}
    assert fake.run.logged[1]["layers"]["data"] == [["encoder", "[4, 4]"]]
    assert fake.run.logged[2] == {"step": 1, "heat map": str(tmp_path / "heat.png")}
    assert fake.run.artifacts[0].name == "slim-model"
    assert fake.run.artifacts[0].files == ["slim/model.safetensors", "heat.png"]
    assert fake.run.exit_code == 1
    tracker.finish()
    assert fake.run.exit_code == 1, "a second finish changed the first"


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        ("auto", {}, ["offline"]),
        ("auto", {"WANDB_API_KEY": KEY}, ["online"]),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, ["offline"]),
        ("auto", {"WANDB_MODE": "online"}, ["offline"]),
        ("online", {"WANDB_API_KEY": KEY}, ["online"]),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "dryrun"}, ["offline"]),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, ["offline"]),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, []),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_DISABLED": "true"}, []),
        ("disabled", {"WANDB_API_KEY": KEY}, []),
    ],
)
def test_mode(
    fake: FakeWandb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_seen: list[str],
    mode: str,
    environment: dict[str, str],
    expected: list[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracker = WandbTracker(mode=mode)
    whole_run(tracker, tmp_path)
    assert fake.modes == expected
    assert tracker.location == {"online": "https://x/run", "offline": "wandb/offline-run-x"}.get("".join(expected))
    assert warnings_seen == []


def test_logged_in_by_netrc_or_by_settings(fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    netrc.write_text(f"machine elsewhere.org\n  login user\n  password {KEY}\n")
    WandbTracker().start(tmp_path, {}, "run")
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    WandbTracker().start(tmp_path, {}, "run")
    netrc.write_text("machine without the rest")
    WandbTracker().start(tmp_path, {}, "run")
    fake.ambient.api_key = KEY
    WandbTracker().start(tmp_path, {}, "run")
    fake.ambient.mode = "offline"
    WandbTracker().start(tmp_path, {}, "run")
    assert fake.modes == ["offline", "online", "offline", "online", "offline"]


def test_online_without_credentials_says_so_and_records_offline(
    fake: FakeWandb, tmp_path: Path, warnings_seen: list[str]
) -> None:
    whole_run(WandbTracker(mode="online"), tmp_path)
    assert fake.modes == ["offline"]
    assert len(warnings_seen) == 1
    assert "wandb login" in warnings_seen[0]
    assert "WANDB_API_KEY" in warnings_seen[0]


def test_unreachable_server_falls_back_to_offline(
    fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_seen: list[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    fake.broken.add("init online")
    tracker = WandbTracker()
    whole_run(tracker, tmp_path)
    assert fake.modes == ["online", "offline"]
    assert fake.ids[0] != fake.ids[1], "wandb refuses an id that a failed start still holds"
    assert fake.run.logged[0] == {"step": 1, "loss/train": 1.0}
    assert len(warnings_seen) == 1
    assert "not reachable" in warnings_seen[0]
    assert "wandb sync" in warnings_seen[0]


CALLS = ("setup", "init", "define_metric", "log", "Table", "Image", "Artifact", "log_artifact", "summary", "finish")


@pytest.mark.parametrize("broken", [*([call] for call in CALLS), CALLS], ids=lambda broken: "+".join(broken)[:20])
def test_a_wandb_that_raises_never_stops_a_run(
    fake: FakeWandb, tmp_path: Path, warnings_seen: list[str], broken: list[str]
) -> None:
    fake.broken.update(broken)
    tracker = WandbTracker()
    whole_run(tracker, tmp_path)
    tracker.log(2, {"loss": 0.5})
    assert len(warnings_seen) == 1, warnings_seen
    assert str(tmp_path) in warnings_seen[0]
    first = next(call for call in CALLS if call in broken)
    if first in fake.run.tries:
        after = fake.run.tries[fake.run.tries.index(first) + 1 :]
        assert set(after) <= {"finish"}, "wandb was used on after it failed"


def test_a_wandb_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_seen: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    whole_run(WandbTracker(), tmp_path)
    assert len(warnings_seen) == 1
    assert "tracker=none" in warnings_seen[0]


def test_ctrl_c_passes_through(fake: FakeWandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = WandbTracker()
    tracker.start(tmp_path, {}, "run")

    def interrupt(values: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake.run, "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tracker.log(1, {})


def test_environment_is_left_as_it_was(fake: FakeWandb, tmp_path: Path) -> None:
    before = dict(os.environ)
    whole_run(WandbTracker(), tmp_path)
    assert dict(os.environ) == before


def records(file: Path) -> list[Any]:
    """The records of a .wandb file: a LevelDB log of protobuf messages in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, message, found = 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(message)
            found.append(record)
            message = b""
    return found


def test_an_offline_run_is_on_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str], png: bytes) -> None:
    """The real wandb: a run that died, resumed under the same id and finished; silent, and all in the run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "heat.png").write_bytes(png)
    (folder / "masks.safetensors").write_bytes(b"m" * 5000)
    tracker = WandbTracker(mode="offline")
    locations = []
    for failed in (True, False):
        tracker.start(folder, {"pruner": {"target_sparsity": 0.9}}, "bert_4x1", ["a"], {"commit": "abc", "dirty": True})
        for step in range(40):
            tracker.log(step, {"loss/train": 1 / (step + 1), "stage": "prune", "sparsity/encoder.0": 0.1})
        tracker.table("layers", ["name", "shape"], [["encoder.0", (4, 4)], ["encoder.1", None]])
        tracker.image("sparsity", folder / "heat.png")
        tracker.artifact("masks", "masks", [folder / "masks.safetensors"])
        tracker.summary({"accuracy": 0.697})
        tracker.finish(failed=failed)
        locations.append(tracker.location)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert locations[0] != locations[1]
    ids = set()
    for location, exit_code in zip(locations, (1, 0), strict=True):
        assert location is not None
        assert location.startswith("wandb/offline-run-")
        (file,) = (folder / location).glob("run-*.wandb")
        ids.add(file.stem)
        found = records(file)
        kinds = [record.WhichOneof("record_type") for record in found]
        assert kinds.count("history") == 42
        assert kinds.count("artifact") == 2  # the masks, and the table that wandb stores as one
        (run,) = (record.run for record in found if record.WhichOneof("record_type") == "run")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["git"] == {"commit": "abc", "dirty": True}
        assert config["pruner"] == {"target_sparsity": 0.9}
        metrics = [record.metric for record in found if record.WhichOneof("record_type") == "metric"]
        assert [(metric.glob_name, metric.step_metric) for metric in metrics] == [("", ""), ("*", "step")]
        (end,) = (record.exit for record in found if record.WhichOneof("record_type") == "exit")
        assert end.exit_code == exit_code
    assert len(ids) == 1, "a resumed run is the same run"


@pytest.fixture
def png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.slow
def test_a_process_that_dies_marks_the_run_failed_and_an_unreachable_server_costs_only_the_timeout(
    tmp_path: Path,
) -> None:
    """The real wandb in a process of its own: nobody listens at the server's address, then the process dies."""
    program = (
        "from tritprune.tracking import WandbTracker\n"
        f"tracker = WandbTracker(timeout=2); tracker.start({str(tmp_path)!r}, {{}}, 'run')\n"
        "tracker.log(1, {'loss': 1.0}); print(tracker.location); raise RuntimeError('died')\n"
    )
    nobody = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **nobody}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "RuntimeError: died" in done.stderr
    assert done.stderr.count("wandb is not reachable") == 1
    assert done.stderr.splitlines()[1].startswith("Traceback"), "wandb printed something"
    (file,) = (tmp_path / done.stdout.strip()).glob("run-*.wandb")
    assert [record.exit.exit_code for record in records(file) if record.WhichOneof("record_type") == "exit"] == [1]


def test_tracking_imports_no_wandb() -> None:
    program = "import sys, tritprune.tracking; sys.exit('wandb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
