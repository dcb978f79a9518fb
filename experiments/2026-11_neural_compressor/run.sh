#!/usr/bin/env bash
# All measurements of this study, one thread, one process at a time; about 15 core-minutes. Raw figures land in
# outputs/neural_compressor, the tables and the figure beside this file.
#
# PYTHON is an environment that holds both systems with the project's pins (Neural Compressor asks for numpy < 2 in its
# metadata and works with 2.4, hence --no-deps):
#   python3.11 -m venv nc && nc/bin/pip install -c constraints.txt torch==2.13.0 && nc/bin/pip install -c constraints.txt -e '.[demo]'
#   nc/bin/pip install six 'setuptools<80' schema py-cpuinfo prettytable opencv-python-headless pycocotools deprecated
#   nc/bin/pip install --no-deps neural-compressor==2.6
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:?an environment with neural-compressor 2.6 and tritprune, see above}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMBA_NUM_THREADS=1 LOGLEVEL=WARNING # its log lines are not timed
compare() { "$python" experiments/2026-11_neural_compressor/compare.py "$@"; }
# Freed memory is kept, so that large temporaries do not pay for page faults anew: kinder to Neural Compressor.
tuned() { MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592 compare "$@"; }

mkdir -p outputs/neural_compressor && rm -f outputs/neural_compressor/*.jsonl
for pattern in 4x1 2:4; do
  tuned accuracy --task digits --pattern $pattern --seeds 0 1 2 --systems plain neural_compressor tritprune tritprune_cubic
done
for pattern in 4x1 2:4; do
  tuned time --task pydocs --pattern $pattern --steps 56
  tuned time --task digits --pattern $pattern --steps 140
  tuned masks --task pydocs --pattern $pattern --steps 8
done
for system in plain neural_compressor tritprune tritprune_torch; do
  compare memory --task pydocs --pattern 4x1 --systems $system
done
for system in neural_compressor tritprune tritprune_torch; do
  compare memory --task pydocs --pattern 2:4 --systems $system
done
"$python" experiments/2026-11_neural_compressor/analyse.py outputs/neural_compressor
