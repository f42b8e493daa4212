// What the page holds, inflated; and what one snapshot of a graph consists of.

async function inflated(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

// A snapshot's records by name, with defaults, users, and what this pass changed.
function snapshotOf(graph, index) {
  const ids = numbersOf(graph.snapshots[index].records);
  const before = index ? new Set(numbersOf(graph.snapshots[index - 1].records)) : null;
  const last = graph.snapshots[index].name === "fused regions"; // there, everything has
  const names = before && new Set([...before].map(i => graph.records[i].name));
  const records = new Map();
  for (const i of ids) {
    const record = { inputs: [], notes: [], path: "", label: "", ...graph.records[i], users: [] };
    record.changed = !before || last || before.has(i) ? "" : names.has(record.name) ? "changed" : "new";
    records.set(record.name, record);
  }
  for (const record of records.values()) {
    record.inputs = record.inputs.filter(([name]) => records.has(name));
    for (const [name, type, small] of record.inputs) records.get(name).users.push([record.name, type, small]);
  }
  const gone = names ? [...names].filter(name => !records.has(name)).length : 0;
  return { records, gone, folds: graph.snapshots[index].folds, sources: graph.sources, first: !before, last };
}

function numbersOf(runs) {
  return runs.flatMap(([first, count]) => Array.from({ length: count }, (_, i) => first + i));
}

function formatOf(type) {
  return type.startsWith("e4m3") ? "e4m3" : type.startsWith("e5m2") ? "e5m2" : "high";
}

function note(record, label) {
  return record.notes.find(([name]) => name === label)?.[1];
}

const isFp8 = record => record.op?.startsWith("fp8.scaled_mm");
