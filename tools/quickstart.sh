#!/usr/bin/env bash
# From a fresh clone to a pretrained encoder, features, probe scores and a report, within ten minutes on two cores:
#   bash tools/quickstart.sh [arguments of tools/pretrain.py, as --train.steps 100]
#   GEOSSL_TORCH  what to install where torch is missing (default "torch", on Linux the CUDA build; "torch==2.13.0" is a small CPU build)
#   PYTHON        interpreter that makes the environment (default python3)
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/quickstart

step() { printf '\n==> [%3d s] %s\n' "$SECONDS" "$*"; }

step "environment"
source tools/environment.sh
python -m pip install --quiet --editable .

step "geossl doctor"
geossl doctor

step "pretraining on the embedded objects: tools/pretrain.py"
python tools/pretrain.py --resume auto "$@"  # a run that was interrupted goes on

step "one vector per object: tools/extract_features.py"
python tools/extract_features.py "$run" objects --output global --out "$run/features.npz"

step "probe scores: tools/evaluate.py"
python tools/evaluate.py "$run"

step "done"
echo "report:   $PWD/$run/report.html"
echo "features: $PWD/$run/features.npz"
echo "encoder:  geossl.load(\"$PWD/$run\")"
