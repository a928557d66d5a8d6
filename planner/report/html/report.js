"use strict";
// Draws the report from its data (planner/report/html/data.py). Names of the user's become text nodes, or are escaped for
// plotly, which reads some HTML in its texts.

const $ = (id) => document.getElementById(id);
const DARK = "#1d1d1d", GREY = "#6f6f6f", BLUE = "#0072b2", ORANGE = "#e69f00", RED = "#d55e00", GRID = "#e8e8e8";
const LAYOUT = {
  font: { family: "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", size: 13, color: DARK },
  paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", hoverlabel: { align: "left" },
};
const CONFIG = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };

let data, chosen, marked = null, times = null;

async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return await new Response(stream).text();
}

// Units, as planner/units.py writes them

function bytesText(nbytes) {
  let size = nbytes;
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(size) < 1024) return unit === "B" ? `${Math.round(size)} B` : `${size.toFixed(2)} ${unit}`;
    size /= 1024;
  }
  return `${size.toFixed(2)} TiB`;
}

function timeText(ns) {
  for (const [unit, scale] of [["s", 1e9], ["ms", 1e6], ["us", 1e3]])
    if (Math.abs(ns) >= scale) return `${Number((ns / scale).toPrecision(3))} ${unit}`;
  return `${Math.round(ns)} ns`;
}

function byteUnit(nbytes) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) if (nbytes >= 4 * size) return [unit, size];
  return ["B", 1];
}

function clockUnit(ns) {
  for (const [unit, size] of [["s", 1e9], ["ms", 1e6], ["us", 1e3]]) if (ns >= 2 * size) return [unit, size];
  return ["ns", 1];
}

const percent = (share, digits = 1) => `${(share * 100).toFixed(digits)} %`;
const more = (share) => `${share >= 0 ? "+" : ""}${percent(share)}`;
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");
const broken = (text, width = 70) => escaped(text.match(new RegExp(`.{1,${width}}`, "gsu"))?.join("\n") ?? "").replace(/\n/g, "<br>");

function made(tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

// The answer: does it fit, and what to type

function drawAnswer() {
  const plan = data.plans[chosen], plain = data.plain, spare = plan.budget_bytes - plan.peak_bytes;
  const measured = data.measured.find((row) => row.budget_bytes === plan.budget_bytes);
  const peak = measured ? measured.peak_bytes : plan.peak_bytes, fits = peak <= plan.budget_bytes;
  const how = measured ? "measured" : "predicted";
  $("answer").replaceChildren(
    made("span", fits ? "fits" : "does not fit", { class: fits ? "fits" : "over" }),
    ` ${bytesText(peak)} ${how} of a budget of ${bytesText(plan.budget_bytes)}. Without a plan the step peaks at ${bytesText(plain.peak_bytes)}: ` +
      (plain.peak_bytes <= plan.budget_bytes ? "that fits, too." : `${bytesText(plain.peak_bytes - plan.budget_bytes)} too much.`));
  const tiles = [
    ["budget", bytesText(plan.budget_bytes)],
    ["predicted peak", bytesText(plan.peak_bytes)],
    ["of the plain peak", percent(plan.peak_bytes / Math.max(1, plain.peak_bytes))],
    ["step time", more(plan.overhead)],
    ["from optimal, at most", percent(plan.gap, 2)],
    ["left to the allocator", bytesText(Math.min(spare, plan.margin_bytes))],
    ["ops run again", `${plan.num_recomputes} of ${data.num_ops}`],
  ];
  $("tiles").replaceChildren(...tiles.map(([what, figure]) => {
    const tile = made("div", "", { class: "tile" });
    tile.append(made("b", figure), made("span", what));
    return tile;
  }));
  $("call").value = `plan(model, ${plan.budget_bytes}, args, kwargs)`;
  $("plan-label").textContent = `${bytesText(plan.budget_bytes)} (${percent(plan.budget_bytes / Math.max(1, plain.peak_bytes))} of plain), ${more(plan.overhead)} time`;
}

async function copyCall() {
  const input = $("call");
  input.select();
  try {
    await navigator.clipboard.writeText(input.value);
  } catch {
    document.execCommand("copy"); // a page opened from a file may not use the clipboard's interface
  }
  $("copy-call").textContent = "copied";
  setTimeout(() => { $("copy-call").textContent = "copy"; }, 1500);
}

// The curve: peak against time

function curveTraces(unit, size, clock, tick) {
  const { plans, plain } = data;
  const hover = (plan) =>
    `budget ${bytesText(plan.budget_bytes)}<br>peak ${bytesText(plan.peak_bytes)} (${percent(plan.peak_bytes / Math.max(1, plain.peak_bytes))} of plain)<br>` +
    `step time ${timeText(plan.time_ns)} (${more(plan.overhead)})<br>at most ${percent(plan.gap, 2)} from optimal (${plan.status})<br>${plan.num_recomputes} ops run again`;
  const traces = [{
    name: "plans", x: plans.map((p) => p.peak_bytes / size), y: plans.map((p) => p.time_ns / tick), text: plans.map(hover),
    customdata: plans.map((_, k) => k), mode: "lines+markers", line: { color: BLUE }, marker: { size: 9 }, hovertemplate: "%{text}<extra>plan</extra>",
  }, {
    name: "bound: no schedule is faster", x: plans.map((p) => (p.budget_bytes - p.margin_bytes) / size),
    y: plans.map((p) => Math.min(p.bound_ns, p.time_ns) / tick), mode: "lines", line: { color: ORANGE, dash: "dash" }, hoverinfo: "skip",
  }, {
    name: "plain step", x: [plain.peak_bytes / size], y: [plain.time_ns / tick], mode: "markers",
    marker: { symbol: "circle-open", size: 15, color: BLUE, line: { width: 2 } }, hovertemplate: `plain step<br>${bytesText(plain.peak_bytes)}, ${timeText(plain.time_ns)}<extra></extra>`,
  }];
  const symbols = { "per block": ["square", "#cc79a7"], "sqrt(n)": ["diamond", "#009e73"], "whole modules": ["triangle-up", "#56b4e9"] };
  for (const family of new Set(data.references.map((r) => r.family))) {
    const members = data.references.filter((r) => r.family === family), [symbol, color] = symbols[family] ?? ["x-thin-open", GREY];
    traces.push({
      name: members.length > 1 ? family : members[0].name, x: members.map((r) => r.peak_bytes / size), y: members.map((r) => r.time_ns / tick),
      text: members.map((r) => `${escaped(r.name)}<br>${bytesText(r.peak_bytes)}, ${more(r.time_ns / Math.max(1, plain.time_ns) - 1)}<br>${besides(r)}`),
      mode: "markers", marker: { symbol, color, size: 10, line: { width: 2, color } }, hovertemplate: "%{text}<extra></extra>",
    });
  }
  const timed = data.measured.filter((row) => row.time_ratio !== null && row.time_spread);
  if (timed.length) traces.push({
    name: "measured (median and spread)", x: timed.map((r) => r.peak_bytes / size), y: timed.map((r) => (r.time_ratio * plain.time_ns) / tick), mode: "markers",
    marker: { symbol: "cross-thin-open", color: DARK, size: 10, line: { width: 2 } },
    error_y: { type: "data", symmetric: false, color: DARK, array: timed.map((r) => ((r.time_spread[1] - r.time_ratio) * plain.time_ns) / tick), arrayminus: timed.map((r) => ((r.time_ratio - r.time_spread[0]) * plain.time_ns) / tick) },
    text: timed.map((r) => `measured: ${bytesText(r.peak_bytes)}, ${r.time_ratio.toFixed(2)}x plain (${r.time_spread.map((t) => t.toFixed(2)).join("-")})`),
    hovertemplate: "%{text}<extra></extra>",
  });
  const plan = plans[chosen];
  traces.push({
    name: "shown below", x: [plan.peak_bytes / size], y: [plan.time_ns / tick], mode: "markers", marker: { symbol: "star", size: 18, color: RED }, hoverinfo: "skip",
  });
  return traces;
}

function besides(reference) {
  const fitting = data.plans.filter((plan) => plan.peak_bytes <= reference.peak_bytes);
  if (!fitting.length) return "no plan shown here peaks so low";
  const best = fitting.reduce((a, b) => (b.time_ns < a.time_ns ? b : a));
  return `a plan that peaks no higher: ${more(best.overhead)}`;
}

function drawCurve() {
  const [unit, size] = byteUnit(data.plain.peak_bytes), [clock, tick] = clockUnit(Math.max(...data.plans.map((p) => p.time_ns)));
  const traces = curveTraces(unit, size, clock, tick), floor = data.floor.bytes / size;
  const xs = traces.flatMap((t) => t.x).concat(floor), low = Math.min(...xs), high = Math.max(...xs), width = high - low || 1;
  const left = low - 0.1 * width, right = high + 0.04 * width, plain = data.plain.peak_bytes / size || 1;
  const layout = {
    ...LAYOUT, margin: { l: 70, r: 20, t: 50, b: 50 }, legend: { orientation: "v", x: 1.02, y: 1 },
    xaxis: { title: { text: `peak of the step [${unit}]` }, range: [left, right], gridcolor: GRID, zeroline: false },
    xaxis2: { title: { text: "of the plain step's peak [%]" }, range: [(left / plain) * 100, (right / plain) * 100], overlaying: "x", side: "top", tickmode: "linear", dtick: right - left > 0.5 * plain ? 10 : 5, showgrid: false, zeroline: false },
    yaxis: { title: { text: `step time [${clock}]` }, gridcolor: GRID, zeroline: false },
    shapes: [
      { type: "rect", xref: "x", yref: "paper", x0: left, x1: floor, y0: 0, y1: 1, fillcolor: "#dcdcdc", line: { width: 0 }, layer: "below" },
      { type: "line", xref: "x", yref: "paper", x0: data.plans[chosen].budget_bytes / size, x1: data.plans[chosen].budget_bytes / size, y0: 0, y1: 1, line: { color: RED, width: 1, dash: "dot" } },
    ],
    annotations: [{ x: floor, y: 0.5, xref: "x", yref: "paper", text: `no schedule fits below ${bytesText(data.floor.bytes)}`, textangle: -90, showarrow: false, xanchor: "right", font: { size: 11, color: "#444444" } }],
  };
  traces.push({ x: [plain], y: [data.plain.time_ns / tick], xaxis: "x2", mode: "markers", marker: { opacity: 0 }, showlegend: false, hoverinfo: "skip" });
  return Plotly.react($("curve"), traces, layout, CONFIG);
}

// Live memory

/** Bytes per drawn step of what `wanted` picks. */
function sumOver(series, wanted) {
  const change = new Float64Array(series.start_ns.length + 1), held = series.held;
  for (let k = 0; k < held.first.length; k++) {
    if (!wanted(k)) continue;
    change[held.first[k]] += held.bytes[k];
    change[held.last[k] + 1] -= held.bytes[k];
  }
  let now = 0;
  return Array.from(change.subarray(0, -1), (bytes) => (now += bytes));
}

const phaseOf = (series, k) => (k < series.boundary ? "forward" : series.again[k] ? "backward, run again" : "backward");

function stepText(series, k, total) {
  const [name, , module, place] = data.ops[series.op[k]];
  return `${phaseOf(series, k)}: ${broken(name)}<br>${broken([data.modules[module], place].filter(Boolean).join(" "))}<br>${bytesText(total)} live`;
}

function memoryTraces(unit, size, tick) {
  const plan = data.plans[chosen], plain = data.plain, traces = [];
  const x = (series) => [...series.start_ns, series.time_ns].map((ns) => ns / tick);
  const y = (values) => [...values, values.at(-1) ?? 0].map((bytes) => bytes / size);
  data.layers.forEach((layer, number) => {
    const values = sumOver(plan, (k) => plan.held.layer[k] === number);
    if (!values.some((bytes) => bytes > 0)) return;
    traces.push({
      name: broken(layer.label, 34), x: x(plan), y: y(values), stackgroup: "live", mode: "lines", line: { width: 0, shape: "hv", color: layer.color }, hoverinfo: "skip",
      fillcolor: layer.color, fillpattern: layer.hatched ? { shape: "/", bgcolor: layer.color, fgcolor: "#ffffff", size: 6, solidity: 0.3 } : undefined,
    });
  });
  const line = (name, series, how) => {
    const total = sumOver(series, () => true), text = total.map((bytes, k) => stepText(series, k, bytes));
    return { name, x: x(series), y: y(total), text: [...text, text.at(-1)], mode: "lines", line: { shape: "hv", ...how }, hovertemplate: `%{text}<extra>${name}</extra>` };
  };
  if (marked) {
    const total = sumOver(plan, (k) => marked.holds(data.modules[plan.held.module[k]]));
    traces.push({ name: broken(`marked: ${marked.label}`, 34), x: x(plan), y: y(total), mode: "lines", fill: "tozeroy", line: { shape: "hv", width: 2.5, color: DARK }, fillcolor: "rgba(0,0,0,0.45)", hovertemplate: `%{y:.2f} ${unit}<extra>marked</extra>` });
  }
  traces.push(line("planned, all", plan, { color: DARK, width: 1 }), line("plain step, all", plain, { color: RED, width: 1.6, dash: "dot" }));
  return traces;
}

function drawMemory() {
  const plan = data.plans[chosen], plain = data.plain;
  const [unit, size] = byteUnit(Math.max(plain.peak_bytes, plan.budget_bytes)), [clock, tick] = clockUnit(Math.max(plain.time_ns, plan.time_ns));
  times = { tick };
  const budget = plan.budget_bytes / size, boundary = (plan.start_ns[plan.boundary] ?? plan.time_ns) / tick;
  const layout = {
    ...LAYOUT, margin: { l: 70, r: 10, t: 30, b: 50 }, hovermode: "x", legend: { orientation: "h", y: -0.17, traceorder: "reversed", font: { size: 12 } },
    xaxis: { title: { text: `time of the step [${clock}]` }, range: [0, Math.max(plain.time_ns, plan.time_ns) / tick || 1], gridcolor: GRID, zeroline: false },
    yaxis: { title: { text: `live memory [${unit}]` }, rangemode: "tozero", gridcolor: GRID, zeroline: false },
    shapes: [
      { type: "line", xref: "paper", x0: 0, x1: 1, y0: budget, y1: budget, line: { color: DARK, dash: "dash", width: 1.2 } },
      { type: "line", yref: "paper", x0: boundary, x1: boundary, y0: 0, y1: 1, line: { color: DARK, dash: "dot", width: 1 } },
    ],
    annotations: [
      { xref: "paper", x: 0, y: budget, text: `budget ${bytesText(plan.budget_bytes)}`, showarrow: false, xanchor: "left", yanchor: "bottom", bgcolor: "rgba(255,255,255,0.8)", font: { size: 12 } },
      { yref: "paper", x: boundary, y: 1, text: "forward | backward", showarrow: false, yanchor: "bottom", font: { size: 12 } },
    ],
  };
  const thinned = plan.num_steps > plan.start_ns.length;
  $("memory-note").textContent = "Stack: the planned step; dotted line: the plain step. Hover to list what is live." +
    (thinned ? ` Drawn are ${plan.start_ns.length} of ${plan.num_steps} steps: of each short stretch the highest and the lowest, and the peak.` : "");
  return Plotly.react($("memory"), memoryTraces(unit, size, tick), layout, CONFIG);
}

/** What is live at a drawn step of the plan shown, in the box beside the picture. */
function showMoment(k, heading) {
  const plan = data.plans[chosen], held = plan.held, box = $("moment");
  if (k < 0 || !plan.start_ns.length) return;
  const groups = new Map(); // tensors of equal layers are one entry
  let total = 0;
  for (let j = 0; j < held.first.length; j++) {
    if (held.first[j] > k || held.last[j] < k) continue;
    total += held.bytes[j];
    const [tensor, form, writer] = data.tensors[held.tensor[j]], module = kindOf(data.modules[held.module[j]]);
    const key = JSON.stringify([held.layer[j], module, tensor.replace(/_\d+$/, ""), held.bytes[j], held.count[j], form]);
    const group = groups.get(key) ?? { bytes: 0, entries: 0, tensors: 0, first: j, tensor, form, writer };
    group.bytes += held.bytes[j];
    group.entries += 1;
    group.tensors += held.count[j];
    groups.set(key, group);
  }
  const [name, call, module, place] = data.ops[plan.op[k]], list = made("ol");
  for (const group of [...groups.values()].sort((a, b) => b.bytes - a.bytes).slice(0, 12)) {
    const layer = data.layers[held.layer[group.first]], own = data.modules[held.module[group.first]], outside = group.writer < 0;
    const item = made("li", "", { style: `--layer: ${layer.color}` });
    const what = outside ? (group.tensors > 1 ? `${group.tensors} tensors` : group.tensor) : `${group.tensor}${group.form ? ` ${group.form}` : ""}`;
    const others = outside || group.tensors === 1 ? "" : ` and ${group.tensors - 1} more`;
    item.append(made("b", bytesText(group.bytes)), ` ${what}${others}`);
    const where = [group.entries > 1 ? kindOf(own) : own, outside ? "" : data.ops[group.writer][3]].filter(Boolean).join(" ");
    item.append(made("div", [layer.label, where].filter(Boolean).join("; "), { class: "where" }));
    if (!outside) item.addEventListener("click", () => mark(own));
    list.append(item);
  }
  box.replaceChildren(
    made("h3", `${heading}: ${bytesText(total)} live`),
    made("div", `${timeText(plan.start_ns[k])}, ${phaseOf(plan, k)}: ${name}`),
    made("div", [data.modules[module], place].filter(Boolean).join(" "), { class: "where" }), made("div", call, { class: "where" }), list);
}

function drawnAt(series, ns) {
  let low = 0, high = series.start_ns.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (series.start_ns[middle] <= ns) low = middle + 1; else high = middle;
  }
  return Math.max(0, low - 1);
}

// The tree of modules

const opened = new Set();
const COLUMNS = ["kept_bytes", "freed_bytes", "recomputed_bytes", "recomputed_ns", "worth_ns"];

const kindOf = (path) => path.replace(/\d+/g, "*");

function tree() {
  const rows = data.plans[chosen].by_module, together = $("together").checked;
  const root = { label: "the model", path: "", children: new Map(), sums: Object.fromEntries(COLUMNS.map((name) => [name, 0])) };
  rows.module.forEach((module, k) => {
    const path = together ? kindOf(data.modules[module]) : data.modules[module], parts = path.split(".");
    let node = root;
    for (let depth = 0; depth <= parts.length; depth++) {
      for (const name of COLUMNS) node.sums[name] += rows[name][k];
      if (depth === parts.length) break;
      const below = parts.slice(0, depth + 1).join(".");
      if (!node.children.has(below)) node.children.set(below, { label: parts[depth], path: below, children: new Map(), sums: Object.fromEntries(COLUMNS.map((name) => [name, 0])), modules: new Set() });
      node = node.children.get(below);
      node.modules.add(data.modules[module]);
    }
  });
  return root;
}

function rateText(sums) {
  if (sums.freed_bytes) return sums.recomputed_ns ? bytesText((sums.freed_bytes / sums.recomputed_ns) * 1e6) : "no time";
  return "";
}

function tableRow(node, depth, most) {
  const row = made("tr"), first = made("td", "", { style: `padding-left: ${10 + 18 * depth}px` });
  if (node.path && node.children.size) {
    const fold = made("button", opened.has(node.path) ? "▾" : "▸", { class: "fold", type: "button", "aria-label": `${opened.has(node.path) ? "close" : "open"} ${node.path}`, "aria-expanded": opened.has(node.path) });
    fold.addEventListener("click", (event) => {
      event.stopPropagation();
      if (!opened.delete(node.path)) opened.add(node.path);
      drawModules();
    });
    first.append(fold);
  } else first.append(made("span", "", { class: "fold" }));
  first.append(node.label);
  row.append(first);
  const cell = (text, bytes, color) => {
    const width = bytes === undefined ? 0 : Math.round((90 * bytes) / Math.max(1, most));
    const style = width ? `background-image: linear-gradient(${color}, ${color}); background-size: ${width}% 3px` : "";
    row.append(made("td", text, { class: "number bar", style }));
  };
  cell(bytesText(node.sums.kept_bytes), node.sums.kept_bytes, BLUE);
  cell(bytesText(node.sums.freed_bytes), node.sums.freed_bytes, "#009e73");
  cell(bytesText(node.sums.recomputed_bytes), node.sums.recomputed_bytes, RED);
  cell(timeText(node.sums.recomputed_ns));
  cell(rateText(node.sums));
  row.dataset.path = node.path;
  if (marked && marked.path === node.path) row.classList.add("marked");
  if (node.path) row.addEventListener("click", () => mark(node.path));
  return row;
}

function drawModules() {
  const root = tree(), rows = [], most = Math.max(...COLUMNS.slice(0, 3).map((name) => root.sums[name]));
  const add = (node, depth) => {
    rows.push(tableRow(node, depth, most));
    if (node.path && !opened.has(node.path)) return;
    const below = [...node.children.values()].sort((a, b) => b.sums.kept_bytes + b.sums.freed_bytes - a.sums.kept_bytes - a.sums.freed_bytes);
    for (const child of below) add(child, depth + 1);
  };
  add(root, 0);
  $("modules").tBodies[0].replaceChildren(...rows);
}

/** Opens nodes from the outside in, as long as the table stays short. */
function openFirst() {
  opened.clear();
  let level = [...tree().children.values()], shown = level.length;
  while (level.length) {
    const below = level.flatMap((node) => [...node.children.values()]);
    if (!below.length || shown + below.length > 40) break;
    for (const node of level) if (node.children.size) opened.add(node.path);
    shown += below.length;
    level = below;
  }
}

/** Marks a module, with what is below it, in the tree and in the memory picture; the marked one again: takes the mark away. */
async function mark(path) {
  const together = $("together").checked, wanted = path === null || !together ? path : kindOf(path);
  const holds = (module) => {
    const own = together ? kindOf(module) : module;
    return own === wanted || own.startsWith(`${wanted}.`);
  };
  marked = path === null || (marked && marked.path === wanted) ? null : { path: wanted, label: wanted, holds };
  $("unmark").hidden = marked === null;
  for (let end = (wanted ?? "").lastIndexOf("."); end > 0; end = wanted.lastIndexOf(".", end - 1)) opened.add(wanted.slice(0, end));
  drawModules();
  await drawMemory();
}

// The floor, what was measured, provenance

function drawFloor() {
  const floor = data.floor, [unit, size] = byteUnit(floor.bytes), colors = ["#3b3b3b", BLUE, "#cc79a7", "#009e73", ORANGE, "#56b4e9", "#f0e442", RED, "#8c6d9c", "#767676", "#b4b4b4"];
  const small = floor.parts.filter(([, bytes]) => bytes < 0.005 * floor.bytes), rest = small.reduce((sum, [, bytes]) => sum + bytes, 0);
  const parts = small.length > 1 ? [...floor.parts.filter((part) => !small.includes(part)), [`${small.length} smaller parts`, rest]] : floor.parts;
  const traces = parts.map(([what, bytes], k) => ({
    type: "bar", orientation: "h", name: `${broken(what, 40)} ${bytesText(bytes)}`, x: [bytes / size], y: [""], marker: { color: colors[k % colors.length], line: { color: "#ffffff", width: 1 } },
    hovertemplate: `${broken(what, 40)}: ${bytesText(bytes)}<extra></extra>`,
  }));
  const layout = { ...LAYOUT, barmode: "stack", margin: { l: 20, r: 20, t: 10, b: 40 }, legend: { orientation: "h", y: -0.3, traceorder: "normal" }, xaxis: { ticksuffix: ` ${unit}`, gridcolor: GRID }, yaxis: { showticklabels: false } };
  const lowest = Math.min(...data.plans.map((plan) => plan.peak_bytes));
  $("advice").textContent = `${bytesText(floor.bytes)} are live while ${floor.op || "no op"} runs, in every schedule that keeps the order of the backward. To lower it: ${floor.advice}.` +
    (lowest < floor.bytes ? ` With its backward in another order, a plan shown here peaks at ${bytesText(lowest)}.` : "");
  return Plotly.react($("floor"), traces, layout, CONFIG);
}

function drawMeasured() {
  const checks = data.plans[chosen].check;
  if (!data.measured.length) {
    $("measured").replaceChildren(made("p", `No step was measured (${checks}). planner.verify and Sweep.verify run plans.`));
    return;
  }
  const table = made("table"), head = made("tr");
  head.append(...["budget", "predicted peak", "measured peak", "difference", "predicted time", "measured time (spread)", "bits"].map((text) => made("th", text)));
  table.append(head);
  for (const row of data.measured) {
    const line = made("tr"), over = row.peak_bytes - row.predicted_bytes, spread = row.time_spread ? ` (${row.time_spread.map((t) => t.toFixed(2)).join("-")})` : "";
    const cells = [bytesText(row.budget_bytes), bytesText(row.predicted_bytes), bytesText(row.peak_bytes), `${over > 0 ? "+" : ""}${bytesText(over)}`, `${row.predicted_ratio.toFixed(3)}x plain`,
      row.time_ratio === null ? "not timed" : `${row.time_ratio.toFixed(3)}x plain${spread}`, row.exact ? "equal" : "DIFFERENT"];
    line.append(...cells.map((text) => made("td", text, { class: "number" })));
    table.append(line);
  }
  $("measured").replaceChildren(table);
}

function drawProvenance() {
  const known = data.provenance ?? {}, plan = data.plans[chosen];
  const rows = [
    ["model", known.module], ["device", known.device && `${known.device}${known.is_here ? "" : " (not here)"}`],
    ["costs", known.costs && `${known.costs}${known.model ? ` for ${known.model}` : ""}${known.num_estimated ? `, ${known.num_estimated} of ${known.num_kernels} kernels estimated` : ""}`],
    ["torch", known.torch], ["date", known.date], ["submodules that run as they are", (known.opaque ?? []).join(", ")],
    ["captured once", (known.repeats ?? []).map(([kind, count]) => `${count} ${kind}`).join(", ")],
    ["ops", String(data.num_ops)], ["check of the plan", plan.check],
    ["solver", `${plan.solver}, ${plan.solve_s.toFixed(2)} s${plan.stopped ? "; stopped by the limit of wall-clock time: another run may give another plan" : ""}`],
    ["optimality", `at most ${percent(plan.gap, 2)} of the step from the best plan, for this backward order at these costs (${plan.status})`],
    ...data.infeasible.map((point) => [`no plan for ${bytesText(point.budget_bytes)}`, point.reason]),
  ];
  $("provenance").tBodies[0].replaceChildren(...rows.filter(([, text]) => text).map(([name, text]) => {
    const row = made("tr");
    row.append(made("td", name), made("td", text));
    return row;
  }));
}

// Together

async function choose(k) {
  chosen = k;
  $("plan").value = String(k);
  drawAnswer();
  drawModules();
  drawMeasured();
  drawProvenance();
  await Promise.all([drawCurve(), drawMemory()]);
  showMoment(data.plans[chosen].peak, "at the peak");
  document.body.dataset.plan = String(k);
}

function listen() {
  $("plan").addEventListener("input", () => choose(Number($("plan").value)));
  $("copy-call").addEventListener("click", copyCall);
  $("unmark").addEventListener("click", () => mark(null));
  $("together").addEventListener("change", async () => {
    openFirst();
    await mark(null);
  });
  $("curve").on("plotly_click", ({ points }) => {
    if (points[0].data.name === "plans") choose(points[0].customdata);
  });
  $("memory").on("plotly_hover", ({ points }) => {
    const ns = points[0].x * times.tick, plan = data.plans[chosen];
    showMoment(drawnAt(plan, ns + 0.5), "under the pointer");
  });
}

async function main() {
  const library = made("script", await unpack("packed-plotly"));
  document.head.append(library);
  data = JSON.parse(await unpack("packed-data"));
  document.querySelector("main").hidden = false;
  $("plan").max = String(data.plans.length - 1);
  $("choose").hidden = data.plans.length === 1;
  chosen = data.chosen;
  openFirst();
  await choose(chosen);
  await drawFloor();
  listen();
  document.body.dataset.ready = "true";
}

main().catch((error) => {
  $("answer").textContent = `This report could not be drawn: ${error}`;
  throw error;
});
