rockspec_format = "3.0"
package = "moonlet"
version = "scm-1"
source = { url = "." }
description = {
  summary = "Run and quantize Qwen3.5 / Qwen3.6 models from Lua",
  license = "Apache-2.0",
}
dependencies = { "lua ~> 5.4", "argparse" }
build = {
  type = "cmake",
  variables = {
    CMAKE_BUILD_TYPE = "RelWithDebInfo",
    CMAKE_INSTALL_PREFIX = "$(PREFIX)",
    LUA_INCLUDE_DIR = "$(LUA_INCDIR)",
    MOONLET_LUA_DIR = "$(LUADIR)",
    MOONLET_LIB_DIR = "$(LIBDIR)",
  },
}
test = { type = "command", command = "busted" }
