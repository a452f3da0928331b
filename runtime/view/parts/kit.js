// ---- Facts, and how they are said

const F = JSON.parse(document.getElementById("facts").textContent), R = F.reduced, D = F.dense;
const main = document.querySelector("main"), SVG = "http://www.w3.org/2000/svg";
const made = (parent, tag, attributes, text) => {
  const node = parent instanceof SVGElement || tag === "svg" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};
const whole = n => n.toLocaleString("en-US");
const percent = share => (100 * share).toFixed(share < 0.0995 ? 1 : 0) + " %";
const inUnits = (n, units, base) => { let u = 0; while (n >= base && u < units.length - 1) { n /= base; u++; } return Number(n.toPrecision(3)) + " " + units[u]; };
const bytes = n => inUnits(n, ["B", "kB", "MB", "GB"], 1000), flops = n => inUnits(n, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"], 1000);
const seconds = s => s < 0.0995 ? Number((1000 * s).toPrecision(3)) + " ms" : Number(s.toPrecision(3)) + " s";
const section = (title, words) => { const node = made(main, "section"); made(node, "h2", {}, title); if (words) made(node, "p", { class: "soft" }, words); return node; };
const table = (parent, caption, head, rows) => {
  const node = made(made(parent, "div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }), "table");
  made(node, "caption", {}, caption);
  const top = made(made(node, "thead"), "tr"), body = made(node, "tbody");
  head.forEach(cell => made(top, "th", { scope: "col" }, cell));
  for (const [first, ...rest] of rows) {
    const line = made(body, "tr");
    made(line, "th", { scope: "row" }, first);
    rest.forEach(cell => made(line, "td", {}, String(cell)));
  }
};
const definitions = (parent, entries) => {
  const list = made(parent, "dl", { class: "figures" });
  for (const [term, value, note] of entries) {
    const box = made(list, "div"), dd = (made(box, "dt", {}, term), made(box, "dd", {}, value));
    if (note) made(dd, "small", {}, note);
  }
};
const textTokens = R.prompt_tokens - R.visual_tokens, last = F.steps.length, lengths = R.kv_lengths, ends = lengths[lengths.length - 1];
const NAMES = { merge: "merged", prune: "pruned", static: "merged or pruned", none: "nothing dropped" };
const place = call => call === 0 ? "before layer 0" : "behind the attention of layer " + (call - 1);
const stepName = number => {
  if (!number) return "at first";
  const step = F.steps[number - 1];
  if (step.kind === "static") return "at the end";
  return step.calls[0] === 0 ? "before layer 0" : "behind layer " + (step.calls[0] - 1);
};
// What became of a row by a step: "" stays, else the kind of the step that dropped it.
const fate = (row, number) => F.left[row] < 0 || F.left[row] >= number ? "" : F.steps[F.left[row]].kind;
