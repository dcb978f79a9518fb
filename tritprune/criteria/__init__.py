"""Criteria: weight, gradient, state -> score. One file each; ``base.py`` says how to add one.

| name | score of an element | state |
|---|---|---|
| magnitude | ``abs(w)`` | none |
| gradient | ``abs(g)`` | none |
| snip | ``abs(w g)`` | none |
| snip_momentum | ``S <- alpha S + beta abs(w g)`` | S, per unit |
| snip_momentum_block | ``S <- alpha S + beta abs(sum_unit w g)`` | S, per unit |
| taylor | ``S <- alpha S + beta (sum_unit w g)^2`` | S, per unit |
| movement | ``S <- S - w g`` | S, per unit |
| retrain_free | ``S <- S + (sum_unit w g)^2``, Fisher information of the mask | S, per unit |
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
from tritprune.criteria.mask_gradient import MaskGradient, Movement, RetrainFree, SnipMomentumBlock, Taylor
from tritprune.criteria.random import Random
from tritprune.criteria.snip import Snip, SnipMomentum

__all__ = [
    "Criterion",
    "Form",
    "Gradient",
    "Magnitude",
    "MaskGradient",
    "Movement",
    "Random",
    "Reduce",
    "RetrainFree",
    "Snip",
    "SnipMomentum",
    "SnipMomentumBlock",
    "Taylor",
    "criteria",
    "get_criterion",
    "reduce_units",
    "register_criterion",
]
