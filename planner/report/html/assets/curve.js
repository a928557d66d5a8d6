// The curve: peak against time

function curveTraces(unit, size, clock, tick) {
  const { plans, plain } = data;
  const hover = (plan) =>
    `budget ${bytesText(plan.budget_bytes)}<br>peak ${bytesText(plan.peak_bytes)} (${percent(plan.peak_bytes / Math.max(1, plain.peak_bytes))} of plain)<br>` +
    `step time ${timeText(plan.time_ns)} (${more(plan.overhead)})<br>at most ${percent(plan.gap, 2)} from optimal (${plan.status})<br>${plan.num_recomputes} ops run again`;
  const traces = [
    {
      name: "plans",
      x: plans.map((p) => p.peak_bytes / size),
      y: plans.map((p) => p.time_ns / tick),
      text: plans.map(hover),
      customdata: plans.map((_, k) => k),
      mode: "lines+markers",
      line: { color: BLUE },
      marker: { size: 9 },
      hovertemplate: "%{text}<extra>plan</extra>",
    },
    {
      name: "bound: no schedule is faster",
      x: plans.map((p) => (p.budget_bytes - p.margin_bytes) / size),
      y: plans.map((p) => Math.min(p.bound_ns, p.time_ns) / tick),
      mode: "lines",
      line: { color: ORANGE, dash: "dash" },
      hoverinfo: "skip",
    },
    {
      name: "plain step",
      x: [plain.peak_bytes / size],
      y: [plain.time_ns / tick],
      mode: "markers",
      marker: { symbol: "circle-open", size: 15, color: BLUE, line: { width: 2 } },
      hovertemplate: `plain step<br>${bytesText(plain.peak_bytes)}, ${timeText(plain.time_ns)}<extra></extra>`,
    },
  ];
  const symbols = {
    "per block": ["square", "#cc79a7"],
    "sqrt(n)": ["diamond", "#009e73"],
    "whole modules": ["triangle-up", "#56b4e9"],
  };
  for (const family of new Set(data.references.map((r) => r.family))) {
    const members = data.references.filter((r) => r.family === family),
      [symbol, color] = symbols[family] ?? ["x-thin-open", GREY];
    traces.push({
      name: members.length > 1 ? family : members[0].name,
      x: members.map((r) => r.peak_bytes / size),
      y: members.map((r) => r.time_ns / tick),
      text: members.map(
        (r) =>
          `${escaped(r.name)}<br>${bytesText(r.peak_bytes)}, ${more(r.time_ns / Math.max(1, plain.time_ns) - 1)}<br>${besides(r)}`,
      ),
      mode: "markers",
      marker: { symbol, color, size: 10, line: { width: 2, color } },
      hovertemplate: "%{text}<extra></extra>",
    });
  }
  const timed = data.measured.filter((row) => row.time_ratio !== null && row.time_spread);
  if (timed.length)
    traces.push({
      name: "measured (median and spread)",
      x: timed.map((r) => r.peak_bytes / size),
      y: timed.map((r) => (r.time_ratio * plain.time_ns) / tick),
      mode: "markers",
      marker: { symbol: "cross-thin-open", color: DARK, size: 10, line: { width: 2 } },
      error_y: {
        type: "data",
        symmetric: false,
        color: DARK,
        array: timed.map((r) => ((r.time_spread[1] - r.time_ratio) * plain.time_ns) / tick),
        arrayminus: timed.map((r) => ((r.time_ratio - r.time_spread[0]) * plain.time_ns) / tick),
      },
      text: timed.map(
        (r) =>
          `measured: ${bytesText(r.peak_bytes)}, ${r.time_ratio.toFixed(2)}x plain (${r.time_spread.map((t) => t.toFixed(2)).join("-")})`,
      ),
      hovertemplate: "%{text}<extra></extra>",
    });
  const plan = plans[chosen];
  traces.push({
    name: "shown below",
    x: [plan.peak_bytes / size],
    y: [plan.time_ns / tick],
    mode: "markers",
    marker: { symbol: "star", size: 18, color: RED },
    hoverinfo: "skip",
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
  const [unit, size] = byteUnit(data.plain.peak_bytes),
    [clock, tick] = clockUnit(Math.max(...data.plans.map((p) => p.time_ns)));
  const traces = curveTraces(unit, size, clock, tick),
    floor = data.floor.bytes / size;
  const xs = traces.flatMap((t) => t.x).concat(floor),
    low = Math.min(...xs),
    high = Math.max(...xs),
    width = high - low || 1;
  const left = low - 0.1 * width,
    right = high + 0.04 * width,
    plain = data.plain.peak_bytes / size || 1;
  const layout = {
    ...LAYOUT,
    margin: { l: 70, r: 20, t: 50, b: 50 },
    legend: { orientation: "v", x: 1.02, y: 1 },
    xaxis: { title: { text: `peak of the step [${unit}]` }, range: [left, right], gridcolor: GRID, zeroline: false },
    xaxis2: {
      title: { text: "of the plain step's peak [%]" },
      range: [(left / plain) * 100, (right / plain) * 100],
      overlaying: "x",
      side: "top",
      tickmode: "linear",
      dtick: right - left > 0.5 * plain ? 10 : 5,
      showgrid: false,
      zeroline: false,
    },
    yaxis: { title: { text: `step time [${clock}]` }, gridcolor: GRID, zeroline: false },
    shapes: [
      {
        type: "rect",
        xref: "x",
        yref: "paper",
        x0: left,
        x1: floor,
        y0: 0,
        y1: 1,
        fillcolor: "#dcdcdc",
        line: { width: 0 },
        layer: "below",
      },
      {
        type: "line",
        xref: "x",
        yref: "paper",
        x0: data.plans[chosen].budget_bytes / size,
        x1: data.plans[chosen].budget_bytes / size,
        y0: 0,
        y1: 1,
        line: { color: RED, width: 1, dash: "dot" },
      },
    ],
    annotations: [
      {
        x: floor,
        y: 0.5,
        xref: "x",
        yref: "paper",
        text: `no schedule fits below ${bytesText(data.floor.bytes)}`,
        textangle: -90,
        showarrow: false,
        xanchor: "right",
        font: { size: 11, color: "#444444" },
      },
    ],
  };
  traces.push({
    x: [plain],
    y: [data.plain.time_ns / tick],
    xaxis: "x2",
    mode: "markers",
    marker: { opacity: 0 },
    showlegend: false,
    hoverinfo: "skip",
  });
  return Plotly.react($("curve"), traces, layout, CONFIG);
}
