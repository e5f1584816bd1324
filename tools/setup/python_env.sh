#!/usr/bin/env bash
# Creates a virtual environment with the packages of a requirements file. Does nothing while the
# requirements are unchanged.
#   tools/setup/python_env.sh [VENV REQUIREMENTS]     by default build/venv, tests/requirements.txt
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${1:-build/venv}
requirements=${2:-tests/requirements.txt}
stamp="${venv}/requirements.sha256"

wanted="$(sha256sum "${requirements}")"
if [[ -f "${stamp}" && "$(<"${stamp}")" == "${wanted}" ]]; then exit 0; fi

echo "python_env: installing ${requirements} into ${venv}" >&2
rm -rf "${venv}"
python3 -m venv "${venv}"
"${venv}/bin/pip" install --quiet --disable-pip-version-check -r "${requirements}" || {
  echo "python_env: cannot install the packages of ${requirements}" >&2
  exit 1
}
echo "${wanted}" >"${stamp}"
