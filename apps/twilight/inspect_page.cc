#include "inspect_page.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "distribution.h"
#include "inspect_picture.h"
#include "markup.h"
#include "palette.h"
#include "table.h"

namespace twilight::app {
namespace {

using Json = nlohmann::ordered_json;

// Union and candidate counts go into tooltips up to this many values.
constexpr std::size_t kUnionValues = 40000;

constexpr const char* kPageCss = R"(
body{margin:0;background:var(--surface);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:27px;letter-spacing:-.3px;margin:0}
h2{font-size:17px;margin:34px 0 8px}
p.device{margin:2px 0 0;color:var(--muted);font-size:13px}
dl.figures{display:flex;flex-wrap:wrap;gap:10px;margin:20px 0}
dl.figures div{border:1px solid var(--faint);border-radius:10px;padding:10px 16px;flex:1 1 auto}
dl.figures dt{color:var(--muted);font-size:12.5px}
dl.figures dd{margin:0;font-size:21px;font-weight:600}
.ask{margin:3px 0}.ask b{display:inline-block;min-width:84px;color:var(--muted);font-weight:500}
svg.picture{width:100%;height:auto;display:block}
.text{white-space:pre-wrap;line-height:2.1}
.text span{border-bottom:4px solid var(--faint);margin-right:1px}
.picture-box{margin:26px 0 0;overflow-x:auto}
.note{color:var(--muted);font-size:13px;margin:0 0 8px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px;width:100%}
th,td{text-align:right;padding:4px 10px;border-bottom:1px solid var(--faint)}
th{color:var(--muted);font-weight:500}
th:nth-child(2),td:nth-child(2){text-align:left}
#tip{position:fixed;z-index:2;display:none;pointer-events:none;white-space:pre;background:var(--ink);color:var(--surface);padding:7px 11px;border-radius:8px;font-size:12.5px;line-height:1.45}
)";

// Without the characters that XML would want escaped inside a script.
constexpr const char* kScript = R"(
const tip = document.getElementById('tip');
const nf = n => Math.round(n).toLocaleString('en');
function watch(map, name) {
  const area = document.getElementById('hit-' + name);
  const cursor = document.getElementById('cursor-' + name);
  if (!area) return;
  const hide = () => { tip.style.display = 'none'; cursor.setAttribute('width', 0); };
  area.addEventListener('pointerleave', hide);
  area.addEventListener('pointermove', event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(
      area.ownerSVGElement.getScreenCTM().inverse());
    const column = Math.min(map.columns - 1, Math.max(0, Math.floor((at.x - map.x) / map.cell)));
    const y = at.y - map.y;
    const index = map.rows.findIndex(
      row => y >= row[2] ? row[2] + (row[1] === -1 ? map.dense : map.height) > y : false);
    if (index === -1) { hide(); return; }
    const row = map.rows[index], layer = row[0], head = row[1];
    const first = column * map.steps, end = Math.min(first + map.steps, data.words.length);
    const lines = [];
    const number = first + 2;
    lines.push(map.steps === 1 ? 'token ' + number + '  “' + data.words[first] + '”'
                               : 'tokens ' + number + ' to ' + (end + 1));
    const value = head === -1 ? null : map.values[index][column];
    if (head === -1) {
      lines.push('layer ' + layer + ': dense');
    } else {
      const last = head + map.heads - 1;
      lines.push('layer ' + layer + ', query head ' + head + (map.heads > 1 ? ' to ' + last : '') +
                 ' (KV head ' + Math.floor(head / data.group) + ')');
    }
    const total = data.context[end - 1];
    if (value === null) {
      lines.push('every token read: ' + nf(total));
    } else if (name === 'kept') {
      lines.push('kept ' + nf(value) + ' of ' + nf(total) + ' tokens');
      if (data.joined[layer]) {
        const at = first * data.kv + Math.floor(head / data.group);
        lines.push('union of the group ' + nf(data.joined[layer][at]) + ' of ' +
                   nf(data.candidates[layer][at]) + ' candidates');
      }
    } else {
      lines.push(data.kind + ' mass ' + (value / 1000).toFixed(3));
    }
    tip.textContent = lines.join('\n');
    tip.style.display = 'block';
    const box = tip.getBoundingClientRect();
    const beside = event.clientX + 16, below = event.clientY + 16;
    tip.style.left = (beside + box.width > innerWidth ? event.clientX - box.width - 12 : beside) + 'px';
    tip.style.top = (below + box.height > innerHeight ? event.clientY - box.height - 12 : below) + 'px';
    cursor.setAttribute('x', head === -1 ? map.x : map.x + column * map.cell);
    cursor.setAttribute('width', head === -1 ? map.columns * map.cell : map.cell);
    cursor.setAttribute('y', map.y + row[2]);
    cursor.setAttribute('height', head === -1 ? map.dense : map.height);
  });
}
watch(data.kept, 'kept');
watch(data.mass, 'mass');
)";

Json map_json(const PictureMap& map, double scale) {
  Json out;
  out["x"] = map.layout.x;
  out["y"] = map.layout.y;
  out["cell"] = map.layout.cell_width;
  out["height"] = map.layout.row_height;
  out["dense"] = map.layout.dense_height;
  out["columns"] = map.grid.columns;
  out["steps"] = map.grid.steps_per_column;
  out["heads"] = map.grid.heads_per_row;
  out["rows"] = Json::array();
  out["values"] = Json::array();
  for (std::size_t i = 0; i < map.layout.tops.size(); ++i) {
    const HeatGrid::Row& row = map.grid.rows[i];
    out["rows"].push_back({row.layer, row.dense ? -1 : row.first_head, map.layout.tops[i]});
    Json values = Json::array();
    for (const float value : row.values) {
      if (std::isnan(value)) {
        values.push_back(nullptr);
      } else {
        values.push_back(std::lround(static_cast<double>(value) * scale));
      }
    }
    out["values"].push_back(std::move(values));
  }
  return out;
}

// What the script looks up, ASCII alone and without '<', '>' or '&'.
std::string script_data(const InspectData& data, const Picture& picture) {
  Json out;
  out["group"] = std::max(data.q_heads / std::max(data.kv_heads, 1), 1);
  out["kv"] = data.kv_heads;
  out["kind"] = mass_kind(data);
  out["words"] = Json::array();
  for (const std::string& token : data.step_tokens) {
    out["words"].push_back(token_label(token, 24));
  }
  out["context"] = Json::array();
  if (!data.layers.empty()) out["context"] = data.layers.front().tokens;
  out["joined"] = Json::object();
  out["candidates"] = Json::object();
  const std::size_t values =
      data.layers.size() * data.steps() * static_cast<std::size_t>(data.kv_heads);
  if (values <= kUnionValues && picture.kept.grid.steps_per_column == 1) {
    for (std::size_t i = 0; i < data.layers.size(); ++i) {
      if (data.layers[i].all_dense()) continue;
      out["joined"][std::to_string(i)] = data.layers[i].attended;
      out["candidates"][std::to_string(i)] = data.layers[i].candidates;
    }
  }
  out["kept"] = map_json(picture.kept, 1);
  out["mass"] = map_json(picture.mass, 1000);
  std::string text;
  for (const char c : out.dump(-1, ' ', true, Json::error_handler_t::replace)) {
    switch (c) {
      case '<':
        text += "\\u003c";
        break;
      case '>':
        text += "\\u003e";
        break;
      case '&':
        text += "\\u0026";
        break;
      default:
        text += c;
    }
  }
  return text;
}

// The text of the steps; the line below each token is the mean it took over the sparse layers.
std::string coloured_text(const InspectData& data) {
  std::vector<double> means;
  const auto heads = static_cast<std::size_t>(data.q_heads);
  for (std::size_t step = 0; step < data.steps(); ++step) {
    double sum = 0;
    std::size_t count = 0;
    for (const InspectLayer& layer : data.layers) {
      if (is_dense(layer.path[step])) continue;
      for (std::size_t head = 0; head < heads; ++head) sum += layer.kept[step * heads + head];
      count += heads;
    }
    means.push_back(count > 0 ? sum / static_cast<double>(count) : 0);
  }
  double low = 0, high = 0;
  for (const double mean : means) {
    if (mean <= 0) continue;
    low = low > 0 ? std::min(low, mean) : mean;
    high = std::max(high, mean);
  }
  if (low <= 0) return {};
  std::string out =
      "<h2>The text, and what each token took</h2>\n<p class=\"note\">The line below "
      "a token: tokens kept when it was written, mean over heads, " +
      grouped(std::llround(low)) + " to " + grouped(std::llround(high)) +
      ".</p>\n<div class=\"text\">";
  for (std::size_t step = 0; step < data.steps(); ++step) {
    const double share =
        high > low ? (std::log(std::max(means[step], low)) - std::log(low)) / std::log(high / low)
                   : 0;
    const std::string& token = data.step_tokens[step];
    const bool breaks = token.find('\n') != std::string::npos;
    if (means[step] > 0) {
      out += "<span class=\"u" + std::to_string(colour_level(share)) + "\" title=\"token " +
             std::to_string(step + 2) + ": " + grouped(std::llround(means[step])) + " kept\">";
    } else {
      out += "<span>";
    }
    out += escape_xml(breaks ? token_label(token, 24) : token) + "</span>" + (breaks ? "\n" : "");
  }
  return out + "</div>\n";
}

std::string cell(const std::string& text) { return "<td>" + escape_xml(text) + "</td>"; }

std::string layer_table(const InspectData& data) {
  std::string out =
      "<h2>Layers</h2>\n<div class=\"wide\"><table><thead><tr><th>layer</th><th>ran</th>"
      "<th>kept, median</th><th>10th to 90th percentile</th><th>least to most</th><th>union, "
      "mean</th><th>candidates, mean</th><th>" +
      mass_kind(data) + " mass, mean</th><th>least</th></tr></thead><tbody>\n";
  const auto count = [](double value) { return grouped(std::llround(value)); };
  for (std::size_t i = 0; i < data.layers.size(); ++i) {
    const InspectLayer& layer = data.layers[i];
    std::vector<double> kept, mass, joined, candidates;
    std::size_t sparse = 0;
    for (std::size_t step = 0; step < layer.path.size(); ++step) {
      if (is_dense(layer.path[step])) continue;
      ++sparse;
      const auto add = [step](std::vector<double>& to, const auto& from, std::int32_t width) {
        for (std::size_t h = 0; h < static_cast<std::size_t>(width); ++h) {
          to.push_back(static_cast<double>(from[step * static_cast<std::size_t>(width) + h]));
        }
      };
      add(kept, layer.kept, data.q_heads);
      add(mass, data.mass(layer), data.q_heads);
      add(joined, layer.attended, data.kv_heads);
      add(candidates, layer.candidates, data.kv_heads);
    }
    out += "<tr>" + cell(std::to_string(i));
    if (sparse == 0) {
      const std::string why =
          layer.path.empty() ? "nothing"
                             : "dense (" + std::string(step_path_name(layer.path.front())) + ")";
      out += cell(why) + cell("all") + cell("") + cell("") + cell("") + cell("") + cell("") +
             cell("") + "</tr>\n";
      continue;
    }
    const Distribution k(kept), m(mass);
    out += cell(sparse == layer.path.size() ? "sparse"
                                            : "sparse in " + std::to_string(sparse) + " of " +
                                                  std::to_string(layer.path.size()) + " steps") +
           cell(count(k.median)) + cell(count(k.p10) + " to " + count(k.p90)) +
           cell(count(k.min) + " to " + count(k.max)) + cell(count(Distribution(joined).mean)) +
           cell(count(Distribution(candidates).mean)) + cell(fixed(m.mean, 3)) +
           cell(fixed(m.min, 3)) + "</tr>\n";
  }
  return out + "</tbody></table></div>\n";
}

std::string line_of(const char* name, const std::string& value) {
  return value.empty()
             ? ""
             : "<p class=\"ask\"><b>" + std::string(name) + "</b> " + escape_xml(value) + "</p>\n";
}

}  // namespace

std::string draw_page(const InspectData& data) {
  const Picture picture = draw_picture(data, {.standalone = false});
  std::string out =
      "<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\">\n<head>\n"
      "<meta charset=\"utf-8\"/>\n<meta name=\"viewport\" "
      "content=\"width=device-width, initial-scale=1\"/>\n<title>What attention read: " +
      escape_xml(data.model) + "</title>\n<style>\n" + picture_css() + kPageCss +
      ramp_css("text .u", "border-color", dusk_colour, false) +
      "\n@media (prefers-color-scheme:dark){" +
      ramp_css("text .u", "border-color", dusk_colour, true) +
      "}\n</style>\n</head>\n<body>\n<main>\n" +
      "<h1>What attention read</h1>\n<p class=\"device\">" + escape_xml(data.device) +
      "</p>\n<dl class=\"figures\">\n";
  for (const auto& [name, value] : headline_figures(data)) {
    out += "<div><dt>" + escape_xml(name) + "</dt><dd>" + escape_xml(value) + "</dd></div>\n";
  }
  out += "</dl>\n" + line_of("Question", data.question) + line_of("Answer", data.answer) +
         line_of("Fact", data.verdict) + "<div class=\"picture-box\">" + picture.svg + "</div>\n" +
         coloured_text(data) + layer_table(data) + "</main>\n<div id=\"tip\"></div>\n<script>\n" +
         "const data = " + script_data(data, picture) + ";" + kScript +
         "</script>\n</body>\n</html>\n";
  return out;
}

}  // namespace twilight::app
