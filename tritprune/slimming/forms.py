"""What is known of a traced tensor: which units its dimensions are made of, and which of them are constants.

A dimension of C channels is an array of C atoms, each the index of one row or column of some parameter. Where a view
splits a dimension in two, [.., heads * size] in [.., heads, size], the two are one group with an array [heads, size].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Array = np.ndarray
Transform = Callable[[Array], Array]
Parts = tuple[tuple[int, bool], ...]


@dataclass(frozen=True, eq=False)
class Group:
    """One or more dimensions of a tensor and the atoms that they are made of.

    Args:
        dims: the dimensions, one for each axis of the arrays, the most significant first.
        atoms: int64, the atom at each index.
        known: bool, whether the tensor is the same number at this index, wherever else one looks.
        constant: float64, that number.
    """

    dims: tuple[int, ...]
    atoms: Array
    known: Array
    constant: Array

    @classmethod
    def of(cls, dims: tuple[int, ...], atoms: Array) -> "Group":
        """A group of which no constant is known."""
        return cls(dims, atoms, np.zeros(atoms.shape, bool), np.zeros(atoms.shape))

    def map(self, dims: tuple[int, ...], transform: Transform) -> "Group":
        """The group after the same change to all three arrays."""
        return Group(dims, transform(self.atoms), transform(self.known), transform(self.constant))

    def at(self, dims: tuple[int, ...]) -> "Group":
        """The same atoms in other dimensions."""
        return replace(self, dims=dims)

    def unknown(self) -> "Group":
        """The same atoms, no constants."""
        return Group.of(self.dims, self.atoms)

    def with_constants(self, known: Array, constant: Array) -> "Group":
        """The same atoms with these constants; one that is not finite counts as unknown."""
        known = known & np.isfinite(constant)
        return replace(self, known=known, constant=np.where(known, constant, 0.0))

    def axis(self, dim: int) -> int:
        """The axis of the arrays that stands for dimension ``dim``."""
        return self.dims.index(dim)

    def taken(self, dim: int, index: Sequence[int] | Array) -> "Group":
        """The entries ``index`` of dimension ``dim``, which must be one of the group's."""
        axis = self.axis(dim)
        return self.map(self.dims, lambda array: array.take(index, axis))

    def first_of(self, dim: int) -> "Group":
        """Without dimension ``dim``: its first entry stands for all."""
        axis = self.axis(dim)
        return self.map(tuple(d for d in self.dims if d != dim), lambda array: array.take(0, axis))

    def ordered(self, dims: Sequence[int]) -> "Group":
        """The same with its axes in this order of dimensions."""
        order = [self.dims.index(dim) for dim in dims]
        return self.map(tuple(dims), lambda a: a.transpose(order))

    def simplified(self) -> "Group":
        """Without the axes along which the atoms do not change; one axis stays."""
        made = self
        for dim in self.dims if self.atoms.size else ():
            if len(made.dims) > 1 and bool((made.atoms == made.atoms.take([0], made.axis(dim))).all()):
                made = made.first_of(dim)
        return made


@dataclass(frozen=True, eq=False)
class Form:
    """What is known of one traced tensor.

    Args:
        shape: its sizes.
        groups: the dimensions that are made of atoms; no dimension is in two groups.
        free: dimensions whose size the model's own code chooses (``zeros``, ``expand``): they follow the others.
        sums_to_one: whether it is a softmax over its last dimension.
        weight: the parameter that it is, and for each dimension the parameter's own.
        parts: dimensions that several were joined to, some of them free: (size, free) of each, as [batch * heads].
    """

    shape: tuple[int, ...] = ()
    groups: tuple[Group, ...] = ()
    free: frozenset[int] = frozenset()
    sums_to_one: bool = False
    weight: tuple[str, tuple[int, ...]] | None = None
    parts: tuple[tuple[int, Parts], ...] = ()

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def group(self, dim: int) -> Group | None:
        """The group that has dimension ``dim``."""
        return next((group for group in self.groups if dim in group.dims), None)

    def without(self, *gone: Group) -> tuple[Group, ...]:
        """The groups but these."""
        return tuple(group for group in self.groups if not any(group is other for other in gone))

    def moved(self, shape: tuple[int, ...], new: Callable[[int], int]) -> "Form":
        """The form after dimension d has become dimension ``new(d)``."""
        groups = tuple(group.at(tuple(new(dim) for dim in group.dims)) for group in self.groups)
        parts = tuple((new(dim), parts) for dim, parts in self.parts)
        return Form(shape, groups, frozenset(new(dim) for dim in self.free), parts=parts)

    def follows(self, dim: int, group: Group) -> bool:
        """Whether this tensor, without units along ``dim``, has the size there that ``group``'s units have."""
        if dim in self.free:
            return True
        parts = dict(self.parts).get(dim)
        if parts is None:
            return False
        atoms = np.moveaxis(group.atoms, group.axis(dim), 0).reshape(*(size for size, _ in parts), -1)
        return all(free or (atoms == atoms.take([0], k)).all() for k, (_, free) in enumerate(parts))

    def opened(self) -> "Form":
        """With the parts of dimensions as dimensions of their own."""
        of = dict(self.parts)
        sizes = [of.get(dim, ((size, dim in self.free),)) for dim, size in enumerate(self.shape)]
        start = [sum(len(parts) for parts in sizes[:dim]) for dim in range(self.rank)]
        flat = [part for parts in sizes for part in parts]
        made = self.moved(tuple(size for size, _ in flat), start.__getitem__)
        return replace(made, free=frozenset(k for k, (_, free) in enumerate(flat) if free), parts=())


def permuted(form: Form, order: Sequence[int], shape: tuple[int, ...]) -> Form:
    """Dimension i of the result is dimension ``order[i]`` of ``form``."""
    order = [dim % form.rank for dim in order]
    weight = form.weight and (form.weight[0], tuple(form.weight[1][dim] for dim in order))
    return replace(form.moved(shape, order.index), weight=weight)


def reshaped(form: Form, shape: tuple[int, ...]) -> tuple[Form, list[Group]]:
    """The form as a tensor of another shape with the same elements, and the groups that could not be followed."""
    form = form.opened() if form.parts else form
    blocks = matching_blocks(form.shape, shape)
    if blocks is None:
        return Form(shape), list(form.groups)
    block_of = {dim: k for k, (old, _) in enumerate(blocks) for dim in old}
    single = {old[0]: new[0] for old, new in blocks if len(old) == len(new) == 1}
    made: list[Group] = []
    lost: list[Group] = []
    taken: set[int] = set()
    for group in sorted(form.groups, key=lambda group: min(group.dims)):  # the most significant stands for a block
        if all(dim in single for dim in group.dims):
            made.append(group.at(tuple(single[dim] for dim in group.dims)))
            continue
        involved = sorted({block_of[dim] for dim in group.dims})
        old = [dim for k in involved for dim in blocks[k][0]]
        new = tuple(dim for k in involved for dim in blocks[k][1])
        if not new or taken & set(old):
            lost.append(group)
            continue
        taken |= set(old)
        made.append(_across(group, old, [form.shape[d] for d in old], new, [shape[d] for d in new]).simplified())
    free = frozenset(single[dim] for dim in form.free if dim in single)
    parts = tuple(
        (new[0], tuple((form.shape[dim], dim in form.free) for dim in old))
        for old, new in blocks
        if len(old) > 1
        and len(new) == 1
        and form.free & set(old)
        and not any(set(old) & set(g.dims) for g in form.groups)
    )
    last = form.sums_to_one and bool(shape) and single.get(form.rank - 1) == len(shape) - 1
    return Form(shape, tuple(made), free, last, parts=parts), lost


def _across(group: Group, old: list[int], sizes: list[int], new: tuple[int, ...], target: list[int]) -> Group:
    """``group`` spread over all dimensions ``old``, whose elements the dimensions ``new`` then hold."""
    own = [dim for dim in old if dim in group.dims]
    order = [group.dims.index(dim) for dim in own]
    spread = [size if dim in group.dims else 1 for dim, size in zip(old, sizes, strict=True)]

    def transform(array: Array) -> Array:
        return np.broadcast_to(array.transpose(order).reshape(spread), sizes).reshape(target)

    return group.map(new, transform)


def matching_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """The finest split of both shapes in runs of dimensions with equal products; None for empty tensors."""
    if 0 in old or 0 in new:
        return None
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1 and (j >= len(new) or new[j] != 1):
            blocks.append(([i], []))
            i += 1
        elif j < len(new) and new[j] == 1 and (i >= len(old) or old[i] != 1):
            blocks.append(([], [j]))
            j += 1
        elif i >= len(old) or j >= len(new):
            return None
        else:
            left, right, product_left, product_right = [i], [j], old[i], new[j]
            i, j = i + 1, j + 1
            while product_left != product_right:
                if product_left < product_right:
                    product_left *= old[i]
                    left.append(i)
                    i += 1
                else:
                    product_right *= new[j]
                    right.append(j)
                    j += 1
            blocks.append((left, right))
    return blocks


def distinct(numbers: Array) -> Array:
    """The distinct numbers, ascending."""
    ordered = np.sort(numbers, axis=None)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def components(size: int, edges: Sequence[tuple[Array, Array]]) -> Array:
    """For each of ``size`` items, the smallest item that it is connected with through ``edges``."""
    label = np.arange(size)
    if not edges:
        return label
    one = np.concatenate([a.reshape(-1) for a, _ in edges])
    two = np.concatenate([b.reshape(-1) for _, b in edges])
    while True:
        a, b = label[one], label[two]
        apart = a != b
        if not apart.any():
            return label
        one, two, a, b = one[apart], two[apart], a[apart], b[apart]
        np.minimum.at(label, np.maximum(a, b), np.minimum(a, b))
        while True:
            higher = label[label]
            if np.array_equal(higher, label):
                break
            label = higher
