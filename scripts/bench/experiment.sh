#!/usr/bin/env bash
# The experiment: does a search find better cells than chance? Planned for about ten hours on two quiet cores.
#
#   bash scripts/bench/experiment.sh [noise|searches|all] [FLAGS]
#
# noise: one genotype, five training seeds. searches: the searches only, and the ranking of the genotypes that are known
# then. all (default): both, then the trainings and the tables. FLAGS: further flags of compare_genotypes.py.
#
# Finished runs are lines of RESULTS (scripts/bench/results/evidence.jsonl) and are not repeated; with a new file, as
# RESULTS=new.jsonl, all are. The folders of the runs are in OUT (experiment/); after an interruption the same command
# continues there. DATA is the folder of Fashion-MNIST.
set -euo pipefail
cd "$(dirname "$0")/../.."

part=all
case ${1-} in
    noise | searches | all) part=$1; shift ;;
    '' | -*) ;;
    *) echo "error: $1 is no part: give noise, searches, all or nothing" >&2; exit 2 ;;
esac

# Without weight decay of alpha: with the published 1e-3 the entropy of alpha hardly falls (results/pilot.jsonl).
alpha='--arch_learning_rate 1e-2 --arch_weight_decay 0 --curvature_freq 1'
compare() {
    "${VENV:-.venv}/bin/python" scripts/bench/compare_genotypes.py --data "${DATA:-/usr/share/datasets/fashion-mnist}" \
        --out "${OUT:-experiment}" --results "${RESULTS:-scripts/bench/results/evidence.jsonl}" \
        --search_channels 4 --search_layers 5 --search_epochs 6 --search_batch_size 64 \
        --train_channels 8 --train_layers 5 --train_epochs 4 --train_batch_size 64 "$@"
}
search() {
    compare --search_seeds 0 1 2 --search "first=--unrolled False $alpha" \
        --search "pc=--partial_channels 4 --unrolled False $alpha" --search "second=$alpha" \
        --paired second:first --genotypes DARTS_V2 DARTS_PADDLE PC_DARTS_CIFAR --random 12 \
        --supernet_ranking True --ranking_images 2000 "$@"
}

[ $part = searches ] || compare --search_seeds --random 0 --genotypes DARTS_V2 --train_seeds 0 1 2 3 4 "$@"
case $part in
    searches) search --train_seeds "$@" ;;
    all) search --random_of_size 6 "$@" ;;
esac
