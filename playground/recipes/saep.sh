#!/usr/bin/env bash
# SAEP: playground/recipes/saep.sh STAGE [flags]. The paper's abstract names no hyper-parameters; they are LLaVA-1.5's.
set -euo pipefail
PROJECTOR=saep exec bash "$(dirname "${BASH_SOURCE[0]}")/stage.sh" "$@"
