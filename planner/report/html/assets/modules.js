// The tree of modules

const opened = new Set();
const COLUMNS = ["kept_bytes", "freed_bytes", "recomputed_bytes", "recomputed_ns", "worth_ns"];

const kindOf = (path) => path.replace(/\d+/g, "*");

/** A path from the outside in; a number belongs to the list that it numbers: ["h.0", "mlp"] of "h.0.mlp". */
function partsOf(path) {
  const parts = [];
  for (const part of path.split(".")) {
    if (/^(\d+|\*)$/.test(part) && parts.length) parts[parts.length - 1] += `.${part}`;
    else parts.push(part);
  }
  return parts;
}

function node(label, path) {
  return { label, path, children: new Map(), modules: new Set(), sums: Object.fromEntries(COLUMNS.map((name) => [name, 0])) };
}

/** The modules of the plan shown, each with the sums of all below it. `modules`: the real paths that a node stands for. */
function tree() {
  const rows = data.plans[chosen].by_module,
    together = $("together").checked,
    root = node("the model", "");
  rows.module.forEach((module, k) => {
    const real = partsOf(data.modules[module]),
      parts = together ? real.map(kindOf) : real;
    let here = root;
    for (let depth = 0; depth <= parts.length; depth++) {
      for (const name of COLUMNS) here.sums[name] += rows[name][k];
      if (depth === parts.length) break;
      const below = parts.slice(0, depth + 1).join(".");
      if (!here.children.has(below)) here.children.set(below, node(parts[depth], below));
      here = here.children.get(below);
      here.modules.add(real.slice(0, depth + 1).join("."));
    }
  });
  return root;
}

function rateText(sums) {
  if (sums.freed_bytes) return sums.recomputed_ns ? bytesText((sums.freed_bytes / sums.recomputed_ns) * 1e6) : "no time";
  return "";
}

function tableRow(node, depth, most) {
  const row = made("tr"),
    first = made("td", "", { style: `padding-left: ${10 + 18 * depth}px` });
  if (node.path && node.children.size) {
    const fold = made("button", opened.has(node.path) ? "▾" : "▸", {
      class: "fold",
      type: "button",
      "aria-label": `${opened.has(node.path) ? "close" : "open"} ${node.path}`,
      "aria-expanded": opened.has(node.path),
    });
    fold.addEventListener("click", (event) => {
      event.stopPropagation();
      if (!opened.delete(node.path)) opened.add(node.path);
      drawModules();
    });
    first.append(fold);
  } else first.append(made("span", "", { class: "fold" }));
  first.append(node.modules.size > 1 ? `${node.label} (${node.modules.size}x)` : node.label);
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
  const root = tree(),
    rows = [],
    most = Math.max(...COLUMNS.slice(0, 3).map((name) => root.sums[name]));
  const add = (node, depth) => {
    rows.push(tableRow(node, depth, most));
    if (node.path && !opened.has(node.path)) return;
    const below = [...node.children.values()].sort(
      (a, b) => b.sums.kept_bytes + b.sums.freed_bytes - a.sums.kept_bytes - a.sums.freed_bytes,
    );
    for (const child of below) add(child, depth + 1);
  };
  add(root, 0);
  $("modules").tBodies[0].replaceChildren(...rows);
}

/** Opens nodes from the outside in, as long as the table stays short. */
function openFirst() {
  opened.clear();
  let level = [...tree().children.values()],
    shown = level.length;
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
  const together = $("together").checked,
    wanted = path === null || !together ? path : kindOf(path);
  const holds = (module) => {
    const own = together ? kindOf(module) : module;
    return own === wanted || own.startsWith(`${wanted}.`);
  };
  marked = path === null || (marked && marked.path === wanted) ? null : { path: wanted, label: wanted, holds };
  $("unmark").hidden = marked === null;
  for (let end = (wanted ?? "").lastIndexOf("."); end > 0; end = wanted.lastIndexOf(".", end - 1))
    opened.add(wanted.slice(0, end));
  drawModules();
  await drawMemory();
}
