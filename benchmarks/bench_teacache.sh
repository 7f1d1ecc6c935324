#!/usr/bin/env bash
# Plain against cached, whole runs at the tasks' defaults: bash benchmarks/bench_teacache.sh [models_root]
# models_root holds Wan2.2-I2V-A14B, Wan2.2-TI2V-5B, Wan2.2-S2V-14B or Wan2.1-T2V-1.3B; without it the embedded models run, on a CPU.
# Seed 42. wall: the whole command; denoise: that stage; VRAM: the most that nvidia-smi saw in use, on all GPUs.
set -euo pipefail
source "$(dirname "$0")/cache_runs.sh"

row() { # TASK RUN FLAGS...
    local vram=-
    [[ ! -s $work/$2.vram ]] || vram=$(sort -n "$work/$2.vram" | tail -n 1)
    local cached="$skipped if 'cache' in run else 0"
    printf '%-10s %-34s %9.1f %9.1f %9s %9s\n' "$1" "${*:3}" "$(<"$work/$2.seconds")" \
        "$(value "$2" 'run["seconds"]["denoise"]')" "$(value "$2" "$cached")" "$vram"
}

printf '%-10s %-34s %9s %9s %9s %9s\n' task cache 'wall s' 'denoise s' skipped 'VRAM MiB'
while read -r task folder; do
    generate plain "$task" "$folder"
    row "$task" plain none
    for flags in "${teacache[*]}" "${fbcache[*]}"; do
        read -ra flags <<<"$flags"
        generate cached "$task" "$folder" "${flags[@]}"
        check cached
        row "$task" cached "${flags[@]}"
    done
done <<<"$found"
