#!/usr/bin/env bash
# Makes the environment, then runs the tests. Usage: ./test.sh [--slow | --compile] [arguments for pytest]
#   --slow      the second tier alone: real launchers, whole training stages, servers, Ray, a browser where there is one
#   --compile   those that build DeepSpeed's C++ operators first (needs a compiler, and minutes the first time)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh

tier="not slow"
extras=(playground test)
arguments=()
for argument in "$@"; do
    case $argument in
        --slow) tier="slow and not compiles" extras+=(serve) ;;
        --compile) tier="compiles" ;;
        -h | --help) sed -n '2,4s/^# *//p' "$0"; exit 0 ;;
        *) arguments+=("$argument") ;;
    esac
done

use_environment "${extras[@]}"
# One thread per process: torch's threads spin while they wait, which wastes a small machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
say "Running the tests ($tier)"
exec python -m pytest -m "$tier" --durations=10 "${arguments[@]+"${arguments[@]}"}"
