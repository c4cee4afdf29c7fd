#!/bin/bash
# Make an environment beside .venv for the trainers that do not go into it, and leave it as it is if it is there.
#
#     scripts/trainer_environment.sh [FOLDER] [PYTHON]
#
# verl needs a transformers older than the one in .venv, and OpenRLHF a CUDA that is not here: FOLDER (default
# .venv-trainers) gets the two and what they import, without what they only train with, and uses everything else, torch and
# this package included, from the environment of PYTHON (default .venv/bin/python).
#
#     .venv-trainers/bin/python -m pytest tests/test_trainers_verl.py tests/test_trainers_openrlhf.py
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -sm "${1:-.venv-trainers}")
python=$(realpath -s "${2:-.venv/bin/python}")

packages=(
  'verl==0.9.*' 'openrlhf==0.11.*'
  'transformers>=5.5.3,!=5.6.0,<5.11' 'huggingface-hub<2' 'tokenizers>=0.22,<=0.23.0' httpx httpcore accelerate peft
  'tensordict>=0.8,!=0.9.0,<=0.10' 'pyvers<0.2' orjson cloudpickle importlib_metadata zipp
  'TransferQueue==0.1.*' pyzmq msgspec psutil cachetools codetiming torchdata
  hydra-core 'omegaconf<2.4' 'antlr4-python3-runtime==4.9.*'
  fastapi starlette annotated-doc uvicorn aiohttp aiohappyeyeballs aiosignal frozenlist multidict propcache yarl
  prometheus_client opentelemetry-api opentelemetry-sdk opentelemetry-proto
  opentelemetry-semantic-conventions opentelemetry-exporter-prometheus
)
wanted=$("$python" -V; echo "$python" "${packages[@]}")
[ "$(cat "$folder/.made-of" 2>/dev/null)" = "$wanted" ] && exit 0

echo "Making $folder"
rm -rf "$folder"
"$python" -m venv --without-pip "$folder"
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
main=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
echo "import site; site.addsitedir('$main')" >"$site/main.pth"
# the list is complete: pip would look for a whole cluster's worth of versions that fit together
"$python" -m pip --python "$folder/bin/python" --disable-pip-version-check install --quiet --no-deps "${packages[@]}"
echo "$wanted" >"$folder/.made-of"
