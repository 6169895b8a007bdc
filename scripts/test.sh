#!/usr/bin/env bash
# Checks the code with ruff, then runs the tests on the newest PaddlePaddle and on 2.6.2.
#
#   bash scripts/test.sh                              # the default tests; the first run creates .venv and .venv-2.6.2
#   bash scripts/test.sh --all                        # the slow tests too
#   bash scripts/test.sh tests/test_reader.py -x      # arguments (after --all) go to pytest
#   PYTHON=python3.12 bash scripts/test.sh            # with another interpreter than python3
#   TORCH=2.13.0 bash scripts/test.sh                 # with the comparisons with PyTorch, which is installed into .venv
#   VISUALDL=2.5.3 bash scripts/test.sh               # with the tests of --visualdl, likewise
#
# Both versions are tested at the same time, on one core each. The output of 2.6.2 follows that of the newest version.
# Tests marked paddle_free run on the newest version only. Where 2.6.2 has no wheel for this Python, or no code for the
# GPUs of this machine, it is left out.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
export OMP_NUM_THREADS=1                # more threads than cores would slow down both runs

newest_marks="not slow"
older_marks="not slow and not paddle_free"
if [ "${1:-}" = --all ]; then
    newest_marks=""
    older_marks="not paddle_free"
    shift
fi

VENV=.venv bash scripts/setup.sh
.venv/bin/python -m pip install --quiet pytest scipy ruff==0.17.6 \
    ${TORCH:+"torch==$TORCH"} ${VISUALDL:+"visualdl==$VISUALDL"}
.venv/bin/python -m ruff check .

older=yes
VENV=.venv-2.6.2 PADDLE_VERSION=2.6.2 bash scripts/setup.sh || { status=$?; [ $status = 3 ] || exit $status; older=; }

command -v dot >/dev/null || echo "Graphviz's dot is missing, so the tests of drawings are skipped: apt install graphviz"
output=$(mktemp)
groups=()
# KILL, because the tests and the code under test handle the other signals. A group includes what its tests have started.
trap 'kill -KILL -- ${groups[@]+"${groups[@]}"} 2>/dev/null || true; rm -f "$output"' EXIT
trap 'exit 130' HUP INT TERM
set -m                                  # each run is a process group
if [ -n "$older" ]; then
    .venv-2.6.2/bin/python -m pip install --quiet pytest scipy
    .venv-2.6.2/bin/python -m pytest -m "$older_marks" "$@" </dev/null >"$output" 2>&1 &
    older=$!
    groups+=("-$older")
fi
.venv/bin/python -m pytest -m "$newest_marks" "$@" </dev/null &
groups+=("-$!")
set +m

failed=0
wait $! || failed=$?
if [ -n "$older" ]; then
    echo "PaddlePaddle 2.6.2:"
    status=0
    wait $older || status=$?
    cat "$output"
    [ $status = 0 ] || [ $status = 5 ] || failed=$status        # 5: the arguments select only paddle_free tests
else
    echo "PaddlePaddle 2.6.2: not tested, because it has no build for this Python or these GPUs"
fi
exit $failed
