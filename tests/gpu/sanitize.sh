#!/usr/bin/env bash
# The kernels under compute-sanitizer: accesses out of bounds, races in shared memory, reads of memory that nothing wrote.
# A selection of small cases, as each takes seconds; every kernel is among them: the portable ones in every type, the
# decode kernel of thread-block clusters, the Hopper prefill kernels (where the GPU has them), and on pools in host memory
# those that look up, fill and forget cached blocks, stage pages and write rows out.
#
#   tests/gpu/sanitize.sh [folder for logs [kernels|cluster|prefill|offload ...]]
set -euo pipefail
cd "$(dirname "$0")/../.."
logs=${1:-build/sanitizer}
shift || true
areas=" ${*:-kernels cluster prefill offload} "
mkdir -p "$logs"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # each tensor its own allocation, so that its bounds are seen

portable='test_agrees_with_reference and not any_case and (ragged or (reuse and search) or (paper and reuse)
  or (head_dim and 96) or split or (masks and sixteen) or (memory and decode) or idle)'
cluster='test_agrees_with_reference and (ragged or (reuse and search) or paper or first or dense or shared
  or (head_dim and 128) or candidates)'
prefill='test_configurations and edges and (base or blocks)'
offload='test_a_small_stack'

sanitize() # tool, file, selection, options
{
  local tool=$1 file=$2 selection=$3 name=$1-${2%_gpu.py}
  shift 3
  compute-sanitizer --tool "$tool" "$@" --show-backtrace no --print-limit 20 --error-exitcode 9 \
    "${PYTHON:-python3}" -m pytest "tests/gpu/$file" -q -p no:cacheprovider -k "${selection//$'\n'/ }" \
    > "$logs/$name.log" 2>&1 && local result=0 || local result=$?
  echo "$name: $(grep -E 'SUMMARY|passed|failed' "$logs/$name.log" | paste -sd' ')"
  return "$result"
}

runs=()
start() # area, tool and what else sanitize takes
{
  local area=$1
  shift
  [[ $areas != *" $area "* ]] || { sanitize "$@" & runs+=($!); }
}
for tool in memcheck racecheck initcheck; do
  options=(--kernel-name kns=hip_trt)
  [ $tool = initcheck ] && options=() # has to see what PyTorch's own kernels write
  start kernels $tool test_kernels_gpu.py "$portable" "${options[@]}"
  start cluster $tool test_decode_cluster_gpu.py "$cluster" "${options[@]}"
  # Tensor maps write shared memory in ways that initcheck does not follow, and it takes rows that kernels load with a tile
  # and leave out for rows that they use: of the staging area nothing else is written.
  [ $tool = initcheck ] || start prefill $tool test_prefill_sm90_gpu.py "$prefill" "${options[@]}"
  [ $tool = initcheck ] && offload+=' and unstaged'
  start offload $tool test_offload_lane_gpu.py "$offload" "${options[@]}"
done
failed=0
for run in "${runs[@]}"; do
  wait "$run" || failed=1
done
exit $failed
