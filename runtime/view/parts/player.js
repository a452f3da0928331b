// ---- The film, playing: what stayed, and all of it

const VEILS = { merge: "rgba(12,14,18,.6)", static: "rgba(12,14,18,.68)", prune: "rgba(12,14,18,.84)" };
// Panels with the rows they draw: rows with equal boxes are one group, which has no place in the picture.
const panels = [];
let pooled = false, beside = false;
{
  let row = 0;
  F.visuals.forEach((visual, v) => visual.panels.forEach((panel, number) => {
    const groups = [];
    for (const box of F.boxes[panel.boxes]) {
      const group = groups[groups.length - 1];
      if (group && group.box.every((edge, i) => edge === box[i])) group.count++;
      else groups.push({ box, first: row, count: 1 });
      row++;
    }
    groups.forEach(group => { group.drawn = group.box[2] > group.box[0] && group.box[3] > group.box[1]; });
    pooled = pooled || groups.some(group => group.drawn && group.count > 1);
    beside = beside || groups.some(group => !group.drawn);
    panels.push({ v, number, visual, panel, groups, first: groups[0].first, end: row });
  }));
}
const panelOf = row => panels.find(one => one.first <= row && row < one.end);
const staying = (one, number) => { let n = 0; for (let row = one.first; row < one.end; row++) n += !fate(row, number); return n; };
const when = (visual, frame) => visual.kind === "video" ? visual.times[frame].toFixed(1) + " s" : "";
const frameName = (one, frame) => [one.visual.kind === "video" ? "frame " + (frame + 1) + " at " + when(one.visual, frame) : "picture", one.panel.name].filter(Boolean).join(", ");

const pictureOf = (visual, frame) => {
  visual.loaded = visual.loaded || [];
  if (!visual.loaded[frame]) { visual.loaded[frame] = new Image(); visual.loaded[frame].src = visual.pictures[frame]; }
  return visual.loaded[frame];
};
const fitted = (canvas, visual) => {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth || visual.stored[0], height = width * visual.stored[1] / visual.stored[0];
  const wide = Math.round(width * ratio), tall = Math.round(height * ratio);
  if (canvas.width !== wide || canvas.height !== tall) { canvas.width = wide; canvas.height = tall; }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return [pen, width, height];
};
const edges = (group, width, height) => {  // on whole pixels: no seam between two that are alike
  const [left, top, right, bottom] = group.box, x = Math.round(left * width), y = Math.round(top * height);
  return [x, y, Math.round(right * width) - x, Math.round(bottom * height) - y];
};
const drawShare = (pen, group, x, y, w, h, number) => {
  let stay = 0;
  for (let row = group.first; row < group.first + group.count; row++) stay += !fate(row, number);
  const bar = Math.max(Math.min(14, h * .15), 5), label = stay + " of " + group.count, size = Math.max(Math.min(14, w / 6), 9);
  pen.fillStyle = "rgba(10,12,15,.8)"; pen.fillRect(x + 1, y + h - bar - 2, w - 2, bar);
  pen.fillStyle = "#ffb020"; pen.fillRect(x + 1, y + h - bar - 2, (w - 2) * stay / group.count, bar);
  pen.strokeStyle = "rgba(255,255,255,.7)"; pen.lineWidth = 1; pen.strokeRect(x + .5, y + .5, w - 1, h - 1);
  pen.font = "600 " + size + "px system-ui, sans-serif";
  const wide = pen.measureText(label).width + 8;
  if (wide < w) { pen.fillStyle = "rgba(10,12,15,.8)"; pen.fillRect(x + 2, y + h - bar - size - 10, wide, size + 6); pen.fillStyle = "#fff"; pen.fillText(label, x + 6, y + h - bar - 7); }
};
const drawKept = (canvas, one, frame, number, chosen) => {
  const [pen, width, height] = fitted(canvas, one.visual), image = pictureOf(one.visual, frame);
  if (image.complete && image.naturalWidth) pen.drawImage(image, 0, 0, width, height);
  else image.onload = () => redraw();
  if (!number && F.steps.length) return ring(pen, one, width, height, chosen);
  for (const group of one.groups) {
    if (!group.drawn) continue;
    const [x, y, w, h] = edges(group, width, height);
    if (group.count > 1) { drawShare(pen, group, x, y, w, h, number); continue; }
    const kind = fate(group.first, number);
    if (!kind) continue;
    pen.globalCompositeOperation = "saturation"; pen.fillStyle = "#777"; pen.fillRect(x, y, w, h);
    pen.globalCompositeOperation = "source-over"; pen.fillStyle = VEILS[kind]; pen.fillRect(x, y, w, h);
  }
  for (const group of one.groups) {  // on top: what stays is what the eye goes to
    if (!group.drawn || group.count > 1 || fate(group.first, number)) continue;
    const [x, y, w, h] = edges(group, width, height);
    pen.strokeStyle = "rgba(255,176,32," + Math.min(1, Math.max(w, 5) / 14) + ")";
    pen.lineWidth = w > 16 ? 2 : 1;
    const inset = pen.lineWidth / 2;
    pen.strokeRect(x + inset, y + inset, Math.max(w - 2 * inset, 0), Math.max(h - 2 * inset, 0));
  }
  ring(pen, one, width, height, chosen);
};
const ring = (pen, one, width, height, chosen) => {
  const group = chosen < 0 ? null : one.groups.find(g => g.first <= chosen && chosen < g.first + g.count);
  if (!group || !group.drawn) return;
  const [x, y, w, h] = edges(group, width, height);
  pen.strokeStyle = "#fff"; pen.lineWidth = 2; pen.strokeRect(x - 1, y - 1, w + 2, h + 2);
  pen.strokeStyle = "#111"; pen.lineWidth = 1; pen.strokeRect(x - 2.5, y - 2.5, w + 5, h + 5);
};

// Only these two prune by what the last query looks at; others by what they say themselves.
const byQuestion = ["framefusion", "fastv"].includes(F.settings.reducer);
let step = last, redraw = () => {};
const films = [];
const detailOf = row => {  // the story of one patch, in a lay reader's words first
  const one = panelOf(row), gone = F.left[row], into = F.into[row], like = F.similar[row];
  if (gone < 0) return "This patch stays in every layer" + (F.took[row] ? ", and stands for " + whole(F.took[row]) + " others that were like it." : ".");
  const done = F.steps[gone], where = done.kind === "static" ? "inside the graph" : place(done.calls[0]);
  if (into >= 0) {
    const head = panelOf(into), frame = head.panel.frames[0];
    return "The same thing was there before: this patch was merged into the one " + (head === one ? "beside it in this frame" : "in " + frameName(head, frame)) + " (similarity " + like.toFixed(3) + ", token merging, " + where + ").";
  }
  return (byQuestion ? "The model looked little at this patch: it was left out (" : "The method " + F.settings.reducer + " left this patch out (") + NAMES[done.kind] + " " + where + ").";
};

const player = (visual, v) => {
  const own = panels.filter(one => one.v === v), film = visual.kind === "video", count = visual.pictures.length;
  const numbers = [...new Set(own.map(one => one.panel.name))];
  const node = made(main, "section", { class: "player", "aria-label": (film ? "Film " : "Picture ") + (v + 1) });
  if (F.visuals.length > 1) made(node, "h2", {}, (film ? "Film " : "Picture ") + (v + 1) + " of " + F.visuals.length);
  const screens = made(node, "div", { class: "screens" });
  const screen = (name, title) => {
    const figure = made(screens, "figure"), canvas = made(figure, "canvas", { class: name, role: "img", width: visual.stored[0], height: visual.stored[1] });
    return { canvas, title, caption: made(figure, "figcaption") };
  };
  const kept = screen("kept", "What stays"), all = screen("all", film ? "The same film, whole" : "The same picture, whole");
  kept.canvas.tabIndex = 0;
  const controls = made(node, "div", { class: "controls" });
  let frame = 0, chosen = -1, timer = 0, view = 0, play, scrub, clock, bars = [];
  const shownPanel = () => {
    const here = own.filter(one => one.panel.frames.includes(frame));
    return here.find(one => one.panel.name === numbers[view]) || here[0];
  };
  if (count > 1) {
    const row = made(controls, "div", { class: "row" });
    play = made(row, "button", { type: "button", "aria-pressed": "false" }, "▶ Play");
    scrub = made(row, "input", { type: "range", min: 0, max: count - 1, step: 1, value: 0, "aria-label": "Frame" });
    clock = made(row, "output", {});
    const stays = visual.pictures.map((_, f) => own.filter(one => one.panel.frames.includes(f)).reduce((sum, one) => sum + staying(one, last) / one.panel.frames.length, 0)), most = Math.max(...stays, 1);
    const strip = made(controls, "div", { class: "strip", role: "img", "aria-label": "Patches that stay of each frame: " + stays.map(n => whole(Math.round(n))).join(", ") });
    stays.forEach((n, f) => { const bar = made(strip, "i", { title: when(visual, f) + ": " + whole(Math.round(n)) + " stay" }); bar.style.height = Math.max(100 * n / most, 4) + "%"; bar.addEventListener("click", () => { stop(); go(f); }); });
    bars = [...strip.children];
    // The first frame to look at shows both: most of what stays, beside what does not.
    const totals = visual.pictures.map((_, f) => own.filter(one => one.panel.frames.includes(f)).reduce((sum, one) => sum + (one.end - one.first) / one.panel.frames.length, 0));
    const telling = stays.map((n, f) => n < totals[f] - 1e-9 ? n : 0);
    frame = telling.indexOf(Math.max(...telling));
  }
  if (numbers.length > 1) {
    const row = made(controls, "div", { class: "row" }), choice = made(made(row, "label", {}, "The model sees it in parts: "), "select");
    numbers.forEach((name, i) => made(choice, "option", { value: i }, name || "whole"));
    choice.addEventListener("change", () => { view = Number(choice.value); chosen = -1; paint(); });
  }
  const detail = made(controls, "div", { class: "card detail", "aria-live": "polite" });
  const words = made(detail, "span"), jump = made(detail, "button", { type: "button" }, "Show that one");
  jump.hidden = true;
  const paint = () => {
    const one = shownPanel(), number = step;
    if (!one) return;
    drawKept(kept.canvas, one, frame, number, chosen);
    const [pen, width, height] = fitted(all.canvas, visual), image = pictureOf(visual, frame);
    if (image.complete && image.naturalWidth) pen.drawImage(image, 0, 0, width, height);
    const stay = staying(one, number), total = one.end - one.first, at = frameName(one, frame);
    kept.caption.replaceChildren();
    made(kept.caption, "b", {}, kept.title);
    kept.caption.append(": " + whole(stay) + " of " + whole(total) + " patches, " + stepName(number));
    all.caption.replaceChildren();
    made(all.caption, "b", {}, all.title);
    all.caption.append(film ? ": " + at : "");
    kept.canvas.setAttribute("aria-label", at + ": " + whole(stay) + " of " + whole(total) + " patches stay " + stepName(number) + ". Arrow keys move over patches.");
    all.canvas.setAttribute("aria-label", at + ", whole");
    bars.forEach((bar, f) => bar.classList.toggle("here", f === frame));
    if (scrub) { scrub.value = frame; scrub.setAttribute("aria-valuetext", at); clock.textContent = when(visual, frame) + " · " + (frame + 1) + "/" + count; }
  };
  const choose = row => {
    chosen = row;
    jump.hidden = row < 0 || F.into[row] < 0;
    words.textContent = row < 0 ? (own.some(one => one.groups.some(g => g.drawn && g.count === 1)) ? "Point at a patch, or tap it: what became of it?" : "The tokens of this model look at whole pictures: bars say how many of them stay.") : detailOf(row);
    paint();
  };
  const at = event => {
    const one = shownPanel(), box = kept.canvas.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width, y = (event.clientY - box.top) / box.height;
    const group = one && one.groups.find(g => g.drawn && g.count === 1 && g.box[0] <= x && x < g.box[2] && g.box[1] <= y && y < g.box[3]);
    return group ? group.first : -1;
  };
  kept.canvas.addEventListener("pointermove", event => { if (event.pointerType === "mouse" && !timer) { const row = at(event); if (row !== chosen) choose(row); } });
  kept.canvas.addEventListener("click", event => { stop(); choose(at(event)); });
  kept.canvas.addEventListener("keydown", event => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }, move = moves[event.key], one = shownPanel();
    if (!move || !one) return;
    event.preventDefault(); event.stopPropagation(); stop();
    const placed = one.groups.filter(g => g.drawn && g.count === 1), from = placed.find(g => g.first === chosen);
    if (!placed.length) return;
    if (!from) return choose(placed[0].first);
    const middle = g => [(g.box[0] + g.box[2]) / 2, (g.box[1] + g.box[3]) / 2], [x, y] = middle(from);
    const ahead = placed.filter(g => { const [a, b] = middle(g); return move[0] ? (a - x) * move[0] > 1e-6 && Math.abs(b - y) < (from.box[3] - from.box[1]) / 2 : (b - y) * move[1] > 1e-6 && Math.abs(a - x) < (from.box[2] - from.box[0]) / 2; });
    ahead.sort((g, h) => { const [a, b] = middle(g), [c, d] = middle(h); return Math.abs(a - x) + Math.abs(b - y) - Math.abs(c - x) - Math.abs(d - y); });
    if (ahead.length) choose(ahead[0].first);
  });
  const go = to => { frame = Math.min(Math.max(to, 0), count - 1); if (chosen >= 0) choose(-1); else paint(); };
  const stop = () => { clearTimeout(timer); timer = 0; if (play) { play.setAttribute("aria-pressed", "false"); play.textContent = "▶ Play"; } };
  const tick = () => {
    go(frame + 1 < count ? frame + 1 : 0);
    const gap = frame + 1 < count ? visual.times[frame + 1] - visual.times[frame] : 1.2;
    timer = setTimeout(tick, 1000 * Math.min(Math.max(gap, .06), .7));
  };
  const toggle = () => { if (timer) stop(); else { play.setAttribute("aria-pressed", "true"); play.textContent = "❚❚ Pause"; tick(); } };
  jump.addEventListener("click", () => {
    const row = F.into[chosen], head = panelOf(row);
    stop();
    if (head.v === v) { frame = head.panel.frames[0]; choose(row); }
  });
  if (play) {
    play.addEventListener("click", toggle);
    scrub.addEventListener("input", () => { stop(); go(Number(scrub.value)); });
    node.addEventListener("keydown", event => {
      if (event.target.matches("select, input, summary")) return;
      if (event.key === " " && event.target.tagName !== "BUTTON") { event.preventDefault(); toggle(); }
      if (event.key === "ArrowRight") { stop(); go(frame + 1); }
      if (event.key === "ArrowLeft") { stop(); go(frame - 1); }
    });
  }
  choose(-1);
  new ResizeObserver(() => requestAnimationFrame(paint)).observe(node);
  films.push({ paint, start: () => { if (play && !timer) toggle(); } });
  return controls;
};

// One choice of call for all films.
const callButtons = [];
let spoken;
const show = number => {
  step = Math.min(Math.max(number, 0), last);
  callButtons.forEach((button, i) => { button.setAttribute("aria-checked", i === step); button.tabIndex = i === step ? 0 : -1; });
  let text = step ? F.steps[step - 1] : null;
  const counted = F.structural.length ? " " + whole(F.structural.filter(left => left < 0 || left >= step).length) + " of them end lines or frames, and have no place in the picture." : "";
  spoken.textContent = text ? (text.visual_before - text.visual_after ? whole(text.visual_before - text.visual_after) + " of " + whole(text.visual_before) + " " + NAMES[text.kind] + ", " + whole(text.visual_after) + " visual tokens stay." : "Nothing dropped; " + whole(text.visual_after) + " visual tokens stay.") + counted : "All " + whole(R.visual_tokens) + " visual tokens are there." + counted;
  redraw();
  markLayers();
};
const calls = parent => {
  const group = made(parent, "div", { class: "calls", id: "calls", role: "radiogroup", "aria-label": "What is left at which layer" });
  for (let number = 0; number <= last; number++) {
    const button = made(group, "button", { type: "button", role: "radio" }, number ? stepName(number) : "at first");
    button.addEventListener("click", () => show(number));
    callButtons.push(button);
  }
  group.addEventListener("keydown", event => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!move) return;
    event.preventDefault(); event.stopPropagation();
    show(step + move); callButtons[step].focus();
  });
  spoken = made(parent, "p", { class: "soft", "aria-live": "polite", id: "spoken" });
};
const key = parent => {
  const kinds = new Set(F.steps.map(one => one.kind)), list = made(parent, "ul", { class: "key", "aria-label": "Legend" });
  const entry = (name, text) => { const item = made(list, "li"); made(item, "i", { class: name, "aria-hidden": "true" }); item.append(text); };
  entry("stays", "stays");
  if (kinds.has("merge")) entry("merges", "like the one before it at this place: merged into it");
  if (kinds.has("prune")) entry("prunes", byQuestion ? "looked at little: pruned" : "left out by " + F.settings.reducer + ": pruned");
  if (kinds.has("static")) entry("merges", "merged or pruned");
};
