// Zoom, pan, search and details of the network graph. The SVG itself is in the page and readable without this script.
(function () {
  "use strict";
  const frame = document.getElementById("graph-frame");
  if (!frame) return;
  const svg = frame.querySelector("svg");
  const details = JSON.parse(document.getElementById("report-graph").textContent);
  const boxes = Array.from(svg.querySelectorAll(".box"));
  const search = document.getElementById("graph-search");
  const panel = document.getElementById("graph-details");
  const whole = { x: 0, y: 0, width: Number(svg.dataset.width), height: Number(svg.dataset.height) };
  const MOST_ZOOM = 60;
  let view = { ...whole };
  let found = [], current = -1;

  function show() { svg.setAttribute("viewBox", [view.x, view.y, view.width, view.height].join(" ")); }
  function scale() { return Math.max(view.width / svg.clientWidth, view.height / svg.clientHeight); } // drawing units per pixel

  // Zooms by a factor about a point of the window, or about the middle of the frame.
  function zoom(factor, clientX, clientY) {
    const limited = Math.min(Math.max(factor, whole.width / MOST_ZOOM / view.width), 2 * whole.width / view.width);
    const rect = svg.getBoundingClientRect();
    const right = clientX === undefined ? 0 : (clientX - rect.x - rect.width / 2) * scale();
    const down = clientY === undefined ? 0 : (clientY - rect.y - rect.height / 2) * scale();
    const x = view.x + view.width / 2 + right * (1 - limited), y = view.y + view.height / 2 + down * (1 - limited);
    const width = view.width * limited, height = view.height * limited;
    view = { x: x - width / 2, y: y - height / 2, width, height };
    show();
  }

  function centre(box) {
    const place = box.getBBox();
    const width = Math.min(view.width, Math.max(700, svg.clientWidth)), height = width * svg.clientHeight / svg.clientWidth;
    view = { x: place.x + place.width / 2 - width / 2, y: place.y + place.height / 2 - height / 2, width, height };
    show();
  }

  const row = (name, value) => {
    const line = document.createElement("tr");
    for (const [tag, text] of [["th", name], ["td", value]]) line.appendChild(document.createElement(tag)).textContent = text;
    return line;
  };

  // Marks a box, and all boxes that write or read the same groups.
  function select(box) {
    const item = details.boxes[Number(box.dataset.index)];
    const groups = [item.writes, item.reads].filter(Boolean);
    boxes.forEach((other) => {
      const its = details.boxes[Number(other.dataset.index)];
      other.classList.toggle("selected", other === box);
      other.classList.toggle("member", groups.some((group) => its.writes === group || its.reads === group));
    });
    const members = (group) => details.boxes.filter((other) => other.writes === group).map((other) => other.name);
    const table = document.createElement("table");
    table.className = "pairs";
    table.append(row("Module", item.name), row("Operator", item.operator), row("Precision", item.precision));
    if (item.folded.length) table.append(row("Activation", item.folded.join(", ")));
    if (item.output) table.append(row("Output", item.output));
    if (item.macs) table.append(row("Multiply-accumulates", item.macs.toLocaleString("en")));
    if (item.parameters) table.append(row("Parameters", item.parameters.toLocaleString("en")));
    for (const [title, group] of [["Reads the group", item.reads], ["Output in the group", item.writes]]) {
      if (!group) continue;
      const tensors = members(group);
      table.append(row(title, group + (tensors.length > 1 ? ", one scale for " + tensors.join(", ") : "")));
      if (details.scores[group] !== undefined) table.append(row("Sensitivity of " + group, details.scores[group].toPrecision(4)));
    }
    panel.replaceChildren(table);
  }

  function look() {
    const words = search.value.trim().toLowerCase();
    found = words ? boxes.filter((box) => box.dataset.search.toLowerCase().includes(words)) : [];
    current = -1;
    svg.classList.toggle("searching", words !== "");
    boxes.forEach((box) => box.classList.toggle("found", found.includes(box)));
    document.getElementById("graph-count").textContent = words ? found.length + " found" : "";
  }

  function next() {
    if (!found.length) return;
    current = (current + 1) % found.length;
    centre(found[current]);
    select(found[current]);
  }

  const pointers = new Map();
  let moved = 0;
  svg.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, event);
    moved = 0;
  });
  svg.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
    moved += Math.abs(dx) + Math.abs(dy);
    if (moved > 4 && !svg.hasPointerCapture(event.pointerId)) svg.setPointerCapture(event.pointerId);
    if (pointers.size === 1) {
      view.x -= dx * scale();
      view.y -= dy * scale();
      show();
    } else {
      const other = Array.from(pointers.values()).find((one) => one.pointerId !== event.pointerId);
      const distance = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY) || 1;
      zoom(distance(before) / distance(event), (event.clientX + other.clientX) / 2, (event.clientY + other.clientY) / 2);
    }
    pointers.set(event.pointerId, event);
  });
  for (const name of ["pointerup", "pointercancel"]) svg.addEventListener(name, (event) => pointers.delete(event.pointerId));
  svg.addEventListener("click", (event) => {
    const box = moved > 4 ? null : event.target.closest(".box");
    if (box) select(box);
  });
  svg.addEventListener("keydown", (event) => {
    const box = event.target.closest(".box");
    if (box && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      select(box);
    }
  });
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the wheel alone scrolls the page
    event.preventDefault();
    zoom(Math.exp(event.deltaY / 300), event.clientX, event.clientY);
  }, { passive: false });
  document.getElementById("graph-in").addEventListener("click", () => zoom(1 / 1.5));
  document.getElementById("graph-out").addEventListener("click", () => zoom(1.5));
  document.getElementById("graph-all").addEventListener("click", () => { view = { ...whole }; show(); });
  search.addEventListener("input", look);
  search.addEventListener("keydown", (event) => { if (event.key === "Enter") next(); });
  document.getElementById("graph-next").addEventListener("click", next);
  if (search.value) look();
})();
