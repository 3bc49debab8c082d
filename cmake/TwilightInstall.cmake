# Install rules and the CMake package:
#   find_package(twilight REQUIRED)
#   target_link_libraries(app PRIVATE twilight::twilight)
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/twilight)
install(TARGETS twilight EXPORT twilightTargets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/twilight
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
install(EXPORT twilightTargets NAMESPACE twilight:: DESTINATION ${package_dir})

# While the version is 0.x a minor release may change the interface.
get_target_property(twilight_type twilight TYPE)
string(COMPARE EQUAL ${twilight_type} STATIC_LIBRARY twilight_is_static)
configure_package_config_file(
  ${PROJECT_SOURCE_DIR}/cmake/twilightConfig.cmake.in
  ${PROJECT_BINARY_DIR}/twilightConfig.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(
  ${PROJECT_BINARY_DIR}/twilightConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/twilightConfig.cmake
  ${PROJECT_BINARY_DIR}/twilightConfigVersion.cmake
  DESTINATION ${package_dir})

if(TARGET twilight_program)
  if(BUILD_SHARED_LIBS)
    file(RELATIVE_PATH lib_from_bin
      ${CMAKE_INSTALL_FULL_BINDIR} ${CMAKE_INSTALL_FULL_LIBDIR})
    set_target_properties(twilight_program PROPERTIES INSTALL_RPATH "$ORIGIN/${lib_from_bin}")
  endif()
  install(TARGETS twilight_program RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
endif()

# The program looks for its data in ../share/twilight of the folder it lies in.
set(data_dir ${CMAKE_INSTALL_DATADIR}/twilight)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/models/vesper-19m DESTINATION ${data_dir}/models)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/data/ DESTINATION ${data_dir}/data)
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})
