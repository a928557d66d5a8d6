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
    const ns = points[0].x * times.tick,
      plan = data.plans[chosen];
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
