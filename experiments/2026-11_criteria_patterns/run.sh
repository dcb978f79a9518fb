#!/usr/bin/env bash
# All runs of this study, one thread: run.sh, or some parts: run.sh patterns variants pydocs.
# Results land in outputs/criteria; what is finished there is not run again. Then the table and the figure are made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1

sweep() { # folder under outputs/criteria, then the overrides
  "$python" -m tritprune -m hydra.sweep.dir="outputs/criteria/$1" resume=auto slimmer=none tracker=none \
    training.threads=1 training.eval_every=400 training.checkpoint_every=400 training.log_every=20 \
    'training.latency_batches=[1]' training.latency_repeats=1 "${@:2}"
}

# Half of the experiment's steps of pruning and recovery: 440 leave little between the criteria.
short=(experiment=digits_4x1 training.prune.steps=220 pruner.frequency=5 pruner.target_sparsity=0.9 seed=0,1,2)
criteria=criterion=magnitude,gradient,snip,snip_momentum,snip_momentum_block,taylor,movement,retrain_free,random

patterns() { # 135 runs of about 5 core-seconds
  sweep digits_blocks "${short[@]}" pattern=4x1,1x1,16x16,channelx1 $criteria
  sweep digits_2in4 "${short[@]}" pattern=2in4 pruner.target_sparsity=0.5 $criteria
}

variants() { # 27 runs
  sweep digits_progressive "${short[@]}" pruner=progressive
  sweep digits_normalize "${short[@]}" pruner.normalize=l2
  sweep digits_reduce "${short[@]}" pruner.reduce=l2,max
  sweep digits_lasso "${short[@]}" "pruner.regularizer={name:group_lasso,coeff:0.01},{name:group_lasso,coeff:0.1}"
  sweep digits_scope "${short[@]}" pruner.scope=local
  # Where the criterion matters most: is it the competition between layers?
  sweep digits_normalize_16x16 "${short[@]}" pattern=16x16 pruner.normalize=l2
  sweep digits_scope_16x16 "${short[@]}" pattern=16x16 pruner.scope=local
}

pydocs() { # a small version of the task: 3 dense models and 6 runs in 3 core-minutes
  local small=(task.classes=12 task.max_length=16 training.batch_size=8 training.dense.steps=120)
  sweep pydocs_16x16 experiment=bert_4x1 "${small[@]}" training.prune.steps=60 pruner.frequency=3 \
    pattern=16x16 pruner.target_sparsity=0.8 seed=0,1,2 criterion=snip_momentum,snip_momentum_block
}

if [ $# -eq 0 ]; then set -- patterns variants pydocs; fi
for part in "$@"; do "$part"; done
"$python" experiments/2026-11_criteria_patterns/analyse.py outputs/criteria
