// Places -> SVG; and moving about in it.

const SVG = "http://www.w3.org/2000/svg";
const FORMATS = ["high", "e4m3", "e5m2"];

function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function arrowheads() {
  return FORMATS.map(format => svg("marker",
    { id: `to-${format}`, viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse", orient: "auto" },
    svg("path", { d: "M0,0 L8,4 L0,8 z", class: format, stroke: "none" })));
}

// `on`: {select(item), toggle(item)}
function draw(scene, places, edges, state, on) {
  const groups = svg("g"), lines = svg("g"), boxes = svg("g");
  const visit = node => {
    const open = Boolean(node.children);
    (open ? groups : boxes).append(boxOf(node, open, state, on));
    (node.children ?? []).forEach(visit);
  };
  places.children.forEach(visit);
  for (const edge of edges) lines.append(...linesFor(edge, places.routes.get(edge.id) ?? []));
  scene.replaceChildren(groups, lines, boxes);
}

function boxOf(node, open, state, on) {
  const { item, x, y } = node, under = item.kind === "fold" ? STACK : 0;
  const width = node.width - under, height = node.height - under;
  const g = svg("g", { class: classOf(item, open), transform: `translate(${x},${y})`, "data-id": item.id });
  if (item.kind === "fold") for (const d of [STACK, STACK / 2]) g.append(svg("rect", { class: "under", x: d, y: d, width, height }));
  g.append(svg("rect", { width, height }));
  const [first, second] = linesOf(item);
  g.append(svg("text", { x: 11, y: open ? 22 : second ? 18 : 19 }, first));
  if (second && !open) g.append(svg("text", { x: 11, y: 34, class: "small" }, second));
  if (item.children.length) g.append(toggleOf(item, open, width, on));
  g.append(svg("title", {}, item.record ? `${item.record.name}\n${item.record.type}` : item.path));
  g.addEventListener("click", event => { event.stopPropagation(); on.select(item); });
  g.addEventListener("dblclick", () => { if (item.children.length) on.toggle(item); });
  return g;
}

function classOf(item, open) {
  const names = ["box", item.kind];
  const { record } = item;
  if (open) names.push("open");
  if (item.kind === "fold") names.push("stack");
  if (record) {
    names.push(record.kind);
    if (record.backward) names.push("backward");
    if (isFp8(record)) names.push("fp8");
    if (note(record, "stays in high precision")) names.push("kept");
  }
  if (!open && [...recordsIn(item)].some(r => r.changed)) names.push("changed");
  return names.join(" ");
}

function toggleOf(item, open, width, on) {
  const g = svg("g", { class: "toggle", transform: `translate(${width - 15},15)`, role: "button", "aria-label": open ? "close" : "open" });
  g.append(svg("circle", { r: 9 }), svg("path", { d: open ? "M-4,0 H4" : "M-4,0 H4 M0,-4 V4" }));
  g.addEventListener("click", event => { event.stopPropagation(); on.toggle(item); });
  g.addEventListener("dblclick", event => event.stopPropagation());
  return g;
}

function linesFor(edge, sections) {
  return sections.map(section => {
    const points = [section.startPoint, ...(section.bendPoints ?? []), section.endPoint];
    if (edge.up) points.reverse();
    const many = edge.values.size > 1 ? " many" : "";
    const path = svg("path", { d: rounded(points, 6), class: `edge ${edge.format}${many}`, "marker-end": `url(#to-${edge.format})`, "data-from": edge.from, "data-to": edge.to });
    const shown = [...edge.values].slice(0, 8).map(([name, type]) => `${name}: ${type}`);
    if (edge.values.size > 8) shown.push(`and ${edge.values.size - 8} more`);
    path.append(svg("title", {}, shown.join("\n")));
    return path;
  });
}

// A path through points, with round corners.
function rounded(points, radius) {
  const toward = (a, b, r) => {
    const length = Math.hypot(b.x - a.x, b.y - a.y) || 1;
    const t = Math.min(r, length / 2) / length;
    return `${a.x + (b.x - a.x) * t},${a.y + (b.y - a.y) * t}`;
  };
  let d = `M${points[0].x},${points[0].y}`;
  for (let i = 1; i < points.length - 1; i++) {
    const p = points[i];
    d += ` L${toward(p, points[i - 1], radius)} Q${p.x},${p.y} ${toward(p, points[i + 1], radius)}`;
  }
  const end = points[points.length - 1];
  return `${d} L${end.x},${end.y}`;
}

// Drag to move, wheel or two fingers to zoom.
function navigation(picture, scene) {
  const at = { x: 0, y: 0, k: 1 };
  const apply = () => scene.setAttribute("transform", `translate(${at.x},${at.y}) scale(${at.k})`);
  const zoom = (cx, cy, factor) => {
    const k = Math.min(3, Math.max(0.03, at.k * factor));
    at.x = cx - (cx - at.x) * (k / at.k);
    at.y = cy - (cy - at.y) * (k / at.k);
    at.k = k;
    apply();
  };
  const fingers = new Map();
  const local = event => {
    const frame = picture.getBoundingClientRect();
    return { x: event.clientX - frame.left, y: event.clientY - frame.top };
  };
  picture.addEventListener("wheel", event => {
    event.preventDefault();
    const { x, y } = local(event);
    zoom(x, y, Math.exp(-event.deltaY * 0.0015));
  }, { passive: false });
  picture.addEventListener("pointerdown", event => fingers.set(event.pointerId, local(event)));
  window.addEventListener("pointermove", event => {
    const was = fingers.get(event.pointerId);
    if (!was) return;
    const now = local(event), other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) zoom(other.x, other.y, Math.hypot(now.x - other.x, now.y - other.y) / (Math.hypot(was.x - other.x, was.y - other.y) || 1));
    else { at.x += now.x - was.x; at.y += now.y - was.y; apply(); }
    fingers.set(event.pointerId, now);
  });
  for (const kind of ["pointerup", "pointercancel"]) window.addEventListener(kind, event => fingers.delete(event.pointerId));
  return { at, apply };
}
