#!/usr/bin/env bash
# After stage 2: the whole model goes on with data of your own (DATA=, IMAGES=). LLaVA's scripts/v1_5/finetune_task.sh:
# batch 128, rate 2e-5. MODEL is what stage 2 wrote, or a released LLaVA such as liuhaotian/llava-v1.5-7b.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train 128 16 \
    --deepspeed deepspeed_configs/zero3.json \
    --model_name_or_path "${MODEL:-./checkpoints/$NAME}" \
    --version "$TEMPLATE" \
    "${CONVERSATIONS[@]}" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-5 \
    --output_dir "${OUTPUT_DIR:-./checkpoints/$NAME-task}" \
    "$@"
