--- Builds the syntax tree of a template. Follows jinja2/parser.py, with the tags that transformers
--- adds: break, continue and generation. Nodes are tables with `kind` and `line`; the kinds and
--- their fields are listed in `parser.FIELDS`.

local errors = require("moonlet.jinja.errors")
local lexer = require("moonlet.jinja.lexer")
local value = require("moonlet.jinja.value")

local parser = {}

--- Nested tags and nested brackets, and links in one chain such as a + b + c or x|f|g: enough for
--- any template written by a person, and little enough for the Lua stack.
local MAX_NESTING = 100
local MAX_CHAIN = 2000

--- The child nodes of each kind of node, in the order jinja2/nodes.py visits them; a name in
--- brackets holds a list of nodes.
parser.FIELDS = {
  Output = { "[nodes]" }, Data = {}, Name = {}, NSRef = {}, Const = {},
  Tuple = { "[items]" }, List = { "[items]" }, Dict = { "[keys]", "[values]" },
  CondExpr = { "test", "yes", "no" }, Or = { "left", "right" }, And = { "left", "right" },
  Not = { "node" }, Compare = { "left", "[operands]" }, Binary = { "left", "right" },
  Unary = { "node" }, Concat = { "[nodes]" }, Getattr = { "node" }, Getitem = { "node", "arg" },
  Slice = { "start", "stop", "step" },
  Call = { "node", "[args]", "[kwvalues]", "dyn_args", "dyn_kwargs" },
  Filter = { "node", "[args]", "[kwvalues]", "dyn_args", "dyn_kwargs" },
  Test = { "node", "[args]", "[kwvalues]", "dyn_args", "dyn_kwargs" },
  For = { "target", "iter", "[body]", "[else_body]", "test" },
  If = { "test", "[body]", "[elifs]", "[else_body]" },
  Macro = { "[args]", "[defaults]", "[body]" },
  CallBlock = { "call", "[args]", "[defaults]", "[body]" },
  FilterBlock = { "[body]", "filter" }, With = { "[targets]", "[values]", "[body]" },
  Autoescape = { "option", "[body]" }, Block = { "[body]" },
  Assign = { "target", "node" }, AssignBlock = { "target", "filter", "[body]" },
  Break = {}, Continue = {}, NoLoader = {}, Scope = { "[body]" },
}

local Parser = {}
Parser.__index = Parser

-- Tokens --------------------------------------------------------------------------------------

function Parser:fail(message, line, kind)
  errors.raise(kind or "TemplateSyntaxError", message, line or self.current.line)
end

function Parser:next()
  local token = self.current
  if token.type ~= "eof" then
    self.index = self.index + 1
    self.current = self.tokens[self.index]
    if self.current.type == "error" then error(self.current.value, 0) end
  end
  return token
end

function Parser:look()
  return self.tokens[self.index + 1] or self.current
end

function Parser:is(kind) return self.current.type == kind end

local function is_name(token, name)
  return token.type == "name" and token.value == name
end

function Parser:skip_name(name)
  if not is_name(self.current, name) then return false end
  self:next()
  return true
end

function Parser:skip(kind)
  if self.current.type ~= kind then return false end
  self:next()
  return true
end

function Parser:unexpected(expected)
  if self:is("eof") then
    self:fail("unexpected end of template, expected '" .. expected .. "'.")
  end
  self:fail("expected token '" .. expected .. "', got '" .. lexer.describe(self.current) .. "'")
end

function Parser:expect(kind)
  if self.current.type ~= kind then self:unexpected(lexer.describe_type(kind)) end
  return self:next()
end

function Parser:expect_name(name)
  if not is_name(self.current, name) then self:unexpected(name) end
  return self:next()
end

--- Guards recursion: every enter is paired with a leave, errors aside.
function Parser:enter()
  self.depth = self.depth + 1
  if self.depth > MAX_NESTING then
    self:fail("nested deeper than " .. MAX_NESTING .. " levels")
  end
end

function Parser:leave() self.depth = self.depth - 1 end

--- Guards a loop that makes the tree one level deeper per round.
function Parser:link(count)
  if count > MAX_CHAIN then
    self:fail("expression has more than " .. MAX_CHAIN .. " links")
  end
  return count + 1
end

-- Expressions ---------------------------------------------------------------------------------

local function node(kind, line, fields)
  fields.kind, fields.line = kind, line
  return fields
end

function Parser:expression(without_condition)
  self:enter()
  local result = without_condition and self:logic_or() or self:condition()
  self:leave()
  return result
end

function Parser:condition(links)
  local line, count = self.current.line, links or 0
  local yes = self:logic_or()
  while self:skip_name("if") do
    count = self:link(count)
    local test, no = self:logic_or(), nil
    if self:skip_name("else") then no = self:condition(count) end
    yes = node("CondExpr", line, { test = test, yes = yes, no = no })
  end
  return yes
end

function Parser:logic_or()
  local line, count = self.current.line, 0
  local left = self:logic_and()
  while self:skip_name("or") do
    count = self:link(count)
    left = node("Or", line, { left = left, right = self:logic_and() })
  end
  return left
end

function Parser:logic_and()
  local line, count = self.current.line, 0
  local left = self:logic_not()
  while self:skip_name("and") do
    count = self:link(count)
    left = node("And", line, { left = left, right = self:logic_not() })
  end
  return left
end

function Parser:logic_not()
  local line, count = self.current.line, 0
  while self:skip_name("not") do count = self:link(count) end
  local result = self:comparison()
  for _ = 1, count do result = node("Not", line, { node = result }) end
  return result
end

local COMPARISONS = { eq = "==", ne = "!=", lt = "<", lteq = "<=", gt = ">", gteq = ">=" }

function Parser:comparison()
  local line = self.current.line
  local left = self:sum()
  local operators, operands = {}, {}
  while true do
    local op = COMPARISONS[self.current.type]
    if op then
      self:next()
    elseif self:skip_name("in") then
      op = "in"
    elseif is_name(self.current, "not") and is_name(self:look(), "in") then
      self:next()
      self:next()
      op = "not in"
    else
      break
    end
    operators[#operators + 1] = op
    operands[#operands + 1] = self:sum()
  end
  if #operators == 0 then return left end
  return node("Compare", line, { left = left, operators = operators, operands = operands })
end

--- A left-associative level: `operators` maps token types to operators, `operand` parses a side.
local function binary_level(operators, operand)
  return function(self)
    local line, count = self.current.line, 0
    local left = self[operand](self)
    while operators[self.current.type] do
      count = self:link(count)
      local op = operators[self:next().type]
      left = node("Binary", line, { op = op, left = left, right = self[operand](self) })
    end
    return left
  end
end

Parser.sum = binary_level({ add = "+", sub = "-" }, "concat")
Parser.product = binary_level({ mul = "*", div = "/", floordiv = "//", mod = "%" }, "power")
Parser.power = binary_level({ pow = "**" }, "unary")

function Parser:concat()
  local line = self.current.line
  local nodes = { self:product() }
  while self:skip("tilde") do nodes[#nodes + 1] = self:product() end
  if #nodes == 1 then return nodes[1] end
  return node("Concat", line, { nodes = nodes })
end

function Parser:unary(without_filter)
  local line, kind = self.current.line, self.current.type
  local result
  if kind == "sub" or kind == "add" then
    self:next()
    self:enter()
    result = node("Unary", line, { op = kind == "sub" and "-" or "+", node = self:unary(true) })
    self:leave()
  else
    result = self:primary()
  end
  result = self:postfix(result)
  if without_filter then return result end
  return self:filters_and_tests(result)
end

local CONSTANTS = { ["true"] = true, ["True"] = true, ["false"] = false, ["False"] = false,
  none = value.none, None = value.none }

function Parser:primary(with_namespace)
  local token = self.current
  local kind, line = token.type, token.line
  if kind == "name" then
    self:next()
    local constant = CONSTANTS[token.value]
    if constant ~= nil then return node("Const", line, { value = constant }) end
    if with_namespace and self:skip("dot") then
      return node("NSRef", line, { name = token.value, attr = self:expect("name").value })
    end
    return node("Name", line, { name = token.value, ctx = "load" })
  elseif kind == "string" then
    local parts = {}
    while self:is("string") do parts[#parts + 1] = self:next().value end
    return node("Const", line, { value = table.concat(parts) })
  elseif kind == "integer" or kind == "float" then
    self:next()
    return node("Const", line, { value = token.value })
  elseif kind == "lparen" then
    self:next()
    self:enter()
    local result = self:tuple({ parenthesized = true })
    self:leave()
    self:expect("rparen")
    return result
  elseif kind == "lbracket" then
    return self:list()
  elseif kind == "lbrace" then
    return self:dict()
  end
  self:fail("unexpected '" .. lexer.describe(token) .. "'", line)
end

--- One expression, or a tuple when commas follow. Options: `targets` (names and literals only),
--- `with_namespace`, `without_condition`, `parenthesized` (may be empty), `stop` (a name that ends
--- the list).
function Parser:tuple(options)
  local line = self.current.line
  local items, is_tuple = {}, false
  while true do
    if #items > 0 then self:expect("comma") end
    local kind = self.current.type
    if kind == "variable_end" or kind == "block_end" or kind == "rparen"
      or options.stop and is_name(self.current, options.stop) then
      break
    end
    items[#items + 1] = options.targets and self:primary(options.with_namespace)
      or self:expression(options.without_condition)
    if not self:is("comma") then break end
    is_tuple = true
  end
  if not is_tuple then
    if items[1] then return items[1] end
    if not options.parenthesized then
      self:fail("Expected an expression, got '" .. lexer.describe(self.current) .. "'")
    end
  end
  return node("Tuple", line, { items = items })
end

function Parser:list()
  local line = self:expect("lbracket").line
  local items = {}
  while not self:is("rbracket") do
    if #items > 0 then self:expect("comma") end
    if self:is("rbracket") then break end
    items[#items + 1] = self:expression()
  end
  self:expect("rbracket")
  return node("List", line, { items = items })
end

function Parser:dict()
  local line = self:expect("lbrace").line
  local keys, values = {}, {}
  while not self:is("rbrace") do
    if #keys > 0 then self:expect("comma") end
    if self:is("rbrace") then break end
    keys[#keys + 1] = self:expression()
    self:expect("colon")
    values[#values + 1] = self:expression()
  end
  self:expect("rbrace")
  return node("Dict", line, { keys = keys, values = values })
end

function Parser:postfix(result)
  local count = 0
  while true do
    local kind = self.current.type
    count = self:link(count)
    if kind == "dot" then
      result = self:attribute(result)
    elseif kind == "lbracket" then
      result = self:subscript(result)
    elseif kind == "lparen" then
      result = self:call(result)
    else
      return result
    end
  end
end

function Parser:filters_and_tests(result)
  local count = 0
  while true do
    count = self:link(count)
    if self:is("pipe") then
      result = self:filter(result)
    elseif is_name(self.current, "is") then
      result = self:test(result)
    elseif self:is("lparen") then
      result = self:call(result)
    else
      return result
    end
  end
end

function Parser:attribute(object)
  local line = self:next().line
  local token = self:next()
  if token.type == "name" then
    return node("Getattr", line, { node = object, attr = token.value })
  elseif token.type ~= "integer" then
    self:fail("expected name or number", token.line)
  end
  local arg = node("Const", line, { value = token.value })
  return node("Getitem", line, { node = object, arg = arg })
end

function Parser:subscript(object)
  local line = self:next().line
  local args = {}
  while not self:is("rbracket") do
    if #args > 0 then self:expect("comma") end
    args[#args + 1] = self:index_or_slice()
  end
  self:expect("rbracket")
  local arg = #args == 1 and args[1] or node("Tuple", line, { items = args })
  return node("Getitem", line, { node = object, arg = arg })
end

function Parser:index_or_slice()
  local line = self.current.line
  local function part()
    local kind = self.current.type
    if kind == "colon" or kind == "rbracket" or kind == "comma" then return nil end
    return self:expression()
  end
  local start
  if not self:is("colon") then
    start = self:expression()
    if not self:is("colon") then return start end
  end
  self:next()
  local stop, step = part(), nil
  if self:skip("colon") then step = part() end
  return node("Slice", line, { start = start, stop = stop, step = step })
end

--- Call arguments into `into`: args, kwnames, kwvalues, dyn_args, dyn_kwargs.
function Parser:arguments(into)
  local line = self:expect("lparen").line
  into.args, into.kwnames, into.kwvalues = {}, {}, {}
  local function ensure(condition)
    if not condition then self:fail("invalid syntax for function call expression", line) end
  end
  local first = true
  while not self:is("rparen") do
    if not first then
      self:expect("comma")
      if self:is("rparen") then break end
    end
    first = false
    if self:is("mul") then
      ensure(not into.dyn_args and not into.dyn_kwargs)
      self:next()
      into.dyn_args = self:expression()
    elseif self:is("pow") then
      ensure(not into.dyn_kwargs)
      self:next()
      into.dyn_kwargs = self:expression()
    elseif self:is("name") and self:look().type == "assign" then
      ensure(not into.dyn_kwargs)
      into.kwnames[#into.kwnames + 1] = self:next().value
      self:next()
      into.kwvalues[#into.kwvalues + 1] = self:expression()
    else
      ensure(not into.dyn_args and not into.dyn_kwargs and #into.kwnames == 0)
      into.args[#into.args + 1] = self:expression()
    end
  end
  self:expect("rparen")
  return into
end

function Parser:call(callee)
  return self:arguments(node("Call", self.current.line, { node = callee }))
end

function Parser:dotted_name()
  local name = self:expect("name").value
  while self:skip("dot") do name = name .. "." .. self:expect("name").value end
  return name
end

--- One filter applied to `object` (nil: to the body of a block).
function Parser:filter(object, without_pipe)
  if not without_pipe then self:next() end
  local line = self.current.line
  local result = node("Filter", line, { node = object, args = {}, kwnames = {}, kwvalues = {} })
  result.name = self:dotted_name()
  if self:is("lparen") then self:arguments(result) end
  return result
end

--- The filters of a {% filter %} or {% set %} block, or nil.
function Parser:block_filters(result)
  local count = 0
  while self:is("pipe") do
    count = self:link(count)
    result = self:filter(result)
  end
  return result
end

local ARGUMENT_STARTS = { name = true, string = true, integer = true, float = true,
  lparen = true, lbracket = true, lbrace = true }

function Parser:test(object)
  local line = self:next().line
  local negated = self:skip_name("not")
  local result = node("Test", line, { node = object, args = {}, kwnames = {}, kwvalues = {} })
  result.name = self:dotted_name()
  local token = self.current
  if token.type == "lparen" then
    self:arguments(result)
  elseif ARGUMENT_STARTS[token.type] and not is_name(token, "else") and not is_name(token, "or")
    and not is_name(token, "and") then
    if is_name(token, "is") then self:fail("You cannot chain multiple tests with is") end
    self:enter()
    result.args[1] = self:postfix(self:primary())
    self:leave()
  end
  if negated then result = node("Not", line, { node = result }) end
  return result
end

-- Statements ----------------------------------------------------------------------------------

local function quoted(names)
  local out = {}
  for i, name in ipairs(names) do out[i] = "'" .. name .. "'" end
  return table.concat(out, " or ")
end

--- Fails on an unknown tag, or on the end of the template when `name` is nil.
function Parser:fail_tag(name, line, open)
  local looking = open[#open]
  local message = name and "Encountered unknown tag '" .. name .. "'."
    or "Unexpected end of template."
  if looking then
    local expected = false
    for _, names in ipairs(open) do
      for _, other in ipairs(names) do expected = expected or other == name end
    end
    message = message .. (expected and " You probably made a nesting mistake. Jinja is expecting"
      .. " this tag, but currently looking for " or " Jinja was looking for the following tags: ")
      .. quoted(looking) .. "."
  end
  local inner = self.tags[#self.tags]
  if inner then
    message = message .. " The innermost block that needs to be closed is '" .. inner .. "'."
  end
  self:fail(message, line)
end

--- Statements and text up to a tag whose name is in `ends` (nil: to the end of the template).
function Parser:statements(ends)
  local body, output = {}, nil
  local function add(child)
    if not output then
      output = node("Output", child.line, { nodes = {} })
      body[#body + 1] = output
    end
    output.nodes[#output.nodes + 1] = child
  end
  if ends then self.open[#self.open + 1] = ends end
  while not self:is("eof") do
    local token = self:next()
    if token.type == "data" then
      add(node("Data", token.line, { data = token.value }))
    elseif token.type == "variable_begin" then
      add(self:tuple({}))
      self:expect("variable_end")
    else
      output = nil
      for _, name in ipairs(ends or {}) do
        if is_name(self.current, name) then
          self.open[#self.open] = nil
          return body
        end
      end
      body[#body + 1] = self:statement()
      self:expect("block_end")
    end
  end
  if ends then self:fail_tag(nil, self.current.line, self.open) end
  return body
end

--- The body of a block tag; afterwards the current token is the name of the end tag.
function Parser:body(...)
  self:skip("colon")
  self:expect("block_end")
  return self:statements({ ... })
end

--- A body that ends with one fixed tag, which is consumed.
function Parser:closed_body(name)
  local body = self:body(name)
  self:next()
  return body
end

--- A body outside any loop: break and continue cannot leave a macro or block.
function Parser:function_body(name)
  local loops = self.loops
  self.loops = 0
  local body = self:closed_body(name)
  self.loops = loops
  return body
end

function Parser:statement()
  local token = self.current
  if token.type ~= "name" then self:fail("tag name expected", token.line) end
  local parse = self.STATEMENTS[token.value]
  if not parse then self:fail_tag(token.value, token.line, self.open) end
  self.tags[#self.tags + 1] = token.value
  self:enter()
  self:next()
  local result = parse(self, token.line, token.value)
  self:leave()
  self.tags[#self.tags] = nil
  return result
end

--- Marks a tree as an assignment target. `ctx` "param" makes names parameters of their scope.
function Parser:mark_target(target, ctx)
  if target.kind == "Name" then
    target.ctx = ctx
  elseif target.kind == "Tuple" then
    for _, item in ipairs(target.items) do self:mark_target(item, ctx) end
  elseif target.kind ~= "NSRef" then
    self:fail("can't assign to '" .. target.kind:lower() .. "'", target.line)
  end
  return target
end

function Parser:name_target(ctx)
  local token = self:expect("name")
  if CONSTANTS[token.value] ~= nil then
    self:fail("can't assign to 'name'", token.line)
  end
  return node("Name", token.line, { name = token.value, ctx = ctx })
end

function Parser:target(options, ctx)
  options.targets = true
  return self:mark_target(self:tuple(options), ctx)
end

function Parser:set(line)
  local target = self:target({ with_namespace = true }, "store")
  if self:skip("assign") then
    return node("Assign", line, { target = target, node = self:tuple({}) })
  end
  local filter = self:block_filters(nil)
  return node("AssignBlock", line, { target = target, filter = filter,
    body = self:closed_body("endset") })
end

function Parser:for_loop(line)
  local target = self:target({ stop = "in" }, "store")
  self:expect_name("in")
  local iter = self:tuple({ without_condition = true, stop = "recursive" })
  local test = self:skip_name("if") and self:expression() or nil
  local recursive = self:skip_name("recursive")
  self.loops = self.loops + 1
  local body = self:body("endfor", "else")
  self.loops = self.loops - 1
  local else_body = self:next().value == "else" and self:closed_body("endfor") or {}
  return node("For", line, { target = target, iter = iter, test = test, recursive = recursive,
    body = body, else_body = else_body })
end

function Parser:if_chain(line)
  local result = node("If", line, { elifs = {}, else_body = {} })
  local branch = result
  while true do
    branch.test = self:tuple({ without_condition = true })
    branch.body = self:body("elif", "else", "endif")
    local token = self:next()
    if token.value == "elif" then
      branch = node("If", token.line, { elifs = {}, else_body = {} })
      result.elifs[#result.elifs + 1] = branch
    else
      if token.value == "else" then result.else_body = self:closed_body("endif") end
      return result
    end
  end
end

function Parser:with(line)
  local targets, values = {}, {}
  while not self:is("block_end") do
    if #targets > 0 then self:expect("comma") end
    targets[#targets + 1] = self:target({}, "param")
    self:expect("assign")
    values[#values + 1] = self:expression()
  end
  return node("With", line, { targets = targets, values = values,
    body = self:closed_body("endwith") })
end

--- The parameters of a macro or call block: names and the defaults of the last ones.
function Parser:signature()
  local args, defaults = {}, {}
  self:expect("lparen")
  while not self:is("rparen") do
    if #args > 0 then self:expect("comma") end
    args[#args + 1] = self:name_target("param")
    if self:skip("assign") then
      defaults[#defaults + 1] = self:expression()
    elseif #defaults > 0 then
      self:fail("non-default argument follows default argument")
    end
  end
  self:expect("rparen")
  return args, defaults
end

function Parser:macro(line)
  local name = self:name_target("store").name
  local args, defaults = self:signature()
  return node("Macro", line, { name = name, args = args, defaults = defaults,
    body = self:function_body("endmacro") })
end

function Parser:call_block(line)
  local args, defaults = {}, {}
  if self:is("lparen") then args, defaults = self:signature() end
  local call = self:expression()
  if call.kind ~= "Call" then self:fail("expected call", line) end
  return node("CallBlock", line, { call = call, args = args, defaults = defaults,
    body = self:function_body("endcall") })
end

function Parser:filter_block(line)
  local filter = self:block_filters(self:filter(nil, true))
  return node("FilterBlock", line, { filter = filter, body = self:closed_body("endfilter") })
end

function Parser:block(line)
  local name = self:expect("name").value
  local scoped, required = self:skip_name("scoped"), self:skip_name("required")
  if self:is("sub") then
    self:fail("Block names in Jinja have to be valid Python identifiers and may not contain"
      .. " hyphens, use an underscore instead.")
  end
  local result = node("Block", line, { name = name, scoped = scoped, required = required,
    body = self:function_body("endblock") })
  self:skip_name(name)
  if self.blocks[name] then
    self:fail("block '" .. name .. "' defined twice", line, "TemplateAssertionError")
  end
  self.blocks[name] = result
  return result
end

function Parser:print_tag(line)
  local nodes = {}
  while not self:is("block_end") do
    if #nodes > 0 then self:expect("comma") end
    nodes[#nodes + 1] = self:expression()
  end
  return node("Output", line, { nodes = nodes })
end

function Parser:loop_control(line, name)
  if self.loops == 0 then
    self:fail("'" .. name .. "' outside loop", line, "SyntaxError")
  end
  return node(name == "break" and "Break" or "Continue", line, {})
end

--- Tags that load another template parse, and fail when they run: there is nothing to load from.
function Parser:other_template(line, name)
  self:expression()
  while not self:is("block_end") and not self:is("eof") do self:next() end
  return node("NoLoader", line, { name = name })
end

function Parser:generation(line)
  -- transformers makes this a call block, so its body is a function with a scope of its own.
  return node("Scope", line, { body = self:function_body("endgeneration") })
end

function Parser:autoescape(line)
  return node("Autoescape", line, { option = self:expression(),
    body = self:closed_body("endautoescape") })
end

Parser.STATEMENTS = {
  set = Parser.set, ["for"] = Parser.for_loop, ["if"] = Parser.if_chain, with = Parser.with,
  macro = Parser.macro, call = Parser.call_block, filter = Parser.filter_block,
  block = Parser.block, print = Parser.print_tag, ["break"] = Parser.loop_control,
  ["continue"] = Parser.loop_control, generation = Parser.generation,
  autoescape = Parser.autoescape, include = Parser.other_template,
  import = Parser.other_template, from = Parser.other_template,
  extends = Parser.other_template,
}

--- The tree of a template: {kind="Scope", body=, blocks=}.
function parser.parse(source)
  local tokens = lexer.tokenize(source)
  local self = setmetatable({ tokens = tokens, index = 0, current = {}, depth = 0,
    loops = 0, tags = {}, open = {}, blocks = {} }, Parser)
  self:next()
  local body = self:statements(nil)
  return node("Scope", 1, { body = body, blocks = self.blocks })
end

return parser
