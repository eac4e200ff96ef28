# A library that older systems load too.
#
# glibc 2.34 moved threads, dlopen and shared memory from libpthread, libdl and librt into libc, under a new symbol version,
# and what is linked on such a system asks for that version: older systems refuse it. The old names are still there, so it
# is enough to show the linker libraries of those names, first, that have them in their old version and nothing else. They
# are made here, from cmake/old_glibc/*.map; none is installed, and the systems' own are used at run time. Whether that was
# all is checked by auditwheel (docs/releasing.md).
function(link_old_glibc target)
  if(NOT CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
    message(FATAL_ERROR "HIP_TRT_OLD_GLIBC: cmake/old_glibc has the symbol versions of x86_64 only")
  endif()
  foreach(library pthread dl rt)
    set(map ${CMAKE_CURRENT_SOURCE_DIR}/cmake/old_glibc/${library}.map)
    file(READ ${map} text)
    string(REPLACE ";" "" text "${text}")
    string(REGEX MATCHALL "\n        [a-z_]+" names "${text}")
    set(source "")
    foreach(name ${names})
      string(STRIP "${name}" name)
      string(APPEND source "extern \"C\" void ${name}() {}\n")
    endforeach()
    file(CONFIGURE OUTPUT old_glibc/${library}.cpp CONTENT "${source}" @ONLY)
    add_library(old_${library} SHARED ${CMAKE_CURRENT_BINARY_DIR}/old_glibc/${library}.cpp)
    set_target_properties(old_${library} PROPERTIES LIBRARY_OUTPUT_DIRECTORY old_glibc NO_SONAME ON)
    set(version_of_pthread 0)
    set(version_of_dl 2)
    set(version_of_rt 1)
    target_link_options(old_${library} PRIVATE -nostdlib
      LINKER:--version-script=${map} LINKER:-soname,lib${library}.so.${version_of_${library}})
    target_link_libraries(${target} PRIVATE old_${library})
  endforeach()
endfunction()
