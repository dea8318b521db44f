#!/bin/sh
# The GPU rows of docs/performance.md, from a plain checkout: PYTHONPATH=. sh benchmarks/gpu.sh
# Needs jax with CUDA, optax and jaxtyping; with torch, its optimizers are measured too. On a GPU with
# less than 120 GB: CONTENDERS="ours optax.contrib torch.compile" PYTHONPATH=. sh benchmarks/gpu.sh
set -e
PYTHON=${PYTHON:-python}
CONTENDERS=${CONTENDERS:-"ours optax torch SGD flash gram"}
# shellcheck disable=SC2086
"$PYTHON" benchmarks/step_time.py --model 1.3b --rounds 7 --contenders $CONTENDERS
"$PYTHON" benchmarks/polar_time.py --dtype bfloat16 --rounds 11 \
	--shapes 2048x7168x8 4096x11008 4096x4096x4 1024x3072x16
"$PYTHON" benchmarks/kernel_speed.py
"$PYTHON" benchmarks/report.py || echo "The tables need matplotlib: run benchmarks/report.py elsewhere."
