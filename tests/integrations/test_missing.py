"""What is said where a package is not installed."""

import sys

import pytest

from tritprune import integrations
from tritprune.errors import MissingPackageError


@pytest.fixture
def without(monkeypatch):
    """``without("package", ...)``: as if they were not installed, and nothing of ours that needs them was imported."""

    def hide(*packages):
        for name in list(sys.modules):
            if name.partition(".")[0] in packages or name.startswith("tritprune.integrations."):
                monkeypatch.delitem(sys.modules, name)
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)
        for name in integrations.__all__:
            monkeypatch.delitem(vars(integrations), name, raising=False)

    return hide


def test_each_names_what_to_install(without):
    without("transformers", "lightning", "pytorch_lightning")
    with pytest.raises(MissingPackageError, match=r"TransformersPruning needs .* transformers.*'tritprune\[hf\]'"):
        _ = integrations.TransformersPruning
    with pytest.raises(MissingPackageError, match=r"LightningPruning needs .* lightning.*'tritprune\[lightning\]'"):
        _ = integrations.LightningPruning


def test_an_unknown_name_shows_the_known_ones():
    with pytest.raises(AttributeError, match="names: LightningPruning, TransformersPruning"):
        _ = integrations.KerasPruning
    assert dir(integrations) == ["LightningPruning", "TransformersPruning"]
