// The page: what is chosen, and what happens when that changes.

const $ = id => document.getElementById(id);

async function start() {
  const [data, libraries] = await Promise.all([inflated("data"), inflated("libraries")]);
  document.querySelector("h1").textContent = data.title;
  $("summary").textContent = data.summary;
  $("summary").title = data.recipe;
  document.querySelector("defs").append(...arrowheads());
  new App(data, engine(libraries)).begin();
}

class App {
  constructor(data, elk) {
    this.data = data;
    this.elk = elk;
    this.graph = data.graphs[0];
    this.state = { open: new Set(), apart: new Set(), views: false };
    this.selected = null;
    this.runs = 0;
    this.view = navigation($("picture"), $("scene"));
    this.on = {
      select: item => this.select(item),
      toggle: item => this.toggle(item),
      apart: item => this.takeApart(item),
      reveal: name => this.reveal(name),
      close: () => this.select(null),
    };
  }

  async begin() {
    this.controls();
    this.choose(this.graph.snapshots.length - 1);
    await this.show();
    this.fit();
    document.body.dataset.ready = "yes";
  }

  controls() {
    const graphs = this.data.graphs;
    graphs.forEach((_, i) => $("graph").append(new Option(`graph ${i + 1} of ${graphs.length}`, i)));
    $("graph").hidden = graphs.length < 2;
    $("graph").onchange = async () => { this.graph = graphs[$("graph").value]; this.choose(this.graph.snapshots.length - 1); await this.show(); this.fit(); };
    $("slider").oninput = () => this.goTo(Number($("slider").value));
    $("earlier").onclick = () => this.goTo(this.pass - 1);
    $("later").onclick = () => this.goTo(this.pass + 1);
    $("views").onchange = () => { this.state.views = $("views").checked; this.show(); };
    $("fold").onclick = async () => { this.state.open.clear(); this.state.apart.clear(); await this.show(); this.fit(); };
    $("fit").onclick = () => this.fit();
    $("theme").onclick = () => this.changeTheme();
    $("picture").addEventListener("click", () => this.select(null));
    search($("query"), $("hits"), () => this.snapshot, hit => this.reveal(hit));
    document.addEventListener("keydown", event => {
      if (event.target.tagName === "INPUT" && event.target.type === "search") return;
      if (event.key === "/") { event.preventDefault(); $("query").focus(); }
    });
  }

  changeTheme() {
    const root = document.documentElement;
    const dark = root.classList.contains("dark") || (!root.classList.contains("light") && matchMedia("(prefers-color-scheme: dark)").matches);
    root.className = dark ? "light" : "dark";
  }

  choose(pass) {
    const { snapshots } = this.graph;
    this.pass = Math.max(0, Math.min(pass, snapshots.length - 1));
    this.snapshot = snapshotOf(this.graph, this.pass);
    $("slider").max = snapshots.length - 1;
    $("slider").value = this.pass;
    const changes = ["new", "changed"].map(kind => [[...this.snapshot.records.values()].filter(r => r.changed === kind).length, kind]);
    const text = this.snapshot.first ? "before the passes" : this.snapshot.last ? "as forward and backward are compiled" : [...changes, [this.snapshot.gone, "gone"]].filter(([n]) => n).map(([n, kind]) => `${n} ${kind}`).join(", ") || "no change";
    $("pass").replaceChildren(`${this.pass}. ${snapshots[this.pass].name} `, html("small", {}, text));
  }

  async goTo(pass) {
    this.choose(pass);
    await this.show();
    if (this.selected) this.select(this.itemAt(this.selected), false);
  }

  // Lay out and draw what is visible; `anchor`: the id of the box that stays where it is.
  async show(anchor) {
    const run = ++this.runs, was = anchor && this.placeOf(anchor);
    const slow = setTimeout(() => { $("busy").hidden = false; }, 250);
    this.root = treeOf(this.snapshot, this.state);
    const edges = edgesOf(this.snapshot, boxesOf(this.root, this.state));
    dropLoose(this.root, edges, this.state);
    try {
      const places = await placed(this.elk, this.root, edges, this.state);
      if (run !== this.runs) return; // something else was asked for meanwhile
      this.places = places;
      draw($("scene"), places, edges, this.state, this.on);
    } finally {
      clearTimeout(slow);
      $("busy").hidden = true;
    }
    const now = was && this.placeOf(anchor);
    if (now) { this.view.at.x += (was.x - now.x) * this.view.at.k; this.view.at.y += (was.y - now.y) * this.view.at.k; this.view.apply(); }
    this.light();
  }

  async toggle(item) {
    const { open, apart } = this.state, folded = item.kind === "fold";
    const id = folded ? `m:${item.path}` : item.id, opens = !open.has(id);
    if (folded) apart.add(item.path);
    if (opens) open.add(id);
    else { open.delete(id); apart.delete(item.path); } // a layer goes back to those like it
    await this.show(folded ? null : id);
    this.select(this.itemAt(id), false); // its panel takes room
    if (opens && (folded || !this.inSight(id))) this.center(id);
  }

  async takeApart(item) {
    for (const layer of item.children) this.state.apart.add(layer.path);
    await this.show();
    this.select(null);
    this.center(`m:${item.path}`);
  }

  // Open whatever a record or a module is in, and go there.
  async reveal(name) {
    const record = this.snapshot.records.get(name);
    const path = record ? record.path : name;
    const parts = path ? path.split(".") : [];
    parts.forEach((part, i) => {
      const outer = parts.slice(0, i + 1).join(".");
      if (record || i < parts.length - 1) this.state.open.add(`m:${outer}`);
      if (/^\d+$/.test(part)) this.state.apart.add(outer);
    });
    if (record?.region) this.state.open.add(`n:${record.region}`);
    if (record?.kind === "view" && !this.state.views) this.state.views = $("views").checked = true;
    await this.show();
    const id = record ? `n:${name}` : `m:${path}`;
    this.select(this.itemAt(id));
    this.center(id);
  }

  select(item, fresh = true) {
    this.selected = item ? item.id : null;
    if (item) fillPanel($("panel"), item, this.snapshot, this.state, this.on);
    else if (fresh) $("panel").hidden = true;
    this.light();
  }

  // Mark what is selected, and its edges.
  light() {
    for (const box of document.querySelectorAll(".box")) box.classList.toggle("selected", box.dataset.id === this.selected);
    for (const edge of document.querySelectorAll(".edge")) edge.classList.toggle("lit", [edge.dataset.from, edge.dataset.to].includes(this.selected));
  }

  itemAt(id, item = this.root) {
    if (item.id === id) return item;
    for (const child of item.children) {
      const found = this.itemAt(id, child);
      if (found) return found;
    }
    return null;
  }

  placeOf(id, nodes = this.places?.children ?? []) {
    for (const node of nodes) {
      const found = node.id === id ? node : this.placeOf(id, node.children ?? []);
      if (found) return found;
    }
    return null;
  }

  inSight(id) {
    const place = this.placeOf(id), { at } = this.view, frame = $("picture").getBoundingClientRect();
    const left = at.x + place.x * at.k, top = at.y + place.y * at.k;
    return left >= 0 && top >= 0 && left + place.width * at.k <= frame.width && top + place.height * at.k <= frame.height;
  }

  center(id) {
    const place = this.placeOf(id), { at } = this.view, frame = $("picture").getBoundingClientRect();
    if (!place) return;
    at.k = Math.max(0.5, Math.min(1, (frame.width - 40) / place.width, (frame.height - 60) / place.height));
    const tall = place.height * at.k > frame.height - 60;
    at.x = frame.width / 2 - (place.x + place.width / 2) * at.k;
    at.y = tall ? 40 - place.y * at.k : frame.height / 2 - (place.y + place.height / 2) * at.k;
    this.view.apply();
  }

  fit() {
    const { at } = this.view, frame = $("picture").getBoundingClientRect(), { width, height } = this.places;
    at.k = Math.min(1.3, (frame.width - 30) / width, (frame.height - 70) / height);
    at.x = (frame.width - width * at.k) / 2;
    at.y = Math.max(34, (frame.height - height * at.k) / 2);
    this.view.apply();
  }
}

// What has no edge at all, as the state's bookkeeping, only takes room.
function dropLoose(root, edges, state) {
  const used = new Set(edges.flatMap(edge => [edge.from, edge.to]));
  root.children = root.children.filter(item => used.has(item.id) || item.kind !== "node" || isOpen(item, state) || !edges.length);
}

function search(query, hits, snapshot, choose) {
  let found = [];
  const pick = hit => { hits.hidden = true; query.blur(); choose(hit.id); };
  query.oninput = () => {
    found = query.value.trim() ? hitsFor(query.value.trim().toLowerCase(), snapshot()) : [];
    hits.replaceChildren(...found.map((hit, i) => html("li", { class: i ? "" : "first", onclick: () => pick(hit) }, hit.text, html("br"), html("small", {}, hit.more))));
    if (query.value.trim() && !found.length) hits.replaceChildren(html("li", {}, "nothing of that name in this pass"));
    hits.hidden = !query.value.trim();
  };
  query.onfocus = query.oninput;
  query.onblur = () => setTimeout(() => { hits.hidden = true; }, 200);
  query.onkeydown = event => {
    if (event.key === "Enter" && found.length) pick(found[0]);
    if (event.key === "Escape") query.blur();
  };
}

// Modules first, then GEMMs by their site, then everything else by its name.
function hitsFor(text, { records }) {
  const modules = new Map(), gemms = [], others = [];
  for (const record of records.values()) {
    const parts = record.path.split(".");
    for (let i = 1; i <= parts.length; i++) {
      const path = parts.slice(0, i).join(".");
      if (path && !/\d+$/.test(parts[i]) && path.toLowerCase().includes(text)) modules.set(path, { id: path, text: path, more: "module" });
    }
    const site = note(record, "site");
    const names = [record.name, record.label, site ?? ""].join(" ").toLowerCase();
    if (!names.includes(text) && !`${record.path} ${record.label}`.toLowerCase().includes(text)) continue;
    const hit = { id: record.name, text: site ? `${site} ${record.label}` : record.label, more: `${record.name} in ${record.path || "the model"}` };
    (site ? gemms : others).push(hit);
  }
  const length = hit => hit.text.length;
  return [...[...modules.values()].sort((a, b) => length(a) - length(b)).slice(0, 8), ...gemms.slice(0, 12), ...others.slice(0, 20)];
}
