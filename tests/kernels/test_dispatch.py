import inspect
import logging
import os
import subprocess
import sys

import pytest
import torch

from tritprune import kernels
from tritprune.errors import BackendError, ConfigError
from tritprune.kernels import compiled, dispatch, reference
from tritprune.kernels import triton as launchers

OPS = sorted(name for name, value in vars(kernels).items() if isinstance(value, kernels.Op))


def test_every_operation_is_exported_with_a_reference_and_a_launcher():
    assert len(OPS) == 13
    assert set(OPS) <= set(kernels.__all__)
    assert set(OPS) == set(launchers.__all__) - {"INTERPRETED"}


@pytest.mark.parametrize("op", OPS)
def test_signatures_are_the_same_everywhere(op):
    wanted = inspect.signature(getattr(reference, op))
    assert inspect.signature(getattr(compiled, op)) == wanted
    assert inspect.signature(getattr(launchers, op)) == wanted
    assert inspect.signature(getattr(kernels, op)) == wanted
    check = inspect.signature(getattr(kernels, op).check)
    assert check.parameters == wanted.parameters


@pytest.mark.parametrize(("installed", "backend"), [(True, "numba"), (False, "torch")])
def test_automatic_dispatch_on_the_cpu_is_numba_where_it_is_installed(caplog, monkeypatch, installed, backend):
    monkeypatch.setattr(dispatch, "_has_numba", lambda: installed)
    with caplog.at_level(logging.DEBUG, dispatch.__name__):
        kernels.mask_statistics([], [])
    assert caplog.messages == [f"mask_statistics runs on backend {backend} for device cpu"]


def test_a_forced_numba_backend_says_what_would_work(monkeypatch):
    elsewhere = [torch.ones(2, 2, dtype=torch.bool, device="meta")]
    with (
        kernels.use_backend("numba"),
        pytest.raises(BackendError, match=r"'numba' cannot run on device 'meta'.*'auto'"),
    ):
        kernels.mask_statistics(elsewhere, elsewhere)
    monkeypatch.setattr(dispatch, "_has_numba", lambda: False)
    with kernels.use_backend("numba"), pytest.raises(BackendError, match=r"pip install 'tritprune\[cpu\]'"):
        kernels.kth_score([], [], 0)


def test_a_forced_triton_backend_on_the_cpu_is_an_error_that_says_what_would_work():
    mask = [torch.ones(2, 2, dtype=torch.bool)]
    with kernels.use_backend("triton"), pytest.raises(BackendError) as caught:
        kernels.mask_statistics(mask, mask)
    message = str(caught.value)
    for part in ("mask_statistics", "'triton'", "'cpu'", "'torch' or 'auto'", "CUDA or HIP", "TRITON_INTERPRET=1"):
        assert part in message


def test_the_backend_comes_back_after_the_block():
    assert kernels.get_backend() == "auto"
    with kernels.use_backend("torch"):
        assert kernels.get_backend() == "torch"
        with pytest.raises(KeyError), kernels.use_backend("triton"):
            raise KeyError
        assert kernels.get_backend() == "torch"
    kernels.set_backend("auto")


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(
        ConfigError, match=r"unknown kernel backend 'tritn'; did you mean 'triton'\? known: auto, numba, torch"
    ):
        kernels.set_backend("tritn")
    assert kernels.get_backend() == "auto"


def test_a_missing_triton_is_an_error_that_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(dispatch, "import_module", missing)
    with kernels.use_backend("triton"), pytest.raises(BackendError, match=r"kth_score: .* pip install triton"):
        kernels.kth_score([], [], 0)


def test_a_bug_in_the_launchers_is_not_taken_for_a_missing_triton(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'tritprune.kernels.oops'", name="tritprune.kernels.oops")

    monkeypatch.setattr(dispatch, "import_module", broken)
    with kernels.use_backend("triton"), pytest.raises(ModuleNotFoundError, match="oops"):
        kernels.kth_score([], [], 0)


def test_tensors_on_two_devices_are_refused():
    masks = [torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool, device="meta")]
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        kernels.mask_statistics(masks, masks)


def run_python(code, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


def test_triton_is_imported_on_first_need_only():
    code = (
        "import sys, torch; from tritprune import kernels\n"
        "mask = [torch.ones(2, 2, dtype=torch.bool)]\n"
        "kernels.mask_statistics(mask, mask)\n"
        "assert 'tritprune.kernels.triton' not in sys.modules\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_interpreter_runs_cpu_tensors_through_the_dispatcher():
    code = (
        "import torch; from tritprune import kernels\n"
        "mask = [torch.ones(2, 2, dtype=torch.bool)]\n"
        "with kernels.use_backend('triton'):\n"
        "    assert kernels.mask_statistics(mask, mask).tolist() == [[4, 0]]\n"
    )
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
