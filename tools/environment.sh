# Sourced by quickstart.sh and test.sh in the root of the clone: activates a virtual environment that has torch.
# An active environment is taken as it is; else .venv is used, and made if need be. A torch that the machine already has is kept.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    system_torch=""
    if "${PYTHON:-python3}" -c "import torch" 2>/dev/null; then system_torch="--system-site-packages"; fi
    echo "making the virtual environment .venv $system_torch"
    "${PYTHON:-python3}" -m venv $system_torch .venv
  fi
  source .venv/bin/activate
fi
if ! python -c "import torch" 2>/dev/null; then
  echo "installing ${GEOSSL_TORCH:-torch} (once; the CUDA build takes minutes)"
  python -m pip install --quiet "${GEOSSL_TORCH:-torch}"
fi
