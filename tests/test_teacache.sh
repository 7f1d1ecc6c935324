#!/usr/bin/env bash
# TeaCache, end to end: bash tests/test_teacache.sh [models_root] [gpus]
# With a threshold of 0 it computes everything and the video is that of the plain run; otherwise it skips steps.
# gpus: so many processes, under torchrun, share tokens, heads and weights; on a machine without a GPU they run on the CPU.
# models_root holds Wan2.2-I2V-A14B, Wan2.2-TI2V-5B, Wan2.2-S2V-14B or Wan2.1-T2V-1.3B; without it the embedded models run, on a CPU.
set -euo pipefail
gpus=${2:-1}
if [[ ! $gpus =~ ^[1-9][0-9]*$ ]]; then
    echo "error: [gpus] must be a whole number from 1, not $gpus" >&2
    exit 2
fi
source "$(dirname "$0")/../benchmarks/cache_runs.sh"

while read -r task folder; do
    read -ra short <<<"--sample_steps 20 $(short "$task")"
    generate plain "$task" "$folder" "${short[@]}"
    generate zero "$task" "$folder" "${short[@]}" --teacache --teacache_thresh 0
    generate cached "$task" "$folder" "${short[@]}" "${teacache[@]}"
    check zero
    check cached
    [[ $(value zero "$skipped") = 0 ]] || fail "$task: steps are skipped with a threshold of 0"
    [[ $(value zero 'run["sha256"]') = "$(value plain 'run["sha256"]')" ]] || fail "$task: a threshold of 0 changes the video"
    count=$(value cached "$skipped")
    ((count > 0)) || fail "$task: ${teacache[*]} skips nothing"
    echo "ok: $task: $(<"$work/plain.seconds") s plain, $(<"$work/cached.seconds") s with ${teacache[*]}, $count predictions skipped"
done <<<"$found"
