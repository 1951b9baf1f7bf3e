# What LLaVA-1.5's stages have in common; each of them sources it and calls `train` with its own flags.
# Every setting can be given as an environment variable: NUM_GPUS=4 PER_GPU=8 playground/recipes/saep.sh finetune

[ -f llava_saep/train/train_mem.py ] || { echo "run the recipes from the repository root" >&2; exit 2; }

PROJECTOR=${PROJECTOR:-mlp2x_gelu}
PROJECTOR_OPTIONS=${PROJECTOR_OPTIONS:-}
LANGUAGE_MODEL=${LANGUAGE_MODEL:-lmsys/vicuna-7b-v1.5}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
TEMPLATE=${TEMPLATE:-v1}    # how stage 2 writes conversations; another family of language models wants another one
NAME=${NAME:-${PROJECTOR//[^A-Za-z0-9_.-]/_}-$(basename "$LANGUAGE_MODEL")}
STAGE1_DIR=${STAGE1_DIR:-./checkpoints/$NAME-pretrain}
NUM_GPUS=${NUM_GPUS:-8}     # all that train, over all machines
LAUNCHER_FLAGS=${LAUNCHER_FLAGS:---num_gpus $NUM_GPUS}    # several machines: LAUNCHER_FLAGS="--hostfile hostfile"

# LLaVA's mixture of conversations and where its images are (playground/data/README.md).
CONVERSATIONS=(
    --data_path "${DATA:-./playground/data/llava_v1_5_mix665k.json}"
    --image_folder "${IMAGES:-./playground/data}"
)

# train BATCH_SIZE PER_GPU FLAGS...: one step of the optimizer sees BATCH_SIZE samples, whatever the number of GPUs.
train() {
    local batch_size=$1 per_gpu=${PER_GPU:-$2}
    shift 2
    local accumulation=$((batch_size / (NUM_GPUS * per_gpu)))
    if [ $((accumulation * NUM_GPUS * per_gpu)) -ne "$batch_size" ]; then
        echo "NUM_GPUS=$NUM_GPUS x PER_GPU=$per_gpu does not divide the batch of $batch_size; choose another PER_GPU" >&2
        exit 2
    fi
    local options=()
    [ -z "$PROJECTOR_OPTIONS" ] || options=(--mm_projector_options "$PROJECTOR_OPTIONS")
    # shellcheck disable=SC2086  # the launcher's flags are several words
    deepspeed $LAUNCHER_FLAGS llava_saep/train/train_mem.py \
        --vision_tower "$VISION_TOWER" \
        --mm_projector_type "$PROJECTOR" ${options[@]+"${options[@]}"} \
        --per_device_train_batch_size "$per_gpu" \
        --gradient_accumulation_steps "$accumulation" \
        --num_train_epochs 1 \
        --weight_decay 0. \
        --warmup_steps 0.03 \
        --lr_scheduler_type cosine \
        --model_max_length 2048 \
        --bf16 True \
        --tf32 True \
        --gradient_checkpointing True \
        --dataloader_num_workers 4 \
        --save_strategy steps \
        --save_steps 500 \
        --save_total_limit 1 \
        --logging_steps 1 \
        --report_to none \
        "$@"
}
