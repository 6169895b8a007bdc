#!/usr/bin/env bash
# Checks the project on a GPU, in about ten minutes, and prints a table in Markdown that can be pasted into an issue.
#
#   bash scripts/gpu_check.sh                     # after bash scripts/setup.sh
#   bash scripts/gpu_check.sh --use_gpu False     # the same checks on the CPU, with small sizes
#   bash scripts/gpu_check.sh --quick             # fewer tests, and searches in a small space
#   bash scripts/gpu_check.sh --out FOLDER        # folder of the logs and of table.md (the first free gpu_check-N)
#   VENV=.venv-2.6.2 bash scripts/gpu_check.sh    # another environment
#
# A check that fails is reported with its reason and its log, and the others follow. Exit code 1: a check has failed. 2:
# no check was run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python
limit=900                                       # seconds of one process, in case that it blocks

stop() {
    echo "gpu_check: $1" >&2
    exit 2
}

use_gpu=True
quick=
folder=
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=yes ;;
    --use_gpu | --out)
        [ $# -gt 1 ] || stop "$1 needs a value"
        case $1 in --use_gpu) use_gpu=$2 ;; *) folder=$2 ;; esac
        shift
        ;;
    *) stop "unknown argument $1: there are --use_gpu True or False, --quick and --out FOLDER" ;;
    esac
    shift
done
case $use_gpu in True | False) ;; *) stop "--use_gpu $use_gpu: it is True or False" ;; esac
[ -x "$python" ] || stop "$python is missing: bash scripts/setup.sh creates .venv, VENV= names another environment"

run() {                                         # run ARGUMENTS...: Python, at most `limit` seconds
    timeout --foreground -k 20 "$limit" "$python" "$@"
}

last_line() {                                   # of an error message on stdin
    tail -n 1 | sed 's/^error: //'
}

# --- The device: if it fails, all checks would

device=$(run scripts/gpu_check.py device --use_gpu "$use_gpu" 2>&1) || stop "$(last_line <<<"$device")"
device=$(grep -E '^(device|GPUs): ' <<<"$device")
gpus=$(sed -n 's/^GPUs: \([0-9]*\).*/\1/p' <<<"$device")
echo "$device"
echo

if [ -n "$folder" ]; then
    mkdir "$folder" 2>/dev/null || stop "--out $folder exists or cannot be created: name a new folder"
else
    number=1
    while ! mkdir "gpu_check-$number" 2>/dev/null; do
        [ -e "gpu_check-$number" ] || stop "the folder gpu_check-$number cannot be created: name another one with --out"
        number=$((number + 1))
    done
    folder=gpu_check-$number
fi
run scripts/gpu_check.py data "$folder/data" --use_gpu "$use_gpu" >"$folder/data.log" 2>&1 ||
    stop "$(last_line <"$folder/data.log") (log: $folder/data.log)"

if ! "$python" -c 'import pytest' 2>/dev/null; then
    echo "installing pytest into ${VENV:-.venv}"
    "$python" -m pip install --quiet --disable-pip-version-check pytest || echo "pip failed, so the first checks will too"
fi

# --- Sizes

if [ "$use_gpu" = True ]; then
    supernet=(--init_channels 16 --layers 8)
    search_batch=32
    training=(--init_channels 36 --layers 20 --batch_size 32)
    imagenet=(--init_channels 48 --layers 14 --batch_size 16)
    search_batches="64 32 16 8"                 # of the timed steps: the next one if memory is short
    training_batches="96 48 24 12"
    # launch takes the names of CUDA_VISIBLE_DEVICES, if it is set.
    ranks=(--gpus "$(cut -d , -f 1,2 <<<"${CUDA_VISIBLE_DEVICES:-0,1}")")
else
    supernet=(--init_channels 2 --layers 3)
    search_batch=8
    training=(--init_channels 4 --layers 3 --batch_size 10)
    imagenet=(--init_channels 4 --layers 3 --batch_size 6)
    search_batches="8"
    training_batches="8"
    ranks=(--nproc_per_node 2)
    export CUDA_VISIBLE_DEVICES=-1,-1           # launch fails with more processes than names of GPUs
fi
steps=10                                        # timed
proof_tests="not custom_ops"
network_tests="not custom_ops"
if [ -n "$quick" ]; then
    steps=3
    proof_tests+=" and paper and 3_nodes"
    network_tests+=" and (1_node or PADDLE-2-1 or equal_the_reference and sep)"
    supernet+=(--nodes 2 --primitives "none,max_pool_3x3,skip_connect,sep_conv_3x3")
fi

# --- The checks: each prints its result as the last line that begins with "result: "

tests() {                                       # tests SELECTION FILE...: selection by pytest -k
    # The tests marked slow are other sizes of the same. A cache would appear in the repository.
    run -m pytest -m "not slow" -p no:cacheprovider --use_gpu "$use_gpu" -k "$1" "${@:2}" | tee "$folder/pytest.part"
    local passed
    passed=$(grep -oE '[0-9]+ passed' "$folder/pytest.part" | tail -n 1)
    echo "result: ok, $passed"
}

proof() {
    tests "$proof_tests" tests/test_architect.py
}

networks() {
    tests "$network_tests" tests/test_operations.py tests/test_model_search.py tests/test_model.py
}

# Paddle's operators on the CPU too: those that compute on a GPU.
run_script() {                                  # run_script SCRIPT RUN FLAGS...: a run in the folder RUN
    run "$1" --model_save_dir "$folder/$2" --use_gpu "$use_gpu" --custom_ops False --report_freq 1 "${@:3}"
}

search() {                                      # search RUN FLAGS...
    run_script train_search.py "$1" --dataset fashion_mnist_sample --data "$folder/data/fashion" "${supernet[@]}" \
        --batch_size $search_batch --epochs 1 "${@:2}"
}

train() {                                       # train RUN FLAGS...
    run_script train.py "$1" --dataset fashion_mnist_sample --data "$folder/data/fashion" "${training[@]}" \
        --epochs 2 "${@:2}"
}

last_epoch() {                                  # last_epoch RUN: what its log reports about the last epoch
    local losses memory
    losses=$(grep -oE '(validation|test) loss [0-9.]+, top-1 [0-9.]+ %' "$folder/$1/log.txt" | tail -n 1)
    memory=$(grep -o 'peak memory .*' "$folder/$1/log.txt" | tail -n 1)
    echo "result: ok, $losses, $memory"
}

search_once() {
    search search-1 --deterministic
    last_epoch search-1
}

train_once() {
    train train-1 --deterministic
    last_epoch train-1
}

train_imagenet() {
    run_script train_imagenet.py imagenet --data_dir "$folder/data/imagenet" --class_num 3 "${imagenet[@]}" --epochs 2 \
        --learning_rate 0.02 --drop_path_prob 0.1
    last_epoch imagenet
}

search_again() {
    search search-2 --deterministic
    run scripts/gpu_check.py compare "$folder/search-1" "$folder/search-2"
}

train_again() {
    train train-2 --deterministic
    run scripts/gpu_check.py compare "$folder/train-1" "$folder/train-2"
}

search_without_flag() {
    search search-3
    search search-4
    run scripts/gpu_check.py compare "$folder/search-3" "$folder/search-4" --only_report
}

two_ranks() {
    if [ "$use_gpu" = True ] && [ "$gpus" -lt 2 ]; then
        echo "result: skipped: Paddle finds one GPU"
        return
    fi
    # tests/recorded.py writes the state of each rank after each step.
    run -m paddle.distributed.launch "${ranks[@]}" --log_dir "$folder/launch" tests/recorded.py "$folder/rank" \
        train_search.py --model_save_dir "$folder/search-of-two" --use_gpu "$use_gpu" --custom_ops False \
        --dataset fashion_mnist_sample --data "$folder/data/fashion" "${supernet[@]}" --batch_size $search_batch \
        --epochs 1 --report_freq 1
    run scripts/gpu_check.py compare "$folder/rank.0.npz" "$folder/rank.1.npz"
}

time_of() {                                     # time_of STEP BATCHES FLAGS...
    local batch status=0
    for batch in $2; do
        status=0
        run scripts/gpu_check.py "$1" --use_gpu "$use_gpu" --batch_size "$batch" --steps $steps "${@:3}" ||
            status=$?
        [ $status = 3 ] || return $status       # 3: the memory of the GPU is not sufficient
    done
    return $status
}

second_order() { time_of second_order "$search_batches" "${supernet[@]}"; }
first_order() { time_of first_order "$search_batches" "${supernet[@]}"; }
training_step() { time_of training_step "$training_batches" "${training[@]:0:4}"; }

# --- Running them

checks=(
    "proof|numeric proof of the second order"
    "networks|operations and networks against the reference"
    "search_once|search (train_search.py)"
    "train_once|training (train.py)"
    "train_imagenet|training (train_imagenet.py)"
    "search_again|determinism of two searches"
    "train_again|determinism of two trainings"
    "search_without_flag|for information: two searches without --deterministic"
    "two_ranks|search on two ranks with launch"
    "second_order|time of a search step, second order"
    "first_order|time of a search step, first order"
    "training_step|time of a training step"
)

reason_in() {                                   # reason_in LOG: the line that says most about a failure
    grep -m 1 -E '^(error: |FAILED |ERROR )|: error: ' "$1" || grep -v '^[[:space:]]*$' "$1" | tail -n 1 || echo "no output"
}

group=
# A process group includes what the check has started. Runs end after the current step.
trap '[ -z "$group" ] || kill -TERM -- "-$group" 2>/dev/null || true' EXIT
trap 'exit 130' HUP INT TERM

table=$folder/table.md
{
    echo "$device"
    printf '\n| check | result | seconds |\n| --- | --- | --- |\n'
} >"$table"
failed=0
count=0
for check in "${checks[@]}"; do
    count=$((count + 1))
    name=${check%%|*}
    title=${check#*|}
    log=$folder/$name.log
    printf '[%d/%d] %s ... ' $count ${#checks[@]} "$title"
    began=$SECONDS
    status=0
    set -m                                      # the check is a process group
    ( $name ) </dev/null >"$log" 2>&1 &
    group=$!
    set +m
    wait "$group" || status=$?
    group=
    result=$(sed -n 's/^result: //p' "$log" | tail -n 1)
    if [ $status != 0 ]; then
        failed=$((failed + 1))
        case $status in
        124) reason="a process did not end within $limit s" ;;
        137) reason="a process was killed: memory was short, or it did not end within $limit s" ;;
        *) reason=$(reason_in "$log" | tr -d '\r' | sed 's/^error: //; s/|/\\|/g' | cut -c 1-300) ;;
        esac
        result="FAILED: $reason (log: $log)"
    fi
    echo "${result:-ok} ($((SECONDS - began)) s)"
    echo "| $title | ${result:-ok} | $((SECONDS - began)) |" >>"$table"
done

printf '\nthe table, also in %s:\n\n' "$table"
cat "$table"
echo
echo "gpu_check: $failed of $count checks failed, in $SECONDS s"
[ $failed = 0 ]
