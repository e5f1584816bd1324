# Helpers that declare a room's targets. Dependencies are listed by target name, so a call into a
# room that is not listed fails to link.
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

add_library(wintserve_options INTERFACE)
target_include_directories(wintserve_options INTERFACE ${CMAKE_SOURCE_DIR} ${CMAKE_BINARY_DIR})
target_compile_options(wintserve_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -fno-omit-frame-pointer>)
target_compile_definitions(wintserve_options INTERFACE
  SPDLOG_FMT_EXTERNAL BOOST_ASIO_NO_DEPRECATED WINTSERVE_VERSION="${PROJECT_VERSION}")
target_link_options(wintserve_options INTERFACE -Wl,--exclude-libs,libprotobuf.a)
if(CMAKE_CXX_COMPILER_ID MATCHES Clang)
  target_compile_options(wintserve_options INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wthread-safety>)
endif()
if(SANITIZE)
  target_compile_options(wintserve_options INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-fsanitize=${SANITIZE} -fno-sanitize-recover=all -O1>)
  target_link_options(wintserve_options INTERFACE -fsanitize=${SANITIZE})
  if(SANITIZE MATCHES thread)
    # TSan does not see Asio's stand-alone fences.
    target_compile_definitions(wintserve_options INTERFACE BOOST_ASIO_DISABLE_FENCED_BLOCK)
  endif()
endif()

if(ENABLE_CUDA)
  if(EVERY_LANE_ARRIVES)
    add_compile_definitions(WINTSERVE_EVERY_LANE_ARRIVES)
  endif()
  # -lineinfo costs nothing at run time and lets compute-sanitizer and profilers name source lines.
  set(cuda_options --Werror all-warnings -Xcompiler=-Wall,-Wextra,-Werror,-fno-omit-frame-pointer
      -lineinfo --expt-relaxed-constexpr)
  # Everything that needs nvcc, and the tests that need a GPU: `make test` builds it.
  add_custom_target(cuda_objects)
  add_custom_target(gpu_tests)
  add_dependencies(cuda_objects gpu_tests)
  # tools/bundle installs programs and tests beside a lib/ with what they link to. RPATH, not RUNPATH,
  # so that the libraries find each other there, too.
  set(CMAKE_INSTALL_RPATH "$ORIGIN/../lib")
  add_link_options(-Wl,--disable-new-dtags)
endif()

# room_library(NAME SRCS a.cc DEPS other_room imported::target)
function(room_library name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  if(ARG_SRCS)
    add_library(${name} STATIC ${ARG_SRCS})
    target_link_libraries(${name} PUBLIC wintserve_options ${ARG_DEPS})
  else()
    add_library(${name} INTERFACE)
    target_link_libraries(${name} INTERFACE wintserve_options ${ARG_DEPS})
  endif()
endfunction()

# room_cuda_library(NAME SRCS a.cc b.cu DEPS other_room): the same, and its sources may include the
# CUDA runtime. Only where ENABLE_CUDA is on.
function(room_cuda_library name)
  room_library(${name} ${ARGN})
  get_target_property(type ${name} TYPE)
  if(NOT type STREQUAL INTERFACE_LIBRARY)
    target_compile_options(${name} PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_options}>")
    # fmt 9 takes nvcc for a compiler without constexpr; its check of format strings fails then.
    target_compile_definitions(${name} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:FMT_USE_CONSTEXPR=1>)
    target_link_libraries(${name} PUBLIC CUDA::cudart_static)
    add_dependencies(cuda_objects ${name})
  endif()
endfunction()

# Builds every program, and no test.
add_custom_target(programs)

# room_binary(wintserve-api-server SRCS main.cc DEPS http): lands in build/<preset>/bin.
function(room_binary name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE wintserve_options ${ARG_DEPS})
  add_dependencies(programs ${name})
  install(TARGETS ${name} RUNTIME DESTINATION bin COMPONENT programs)
endfunction()

# room_test(NAME SRCS a_test.cc DEPS room LABELS unit [TIMEOUT seconds] [ARGS …])
# Labels: unit (no process, no port), e2e (real processes), gpu. The working directory is the
# repository root, so a test names committed data by its path from there.
function(room_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SRCS;DEPS;LABELS;ARGS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE wintserve_options ${ARG_DEPS} GTest::gmock GTest::gtest_main)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name} ${ARG_ARGS} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(SANITIZE)
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 3")  # checked debug code, on shared machines
  endif()
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
  if("gpu" IN_LIST ARG_LABELS)
    add_dependencies(gpu_tests ${name})
    install(TARGETS ${name} RUNTIME DESTINATION tests COMPONENT gpu_tests EXCLUDE_FROM_ALL)
  endif()
  if(SANITIZE MATCHES thread)
    set_tests_properties(${name} PROPERTIES ENVIRONMENT
      "TSAN_OPTIONS=suppressions=${CMAKE_SOURCE_DIR}/cmake/tsan.suppressions:ignore_noninstrumented_modules=1")
  endif()
endfunction()

# Builds every benchmark.
add_custom_target(benchmarks)

# room_benchmark(NAME SRCS a_bench.cc DEPS room): Google Benchmark, lands in build/<preset>/bench.
function(room_benchmark name)
  cmake_parse_arguments(ARG "" "" "SRCS;DEPS" ${ARGN})
  add_executable(${name} ${ARG_SRCS})
  target_link_libraries(${name} PRIVATE wintserve_options ${ARG_DEPS} benchmark::benchmark)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bench)
  add_dependencies(benchmarks ${name})
endfunction()
