#!/usr/bin/env bash
# Install the libraries that saekit is measured beside into .venv-peers, away from saekit's own environment.
#
# torch is pinned first, to the version that saekit runs with: both sides then use the same matrix products, and no
# CUDA build comes along on a machine without a GPU. The torchvision that the peers pull in does not load beside the CPU
# build of torch ("operator torchvision::nms does not exist") and none of them needs it: it is taken out again.
#
#   PYTHON               the Python to use (default python3)
#   SAEKIT_TORCH_INDEX   a package index that serves CPU builds of torch, used for torch alone
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${1:-.venv-peers}"
torch="$(grep '^torch==' constraints.txt)"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)

from=()
[ -n "${SAEKIT_TORCH_INDEX:-}" ] && from=(--index-url "$SAEKIT_TORCH_INDEX")
pinned="$(mktemp)"
trap 'rm -f "$pinned"' EXIT
echo "$torch" >"$pinned"
"${pip[@]}" install "${from[@]}" -c "$pinned" "$torch"
"${pip[@]}" install -c "$pinned" sae-lens eai-sparsify dictionary-learning \
  sentence-transformers hypothesaes latentsae llamascopium
# circuit-tracer 0.5 asks for nnsight 0.6 or later and for older releases of transformers than the others do, dictionary-learning
# 0.1 for nnsight below 0.4: no set of versions serves both. Its transcoders, all that is used here, need neither.
"${pip[@]}" install --no-deps circuit-tracer
"${pip[@]}" uninstall --yes torchvision || true
"$venv/bin/python" - <<'PY'
import importlib.metadata as metadata

import dictionary_learning  # noqa: F401
import sae_lens  # noqa: F401
import sparsify  # noqa: F401

for name in ("torch", "sae-lens", "eai-sparsify", "dictionary-learning", "sentence-transformers", "hypothesaes",
             "latentsae", "circuit-tracer", "llamascopium"):
    print(name, metadata.version(name))
PY
