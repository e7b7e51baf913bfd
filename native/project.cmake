# The training pass (project.h): its own files and the instruction sets they are compiled for.
target_sources(nmflow_native PRIVATE project_entry.cpp project_portable.cpp project_avx2.cpp project_avx512.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set_source_files_properties(project_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mf16c;-mpopcnt")
  # GCC 12 takes the undefined pass-through operands of its own intrinsics for mistakes.
  set_source_files_properties(project_avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mpopcnt;-Wno-maybe-uninitialized;-Wno-uninitialized")
endif()
