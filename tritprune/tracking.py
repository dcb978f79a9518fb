"""Where a run's records go beside its own folder: to wandb, or nowhere.

A tracker only ever sees copies. ``curves.jsonl`` and ``result.json`` in the run folder are the records, so that a
tracker that fails costs nothing: :class:`WandbTracker` says once what went wrong, and the run goes on.
"""

import logging
import netrc
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from tritprune.errors import ConfigError
from tritprune.registry import Registry, did_you_mean

logger = logging.getLogger(__name__)

MODES = ("auto", "offline", "online", "disabled")
_PUBLIC_HOSTS = frozenset({"api.wandb.ai", "api.forge.coreweave.com"})
_SCALARS = (str, int, float, bool, type(None))


class Tracker(Protocol):
    """What the driver asks of a tracker, in this order: ``start``, any number of records, ``finish``.

    An own tracker may derive from this class and override what it needs: each method does nothing by itself.
    """

    location: str | None = None
    """Where to look: a URL, or a path relative to the run folder; None if there is nothing to look at."""

    def start(
        self,
        run_folder: str | os.PathLike[str],
        config: Mapping[str, Any],
        name: str,
        tags: Sequence[str] = (),
        git: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the record of one run, or go on with the one that this folder has begun."""
        return

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics at an optimizer step."""
        return

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Record a table."""
        return

    def image(self, name: str, path: str | os.PathLike[str]) -> None:
        """Record an image file."""
        return

    def artifact(self, name: str, kind: str, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Record files, and folders with all that is in them, as one artifact."""
        return

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the numbers that stand for the whole run."""
        return

    def finish(self, failed: bool = False) -> None:
        """Close the record; ``failed`` marks the run as one that died."""
        return


trackers: Registry[Tracker] = Registry("tracker")


def register_tracker(name: str) -> Callable[[Any], Any]:
    """Decorator that files a tracker class under ``name``, for ``tracker.name=...`` in the config.

    Raises:
        ConfigError: the name is taken by something else.
    """
    return trackers.register(name)


def get_tracker(config: str | Mapping[str, Any] | None) -> Tracker:
    """Make the tracker that ``config`` names: ``"wandb"``, ``{"name": "wandb", "mode": "online"}``, None for none.

    Raises:
        UnknownNameError: no such tracker; the message lists the known ones.
        ConfigError: a key or value that the tracker does not take.
    """
    return trackers.build("none" if config is None else config)


@register_tracker("none")
class NoTracker(Tracker):
    """Records nothing beyond the run folder."""


@register_tracker("wandb")
class WandbTracker(Tracker):
    """Weights & Biases, on this disk unless an account is at hand; it never stops a run and never prints.

    The wandb files lie in ``<run folder>/wandb``; ``wandb sync`` uploads an offline run later, ``wandb leet`` shows
    it in the terminal. The x axis of every chart is the optimizer step. A resumed run keeps its wandb id.

    Args:
        project: wandb project.
        entity: user or team; None is the account's default.
        mode: "auto" is online if wandb has credentials (``WANDB_API_KEY``, netrc, wandb's settings), else offline;
            "online" says so when it has none, and records offline; "offline"; "disabled". ``WANDB_MODE`` can only
            make it quieter: "offline" and "disabled" there win over this argument.
        group: name that runs of one study share.
        notes: free text beside the run.
        timeout: seconds to wait for the server at the start, before the run is recorded offline instead.
        upload_timeout: seconds to wait for uploads at the end; what is left stays on disk for ``wandb sync``.

    Raises:
        ConfigError: unknown mode, or a timeout that is not positive.
    """

    def __init__(
        self,
        project: str = "tritprune",
        entity: str | None = None,
        mode: str = "auto",
        group: str | None = None,
        notes: str | None = None,
        timeout: float = 20.0,
        upload_timeout: float = 120.0,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"tracker 'wandb' has no mode '{mode}'; {did_you_mean(str(mode), MODES)}")
        for key, seconds in (("timeout", timeout), ("upload_timeout", upload_timeout)):
            if not seconds > 0:
                raise ConfigError(f"tracker 'wandb': {key} must be more than 0 seconds, got {seconds}")
        self.project, self.entity, self.mode, self.group, self.notes = project, entity, mode, group, notes
        self.timeout, self.upload_timeout = timeout, upload_timeout
        self._wandb: Any = None
        self._run: Any = None
        self._folder = Path()
        self._step: int | None = None
        self._warned = self._lost = False

    def start(
        self,
        run_folder: str | os.PathLike[str],
        config: Mapping[str, Any],
        name: str,
        tags: Sequence[str] = (),
        git: Mapping[str, Any] | None = None,
    ) -> None:
        """Open a wandb run in ``<run_folder>/wandb``: online, else offline, else not at all; never an exception.

        Args:
            run_folder: the run's own folder.
            config: the composed config, nested.
            name: name of the run.
            tags: words to find it by.
            git: commit and state of the code, kept in the config under "git".
        """
        self._folder = Path(run_folder)
        self.location, self._run, self._warned, self._lost = None, None, False, False
        if "disabled" in (self.mode, _ambient_mode()):
            return
        record = {**config, "git": dict(git)} if git else dict(config)
        try:
            import wandb

            self._wandb = wandb
            mode = self._choose_mode()
            if mode == "online":
                self._run = self._open_online(record, name, tags)
            if mode != "disabled" and self._run is None:
                self._run = self._open("offline", record, name, tags, fresh_id=mode == "online")
        except Exception as error:
            self._give_up(error)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics at an optimizer step."""
        self._step = step
        self._try(lambda: self._run.log({"step": step, **metrics}))

    def table(self, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Record a table; cells that are no numbers or text are written as text."""

        def send() -> None:
            data = [[cell if isinstance(cell, _SCALARS) else str(cell) for cell in row] for row in rows]
            content = self._wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)
            self._run.log({**self._at(), name: content})

        self._try(send)

    def image(self, name: str, path: str | os.PathLike[str]) -> None:
        """Record an image file."""
        self._try(lambda: self._run.log({**self._at(), name: self._wandb.Image(os.fspath(path))}))

    def artifact(self, name: str, kind: str, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Record files, and folders with all that is in them, as one artifact; nothing is copied on this disk."""

        def send() -> None:
            artifact = self._wandb.Artifact(re.sub(r"[^\w.-]", "-", name)[:128], type=kind)
            for path in map(Path, paths):
                files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
                for file in files:
                    inside = file.relative_to(path.parent).as_posix()
                    artifact.add_file(str(file), name=inside, policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact)

        self._try(send)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record the numbers that stand for the whole run."""
        self._try(lambda: self._run.summary.update(dict(values)))

    def finish(self, failed: bool = False) -> None:
        """Close the run; ``failed`` gives it exit code 1. A second call does nothing."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=1 if failed else 0)
        except Exception as error:
            self._warn(
                f"wandb did not finish ({_line(error)}); all records of the run are in {self._folder}, and "
                f"`wandb sync --include-online` uploads what is left in {self._folder / 'wandb'}"
            )

    def _choose_mode(self) -> str:
        ambient = _ambient_mode() or _normal_mode(self._settings().mode)
        if ambient == "disabled":
            return "disabled"
        if self.mode == "offline" or ambient == "offline":
            return "offline"
        if _has_credentials(self._settings()):
            return "online"
        if self.mode == "online":
            self._warn(
                "tracker.mode=online, but wandb has no credentials: run `wandb login` or set WANDB_API_KEY; this run "
                f"is recorded offline in {self._folder / 'wandb'}, and `wandb sync` uploads it later"
            )
        return "offline"

    def _settings(self) -> Any:
        with _at_home_in(self._folder):
            return self._wandb.setup(self._wandb.Settings(silent=True)).settings

    def _open_online(self, config: dict[str, Any], name: str, tags: Sequence[str]) -> Any:
        try:
            return self._open("online", config, name, tags)
        except Exception as error:
            self._warn(
                f"wandb is not reachable ({_line(error)}); this run is recorded offline in {self._folder / 'wandb'}: "
                "`wandb sync` uploads it later, tracker.mode=offline does not try"
            )
            return None

    def _open(
        self, mode: str, config: dict[str, Any], name: str, tags: Sequence[str], *, fresh_id: bool = False
    ) -> Any:
        run_id = self._run_id(fresh=fresh_id)
        wanted = {
            "mode": mode,
            "silent": True,
            "console": "off",
            "init_timeout": self.timeout,
            "finish_timeout": self.upload_timeout,
            "finish_timeout_raises": True,
            "reinit": "finish_previous",
        }
        settings = self._wandb.Settings(**{k: v for k, v in wanted.items() if k in self._wandb.Settings.model_fields})
        with _at_home_in(self._folder):
            run = self._wandb.init(
                project=self.project,
                entity=self.entity,
                group=self.group,
                notes=self.notes,
                dir=str(self._folder),
                id=run_id,
                resume="allow",
                name=name,
                tags=list(tags),
                config=config,
                settings=settings,
            )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        if mode == "online":
            self.location = run.url
        else:
            self.location = Path(run.dir).parent.resolve().relative_to(self._folder.resolve()).as_posix()
        return run

    def _run_id(self, *, fresh: bool) -> str:
        """The id that this folder's run has in wandb, so that a resumed run goes on; ``fresh`` makes a new one.

        A start that failed keeps its id in use in wandb's own process: the second attempt needs another.
        """
        file = self._folder / "wandb" / "run_id"
        run_id = "" if fresh or not file.is_file() else file.read_text().strip()
        if not run_id:
            run_id = secrets.token_hex(4)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(run_id + "\n")
        while any(file.parent.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-{run_id}")):
            time.sleep(0.05)  # wandb names its folder by the second: a second start in it would overwrite the first
        return run_id

    def _at(self) -> dict[str, int]:
        return {} if self._step is None else {"step": self._step}

    def _try(self, call: Callable[[], Any]) -> None:
        if self._run is None or self._lost:
            return
        try:
            with _at_home_in(self._folder):
                call()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._lost = True
        self._warn(
            f"wandb failed ({_line(error)}) and is left out from here on; the run goes on, and all of its records "
            f"are in {self._folder}. To run without it: tracker=none"
        )

    def _warn(self, message: str) -> None:
        if not self._warned:
            logger.warning(message)
        self._warned = True


@contextmanager
def _at_home_in(run_folder: Path) -> Iterator[None]:
    """Keep what wandb would write to the home folder, which may be read-only, in the run folder."""
    folder = os.fspath(run_folder.resolve())
    wanted = {"WANDB_DATA_DIR": f"{folder}/wandb", "WANDB_CACHE_DIR": folder}
    ours = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _ambient_mode() -> str:
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "disabled"
    return _normal_mode(os.environ.get("WANDB_MODE", ""))


def _normal_mode(mode: str) -> str:
    return {"dryrun": "offline", "run": "online"}.get(mode.lower(), mode.lower())


def _has_credentials(settings: Any) -> bool:
    """Whether wandb could log in without asking: environment, wandb's settings file, netrc."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    if any(getattr(settings, name, None) for name in ("api_key", "identity_token_file")):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.base_url).netloc
    hosts = _PUBLIC_HOSTS if host in _PUBLIC_HOSTS else {host}
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for file in (Path(name).expanduser() for name in files):
        try:
            known = netrc.netrc(file)
        except (OSError, netrc.NetrcParseError):
            continue
        if any(known.authenticators(name) for name in hosts):
            return True
    return False


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"
