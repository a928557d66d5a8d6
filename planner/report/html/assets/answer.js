// The answer: does it fit, and what to type

function drawAnswer() {
  const plan = data.plans[chosen],
    plain = data.plain;
  const measured = data.measured.find((row) => row.budget_bytes === plan.budget_bytes);
  const peak = measured ? measured.peak_bytes : plan.peak_bytes,
    fits = peak <= plan.budget_bytes;
  const how = measured ? "measured" : "predicted";
  $("answer").replaceChildren(
    made("span", fits ? "fits" : "does not fit", { class: fits ? "fits" : "over" }),
    ` ${bytesText(peak)} ${how} of a budget of ${bytesText(plan.budget_bytes)}. Without a plan the step peaks at ${bytesText(plain.peak_bytes)}: ` +
      (plain.peak_bytes <= plan.budget_bytes
        ? "that fits, too."
        : `${bytesText(plain.peak_bytes - plan.budget_bytes)} too much.`) +
      (!fits && data.provenance?.costs === "estimated"
        ? " Estimated costs leave out what kernels need for themselves: measure them."
        : ""),
  );
  const tiles = [
    ["budget", bytesText(plan.budget_bytes)],
    ["predicted peak", bytesText(plan.peak_bytes)],
    ["of the plain peak", percent(plan.peak_bytes / Math.max(1, plain.peak_bytes))],
    ["step time", more(plan.overhead)],
    ["from optimal, at most", percent(plan.gap, 2)],
    ["left to the allocator", bytesText(plan.margin_bytes)],
    ["ops run again", `${plan.num_recomputes} of ${data.num_ops}`],
  ];
  $("tiles").replaceChildren(
    ...tiles.map(([what, figure]) => {
      const tile = made("div", "", { class: "tile" });
      tile.append(made("b", figure), made("span", what));
      return tile;
    }),
  );
  $("call").value = `plan(model, ${plan.budget_bytes}, args, kwargs)`;
  $("plan-label").textContent =
    `${bytesText(plan.budget_bytes)} (${percent(plan.budget_bytes / Math.max(1, plain.peak_bytes))} of plain), ${more(plan.overhead)} time`;
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
  setTimeout(() => {
    $("copy-call").textContent = "copy";
  }, 1500);
}
