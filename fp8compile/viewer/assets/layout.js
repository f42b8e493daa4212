// Visible boxes and edges -> their places, by ELK's layered algorithm, in a worker.

const LAYOUT = {
  "elk.algorithm": "layered",
  "elk.direction": "DOWN",
  "elk.hierarchyHandling": "INCLUDE_CHILDREN",
  "elk.edgeRouting": "ORTHOGONAL",
  "elk.json.shapeCoords": "ROOT",
  "elk.json.edgeCoords": "ROOT",
  "elk.spacing.nodeNode": "22",
  "elk.spacing.edgeNode": "12",
  "elk.spacing.edgeEdge": "7",
  "elk.layered.spacing.nodeNodeBetweenLayers": "26",
  "elk.layered.spacing.edgeNodeBetweenLayers": "12",
  "elk.layered.spacing.edgeEdgeBetweenLayers": "7",
  "elk.separateConnectedComponents": "true",
  "elk.layered.nodePlacement.strategy": "BRANDES_KOEPF",
  "elk.layered.nodePlacement.bk.fixedAlignment": "BALANCED",
  "elk.layered.thoroughness": "4",
};
const STACK = 6; // what the boxes under a folded one stick out
const PADDING = { "elk.padding": "[top=36,left=14,bottom=14,right=14]" };

function engine(libraries) {
  const scope = {};
  new Function(libraries["elk-api.js"]).call(scope); // a bundle for browsers: it sets window.ELK
  const worker = new Blob([libraries["elk-worker.min.js"]], { type: "text/javascript" });
  return new window.ELK({ workerUrl: URL.createObjectURL(worker) });
}

// Backward edges run up: what forward and backward do of a layer then lies side by side.
async function placed(elk, root, edges, state) {
  const children = root.children.flatMap(item => toElk(item, state, edges));
  const links = edges.map(edge => {
    const [first, last] = edge.up ? [edge.to, edge.from] : [edge.from, edge.to];
    return { id: edge.id, sources: [first], targets: [last] };
  });
  const done = await elk.layout({ id: "root", layoutOptions: LAYOUT, children, edges: links });
  const routes = new Map();
  collectRoutes(done, routes);
  return { width: done.width, height: done.height, children: done.children, routes };
}

function toElk(item, state, edges) {
  if (!isOpen(item, state)) return [{ id: item.id, item, ...sizeOf(item) }];
  const children = item.children.flatMap(child => toElk(child, state, edges));
  const { width } = sizeOf(item);
  const minimum = { "elk.nodeSize.constraints": "MINIMUM_SIZE", "elk.nodeSize.minimum": `(${width},40)` };
  return [{ id: item.id, item, children, layoutOptions: { ...PADDING, ...minimum } }];
}

function collectRoutes(node, routes) {
  for (const edge of node.edges ?? []) routes.set(edge.id, edge.sections ?? []);
  (node.children ?? []).forEach(child => collectRoutes(child, routes));
}

const context = document.createElement("canvas").getContext("2d");
function widthOf(text, size) {
  context.font = `${size}px system-ui, sans-serif`;
  return context.measureText(text).width;
}

function sizeOf(item) {
  const [first, second] = linesOf(item);
  const button = item.children.length ? 30 : 0;
  const width = Math.max(widthOf(first, 13) + button, widthOf(second, 11)) + 22;
  const under = item.kind === "fold" ? STACK : 0;
  return { width: Math.max(width, 56) + under, height: (second ? 42 : 28) + under };
}

// What is written in a box: a name, and below it what it is or holds.
function linesOf(item) {
  if (item.kind === "fold") return [`${item.label}, ${item.count} alike`, contents(item.children[0]) + " each"];
  if (item.kind === "module") return [item.label, contents(item)];
  const { record } = item;
  if (item.kind === "region") return [record.label, `reads ${note(record, "reads")}, writes ${note(record, "writes")}`];
  const input = record.kind === "parameter" || record.kind === "input";
  const label = record.kind === "parameter" ? record.label.split(".").pop() : record.label;
  return [label, input || !record.type.startsWith("(") ? record.type : record.type.split(", f32[1]")[0].slice(1)];
}

function contents(item) {
  const records = [...recordsIn(item)];
  const gemms = records.filter(r => r.kind === "gemm"), fp8 = gemms.filter(isFp8);
  const regions = records.filter(r => r.kind === "region");
  const ops = records.filter(r => r.kind === "op" || r.kind === "cast");
  const parts = [];
  if (gemms.length) parts.push(`${fp8.length} of ${gemms.length} GEMMs in FP8`);
  if (regions.length) parts.push(counted(regions.length, "fused region"));
  else if (ops.length) parts.push(counted(ops.length, "operator"));
  return parts.join(", ") || counted(records.length, "node");
}

const counted = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
