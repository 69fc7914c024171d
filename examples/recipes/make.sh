#!/usr/bin/env bash
# Writes all recipes anew from methods/ and models/, by `reflectron plan`; run it where this file's repository begins.
# `make.sh codellama-34b` writes those of one model.
set -euo pipefail

recipe() { # MODEL METHOD LENGTHS HARDWARE GPUS CHECKPOINT [SUFFIX [ARGUMENT...]]
  [[ -z ${only:-} || $only == "$1" ]] || return 0
  reflectron plan "examples/recipes/methods/$2.yaml" "output_dir=outputs/$1_$2" "model.path=$6" "${@:8}" \
    --model "examples/recipes/models/$1.json" --lengths "$3" --gpu "$4" --gpus "$5" \
    --write "examples/recipes/$1_$2_$5x${4%%-*}${7:-}.yaml" > /dev/null
}

only=${1:-}
for hardware in "A800-80GB 16 16" "H100-80GB 8 16"; do
  read -r gpu few many <<< "$hardware"
  recipe codellama-7b reflectioncoder papers "$gpu" "$few" models/CodeLlama-7b-hf
  recipe codellama-34b reflectioncoder papers "$gpu" "$many" models/CodeLlama-34b-hf
  recipe codellama-34b reflectioncoder papers "$gpu" "$many" models/CodeLlama-34b-hf _te --backends te
  recipe deepseek-coder-6.7b reflectioncoder papers "$gpu" "$few" models/deepseek-coder-6.7b-base
  recipe deepseek-coder-33b reflectioncoder papers "$gpu" "$many" models/deepseek-coder-33b-base
  recipe qwen2.5-coder-7b reflectioncoder papers "$gpu" "$few" models/Qwen2.5-Coder-7B
  recipe qwen2.5-coder-32b reflectioncoder papers "$gpu" "$many" models/Qwen2.5-Coder-32B
  for model in "codellama-python-7b CodeLlama-7b-Python-hf" "deepseek-coder-6.7b deepseek-coder-6.7b-base"; do
    read -r name checkpoint <<< "$model"
    recipe "$name" magicoder oss-instruct "$gpu" "$few" "models/$checkpoint"
    recipe "$name" magicoder-s evol-instruct "$gpu" "$few" "outputs/${name}_magicoder/export"
  done
done
recipe codellama-34b reflectioncoder papers H100-80GB 16 models/CodeLlama-34b-hf _te_fp8 model.fp8=delayed --backends te
