# Builds _native_cuda: the module of csrc/*/cuda*.cu for the chips of OMNIMAMBA_CUDA_ARCHS, and the PTX of the first of them
# that newer chips can take. What ptxas says of each kernel goes to a .txt beside each object file.
include(CheckLanguage)
set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
set(architectures "")
foreach(chip IN LISTS OMNIMAMBA_CUDA_ARCHS)
  if(architectures STREQUAL "" AND chip MATCHES "^[0-9]+$")
    list(APPEND architectures "${chip}")  # machine code and PTX
  else()
    list(APPEND architectures "${chip}-real")
  endif()
endforeach()
set(CMAKE_CUDA_ARCHITECTURES "${architectures}")
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  omnimamba_stop("nvcc does not work with ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}: install a compiler that it supports and reinstall")
endif()
enable_language(CUDA)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")

file(GLOB kernels CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/*/cuda*.cu")
set(CMAKE_CUDA_COMPILER_LAUNCHER "${Python_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/csrc/keep_log.py")
pybind11_add_module(_native_cuda MODULE NO_EXTRAS "${CMAKE_SOURCE_DIR}/csrc/bindings.cpp" ${kernels})
target_compile_features(_native_cuda PRIVATE cxx_std_17 cuda_std_17)
target_include_directories(_native_cuda PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
target_compile_definitions(_native_cuda PRIVATE OMNIMAMBA_MODULE=_native_cuda OMNIMAMBA_CUDA)
target_compile_options(_native_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-fvisibility=hidden>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fvisibility=hidden -Xptxas=-v>)
set_target_properties(_native_cuda PROPERTIES
  CUDA_RUNTIME_LIBRARY Static
  LIBRARY_OUTPUT_DIRECTORY "${OMNIMAMBA_OUTPUT}")
target_link_options(_native_cuda PRIVATE "LINKER:--exclude-libs,ALL")
file(WRITE "${CMAKE_BINARY_DIR}/built.json" "{\"nvcc\": \"${CMAKE_CUDA_COMPILER_VERSION}\"}\n")
