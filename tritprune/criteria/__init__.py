"""Criteria: weight, gradient, state -> score. One file each; ``base.py`` says how to add one.

| name | score of an element | state |
|---|---|---|
| magnitude | ``abs(w)`` | none |
| gradient | ``abs(g)`` | none |
| snip | ``abs(w g)`` | none |
| snip_momentum | ``S <- alpha S + beta abs(w g)`` | S, per unit |
| random | uniform, the control | none |
"""

from tritprune.criteria.base import (
    Criterion,
    Form,
    Reduce,
    criteria,
    get_criterion,
    reduce_units,
    register_criterion,
)
from tritprune.criteria.gradient import Gradient
from tritprune.criteria.magnitude import Magnitude
from tritprune.criteria.random import Random
from tritprune.criteria.snip import Snip, SnipMomentum

__all__ = [
    "Criterion",
    "Form",
    "Gradient",
    "Magnitude",
    "Random",
    "Reduce",
    "Snip",
    "SnipMomentum",
    "criteria",
    "get_criterion",
    "reduce_units",
    "register_criterion",
]
