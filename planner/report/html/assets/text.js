"use strict";
// Draws the report from its data (planner/report/html/data.py). Names of the user's become text nodes, or are escaped for
// plotly, which reads some HTML in its texts.

const $ = (id) => document.getElementById(id);
const DARK = "#1d1d1d",
  GREY = "#6f6f6f",
  BLUE = "#0072b2",
  ORANGE = "#e69f00",
  RED = "#d55e00",
  GRID = "#e8e8e8";
const LAYOUT = {
  font: { family: "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif", size: 13, color: DARK },
  paper_bgcolor: "#ffffff",
  plot_bgcolor: "#ffffff",
  hoverlabel: { align: "left" },
};
const CONFIG = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };

let data,
  chosen,
  marked = null,
  times = null;

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
  for (const [unit, scale] of [
    ["s", 1e9],
    ["ms", 1e6],
    ["us", 1e3],
  ])
    if (Math.abs(ns) >= scale) return `${Number((ns / scale).toPrecision(3))} ${unit}`;
  return `${Math.round(ns)} ns`;
}

function byteUnit(nbytes) {
  for (const [unit, size] of [
    ["GiB", 2 ** 30],
    ["MiB", 2 ** 20],
    ["KiB", 2 ** 10],
  ])
    if (nbytes >= 4 * size) return [unit, size];
  return ["B", 1];
}

function clockUnit(ns) {
  for (const [unit, size] of [
    ["s", 1e9],
    ["ms", 1e6],
    ["us", 1e3],
  ])
    if (ns >= 2 * size) return [unit, size];
  return ["ns", 1];
}

const percent = (share, digits = 1) => `${(share * 100).toFixed(digits)} %`;
const more = (share) => `${share >= 0 ? "+" : ""}${percent(share)}`;
const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");
const broken = (text, width = 70) =>
  escaped(text.match(new RegExp(`.{1,${width}}`, "gsu"))?.join("\n") ?? "").replace(/\n/g, "<br>");

function made(tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
