#!/usr/bin/env python3
"""Tests of bench/serial_time: what it makes of perf's samples."""

import importlib.machinery
import importlib.util
import os
import sys
import unittest

sys.dont_write_bytecode = True
TOOL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "serial_time")
LOADER = importlib.machinery.SourceFileLoader("serial_time", TOOL)
serial_time = importlib.util.module_from_spec(importlib.util.spec_from_loader("serial_time", LOADER))
LOADER.exec_module(serial_time)

RUN = "wintserve::kernels::cpu::ThreadPool::Run(long, long, absl::FunctionRef<void (long, int)>)"
ITEM = "wintserve::quantizer::Multiply(float const*)"
ITEMS = "wintserve::kernels::cpu::ThreadPool::RunItems(int)"
FIRST = 100


def sample(thread, *functions):
    lines = [f"wintserve-quant {thread} "] + [f"\t    {i:x}0 {name}" for i, name in enumerate(functions, 1)]
    return "\n".join(lines) + "\n\n"


def times(*found):
    return serial_time.Times("".join(found), rate=1)


class SerialTime(unittest.TestCase):
    def test_items_of_a_loop_are_not_serial_on_any_thread(self):
        found = times(sample(FIRST, ITEM, ITEMS, RUN, "main"), sample(FIRST + 1, ITEM, ITEMS))
        self.assertEqual((found.all, found.alone), (2, 0))

    def test_items_are_known_where_the_function_that_runs_them_is_inlined(self):
        found = times(sample(FIRST, "__memset_avx512", "wintserve::Fill(long)", "absl::functional_internal::InvokeObject",
                             RUN, "main"))
        self.assertEqual((found.all, found.alone), (1, 0))

    def test_what_the_first_thread_does_outside_is_serial_by_its_innermost_functions(self):
        found = times(sample(FIRST, "__memset_avx512", "wintserve::quantizer::Copy(int)", "wintserve::Make<int>(long)"),
                      sample(FIRST, "[unknown]"), sample(FIRST + 1, "clone"))
        self.assertEqual(found.all, 3)
        self.assertEqual(dict(found.serial), {"quantizer::Copy < Make": 1, "[unknown]": 1})

    def test_waking_the_pool_and_waiting_for_it_are_serial(self):
        found = times(sample(FIRST, "futex_wake", "do_syscall_64", "syscall", RUN, "wintserve::Make()"),
                      sample(FIRST, RUN.split("(")[0], "wintserve::Make()"))
        self.assertEqual((found.calling, found.alone), (2, 2))

    def test_the_report_predicts_by_the_serial_share(self):
        found = times(sample(FIRST, "wintserve::Copy()"), *[sample(FIRST + 1, ITEM, ITEMS)] * 8)
        report = serial_time.report(found, top=5)
        self.assertIn("(11.1 %)", report)
        self.assertIn("at best on  8 cores       2.0 s, 4.5 times one core", report)
        self.assertIn("1.00  Copy", report)

    def test_without_samples_there_is_no_division_by_zero(self):
        self.assertIn("0.00", serial_time.report(times(), top=5))


if __name__ == "__main__":
    unittest.main()
