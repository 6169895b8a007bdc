#!/usr/bin/env bash
# Runs all tests, on the newest PaddlePaddle and on 2.6.2; the first run installs both.
#
#   bash scripts/test.sh                              # everything
#   bash scripts/test.sh tests/test_reader.py -x      # arguments go to pytest
#   TORCH=2.13.0 bash scripts/test.sh                 # with the comparisons with PyTorch, which is installed too
#   VISUALDL=2.5.3 bash scripts/test.sh               # with the tests of --visualdl, the same
#
# Both versions are tested at the same time, with a core each. The run of 2.6.2 is shown when it has ended.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
bash scripts/setup.sh
VENV=.venv-2.6.2 PADDLE_VERSION=2.6.2 bash scripts/setup.sh
.venv/bin/pip install --quiet pytest ${TORCH:+torch==$TORCH} ${VISUALDL:+visualdl==$VISUALDL}
.venv-2.6.2/bin/pip install --quiet pytest

# A core for each: threads that wait for one another would hold up the other run.
export OMP_NUM_THREADS=1
output=$(mktemp)
.venv-2.6.2/bin/python -m pytest "$@" >"$output" 2>&1 &
older=$!
trap 'kill $older 2>/dev/null || true; rm -f "$output"' EXIT  # || true: the trap's status would be the script's
failed=0
.venv/bin/python -m pytest "$@" || failed=$?
echo "PaddlePaddle 2.6.2:"
wait $older || failed=$?
cat "$output"
exit $failed
