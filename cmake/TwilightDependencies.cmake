# Libraries from the distribution; scripts/install_deps.sh installs them. Why each is here:
#   Highway        portable SIMD for the CPU kernels
#   oneDNN         matrix products of the prefill (bf16 and f32)
#   OpenMP         oneDNN's own threading; held to one thread per call
#   nlohmann/json  config.json, tokenizer.json, safetensors headers, JSON reports
#   PCRE2          pre-tokeniser patterns with Unicode classes and look-ahead
#   SentencePiece  tokenizer.model files
#   utf8proc       Unicode normal forms of tokenizers
#   CLI11          command line of the program
#   cpp-httplib    HTTP parsing and responses of the server
#   prometheus-cpp metrics of the server: histograms and text format
#   GoogleTest     tests
include(FindPkgConfig)
find_package(Threads REQUIRED)
find_package(OpenMP REQUIRED COMPONENTS CXX)
find_package(dnnl REQUIRED)
find_package(nlohmann_json 3.10 REQUIRED)
pkg_check_modules(HWY REQUIRED IMPORTED_TARGET libhwy)
pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(SENTENCEPIECE REQUIRED IMPORTED_TARGET sentencepiece)
pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)
if(TWILIGHT_BUILD_APPS)
  find_package(CLI11 REQUIRED)
  pkg_check_modules(HTTPLIB REQUIRED IMPORTED_TARGET cpp-httplib)
  pkg_check_modules(PROMETHEUS REQUIRED IMPORTED_TARGET prometheus-cpp-core)
endif()
if(TWILIGHT_BUILD_TESTS)
  find_package(GTest REQUIRED)
endif()
