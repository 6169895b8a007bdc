#!/usr/bin/env bash
# Creates the virtual environment .venv with everything the project needs. Running it again does no harm.
#
#   bash scripts/setup.sh                                          # the newest PaddlePaddle
#   VENV=.venv-2.6.2 PADDLE_VERSION=2.6.2 bash scripts/setup.sh    # another folder, another version
#   PYTHON=python3.12 bash scripts/setup.sh                        # another interpreter than python3
#
# Exit code 3: this version of PaddlePaddle has no wheel for this Python. 1: any other failure.
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
venv=${VENV:-.venv}
python=${PYTHON:-python3}
incomplete=$venv/.setup-incomplete              # exists from the first change to the last one

fail() {
    echo "setup: $1" >&2
    exit "${2:-1}"
}

package=paddlepaddle
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    package=paddlepaddle-gpu
fi

version_of() {                                  # version_of PYTHON: major.minor, or nothing if it does not run
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

version=$(version_of "$python")
case $version in
'') fail "$python does not run: install Python 3.9 to 3.13, or name an interpreter with PYTHON=" ;;
2.* | 3.[0-8]) fail "$python is Python $version, but the project needs 3.9 to 3.13: name another one with PYTHON=" ;;
esac

base=$("$python" -c 'import sys; print(sys._base_executable)')

if [ -e "$incomplete" ]; then
    echo "setup: $venv is incomplete because an earlier setup was interrupted: it is created again"
    rm -rf "$venv"
fi
created=
remedy="name another folder with VENV=, or delete this one"
if [ -e "$venv" ]; then
    found=$(version_of "$venv/bin/python")
    [ -n "$found" ] || fail "$venv exists, but is not a working virtual environment: $remedy"
    [ "$found" = "$version" ] ||
        fail "$venv has Python $found, but $python is Python $version: set PYTHON=$venv/bin/python, $remedy"
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || fail "$venv has no pip: $remedy"
else
    created=yes
    mkdir -p "$venv"
    touch "$incomplete"
    # PYTHON may be the interpreter of the environment that has just been deleted: its base creates the new one.
    "$base" -m venv "$venv" || {
        rm -rf "$venv"
        fail "$python cannot create a virtual environment: on Debian and Ubuntu, apt install python3-venv"
    }
fi

requirements=$(mktemp)
messages=$(mktemp)
trap 'rm -f "$requirements" "$messages"' EXIT
sed "s/^paddlepaddle>=.*/$package${PADDLE_VERSION:+==$PADDLE_VERSION}/" requirements.txt >"$requirements"

# Without an index pip succeeds only if nothing is missing.
if ! PIP_CONFIG_FILE=/dev/null "$venv/bin/python" -m pip --isolated install --no-index -r "$requirements" \
    >/dev/null 2>&1; then
    touch "$incomplete"
    status=0
    "$venv/bin/python" -m pip install --quiet -r "$requirements" 2>"$messages" || status=$?
    if grep -q "^ERROR: No matching distribution" "$messages"; then     # pip has not changed the environment
        rm -f "$incomplete"
        [ -z "$created" ] || rm -rf "$venv"
        # Without a connection pip finds no version of any package, which does not mean that there is no wheel.
        if grep -q "distribution found for $package" "$messages" && ! grep -q "connection broken" "$messages"; then
            available=$(sed -n 's/.*(from versions: \(.*\))$/; available: \1/p' "$messages")
            fail "no wheel of $package ${PADDLE_VERSION:-} for Python $version on this platform$available" 3
        fi
    fi
    cat "$messages" >&2
    [ $status = 0 ] || fail "pip could not install the packages: see its messages above, then run setup again"
fi
result=$("$venv/bin/python" -W ignore -c '
import platform, sys, paddle
print("setup: Paddle", paddle.__version__, "on Python", platform.python_version(), "in", sys.argv[1])' "$venv") ||
    fail "Paddle is installed in $venv, but cannot be imported: see the messages above; $remedy"
rm -f "$incomplete"
echo "$result"
