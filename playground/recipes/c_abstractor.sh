#!/usr/bin/env bash
# Honeybee's C-Abstractor: playground/recipes/c_abstractor.sh STAGE [flags]. Hyper-parameters and data are LLaVA-1.5's;
# Honeybee's own training (arXiv:2312.06742) has others.
set -euo pipefail
PROJECTOR=c_abstractor exec bash "$(dirname "${BASH_SOURCE[0]}")/stage.sh" "$@"
