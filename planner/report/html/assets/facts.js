// The floor, what was measured, provenance

function drawFloor() {
  const floor = data.floor,
    [unit, size] = byteUnit(floor.bytes),
    colors = ["#3b3b3b", BLUE, "#cc79a7", "#009e73", ORANGE, "#56b4e9", "#f0e442", RED, "#8c6d9c", "#767676", "#b4b4b4"];
  const small = floor.parts.filter(([, bytes]) => bytes < 0.005 * floor.bytes),
    rest = small.reduce((sum, [, bytes]) => sum + bytes, 0);
  const parts =
    small.length > 1
      ? [...floor.parts.filter((part) => !small.includes(part)), [`${small.length} smaller parts`, rest]]
      : floor.parts;
  const traces = parts.map(([what, bytes], k) => ({
    type: "bar",
    orientation: "h",
    name: `${broken(what, 40)} ${bytesText(bytes)}`,
    x: [bytes / size],
    y: [""],
    marker: { color: colors[k % colors.length], line: { color: "#ffffff", width: 1 } },
    hovertemplate: `${broken(what, 40)}: ${bytesText(bytes)}<extra></extra>`,
  }));
  const layout = {
    ...LAYOUT,
    barmode: "stack",
    margin: { l: 20, r: 20, t: 32, b: 40 },
    legend: { orientation: "h", y: -0.3, traceorder: "normal" },
    xaxis: { ticksuffix: ` ${unit}`, gridcolor: GRID },
    yaxis: { showticklabels: false },
  };
  const lowest = Math.min(...data.plans.map((plan) => plan.peak_bytes));
  $("advice").textContent =
    `${bytesText(floor.bytes)} are live while ${floor.op || "no op"} runs, in every schedule that keeps the order of the backward. To lower it: ${floor.advice}.` +
    (lowest < floor.bytes ? ` With its backward in another order, a plan shown here peaks at ${bytesText(lowest)}.` : "");
  return Plotly.react($("floor"), traces, layout, CONFIG);
}

function drawMeasured() {
  const checks = data.plans[chosen].check;
  if (!data.measured.length) {
    $("measured").replaceChildren(made("p", `No step was measured (${checks}). planner.verify and Sweep.verify run plans.`));
    return;
  }
  const table = made("table"),
    head = made("tr");
  head.append(
    ...["budget", "predicted peak", "measured peak", "difference", "predicted time", "measured time (spread)", "bits"].map(
      (text) => made("th", text),
    ),
  );
  table.append(head);
  for (const row of data.measured) {
    const line = made("tr"),
      over = row.peak_bytes - row.predicted_bytes,
      spread = row.time_spread ? ` (${row.time_spread.map((t) => t.toFixed(2)).join("-")})` : "";
    const cells = [
      bytesText(row.budget_bytes),
      bytesText(row.predicted_bytes),
      bytesText(row.peak_bytes),
      `${over > 0 ? "+" : ""}${bytesText(over)}`,
      `${row.predicted_ratio.toFixed(3)}x plain`,
      row.time_ratio === null ? "not timed" : `${row.time_ratio.toFixed(3)}x plain${spread}`,
      row.exact ? "equal" : "DIFFERENT",
    ];
    line.append(...cells.map((text) => made("td", text, { class: "number" })));
    table.append(line);
  }
  $("measured").replaceChildren(table);
}

function drawProvenance() {
  const known = data.provenance ?? {},
    plan = data.plans[chosen];
  const rows = [
    ["model", known.module],
    ["backward starts from", (known.loss ?? []).slice(0, 4).join(", ") + ((known.loss ?? []).length > 4 ? ", ..." : "")],
    ["for", known.call],
    ["device", known.device && `${known.device}${known.is_here ? "" : " (not here)"}`],
    [
      "costs",
      known.costs &&
        `${known.costs}${known.model ? ` for ${known.model}` : ""}${known.num_estimated ? `, ${known.num_estimated} of ${known.num_kernels} kernels estimated` : ""}`,
    ],
    ["torch", known.torch],
    ["date", known.date],
    ["submodules that run as they are", (known.opaque ?? []).join(", ")],
    ["captured once", (known.repeats ?? []).map(([kind, count]) => `${count} ${kind}`).join(", ")],
    ["ops", String(data.num_ops)],
    ["check of the plan", plan.check],
    [
      "solver",
      `${plan.solver}, ${plan.solve_s.toFixed(2)} s${plan.stopped ? "; stopped by the limit of wall-clock time: another run may give another plan" : ""}`,
    ],
    [
      "optimality",
      `at most ${percent(plan.gap, 2)} of the step from the best plan, for this backward order at these costs (${plan.status})`,
    ],
    ...data.infeasible.map((point) => [`no plan for ${bytesText(point.budget_bytes)}`, point.reason]),
  ];
  $("provenance").tBodies[0].replaceChildren(
    ...rows
      .filter(([, text]) => text)
      .map(([name, text]) => {
        const row = made("tr");
        row.append(made("td", name), made("td", text));
        return row;
      }),
  );
}
