// ---- Time, layers and scores

const STAGES = { media: ["fetching and decoding", "#7c8794"], video: ["reading the film", "#7c8794"], preprocess: ["making patches", "#a3adb8"], vision: ["vision tower", "#6d8fb8"], embed: ["embedding", "#b9c2cc"], prefill: ["language model", "#d9822b"], reduction: ["reduction", "#7a4fb0"] };
const waterfall = () => {
  const T = F.timing;
  const node = section("Until the first token", "Each stage of one question, on this machine" + (T.dense ? ". The stages before the language model are the same; medians of " + T.rounds + (T.rounds > 1 ? " runs in turn." : " run, so a small difference means nothing.") : "."));
  const lines = T.dense ? [["Every token", T.dense.stages], ["Reduced", T.reduced.stages]] : [["Reduced", T.reduced.stages]];
  const sum = stages => Object.values(stages).reduce((a, b) => a + b, 0), most = Math.max(...lines.map(([, stages]) => sum(stages)));
  const box = made(node, "div", { class: "card waterfall" });
  const used = new Set();
  for (const [name, stages] of lines) {
    const line = made(box, "div", { class: "line" }), label = made(line, "div", { class: "name" }, name);
    made(label, "small", {}, seconds(sum(stages)));
    const bar = made(line, "div", { class: "bar", role: "img", "aria-label": name + ": " + Object.entries(stages).map(([stage, s]) => STAGES[stage][0] + " " + seconds(s)).join(", ") });
    for (const [stage, s] of Object.entries(stages)) {
      used.add(stage);
      const part = made(bar, "i", { title: STAGES[stage][0] + ": " + seconds(s) });
      part.style.width = 100 * s / most + "%"; part.style.background = STAGES[stage][1];
    }
  }
  const list = made(node, "ul", { class: "key", "aria-label": "Stages" });
  for (const stage of Object.keys(STAGES)) if (used.has(stage)) { const item = made(list, "li"), dot = made(item, "i", { "aria-hidden": "true" }); dot.style.background = STAGES[stage][1]; item.append(STAGES[stage][0]); }
  const decode = T.dense && T.dense.token && T.reduced.token ? "Behind it, each further token takes " + seconds(T.reduced.token) + " reduced and " + seconds(T.dense.token) + " with every token, in one run of each: too few to compare." : T.reduced.token ? "Behind it, each further token takes " + seconds(T.reduced.token) + "." : "";
  if (decode) made(node, "p", { class: "soft" }, decode);
};

const layerBars = [];
let marker = null;
const layers = parent => {
  made(parent, "p", { class: "soft" }, "Tokens that each layer's attention reads; so many keys and values stay in its cache. The dashed outline is what no reduction would keep, the frame marks the layer that is chosen above.");
  const long = lengths.length, width = Math.max(Math.min(main.clientWidth - 60, 1100), 300), height = 200, left = 46, bottom = 22, wide = (width - left - 4) / long, tall = height - bottom - 10;
  const y = n => 10 + tall * (1 - n / R.prompt_tokens);
  const chart = made(made(parent, "div", { class: "card" }), "svg", { viewBox: "0 0 " + width + " " + height, role: "img", "aria-label": "KV length of " + long + " layers, from " + lengths[0] + " to " + ends + " tokens; the table below has each" });
  for (const n of [0, .5, 1]) {
    made(chart, "text", { x: left - 6, y: y(n * R.prompt_tokens) + 4, "text-anchor": "end" }, whole(Math.round(n * R.prompt_tokens)));
    made(chart, "line", { x1: left, x2: width - 4, y1: y(n * R.prompt_tokens), y2: y(n * R.prompt_tokens), stroke: "var(--line)" });
  }
  made(chart, "rect", { x: left, y: y(R.prompt_tokens), width: wide * long, height: tall, fill: "none", stroke: "var(--soft)", "stroke-dasharray": "3 3" });
  lengths.forEach((n, layer) => {
    const x = left + layer * wide, gap = Math.min(wide * .15, 3), own = wide - gap;
    made(chart, "rect", { x, y: y(n), width: own, height: y(textTokens) - y(n), fill: "var(--stay)" });
    made(chart, "rect", { x, y: y(textTokens), width: own, height: y(0) - y(textTokens), fill: "var(--text)" });
    layerBars.push([x, own]);
    if (long <= 16 || layer % 4 === 0) made(chart, "text", { x: x + own / 2, y: height - 6, "text-anchor": "middle" }, layer);
  });
  marker = made(chart, "rect", { class: "now", y: 4, height: height - bottom - 2, width: 0, x: 0 });
  const list = made(parent, "ul", { class: "key" });
  for (const [colour, text] of [["var(--stay)", "visual tokens"], ["var(--text)", "text"]]) { const item = made(list, "li"), dot = made(item, "i", { "aria-hidden": "true" }); dot.style.background = colour; item.append(text); }
  table(parent, "Tokens of each layer after the prefill", ["layer", "attention", "visual", "MLP", "KV length", "KV bytes"], lengths.map((n, layer) =>
    [layer, whole(n), whole(n - textTokens), layer + 1 < long ? whole(lengths[layer + 1]) : "1", whole(n), bytes(n * R.kv_slot_bytes)]));
  const decided = R.reduction.filter(call => call.kind !== "none" || call.outcome);
  if (decided.length) table(parent, "Calls of the reduction", ["call", "where", "what", "tokens", "visual"], decided.map(call =>
    [call.call, place(call.call), call.outcome || NAMES[call.kind], whole(call.tokens_before) + " → " + whole(call.tokens_after), whole(call.visual_before) + " → " + whole(call.visual_after)]));
};
const markLayers = () => {
  if (!marker) return;
  const chosen = step ? F.steps[step - 1].calls : [], bar = layerBars[chosen[chosen.length - 1]];
  marker.setAttribute("width", bar ? bar[1] : 0);
  if (bar) marker.setAttribute("x", bar[0]);
  marker.style.display = bar ? "" : "none";
};

const histograms = parent => {
  made(parent, "p", { class: "soft" }, "Cosine between each visual token and the one before it at the same place of the picture. Tokens from the dashed line on may merge.");
  const grid = made(parent, "div", { class: "charts" }), bound = F.settings.similarity_lower_bound;
  for (const one of F.histograms) {
    const total = one.counts.reduce((sum, n) => sum + n, 0), most = Math.max(...one.counts, 1), [low, high] = one.edges;
    const card = made(grid, "figure"), width = 320, height = 130, base = 106, wide = (width - 20) / one.counts.length;
    const median = one.median === null ? "no pairs" : whole(total) + " pairs, median " + one.median.toFixed(3);
    const chart = made(card, "svg", { viewBox: "0 0 " + width + " " + height, role: "img", "aria-label": "Histogram of similarity at call " + one.call + ": " + median });
    const x = s => 10 + (width - 20) * (s - low) / (high - low);
    one.counts.forEach((n, i) => {
      const middle = low + (high - low) * (i + .5) / one.counts.length;
      made(chart, "rect", { x: 10 + i * wide, y: base - 90 * n / most, width: Math.max(wide - 1, .5), height: 90 * n / most, fill: bound !== undefined && middle >= bound ? "var(--cool)" : "var(--text)" });
    });
    made(chart, "line", { x1: 10, x2: width - 10, y1: base, y2: base, stroke: "var(--soft)" });
    if (bound !== undefined && bound >= low) made(chart, "line", { x1: x(bound), x2: x(bound), y1: 8, y2: base, stroke: "var(--ink)", "stroke-dasharray": "4 3" });
    made(chart, "text", { x: 10, y: height - 8 }, "≤ " + low.toFixed(2));
    made(chart, "text", { x: width - 10, y: height - 8, "text-anchor": "end" }, "1");
    if (bound !== undefined && bound > low + .22 * (high - low) && bound < high - .08 * (high - low)) made(chart, "text", { x: x(bound), y: height - 8, "text-anchor": "middle" }, bound);
    made(card, "figcaption", {}, "Call " + one.call + ", " + place(one.call) + ": " + median);
  }
};

const everyFrame = parent => {
  const drawn = [];
  F.visuals.forEach((visual, v) => {
    const grid = made(parent, "div", { class: "frames" });
    for (const one of panels.filter(each => each.v === v)) one.panel.frames.forEach(frame => {
      const figure = made(grid, "figure"), canvas = made(figure, "canvas", { width: visual.stored[0], height: visual.stored[1], role: "img" }), caption = made(figure, "figcaption");
      drawn.push(() => {
        drawKept(canvas, one, frame, step, -1);
        const text = frameName(one, frame) + ": " + whole(staying(one, step)) + " of " + whole(one.end - one.first) + " stay";
        caption.textContent = text; canvas.setAttribute("aria-label", text);
      });
    });
  });
  return () => drawn.forEach(draw => draw());
};
