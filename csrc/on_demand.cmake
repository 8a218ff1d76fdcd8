# Builds _native_cuda without nvcc: the host's part of csrc/*/cuda*.cu as C++, in which kernels are names that NVRTC compiles
# when they are first started (common/on_demand.h). The module is also built for the tests, beside the emulator.
file(GLOB kernels CONFIGURE_DEPENDS "${CMAKE_SOURCE_DIR}/csrc/*/cuda*.cu")
foreach(kernel IN LISTS kernels)
  file(RELATIVE_PATH source "${CMAKE_SOURCE_DIR}/csrc" "${kernel}")
  set_source_files_properties("${kernel}" PROPERTIES
    LANGUAGE CXX COMPILE_OPTIONS "-xc++" COMPILE_DEFINITIONS "OMNIMAMBA_SOURCE=\"${source}\"")
endforeach()
set(CMAKE_CXX_FLAGS_RELEASE "-O1")
pybind11_add_module(_native_cuda MODULE NO_EXTRAS
  "${CMAKE_SOURCE_DIR}/csrc/bindings.cpp" "${CMAKE_SOURCE_DIR}/csrc/common/on_demand.cpp" ${kernels})
target_compile_features(_native_cuda PRIVATE cxx_std_17)
target_include_directories(_native_cuda PRIVATE "${CMAKE_SOURCE_DIR}/csrc")
# The emulator's headers let a C++ compiler read the kernels; what it makes of them is dropped.
target_compile_definitions(_native_cuda PRIVATE
  OMNIMAMBA_MODULE=_native_cuda OMNIMAMBA_CUDA OMNIMAMBA_SM90 OMNIMAMBA_EMULATED OMNIMAMBA_ON_DEMAND)
target_compile_options(_native_cuda PRIVATE -fvisibility=hidden -ffunction-sections -fdata-sections -Wno-unknown-pragmas
  -Wno-psabi)
target_link_options(_native_cuda PRIVATE "LINKER:--gc-sections")
target_link_libraries(_native_cuda PRIVATE ${CMAKE_DL_LIBS})
set_target_properties(_native_cuda PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${OMNIMAMBA_OUTPUT}")
file(WRITE "${CMAKE_BINARY_DIR}/built.json" "{}")
