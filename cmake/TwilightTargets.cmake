# Helpers that define the layers of the library.

add_library(twilight_warnings INTERFACE)
target_compile_options(twilight_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor -Wno-missing-field-initializers>
  $<$<AND:$<BOOL:${TWILIGHT_WERROR}>,$<COMPILE_LANGUAGE:CXX>>:-Werror>)

# GCC's variable tracking takes several times as long as the rest of an instrumented scalar kernel,
# minutes a unit; without it reports still name files and lines.
add_library(twilight_sanitizers INTERFACE)
if(TWILIGHT_SANITIZE)
  target_compile_options(twilight_sanitizers INTERFACE
    -fsanitize=${TWILIGHT_SANITIZE} -fno-omit-frame-pointer -fno-sanitize-recover=all
    $<$<CXX_COMPILER_ID:GNU>:-fno-var-tracking>)
  target_link_options(twilight_sanitizers INTERFACE -fsanitize=${TWILIGHT_SANITIZE})
endif()

if(TWILIGHT_ENABLE_CLANG_TIDY)
  find_program(TWILIGHT_CLANG_TIDY clang-tidy REQUIRED)
endif()

# Settings that every target of ours shares.
function(twilight_defaults target)
  target_link_libraries(${target} PRIVATE twilight_warnings twilight_sanitizers)
  if(TWILIGHT_ENABLE_CLANG_TIDY)
    set_target_properties(${target} PROPERTIES CXX_CLANG_TIDY "${TWILIGHT_CLANG_TIDY}")
  endif()
endfunction()

# twilight_layer(NAME SOURCES ... DEPS ... LIBS ...)
# One folder of src/: an object library (for libtwilight) and a static library of the same objects
# (for tests of internals). DEPS are lower layers, LIBS outside libraries.
set_property(GLOBAL PROPERTY TWILIGHT_LAYERS "")
function(twilight_layer name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS;LIBS" ${ARGN})
  set(objects twilight_${name}_objects)
  add_library(${objects} OBJECT ${ARG_SOURCES})
  twilight_defaults(${objects})
  target_include_directories(${objects} PUBLIC
    ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(${objects} PRIVATE TWILIGHT_BUILDING)
  target_link_libraries(${objects} PRIVATE ${ARG_LIBS})

  set(static twilight_${name})
  add_library(${static} STATIC EXCLUDE_FROM_ALL $<TARGET_OBJECTS:${objects}>)
  target_include_directories(${static} PUBLIC
    ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(${static} PUBLIC ${ARG_LIBS} twilight_sanitizers)
  foreach(dep ${ARG_DEPS})
    target_link_libraries(${static} PUBLIC twilight_${dep})
  endforeach()
  set_property(GLOBAL APPEND PROPERTY TWILIGHT_LAYERS ${name})
  set_property(GLOBAL APPEND PROPERTY TWILIGHT_LAYER_LIBS ${ARG_LIBS})
endfunction()
