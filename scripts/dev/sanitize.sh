#!/usr/bin/env bash
# Runs tests of the compiled operators with AddressSanitizer and UndefinedBehaviorSanitizer, in minutes:
#     bash scripts/dev/sanitize.sh                                  # VENV=.venv-2.6.2 selects another environment
#     bash scripts/dev/sanitize.sh tests/test_custom_ops.py         # other arguments go to pytest
# A finding ends the run with the report of the sanitizer. The build stays in the cache of operators (~/.cache/darts).
set -euo pipefail
cd "$(dirname "$0")/../.."
# Without `vptr`: Paddle passes attributes as objects of types whose type information is in another library.
export CXXFLAGS="${CXXFLAGS:-} -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"
CXXFLAGS+=" -fno-omit-frame-pointer -g1 -O1"
# Python and Paddle keep memory until the process ends, and Paddle frees what new[] returned with delete.
export ASAN_OPTIONS="detect_leaks=0:alloc_dealloc_mismatch=0:abort_on_error=1" UBSAN_OPTIONS=print_stacktrace=1
# AddressSanitizer intercepts dlopen, so that Paddle does not find its own libraries next to it.
python="${VENV:-.venv}/bin/python"
libraries="$("$python" -c 'import importlib.util as u; print(u.find_spec("paddle").submodule_search_locations[0])')/libs"
export LD_LIBRARY_PATH="$libraries:${LD_LIBRARY_PATH:-}"
# Python was built without the sanitizers, so their libraries have to be loaded first.
LD_PRELOAD="$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libubsan.so)"
export LD_PRELOAD
tests=("$@")
[ $# -gt 0 ] || tests=(tests/test_custom_ops.py tests/test_custom_ops_inputs.py tests/test_custom_ops_outside.py
    tests/test_model_search.py -k "custom_ops or test_custom")
"$python" -m pytest -q -p no:cacheprovider "${tests[@]}"
