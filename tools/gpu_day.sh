#!/usr/bin/env bash
# Every number that this project wants from a GPU:    tools/gpu_day.sh OUT 1 2 3 4 5 6 7
# runs these steps, at most 37 minutes, and leaves what they print and measure in the folder OUT;
# then a line for each target. If a step fails or takes too long, the next still runs. Start it
# again for more steps, or to repeat some. It needs data/enwik8/enwik8.gz or the package index, and
# tiktoken's table. BENCH_ROWS=a,b chooses rows of step 3, ENWIK8_SECONDS the length of a run of
# step 6. TOY=DATASET tries it all on a CPU, with small models.
set -uo pipefail -a # -a: the steps are processes of their own
[[ "${*:2}" =~ ^[1-7](\ [1-7])*$ ]] || { echo "error: expected OUT and steps, 1 to 7" >&2; exit 2; }
out=$(realpath -m "$1") minutes=(0 5 2 8 2 2 14 4)
device=cuda suite=gpt2 plays=plays_char enwik8=enwik8 macbeth=macbeth_gpt2 model="" run="" only=""
if [ -n "${TOY:-}" ]; then
    device=cpu suite=cpu plays=$(realpath "$TOY") enwik8=$plays macbeth=$plays only=optimizers
    model="--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=2 --dtype=float32"
    run="--max_iters=300 --warmup_iters=10 --eval_iters=2"
fi
moe=config/train_gpt2_moe.py plays_moe="config/train_plays_char_moe.py --dataset=$plays"

run_train() { # NAME CONFIG FLAGS
    exec python train.py "$2" $run "${@:3}" $model --out_dir="$out/$1" --device=$device \
        --init_from=auto
}
train() { rm -rf "${out:?}/$1" && (run_train "$@"); }
two_parts() { # the same, but stopped by a signal after its first step, then resumed
    rm -rf "${out:?}/$1" && run_train "$@" &
    until grep -qs '"loss"' "$out/$1/log.jsonl"; do kill -0 $!; sleep 0.1; done
    kill -TERM $! && { wait $! || [ $? = 143 ]; }
    (run_train "$@")
}
bench() { python -m tools.bench "$@" --device=$device $model; }

step_1() { timeout --signal=INT 290 python -m pytest -q -n 0 -rfE -k "$only" tests/test_cuda*.py; }
step_2() { two_parts main $plays_moe; python sample.py --out_dir="$out/main" --device=$device; }
step_3() { bench --suite=$suite --rows="${BENCH_ROWS:-}" --json="$out/bench.json"; }
step_4() { bench $moe --json="$out/kernels.json" --profile="$out/trace.json"; }
step_5() { bench $moe --layer=True --json="$out/layer.json"; }
step_6() { # bits per byte against seconds
    for name in enwik8-adamw enwik8_moe-adamw enwik8-muon enwik8_moe-muon; do
        train enwik8/$name config/train_${name%-*}.py --dataset=$enwik8 --optimizer=${name#*-} \
            --max_seconds=${ENWIK8_SECONDS:-120} --max_iters=1000000 --eval_interval=300
    done
}
step_7() { # the same bits after a resume; how long a save of 293M parameters holds up training
    train save $moe --dataset=$macbeth --gradient_accumulation_steps=1 --max_iters=30 \
        --eval_interval=10 --eval_iters=2
    train whole $plays_moe --deterministic=True --max_iters=200
    two_parts parts $plays_moe --deterministic=True --max_iters=200
    cmp "$out"/{whole,parts}/step-00000200/model.safetensors && echo "equal bits"
}

cd "$(dirname "$(realpath "$0")")/.." && mkdir -p "$out"
[ -n "${TOY:-}" ] || { python data/plays_char/prepare.py; python data/enwik8/prepare.py
    python data/text/prepare.py --input tests/macbeth.txt --tokenizer gpt2 --name $macbeth; }
for step in "${@:2}"; do
    timeout ${minutes[step]}m bash -euc step_$step >"$out/$step.txt" 2>&1
    code=$?; [ $code != 124 ] || sleep 15 # a run that was cut saves first
    echo "step $step ended with code $code, $SECONDS s after the start"
done
grep -hsE '^(FAILED|ERROR) |passed|equal bits| differ|/save/step' "$out"/[17].txt | tail -12
python -m tools.bench --targets="$out"
