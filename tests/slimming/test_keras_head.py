"""Keras runs in a process of its own: its backend is chosen once a process, and its import is not light."""

import json
import os
import subprocess
import sys

import pytest
from torch import nn

from tritprune.errors import MissingPackageError
from tritprune.slimming import ClassifierHeadSearcherTF

PROGRAM = """
import json
import sys
import tritprune.slimming as slimming
assert "keras" not in sys.modules
import torch
torch.set_num_threads(1)
import keras
from keras import layers

found = {}

def look(case, model):
    found[case] = slimming.ClassifierHeadSearcherTF(model).search()

def chain(*after):
    return keras.Sequential([layers.Input((8,)), layers.Dense(6, activation="relu"), *after])

look("sequential", chain(layers.Dense(3, name="head")))
look("softmax follows", chain(layers.Dense(3, name="head"), layers.Dropout(0.1), layers.Softmax()))
look("ends in a norm", chain(layers.LayerNormalization()))
look("not built", keras.Sequential([layers.Dense(3, name="head")]))
look("empty", keras.Sequential())

image = keras.Input((8, 8, 1))
hidden = layers.Conv2D(4, 3)(image)
side = layers.Dense(5, name="declared_last")
out = layers.Flatten()(layers.Conv2D(2, 6, name="conv_head")(hidden))
look("convolution", keras.Model(image, out))

x = keras.Input((8,))
trunk = layers.Dense(6)(x)
first, second = layers.Dense(2, name="first")(trunk), layers.Dense(3, name="second")(trunk)
look("functional", keras.Model(x, layers.Activation("softmax")(first)))
look("two outputs", keras.Model(x, [first, second]))
look("a sum", keras.Model(x, layers.Add()([trunk, layers.Dense(6)(trunk)])))
look("an operation", keras.Model(x, keras.ops.tanh(first)))
inner = keras.Model(trunk, layers.Softmax()(layers.Dense(4, name="inside")(trunk)), name="inner")
look("nested", keras.Model(x, inner(trunk)))

class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.trunk = chain(layers.Dense(6))
        self.head = layers.Dense(3, name="own_head")
        self.probabilities = layers.Softmax()

    def call(self, inputs):
        return self.probabilities(self.head(self.trunk(inputs)))

model = Own()
look("subclassed", model)
model(torch.ones(2, 8))
look("subclassed, built", model)
layer = slimming.ClassifierHeadSearcherTF(model).search(return_name=False)
found["the layer itself"] = layer is model.head
try:
    slimming.ClassifierHeadSearcherTF(torch.nn.Linear(2, 2))
except slimming.keras_head.ConfigError as error:
    found["refused"] = str(error)
print(json.dumps({"backend": keras.backend.backend(), **found}))
"""


def test_heads_of_keras_models():
    environment = {**os.environ, "KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "backend": "torch",
        "sequential": "head",
        "softmax follows": "head",
        "ends in a norm": None,
        "not built": "head",
        "empty": None,
        "convolution": "conv_head",
        "functional": "first",
        "two outputs": None,
        "a sum": None,
        "an operation": None,
        "nested": "inside",
        "subclassed": "own_head",
        "subclassed, built": "own_head",
        "the layer itself": True,
        "refused": "ClassifierHeadSearcherTF takes a keras.Model, got Linear; "
        "for a torch module use ClassifierHeadSearcher",
    }
    assert "keras" not in sys.modules


def test_without_keras_the_error_has_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'tritprune\[keras\]'"):
        ClassifierHeadSearcherTF(nn.Linear(1, 1))
