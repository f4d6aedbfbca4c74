--- Where the #oracle specs find the stock libraries: $MOONLET_ORACLE, which .ci/oracle fills.
local oracle = {}

function oracle.dir()
  return assert(os.getenv "MOONLET_ORACLE", "MOONLET_ORACLE is not set: see CONTRIBUTING.md")
end

function oracle.python()
  return oracle.dir() .. "/venv/bin/python"
end

return oracle
