--- Where the #oracle specs find the stock libraries: $MOONLET_ORACLE, which .ci/oracle fills.
local oracle = {}

function oracle.dir()
  return assert(os.getenv "MOONLET_ORACLE", "MOONLET_ORACLE is not set: see CONTRIBUTING.md")
end

function oracle.python()
  return oracle.dir() .. "/venv/bin/python"
end

---Runs spec/oracle/`script` with arguments that need no quotes; fails with what it says.
function oracle.run(script, arguments)
  local p = assert(io.popen(("%s spec/oracle/%s %s 2>&1"):format(oracle.python(), script,
    table.concat(arguments, " "))))
  local said = p:read("a")
  assert(p:close(), said)
end

return oracle
