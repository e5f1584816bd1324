#!/usr/bin/env bash
# Creates build/venv with the Python packages of tests/requirements.txt. Does nothing while the
# requirements are unchanged.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=build/venv
requirements=tests/requirements.txt
stamp="${venv}/requirements.sha256"

wanted="$(sha256sum "${requirements}")"
if [[ -f "${stamp}" && "$(<"${stamp}")" == "${wanted}" ]]; then exit 0; fi

echo "python_env: installing ${requirements} into ${venv}" >&2
rm -rf "${venv}"
python3 -m venv "${venv}"
"${venv}/bin/pip" install --quiet --disable-pip-version-check -r "${requirements}" || {
  echo "python_env: cannot install ${requirements}; the end-to-end tests need these packages" >&2
  exit 1
}
echo "${wanted}" >"${stamp}"
