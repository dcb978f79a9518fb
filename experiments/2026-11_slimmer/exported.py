"""A slim MiniLM-sized BERT as ONNX and torch.export files: do they give its outputs, how large and how fast are they?

Random weights: ``OMP_NUM_THREADS=1 .venv/bin/python experiments/2026-11_slimmer/exported.py``
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
import transformers

import tritprune
from tritprune.export.artifacts import quiet

REPEATS = 15


def masked() -> tuple[transformers.BertForSequenceClassification, dict[str, torch.Tensor]]:
    """Half of the feed-forward units and a third of the heads are dead; two blocks are dead as a whole."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=6,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight[:, ::2] = 0
            layer.attention.self.value.weight[: 4 * 32] = 0
        model.bert.encoder.layer[5].output.dense.weight.zero_()
        model.bert.encoder.layer[4].attention.self.value.weight.zero_()
    ids = torch.randint(1000, 30000, (2, 128))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def paired(runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each run, the runs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Export, compare and time."""
    torch.set_num_threads(1)
    model, inputs = masked()
    start = time.perf_counter()
    result = tritprune.slim_model(model, inputs)
    print(f"slim_model: {time.perf_counter() - start:.1f} s, {len(result.refused)} refused")
    print(f"parameters {result.parameters_before:,} -> {result.parameters_after:,}")
    folder = Path(tempfile.mkdtemp())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    runs: dict[str, Callable[[], object]] = {}
    fed = {name: tensor.numpy() for name, tensor in inputs.items()}
    for name, chosen in (("masked", model), ("slim", result.model)):
        for kind, export in (("onnx", tritprune.export_onnx), ("pt2", tritprune.export_program)):
            start = time.perf_counter()
            made = export(chosen, inputs, folder / f"{name}.{kind}")
            print(
                f"{name}.{kind}: {made.bytes / 1e6:.1f} MB in {time.perf_counter() - start:.0f} s, largest difference "
                f"{made.max_abs_difference:.1e} on {made.inputs} inputs (tolerance {made.tolerance:.0e})"
            )
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, ["CPUExecutionProvider"])
        runs[f"{name}, onnxruntime"] = lambda session=session: session.run(None, fed)
        runs[f"{name}, torch"] = lambda chosen=chosen: chosen(**inputs)
    with torch.inference_mode(), quiet():
        times = paired(runs)
    for name, taken in times.items():
        print(f"{name}: {statistics.median(taken):.0f} ms, batch 2 of 128 tokens")
    for where in ("onnxruntime", "torch"):
        pairs = zip(times[f"masked, {where}"], times[f"slim, {where}"], strict=True)
        low, middle, high = statistics.quantiles([masked / slim for masked, slim in pairs], n=4)
        print(f"{where}: {middle:.2f} times as fast ({low:.2f} to {high:.2f} in the middle half of the pairs)")


if __name__ == "__main__":
    main()
