"""How compiled work is shared out: pieces that fit the cache, and a pool of as many threads as torch uses.

The compiled loops release the interpreter lock.
"""

# pyright: basic

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 18
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


def pieces(rows: int, elements_per_row: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about ``PIECE`` elements."""
    step = max(1, PIECE // max(1, elements_per_row))
    return ((first, min(first + step, rows)) for first in range(0, rows, step)) if elements_per_row else iter(())


def runs(length: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``PIECE`` positions."""
    return ((first, min(first + PIECE, length)) for first in range(0, length, PIECE))


def plain(tensor: Tensor) -> np.ndarray:
    """A contiguous array: fp32 as it is, bf16 as its bits in int16, fp16 as fp32."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    return tensor.float().numpy()


def bits_of(score: Tensor) -> np.ndarray:
    """Contiguous scores in their own memory: fp32, or bf16 as int16."""
    return (score.view(torch.int16) if score.dtype == torch.bfloat16 else score).numpy()
