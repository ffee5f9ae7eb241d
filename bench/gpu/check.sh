#!/usr/bin/env bash
# Everything about the library on one GPU in a single run of at most GPU_CHECK_SECONDS (480): checks and the project's own tests,
# the cycle on two model shapes, single operations. Run from the root of a checkout:
#
#   bash bench/gpu/check.sh             numbers under $OUT (or ./gpu-check-out), the table last on the screen
#   STAGES="checks qwen05" GPU_CHECK_SECONDS=300 bash bench/gpu/check.sh
#
# STAGES: checks, qwen05, micro, llama1b in this order unless told, and trl0114 and grpo116, the baselines, whose wheels must be
# there. No network, nothing is installed. Without a GPU everything runs on tiny models, which tests these programs and nothing else.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$PWD
[ -d "$ROOT/trl" ] || { echo "run this from the root of the project (there is no trl/ in $ROOT)"; exit 2; }
PY=${PY:-python3}
export PY OUT=${OUT:-$ROOT/gpu-check-out}
export GPU_CHECK_WORK=${GPU_CHECK_WORK:-${TMPDIR:-/tmp}/gpu-check-work}
rm -rf "$GPU_CHECK_WORK"; mkdir -p "$OUT" "$GPU_CHECK_WORK"
rm -f "$OUT"/results.json "$OUT"/table.txt "$OUT"/log.txt "$OUT"/pytest.log "$OUT"/baseline.json
export PYTHONPATH=$ROOT:$HERE${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_CACHE_DIR=${TMPDIR:-/tmp}/gpu-check-inductor
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
TOTAL=${GPU_CHECK_SECONDS:-480}
BEGAN=$(date +%s); END=$((BEGAN + TOTAL))
STAGES=${STAGES:-"checks qwen05 micro llama1b"}
CHECKS=${CHECKS_SECONDS:-150} QWEN=${QWEN_SECONDS:-120} MICRO=${MICRO_SECONDS:-75} LLAMA=${LLAMA_SECONDS:-105}
OLD=${TRL0114_SECONDS:-110} GRPO=${GRPO116_SECONDS:-80}

left() { echo $((END - $(date +%s) - 8)); }         # eight seconds are for the table

# stage NAME SECONDS COMMAND...: stopped at its time or at the end of all, whichever comes first
stage() {
  local name=$1 seconds=$2 rest; shift 2
  rest=$(left); [ "$seconds" -gt "$rest" ] && seconds=$rest
  if [ "$seconds" -lt 10 ]; then echo "== $name: no time left"; return 0; fi
  echo "== $name: up to $seconds s, $(( $(date +%s) - BEGAN )) s after the start" | tee -a "$OUT/log.txt"
  GPU_CHECK_STAGE_DEADLINE=$(( $(date +%s) + seconds - 4 )) timeout -k 5 "$seconds" "$@" >>"$OUT/log.txt" 2>&1
  local rc=$?
  [ $rc -eq 0 ] || echo "== $name ended with $rc (124, 137: its time was over); see log.txt"
  return $rc
}

finish() {
  trap - EXIT
  [ -n "${TESTS:-}" ] && kill -- "-$TESTS" 2>/dev/null
  "$PY" "$HERE/summary.py"
  echo "== $(( $(date +%s) - BEGAN )) s in all"
}
trap finish EXIT

GPU=0
if nvidia-smi -L 2>/dev/null | grep -q GPU; then
  GPU=1; nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm,temperature.gpu --format=csv,noheader
else
  echo "no GPU: tiny models on the CPU, a test of these programs alone"
fi

# Of the project's own tests: what trains and samples, on the device that accelerate finds.
# Warnings are shown, not errors: other versions of torch and transformers have others.
ON_THE_DEVICE="tests/parity tests/conformance tests/compat/test_ppo_trainer.py tests/trainer/test_ppo_trainer.py
  tests/trainer/test_online.py tests/trainer/test_score_while_sampling.py tests/runs/test_managed.py
  tests/training/test_resume.py tests/training/test_guards.py tests/training/test_compute.py tests/training/test_narrow_moments.py
  tests/rollout/test_local.py tests/rollout/test_decoders.py tests/rollout/test_self_check.py
  tests/rollout/test_fixed_decoder.py tests/kernels/test_projection_on_gpu.py tests/kernels/test_rms_norm.py
  tests/kernels/test_packed_attention.py
  tests/models/test_evaluate.py tests/models/test_predictions.py
  --ignore=tests/conformance/test_processes.py"
tests() {
  local common="-q -p no:cacheprovider -W default --tb=line --maxfail=80 --timeout=100"
  if [ "$GPU" = 1 ]; then
    TRL_TEST_GPU=1 timeout -s INT -k 8 "$1" "$PY" -m pytest $common -n 9 --dist loadfile --junitxml="$GPU_CHECK_WORK/pytest-on-the-device.xml" $ON_THE_DEVICE
  else
    timeout -s INT -k 8 "$1" "$PY" -m pytest $common -n 0 --junitxml="$GPU_CHECK_WORK/pytest-functions.xml" tests/functional/test_kl.py
  fi
}

for name in $STAGES; do
  case $name in
    checks)
      seconds=$CHECKS; rest=$(left); [ "$seconds" -gt "$rest" ] && seconds=$rest
      [ "$seconds" -ge 20 ] || { echo "== checks: no time left"; continue; }
      set -m; ( tests $((seconds - 6)) >"$OUT/pytest.log" 2>&1 ) & TESTS=$!; set +m
      until_=$(( $(date +%s) + seconds ))
      while :; do  # 75: a check left the device in a bad state; 134, 139: it crashed. A new process goes on with the next one
        CUBLAS_WORKSPACE_CONFIG=:4096:8 stage checks $(( until_ - $(date +%s) )) "$PY" "$HERE/checks.py"
        case $? in 75 | 134 | 139) ;; *) break ;; esac
      done
      rest=$(( until_ - $(date +%s) )); [ "$rest" -lt 0 ] && rest=0   # the tests' time is the checks' time
      for _ in $(seq "$rest"); do kill -0 "$TESTS" 2>/dev/null || break; sleep 1; done
      kill -- "-$TESTS" 2>/dev/null; wait "$TESTS" 2>/dev/null; TESTS= ;;
    qwen05) stage bench-qwen05 "$QWEN" "$PY" "$HERE/bench.py" qwen05 ;;
    llama1b) stage bench-llama1b "$LLAMA" "$PY" "$HERE/bench.py" llama1b ;;
    micro) stage micro "$MICRO" "$PY" "$HERE/micro.py" ;;
    trl0114) stage trl0114 "$OLD" env BASELINE_SECONDS="$OLD" bash "$HERE/baseline_trl0114.sh" ;;
    grpo116) stage grpo116 "$GRPO" bash "$HERE/baseline_grpo116.sh" ;;
    *) echo "== there is no stage $name" ;;
  esac
done
exit 0
