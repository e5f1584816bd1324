"""The offline command: same processes, no HTTP."""
import subprocess

from server import BIN, POET, ROOT, golden_cases

# So hot that no end of the text comes first.
LONG = [str(BIN / "wintserve"), "generate", "--model", str(POET), "--raw", "--prompt", "the moon", "--temperature", "2",
        "--seed", "1", "--max-model-len", "8192", "--max-tokens", "8000"]


def test_generate_prints_the_golden_text():
    (case,) = [c for c in golden_cases() if "解析三首李白的诗" in c["prompt"]]
    result = subprocess.run(
        [str(BIN / "wintserve"), "generate", "--model", str(POET), "--prompt", "解析三首李白的诗",
         "--temperature", "0.7", "--top-p", "0", "--max-tokens", "96"],
        cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.rstrip("\n") == case["greedy"]["text"].rstrip("\n")


def test_generate_ends_quietly_when_nobody_reads_any_more():
    with subprocess.Popen(LONG, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.wait(60) == 0, process.stderr.read()
        assert process.stderr.read() == ""


def test_generate_names_what_keeps_it_from_printing():
    with open("/dev/full", "w") as full:
        result = subprocess.run(LONG, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 70
    assert "cannot write to stdout: No space left on device" in result.stderr
