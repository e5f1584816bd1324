#!/usr/bin/env python3
"""Tests of tests/accuracy/quality, with programs that compute nothing."""
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import pathlib
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
TOOL = pathlib.Path(__file__).resolve().with_name("quality")
LOADER = importlib.machinery.SourceFileLoader("quality", str(TOOL))
quality = importlib.util.module_from_spec(importlib.util.spec_from_loader("quality", LOADER))
LOADER.exec_module(quality)

# Notes each call in a file beside itself, fails where that says so, and writes what the real one does.
PROGRAM = f"""#!{sys.executable}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
model = words[words.index("--model") + 1]
name = pathlib.Path(words[words.index("--output") + 1] if words[0] == "quantize" else model).name
with open(here / "calls", "a") as file:
    file.write(f"{{words[0]}} {{name}}\\n")
if (here / "fail").exists() and (here / "fail").read_text() == f"{{words[0]}} {{name}}":
    sys.exit(7)
if words[0] == "quantize":
    output = pathlib.Path(words[words.index("--output") + 1])
    assert not output.exists()
    output.mkdir()
    (output / "model.safetensors").write_bytes(bytes(1 << 20))
    sys.exit(0)
own = words[:words.index("--")]
tasks = []
for flag, measure in (("--chat-loss", "nats per answer token"), ("--perplexity", "nats per token"),
                      ("--exact", "accuracy")):
    for at, word in enumerate(own):
        if word == flag:
            tasks.append({{"file": own[at + 1], "measures": {{measure: {{"value": 0.25, "standard_error": 0.01}}}}}})
pathlib.Path(own[own.index("--json") + 1]).write_text(json.dumps({{"tasks": tasks}}))
"""
ALL_CALLS = ["eval bf16"] + [f"{verb} {name}" for name, (_, flags) in {**quality.VARIANTS, **quality.STEPS}.items() if flags
                             for verb in ("quantize", "eval")]


class Quality(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.root = pathlib.Path(directory.name)
        self.bin, self.evals, self.model = (self.root / name for name in ("bin", "evals", "bf16"))
        for path in (self.bin, self.evals, self.model):
            path.mkdir()
        (self.bin / "wintserve").write_text(PROGRAM)
        (self.bin / "wintserve").chmod(0o755)
        (self.model / "config.json").write_text("{}")
        (self.model / "model.safetensors").write_bytes(bytes(3 << 20))
        for name in (*quality.COLUMNS, "calibration.jsonl"):
            (self.evals / name).write_text("")

    def run_tool(self, *more):
        """(what it printed, the calls of programs that it made)"""
        calls = self.bin / "calls"
        calls.unlink(missing_ok=True)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            quality.main(["--model", str(self.model), "--evals", str(self.evals), "--bin", str(self.bin),
                          "--work", str(self.root / "work"), *more])
        return output.getvalue(), calls.read_text().splitlines() if calls.exists() else []

    def test_every_variant_is_made_and_measured_once(self):
        output, calls = self.run_tool()
        self.assertEqual(calls, ALL_CALLS)
        self.assertIn("| BF16 | 0.250 | 0.250 | 25.0% | 25.0% | 3.0 |  | 0 s |", output)
        self.assertIn("| WINT4 | 0.250 | 0.250 | 25.0% | 25.0% | 1.0 | 0 s | 0 s |", output)
        again, calls = self.run_tool()
        self.assertEqual(calls, [])
        self.assertIn("| WINT4 | 0.250 |", again)

    def test_an_interrupted_run_goes_on_where_it_was(self):
        (self.bin / "fail").write_text("eval wint4")
        with self.assertRaises(SystemExit) as ended:
            self.run_tool()
        self.assertIn("exit code 7", str(ended.exception))
        (self.bin / "fail").unlink()
        _, calls = self.run_tool()
        self.assertEqual(calls, ALL_CALLS[ALL_CALLS.index("eval wint4"):])

    def test_other_programs_make_everything_anew(self):
        self.run_tool()
        (self.bin / "wintserve-quantize").write_text("another")
        _, calls = self.run_tool()
        self.assertEqual(calls, ALL_CALLS)

    def test_a_checkpoint_made_with_other_flags_is_made_and_measured_anew(self):
        self.run_tool()
        path = self.root / "work/wint8.quantize.json"
        record = json.loads(path.read_text())
        record["command"].append("--another-flag")
        path.write_text(json.dumps(record))
        _, calls = self.run_tool()
        self.assertEqual(calls, ["quantize wint8", "eval wint8"])

    def test_a_row_of_both_tables_is_made_once_and_has_a_title_in_each(self):
        output, calls = self.run_tool("--only", "wint2-calibrated-experts")
        self.assertEqual(calls, ["quantize wint2-calibrated-experts", "eval wint2-calibrated-experts"])
        self.assertIn("| WINT2 calibrated, 2-bit experts only | 0.250 | 0.250 | 25.0% | 25.0% | 1.0 | 0 s | 0 s |", output)
        self.assertIn("| the default with all 4,096 records | 0.250 | 0.250 | 25.0% | 25.0% | 0 s | 0 s |", output)

    def test_steps_differ_by_their_flags(self):
        commands = [tuple(flags) for _, flags in quality.STEPS.values()]
        self.assertEqual(len(set(commands)), len(commands))

    def test_only_the_variants_that_are_asked_for_are_made(self):
        _, calls = self.run_tool("--only", "wint8")
        self.assertEqual(calls, ["quantize wint8", "eval wint8"])

    def test_the_table_goes_between_the_marks_of_a_file(self):
        page = self.root / "QUALITY.md"
        page.write_text("before\n<!-- quality: begin -->\nold\n<!-- quality: end -->\nafter\n")
        self.run_tool("--write", str(page))
        text = page.read_text()
        self.assertTrue(text.startswith("before\n<!-- quality: begin -->\n"))
        self.assertTrue(text.endswith("\n<!-- quality: end -->\nafter\n"))
        self.assertNotIn("old", text)
        self.assertIn("| WINT8 | 0.250 |", text)
        self.assertIn("    wintserve quantize --model POET_BF16 --output wint8 --scheme wint8", text)
        self.assertNotIn(str(self.root), text)

    def test_a_recorded_run_gives_the_same_page_without_programs(self):
        first, second = self.root / "first.md", self.root / "second.md"
        for page in (first, second):
            page.write_text("<!-- quality: begin -->\n<!-- quality: end -->\n")
        report = self.root / "report.json"
        self.run_tool("--only", "wint8", "--json", str(report), "--write", str(first))
        with contextlib.redirect_stdout(io.StringIO()):
            quality.main(["--render", str(report), "--write", str(second)])
        self.assertEqual(first.read_text(), second.read_text())

    def test_what_is_missing_is_named_before_anything_runs(self):
        (self.evals / "recite.jsonl").unlink()
        with contextlib.redirect_stderr(io.StringIO()) as error, self.assertRaises(SystemExit) as ended:
            self.run_tool()
        self.assertEqual(ended.exception.code, 2)
        self.assertIn("recite.jsonl is not there", error.getvalue())


if __name__ == "__main__":
    unittest.main()
