--- Counts and times of a server as Prometheus reads them, under vLLM's names.

local metrics = {}

---@class moonlet.server.Metrics
local Metrics = {}
Metrics.__index = Metrics

-- Upper bounds of buckets, in seconds.
local HISTOGRAMS <const> = {
  { "time_to_first_token_seconds", "Time to first token in seconds.",
    { 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560 } },
  { "inter_token_latency_seconds", "Time between tokens in seconds.",
    { 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20 } },
  { "e2e_request_latency_seconds", "Time of a whole request in seconds.",
    { 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240, 480, 960, 1920 } },
}

---@return moonlet.server.Metrics
function metrics.new()
  local self = { histograms = {}, reasons = {} }
  for _, h in ipairs(HISTOGRAMS) do
    local counts = {}
    for i = 1, #h[3] do counts[i] = 0 end
    self.histograms[h[1]] = { bounds = h[3], counts = counts, n = 0, sum = 0.0 }
  end
  return setmetatable(self, Metrics)
end

---@param name string of a histogram
---@param value number
function Metrics:observe(name, value)
  local h = self.histograms[name]
  h.n, h.sum = h.n + 1, h.sum + value
  for i, bound in ipairs(h.bounds) do
    if value <= bound then
      h.counts[i] = h.counts[i] + 1
      return
    end
  end
end

---A choice has ended.
---@param reason string
---@param seconds number since its request came
function Metrics:ended(reason, seconds)
  self.reasons[reason] = (self.reasons[reason] or 0) + 1
  self:observe("e2e_request_latency_seconds", seconds)
end

local function label_text(text)
  return (text:gsub('[\\"\n]', { ["\\"] = "\\\\", ['"'] = '\\"', ["\n"] = "\\n" }))
end

---The text format.
---@param model_name string
---@param now { gauges: table[], counters: table[] } rows { name, help, value }
---@return string
function Metrics:text(model_name, now)
  local out, labels = {}, ('engine="0",model_name="%s"'):format(label_text(model_name))
  local function head(name, kind, help)
    out[#out + 1] = ("# HELP vllm:%s %s\n# TYPE vllm:%s %s"):format(name, help, name, kind)
  end
  local function value(name, x, more)
    out[#out + 1] = ("vllm:%s{%s%s} %s"):format(name, labels, more or "", x)
  end
  for kind, rows in pairs { gauge = now.gauges, counter = now.counters } do
    for _, row in ipairs(rows) do
      head(row[1], kind, row[2])
      value(row[1], row[3])
    end
  end
  head("request_success_total", "counter", "Requests that ended, by reason.")
  for _, reason in ipairs { "stop", "length", "abort", "error" } do
    value("request_success_total", self.reasons[reason] or 0,
      (',finished_reason="%s"'):format(reason))
  end
  for _, spec in ipairs(HISTOGRAMS) do
    local h, below = self.histograms[spec[1]], 0
    head(spec[1], "histogram", spec[2])
    for i, bound in ipairs(h.bounds) do
      below = below + h.counts[i]
      value(spec[1] .. "_bucket", below, (',le="%s"'):format(bound))
    end
    value(spec[1] .. "_bucket", h.n, ',le="+Inf"')
    value(spec[1] .. "_sum", h.sum)
    value(spec[1] .. "_count", h.n)
  end
  return table.concat(out, "\n") .. "\n"
end

return metrics
