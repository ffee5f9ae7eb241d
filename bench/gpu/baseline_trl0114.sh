#!/usr/bin/env bash
# TRL 0.11.4 as a baseline on the GPU machine. Two halves:
#
#   bash bench/gpu/baseline_trl0114.sh fetch     here, where pip works: 16 MB of wheels into .whl (name .whl in carry)
#   bash bench/gpu/baseline_trl0114.sh           there: unpacks them beside torch, runs the job (about 150 s; BASELINE_SECONDS=170)
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
PY=${PY:-python3}
if [ "${1:-}" = fetch ]; then
  mkdir -p .whl
  for p in transformers==4.46.3 trl==0.11.4 tokenizers==0.20.3 accelerate==1.1.1 datasets==3.2.0 peft==0.13.2 tyro==0.9.2 \
           huggingface-hub==0.26.5 dill==0.3.8 multiprocess==0.70.16 xxhash==3.5.0 fsspec==2024.9.0 docstring-parser==0.16 \
           shtab==1.7.1 typeguard==4.4.1; do
    "$PY" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
      --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d .whl "$p" || exit 1
  done
  du -sh .whl; exit 0
fi
export OUT=${OUT:-$PWD/gpu-check-out}; mkdir -p "$OUT"
SITE=${SITE:-${TMPDIR:-/tmp}/site-trl0114}
"$PY" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "${WHL:-.whl}"/*.whl || exit 1
export PYTHONPATH=$SITE PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 USE_TF=0 USE_FLAX=0   # not the checkout: its trl/ would come first
cd "${TMPDIR:-/tmp}"
END=$(( $(date +%s) + ${BASELINE_SECONDS:-170} ))
run() {
  local rest=$(( END - $(date +%s) )); [ "$rest" -lt 25 ] && { echo "no time left for $*"; return; }
  timeout -k 5 "$rest" "$PY" "$HERE/baseline_trl0114.py" "$@" 2>>"$OUT/log.txt"
}
run qwen05 --mixed bf16
run llama1b --mixed bf16
run qwen05                      # float32, its default
run qwen05 --weights bfloat16
