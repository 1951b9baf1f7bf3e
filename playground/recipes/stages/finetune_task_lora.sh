#!/usr/bin/env bash
# After stage 2, with adapters: data of your own (DATA=, IMAGES=) and less memory. LLaVA's
# scripts/v1_5/finetune_task_lora.sh: batch 128, rank 128, alpha 256, rate 2e-4, projector 2e-5. MODEL is what stage 2
# wrote, or a released LLaVA such as liuhaotian/llava-v1.5-7b.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

train 128 16 \
    --deepspeed deepspeed_configs/zero3.json \
    --lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 \
    --model_name_or_path "${MODEL:-./checkpoints/$NAME}" \
    --version "$TEMPLATE" \
    "${CONVERSATIONS[@]}" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --learning_rate 2e-4 \
    --output_dir "${OUTPUT_DIR:-./checkpoints/$NAME-task-lora}" \
    "$@"
