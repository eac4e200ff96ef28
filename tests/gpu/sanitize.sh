#!/usr/bin/env bash
# The kernels under compute-sanitizer: accesses out of bounds, races in shared memory, reads of memory that nothing wrote.
# A selection of small cases, as each takes seconds: every kernel of float16 and float32 is among them.
#
#   tests/gpu/sanitize.sh [folder for logs]
set -euo pipefail
cd "$(dirname "$0")/../.."
logs=${1:-build/sanitizer}
mkdir -p "$logs"
cases='test_agrees_with_reference and not any_case and not bfloat16 and (ragged or (reuse and search) or (paper and reuse)
  or (head_dim and 96) or split or (masks and sixteen) or (memory and decode) or idle)'
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor its own allocation, so that its bounds are seen

sanitize() # tool, options
{
  local tool=$1
  compute-sanitizer --tool "$@" --show-backtrace no --print-limit 20 --error-exitcode 9 \
    "${PYTHON:-python3}" -m pytest tests/gpu/test_kernels_gpu.py -q -p no:cacheprovider -k "${cases//$'\n'/ }" \
    > "$logs/$tool.log" 2>&1 && local result=0 || local result=$?
  echo "$tool: $(grep -E 'SUMMARY|passed|failed' "$logs/$tool.log" | paste -sd' ')"
  return "$result"
}

sanitize memcheck --kernel-name kns=hip_trt & memcheck=$!
sanitize racecheck --kernel-name kns=hip_trt & racecheck=$!
sanitize initcheck & initcheck=$! # has to see what PyTorch's own kernels write
failed=0
for tool in $memcheck $racecheck $initcheck; do
  wait "$tool" || failed=1
done
exit $failed
