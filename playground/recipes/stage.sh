#!/usr/bin/env bash
# playground/recipes/stage.sh STAGE [flags]: one of the stages, with the projector that PROJECTOR names.
set -euo pipefail
stages=$(dirname "${BASH_SOURCE[0]}")/stages
if [ ! -f "$stages/${1:-}.sh" ] || [ "$1" = common ]; then
    echo "usage: $0 STAGE [flags]; STAGE is one of:" >&2
    basename -a -s .sh "$stages"/*.sh | grep -v '^common$' >&2
    exit 2
fi
exec bash "$stages/$1.sh" "${@:2}"
