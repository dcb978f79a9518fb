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
    pytest.importorskip("transformers")
    page = configurations.page()
    assert "| BERT | `intermediate_size` | cannot be said |" in page
    assert page == configurations.PAGE.read_text(encoding="utf-8"), "run scripts/architectures"
