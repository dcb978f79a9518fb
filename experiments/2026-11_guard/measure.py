"""What the guard costs: the training step of experiment=bert_4x1 with the guard on and off, step by step in a process.

    python experiments/2026-11_guard/measure.py --steps 40 --threads 2

Two models train on the same batches, one with guard="on"; steps alternate, and which of the two comes first alternates,
too. Timed after the last mask update, where all 90% are pruned and no scores are computed any more.
"""

import argparse
import statistics
import time

import torch

import tritprune

WARM_UP = 4  # steps: two before the last mask update, and what compiles


def prepared(task, guard):
    """A model with its optimizer after the last mask update."""
    model = task.build_model(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    pruner = tritprune.Pruner(
        model,
        criterion="magnitude",
        include=["bert.encoder.**"],
        target_sparsity=0.9,
        start_step=1,
        end_step=2,
        guard=guard,
    )
    return model, optimizer, pruner.attach(optimizer)


def step(task, model, optimizer, batch):
    """One training step: seconds on the clock and of CPU time."""
    started = time.perf_counter(), time.process_time()
    loss = task.loss(task.logits(model(**task.model_inputs(batch))), batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def show(name, off, on, look):
    """The medians, the paired ratio with its quartiles, and the share of the check in its step."""
    ratios = sorted(b / a for a, b in zip(off, on, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    shares = sorted(a / b for a, b in zip(look, on, strict=True))
    print(
        f"{name}: step off {1e3 * statistics.median(off):.1f} ms, on {1e3 * statistics.median(on):.1f} ms; "
        f"on / off, median of {len(off)} pairs {statistics.median(ratios):.4f} (quartiles {low:.4f} to {high:.4f}); "
        f"the check {1e3 * statistics.median(look):.2f} ms, {statistics.median(shares):.2%} of its step "
        f"(quartiles {shares[len(shares) // 4]:.2%} to {shares[-1 - len(shares) // 4]:.2%})",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    task = tritprune.get_task("pydocs")
    task.prepare()
    arms = {guard: prepared(task, guard) for guard in ("off", "on")}
    pruner = arms["on"][2]
    looks, look = [], pruner._guard.look

    def timed(*given):
        started = time.perf_counter(), time.process_time()
        look(*given)
        looks.append((time.perf_counter() - started[0], time.process_time() - started[1]))

    pruner._guard.look = timed
    elements = sum(layer.elements for layer in pruner.layers)
    print(f"{elements:,} prunable weights, {arguments.threads} threads, torch {torch.__version__}", flush=True)
    seconds = {"off": [], "on": []}
    for i in range(arguments.steps + WARM_UP):
        batch = task.collate("train", torch.arange(16) + 16 * (i % 90))
        for guard in ("off", "on") if i % 2 else ("on", "off"):
            torch.manual_seed(i)
            seconds[guard].append(step(task, *arms[guard][:2], batch))
        if i >= WARM_UP and (i - WARM_UP + 1) % 10 == 0:
            off, on, check = (list(zip(*values[WARM_UP:], strict=True)) for values in (*seconds.values(), looks))
            for place, name in enumerate(("clock", "CPU time")):
                show(name, off[place], on[place], check[place])
    assert pruner.verify().zeros == int(0.9 * elements / 4) * 4


if __name__ == "__main__":
    main()
