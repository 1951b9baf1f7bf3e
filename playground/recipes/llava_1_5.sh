#!/usr/bin/env bash
# LLaVA-1.5 itself: playground/recipes/llava_1_5.sh STAGE [flags]
set -euo pipefail
PROJECTOR=mlp2x_gelu exec bash "$(dirname "${BASH_SOURCE[0]}")/stage.sh" "$@"
