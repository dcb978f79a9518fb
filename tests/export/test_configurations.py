"""docs/from_pretrained.md says what the installed library does."""

import importlib.util
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("configurations.py")
spec = importlib.util.spec_from_file_location("configurations", SOURCE)
configurations = importlib.util.module_from_spec(spec)
sys.modules["configurations"] = configurations
spec.loader.exec_module(configurations)


def test_the_page_is_current():
    transformers = pytest.importorskip("transformers")
    written = configurations.PAGE.read_text(encoding="utf-8")
    assert written.startswith(configurations.HEAD.format(version=transformers.__version__)), "run scripts/architectures"
    lines = written.splitlines()
    known = {architecture[0]: architecture for architecture in configurations.architectures()}
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[-len(known) :]] == list(known)
    for name in (
        "BERT",
        "Qwen2",
        "Falcon, one key head",
        "Swin",
        *configurations.EACH_LAYER,
    ):  # building all takes long
        assert f"| {' | '.join(configurations.row(*known[name]))} |" in lines, "run scripts/architectures"
