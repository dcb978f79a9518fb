"""Magnitude."""

from typing import ClassVar

from tritprune.criteria.base import Criterion, Form, register_criterion


@register_criterion("magnitude")
class Magnitude(Criterion):
    """``|w|``: small weights go (Han et al. 2015, arXiv:1506.02626, section 3)."""

    form: ClassVar[Form | None] = "magnitude"
    needs_gradient = False
