"""The files of deploy/ that others read."""
import re
import shutil
import subprocess

import pytest

from server import BIN, ROOT

UNIT = ROOT / "deploy/systemd/wintserve.service"


def settings():
    lines = [line.split("=", 1) for line in UNIT.read_text().splitlines() if re.match(r"\w+=", line)]
    return {name: value for name, value in lines}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    here = tmp_path / "wintserve.service"
    here.write_text(UNIT.read_text().replace("/opt/wintserve/bin", str(BIN)))
    done = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, timeout=60)
    # It ends with 0 when it ignores a setting, too.
    said = [line for line in (done.stdout + done.stderr).splitlines() if here.name in line]
    assert done.returncode == 0 and not said, done.stderr


def test_systemd_stops_the_launcher_alone_and_gives_it_the_time_it_needs():
    unit = settings()
    assert unit["KillMode"] == "mixed"
    drain_s = int(re.search(r"--drain-timeout (\d+)", unit["ExecStart"])[1])
    source = (ROOT / "launcher/supervisor.cc").read_text()
    grace_ms = int(re.search(r"kStopGrace\((\d+)\)", source)[1])
    # The turns of API server, engine workers and cache manager; killing whoever is left takes no time to speak of.
    least_s = drain_s + 3 * grace_ms / 1000
    assert least_s < int(unit["TimeoutStopSec"]) <= least_s + 10


def test_systemd_does_not_try_again_what_cannot_get_better():
    codes = (ROOT / "common/exit_code.h").read_text()
    vain = {re.search(rf"{name} = (\d+)", codes)[1] for name in ("kExitUsage", "kExitCheckpoint", "kExitConfigFile")}
    assert set(settings()["RestartPreventExitStatus"].split()) == vain
