// The tree of modules, regions and operators; which of it is open; what is visible.

// Items: {id, kind: "module" | "fold" | "region" | "node", label, path, children, record}.
function treeOf(snapshot, state) {
  const root = module("", "", "");
  const modules = new Map([["", root]]), regions = new Map();
  const moduleAt = path => {
    if (!modules.has(path)) {
      const dot = path.lastIndexOf(".");
      const parent = moduleAt(dot < 0 ? "" : path.slice(0, dot));
      const item = module(`m:${path}`, path.slice(dot + 1), path);
      modules.set(path, item);
      parent.children.push(item);
    }
    return modules.get(path);
  };
  for (const record of snapshot.records.values()) {
    if (record.kind === "state" || (record.kind === "view" && !state.views)) continue;
    const item = { id: `n:${record.name}`, kind: "node", label: record.label, path: record.path, record, children: [] };
    if (record.kind === "region") {
      item.kind = "region";
      regions.set(record.name, item);
    }
    (record.region ? regions.get(record.region) : moduleAt(record.path)).children.push(item);
  }
  gatherOwn(root, snapshot);
  for (const [path, item] of modules) fold(item, path, snapshot.folds, state.apart);
  flatten(root);
  return root;
}

// The model's own operators, such as a loss, become two items: what comes before its modules, and
// what depends on them.
function gatherOwn(root, snapshot) {
  const own = root.children.filter(c => c.kind !== "module" && !["input", "parameter"].includes(c.record.kind));
  if (own.length < 9 || own.length === root.children.length) return;
  const late = new Set();
  for (const record of snapshot.records.values()) { // producers come first
    const depends = record.kind !== "parameter" && (record.path !== "" || record.inputs.some(([name]) => late.has(name)));
    if (depends || record.backward) late.add(record.name);
  }
  for (const [id, label, isLate] of [["m:(start)", "own operators, start", false], ["m:(end)", "own operators, end", true]]) {
    const item = module(id, label, "");
    item.children = own.filter(c => late.has(c.record.name) === isLate);
    if (item.children.length) root.children.push(item);
  }
  root.children = root.children.filter(c => !own.includes(c));
}

function module(id, label, path) {
  return { id, kind: "module", label, path, children: [] };
}

// Layers that are alike, and not taken apart, become one item.
function fold(item, path, folds, apart) {
  for (const [parent, first, last] of folds) {
    if (parent !== path) continue;
    const layer = n => parent ? `${parent}.${n}` : `${n}`;
    const found = new Map(item.children.filter(c => c.kind === "module").map(c => [c.path, c]));
    for (let n = first; n <= last; n++) {
      let end = n;
      while (end <= last && !apart.has(layer(end))) end++;
      if (end - n < 2) { n = Math.max(n, end); continue; }
      const inside = [];
      for (let k = n; k < end; k++) if (found.has(layer(k))) inside.push(found.get(layer(k)));
      const box = { id: `f:${layer(n)}-${end - 1}`, kind: "fold", label: `${layer(n)}-${end - 1}`, path: layer(n), children: inside, count: end - n };
      item.children.splice(item.children.indexOf(inside[0]), 1, box);
      item.children = item.children.filter(c => !inside.includes(c));
      n = end;
    }
  }
}

// A module that holds nothing but other modules, such as a ModuleList, gives way to them.
function flatten(item) {
  item.children = item.children.flatMap(child => {
    flatten(child);
    const bare = child.kind === "module" && child.children.every(c => c.kind !== "node" && c.kind !== "region");
    if (!bare || !child.children.some(c => c.kind === "fold" || /^\d+$/.test(c.path.split(".").pop()))) return [child];
    for (const c of child.children) if (c.kind === "module") c.label = `${child.label}.${c.label}`;
    return child.children;
  });
}

function* recordsIn(item) {
  if (item.record) yield item.record;
  for (const child of item.children) yield* recordsIn(child);
}

const isOpen = (item, state) => item.children.length > 0 && item.kind !== "fold" && state.open.has(item.id);

// record name -> the visible box that stands for it
function boxesOf(root, state) {
  const boxes = new Map();
  const visit = (item, box) => {
    const own = box ?? (item !== root && !isOpen(item, state) ? item : null);
    if (item.record && item.kind !== "region") boxes.set(item.record.name, own ?? item);
    item.children.forEach(child => visit(child, own));
  };
  visit(root, null);
  return boxes;
}

// Edges between visible boxes, one for each format; views that are not shown are looked through.
function edgesOf(snapshot, boxes) {
  const edges = new Map();
  const source = name => {
    const record = snapshot.records.get(name);
    return boxes.has(name) || !record || !record.inputs.length ? name : source(record.inputs[0][0]);
  };
  for (const record of snapshot.records.values()) {
    const to = boxes.get(record.name);
    if (!to) continue;
    for (const [name, type, small] of record.inputs) {
      const from = boxes.get(source(name));
      if (small || !from || from === to) continue;
      const producer = snapshot.records.get(source(name));
      const up = Boolean(record.backward && producer.backward);
      const format = formatOf(type);
      const key = [from.id, to.id, format, up].join("\n");
      if (!edges.has(key)) edges.set(key, { id: key, from: from.id, to: to.id, format, up, values: new Map() });
      edges.get(key).values.set(name, type);
    }
  }
  return [...edges.values()];
}
