"""Gradient magnitude."""

from typing import ClassVar

from tritprune.criteria.base import Criterion, Form, register_criterion


@register_criterion("gradient")
class Gradient(Criterion):
    """``|g|``: weights that the loss does not ask to move go. ``g`` is the gradient of the prune step's batch."""

    form: ClassVar[Form | None] = "gradient"
