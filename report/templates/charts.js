// Draws the charts with the page's own colours, and again when the reader switches between light and dark.
(function () {
  "use strict";
  const charts = JSON.parse(document.getElementById("chart-data").textContent);

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    return {
      ink: read("--ink"), soft: read("--soft"), line: read("--line"), panel: read("--panel"),
      series: [1, 2, 3, 4, 5, 6].map((number) => read("--series-" + number)),
    };
  }

  function draw() {
    const palette = colours();
    for (const chart of charts) {
      const place = document.getElementById("chart-" + chart.key);
      const axis = { gridcolor: palette.line, zerolinecolor: palette.line, linecolor: palette.line, automargin: true };
      const layout = Object.assign(
        { margin: { t: 16, r: 24, b: 48, l: 64 }, height: 340, hoverlabel: { align: "left" }, legend: { orientation: "h", y: 1.12 } },
        chart.layout,
        {
          paper_bgcolor: palette.panel, plot_bgcolor: palette.panel, colorway: palette.series,
          font: { color: palette.ink, family: getComputedStyle(document.body).fontFamily, size: 13 },
          xaxis: Object.assign({}, axis, chart.layout.xaxis), yaxis: Object.assign({}, axis, chart.layout.yaxis),
        }
      );
      Plotly.react(place, chart.traces, layout, { displaylogo: false, displayModeBar: "hover", responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] });
    }
  }

  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
