"use strict";
(() => {
const $ = id => document.getElementById(id);
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let data = JSON.parse($("report-data").textContent);
const COLOURS = ["--s0", "--s1", "--s2", "--s3", "--s4", "--s5"];

// Every text from the data goes through here: text nodes and known attributes only.
function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}
const show = (value, digits = 3) => value === null || value === undefined ? "–" :
  Number(value.toPrecision(digits)).toLocaleString("en", {maximumSignificantDigits: digits}).replace("-", "−");
const percent = (value, digits = 3) => value === null || value === undefined ? "–" : show(100 * value, digits) + "%";

// Charts -------------------------------------------------------------------------------------------------------------

const plots = [];
function alpha(colour, share) { return colour + Math.round(255 * share).toString(16).padStart(2, "0"); }

function columns(chart) {
  // One x axis for all runs; a series per run, or all series of a single run.
  const single = data.runs.length === 1, lines = [], tables = [];
  data.runs.forEach((run, i) => {
    const table = [run.steps];
    const add = (key, label, colour, kind) => {
      if (!run.series[key]) return;
      table.push(run.series[key]);
      lines.push({key, label, colour: css(colour), kind});
    };
    if (single) {
      chart.ribbons.flat().forEach(key => add(key, key, "--s0", "edge"));
      chart.keys.forEach((key, k) => add(key, chart.labels[k], COLOURS[k % 6], chart.stacked ? "stack" : "line"));
    } else add(chart.main, run.name, COLOURS[i % 6], "line");
    chart.points.forEach(key => add(key, single ? "held-out prompts" : run.name + ", held-out", single ? "--s4" : COLOURS[i % 6], "dot"));
    if (table.length > 1) tables.push(table);
  });
  const joined = tables.length > 1 ? uPlot.join(tables) : tables[0] || [[]];
  return {lines, values: joined};
}

function stacked(lines, values) {
  const sum = values[0].map(() => 0), result = values.slice();
  lines.forEach((line, i) => {
    if (line.kind !== "stack") return;
    result[i + 1] = values[i + 1].map((value, at) => sum[at] += value || 0);
  });
  return result;
}

function draw(holder, chart) {
  const {lines, values} = columns(chart);
  const drawn = stacked(lines, values);
  const show_ = chart.percent ? percent : show;
  const axis = {stroke: css("--muted"), grid: {stroke: css("--line"), width: 1}, ticks: {show: false}, font: "12px system-ui, sans-serif"};
  const readout = holder.parentElement.querySelector(".readout");
  const say = at => {
    const parts = at === null || at === undefined ? [] : [`step ${values[0][at]}: `];
    readout.replaceChildren(...parts, ...lines.map((line, i) => {
      if (line.kind === "edge") return null;
      const value = at === null || at === undefined ? null : values[i + 1][at];
      const key = el("span", {class: line.kind === "dot" ? "key dot" : "key"}, line.label + (value === null || value === undefined ? "" : " " + show_(value)));
      key.style.setProperty("--c", line.colour);
      return key;
    }).filter(Boolean));
  };
  const few = drawn[0].length < 30;
  const series = lines.map((line, i) => ({
    label: line.label,
    stroke: line.kind === "edge" ? "transparent" : line.colour,
    width: line.kind === "dot" ? 0 : 1.7,
    fill: line.kind === "stack" && i === 0 ? alpha(line.colour, 0.35) : undefined,
    points: {show: line.kind === "dot" || (line.kind === "line" && few), size: line.kind === "dot" ? 6 : 4, fill: line.colour, stroke: line.colour},
    spanGaps: line.kind !== "dot",
  }));
  const bands = [];
  lines.forEach((line, i) => {
    if (line.kind === "edge" && i % 2 === 0) bands.push({series: [i + 2, i + 1], fill: alpha(line.colour, 0.13)});
    if (line.kind === "stack" && i > 0) bands.push({series: [i + 1, i], fill: alpha(line.colour, 0.35)});
  });
  const shade = u => {
    const {left, top, width, height} = u.bbox, context = u.ctx;
    const clamp = y => Math.min(top + height, Math.max(top, y));
    if (chart.low !== null || chart.high !== null) {
      const upper = chart.high === null ? top : clamp(u.valToPos(chart.high, "y", true));
      const lower = chart.low === null ? top + height : clamp(u.valToPos(chart.low, "y", true));
      context.fillStyle = css("--band");
      context.fillRect(left, upper, width, lower - upper);
    }
    if (chart.target !== null) {
      const y = u.valToPos(chart.target, "y", true);
      context.save();
      context.strokeStyle = css("--good"); context.lineWidth = devicePixelRatio; context.setLineDash([6, 5]);
      context.beginPath(); context.moveTo(left, y); context.lineTo(left + width, y); context.stroke();
      context.restore();
    }
  };
  const range = (u, low, high) => {
    if (low === null || high === null) return [0, 1];
    if (chart.target !== null) high = Math.max(high, chart.target);
    if (chart.stacked || chart.percent || (low >= 0 && low < 0.5 * high)) low = Math.min(0, low);
    const room = (high - low) * 0.08 || Math.abs(high) * 0.1 || (chart.percent ? 0.05 : 1);
    return [low === 0 ? 0 : low - room, high + room];
  };
  const plot = new uPlot({
    width: Math.max(160, holder.clientWidth), height: 190, padding: [8, 16, 0, 0], legend: {show: false},
    cursor: {y: false, drag: {x: true, y: false}, points: {size: 6}},
    scales: {x: {time: false}, y: {range}},
    axes: [{...axis, space: 60, size: 30, incrs: [1, 2, 5].flatMap(n => [n, n * 10, n * 100, n * 1e3, n * 1e4, n * 1e5]).sort((a, b) => a - b), values: (u, ticks) => ticks.map(String)}, {...axis, size: (u, ticks) => 18 + 7 * Math.max(5, ...(ticks || []).map(t => t.length)), values: (u, ticks) => ticks.map(t => show_(t, 6))}],
    series: [{}, ...series], bands,
    hooks: {drawClear: [shade], setCursor: [u => say(u.cursor.idx)]},
  }, drawn, holder);
  plot.over.addEventListener("mouseleave", () => say(null));
  say(null);
  holder.onkeydown = event => {
    const move = {ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -1e9, End: 1e9}[event.key];
    if (!move || !values[0].length) return;
    event.preventDefault();
    const at = Math.max(0, Math.min(values[0].length - 1, (holder.at ?? (move > 0 ? -1 : values[0].length)) + move));
    holder.at = at;
    plot.setCursor({left: plot.valToPos(values[0][at], "x"), top: 10}, false);
    say(at);
  };
  plots.push(plot);
}
function drawAll() {
  plots.splice(0).forEach(plot => plot.destroy());
  const charts = new Map(data.charts.map(chart => [chart.id, chart]));
  document.querySelectorAll("[data-chart]").forEach(holder => charts.has(holder.dataset.chart) && draw(holder, charts.get(holder.dataset.chart)));
}
let resizing;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => plots.forEach(plot => {
  const width = plot.root.parentElement.clientWidth;
  if (width && width !== plot.width) plot.setSize({width, height: 190});
}), 120); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

// Completions --------------------------------------------------------------------------------------------------------

const PAGE = 25, TOP = 50;
const COLUMNS = [["step", "step"], ["score", "score"], ["kl", "KL"], ["advantage", "advantage"], ["length", "length"], ["end", "end"], ["text", "prompt and completion"]];
let sorted = {key: "step", down: true}, first = 0, chosen = [];
const known = value => value !== null && value !== undefined;
const CHOICES = {
  all: rows => rows, error: rows => rows.filter(row => row.error), tokens: rows => rows.filter(row => row.tokens),
  best: rows => extreme(rows, "score", -1), worst: rows => extreme(rows, "score", 1),
  longest: rows => extreme(rows, "length", -1), far: rows => extreme(rows, "kl", -1),
};
function extreme(rows, key, sign) { return rows.filter(row => known(row[key])).sort((a, b) => sign * (a[key] - b[key])).slice(0, TOP); }

function choose() {
  const query = $("query").value.toLowerCase(), from = $("from").value, to = $("to").value, run = $("run") ? $("run").value : "";
  let rows = data.samples.filter(row => (from === "" || row.step >= +from) && (to === "" || row.step <= +to) && (run === "" || row.run === +run) &&
    (!query || row.text.toLowerCase().includes(query) || row.prompt.toLowerCase().includes(query) || (row.error || "").toLowerCase().includes(query)));
  rows = CHOICES[$("which").value](rows).slice();
  const {key, down} = sorted, sign = down ? -1 : 1;
  rows.sort((a, b) => !known(a[key]) ? 1 : !known(b[key]) ? -1 : sign * (typeof a[key] === "string" ? (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0) : a[key] - b[key]));
  chosen = rows; first = Math.min(first, Math.max(0, rows.length - 1)); first -= first % PAGE;
  list();
}
function list() {
  const several = data.runs.length > 1;
  $("samples").tBodies[0].replaceChildren(...chosen.slice(first, first + PAGE).map(row => el("tr", {},
    ...COLUMNS.slice(0, -1).map(([key, label]) => el("td", {"data-label": label}, typeof row[key] === "number" ? (key === "step" || key === "length" ? String(row[key]) : show(row[key])) : row[key] || "–")),
    el("td", {class: "text"},
      several ? el("span", {class: "run run" + row.run % 6}, data.runs[row.run].name) : null,
      el("div", {class: "line"},
        el("div", {class: "clip", dir: "auto"}, el("span", {class: "prompt"}, row.prompt.slice(-120)), " ", row.text.slice(0, 400)),
        el("button", {type: "button", onclick: () => open_(row)}, row.tokens ? "Open tokens" : "Open")),
      row.error ? el("div", {class: "error clip"}, row.error) : null))));
  $("count").textContent = chosen.length === data.samples.length ? `${chosen.length} samples` : `${chosen.length} of ${data.samples.length} samples`;
  $("position").textContent = chosen.length ? `${first + 1}–${Math.min(first + PAGE, chosen.length)} of ${chosen.length}` : data.samples.length ? "nothing matches" : "no samples";
  $("before").disabled = first === 0; $("after").disabled = first + PAGE >= chosen.length;
}
function heads() {
  $("heads").replaceChildren(...COLUMNS.map(([key, label]) => el("th", {scope: "col", "aria-sort": sorted.key === key ? (sorted.down ? "descending" : "ascending") : "none"},
    el("button", {type: "button", onclick: () => { sorted = {key, down: sorted.key === key ? !sorted.down : key !== "text"}; first = 0; heads(); choose(); $("heads").children[COLUMNS.findIndex(c => c[0] === key)].firstChild.focus(); }},
      label + (sorted.key === key ? (sorted.down ? " ↓" : " ↑") : "")))));
}
function cell(value) {
  // A spreadsheet must not run a text as a formula.
  const text = value === null || value === undefined ? "" : String(value);
  const safe = typeof value === "string" && /^\s*[=+\-@\t\r＝＋－＠]/.test(text) ? "'" + text : text;
  return /[",\r\n;]/.test(safe) ? '"' + safe.replaceAll('"', '""') + '"' : safe;
}
function csv() {
  const names = ["run", "step", "id", "prompt", "text", "score", "kl", "advantage", "length", "end", "error"];
  const lines = [names, ...chosen.map(row => names.map(name => name === "run" ? data.runs[row.run].name : row[name] ?? null))];
  const url = URL.createObjectURL(new Blob([lines.map(line => line.map(cell).join(",")).join("\r\n") + "\r\n"], {type: "text/csv"}));
  el("a", {href: url, download: "completions.csv"}).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// One completion -----------------------------------------------------------------------------------------------------

function open_(row) {
  const facts = [["score", show(row.score)], ["KL", show(row.kl) + " nats"], ["advantage", show(row.advantage)], ["length", row.length + " tokens"], ["ended by", row.end || "–"],
    ...Object.entries(row.parts).map(([name, value]) => ["reward " + name, show(value)])];
  $("detail-title").textContent = `Step ${row.step}, prompt ${row.id}` + (data.runs.length > 1 ? `, ${data.runs[row.run].name}` : "");
  $("detail-body").replaceChildren(...[
    el("div", {class: "scroll"}, el("table", {}, el("tbody", {}, el("tr", {}, ...facts.map(([name]) => el("th", {scope: "col"}, name))), el("tr", {}, ...facts.map(([, value]) => el("td", {}, value)))))),
    row.error ? el("p", {class: "error"}, row.error) : null,
    el("h3", {}, "Prompt"), el("div", {class: "body", dir: "auto"}, row.prompt),
    el("h3", {}, "Completion"), row.tokens ? heat(row.tokens) : el("div", {class: "body", dir: "auto"}, row.text),
    ...others(row)].filter(Boolean));
  if (!$("detail").open) $("detail").showModal();
  $("detail").scrollTop = 0;
}
const MEASURES = [["reward", "Reward"], ["kl", "KL"], ["advantage", "Advantage"], ["value", "Value"]];
function heat(tokens) {
  const names = MEASURES.filter(([key]) => tokens[key]), box = el("div", {class: "body heat", tabindex: "0", role: "group", "aria-label": "Tokens. Left and right arrow keys read out values."});
  const said = el("p", {class: "readout", "aria-live": "polite"}), scale = el("span", {});
  const spans = tokens.text.map(text => el("span", {}, text));
  let at = -1, current = "";
  box.append(...spans);
  const say = i => { spans[at]?.classList.remove("at"); at = i; spans[i].classList.add("at");
    said.textContent = `“${tokens.text[i]}”  ` + names.map(([key, label]) => `${label.toLowerCase()} ${show(tokens[key][i])}`).join(", "); };
  spans.forEach((span, i) => span.addEventListener("mouseenter", () => say(i)));
  box.onkeydown = event => { const move = {ArrowLeft: -1, ArrowRight: 1}[event.key]; if (move) { event.preventDefault(); say(Math.max(0, Math.min(spans.length - 1, at + move))); } };
  const paint = key => {
    current = key;
    const values = tokens[key].map(value => value ?? 0), most = Math.max(1e-9, ...values.map(Math.abs));
    spans.forEach((span, i) => { const share = Math.abs(values[i]) / most; span.style.backgroundColor = `rgba(${values[i] < 0 ? "214,90,20" : "20,110,220"},${(0.75 * share).toFixed(3)})`; });
    scale.replaceChildren(show(-most), el("span", {class: "scale"}), show(most));
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(names[i][0] === key)));
  };
  const buttons = names.map(([key, label]) => el("button", {type: "button", onclick: () => paint(key)}, label));
  if (names.length) paint(names.some(([key]) => key === "advantage") ? "advantage" : names[0][0]);
  return el("div", {}, el("div", {class: "choices"}, "Colour by ", ...buttons, scale), box, said);
}
function others(row) {
  const rows = data.samples.filter(other => other.id === row.id && other.prompt === row.prompt && other !== row).sort((a, b) => a.step - b.step || a.run - b.run);
  if (!rows.length) return [];
  const name = other => `step ${other.step}` + (data.runs.length > 1 ? `, ${data.runs[other.run].name}` : "") + `, score ${show(other.score)}`;
  const select = el("select", {"aria-label": "Compare with"}, ...rows.map((other, i) => el("option", {value: String(i)}, name(other))));
  const pair = el("div", {class: "two"});
  const compare = () => {
    const other = rows[+select.value], [left, right] = other.step <= row.step ? [other, row] : [row, other];
    const [before, after] = wordDiff(left.text, right.text);
    pair.replaceChildren(el("div", {}, el("h3", {}, name(left)), el("div", {class: "body", dir: "auto"}, ...before)), el("div", {}, el("h3", {}, name(right)), el("div", {class: "body", dir: "auto"}, ...after)));
  };
  select.addEventListener("change", compare);
  const farthest = rows.reduce((best, other, i) => Math.abs(other.step - row.step) > Math.abs(rows[best].step - row.step) ? i : best, 0);
  select.value = String(farthest); compare();
  return [el("h3", {}, "The same prompt at another step"), el("div", {class: "choices"}, "Compare with ", select), pair];
}
function wordDiff(left, right) {
  const a = left.split(/(\s+)/), b = right.split(/(\s+)/), n = a.length, m = b.length;
  if (n * m > 4e6) return [[left], [right]];
  const table = Array.from({length: n + 1}, () => new Uint16Array(m + 1));
  for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--) table[i][j] = a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
  const before = [], after = [];
  let i = 0, j = 0;
  while (i < n || j < m) {
    if (i < n && j < m && a[i] === b[j]) { before.push(a[i++]); after.push(b[j++]); }
    else if (j >= m || (i < n && table[i + 1][j] >= table[i][j + 1])) before.push(el("del", {}, a[i++]));
    else after.push(el("ins", {}, b[j++]));
  }
  return [before, after];
}

// Start, and the live page -------------------------------------------------------------------------------------------

$("controls").addEventListener("submit", event => event.preventDefault());
$("controls").addEventListener("input", () => { first = 0; choose(); });
$("csv").addEventListener("click", csv);
$("before").addEventListener("click", () => { first = Math.max(0, first - PAGE); list(); });
$("after").addEventListener("click", () => { first += PAGE; list(); });
heads(); choose(); drawAll();

if (data.live) {
  let version = "", wait = 2000;
  const poll = async () => {
    try {
      const answer = await fetch("version", {cache: "no-store"});
      if (!answer.ok) throw new Error(answer.status);
      const now = await answer.text();
      if (version && now !== version) {
        const started = performance.now(), next = new DOMParser().parseFromString(await (await fetch("./", {cache: "no-store"})).text(), "text/html");
        const fresh = JSON.parse(next.getElementById("report-data").textContent);
        const same = fresh.charts.length === data.charts.length;
        if (!same) return location.reload();
        data = fresh;
        document.querySelectorAll("[data-live][id], figcaption[id]").forEach(node => { const other = next.getElementById(node.id); if (other) node.replaceChildren(...other.childNodes); });
        document.querySelectorAll("figure.chart").forEach(node => { const other = next.getElementById(node.getAttribute("aria-labelledby")); if (other) node.className = other.parentElement.className; });
        drawAll(); choose();
        wait = Math.max(2000, 10 * (performance.now() - started));
      }
      version = now;
      $("live").className = ""; $("live").textContent = "live";
    } catch { $("live").className = "off"; $("live").textContent = "the server is gone"; }
    setTimeout(poll, wait);
  };
  poll();
}
})();
