#!/usr/bin/env bash
# Everything that this study measures, on the CPU: about 15 minutes on two idle cores. Figures land in outputs/kernels,
# the tables and the figure beside this file.
#   experiments/2026-11_kernels/run.sh            # one thread, on core 0; THREADS=2 CORES=0,1 for two
#   SET=minilm experiments/2026-11_kernels/run.sh # an eighth of the weights, half the layers: minutes on a busy machine
# Neural Compressor 2.6 itself runs beside ours, in an environment of its own (.venv/rivals, made here once).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
study=experiments/2026-11_kernels
threads=${THREADS:-1} cores=${CORES:-0} out=${OUT:-outputs/kernels}
[ -x .venv/bin/python ] || scripts/setup demo
if [ ! -f .venv/rivals/ready ]; then
  .venv/bin/python -m venv .venv/rivals
  .venv/rivals/bin/python -m pip install --quiet --no-deps --requirement "$study/rivals.txt"
  touch .venv/rivals/ready
fi
# glibc keeps what it has: otherwise every large tensor of Neural Compressor is mapped and unmapped anew
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736
export OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads TRITPRUNE_PYTHON=.venv/rivals/bin/python
bench() { taskset -c "$cores" scripts/bench "$@" --device cpu --threads "$threads" --out "$out"; }
bench peers --set "${SET:-bert}" --seconds "${SECONDS_EACH:-40}"
bench steps --set "${SET:-bert}" --seconds "${SECONDS_EACH:-40}"
bench counts --set tiny72 # 72 layers: no size changes what is dispatched
"$TRITPRUNE_PYTHON" "$study/analyse.py" "$out"
