#!/usr/bin/env bash
# All runs of this study: two sweeps side by side, one thread each, about 35 minutes on two idle cores.
# Results land in outputs/study, the table and the figure beside this file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}

sweep() { # target, order of seeds (two orders, so that the two sweeps share dense models instead of training them twice)
  OMP_NUM_THREADS=1 "$python" -m tritprune -m experiment=bert_4x1 seed="$2" \
    criterion=snip_momentum,magnitude,random pruner.target_sparsity="$1" \
    slimmer=none tracker=none training.eval_every=400 training.latency_repeats=3 training.threads=1 \
    training.checkpoint_every=400 hydra.sweep.dir="outputs/study/$1" resume=auto
}

sweep 0.8 0,1,2 &
sweep 0.9 2,1,0
wait
"$python" experiments/2026-11_first_light/analyse.py outputs/study
