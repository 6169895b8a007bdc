#!/usr/bin/env bash
# Runs all tests, on the newest PaddlePaddle and on 2.6.2; the first run installs both.
#
#   bash scripts/test.sh                              # everything
#   bash scripts/test.sh tests/test_reader.py -x      # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
for version in '' 2.6.2; do
    venv=.venv${version:+-$version}
    VENV=$venv PADDLE_VERSION=$version bash scripts/setup.sh
    "$venv/bin/pip" install --quiet --disable-pip-version-check pytest
    "$venv/bin/python" -m pytest "$@"
done
