#!/usr/bin/env bash
# Every number that this project wants from a GPU, in at most 37 minutes.
#
#     tools/gpu_day.sh OUT [FIRST [LAST]]
#
# runs the steps FIRST to LAST, by default all seven, and leaves what they print and measure in the
# folder OUT. Each has a time limit, and if one fails, the next one still runs. Start it again with
# other numbers for the next steps, or to repeat some. `python -m tools.gpu_day OUT` sums up what is
# there.
#
# It needs data/enwik8/enwik8.gz or the package index, and tiktoken's table (TIKTOKEN_CACHE_DIR).
# These variables change it:
#   BENCH_ROWS      step 3: only the rows with one of these texts in their names, a,b
#   ENWIK8_SECONDS  step 6: training time of each of its four runs
#   TOY=DATASET     try this script: small models on a CPU, on this dataset
set -uo pipefail
out=$(realpath -m "${1:?usage: tools/gpu_day.sh OUT [FIRST [LAST]]}")
first=${2:-1} # a number, or the name of a step's function
last=${3:-7}
rows=${BENCH_ROWS:-}
seconds=${ENWIK8_SECONDS:-120}
device=cuda suite=gpt2 plays=plays_char enwik8=enwik8 macbeth=macbeth_gpt2
# flags of every model and every run; they come last, so they count
model=() run=() which_tests=()
if [ -n "${TOY:-}" ]; then
    TOY=$(realpath "$TOY") # the steps are started in another folder
    device=cpu suite=cpu plays=$TOY enwik8=$TOY macbeth=$TOY
    model=(--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --dtype=float32)
    run=(--max_iters=300 --warmup_iters=10 --eval_iters=2 --sample_tokens=20)
    which_tests=(-k "optimizers or peak_flops")
fi

step_1_tests() {
    # by SIGINT pytest still says what has failed
    timeout --signal=INT 290 python -m pytest -q -n 0 -rfE --tb=short "${which_tests[@]}" \
        tests/test_cuda.py tests/test_cuda_runs.py
}

step_2_main_job() { # as a user: train, stop, resume, sample
    train_in_two_parts main config/train_plays_char_moe.py --dataset="$plays"
    python sample.py --out_dir="$out/main" --num_samples=1 --max_new_tokens=200 --device=$device
}

step_3_bench() {
    bench --suite=$suite --rows="$rows" --json="$out/bench.json" --picture="$out/speed_gpu.png"
}

step_4_kernels() { # the heaviest ones of a step with 8 experts, top-2
    bench config/train_gpt2_moe.py --json="$out/kernels.json" --profile="$out/trace.json"
    gzip --force "$out/trace.json"
}

step_5_layer() { # of that model, against its floor
    bench config/train_gpt2_moe.py --layer=True --json="$out/layer.json"
}

step_6_enwik8() { # bits per byte against seconds
    for optimizer in adamw muon; do
        for config in enwik8 enwik8_moe; do
            train "enwik8/$config-$optimizer" "config/train_$config.py" --dataset="$enwik8" \
                --optimizer=$optimizer --max_seconds="$seconds" --max_iters=1000000 \
                --eval_interval=300 --sample_tokens=0
        done
    done
}

step_7_resume_and_save() { # the same bits after a resume; how long a save of 293M parameters takes
    train save config/train_gpt2_moe.py --dataset="$macbeth" --gradient_accumulation_steps=1 \
        --max_iters=30 --eval_interval=10 --eval_iters=2 --sample_tokens=0
    same=(config/train_plays_char_moe.py --dataset="$plays" --deterministic=True --max_iters=200
        --eval_interval=1000 --sample_tokens=0)
    train whole "${same[@]}"
    train_in_two_parts parts "${same[@]}"
    last=$(ls "$out/whole" | grep step- | tail -1)
    cmp "$out"/{whole,parts}/"$last"/model.safetensors
    echo "equal bits"
}

train() { # NAME CONFIG FLAGS
    rm -rf "${out:?}/$1"
    python train.py "${@:2}" --out_dir="$out/$1" --device=$device "${model[@]}" "${run[@]}"
}

train_in_two_parts() { # the same, stopped by a signal after its first step, then resumed
    rm -rf "${out:?}/$1"
    command=(python train.py "${@:2}" --out_dir="$out/$1" --device=$device --init_from=auto)
    command+=("${model[@]}" "${run[@]}")
    "${command[@]}" &
    until grep -qs '"loss"' "$out/$1/log.jsonl"; do
        kill -0 $! || return 1
        sleep 0.1
    done
    kill -TERM $!
    wait $! || [ $? = 143 ]
    "${command[@]}"
}

bench() {
    python -m tools.bench "$@" --device=$device "${model[@]}"
}

prepare_data() {
    python data/plays_char/prepare.py
    python data/enwik8/prepare.py
    python data/text/prepare.py --input tests/macbeth.txt --tokenizer gpt2 --name "$macbeth"
}

describe() { # the date, the card, torch, and whether compile works here
    python - $device <<'PYTHON'
import sys, time, torch
from nanomoe.device import choose_device, compile_problem, device_name
device = choose_device(sys.argv[1])
facts = time.strftime("%Y-%m-%d"), device_name(device), f"torch {torch.__version__}"
print(*facts, compile_problem(device) or "compile works", sep=", ")
PYTHON
}

run_step() { # NUMBER NAME MINUTES
    [ "$1" -ge "$first" ] && [ "$1" -le "$last" ] || return
    echo "step $1: $2, at most $3 minutes"
    begin=$SECONDS
    timeout "$3m" tools/gpu_day.sh "$out" "step_$1_$2" >"$out/$1-$2.txt" 2>&1
    code=$?
    [ $code != 124 ] || sleep 15 # a run that was cut saves first
    echo "$1 $2 ended with code $code after $((SECONDS - begin)) s" | tee "$out/$1-$2.end"
}

cd "$(dirname "$(realpath "$0")")/.."
if [[ $first == step_* ]]; then # run_step has started this, with a time limit
    set -e
    $first
    exit
fi
if ! [[ $first$last =~ ^[1-7][1-7]$ ]]; then
    echo "error: FIRST and LAST are '$first' and '$last', expected numbers from 1 to 7" >&2
    exit 2
fi
mkdir -p "$out"
[ -n "${TOY:-}" ] || prepare_data
describe | tee "$out/about.txt"
run_step 1 tests 5
run_step 2 main_job 2
run_step 3 bench 8
run_step 4 kernels 2
run_step 5 layer 2
run_step 6 enwik8 14
run_step 7 resume_and_save 4
python -m tools.gpu_day "$out"
