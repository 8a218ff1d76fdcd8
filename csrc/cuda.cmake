# Builds _native_cuda: the module of csrc/*/cuda*.cu for the chips of OMNIMAMBA_CUDA_ARCHS, and the PTX of the first of them
# that newer chips can take; cuda_sm90*.cu for 90a alone, and only where that is among them. What ptxas says of each kernel
# goes to a .txt beside each object file.
set(CMAKE_CUDA_HOST_COMPILER "${CMAKE_CXX_COMPILER}")
set(CMAKE_CUDA_ARCHITECTURES OFF)  # each source below gets its own
omnimamba_expect("nvcc does not work with ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}: install a compiler that it supports and reinstall")
enable_language(CUDA)
omnimamba_expect("")
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")

set(ptx "")
set(machine_code "")
set(hopper "")
foreach(chip IN LISTS OMNIMAMBA_CUDA_ARCHS)
  if(NOT ptx AND chip MATCHES "^[0-9]+$")
    set(ptx "--generate-code=arch=compute_${chip},code=compute_${chip}")
  endif()
  list(APPEND machine_code "--generate-code=arch=compute_${chip},code=sm_${chip}")
  if(chip STREQUAL "90a")
    set(hopper "--generate-code=arch=compute_90a,code=sm_90a")
  endif()
endforeach()
file(GLOB kernels CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/*/cuda*.cu")
set(kernels_sm90 ${kernels})
list(FILTER kernels_sm90 INCLUDE REGEX "/cuda_sm90[^/]*$")
list(FILTER kernels EXCLUDE REGEX "/cuda_sm90[^/]*$")
set_source_files_properties(${kernels} PROPERTIES COMPILE_OPTIONS "${machine_code};${ptx}")
set(definitions OMNIMAMBA_MODULE=_native_cuda OMNIMAMBA_CUDA)
if(hopper)
  set_source_files_properties(${kernels_sm90} PROPERTIES COMPILE_OPTIONS "${hopper}")
  list(PREPEND kernels ${kernels_sm90})  # they take longest: first
  list(APPEND definitions OMNIMAMBA_SM90)
endif()
set(CMAKE_CUDA_COMPILER_LAUNCHER "${Python_EXECUTABLE}" "${CMAKE_SOURCE_DIR}/csrc/keep_log.py")
set_source_files_properties("${CMAKE_SOURCE_DIR}/csrc/bindings.cpp" PROPERTIES COMPILE_OPTIONS -O1)
pybind11_add_module(_native_cuda MODULE NO_EXTRAS "${CMAKE_SOURCE_DIR}/csrc/bindings.cpp" ${kernels})
target_compile_features(_native_cuda PRIVATE cxx_std_17 cuda_std_17)
target_include_directories(_native_cuda PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
target_compile_definitions(_native_cuda PRIVATE ${definitions})
target_compile_options(_native_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-fvisibility=hidden>
  $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fvisibility=hidden -Xptxas=-v>)
set_target_properties(_native_cuda PROPERTIES
  CUDA_RUNTIME_LIBRARY Static
  LIBRARY_OUTPUT_DIRECTORY "${OMNIMAMBA_OUTPUT}")
target_link_options(_native_cuda PRIVATE "LINKER:--exclude-libs,ALL")
file(WRITE "${CMAKE_BINARY_DIR}/built.json" "{\"nvcc\": \"${CMAKE_CUDA_COMPILER_VERSION}\"}\n")
