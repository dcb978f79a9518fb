"""How long it takes to read, search and cut a BERT-large (24 layers, 335M random weights) with dead units and heads.

    OMP_NUM_THREADS=1 .venv/bin/python experiments/2026-11_slimmer/large.py [jit|export ...]

Half of the feed-forward units and a quarter of the heads of every layer are dead. Seconds, one run each.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from tritprune.slimming.certificate import certify
from tritprune.slimming.graph import trace
from tritprune.slimming.model_inputs import ModelInputs
from tritprune.slimming.places import cuts_of, find_places
from tritprune.slimming.slimmer import slim_model
from tritprune.slimming.surgery import selections_of
from tritprune.slimming.units import Units


def dead_large() -> torch.nn.Module:
    config = transformers.BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=2
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight[:, ::2] = 0
            layer.attention.self.value.weight[: 4 * 64] = 0
    return model


def timed(name: str, call: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    made = call()
    print(f"  {name:<42}{time.perf_counter() - start:7.2f} s", flush=True)
    return made


def main() -> None:
    model = dead_large()
    ids = torch.arange(32).view(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        model(**inputs)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), CPU")
    for tracer in sys.argv[1:] or ("jit", "export"):
        print(f"tracer={tracer}")
        timed("one forward pass", lambda: model(**inputs))
        graph = timed("read the graph", lambda tracer=tracer: trace(model, inputs, tracer))
        units = timed("search: what stands together, what is dead", lambda graph=graph: Units(model, graph))
        places = timed("name the places", lambda units=units: find_places(units))
        timed("take away, fold, until nothing is dead", units.take_away_all)
        timed("what is left of each tensor", lambda units=units: selections_of(units.weights))
        print(f"  {len(graph.nodes)} operations, {len(places)} places, {len(cuts_of(units, places))} cuts")
        given = [ModelInputs.of(inputs)]
        slim = partial(slim_model, model, inputs, tracer=tracer, check_inputs=given)
        result = timed("slim_model, all in all, 1 input certified", slim)
        timed("of which the certificate", partial(certify, model, result.model, given))
        print(f"  {result.parameters_before:,} -> {result.parameters_after:,} parameters, ", end="")
        print(f"largest difference {result.certificate.max_abs_difference:.1e}, {len(result.refused)} refused")


if __name__ == "__main__":
    main()
