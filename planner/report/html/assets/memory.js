// Live memory

/** Bytes per drawn step of what `wanted` picks. */
function sumOver(series, wanted) {
  const change = new Float64Array(series.start_ns.length + 1),
    held = series.held;
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
  const plan = data.plans[chosen],
    plain = data.plain,
    traces = [];
  const x = (series) => [...series.start_ns, series.time_ns].map((ns) => ns / tick);
  const y = (values) => [...values, values.at(-1) ?? 0].map((bytes) => bytes / size);
  data.layers.forEach((layer, number) => {
    const values = sumOver(plan, (k) => plan.held.layer[k] === number);
    if (!values.some((bytes) => bytes > 0)) return;
    traces.push({
      name: broken(layer.label, 46),
      x: x(plan),
      y: y(values),
      stackgroup: "live",
      mode: "lines",
      line: { width: 0, shape: "hv", color: layer.color },
      hoverinfo: "skip",
      fillcolor: layer.color,
      fillpattern: layer.hatched ? { shape: "/", bgcolor: layer.color, fgcolor: "#ffffff", size: 6, solidity: 0.3 } : undefined,
    });
  });
  const line = (name, series, how) => {
    const total = sumOver(series, () => true),
      text = total.map((bytes, k) => stepText(series, k, bytes));
    return {
      name,
      x: x(series),
      y: y(total),
      text: [...text, text.at(-1)],
      mode: "lines",
      line: { shape: "hv", ...how },
      hovertemplate: `%{text}<extra>${name}</extra>`,
    };
  };
  if (marked) {
    const total = sumOver(plan, (k) => marked.holds(data.modules[plan.held.module[k]]));
    traces.push({
      name: broken(`marked: ${marked.label}`, 34),
      x: x(plan),
      y: y(total),
      mode: "lines",
      fill: "tozeroy",
      line: { shape: "hv", width: 2.5, color: DARK },
      fillcolor: "rgba(0,0,0,0.45)",
      hovertemplate: `%{y:.2f} ${unit}<extra>marked</extra>`,
    });
  }
  traces.push(
    line("planned, all", plan, { color: DARK, width: 1 }),
    line("plain step, all", plain, { color: RED, width: 1.6, dash: "dot" }),
  );
  return traces;
}

function drawMemory() {
  const plan = data.plans[chosen],
    plain = data.plain;
  const [unit, size] = byteUnit(Math.max(plain.peak_bytes, plan.budget_bytes)),
    [clock, tick] = clockUnit(Math.max(plain.time_ns, plan.time_ns));
  times = { tick };
  const budget = plan.budget_bytes / size,
    boundary = (plan.start_ns[plan.boundary] ?? plan.time_ns) / tick;
  const layout = {
    ...LAYOUT,
    margin: { l: 70, r: 10, t: 30, b: 50 },
    hovermode: "x",
    legend: { orientation: "h", y: -0.17, traceorder: "reversed", font: { size: 12 } },
    xaxis: {
      title: { text: `time of the step [${clock}]` },
      range: [0, Math.max(plain.time_ns, plan.time_ns) / tick || 1],
      gridcolor: GRID,
      zeroline: false,
    },
    yaxis: { title: { text: `live memory [${unit}]` }, rangemode: "tozero", gridcolor: GRID, zeroline: false },
    shapes: [
      { type: "line", xref: "paper", x0: 0, x1: 1, y0: budget, y1: budget, line: { color: DARK, dash: "dash", width: 1.2 } },
      { type: "line", yref: "paper", x0: boundary, x1: boundary, y0: 0, y1: 1, line: { color: DARK, dash: "dot", width: 1 } },
    ],
    annotations: [
      {
        xref: "paper",
        x: 0,
        y: budget,
        text: `budget ${bytesText(plan.budget_bytes)}`,
        showarrow: false,
        xanchor: "left",
        yanchor: "bottom",
        bgcolor: "rgba(255,255,255,0.8)",
        font: { size: 12 },
      },
      { yref: "paper", x: boundary, y: 1, text: "forward | backward", showarrow: false, yanchor: "bottom", font: { size: 12 } },
    ],
  };
  const thinned = plan.num_steps > plan.start_ns.length;
  $("memory-note").textContent =
    "Stack: the planned step; dotted line: the plain step. Hover to list what is live." +
    (thinned
      ? ` Drawn are ${plan.start_ns.length} of ${plan.num_steps} steps: of each short stretch the highest and the lowest, and the peak.`
      : "");
  return Plotly.react($("memory"), memoryTraces(unit, size, tick), layout, CONFIG);
}

/** What is live at a drawn step of the plan shown, in the box beside the picture. */
function showMoment(k, heading) {
  const plan = data.plans[chosen],
    held = plan.held,
    box = $("moment");
  if (k < 0 || !plan.start_ns.length) return;
  const groups = new Map(); // tensors of equal layers are one entry
  let total = 0;
  for (let j = 0; j < held.first.length; j++) {
    if (held.first[j] > k || held.last[j] < k) continue;
    total += held.bytes[j];
    const [tensor, form, writer] = data.tensors[held.tensor[j]],
      module = kindOf(data.modules[held.module[j]]);
    const key = JSON.stringify([held.layer[j], module, tensor.replace(/_\d+$/, ""), held.bytes[j], held.count[j], form]);
    const group = groups.get(key) ?? { bytes: 0, entries: 0, tensors: 0, first: j, tensor, form, writer };
    group.bytes += held.bytes[j];
    group.entries += 1;
    group.tensors += held.count[j];
    groups.set(key, group);
  }
  const [name, call, module, place] = data.ops[plan.op[k]],
    list = made("ol");
  for (const group of [...groups.values()].sort((a, b) => b.bytes - a.bytes).slice(0, 12)) {
    const layer = data.layers[held.layer[group.first]],
      own = data.modules[held.module[group.first]],
      outside = group.writer < 0;
    const item = made("li", "", { style: `--layer: ${layer.color}` });
    const what = outside
      ? group.tensors > 1
        ? `${group.tensors} tensors`
        : group.tensor
      : `${group.tensor}${group.form ? ` ${group.form}` : ""}`;
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
    made("div", [data.modules[module], place].filter(Boolean).join(" "), { class: "where" }),
    made("div", call, { class: "where" }),
    list,
  );
}

function drawnAt(series, ns) {
  let low = 0,
    high = series.start_ns.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (series.start_ns[middle] <= ns) low = middle + 1;
    else high = middle;
  }
  return Math.max(0, low - 1);
}
