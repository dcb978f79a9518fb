#!/usr/bin/env bash
# All runs of this study; about an hour on two cores. Results land in outputs/study, the table and figure beside this file.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
"$python" -m tritprune -m experiment=bert_4x1 seed=0,1,2 criterion=snip_momentum,magnitude,random \
  pruner.target_sparsity=0.8,0.9 slimmer=none tracker=none training.eval_every=400 training.latency_repeats=3 \
  hydra.sweep.dir=outputs/study resume=auto
"$python" experiments/2026-11_first_light/analyse.py outputs/study
