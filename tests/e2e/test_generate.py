"""The offline command: same processes, no HTTP."""
import subprocess

from server import BIN, DEVICE, POET, ROOT, golden_cases


def test_generate_prints_the_golden_text():
    (case,) = [c for c in golden_cases() if "解析三首李白的诗" in c["prompt"]]
    result = subprocess.run(
        [str(BIN / "wintserve"), "generate", "--model", str(POET), "--device", DEVICE, "--prompt", "解析三首李白的诗",
         "--temperature", "0.7", "--top-p", "0", "--max-tokens", "96"],
        cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == case["greedy"]["text"].rstrip("\n")


def test_generate_fails_when_its_output_cannot_be_written():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [str(BIN / "wintserve"), "generate", "--model", str(POET), "--device", DEVICE, "--prompt", "the moon", "--max-tokens", "8"],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 70
    assert "cannot write to stdout: No space left on device" in result.stderr
