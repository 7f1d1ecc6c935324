#!/usr/bin/env bash
# Every kind of cache makes a short video with each model: bash tests/test_cache_smoke.sh [models_root]
# models_root holds Wan2.2-I2V-A14B, Wan2.2-TI2V-5B, Wan2.2-S2V-14B or Wan2.1-T2V-1.3B; without it the embedded models run, on a CPU.
set -euo pipefail
source "$(dirname "$0")/../benchmarks/cache_runs.sh"

while read -r task folder; do
    number=0
    read -ra short <<<"--sample_steps 10 $(short "$task")"
    for flags in "${teacache[*]}" "${fbcache[*]}" "--easycache" "--magcache"; do
        [[ $task != s2v-* || $flags != --magcache ]] || continue # needs numbers measured on the model: there are none
        number=$((number + 1))
        read -ra flags <<<"$flags"
        generate "$task-$number" "$task" "$folder" "${short[@]}" "${flags[@]}"
        check "$task-$number"
        echo "ok: $task ${flags[*]}: $(grep '^CacheManager\[' "$work/$task-$number.log" | head -n 1)"
    done
done <<<"$found"
