"""What a call does besides computing: operations whose result the host reads, kernels launched, bytes held at once."""

from contextlib import contextmanager

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritprune.kernels import dispatch
from tritprune.kernels.triton import multi_tensor

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
"""Operations whose result, or whose result's size, the host must know."""


class Reads(TorchDispatchMode):
    """Names of the operations that read, and how many were dispatched."""

    def __init__(self):
        super().__init__()
        self.found, self.dispatched = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.dispatched += 1
        name = func.name().partition("::")[2].partition(".")[0]
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name.startswith(READS) or by_mask or unsized:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch):
    """The launchers' own work, with kernels that do nothing."""
    launches = []
    with monkeypatch.context() as patch:
        patch.setattr(multi_tensor, "launch", lambda kernel, *_, **__: launches.append(kernel))
        patch.setattr(dispatch, "_choose", lambda op, device: "triton")
        with Reads() as reads:
            tolist = torch.Tensor.tolist  # it is not dispatched
            patch.setattr(torch.Tensor, "tolist", lambda tensor: (reads.found.append("tolist"), tolist(tensor))[1])
            yield reads, launches


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once."""

    def __init__(self):
        super().__init__()
        self.most, self._alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in known:
                self._alive[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        self.most = max(self.most, sum(self._alive.values()))
        return result
