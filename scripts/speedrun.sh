#!/bin/sh
# The whole pipeline, from nothing to `ddt draw`: tokenizer, pretraining, instructions, release.
# Stopped at any moment, the same command goes on where it was.
#
#   scripts/speedrun.sh                      nano on the shapes world, two CPU cores
#   scripts/speedrun.sh --data my_images     nano on your own pictures (several folders may follow)
#   SIZE=small scripts/speedrun.sh           shapes, emoji and photos, one GPU
#
# SIZE      nano or small
# TOKENS    timestep (the DDT tokenizer) or spatial (its rival, for as many images)
# RUNS      where the runs and the finished model go (runs/speedrun-SIZE, runs/speedrun-spatial-SIZE)
# MINUTES   end this call after about so many minutes; call again to go on
# TOKENIZER, PRETRAIN, INSTRUCT, FINISH (finish and polish)   more fields: TOKENIZER="--steps 3000"
# PROCESSES that share each batch: 2 on a CPU, one thread each, which is faster than one with two
# DDT_DATA  where the picture packs of SIZE=small lie
set -euf

fail() { echo "$1" >&2; exit 2; }

root=$(cd "$(dirname "$0")/.." && pwd)
PATH="$root/.venv/bin:$PATH"
SIZE=${SIZE:-nano}
TOKENS=${TOKENS:-timestep}
case $TOKENS in
timestep)
    name=$SIZE see_by=${SIZE}_tokenizer
    from_noise="--objective.density.share 0.8 --objective.own 0.5 --objective.hide-fine 0 --objective.drop-tokens 0.02"
    ;;
spatial) name=spatial-$SIZE see_by=spatial_$SIZE from_noise= ;;
*) fail "TOKENS: given $TOKENS, allowed are timestep and spatial" ;;
esac
case $SIZE in nano | small) ;; *) fail "SIZE: given $SIZE, allowed are nano and small" ;; esac
# small's rival has 256 codes, and an edit has two pictures.
room=
[ "$name" = spatial-small ] && room="--backbone.max-positions 1024"
RUNS=${RUNS:-runs/speedrun-$name}
DDT_DATA=${DDT_DATA:-$root/../shared/data}
began=$(date +%s)
if [ -z "${PROCESSES:-}" ]; then
    PROCESSES=$(python -c 'import os, torch
print(torch.cuda.device_count() or min(2, os.cpu_count() or 1))')
fi
# Lists of paths are split at line ends only.
IFS='
'
prompt="a red circle above a blue square" measure="--suite shapes --json shapes.json"

if [ "${1:-}" = --data ] && [ $# -gt 1 ]; then
    shift
    # Told here, where no launcher of processes writes 40 lines about it.
    for path in "$@"; do
        case $path in
        shapes | *[*?[]*) ;;
        *) [ -e "$path" ] || fail "data: $path does not exist; give folders of images, shards, Parquet files" ;;
        esac
    done
    see="$*" learn="$*" obey="$*"
    prompt="a picture" measure="--suite reconstruction --data $1"
elif [ $# -gt 0 ]; then
    fail "given $(echo $*), allowed is --data and one or more folders; settings are in the environment (see $0)"
elif [ "$SIZE" = nano ]; then
    see=shapes learn=shapes obey=shapes
else
    see="shapes
$DDT_DATA/emoji64
$DDT_DATA/natural64
--data.weights
0.35,0.45,0.2"
    learn="shapes
$DDT_DATA/emoji64
$DDT_DATA/natural64
--data.weights
0.4,0.45,0.15"
    obey="shapes
$DDT_DATA/emoji64
$DDT_DATA/edit64
--data.weights
0.42,0.42,0.16"
fi

# A finished stage is never trained again, so a folder of runs belongs to one set of pictures.
mkdir -p "$RUNS"
[ -f "$RUNS/data" ] || echo "$see" >"$RUNS/data"
[ "$(cat "$RUNS/data")" = "$see" ] ||
    fail "$RUNS was begun on $(echo $(cat "$RUNS/data")); for other pictures set RUNS to another folder"

# train RECIPE [fields]: ddt train, by as many processes as asked for. ("--": torchrun has options
# that begin with --start too.)
train() {
    if [ "$PROCESSES" = 1 ]; then
        ddt train "$@"
    else
        OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} torchrun --standalone \
            --nproc-per-node "$PROCESSES" -m -- ddt_llama train "$@"
    fi
}

# stage RUN RECIPE DATA MORE [fields]: train one recipe; end the call where its time is over.
stage() {
    run=$RUNS/$1 recipe=$2 data=$3 more=$(echo "$4" | tr ' ' '\n')
    shift 4
    [ -f "$run/FINISHED" ] && return
    if [ -n "${MINUTES:-}" ]; then
        left=$(awk "BEGIN { left = $MINUTES - ($(date +%s) - $began) / 60; print (left > 0.2 ? left : 0) }")
        [ "$left" = 0 ] && echo "time is over; call again to go on" && exit 0
        set -- "$@" --minutes "$left"
    fi
    train "$recipe" --out "$run" --data $data "$@" $more
    [ -f "$run/FINISHED" ] || { echo "call again to go on" && exit 0; }
}

# nano's codes grow from 4,096, as they were trained (experiments/0007).
if [ "$SIZE" = nano ]; then
    stage coarse "$see_by" "$see" "${TOKENIZER:-}" --steps 2300 \
        --tokenizer.quantizer.codebook-size 4096
    stage tokenizer "$see_by" "$see" "${TOKENIZER:-}" --steps 3300 --start "$RUNS/coarse" \
        --objective.round-from 0 --objective.round-until 1 \
        --train.optim.decay-share 0.5 --train.optim.warmup 50
    # The decoder alone, of timesteps mostly from pure noise (experiments/0017).
    stage decoder "$see_by" "$see" "$from_noise ${TOKENIZER:-}" --steps 2300 --start "$RUNS/tokenizer" \
        --keep-codes true --objective.round-from 0 --objective.round-until 1 \
        --train.seed 1 --data.seed 1 --train.optim.decay-share 0.7 --train.optim.warmup 50
    tokenizer=$RUNS/decoder
else
    stage tokenizer "$see_by" "$see" "${TOKENIZER:-}"
    tokenizer=$RUNS/tokenizer
fi
# Rounding weights changes codes; the language model is to learn those of the release
# (experiments/0024).
[ -f "$RUNS/codes/config.json" ] || ddt publish "$tokenizer" "$RUNS/codes" --bits 8
tokenizer=$RUNS/codes
# Which of several phrases is meant is learned in minutes, from words alone (experiments/0020).
if [ "$SIZE" = nano ] && [ "$learn" = shapes ]; then
    stage words "${SIZE}_pretrain" shapes "${PRETRAIN:-}" --tokenizer "$tokenizer" --steps 400 --mix.plan 1 \
        --mix.text-to-image 0 --mix.image-to-text 0 --mix.image-only 0 --mix.text-only 0
    stage pretrain "${SIZE}_pretrain" shapes "${PRETRAIN:-}" --tokenizer "$tokenizer" --start "$RUNS/words"
else
    stage pretrain "${SIZE}_pretrain" "$learn" "$room ${PRETRAIN:-}" --tokenizer "$tokenizer"
fi
stage instruct "${SIZE}_instruct" "$obey" "${INSTRUCT:-}" --start "$RUNS/pretrain"
last=$RUNS/instruct
# Edits are learned last, in two falls of the rate (experiments/0022 and 0029).
if [ "$SIZE" = nano ] && [ "$obey" = shapes ]; then
    edits="--slips 0.25 --data.repeats 0.125 --train.optim.lr 2e-3 ${FINISH:-}"
    stage finish "${SIZE}_instruct" shapes "$edits" --start "$RUNS/instruct" --steps 3600 \
        --mix.draw 0.16 --mix.edit 0.42 --mix.ask 0.04 --mix.describe 0.16 --mix.plan 0.22 \
        --data.seed 1 --train.seed 1 --train.optim.decay-share 0.6
    stage polish "${SIZE}_instruct" shapes "$edits" --start "$RUNS/finish" --steps 3200 \
        --mix.draw 0.22 --mix.edit 0.54 --mix.ask 0.03 --mix.describe 0.13 --mix.plan 0.08 \
        --data.seed 2 --train.seed 2 --train.optim.decay-share 0.7
    last=$RUNS/polish
fi

# Weights in few bits, guidance tuned where the data hold shapes: the folder that `ddt_llama.load` opens.
ddt publish "$last" "$RUNS/$name" --bits 8
ddt draw "$RUNS/$name" "$prompt" --num 4 --out "$RUNS/drawn.png"
echo "the model: $RUNS/$name; measure it: ddt evaluate $RUNS/$name $measure"
