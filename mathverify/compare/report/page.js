// The page's behaviour: figures drawn when they come into view, one filter for table and figures, two runs side by side.
// Needs vegaEmbed (inlined before this). Puts data on the page as text only, never as HTML; asks no network for anything.
"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const runs = data.tables.runs;
  const views = new Map(); // figure id -> Vega view
  const onScreen = new Set();
  const text = (tag, content, className) => {
    const node = document.createElement(tag);
    if (content !== undefined) node.textContent = content;
    if (className) node.className = className;
    return node;
  };
  const percent = (x, digits = 1) => (x === null || x === undefined ? "–" : (100 * x).toFixed(digits) + "%");
  const points = (x) => (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(1);

  // Light and dark

  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme || (systemDark.matches ? "dark" : "light")) === "dark";
  const label = () => {
    $("theme").textContent = isDark() ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
    $("theme").setAttribute("aria-pressed", String(isDark()));
  };
  const recolour = () => {
    label();
    for (const id of [...views.keys()]) draw(id);
  };
  $("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("mathverify-theme", document.documentElement.dataset.theme); } catch { /* private mode */ }
    recolour();
  });
  systemDark.addEventListener("change", recolour);
  label();

  // Figures

  let hidden = [];
  let hot = -1;
  const named = (spec, found = new Set()) => {
    if (spec && typeof spec === "object") {
      if (!Array.isArray(spec) && spec.data && typeof spec.data.name === "string") found.add(spec.data.name);
      for (const value of Object.values(spec)) named(value, found);
    }
    return found;
  };
  const table = (name) => pair.tables[name] || data.tables[name] || [];

  const painted = (spec, colours) =>
    typeof spec === "string" ? colours[spec] ?? spec
      : Array.isArray(spec) ? spec.map((part) => painted(part, colours))
      : spec && typeof spec === "object" ? Object.fromEntries(Object.entries(spec).map(([key, part]) => [key, painted(part, colours)]))
      : spec;

  async function draw(id) {
    const place = document.querySelector(`[data-chart="${id}"]`);
    const ground = isDark() ? "dark" : "light";
    const spec = painted(data.specs[id], data.palette[ground]);
    spec.datasets = { ...spec.datasets };
    for (const name of named(spec)) spec.datasets[name] ??= structuredClone(table(name));
    for (const param of spec.params) {
      if (param.name === "hidden") param.value = hidden;
      if (param.name === "hot") param.value = -1;
      if (param.name === "most") param.value = pair.most;
    }
    const old = views.get(id);
    const made = await vegaEmbed(place, spec, {
      config: data.config[ground], renderer: "svg", actions: false, ast: true,
      tooltip: { theme: "custom" }, mode: "vega-lite", logLevel: hidden.length ? 1 : 2,
    });
    made.view.logLevel(1); // errors only: a filter may leave nothing, which Vega warns of
    if (old) old.finalize();
    place.classList.remove("waiting");
    const drawing = place.querySelector("svg");
    if (drawing) {
      drawing.setAttribute("role", "img");
      drawing.setAttribute("aria-label", spec.description);
    }
    views.set(id, made.view);
    made.view.addEventListener("mouseover", (_, item) => light(item && item.datum ? item.datum.run : undefined));
    made.view.addEventListener("mouseout", () => light(undefined));
  }

  let asked = 0;
  function light(run) {
    const next = Number.isInteger(run) ? run : -1;
    if (next === hot) return;
    hot = next;
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(() => {
      for (const row of document.querySelectorAll("#runs tr.hot")) row.classList.remove("hot");
      if (hot >= 0) document.querySelector(`#runs tr[data-run="${hot}"]`)?.classList.add("hot");
      for (const [id, view] of views) if (onScreen.has(id)) view.signal("hot", hot).runAsync();
    });
  }

  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const id = entry.target.dataset.chart;
      if (entry.isIntersecting) {
        onScreen.add(id);
        if (!views.has(id) && entry.target.classList.contains("waiting")) {
          entry.target.classList.remove("waiting");
          draw(id);
        } else if (views.has(id)) views.get(id).signal("hot", hot).runAsync();
      } else onScreen.delete(id);
    }
  }, { rootMargin: "300px 0px" });

  addEventListener("beforeprint", () => {
    for (const place of document.querySelectorAll("[data-chart]")) if (!views.has(place.dataset.chart)) draw(place.dataset.chart);
  });

  document.addEventListener("click", async (event) => {
    const id = event.target.closest?.("[data-save]")?.dataset.save;
    if (!id) return;
    if (!views.has(id)) await draw(id);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([await views.get(id).toSVG()], { type: "image/svg+xml" }));
    link.download = `${id}.svg`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });

  // The numbers behind a figure, for those who cannot or would rather not look at it
  const MOST_NUMBERS = 300;
  function numbers(details) {
    const rows = table(details.dataset.table).filter((row) => !hidden.includes(row.run));
    const place = details.querySelector("div");
    const keys = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter((key) => !/^(slot|place|p\d+)$/.test(key));
    const made = text("table");
    const head = made.createTHead().insertRow();
    for (const key of keys) {
      const cell = text("th", key.replace(/_text$/, "").replace(/^p(\d+)$/, (_, n) => data.parameters[n]).replaceAll("_", " "));
      cell.scope = "col";
      head.append(cell);
    }
    const body = made.createTBody();
    for (const row of rows.slice(0, MOST_NUMBERS)) {
      const line = body.insertRow();
      for (const key of keys) {
        const value = row[key];
        line.insertCell().textContent = typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : (value ?? "");
      }
    }
    place.className = "scroller tall";
    place.tabIndex = 0;
    place.setAttribute("role", "region");
    place.setAttribute("aria-label", "Numbers of the figure");
    place.replaceChildren(made);
    if (rows.length > MOST_NUMBERS) place.append(text("p", `the first ${MOST_NUMBERS} of ${rows.length} rows`, "quiet"));
  }
  for (const details of document.querySelectorAll("details[data-table]")) {
    details.addEventListener("toggle", () => details.open && numbers(details));
  }

  // One filter for the table and every figure

  const form = $("filters");
  function filter() {
    const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = [...form.querySelectorAll("select")].filter((s) => s.value !== "").map((s) => [s.dataset.field, s.value]);
    hidden = runs.filter((run) => {
      const all = `${run.name} ${run.label} ${run.state}`.toLowerCase();
      return !words.every((word) => all.includes(word)) || !chosen.every(([field, value]) => String(run[field]) === value);
    }).map((run) => run.run);
    const out = new Set(hidden);
    for (const row of document.querySelectorAll("#runs tbody tr")) row.hidden = out.has(Number(row.dataset.run));
    for (const view of views.values()) view.signal("hidden", hidden).runAsync();
    for (const details of document.querySelectorAll("details[data-table][open]")) numbers(details);
    $("shown").textContent = `${runs.length - hidden.length} of ${runs.length} runs`;
  }
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));

  // Sorting the table

  const body = document.querySelector("#runs tbody");
  const heads = [...document.querySelectorAll("#runs thead th")];
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === (place === 0 ? "descending" : "ascending") ? -1 : 1;
    const first = head.hasAttribute("aria-sort") ? up : head.classList.contains("number") && place > 0 ? -1 : 1;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", first === 1 ? "ascending" : "descending");
    const key = (row) => row.children[place].dataset.sort;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === ""); // what is missing comes last either way
      const [m, n] = [Number(x), Number(y)];
      return first * (Number.isNaN(m) || Number.isNaN(n) ? x.localeCompare(y, undefined, { numeric: true }) : m - n);
    });
    body.append(...rows);
  }));
  body.addEventListener("mouseover", (event) => {
    const row = event.target.closest("tr");
    light(row ? Number(row.dataset.run) : undefined);
  });
  body.addEventListener("mouseleave", () => light(undefined));

  // Two runs side by side

  const pair = { tables: {}, a: null, b: null, most: 1 };
  const bytes = (packed) => Uint8Array.from(atob(packed), (c) => c.charCodeAt(0));
  const bit = (packed, place) => (packed[place >> 3] >> (place & 7)) & 1;
  const rows = data.rows && {
    ...data.rows,
    truth: bytes(data.rows.labels),
    question: new Uint32Array(bytes(data.rows.groups).buffer),
    slice: bytes(data.rows.slice_codes),
    right: new Map(Object.entries(data.rows.runs).map(([run, packed]) => [Number(run), bytes(packed.right)])),
    said: new Map(Object.entries(data.rows.runs).map(([run, packed]) => [Number(run), new Uint16Array(bytes(packed.said).buffer)])),
  };

  // A minus B on the same rows. The interval is normal with a variance summed by question; as in paired_parts of facts.py.
  function difference(a, b, chosen) {
    const sums = new Map();
    let n = 0, onlyA = 0, onlyB = 0;
    for (let row = 0; row < rows.rows; row++) {
      if (chosen !== null && rows.slice[row] !== chosen) continue;
      const gap = bit(a, row) - bit(b, row);
      if (gap > 0) onlyA++;
      if (gap < 0) onlyB++;
      const sum = sums.get(rows.question[row]) || [0, 0];
      sums.set(rows.question[row], [sum[0] + gap, sum[1] + 1]);
      n++;
    }
    const mean = (onlyA - onlyB) / n;
    let variance = 0;
    for (const [gap, size] of sums.values()) variance += (gap - mean * size) ** 2;
    const clusters = sums.size;
    const z = data.z;
    const half = onlyA + onlyB === 0 ? z ** 2 / (clusters + z ** 2) // Wilson's upper end for none
      : clusters > 1 ? z * Math.sqrt((variance * clusters) / (clusters - 1)) / n : null;
    return { n, onlyA, onlyB, mean, low: half === null ? null : mean - half, high: half === null ? null : mean + half,
             p: signFlip([...sums.values()].map((sum) => sum[0])) };
  }

  // Exact two-sided p of the randomisation test over questions, as compare/paired.py's sign_flip; McNemar's where no
  // question repeats.
  function signFlip(gaps) {
    const sizes = gaps.map(Math.abs);
    const total = sizes.reduce((a, b) => a + b, 0);
    const observed = Math.abs(gaps.reduce((a, b) => a + b, 0));
    if (total === 0) return 1;
    if (total > 4000) return 2 * upperTail(observed / Math.sqrt(sizes.reduce((a, b) => a + b * b, 0)));
    let chances = new Float64Array([1]);
    for (const size of sizes) {
      if (!size) continue;
      const next = new Float64Array(chances.length + size);
      for (let k = 0; k < chances.length; k++) {
        next[k] += chances[k] / 2;
        next[k + size] += chances[k] / 2;
      }
      chances = next;
    }
    let sum = 0;
    for (let k = 0; k <= Math.floor((total - observed) / 2); k++) sum += chances[k];
    return Math.min(1, 2 * sum);
  }
  function upperTail(z) { // of the normal distribution: Numerical Recipes' erfc, relative error below 1.2e-7
    const x = z / Math.SQRT2, t = 1 / (1 + 0.5 * x);
    const c = [-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277];
    return (t * Math.exp(-x * x + c.reduceRight((sum, k) => sum * t + k, 0))) / 2;
  }

  function choose() {
    [pair.a, pair.b] = $("pick-a") ? [Number($("pick-a").value), Number($("pick-b").value)] : [data.pair[0], null];
    const sides = pair.b === null ? [["A", pair.a]] : [["A", pair.a], ["B", pair.b]];
    const marked = (rows, side) => (rows || []).map((row) => ({ ...row, side }));
    const edges = data.score_edges;
    pair.tables = {
      pair_scores: sides.flatMap(([side, run]) => ["right", "wrong"].flatMap((kind) =>
        (data.scores[run]?.[kind] || []).map((count, k) => ({ side, answer: `${kind} answers`, from: edges[k], to: edges[k + 1], rows: count })))),
      pair_calibration: sides.flatMap(([side, run]) => marked(data.calibration[run], side)),
      pair_roc: sides.flatMap(([side, run]) => marked(data.tables.roc.filter((row) => row.run === run), side)),
      pair_slices: sides.flatMap(([side, run]) => marked(data.slices[run], side)),
      pair_difference: differences(),
    };
    pair.most = Math.max(1, ...pair.tables.pair_scores.map((row) => row.rows));
    for (const [id, view] of views) {
      if (data.specs[id].params.some((param) => param.name === "most")) view.signal("most", pair.most);
      for (const name of named(data.specs[id])) {
        if (name in pair.tables) view.data(name, structuredClone(pair.tables[name]));
      }
      view.runAsync();
    }
    for (const details of document.querySelectorAll('details[data-table^="pair_"][open]')) numbers(details);
    summarise();
    list(true);
  }

  function differences() {
    const a = rows && rows.right.get(pair.a), b = rows && rows.right.get(pair.b);
    if (!a || !b) return [];
    const parts = [["all rows", null], ...rows.slices.map((name, code) => [name, code])];
    return parts.map(([slice, code], place) => {
      const d = difference(a, b, code);
      return { slice, place, difference: 100 * d.mean, low: 100 * d.low, high: 100 * d.high, only_a: d.onlyA, only_b: d.onlyB, rows: d.n, p: d.p };
    }).filter((row) => row.rows > 0);
  }

  function summarise() {
    const place = $("pair-summary");
    if (!place) return;
    const all = pair.tables.pair_difference[0];
    if (pair.a === pair.b) { place.textContent = "The same run on both sides: choose another."; return; }
    if (!all) { place.textContent = "These two were not tested on the same rows: only their own figures are shown, no differences."; return; }
    const settled = all.low > 0 || all.high < 0;
    const p = all.p < 0.0001 ? "p < 0.0001" : `p = ${all.p.toPrecision(2)}`;
    place.textContent =
      `On the same ${all.rows.toLocaleString("en")} rows A − B is ${points(all.difference)} points [${points(all.low)}, ${points(all.high)}], ${p}: ` +
      `${all.only_a} rows only A judged right, ${all.only_b} only B. ` +
      (settled && all.p < 0.05 ? `${all.difference > 0 ? "A" : "B"} is better on these rows` : "On these rows neither is shown to be better") +
      "; whether another seed would say the same is a different question.";
  }

  // Rows on which the two disagree

  let listed = [];
  let open = 0;
  const PAGE = 20;
  function list(fresh) {
    if (!$("row-list")) return;
    const a = rows.right.get(pair.a), b = rows.right.get(pair.b);
    const words = $("row-search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const which = $("row-which").value, slice = $("row-slice").value;
    if (fresh) open = PAGE;
    let disagreeing = 0;
    listed = !a || !b ? [] : rows.listed.map((row, k) => ({ ...row, k })).filter((row) => {
      const [x, y] = [bit(a, row.place), bit(b, row.place)];
      if (x === y) return false;
      disagreeing++;
      if ((which === "a" && !x) || (which === "b" && !y)) return false;
      if (slice !== "" && String(rows.slice[row.place]) !== slice) return false;
      const all = `${row.id} ${row.question || ""} ${row.answer || ""} ${row.solution || ""}`.toLowerCase();
      return words.every((word) => all.includes(word));
    });
    $("row-list").replaceChildren(...listed.slice(0, open).map(card));
    const total = pair.tables.pair_difference[0];
    const differing = total ? total.only_a + total.only_b : 0;
    $("row-count").textContent = `${Math.min(open, listed.length)} of ${listed.length} that fit shown; the two differ on ${differing} rows` +
      (disagreeing < differing ? `, of which ${disagreeing} are in this page` : "");
    $("row-more").hidden = listed.length <= open;
  }
  function card(row) {
    const item = text("li"), left = text("div"), right = text("div", undefined, "facts");
    left.append(text("p", row.question || row.id, "question"));
    if (row.answer !== undefined) left.append(text("p", `Answer given: ${row.answer}`, "answer"));
    if (row.solution) {
      const more = text("details");
      more.append(text("summary", "Solution given"), text("p", row.solution));
      left.append(more);
    }
    const truth = bit(rows.truth, row.place);
    const line = (...nodes) => { const made = text("div"); made.append(...nodes); right.append(made); };
    line(text("span", "The answer is"), text("span", truth ? "right" : "wrong", truth ? "says-right" : "says-wrong"));
    for (const [side, run] of [["A", pair.a], ["B", pair.b]]) {
      const correct = bit(rows.right.get(run), row.place);
      line(text("span", side, `side ${side}`), text("span", `said ${truth === correct ? "True" : "False"} (${percent(rows.said.get(run)[row.k] / 65535, 0)}), ${correct ? "correctly" : "mistakenly"}`));
    }
    const name = rows.slices[rows.slice[row.place]];
    line(text("span", [row.question ? row.id : "", name ? `slice ${name}` : ""].filter(Boolean).join(", ")));
    item.append(left, right);
    return item;
  }

  if ($("pick-a")) {
    if (rows && $("row-slice")) rows.slices.forEach((name, code) => {
      const option = text("option", name);
      option.value = String(code);
      $("row-slice").append(option);
    });
    for (const id of ["pick-a", "pick-b"]) $(id).addEventListener("change", choose);
    $("swap").addEventListener("click", () => {
      [$("pick-a").value, $("pick-b").value] = [$("pick-b").value, $("pick-a").value];
      choose();
    });
    for (const id of ["row-search", "row-which", "row-slice"]) $(id)?.addEventListener("input", () => list(true));
    $("row-more")?.addEventListener("click", () => {
      const from = open;
      open += PAGE;
      list(false);
      $("row-list").children[from]?.scrollIntoView({ block: "nearest" });
    });
  }
  choose();
  // After the first paint
  requestAnimationFrame(() => setTimeout(() => {
    for (const place of document.querySelectorAll("[data-chart]")) watcher.observe(place);
    document.documentElement.dataset.ready = "yes";
  }));
})();
