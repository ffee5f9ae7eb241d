#!/usr/bin/env bash
# TRL 1.16's GRPO (sampling by generate) as a baseline on the GPU machine, whose transformers it fits. Two halves:
#
#   bash bench/gpu/baseline_grpo116.sh fetch     here: 2.3 MB of wheels into .whl116 (name .whl116 in carry)
#   bash bench/gpu/baseline_grpo116.sh           there: about 80 s
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
PY=${PY:-python3}
if [ "${1:-}" = fetch ]; then
  mkdir -p .whl116
  for p in trl==1.16.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0; do
    "$PY" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
      --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl116 "$p" || exit 1
  done
  du -sh .whl116; exit 0
fi
export OUT=${OUT:-$PWD/gpu-check-out}; mkdir -p "$OUT"
SITE=${SITE:-${TMPDIR:-/tmp}/site-trl116}
"$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "${WHL:-.whl116}"/*.whl || exit 1
export PYTHONPATH=$SITE:$HERE PYTHONUNBUFFERED=1
cd "${TMPDIR:-/tmp}"
for shape in ${SHAPES:-qwen05 llama1b}; do
  timeout -k 5 "${BASELINE_SECONDS:-90}" "$PY" "$HERE/baseline_grpo116.py" "$shape" 2>>"$OUT/log.txt"
done
