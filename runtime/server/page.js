"use strict";
const at = id => document.getElementById(id), log = at("log");
const made = (parent, tag, text, name) => { const node = parent.appendChild(document.createElement(tag)); if (text !== undefined) node.textContent = text; if (name) node.className = name; return node; };
const LIMITED = { reduced: null, dense: 1 };  // a cost of its own, or that of the slider
const FRAME = "<!doctype html><meta name=color-scheme content='light dark'><style>body { margin: .75rem; overflow-wrap: anywhere; }</style>";  // it draws without colours of its own
let talks = null, running = null;
const begin = () => { talks = { reduced: [], dense: [] }; log.replaceChildren(); at("file").value = ""; };
const cost = () => Number(at("cost").value);
const showCost = () => { at("shown").textContent = Math.round(100 * cost()) + " %"; };
const asData = file => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error("the file cannot be read"));
  reader.readAsDataURL(file);
});
const headers = () => { const all = { "Content-Type": "application/json" }; if (at("key").value) all.Authorization = "Bearer " + at("key").value; return all; };

// One answer, piece by piece, into a place of its own.
const answer = async (name, title, messages, place, signal) => {
  made(place, "h2", title);
  const words = made(place, "p", ""), facts = made(place, "div", "…", "facts");
  const start = performance.now();
  let first = 0, text = "";
  const body = { messages, stream: true, stream_options: { include_usage: true }, framefusion: { cost: LIMITED[name] || cost(), show: true } };
  const response = await fetch("/v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (!response.ok) {
    const problem = (await response.json()).error.message;
    if (response.status === 401) at("locked").hidden = false;
    throw new Error(problem);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (held + value).split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") continue;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      const said = piece.choices.length ? piece.choices[0].delta.content : "";
      if (said) { first = first || performance.now() - start; text += said; words.textContent = text; }
      if (piece.usage) {
        const kept = piece.usage.prompt_tokens_details;
        const parts = [kept.visual_tokens ? kept.kept_tokens + " of " + kept.visual_tokens + " visual tokens" : "text alone"];
        if (kept.cached_tokens) parts.push(kept.cached_tokens + " tokens from the caches");
        if (first) parts.push("first word after " + (first / 1000).toFixed(2) + " s");
        parts.push(...piece.framefusion.warnings);
        facts.textContent = parts.join(", ");
        if (piece.framefusion.html) {
          const frame = document.createElement("iframe");
          frame.title = "What stays of the film"; frame.setAttribute("sandbox", ""); frame.srcdoc = FRAME + piece.framefusion.html;
          place.append(frame);
        }
      }
    }
  }
  return text;
};

const ask = async event => {
  event.preventDefault();
  const words = at("prompt").value.trim(), file = at("file").files[0], both = at("both").checked;
  if (!words || running) return;
  running = new AbortController();
  at("send").disabled = true; at("stop").disabled = false;
  made(log, "div", (file ? "[" + file.name + "] " : "") + words, "mine");
  const answers = made(log, "div", undefined, "answers");
  try {
    const parts = [];
    if (file) { const kind = file.type.startsWith("image/") ? "image_url" : "video_url"; parts.push({ type: kind, [kind]: { url: await asData(file) } }); }
    parts.push({ type: "text", text: words });
    const ways = both ? [["reduced", "cost " + cost()], ["dense", "every token"]] : [["reduced", "cost " + cost()]];
    for (const [name, title] of ways) {
      const messages = [...talks[name], { role: "user", content: parts }];
      const place = made(answers, "div", undefined, "card");
      try {
        const text = await answer(name, title, messages, place, running.signal);
        talks[name] = [...messages, { role: "assistant", content: text }];
        if (!both) talks.dense = talks.reduced;
      } catch (problem) {
        made(place, "p", problem.name === "AbortError" ? "stopped: not part of the conversation" : problem.message, "bad").setAttribute("role", "alert");
        break;
      }
    }
    if (!answers.querySelector(".bad")) { at("prompt").value = ""; at("file").value = ""; }
  } catch (problem) { made(answers, "p", problem.message, "bad"); }
  running = null;
  at("send").disabled = false; at("stop").disabled = true;
  answers.scrollIntoView({ block: "nearest" });
};
at("ask").addEventListener("submit", ask);
at("prompt").addEventListener("keydown", event => { if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); at("ask").requestSubmit(); } });
at("stop").addEventListener("click", () => running && running.abort());
at("new").addEventListener("click", () => { if (running) running.abort(); begin(); at("prompt").focus(); });
at("cost").addEventListener("input", showCost);
begin(); showCost();
