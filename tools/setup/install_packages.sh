#!/usr/bin/env bash
# Installs what the build, the tests and the formatter need, by name, from Debian 12. Takes a few
# milliseconds when everything is there. `install_packages.sh fuzz`: what `make fuzz` needs, too.
set -euo pipefail

packages=(
  # Build tools
  ccache cmake g++ git make mold ninja-build pkg-config
  # Code generators
  protobuf-compiler protobuf-compiler-grpc
  # Libraries (cmake/Dependencies.cmake)
  libabsl-dev libboost1.81-dev libcli11-dev libcpp-httplib-dev libeigen3-dev libfmt-dev libgrpc++-dev
  libgrpc-dev libhwy-dev libprotobuf-dev libsentencepiece-dev libspdlog-dev libssl-dev libxxhash-dev
  libyaml-cpp-dev nlohmann-json3-dev prometheus-cpp-dev zlib1g-dev
  # Tests and benchmarks
  ca-certificates curl libbenchmark-dev libgmock-dev libgtest-dev openssl python3 python3-venv
  # Formatter and linter
  clang-format clang-tidy
)
if [[ "${1:-}" == fuzz ]]; then packages+=(clang libclang-rt-14-dev); fi

fail() {
  echo "install_packages: $*" >&2
  exit 1
}

is_installed() {
  [[ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" == installed ]]
}

installed=" $(dpkg-query -W -f='${db:Status-Status}=${Package} ' "${packages[@]}" 2>/dev/null || true)"
missing=()
for package in "${packages[@]}"; do
  [[ "${installed}" == *" installed=${package} "* ]] || missing+=("${package}")
done
if ((${#missing[@]} == 0)); then exit 0; fi

distribution="$(. /etc/os-release 2>/dev/null && echo "${ID:-unknown} ${VERSION_ID:-}" || true)"
[[ "${distribution}" == "debian 12" ]] ||
  fail "this is '${distribution:-unknown}', not Debian 12; install what corresponds to: ${missing[*]}"

as_root=()
if ((EUID != 0)); then
  command -v sudo >/dev/null ||
    fail "needs root or sudo to install: ${missing[*]}"
  as_root=(sudo)
fi

if [[ " ${missing[*]} " == *" libboost1.81-dev "* ]] && is_installed libboost1.74-dev; then
  echo "install_packages: libboost1.81-dev replaces libboost1.74-dev; apt removes the latter" >&2
fi

echo "install_packages: installing ${missing[*]}" >&2
"${as_root[@]}" apt-get update -q || fail "apt-get update failed; still missing: ${missing[*]}"
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -q -y --no-install-recommends "${missing[@]}" ||
  fail "apt-get install failed; still missing: ${missing[*]}"
