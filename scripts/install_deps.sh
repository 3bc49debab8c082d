#!/usr/bin/env bash
# Installs what the build and the tests need on Debian 12 or Ubuntu 24.04. Does nothing where all is there.
set -euo pipefail

packages=(
  cmake g++ make ninja-build pkg-config python3
  libhwy-dev              # SIMD with run-time choice of the instruction set
  libdnnl-dev             # oneDNN: matrix products of the prefill
  ocl-icd-opencl-dev      # libdnnl-dev's CMake package asks for OpenCL and only recommends it
  nlohmann-json3-dev      # configurations, safetensors headers, reports
  libpcre2-dev            # pre-tokeniser patterns
  libutf8proc-dev         # Unicode normal forms of some tokenizers
  libsentencepiece-dev    # tokenizer.model files
  libcli11-dev            # command line
  libcpp-httplib-dev      # HTTP parsing and responses of the server
  prometheus-cpp-dev      # metrics of the server
  libgtest-dev            # tests
)

missing=()
for package in "${packages[@]}"; do
  state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
  [ "$state" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if ! command -v apt-get >/dev/null; then
  echo "install_deps: no apt-get here; install these yourself: ${missing[*]}" >&2
  exit 1
fi
run=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "install_deps: need root or sudo to install: ${missing[*]}" >&2; exit 1; }
  run=(sudo)
fi
echo "Installing: ${missing[*]}"
"${run[@]}" apt-get update -qq
"${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
