// ---- The page, from the top

made(main, "p", { class: "eyebrow" }, F.name + " · " + F.model.family_name + " · " + F.model.num_layers + " layers · " + F.model.dtype + " · " + F.backend);
{
  const title = made(main, "h1");
  F.headline.forEach((part, i) => { if (i) title.append(", "); made(title, part.strong ? "b" : "span", {}, part.text); });
}
const said = made(main, "div", { class: "card said" });
for (const turn of F.turns) {
  const box = made(said, "div");
  made(box, "b", {}, turn.role);
  made(box, "span", {}, turn.parts.map(part => part.text === undefined ? "[" + part.shown + "] " : part.text).join(""));
}
const answered = (answer, title) => {
  const box = made(said, "div");
  made(box, "b", {}, title + (F.drawn ? ", drawn at random" : ""));
  made(box, "span", { class: "answer" }, answer.text.trim() || "(nothing)");
};
const same = D && D.text === R.text;
answered(R, D && !same ? "answer, reduced" : D ? "answer, reduced and with every token" : "answer");
if (D && !same) answered(D, "answer, with every token");

let drawEvery = () => {};
if (F.visuals.length) {
  let parent = null;
  F.visuals.forEach((visual, v) => { parent = player(visual, v); });
  if (last) calls(F.visuals.length > 1 ? made(main, "section", { class: "player" }) : parent);
  else spoken = made(main, "p", { class: "soft" });
  key(spoken.parentNode);
  if (pooled) made(main, "p", { class: "soft" }, "Rows of this model are learned queries that look at a whole picture or slice and have no place in it: a bar in each shows how many of them stay.");
  if (beside) made(main, "p", { class: "soft" }, "Some rows show only the padding around the picture: they are counted, not drawn.");
  if (F.steps.some(one => one.kind === "static")) made(main, "p", { class: "soft" }, "The static graph of this bundle reduces inside itself, and says only what is left at its end.");
}
waterfall();

{
  const node = section("What it saves");
  const kept = ends - textTokens, slots = R.prompt_tokens * lengths.length * R.kv_slot_bytes;
  definitions(node, [
    ["Visual tokens", whole(R.visual_tokens) + " → " + whole(kept), "from the prompt to the last layer"],
    ["Computation over them", percent(R.cost), "kept (the cost); " + percent(F.settings.cost) + " asked"],
    ["Work of the prefill", percent(R.flops_kept), "of the operations: " + flops(R.flops)],
    ["Memory of the conversation", bytes(R.kv_bytes), percent(R.kv_bytes / slots) + " of the unreduced KV cache"],
  ]);
}

const fold = (title, fill) => {
  const node = made(main, "details");
  made(node, "summary", {}, title);
  fill(node);
  return node;
};
if (panels.length) {
  const node = fold("Every frame", parent => { drawEvery = everyFrame(parent); });
  const whenOpen = drawEvery;
  drawEvery = () => { if (node.open) whenOpen(); };
  node.addEventListener("toggle", drawEvery);
  new ResizeObserver(() => requestAnimationFrame(() => drawEvery())).observe(node);
}
fold("Layer by layer", layers);
if (F.histograms.length) fold("How alike the tokens are", histograms);
if (D) fold("With and without reduction, in numbers", node => {
  const mean = answer => answer.kv_lengths.reduce((sum, n) => sum + n, 0) / answer.kv_lengths.length;
  const times = (a, b) => b ? Number((a / b).toPrecision(3)) + " ×" : "–", T = F.timing;
  const spread = run => seconds(run.first.median) + " (" + seconds(run.first.least) + " to " + seconds(run.first.most) + ")";
  const rows = [
    ["First token", spread(T.dense), spread(T.reduced), T.level ? "level" : T.rounds < 2 ? "one run each" : times(T.dense.first.median, T.reduced.first.median)],
    ["Tokens in the last layer", whole(D.kv_lengths[D.kv_lengths.length - 1]), whole(ends), times(D.kv_lengths[D.kv_lengths.length - 1], ends)],
    ["KV length, mean of layers", whole(Math.round(mean(D))), whole(Math.round(mean(R))), times(mean(D), mean(R))],
    ["KV cache", bytes(D.kv_bytes), bytes(R.kv_bytes), times(D.kv_bytes, R.kv_bytes)],
    ["FLOPs of the prefill", flops(D.flops), flops(R.flops), times(D.flops, R.flops)],
  ];
  if (T.dense.token && T.reduced.token) rows.push(["Each further token", seconds(T.dense.token), seconds(T.reduced.token), "one run each"]);
  table(node, "First token: from the file on, medians of " + T.rounds + " runs in turn, with the least and the most. Gain: every token over reduced.", ["", "every token", "reduced", "gain"], rows);
});
fold("Settings", node => {
  const S = F.settings, entries = [["Bundle or checkpoint", F.name], ["Family", F.family], ["Backend", F.backend], ["Reduction", S.mode], ["Reducer", S.reducer], ["Cost asked", S.cost_text], ["Cost reached", R.cost_text]];
  if (S.similarity_lower_bound !== undefined) entries.push(["Similarity lower bound", S.similarity_lower_bound], ["Ratio lower bound", S.ratio_lower_bound], ["Deepest layer a reduction may follow", S.depth]);
  if (S.schedule) entries.push(["Merge shares", S.schedule.merge_shares.join(", ") || "none"], ["Prune after layer", S.schedule.prune_layer], ["Prune share", S.schedule.prune_share]);
  entries.push(["Prompt", whole(R.prompt_tokens) + " tokens, " + whole(R.visual_tokens) + " of them visual"], ["Answer", whole(R.token_ids.length) + " tokens"], ["Ended by", R.finish_reason]);
  for (const [stage, spent] of Object.entries(R.seconds)) entries.push(["Seconds: " + stage, seconds(spent)]);
  node.className = "wrap";
  table(node, "What was asked, and how long each stage of this answer took", ["", ""], entries);
});
const stored = F.visuals.map(v => v.pictures.length + " picture" + (v.pictures.length > 1 ? "s" : "") + " stored at " + v.stored.join(" × ") + " pixels, read at " + v.size.join(" × ")).join("; ");
made(made(main, "footer"), "p", { class: "soft" }, "One file; it loads nothing from elsewhere." + (stored ? " " + stored + "." : ""));
redraw = () => { films.forEach(film => film.paint()); drawEvery(); };
if (F.visuals.length) {
  show(last);
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) films[0].start();
}
