#!/usr/bin/env bash
# Trains on two nodes that this machine plays itself: two network namespaces joined by a virtual cable, a deepspeed
# launcher in each, as on two machines without ssh. Compares the losses with those of one process. Needs root and `ip`.
#
# Usage: sudo env PATH="$PATH" scripts/two_nodes.sh [--stage 1|2|3] [--lose kill|unplug] [--output_dir DIR] [flags of train_mem.py]
#   --stage N         ZeRO stage (default 2)
#   --lose MODE       in the middle of the run, lose the second node: "kill" ends its processes, "unplug" cuts the cable.
#                     The first node must then end by itself with a non-zero code, and the same command must go on
#                     from the newest checkpoint.
#   --output_dir DIR  where logs and outputs go (default: a temporary folder, removed at the end if all went well)
# Exit codes: 0 all as it should be, 1 not, 3 this machine cannot play two nodes (the reason is printed).
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python}
STEPS=4
STEPS_OF_LOST_RUN=30
NETWORK_TIMEOUT_SECONDS=20  # --ddp_timeout: how long a rank waits for a node that has fallen silent
END_TIMEOUT_SECONDS=120     # how long the other node may take to end; starting Python again is not part of it
RUN_TIMEOUT_SECONDS=400

stage=2 lose="" output_dir="" more=()
while [ $# -gt 0 ]; do
    case $1 in
        --stage) stage=$2; shift 2 ;;
        --lose) lose=$2; shift 2 ;;
        --output_dir) output_dir=$2; shift 2 ;;
        -h | --help) sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) more+=("$1"); shift ;;
    esac
done

say() { printf '==> %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
cannot() { printf 'cannot play two nodes here: %s\n' "$*" >&2; exit 3; }

case $stage in 1 | 2 | 3) ;; *) fail "--stage $stage: expected 1, 2 or 3" ;; esac
case $lose in "" | kill | unplug) ;; *) fail "--lose $lose: expected kill or unplug" ;; esac
[ "$(id -u)" = 0 ] || cannot "it takes root to make network namespaces"
command -v ip >/dev/null || cannot "the command 'ip' is missing (Debian and Ubuntu: apt-get install iproute2)"
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONUNBUFFERED=1
"$PYTHON" -c 'import torch, transformers, deepspeed' 2>/dev/null ||
    fail "$PYTHON cannot import torch, transformers and deepspeed; activate the environment (. .venv/bin/activate), or name an interpreter with PYTHON="

# The process number keeps runs beside each other apart; addresses and interfaces exist in the namespaces alone.
NODES=("llava_saep_a_$$" "llava_saep_b_$$")
ADDRESSES=(10.213.77.1 10.213.77.2)
launchers=()

end_node() { # NODE: end every process in it
    local pids
    pids=$(ip netns pids "$1" 2>/dev/null) || return 0
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
}

clean_up() {
    local status=$?
    trap - EXIT INT TERM HUP
    for node in "${NODES[@]}"; do end_node "$node"; done
    wait 2>/dev/null || true
    for node in "${NODES[@]}"; do ip netns delete "$node" 2>/dev/null || true; done
    if [ -n "${temporary:-}" ] && [ "$status" = 0 ]; then rm -rf "$temporary"; fi
    [ "$status" = 0 ] || [ -z "${temporary:-}" ] || say "logs and outputs are in $temporary"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if [ -z "$output_dir" ]; then
    temporary=$(mktemp -d) output_dir=$temporary
fi
mkdir -p "$output_dir"

make_nodes() {
    for node in "${NODES[@]}"; do
        ip netns add "$node" 2>"$output_dir/ip.txt" || cannot "ip netns add: $(cat "$output_dir/ip.txt")"
    done
    ip -n "${NODES[0]}" link add cable type veth peer name cable netns "${NODES[1]}" 2>"$output_dir/ip.txt" ||
        cannot "ip link add: $(cat "$output_dir/ip.txt")"
    for i in 0 1; do
        ip -n "${NODES[$i]}" addr add "${ADDRESSES[$i]}/24" dev cable
        ip -n "${NODES[$i]}" link set cable up
        ip -n "${NODES[$i]}" link set lo up
    done
    ip netns exec "${NODES[0]}" true 2>"$output_dir/ip.txt" || cannot "ip netns exec: $(cat "$output_dir/ip.txt")"
    printf '%s slots=1\n' "${ADDRESSES[@]}" >"$output_dir/hostfile"
}

training_flags() { # OUTPUT_DIR BATCH STEPS
    printf '%s\n' --output_dir "$1" --per_device_train_batch_size "$2" --max_steps "$3" \
        --model_name_or_path "$ROOT/playground/backbones/language_model" \
        --vision_tower "$ROOT/playground/backbones/vision_tower" \
        --data_path "$ROOT/playground/data/sample/conversations.json" \
        --image_folder "$ROOT/playground/data/sample/images" \
        --version v1 --mm_projector_type saep --learning_rate 1e-3 --lr_scheduler_type constant \
        --train_sampling_strategy sequential --dataloader_drop_last True --logging_steps 1 --use_cpu True --model_max_length 1024 \
        --ddp_timeout "$NETWORK_TIMEOUT_SECONDS" "${more[@]+"${more[@]}"}"
}

start_node() { # NUMBER OUTPUT_DIR STEPS LOG [flags]: start its launcher in the background
    local number=$1 flags log=$4
    mapfile -t flags < <(training_flags "$2" 1 "$3")
    # gloo would otherwise offer the address that the machine's name stands for, which exists in no namespace.
    GLOO_SOCKET_IFNAME=cable ip netns exec "${NODES[$number]}" \
        "$PYTHON" -m deepspeed.launcher.runner --hostfile "$output_dir/hostfile" --no_ssh --node_rank "$number" \
        --master_addr "${ADDRESSES[0]}" --master_port 29500 \
        "$ROOT/llava_saep/train/train_mem.py" --deepspeed "$ROOT/deepspeed_configs/zero$stage.json" \
        "${flags[@]}" "${@:5}" >"$log" 2>&1 &
    launchers[number]=$!
}

wait_for_node() { # NUMBER SECONDS -> its exit code, 124 when time is up
    local deadline=$((SECONDS + $2)) code=0
    while kill -0 "${launchers[$1]}" 2>/dev/null; do
        [ "$SECONDS" -lt "$deadline" ] || return 124
        sleep 0.2
    done
    wait "${launchers[$1]}" || code=$?
    return "$code"
}

run_both_nodes() { # OUTPUT_DIR STEPS [flags]: to the end; both must end with 0
    local code
    for i in 0 1; do start_node "$i" "$1" "$2" "$1.node$i.log" "${@:3}"; done
    for i in 0 1; do
        code=0
        wait_for_node "$i" "$RUN_TIMEOUT_SECONDS" || code=$?
        [ "$code" = 0 ] || { tail -n 30 "$1.node$i.log" >&2; fail "node $i ended with code $code (124: it did not end)"; }
    done
    say "both nodes ended with code 0"
}

compare_with_one_process() {
    local flags
    say "Training on two nodes, ZeRO-$stage, $STEPS steps"
    run_both_nodes "$output_dir/two_nodes" "$STEPS" --save_strategy no
    say "Training with one process"
    mapfile -t flags < <(training_flags "$output_dir/one_process" 2 "$STEPS")
    "$PYTHON" "$ROOT/llava_saep/train/train_mem.py" "${flags[@]}" --save_strategy no \
        >"$output_dir/one_process.log" 2>&1 || { tail -n 30 "$output_dir/one_process.log" >&2; fail "one process failed"; }
    "$PYTHON" - "$output_dir" "$STEPS" <<'PY'
import json, pathlib, sys
folder, num_steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
losses = []
for name in ("two_nodes", "one_process"):
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    losses.append([entry["loss"] for entry in history if "loss" in entry])
    print(f"losses of {name}: {losses[-1]}")
assert [len(each) for each in losses] == [num_steps] * 2, "a run logged another number of steps"
difference = max(abs(one - two) for one, two in zip(*losses))
print(f"largest difference: {difference:.2g}")
# Sums in float32 in another order: about 1e-6 for losses of this size.
sys.exit(difference > 1e-5 or max(losses[0]) - min(losses[0]) < 1e-3)
PY
}

wait_for_checkpoint() { # OUTPUT_DIR: until it holds a complete one
    local deadline=$((SECONDS + RUN_TIMEOUT_SECONDS))
    until compgen -G "$1/checkpoint-*/checkpoint_manifest.json" >/dev/null; do
        kill -0 "${launchers[0]}" 2>/dev/null || { tail -n 30 "$1.node0.log" >&2; fail "the run ended too early"; }
        [ "$SECONDS" -lt "$deadline" ] || fail "no checkpoint within $RUN_TIMEOUT_SECONDS seconds"
        sleep 0.1
    done
}

lose_second_node() {
    local out=$output_dir/lost code=0 started
    say "Training on two nodes, ZeRO-$stage, until the second is lost ($lose)"
    for i in 0 1; do start_node "$i" "$out" "$STEPS_OF_LOST_RUN" "$out.node$i.log" --save_steps 2; done
    wait_for_checkpoint "$out"
    started=$SECONDS
    case $lose in
        kill) end_node "${NODES[1]}"; { wait "${launchers[1]}" || true; } 2>/dev/null ;;
        unplug) ip -n "${NODES[1]}" link set cable down ;;
    esac
    wait_for_node 0 "$END_TIMEOUT_SECONDS" || code=$?
    [ "$code" != 0 ] || fail "the first node ended with code 0 although the second was lost"
    [ "$code" != 124 ] || fail "the first node still runs $END_TIMEOUT_SECONDS seconds after the second was lost"
    say "the first node ended with code $code, $((SECONDS - started)) seconds after the second was lost"
    end_node "${NODES[1]}"
    { wait "${launchers[1]}" || true; } 2>/dev/null
    ip -n "${NODES[1]}" link set cable up
    say "Giving both nodes the same command again"
    run_both_nodes "$out" "$STEPS_OF_LOST_RUN" --save_steps 2
    grep -h "resuming from" "$out.node0.log" || fail "the run did not go on from a checkpoint"
}

make_nodes
if [ -n "$lose" ]; then lose_second_node; else compare_with_one_process; fi
say "two nodes: all as it should be"
