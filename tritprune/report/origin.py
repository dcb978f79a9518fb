"""The last part of the page: how to get the run again, and all that it came from."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tritprune.report.markup import Html, fold, join, pairs, tag
from tritprune.report.records import (
    Result,
    number,
    part,
)
from tritprune.report.words import (
    digits,
    duration,
)


def again(result: Result, run_folder: Path) -> Html:
    """Commands to run it again, go on and load the model; then versions, data, machine, code and config."""
    command = str(result.get("command") or "")
    stopped = result.get("status") != "finished" and command
    final = part(result, "artifacts", "tuned") or part(result, "artifacts", "slim")
    reload_ = reload_snippet(run_folder / str(final)) if final else ""
    blocks = [
        tag("div", tag("h3", "Run it again"), tag("pre", command), class_="block") if command else None,
        tag("div", tag("h3", "Go on"), tag("pre", resume_command(command)), class_="block") if stopped else None,
        tag("div", tag("h3", "Load the final model"), tag("pre", reload_), class_="block") if reload_ else None,
    ]
    config = part(result, "config")
    return join(
        (
            tag("h2", "The run"),
            tag("div", *blocks, class_="two") if any(blocks) else None,
            tag("div", _provenance(result), class_="block"),
            tag("div", fold("Composed config", tag("pre", "\n".join(as_yaml(config)))), class_="block")
            if config
            else None,
        )
    )


def resume_command(command: str) -> str:
    """The command that goes on where this one stopped."""
    return command if "resume=" in command else f"{command} resume=auto"


def reload_snippet(folder: Path) -> str:
    """Python that loads a saved model."""
    return f'import tritprune\n\nmodel = tritprune.load("{short_path(folder)}")'


def short_path(path: Path) -> str:
    """A path as one would type it here: relative where it lies below the working folder."""
    whole, here = path.resolve(), Path.cwd()
    return whole.relative_to(here).as_posix() if whole.is_relative_to(here) else whole.as_posix()


def _provenance(result: Result) -> Html:
    data = part(result, "data")
    machine = part(result, "machine")
    git = part(result, "git")
    split = [
        f"{digits(part(data, key))} {word}"
        for key, word in (("n_train", "to train"), ("n_eval", "held out"))
        if part(data, key)
    ]
    hardware = [part(machine, "cpu"), part(machine, "gpu")]
    if cores := part(machine, "cores"):
        threads = part(machine, "threads") or cores
        hardware.append(f"{cores} core{'s' * (cores != 1)}, {threads} thread{'s' * (threads != 1)}")
    seconds = part(result, "seconds")
    stages = {stage: number(time) for stage, time in seconds.items()} if isinstance(seconds, Mapping) else {}
    timing = ", ".join(f"{stage} {duration(time)}" for stage, time in stages.items() if time is not None)
    cached = " (dense model from the cache)" if result.get("dense_cached") else ""
    artifacts = part(result, "artifacts")
    links = [
        tag("a", name, href=str(path))
        for name, path in (artifacts.items() if isinstance(artifacts, Mapping) else ())
        if name != "report" and _is_link(str(path or ""))
    ]
    versions = part(result, "versions")
    return pairs(
        {
            "Seed": result.get("seed"),
            "Data": " · ".join(filter(None, [str(part(data, "description") or ""), *split])),
            "Data hash": tag("code", part(data, "hash")) if part(data, "hash") else None,
            "Code": join((tag("code", part(git, "commit")), ", with uncommitted changes" if part(git, "dirty") else ""))
            if part(git, "commit")
            else None,
            "Versions": " · ".join(f"{name} {version}" for name, version in versions.items())
            if isinstance(versions, Mapping)
            else None,
            "Machine": " · ".join(str(word) for word in hardware if word),
            "Time": f"{timing}{cached}" if timing else None,
            "Started": moment(result.get("started")),
            "Finished": moment(result.get("finished")),
            "Files": join((links[0], *(part_ for link in links[1:] for part_ in (" · ", link)))) if links else None,
        }
    )


def _is_link(path: str) -> bool:
    """A path beside the report, or an address of the web; nothing that a browser would run."""
    return path.startswith(("http://", "https://")) or (path != "" and ":" not in path.split("/")[0])


def as_yaml(value: Any, indent: int = 0) -> list[str]:
    """Plain data as the lines that one would write in a config file."""
    lead = "  " * indent
    if isinstance(value, Mapping) and value:
        lines = []
        for key, inner in value.items():
            nested = isinstance(inner, Mapping | list | tuple) and inner
            lines += [f"{lead}{key}:", *as_yaml(inner, indent + 1)] if nested else [f"{lead}{key}: {_scalar(inner)}"]
        return lines
    if isinstance(value, list | tuple) and value:
        lines = []
        for inner in value:
            first, *rest = as_yaml(inner, indent + 1)
            lines += [f"{lead}- {first.lstrip()}", *rest]
        return lines
    return [f"{lead}{_scalar(value)}"]


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        plain = value and value.strip() == value and not set(value) & set(":#{}[]&*!|>'\"%@`,\n")
        return value if plain and value.lower() not in ("null", "true", "false") else repr(value)
    return "{}" if isinstance(value, Mapping) else str(value) if not isinstance(value, tuple) else "[]"


def total_seconds(result: Result) -> float | None:
    """All stages together, in seconds."""
    seconds = part(result, "seconds")
    found = [number(value) for value in seconds.values()] if isinstance(seconds, Mapping) else []
    return sum(value for value in found if value is not None) or None


def moment(value: Any) -> str | None:
    """An ISO time as a reader would write it; anything else as it is."""
    if not value:
        return None
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value)
    zone = "" if moment.tzinfo is None else f" {moment.tzname()}"
    return f"{moment.day} {moment:%B %Y, %H:%M}{zone}"
