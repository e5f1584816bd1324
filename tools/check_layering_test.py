#!/usr/bin/env python3
"""Tests of tools/check_layering: each builds a small tree and reads what the tool says about it."""

import importlib.machinery
import importlib.util
import os
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
TOOL = os.path.join(os.path.dirname(os.path.abspath(__file__)), "check_layering")
LOADER = importlib.machinery.SourceFileLoader("check_layering", TOOL)
check_layering = importlib.util.module_from_spec(
    importlib.util.spec_from_loader("check_layering", LOADER))
LOADER.exec_module(check_layering)


def findings(files):
    """files: path -> content. Sources are listed in one CMakeLists.txt unless the tree has its own."""
    tree = dict(files)
    if "CMakeLists.txt" not in tree:
        tree["CMakeLists.txt"] = " ".join(path for path in files if path.endswith((".cc", ".cu")))
    with tempfile.TemporaryDirectory() as root:
        for path, content in tree.items():
            os.makedirs(os.path.join(root, os.path.dirname(path)), exist_ok=True)
            with open(os.path.join(root, path), "w", encoding="utf-8") as file:
                file.write(content)
        return check_layering.Checker(root).run()


class Includes(unittest.TestCase):
    def assert_one_finding(self, files, *parts):
        found = findings(files)
        self.assertEqual(len(found), 1, found)
        for part in parts:
            self.assertIn(part, found[0])

    def test_an_allowed_include_passes(self):
        self.assertEqual(findings({
            "kernels/cpu/matmul.cc": '#include "kernels/formats/matrix.h"\n#include <vector>\n',
            "api_server/http/server.cc": '#include "boost/asio.hpp"\n#include "common/log.h"\n',
            "cache_manager/service/service.cc": '#include "proto/cache.grpc.pb.h"\n',
            "tools/quantizer/forward/text.cc": '#include "api_server/text/tokenizer.h"\n',
        }), [])

    def test_a_forbidden_include_is_named_with_its_place_and_the_rule(self):
        self.assert_one_finding(
            {"api_server/llm/llm.cc": '\n#include "kernels/backend.h"\n'},
            'api_server/llm/llm.cc:2: includes "kernels/backend.h" of kernels',
            "api_server/llm may include only itself and: common, api_server/scheduler")

    def test_angle_brackets_hide_nothing(self):
        self.assert_one_finding({"common/log.cc": "#  include <launcher/supervisor.h>\n"},
                                "common/log.cc:1:")

    def test_an_entry_may_be_a_single_header(self):
        self.assertEqual(findings(
            {"engine_worker/runner/runner.cc": '#include "api_server/scheduler/plan.h"\n'}), [])
        self.assert_one_finding(
            {"engine_worker/runner/runner.cc": '#include "api_server/scheduler/request.h"\n'},
            "engine_worker/runner/runner.cc:1:")
        self.assertEqual(findings(
            {"engine_worker/runner/runner.cc": '#include "launcher/client/load_reporter.h"\n'}), [])
        self.assert_one_finding(
            {"engine_worker/runner/runner.cc": '#include "launcher/client/worker_watch.h"\n'},
            "engine_worker/runner/runner.cc:1:")

    def test_an_entry_may_be_one_side_of_a_room(self):
        self.assertEqual(findings(
            {"api_server/llm/llm.cc": '#include "api_server/work_queue/server/server.h"\n'}), [])
        self.assert_one_finding(
            {"api_server/llm/llm.cc": '#include "api_server/work_queue/client/client.h"\n'},
            "api_server/llm/llm.cc:1:")

    def test_a_similar_directory_name_is_not_the_allowed_one(self):
        self.assert_one_finding(
            {"engine_worker/runner/runner.cc": '#include "api_server/work_queue/client2/c.h"\n'},
            "engine_worker/runner/runner.cc:1:")

    def test_tests_and_benchmarks_may_include_anything(self):
        self.assertEqual(findings({
            "api_server/text/a_test.cc": '#include "proto/cache.pb.h"\n',
            "common/a_bench.cc": '#include "kernels/backend.h"\n',
            "tests/e2e/a.cc": '#include "launcher/supervisor.h"\n',
        }), [])

    def test_a_main_may_include_what_its_process_may(self):
        self.assertEqual(findings({
            "engine_worker/main.cc": '#include "engine_worker/runner/runner.h"\n'
                                     '#include "cache_manager/client/cache_client.h"\n'}), [])
        self.assert_one_finding(
            {"engine_worker/main.cc": '#include "api_server/http/server.h"\n'},
            "engine_worker/main.cc:1:", "engine_worker/main.cc may include only")

    def test_an_include_from_the_own_directory_is_reported(self):
        self.assert_one_finding(
            {"common/log.cc": '#include "log.h"\n', "common/log.h": "#pragma once\n"},
            'common/log.cc:1: includes "log.h": write "common/log.h"')

    def test_an_include_in_a_comment_does_not_count(self):
        self.assertEqual(findings({"common/a.cc": '// #include "launcher/supervisor.h"\n'}), [])


class Cycles(unittest.TestCase):
    def test_a_cycle_of_rooms_is_reported_once(self):
        found = findings({
            "kernels/a.cc": '#include "kernels/formats/a.h"\n',
            "kernels/formats/a.cc": '#include "kernels/backend.h"\n',
        })
        cycles = [finding for finding in found if "cycle" in finding]
        self.assertEqual(cycles, [
            "kernels/formats/a.cc:1: closes a cycle of rooms: "
            "kernels -> kernels/formats -> kernels"])

    def test_tests_close_no_cycle(self):
        self.assertEqual(findings({
            "kernels/a.cc": '#include "kernels/formats/a.h"\n',
            "kernels/formats/a_test.cc": '#include "kernels/backend.h"\n',
        }), [])


class StrayFiles(unittest.TestCase):
    def test_an_unlisted_source_is_reported(self):
        self.assertEqual(
            findings({"common/a.cc": "", "common/b.cc": "", "CMakeLists.txt": "f(common/a.cc)"}),
            ["common/b.cc:1: no CMakeLists.txt lists this source"])

    def test_a_source_that_only_a_comment_lists_is_reported(self):
        self.assertEqual(
            findings({"common/a.cc": "", "CMakeLists.txt": "# f(common/a.cc)\n"}),
            ["common/a.cc:1: no CMakeLists.txt lists this source"])

    def test_a_list_is_relative_to_its_own_directory(self):
        self.assertEqual(findings({
            "common/a.cc": "", "common/deep/b.cc": "", "common/c.cc": "", "common/d.cc": "",
            "common/CMakeLists.txt": "f(a.cc deep/b.cc ${CMAKE_CURRENT_SOURCE_DIR}/c.cc "
                                     '"${CMAKE_SOURCE_DIR}/common/d.cc")',
            "CMakeLists.txt": "add_subdirectory(common)",
        }), [])

    def test_a_cmake_lists_that_nothing_adds_is_reported(self):
        self.assertEqual(
            findings({"common/CMakeLists.txt": "", "CMakeLists.txt": "# add_subdirectory(common)"}),
            ["common/CMakeLists.txt:1: no add_subdirectory reaches this CMakeLists.txt"])

    def test_a_missing_pragma_once_is_reported(self):
        self.assertEqual(
            findings({"common/a.h": "// #pragma once\n", "common/b.h": "// B.\n#pragma once\n"}),
            ["common/a.h:1: header without #pragma once"])

    def test_a_header_that_is_included_once_for_each_instruction_set_needs_none(self):
        self.assertEqual(findings({"kernels/cpu/matmul-inl.h": ""}), [])

    def test_a_file_in_no_room_is_reported(self):
        found = findings({"engine/a.cc": ""})
        self.assertEqual(len(found), 1)
        self.assertIn("engine/a.cc:1: lies in no room", found[0])

    def test_build_and_hidden_directories_are_ignored(self):
        self.assertEqual(findings({"build/cpu/a.cc": "", ".cache/b.h": ""}), [])


class CommandLine(unittest.TestCase):
    def test_exits_with_1_only_if_there_is_a_finding(self):
        with tempfile.TemporaryDirectory() as root:
            self.assertEqual(check_layering.main([root]), 0)
            os.mkdir(os.path.join(root, "common"))
            with open(os.path.join(root, "common", "a.h"), "w", encoding="utf-8"):
                pass
            self.assertEqual(check_layering.main([root]), 1)


class Table(unittest.TestCase):
    def test_names_only_rooms_and_their_parts(self):
        for room, entries in check_layering.ALLOWED.items():
            for entry in entries:
                if entry != "*":
                    self.assertIsNotNone(check_layering.room_of(entry + "/"), f"{room}: {entry}")


if __name__ == "__main__":
    unittest.main()
