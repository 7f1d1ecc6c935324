# What the scripts for caches share; to be sourced. Runs of generate.py with a fixed seed, in a temporary folder $work.
# gpus: how many processes make a video together (default 1).
# TASKS: those of the embedded models that run (default: all).
# PYTHON: the interpreter (default: .venv/bin/python, else python3); IMAGE: the first frame for image models, and what
# S2V animates; AUDIO: what it hears.
set -euo pipefail

fail() { # MESSAGE [EXIT CODE]
    echo "error: $1" >&2
    exit "${2:-1}"
}

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $repo/.venv/bin/python ]] && PYTHON=$repo/.venv/bin/python
fi
root=
if [[ -n ${1:-} ]]; then
    [[ -d $1 ]] || fail "no folder $1; usage: bash $0 [models_root]" 2
    root=$(cd "$1" && pwd)
fi
[[ -z ${IMAGE:-} ]] || IMAGE=$(realpath "$IMAGE")
[[ -z ${AUDIO:-} ]] || AUDIO=$(realpath "$AUDIO")
cd "$repo"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

models() { # one line each: TASK, and the checkpoint's folder or -; the embedded models where there is no root
    if [[ -z $root ]]; then
        local task
        for task in ${TASKS:-t2v-tiny i2v-tiny s2v-tiny}; do
            [[ $task = t2v-tiny || -d wan/assets/tiny_${task%%-*} ]] && echo "$task -"
        done
        return 0
    fi
    local pair
    for pair in i2v-A14B:Wan2.2-I2V-A14B ti2v-5B:Wan2.2-TI2V-5B s2v-14B:Wan2.2-S2V-14B t2v-1.3B:Wan2.1-T2V-1.3B; do
        [[ ! -d $root/${pair#*:} ]] || echo "${pair%%:*} $root/${pair#*:}"
    done
}

found=$(models)
[[ -n $found ]] || fail "no Wan2.2-I2V-A14B, Wan2.2-TI2V-5B, Wan2.2-S2V-14B or Wan2.1-T2V-1.3B below $root" 2
# On the embedded models the linear policy's x is 0.11 or more a step, so 0.08 would never skip.
teacache=(--teacache --teacache_thresh "$([[ -n $root ]] && echo 0.08 || echo 0.3)")
fbcache=(--fbcache --fb_thresh "$([[ -n $root ]] && echo 0.08 || echo 0.15)")

watch_vram() { # FILE: MiB of all GPUs in use, every second
    while true; do
        nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits 2>/dev/null | awk "{ sum += \$1 } END { print sum }" >>"$1" || true
        sleep 1
    done
}

# RUN TASK FOLDER FLAGS...: makes a video. Leaves $work/RUN.json, RUN.log, RUN.seconds and, with a GPU, RUN.vram.
generate() {
    local run=$1 task=$2 folder=$3 watcher=
    shift 3
    local command=("$PYTHON" generate.py --task "$task" --base_seed 42 --save_file "$work/$run.mp4")
    if ((${gpus:-1} > 1)); then
        command=("$PYTHON" -m torch.distributed.run --nproc_per_node="$gpus" "${command[@]:1}")
        command+=(--dit_fsdp --t5_fsdp --ulysses_size "$gpus")
    fi
    if [[ $folder != - ]]; then
        command+=(--ckpt_dir "$folder" --prompt "A cinematic close-up of a playful cat at the beach.")
        [[ $task != i2v-* && $task != s2v-* ]] || command+=(--image "$(first_frame)")
        [[ $task != s2v-* ]] || command+=(--audio "$(sound)")
    fi
    if command -v nvidia-smi >/dev/null; then
        watch_vram "$work/$run.vram" &
        watcher=$!
    fi
    local start=$SECONDS code=0
    if [[ -x /usr/bin/time ]]; then
        /usr/bin/time -q -f %e -o "$work/$run.seconds" "${command[@]}" "$@" >"$work/$run.json" 2>"$work/$run.log" || code=$?
    else
        "${command[@]}" "$@" >"$work/$run.json" 2>"$work/$run.log" || code=$?
        echo $((SECONDS - start)) >"$work/$run.seconds"
    fi
    [[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
    [[ $code = 0 ]] || fail "$task ${*:-without a cache}: $(tail -n 1 "$work/$run.log")"
}

short() { # TASK: the flags of a short video; S2V makes two clips
    [[ $1 != s2v-* ]] || { echo --infer_frames 8 --num_clip 2 && return; }
    echo --frame_num 5
}

sound() { # $AUDIO, or a tone of two seconds
    if [[ -z ${AUDIO:-} ]]; then
        AUDIO=$work/sound.wav
        "$PYTHON" - "$AUDIO" <<'PY'
import math, struct, sys, wave
with wave.open(sys.argv[1], "wb") as file:
    file.setparams((1, 2, 16000, 0, "NONE", ""))
    file.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(0.2 * at))) for at in range(32000)))
PY
    fi
    echo "$AUDIO"
}

first_frame() { # the image to start from: $IMAGE, or a plain one
    if [[ -z ${IMAGE:-} ]]; then
        IMAGE=$work/first_frame.png
        "$PYTHON" -c "from PIL import Image; Image.linear_gradient('L').resize((832, 480)).convert('RGB').save('$IMAGE')"
    fi
    echo "$IMAGE"
}

check() { # RUN: the summary is there, a line an expert however many clips there are, and its numbers agree
    grep -q '^CacheManager\[' "$work/$1.log" || fail "$1: no line CacheManager[...] in its output"
    "$PYTHON" - "$work/$1.json" "$work/$1.log" <<'PY' || fail "$1: the JSON or the summary does not hold what it should"
import json, sys
run = json.load(open(sys.argv[1]))
summaries = [line for line in open(sys.argv[2]) if line.startswith("CacheManager[") and " summary: " in line]
assert len(summaries) == len(run["cache"]), summaries
experts = run["cache"].values()
branches = [sums for expert in experts for sums in expert.values()]
assert all(one["computed"] + one["skipped"] == one["total"] and not one["failsafes"] for one in branches), branches
assert sum(expert["cond"]["total"] for expert in experts) == run["steps"] * run["clips"], run
PY
}

value() { # RUN EXPRESSION of `run`, the JSON
    "$PYTHON" -c "import json, sys; run = json.load(open(sys.argv[1])); print($2)" "$work/$1.json"
}

skipped='sum(one["skipped"] for expert in run["cache"].values() for one in expert.values())'
