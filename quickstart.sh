#!/usr/bin/env bash
# From nothing to a LLaVA trained with a projector of your choice, on generated images, on whatever machine this is.
# Usage: ./quickstart.sh [--mm_projector_type saep] [--world cells|free] [--seed N] [--output_dir DIR] ...   (--help lists all)
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
. scripts/environment.sh

use_environment playground
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
cd "$caller" # relative paths in the flags are the caller's
exec python -m playground.quickstart "$@"
