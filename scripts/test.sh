#!/usr/bin/env bash
# Runs all tests, on the newest PaddlePaddle and on 2.6.2; the first run installs both.
#
#   bash scripts/test.sh                              # everything
#   bash scripts/test.sh tests/test_reader.py -x      # arguments go to pytest
#   TORCH=2.13.0 bash scripts/test.sh                 # with the comparisons with PyTorch, which is installed too
set -euo pipefail
cd "$(dirname "$0")/.."
for version in '' 2.6.2; do
    venv=.venv${version:+-$version}
    VENV=$venv PADDLE_VERSION=$version bash scripts/setup.sh
    "$venv/bin/pip" install --quiet --disable-pip-version-check pytest
    if [ -n "${TORCH:-}" ] && [ -z "$version" ]; then
        "$venv/bin/pip" install --quiet --disable-pip-version-check "torch==$TORCH"
    fi
    "$venv/bin/python" -m pytest "$@"
done
