"""The rule for ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``: what they read goes, what they feed back stays."""

import numpy as np

from tritprune.slimming.forms import Form, Group
from tritprune.slimming.nodes import Node
from tritprune.slimming.walk import Rule, Walk, describe


def recurrent(walk: Walk, node: Node) -> list[Form] | None:
    """``h' = gates(W_ih x + b_ih + W_hh h + b_hh)``, all layers and directions in one operation.

    The first layer's W_ih sums over the units of what is read. The hidden units are read by their own next step:
    none is dead unless its column of W_hh is, too: they keep their number.
    """
    x = walk.form(node.inputs[0])
    parameters = node.inputs[2].items if len(node.inputs) > 2 else ()
    biased, layers, both = node.argument(3), node.argument(4), node.argument(7)
    if not parameters or None in (biased, layers, both) or len(parameters) % (layers * (2 if both else 1)):
        return None
    directions = 2 if both else 1
    each = len(parameters) // (layers * directions)  # W_ih, W_hh, then biases, then a projection
    reason = f"{describe(node)} feeds them back to itself, so its hidden size stays"
    forms = [walk.form(value) for value in parameters]
    for direction in range(directions):
        first = direction * each
        bias = parameters[first + 2] if biased else None
        walk.reads(node, x, x.rank - 1, forms[first], 1, bias=bias)
    made: list[Group] = []
    for start in range(0, len(forms), each):
        for k, form in enumerate(forms[start : start + each]):
            for group in form.groups:
                if k or group.dims != (1,) or start >= directions * each:
                    walk.pin(group, reason)
        if start >= (layers - 1) * directions * each:
            last = forms[start + each - 1 if each in (3, 5) else start + 1].group(0 if each in (3, 5) else 1)
            made += [last] if last is not None else []
    shape = tuple(node.output.shape or ())
    units = np.concatenate([group.atoms for group in made]) if len(made) == directions else np.zeros(0, np.int64)
    groups = (Group.of((len(shape) - 1,), units),) if len(units) == shape[-1] and len(units) else ()
    return [Form(shape, groups), *(Form(tuple(value.shape or ())) for value in node.outputs[1:])]


RECURRENT: dict[str, Rule] = dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent)
"""Recurrent layers."""
