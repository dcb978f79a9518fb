"""Write the parts of docs/ that come from the code: ``scripts/vocabulary``. A test fails while they are stale."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import tritprune
from tritprune.neural_compressor.keys import table
from tritprune.patterns import BlockPattern, NInMPattern
from tritprune.pruners import Pruner
from tritprune.pruners.spec_names import SpecNames
from tritprune.registry import Registry

DOCS = Path(__file__).parent
CONF = DOCS.parent / "conf"
BEGIN, END = "<!-- keys: written by docs/generate.py -->\n", "<!-- end of keys -->\n"
KINDS = {
    "criterion": "Criteria: the score of a weight",
    "pattern": "Patterns: what stays or goes together",
    "schedule": "Schedules: how sparsity grows",
    "pruner": "Pruners: when masks change",
    "regularizer": "Regularizers: what pulls units to zero before they go",
}
"""Kinds of registries in the order of the page; other kinds (tasks, trackers) are no pruning vocabulary."""

THEIRS = {
    "register_pattern, get_pattern(config, modules)": "patterns.get_pattern",
    "BasePattern": "patterns.Pattern",
    "PatternNxM": "patterns.BlockPattern",
    "PatternNInM": "patterns.NInMPattern",
    "PatternMHA": "patterns.HeadsPattern",
    "register_criterion, get_criterion": "criteria.get_criterion",
    "PruningCriterion": "criteria.Criterion",
    "MagnitudeCriterion": "criteria.Magnitude",
    "GradientCriterion": "criteria.Gradient",
    "SnipCriterion": "criteria.Snip",
    "SnipMomentumCriterion": "criteria.SnipMomentum",
    "BlockMaskCriterion, SnipMomentumBlockCriterion": "criterion snip_momentum_block",
    "RetrainFreeCriterion": "criterion retrain_free",
    "register_pruner, get_pruner(modules, config)": "pruners.get_pruner",
    "Pruner, BasicPruner": "pruners.Pruner",
    "MagnitudePruner": "pruners.MagnitudePruner",
    "SnipPruner": "pruners.SnipPruner",
    "SnipMomentumPruner": "pruners.SnipMomentumPruner",
    "BlockMaskPruner": "pruners.BlockMaskPruner",
    "PatternLockPruner": "pruner pattern_lock",
    "ProgressivePruner": "pruner progressive",
    "RetrainFreePruner": "pruner retrain_free",
    "MultiheadAttentionPruner": "pruners.HeadPruner",
    "WeightPruningConfig": "neural_compressor.WeightPruningConfig",
    "prepare_pruning": "neural_compressor.prepare_pruning",
    "get_sparsity_ratio": "pruners.sparsity_of",
    "parse_last_linear (the head)": "pruners.find_head",
    "IterativeScheduler": "schedules.Schedule",
    "GroupLasso": "regularizer group_lasso",
    "SparseGPTPruner": "pruner sparse_gpt",
    "model_slim": "slimming.slim_model",
}
"""Neural Compressor's name -> what does its work here: an object of ``tritprune``, or a kind and a registered name."""


def pages() -> dict[str, str]:
    """Every generated page by file name."""
    return {
        "neural_compressor.md": with_keys((DOCS / "neural_compressor.md").read_text(encoding="utf-8")),
        "vocabulary.md": vocabulary(),
    }


def with_keys(page: str) -> str:
    """docs/neural_compressor.md with the table of keys as the code has it now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, "docs/neural_compressor.md has lost the marks around its table"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def vocabulary() -> str:
    """docs/vocabulary.md: every registered name of the pruning parts."""
    lines = [
        "# Vocabulary",
        "",
        "Written by `scripts/vocabulary` from the registries; a test fails while it is stale. The formula is the first",
        "line of the class's docstring. Without a yaml a part is named by a shorthand or in a mapping.",
    ]
    for kind, title in KINDS.items():
        rows = [row for registry in registries() if registry.kind == kind for row in rows_of(registry)]
        if rows:
            lines += ["", f"## {title}", "", "| name | class | is | source | yaml |", "|---|---|---|---|---|", *rows]
    lines += ["", "## Neural Compressor's names", "", "| theirs | here |", "|---|---|"]
    lines += [f"| `{theirs}` | {counterpart(ours)} |" for theirs, ours in THEIRS.items()]
    lines += ["", "And a pruner's attributes and functions of these names:", "", "| theirs | is |", "|---|---|"]
    lines += [f"| `{name}` | {told} |" for name, told in attributes()]
    lines += ["", "A pattern does not hold its scope, floor and cap (their `is_global`, `min_sparsity_ratio_per_op`,"]
    lines += [
        "`max_sparsity_ratio_per_op`): each entry of `pruner.groups` has them as `scope`, `min_layer_sparsity` and"
    ]
    lines += ["`max_layer_sparsity`."]
    lines += ["", "Their config keys are in [neural_compressor.md](neural_compressor.md#every-key)."]
    return "\n".join(lines) + "\n"


def attributes() -> Iterator[tuple[str, str]]:
    """Every public attribute and function of a pruner that is there for Neural Compressor's users, and what it is."""
    for name in ("masks", "scores"):
        yield name, first_line(getattr(Pruner, name))
    for name, value in vars(SpecNames).items():
        if not name.startswith("_") and (isinstance(value, property) or inspect.isfunction(value)):
            yield name, first_line(value)
    yield "block_size (of PatternNxM)", first_line(BlockPattern.block_size)
    yield "N (of PatternNInM)", first_line(NInMPattern.N)
    yield "M (of PatternNInM)", first_line(NInMPattern.M)


def registries() -> Iterator[Registry[Any]]:
    """Every registry of the pruning parts, found where it is defined."""
    seen: set[int] = set()
    for package in ("criteria", "patterns", "schedules", "pruners", "neural_compressor"):
        root = importlib.import_module(f"tritprune.{package}")
        below = pkgutil.iter_modules(getattr(root, "__path__", []), f"tritprune.{package}.")
        for module in (root, *(importlib.import_module(found.name) for found in below)):
            for value in vars(module).values():
                if isinstance(value, Registry) and id(value) not in seen:
                    seen.add(id(value))
                    yield value


def rows_of(registry: Registry[Any]) -> list[str]:
    """One row a name, those of tritprune itself."""
    rows = []
    for name in registry:
        entry = registry.get(name)
        if not entry.__module__.startswith("tritprune."):
            continue
        files = ", ".join(f"[{path.stem}](../{path.relative_to(DOCS.parent)})" for path in yamls(registry.kind, name))
        rows.append(f"| `{name}` | {linked(entry)} | {first_line(entry)} | {papers(entry)} | {files} |")
    return rows


def yamls(kind: str, name: str) -> list[Path]:
    """The files of a config group that name this entry."""
    return [p for p in sorted((CONF / kind).glob("*.yaml")) if yaml.safe_load(p.read_text("utf-8")).get("name") == name]


def first_line(entry: Any) -> str:
    """The first line of a docstring, fit for a table."""
    line = (inspect.getdoc(entry) or "").partition("\n")[0]
    line = re.sub(r":\w+:`~?([^`]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", line)
    return line.replace("``", "`").replace("|", "\\|")


def papers(entry: Any) -> str:
    """The papers that an entry's docstring cites."""
    found = dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", inspect.getdoc(entry) or ""))
    return ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in found)


def linked(entry: Any) -> str:
    """An object's name with a link to its file."""
    path = Path(inspect.getfile(entry)).relative_to(Path(tritprune.__file__).parent.parent)
    return f"[{entry.__name__}](../{path})"


def counterpart(ours: str) -> str:
    """The link for ``pruners.Pruner``, or for ``criterion snip``; a name that is not registered yet says so."""
    kind, _, registered = ours.partition(" ")
    if registered:
        entries = [
            registry.get(registered) for registry in registries() if registry.kind == kind and registered in registry
        ]
        return linked(entries[0]) if entries else f"{kind} `{registered}` is not here yet"
    module, _, name = ours.rpartition(".")
    return linked(getattr(importlib.import_module(f"tritprune.{module}"), name))


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
