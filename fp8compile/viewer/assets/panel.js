// What a click shows.

function html(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "onclick") element.addEventListener("click", value);
    else element.setAttribute(key, value);
  }
  element.append(...children.filter(child => child !== null));
  return element;
}

// `on`: {close, toggle(item), reveal(name), apart(item)}
function fillPanel(panel, item, snapshot, state, on) {
  panel.replaceChildren(html("button", { class: "close", "aria-label": "close", onclick: on.close }, "\u00d7"));
  panel.hidden = false;
  panel.scrollTop = 0;
  if (item.record) recordPanel(panel, item, snapshot, state, on);
  else modulePanel(panel, item, state, on);
}

function modulePanel(panel, item, state, on) {
  const records = [...recordsIn(item.kind === "fold" ? item.children[0] : item)];
  panel.append(html("h2", {}, item.kind === "fold" ? `${item.label}, ${item.count} alike` : item.path || item.label));
  if (item.kind === "fold") {
    panel.append(html("div", { class: "actions" },
      html("button", { onclick: () => on.toggle(item) }, `open ${item.path}`),
      html("button", { onclick: () => on.apart(item) }, `show all ${item.count}`)));
  } else {
    panel.append(html("div", { class: "actions" }, html("button", { onclick: () => on.toggle(item) }, isOpen(item, state) ? "close" : "open")));
  }
  const gemms = records.filter(r => r.kind === "gemm");
  panel.append(html("p", { class: "where" }, contents(item.kind === "fold" ? item.children[0] : item) + (item.kind === "fold" ? ", in each" : "")));
  const list = html("dl");
  for (const record of gemms) {
    const reason = note(record, "stays in high precision");
    list.append(html("dt", {}, record.label), html("dd", reason ? { class: "reason" } : {},
      link(record.name, note(record, "site"), on), reason ? `: ${reason}` : `: ${operandFormats(record)}`));
  }
  panel.append(list);
}

function operandFormats(record) {
  return ["left", "right"].map(side => note(record, side)?.split(": ")[1]).join(" x ");
}

function recordPanel(panel, item, snapshot, state, on) {
  const { record } = item;
  panel.append(html("h2", {}, record.kind === "gemm" ? `${note(record, "site")} ${record.label}` : record.label),
    html("div", { class: "where" }, `${record.name} in ${record.path || "the model itself"}, ${record.backward ? "backward" : "forward"}${record.changed ? `, ${record.changed} by this pass` : ""}`));
  if (item.children.length) panel.append(html("div", { class: "actions" }, html("button", { onclick: () => on.toggle(item) }, isOpen(item, state) ? "close" : "open its nodes")));
  const list = html("dl");
  list.append(html("dt", {}, "type"), html("dd", {}, record.type));
  for (const [label, text] of record.notes) {
    list.append(html("dt", {}, label), html("dd", label === "stays in high precision" ? { class: "reason" } : {}, text));
  }
  edgeList(list, "takes", record.inputs, on);
  edgeList(list, "goes to", record.users, on);
  panel.append(list);
  if (record.source) panel.append(html("h2", {}, "Triton source"), html("pre", { id: "source" }, snapshot.sources[record.source]));
}

function edgeList(list, title, edges, on) {
  edges.slice(0, 12).forEach(([name, type, small], i) => {
    list.append(html("dt", {}, i ? "" : title), html("dd", {}, link(name, name, on), ` ${type}`));
  });
  if (edges.length > 12) list.append(html("dt"), html("dd", {}, `and ${edges.length - 12} more`));
}

function link(name, text, on) {
  return html("a", { onclick: () => on.reveal(name) }, text);
}
