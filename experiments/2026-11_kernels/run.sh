#!/usr/bin/env bash
# Everything that this study measures, on the CPU; then the tables and the figure beside this file. At most 12 minutes on
# two idle cores, BERT-base and MiniLM together; a bar shows the time that is left.
#   THREADS=2 CORES=0,1 experiments/2026-11_kernels/run.sh   # default: one thread, on core 0
#   SET=minilm experiments/2026-11_kernels/run.sh            # one set of layers alone: minilm, bert, small
#   SECONDS_EACH=1 RESULTS=outputs/try experiments/2026-11_kernels/run.sh    # a try: nothing here is touched
# Neural Compressor 2.6 itself runs beside ours, in an environment of its own over .venv (.venv/rivals, made here once).
# What a set has measured replaces its results when the set is complete, and not before.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
study=experiments/2026-11_kernels
threads=${THREADS:-1} cores=${CORES:-0} results=${RESULTS:-$study/results}
[ -x .venv/bin/python ] || scripts/setup dev
if ! cmp -s "$study/rivals.txt" .venv/rivals/ready; then
  rm -rf .venv/rivals
  .venv/bin/python -m venv .venv/rivals
  .venv/rivals/bin/python -m pip install --quiet --no-deps --requirement "$study/rivals.txt"
  .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$(.venv/rivals/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/over.pth"
  cp "$study/rivals.txt" .venv/rivals/ready
fi
# glibc keeps what it has: otherwise every large tensor of Neural Compressor is mapped and unmapped anew
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736
export OMP_NUM_THREADS=$threads MKL_NUM_THREADS=$threads TRITPRUNE_PYTHON=.venv/rivals/bin/python
mkdir -p "$results"
work=$(mktemp -d "$results/.running_XXXXXX")
trap 'rm -rf "$work"' EXIT
bench() {
  echo "== $*"
  taskset -c "$cores" scripts/bench "$@" --device cpu --threads "$threads"
}
for set in ${SET:-minilm bert}; do
  out=$work/$set
  bench peers --set "$set" --seconds "${SECONDS_EACH:-7}" --out "$out"
  bench steps --set "$set" --seconds "${SECONDS_EACH:-7}" --out "$out"
  bench counts --set tiny72 --out "$out" # 72 layers: no size changes what is dispatched
  rm -rf "${results:?}/$set"
  mv "$out" "$results/"
done
"$TRITPRUNE_PYTHON" "$study/analyse.py" "$results"
