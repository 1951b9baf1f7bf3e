#!/usr/bin/env bash
# Stage 2 with SAEP: projector and language model learn from conversations. LLaVA-1.5's hyper-parameters, for 8 GPUs
# (batch 128). Not yet run at this scale: the values are LLaVA's, the paper's abstract names none of its own.
# Run it from the repository root; playground/data/README.md says which data it expects where.
set -euo pipefail

LANGUAGE_MODEL=${LANGUAGE_MODEL:-lmsys/vicuna-7b-v1.5}
STAGE1_DIR=${STAGE1_DIR:-./checkpoints/saep-7b-pretrain}
OUTPUT_DIR=${OUTPUT_DIR:-./checkpoints/saep-7b}

deepspeed llava_saep/train/train_mem.py \
    --deepspeed deepspeed_configs/zero3.json \
    --model_name_or_path "$LANGUAGE_MODEL" \
    --version v1 \
    --data_path ./playground/data/llava_v1_5_mix665k.json \
    --image_folder ./playground/data \
    --vision_tower openai/clip-vit-large-patch14-336 \
    --mm_projector_type saep \
    --pretrain_mm_mlp_adapter "$STAGE1_DIR" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --bf16 True \
    --tf32 True \
    --output_dir "$OUTPUT_DIR" \
    --num_train_epochs 1 \
    --per_device_train_batch_size 16 \
    --gradient_accumulation_steps 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_steps 0.03 \
    --lr_scheduler_type cosine \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --save_strategy steps \
    --save_steps 500 \
    --save_total_limit 1 \
    --logging_steps 1 \
    --report_to none \
    "$@"
