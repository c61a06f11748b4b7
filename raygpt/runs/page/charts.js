"use strict";
// Draws the curves of one run or of several with uPlot; the data stands in the element #data.
(() => {
  const { runs, running } = JSON.parse(document.getElementById("data").textContent);
  const several = runs.length > 1;
  const choice = { axis: "step", log: false };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const EVENTS = { start: "--c0", rescue: "--c0", skip: "--bad", stop: "--warn", leave: "--warn", straggler: "--warn" };
  const CHARTS = [
    { title: "Loss", unit: "nats a token", name: "loss", band: true, validation: true, wide: true, log: true },
    { title: "Throughput", unit: "tokens a second", name: "tokens_per_s", zero: true },
    { title: "Model FLOPs utilisation", unit: "of the devices' peak", name: "mfu", zero: true, percent: true },
    { title: "Learning rate", unit: "", name: "lr", zero: true },
    { title: "Gradient norm", unit: "before clipping", name: "grad_norm", band: true, log: true },
    { title: "Workers", unit: "with restarts and other events", name: "workers", stepped: true, zero: true, whole: true, events: true },
  ];

  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });
  function number(value, chart) {
    if (value === null || value === undefined) return "–";
    if (chart.percent) return (100 * value).toFixed(1) + " %";
    if (chart.whole) return String(Math.round(value));
    const size = Math.abs(value);
    if (size !== 0 && size < 1e-3) return value.toExponential(2);
    return size >= 1e4 ? compact.format(value) : String(+value.toPrecision(5));
  }
  function duration(seconds) {
    if (seconds < 120) return `${+seconds.toFixed(1)} s`;
    const minutes = seconds / 60;
    if (minutes < 120) return `${+minutes.toFixed(1)} min`;
    return minutes < 2880 ? `${+(minutes / 60).toFixed(1)} h` : `${+(minutes / 1440).toFixed(1)} d`;
  }
  const place = (x) => choice.axis === "seconds" ? duration(x)
    : choice.axis === "tokens" ? compact.format(x) : x.toLocaleString("en");

  // Where an event lies on the chosen axis: at the first point that is not before its step.
  function along(run, step) {
    if (choice.axis === "step") return step;
    const at = run.curves.step.findIndex((s) => s >= step);
    return at < 0 ? run.curves[choice.axis].at(-1) : run.curves[choice.axis][at];
  }

  function lines(chart) {
    const draw = (u) => {
      if (several) return;
      const seen = new Set();
      for (const event of runs[0].events) {
        if (!(event.kind in EVENTS) || (event.kind === "start" && event.step === 0)) continue;
        const x = Math.round(u.valToPos(along(runs[0], event.step), "x", true));
        if (seen.has(x) || x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
        seen.add(x);
        u.ctx.save();
        u.ctx.strokeStyle = colour(EVENTS[event.kind]);
        u.ctx.globalAlpha = chart.events ? 0.9 : 0.35;
        u.ctx.lineWidth = devicePixelRatio;
        u.ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
        u.ctx.beginPath();
        u.ctx.moveTo(x, u.bbox.top);
        u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
        u.ctx.stroke();
        u.ctx.restore();
      }
    };
    return { hooks: { drawAxes: [draw] } };
  }

  // What a legend says of a series: the value under the cursor, without one the last.
  const shownOr = (text) => (u, v, index, at) => {
    const found = at === null || at === undefined ? u.data[index].findLast((x) => x !== null && x !== undefined) : v;
    return found === null || found === undefined ? "–" : text(found);
  };

  function series(chart) {
    const list = [{ label: choice.axis === "seconds" ? "time" : choice.axis, value: shownOr(place) }];
    const bands = [];
    const tables = [];
    runs.forEach((run, index) => {
      const stroke = colour(`--c${index % 6}`);
      const table = [run.curves[choice.axis], run.curves[chart.name]];
      const value = shownOr((v) => number(v, chart));
      list.push({
        label: several ? run.name : chart.name === "loss" ? "training" : chart.title.toLowerCase(),
        stroke, width: 1.6, value, spanGaps: true, points: { show: run.curves.step.length < 3 },
        ...(chart.stepped ? { paths: uPlot.paths.stepped({ align: -1 }) } : {}),
      });
      if (chart.band && !several) {
        table.push(run.curves[chart.name + "_low"], run.curves[chart.name + "_high"]);
        const edge = { stroke: "transparent", width: 0, value, spanGaps: true, points: { show: false }, class: "edge" };
        list.push({ label: "lowest", ...edge }, { label: "highest", ...edge });
        bands.push({ series: [list.length - 1, list.length - 2], fill: colour("--band") });
      }
      tables.push(table);
      if (chart.validation && run.validations.step.length) {
        tables.push([run.validations[choice.axis], run.validations.val_loss]);
        const shade = several ? stroke : colour("--c1");
        list.push({
          label: several ? `${run.name}, validation` : "validation", stroke: shade, width: 1.6, value, spanGaps: true,
          dash: several ? [5, 4] : undefined, points: { show: true, size: 5, fill: shade },
        });
      }
    });
    return { list, bands, data: uPlot.join(tables) };
  }

  const shown = [];
  function build() {
    shown.splice(0).forEach((plot) => plot.destroy());
    const box = document.getElementById("charts");
    box.textContent = "";
    for (const chart of CHARTS) {
      if (!runs.some((run) => run.curves[chart.name].some((v) => v !== null))) continue;
      const element = box.appendChild(document.createElement("div"));
      element.className = "chart" + (chart.wide ? " wide" : "");
      const head = element.appendChild(document.createElement("h3"));
      head.textContent = chart.title + " ";
      head.appendChild(document.createElement("small")).textContent = chart.unit;
      const { list, bands, data } = series(chart);
      const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "12px system-ui" };
      const log = choice.log && chart.log;
      const options = {
        width: element.clientWidth, height: chart.wide ? 320 : 200,
        cursor: { sync: { key: "raygpt" }, drag: { x: true, y: false }, points: { size: 6 } },
        legend: { live: true }, bands, series: list, plugins: [lines(chart)],
        scales: {
          x: { time: false },
          y: log ? { distr: 3 } : { range: (u, low, high) => range(chart, low, high) },
        },
        axes: [
          { ...axis, values: (_, ticks) => ticks.map(place), space: 70, size: 30 },
          { ...axis, values: (_, ticks) => ticks.map((t) => t === null ? "" : chart.whole && t % 1 ? "" : number(t, chart)), size: 62 },
        ],
      };
      shown.push(new uPlot(options, data, element));
    }
  }
  function range(chart, low, high) {
    if (low === null) return [0, 1];
    if (chart.whole) return [0, high + 1];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [chart.zero ? 0 : low - room, high + room];
  }

  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => {
      choice.axis = button.dataset.axis;
      for (const other of document.querySelectorAll("[data-axis]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      build();
    });
  }
  document.getElementById("log").addEventListener("click", ({ currentTarget }) => {
    choice.log = !choice.log;
    currentTarget.setAttribute("aria-pressed", String(choice.log));
    build();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", build);
  build();
  // Also when a scroll bar has made it narrower.
  let width = document.getElementById("charts").clientWidth;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width !== width) {
      width = contentRect.width;
      requestAnimationFrame(build);
    }
  }).observe(document.getElementById("charts"));
  // The file of a run that goes on is written anew every few seconds.
  if (running) setTimeout(() => location.reload(), 30000);
})();
