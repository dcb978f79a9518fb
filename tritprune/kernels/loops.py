"""Loops for the CPU: compiled by numba, and run over pieces of the work on as many threads as torch uses."""

# pyright: basic

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch

_pools: dict[int, ThreadPoolExecutor] = {}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at the first call; keep the machine code on disk where there is a place for it."""
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither beside this file nor in the home folder can anything be written
        return numba.njit(nogil=True, error_model="numpy")(function)


def run(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Call ``function`` with every job, on as many threads as torch uses; the results in order."""
    jobs = list(jobs)
    threads = min(torch.get_num_threads(), len(jobs))
    if threads < 2:
        return [function(*job) for job in jobs]
    pool = _pools.get(threads)
    if pool is None:
        pool = _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="tritprune")
    return list(pool.map(lambda job: function(*job), jobs))


def _forget_threads() -> None:
    """Threads do not survive a fork."""
    _pools.clear()


os.register_at_fork(after_in_child=_forget_threads)
