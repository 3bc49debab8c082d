# The CUDA backend's toolchain; included only where TWILIGHT_ENABLE_CUDA is on. Ahead-of-time code
# for Ampere, Ada and Hopper, and PTX for what comes later.
set(TWILIGHT_CUDA_ARCHITECTURES "80-real;86-real;89-real;90-real;90-virtual" CACHE STRING
  "GPU architectures to compile for")
set(CMAKE_CUDA_ARCHITECTURES ${TWILIGHT_CUDA_ARCHITECTURES})
enable_language(CUDA)
find_package(CUDAToolkit 12.4 REQUIRED)

set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
# CMake before 3.26 does not know nvcc's flag for it.
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

# constexpr helpers of the formats are shared with device code. Register and spill counts of every
# kernel are checked by scripts/cuda_resources.py.
target_compile_options(twilight_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -lineinfo -Xcompiler=-Wall,-Wextra,-Wshadow>
  $<$<AND:$<BOOL:${TWILIGHT_WERROR}>,$<COMPILE_LANGUAGE:CUDA>>:-Werror=all-warnings>)
