# Installs a build tree into an empty prefix. BUILD_DIR, PREFIX, CONFIG.
file(REMOVE_RECURSE ${PREFIX})
execute_process(
  COMMAND ${CMAKE_COMMAND} --install ${BUILD_DIR} --prefix ${PREFIX} --config "${CONFIG}"
  COMMAND_ERROR_IS_FATAL ANY)
foreach(file
    include/twilight/c.h include/twilight/attention.h
    share/twilight/models/vesper-19m/config.json share/twilight/data/Persuasion.txt)
  if(NOT EXISTS ${PREFIX}/${file})
    message(FATAL_ERROR "${file} was not installed")
  endif()
endforeach()
file(GLOB headers ${PREFIX}/include/twilight/*)
list(LENGTH headers count)
if(count GREATER 10)
  message(FATAL_ERROR "${count} installed headers, accepted up to 10")
endif()
