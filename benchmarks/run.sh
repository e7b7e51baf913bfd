#!/usr/bin/env bash
# Make every figure of docs/results/bench-cpu anew. It takes long; leave the machine to it.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python}"
results=docs/results/bench-cpu
bench() { # FOLDER SUBCOMMAND ARGUMENTS...
  local folder="$results/$1"
  shift
  echo "+ nmflow bench $* out=$folder"
  "$python" -m nmflow bench "$@" "out=$folder"
}

bench kernels kernels
bench layer-3072x768-1-16 layer 3072x768 1:16

vit=timm:vit_base_patch16_224
bench vit-base-ff-1-8 model $vit pattern=1:8
bench vit-base-ff-1-32 model $vit pattern=1:32
bench vit-base-all-1-16 model $vit targets.ff=1:16 targets.qkv=1:16 targets.o=1:16
bench vit-large-ff-1-16 model timm:vit_large_patch16_224 pattern=1:16
bench resnet50-conv-1-8 model timm:resnet50 targets.conv=1:8
bench gpt2-all-1-8 model transformers:gpt2 targets.ff=1:8 targets.qkv=1:8 targets.o=1:8

bench train-vit-base-ff-2-4 train $vit pattern=2:4
bench train-vit-base-ff-1-8 train $vit pattern=1:8
