#!/usr/bin/env bash
# Builds, tests and measures what needs a GPU, in 8 minutes: benchmarks/on_gpu.sh [FOLDER]
#
# Uses the torch of $PYTHON (default python3) and downloads nothing. FOLDER (default build/gpu) gets the log of each
# part, parts.jsonl (the state and seconds of each part), results.json, and table.md: expected against measured.
# A part that fails, runs out of its time or cannot run is named, and the next one starts. Exit status: 1 if a part
# failed or ran out of time; 0 if all others did, and where there is no GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
seconds=${GPU_SECONDS:-480}  # for all parts

if ! command -v nvidia-smi > /dev/null || ! nvidia-smi -L 2> /dev/null | grep -q .; then
  echo "no GPU on this machine (nvidia-smi lists none): nothing was built, tested or measured"
  exit 0
fi
out=${1:-build/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/*.log "$out"/parts.jsonl "$out"/results.json "$out"/table.md
export PYTHONUNBUFFERED=1 NVCC_APPEND_FLAGS=--threads=7

# record NAME STATE SECONDS
record() {
  printf '{"part": "%s", "state": "%s", "seconds": %d}\n' "$1" "$2" "$3" >> "$out/parts.jsonl"
  printf '%-16s %4d s  %s\n' "$1" "$3" "$2"
}

# part NAME LIMIT PROGRAM COMMAND...: runs a command that needs a program, for at most LIMIT seconds
part() {
  local name=$1 limit=$2 program=$3 left=$((seconds - SECONDS)) start=$SECONDS status
  shift 3
  if ! command -v "$program" > /dev/null; then
    record "$name" "not run: $program is not on PATH" 0
    return
  fi
  if ((left < 5)); then
    record "$name" "not run: the $seconds seconds are over" 0
    return
  fi
  ((limit = limit < left ? limit : left))
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  case $status in
    0) record "$name" "done" $((SECONDS - start)) ;;
    124 | 137) record "$name" "ran out of its $limit seconds" $((SECONDS - start)) ;;
    *) record "$name" "failed with exit status $status, see $name.log" $((SECONDS - start)) ;;
  esac
}

metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active
metrics+=,smsp__inst_executed_op_local_ld.sum

nvidia-smi > "$out/machine.log"
part build 150 "$python" "$python" -m pip install --no-build-isolation --no-deps -e .
part doctor 30 "$python" "$python" -m gradprobe.cli doctor
part tests 120 "$python" "$python" -m pytest -m gpu -q -rfs --timeout 60
part native 70 "$python" "$python" benchmarks/kernels.py --rounds 15 --json
part steps 60 "$python" "$python" benchmarks/gpu_steps.py --rounds 9
part triton 45 "$python" "$python" benchmarks/kernels.py --rounds 9 --json --backend triton
part sweep 60 "$python" "$python" -m gradprobe.cli sweep --data digits --families plain,resnet --depths 20 \
  --seeds 0 --epochs 2 --jobs 1 --device cuda --out "$out/sweep-$$.sqlite"
part memcheck 60 compute-sanitizer compute-sanitizer --tool memcheck --error-exitcode 7 \
  "$python" -m pytest -m gpu -q tests/csrc/test_cuda_operators.py -k "layout or mixed"
part counters 60 ncu ncu --clock-control none --csv -k 'regex:sum_chunks|merge_partials|scale_chunks' -c 24 \
  --metrics "$metrics" "$python" benchmarks/kernels.py --rounds 2
echo
"$python" benchmarks/_gpu_table.py "$out" || record table "failed with exit status $?" 0
echo "logs and tables: $out"
! grep -qE '"state": "(failed|ran out)' "$out/parts.jsonl"
