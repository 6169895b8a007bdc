#!/usr/bin/env bash
# Runs the whole project in minutes on a fresh machine (Debian or Ubuntu with Python): makes the environment, searches
# a genotype with the second-order update on the included sample of Fashion-MNIST, trains it, draws it, and prints a
# summary.
#
#   bash scripts/quickstart.sh
#
# Results are in quickstart-1/. After an interruption, the same command continues there. After a complete run, it starts
# another one in quickstart-2/. It deletes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python

doing=starting
began=$SECONDS
step() {
    doing=$1
    printf '\n=== %s\n' "$doing"
}
finish() {
    local status=$?
    [ $status = 0 ] || echo "quickstart: stopped (exit code $status) at ${doing%% (*}; run it again to continue" >&2
}
trap finish EXIT

step "1/5 looking for system packages"
missing=()
command -v dot >/dev/null || missing+=(graphviz)                # draws the cells
command -v c++ >/dev/null || missing+=(g++)                     # compiles operators, for faster steps
"${PYTHON:-python3}" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} = 0 ]; then
    echo "all packages are installed"
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq "${missing[@]}" >/dev/null; } ||
        echo "apt-get could not install ${missing[*]}; continuing without"
elif command -v brew >/dev/null; then
    echo "missing: ${missing[*]}; get Graphviz with: brew install graphviz. Continuing without"
else
    echo "missing: ${missing[*]}; get them with: sudo apt install ${missing[*]}. Continuing without"
fi

step "2/5 making the environment (a download of several hundred MB, once)"
bash scripts/setup.sh

# The first folder without a summary: a new or an interrupted run.
number=1
while [ -e "quickstart-$number/summary.txt" ]; do number=$((number + 1)); done
folder=quickstart-$number
mkdir -p "$folder"
ready=$SECONDS

run() {                                 # run SCRIPT FOLDER FLAGS...: resumes from the last checkpoint in FOLDER, if any
    local resume=()
    if compgen -G "$2/checkpoint-*.npz" >/dev/null; then resume=(--resume); fi
    "$python" "$1" --model_save_dir "$2" --dataset fashion_mnist_sample "${@:3}" ${resume[@]+"${resume[@]}"}
}

step "3/5 searching with the second-order update, into $folder/search"
# Three epochs are few steps, so the learning rate of alpha is larger than the default for 50 epochs.
run train_search.py "$folder/search" --init_channels 4 --layers 4 --batch_size 32 --epochs 3 --report_freq 10 \
    --arch_learning_rate 0.01

step "4/5 training the searched genotype from scratch, into $folder/train"
run train.py "$folder/train" --arch "$folder/search/genotype.json" --init_channels 8 --layers 3 --batch_size 20 \
    --epochs 24 --cutout False --auxiliary False --drop_path_prob 0 --report_freq 100

step "5/5 drawing"
if command -v dot >/dev/null; then
    "$python" visualize.py "$folder/search" --format png --out "$folder/pictures"
else
    echo "no pictures, because Graphviz's dot is missing; after its installation: $python visualize.py $folder/search"
fi

doing="writing the summary"
"$python" scripts/summarize.py "$folder" --seconds $((SECONDS - ready)) --install_seconds $((ready - began)) \
    >"$folder/summary.txt.part"
mv "$folder/summary.txt.part" "$folder/summary.txt"
echo
cat "$folder/summary.txt"
