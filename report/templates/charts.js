// Draws each chart with the page's own colours when it comes near the window, and again when the page changes between light and dark or wide and narrow.
// A chart that cannot be drawn is named in the page; the others are drawn all the same.
(function () {
  "use strict";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 40rem)");
  const LABEL = 20; // characters of a bar's name on a narrow page; the whole name is in the table and shown on hover

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    return {
      ink: read("--ink"), line: read("--line"), panel: read("--panel"),
      series: [1, 2, 3, 4, 5, 6].map((number) => read("--series-" + number)),
    };
  }

  // Adds a visible line where the chart belongs, or at the end of the page where it has no place.
  function tell(key, error) {
    const place = document.getElementById("chart-" + key);
    const line = document.createElement("p");
    line.className = "not-drawn";
    line.textContent = "Chart " + key + " was not drawn: " + ((error && error.message) || error);
    if (place) place.replaceChildren(line);
    else document.querySelector("main").append(line);
  }

  async function drawChart(chart, palette) {
    const place = document.getElementById("chart-" + chart.key);
    if (!place) throw new Error("the page has no element chart-" + chart.key + ".");
    if (!Array.isArray(chart.traces) || !chart.traces.length) throw new Error("it has no traces.");
    for (const { x, y } of chart.traces) {
      if (!Array.isArray(x) || !Array.isArray(y) || x.length !== y.length) throw new Error("x and y of a trace are not lists of one length.");
    }
    const given = chart.layout || {};
    const axis = { gridcolor: palette.line, zerolinecolor: palette.line, linecolor: palette.line, automargin: true, exponentformat: "e" };
    const layout = {
      margin: { t: 36, r: 24, b: 48, l: 64 }, height: 360, hoverlabel: { align: "left" }, legend: { orientation: "h", yref: "container", y: 0 },
      ...given,
      paper_bgcolor: palette.panel, plot_bgcolor: palette.panel, colorway: palette.series,
      font: { color: palette.ink, family: getComputedStyle(document.body).fontFamily, size: 13 },
      shapes: (given.shapes || []).map((shape) => ({ ...shape, line: { ...shape.line, color: palette.ink } })),
      xaxis: { ...axis, ...given.xaxis }, yaxis: { ...axis, ...given.yaxis },
    };
    if (narrow.matches && layout.yaxis.type === "category") {
      layout.yaxis.tickvals = chart.traces[0].y;
      layout.yaxis.ticktext = chart.traces[0].y.map((name) => (name.length > LABEL ? "…" + name.slice(1 - LABEL) : name));
    }
    const traces = chart.traces.map((trace) => ("series" in trace // several traces of one colour
      ? { ...trace, marker: { ...trace.marker, color: palette.series[trace.series % palette.series.length] } } : trace));
    await Plotly.react(place, traces, layout, {
      displaylogo: false, responsive: true, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
  }

  let charts = [];
  const drawn = new Set();

  async function draw(chart) {
    drawn.add(chart);
    try {
      await drawChart(chart, colours());
    } catch (error) {
      tell(chart && chart.key, error);
    }
  }

  async function drawAgain() {
    document.querySelectorAll(".not-drawn").forEach((line) => line.remove());
    for (const chart of drawn) await draw(chart);
  }

  async function drawAll() {
    for (const chart of charts) if (!drawn.has(chart)) await draw(chart);
  }

  try {
    charts = Array.from(JSON.parse(document.getElementById("report-charts").textContent));
  } catch (error) {
    tell("data", error);
  }
  // A chart is drawn when it comes near the window, so that the page opens at once; printing draws all of them.
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      observer.unobserve(entry.target);
      const chart = charts.find((one) => one && "chart-" + one.key === entry.target.id);
      if (chart && !drawn.has(chart)) draw(chart);
    }
  }, { rootMargin: "800px" });
  for (const chart of charts) {
    const place = document.getElementById("chart-" + (chart && chart.key));
    if (place) observer.observe(place);
    else draw(chart);
  }
  for (const query of [dark, narrow]) query.addEventListener("change", drawAgain);
  window.addEventListener("beforeprint", drawAll);
})();
