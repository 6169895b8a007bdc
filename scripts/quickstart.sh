#!/usr/bin/env bash
# From a fresh machine (Debian or Ubuntu with Python) to a searched, trained and drawn network, in minutes:
# the environment, then a second-order search on the sample of Fashion-MNIST in this repository, the training of
# what it found, the pictures and a summary.
#
#   bash scripts/quickstart.sh
#
# Results are in quickstart-1/. Run again after a stop it goes on there; when all was done, it makes quickstart-2/.
# It deletes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${VENV:-.venv}/bin/python

doing=starting
began=$SECONDS
step() {
    doing=$1
    printf '\n=== %s\n' "$doing"
}
trap 'status=$?; [ $status = 0 ] || echo "quickstart: stopped (exit code $status) at ${doing%% (*}; run again it goes on" >&2' EXIT

step "1/5 looking for system packages"
missing=()
command -v dot >/dev/null || missing+=(graphviz)                # draws
command -v c++ >/dev/null || missing+=(g++)                     # compiles operators that make a step several times faster
"${PYTHON:-python3}" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} = 0 ]; then
    echo "all there"
elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq "${missing[@]}" >/dev/null; } ||
        echo "apt-get could not install ${missing[*]}: going on without"
elif command -v brew >/dev/null; then
    echo "missing: ${missing[*]}; brew install graphviz brings what draws. Going on without"
else
    echo "missing: ${missing[*]}; get them with: sudo apt install ${missing[*]}. Going on without"
fi

step "2/5 making the environment (a download of several hundred MB, once)"
bash scripts/setup.sh

# The last folder, as long as it has no summary.
number=1
while [ -e "quickstart-$number/summary.txt" ]; do number=$((number + 1)); done
folder=quickstart-$number
mkdir -p "$folder"
ready=$SECONDS

run() {                                 # run SCRIPT FOLDER FLAGS...: from the last checkpoint, if there is one
    local resume=()
    if compgen -G "$2/checkpoint-*.npz" >/dev/null; then resume=(--resume); fi
    "$python" "$1" --model_save_dir "$2" --dataset fashion_mnist_sample "${@:3}" ${resume[@]+"${resume[@]}"}
}

step "3/5 searching a cell with the second-order update, into $folder/search"
# Few steps: alpha has to take larger ones than in the 50 epochs of a real search to go anywhere.
run train_search.py "$folder/search" --init_channels 4 --layers 4 --batch_size 32 --epochs 3 --report_freq 10 \
    --arch_learning_rate 0.01

step "4/5 training the network of this cell from scratch, into $folder/train"
run train.py "$folder/train" --arch "$folder/search/genotype.json" --init_channels 8 --layers 3 --batch_size 20 \
    --epochs 24 --cutout False --auxiliary False --drop_path_prob 0 --report_freq 100

step "5/5 drawing"
if command -v dot >/dev/null; then
    "$python" visualize.py "$folder/search" --format png --out "$folder/pictures"
else
    echo "Graphviz's dot is missing, so there are no pictures; with it: python visualize.py $folder/search"
fi

doing="writing the summary"
"$python" - "$folder" $((SECONDS - ready)) $((ready - began)) >"$folder/summary.txt.part" <<'END'
import json
import os
import sys

sys.path.insert(0, '.')
import genotypes

folder, seconds, before = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def epochs(run):
    with open(f'{folder}/{run}/history.jsonl', encoding='utf-8') as file:
        return [json.loads(line) for line in file]


search, training = epochs('search'), epochs('train')
genotype = genotypes.load(f'{folder}/search/genotype.json')
print(f'Summary ({seconds // 60} min {seconds % 60} s; {before} s before that for the installation)\n')
for kind, name in (('normal', 'normal cell'), ('reduce', 'reduction cell')):
    edges = getattr(genotype, kind)
    for node in range(len(edges) // 2):
        inputs = ', '.join(f'{operation} of {state}' for operation, state in edges[2 * node:2 * node + 2])
        print(f'{name if node == 0 else "":16}{2 + node} = {inputs}')
print(f'''(0 and 1 are the outputs of the two cells before)

search      {len(search)} epochs, validation top-1 {100 * search[-1]['valid_top1']:.1f} %
training    {len(training)} epochs, test top-1 {100 * training[-1]['valid_top1']:.1f} % at the end, {
    100 * training[-1]['best_top1']:.1f} % at best
genotype    {folder}/search/genotype.json
weights     {folder}/train/last.npz''')
for name, what in (('genotype.png', 'both cells'), ('networks.gif', 'the search, epoch by epoch'),
                   ('alphas.png', 'how alpha moved')):
    if os.path.exists(f'{folder}/pictures/{name}'):
        print(f"pictures    {folder}/pictures/{name:14} {what}")
print(f'''
That was a taste on 2,000 pictures. Next:

    source {os.path.dirname(os.path.dirname(sys.executable))}/bin/activate
    python train_search.py --help                       # a real search: CIFAR-10, 50 epochs, a GPU
    python train.py --arch DARTS_PADDLE                 # train a published cell on CIFAR-10
    python visualize.py DARTS_PADDLE                    # draw it''')
END
mv "$folder/summary.txt.part" "$folder/summary.txt"
echo
cat "$folder/summary.txt"
