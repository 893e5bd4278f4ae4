// The page to play on: a text that the model goes on from. What a model writes is shown as text only.
"use strict";

const $ = (id) => document.getElementById(id);
const SLIDERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "n"];
const ALTERNATIVES = 10;
const CONTROL = /^[\u0000-\u0008\u000b-\u001f\u007f]$/; // characters that nobody can see

// The text is a list of nodes. What was typed is {text}; a token is {text, ids, p, top}, where `ids`
// has several where a character needs them, and `top` is what else was likely: [[name, id, p], ...].
let nodes = [];
let base = null; // the state that the text goes on from
let past = []; // earlier texts, to undo
let running = null; // AbortController of the request
let model = "";

// ------------------------------------------------------------------ asking the server

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = $("key").value;
  if (key) headers.Authorization = `Bearer ${key}`;
  if (options.body && typeof options.body === "string") headers["Content-Type"] = "application/json";
  const response = await fetch(path, { ...options, headers });
  if (!response.ok) {
    let message = `the server answers ${response.status}`;
    try { message = (await response.json()).error.message; } catch { /* no JSON */ }
    throw new Error(message);
  }
  return response;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    for (let end; (end = held.indexOf("\n\n")) >= 0; held = held.slice(end + 2)) {
      const line = held.slice(0, end);
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// What stands before: text, or tokens where some bytes are no text, which would not come back.
async function prompt(given) {
  if (!given.some((node) => node.byte)) return given.map((node) => node.text).join("");
  const tokens = [];
  for (const node of given) {
    if (node.ids) { tokens.push(...node.ids); continue; }
    const body = JSON.stringify({ prompt: node.text });
    tokens.push(...(await (await ask("tokenize", { method: "POST", body })).json()).tokens);
  }
  return tokens;
}

// ------------------------------------------------------------------ tokens to nodes

class Reader {
  // Tokens of one answer as they come: bytes are put together to characters.
  constructor() { this.bytes = []; this.waiting = []; }

  take(choice) {
    const found = [];
    const { tokens, token_logprobs, top_logprobs, top_token_ids } = choice.logprobs;
    tokens.forEach((name, i) => {
      const names = Object.entries(top_logprobs?.[i] ?? {});
      const top = names.map(([other, logprob], j) => [other, top_token_ids[i][j], Math.exp(logprob)]);
      const node = { text: name, ids: [choice.token_ids[i]], p: Math.exp(token_logprobs[i]), top };
      if (name.startsWith("bytes:\\x")) {
        this.waiting.push(node);
        this.bytes.push(...[...name.matchAll(/\\x(..)/g)].map((m) => parseInt(m[1], 16)));
        found.push(...this.whole());
      } else {
        if (name === `token_id:${node.ids[0]}`) node.text = "";
        if (CONTROL.test(name)) {
          node.text = `\\x${name.charCodeAt(0).toString(16).padStart(2, "0")}`;
          node.byte = true;
        }
        found.push(...this.rest(), node);
      }
    });
    return found;
  }

  whole() {
    const need = this.bytes[0] >= 0xf0 ? 4 : this.bytes[0] >= 0xe0 ? 3 : this.bytes[0] >= 0xc2 ? 2 : 1;
    const text = this.decoded();
    if (text === null) return need > 1 && this.bytes.length < need && this.could() ? [] : this.rest();
    const [first] = this.waiting;
    const node = {
      text, ids: this.waiting.flatMap((n) => n.ids), top: first.top,
      p: this.waiting.reduce((p, n) => p * n.p, 1),
    };
    this.bytes = []; this.waiting = [];
    return [node];
  }

  could() { return this.bytes.slice(1).every((byte) => byte >= 0x80 && byte < 0xc0); }

  decoded() {
    try { return new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(this.bytes)); } catch { return null; }
  }

  rest() { // bytes that are no text, as they are
    const found = this.waiting.map((node) => ({ ...node, text: node.text.slice(6), byte: true }));
    this.bytes = []; this.waiting = [];
    return found;
  }
}

// ------------------------------------------------------------------ the text, shown

function shade(p) { return p < 0.02 ? "p0" : p < 0.1 ? "p1" : p < 0.3 ? "p2" : p < 0.6 ? "p3" : p < 0.9 ? "p4" : "p5"; }

function element(node) {
  if (!node.ids) return document.createTextNode(node.text);
  const span = document.createElement("span");
  span.textContent = node.text;
  span.className = `t ${shade(node.p)}${node.byte ? " byte" : ""}`;
  span.node = node;
  return span;
}

function show() {
  $("text").replaceChildren(...nodes.map(element));
  $("base").hidden = !base;
  $("base-name").textContent = base ?? "";
  enable();
  keep();
}

function enable() {
  $("go").disabled = !!running;
  $("stop").disabled = !running;
  $("undo").disabled = !past.length || !!running;
  $("again").disabled = !!running || !past.some((p) => p.before);
}

// What stands in the page, after somebody has written in it: tokens that were changed are none.
function read() {
  const found = [];
  for (const child of $("text").childNodes) {
    const node = child.node;
    if (node && node.text === child.textContent) found.push(node);
    else if (child.textContent) {
      if (found.length && !found.at(-1).ids) found.at(-1).text += child.textContent;
      else found.push({ text: child.textContent });
    }
  }
  nodes = found;
}

function keep() {
  const settings = Object.fromEntries([...SLIDERS, "seed", "stop-text"].map((id) => [id, $(id).value]));
  try {
    sessionStorage.setItem("text", JSON.stringify({ nodes, base, settings }));
    sessionStorage.setItem("key", $("key").value);
  } catch { /* too long to keep: then a reload forgets it */ }
}

function restore() {
  $("key").value = sessionStorage.getItem("key") ?? "";
  const kept = JSON.parse(sessionStorage.getItem("text") ?? "null");
  if (!kept) return;
  ({ nodes, base } = kept);
  for (const [id, value] of Object.entries(kept.settings)) $(id).value = value;
}

function remember(before = false) { past.push({ nodes: [...nodes], base, before }); past = past.slice(-100); }

function complain(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

// ------------------------------------------------------------------ going on

async function go() {
  if (running) return;
  read();
  complain(null);
  remember(true);
  const many = Number($("n").value);
  const readers = Array.from({ length: many }, () => new Reader());
  const found = Array.from({ length: many }, () => []);
  const began = performance.now();
  let first = null, count = 0, usage = null, seed = null;
  running = new AbortController();
  enable();
  try {
    const body = {
      model, prompt: await prompt(nodes), stream: true, stream_options: { include_usage: true },
      logprobs: ALTERNATIVES, return_token_ids: true, n: many, cache: null,
    };
    for (const id of SLIDERS) body[id] = Number($(id).value);
    if ($("seed").value) body.seed = Number($("seed").value);
    if ($("stop-text").value) body.stop = $("stop-text").value;
    if (base) body.state = base;
    const columns = many > 1 ? panels(found) : null;
    const options = { method: "POST", body: JSON.stringify(body), signal: running.signal };
    for await (const event of events(await ask("v1/completions", options))) {
      seed = event.seed;
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        first ??= performance.now();
        const news = readers[choice.index].take(choice);
        if (choice.finish_reason) news.push(...readers[choice.index].rest());
        count += choice.token_ids.length;
        found[choice.index].push(...news);
        append(columns ? columns[choice.index] : $("text"), news);
        numbers(count, began, first, usage, seed);
      }
    }
    numbers(count, began, first, usage, seed);
  } catch (error) {
    if (error.name !== "AbortError") complain(error);
  }
  running = null;
  if (many === 1) nodes.push(...found[0]);
  if (!count) past.pop();
  enable();
  keep();
}

function append(place, news) {
  const text = $("text");
  const low = text.scrollHeight - text.scrollTop - text.clientHeight < 60;
  place.append(...news.map(element));
  if (low && place === text) text.scrollTop = text.scrollHeight;
}

function panels(found) {
  $("samples").hidden = false;
  const columns = found.map((sample, i) => {
    const panel = document.createElement("div"), content = document.createElement("div");
    const take = document.createElement("button");
    panel.className = "sample";
    take.textContent = `Take ${i + 1}`;
    take.addEventListener("click", () => {
      if (running) running.abort();
      nodes.push(...sample);
      $("samples").hidden = true;
      show();
    });
    panel.append(content, take);
    return [panel, content];
  });
  $("samples").replaceChildren(...columns.map(([panel]) => panel));
  return columns.map(([, content]) => content);
}

function numbers(count, began, first, usage, seed) {
  const seconds = (performance.now() - (first ?? began)) / 1000;
  const parts = [`${count} tokens`];
  if (count > 1 && seconds > 0.05) parts.push(`${Math.round(count / seconds)}/s`);
  if (first) parts.push(`first after ${Math.round(first - began)} ms`);
  const cached = usage?.prompt_tokens_details.cached_tokens;
  if (cached) parts.push(`${cached} of ${usage.prompt_tokens} known`);
  if (seed !== null) parts.push(`seed ${seed}`);
  $("numbers").textContent = parts.join(" · ");
}

function undo(again = false) {
  if (running) return;
  let last = past.pop();
  while (again && last && !last.before) last = past.pop();
  if (!last) return;
  ({ nodes, base } = last);
  $("samples").hidden = true;
  show();
  if (again) go();
}

// ------------------------------------------------------------------ what else was likely

function openMenu(span) {
  closeMenu();
  if (running || !span.node.top?.length) return;
  read();
  const menu = $("menu"), at = nodes.indexOf(span.node);
  span.classList.add("open");
  menu.replaceChildren(...span.node.top.map(([name, id, p]) => {
    const button = document.createElement("button"), code = document.createElement("code");
    const share = document.createElement("span");
    button.setAttribute("role", "option");
    code.textContent = name.replace(/^bytes:/, "").replaceAll("\n", "↵").replaceAll(" ", "␣") || "∅";
    share.textContent = p >= 0.001 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %";
    button.append(code, share);
    button.addEventListener("click", () => branch(at, name, id, p));
    return button;
  }));
  const box = span.getBoundingClientRect();
  menu.hidden = false;
  menu.style.left = `${Math.max(4, Math.min(box.left, innerWidth - menu.offsetWidth - 8)) + scrollX}px`;
  menu.style.top = `${box.bottom + scrollY + 4}px`;
  menu.firstChild.focus({ preventScroll: true });
}

function closeMenu() {
  $("menu").hidden = true;
  document.querySelector(".t.open")?.classList.remove("open");
}

// Another token in the place of this one; what came after it goes.
function branch(at, name, id, p) {
  remember();
  const { top } = nodes[at];
  const choice = {
    tokens: [name], token_logprobs: [Math.log(p)], top_logprobs: [{}], top_token_ids: [[]],
  };
  const reader = new Reader();
  const news = [...reader.take({ logprobs: choice, token_ids: [id] }), ...reader.rest()];
  nodes = [...nodes.slice(0, at), ...news.map((node) => ({ ...node, top }))];
  closeMenu();
  show();
  $("text").focus();
  getSelection().selectAllChildren($("text"));
  getSelection().collapseToEnd();
}

// ------------------------------------------------------------------ states

async function listStates() {
  const { data } = await (await ask("v1/states")).json();
  $("list").replaceChildren(...data.map(({ id }) => {
    const row = document.createElement("li"), what = document.createElement("span");
    what.className = "what";
    what.textContent = id;
    const act = (label, title, does) => {
      const button = document.createElement("button");
      button.textContent = label;
      button.title = title;
      button.setAttribute("aria-label", `${title}: ${id}`);
      button.addEventListener("click", () => Promise.resolve(does()).catch(complain));
      return button;
    };
    row.append(
      what,
      act("Go on", "a new text that goes on from this state", () => fork(id)),
      act("↓", "download", () => download(id)),
      act("×", "delete", async () => { await ask(`v1/states/${id}`, { method: "DELETE" }); await listStates(); }),
    );
    return row;
  }));
}

function fork(id) {
  if (running) return;
  read();
  remember();
  nodes = [];
  base = id;
  show();
  $("text").focus();
}

async function download(id) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await ask(`v1/states/${id}/file`)).blob());
  link.download = `${id}.tvq`;
  link.click();
  URL.revokeObjectURL(link.href);
}

async function save() {
  read();
  complain(null);
  const body = { name: $("name").value, prompt: await prompt(nodes) };
  if (base) body.state = base;
  await ask("v1/states", { method: "POST", body: JSON.stringify(body) });
  $("name").value = "";
  await listStates();
}

// ------------------------------------------------------------------ at the start

async function connect() {
  for (;;) {
    try {
      const health = await (await ask("health")).json();
      $("key-row").hidden = !health.needs_key;
      if (health.model) {
        model = health.model;
        $("model").textContent = document.title = model;
        $("status").textContent = "Transformer-VQ";
        if (!health.needs_key || $("key").value) await listStates();
        complain(null);
        return;
      }
      $("status").textContent = "the model is being loaded …";
    } catch (error) {
      complain(error);
      return;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

function label(input) { input.parentElement.querySelector("output").textContent = input.value; }

addEventListener("DOMContentLoaded", () => {
  restore();
  for (const id of SLIDERS) {
    label($(id));
    $(id).addEventListener("input", () => { label($(id)); keep(); });
  }
  $("go").addEventListener("click", go);
  $("stop").addEventListener("click", () => running?.abort());
  $("again").addEventListener("click", () => undo(true));
  $("undo").addEventListener("click", () => undo());
  $("clear").addEventListener("click", () => {
    if (running) return;
    read(); remember(); nodes = []; base = null; $("samples").hidden = true; show(); $("text").focus();
  });
  $("base-drop").addEventListener("click", () => { read(); remember(); base = null; show(); });
  $("key").addEventListener("change", () => { keep(); connect(); });
  $("key-row").addEventListener("submit", (event) => event.preventDefault());
  $("save").addEventListener("submit", (event) => { event.preventDefault(); save().catch(complain); });
  $("text").addEventListener("input", () => { if (!running) { read(); keep(); } });
  $("text").addEventListener("beforeinput", (event) => { if (running) event.preventDefault(); });
  $("text").addEventListener("click", (event) => { if (event.target.node) openMenu(event.target); });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") { if ($("menu").hidden) running?.abort(); else { closeMenu(); $("text").focus(); } }
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); go(); }
    if (event.key === "Enter" && event.altKey) {
      const span = getSelection().anchorNode?.parentElement;
      if (span?.node) { event.preventDefault(); openMenu(span); }
    }
    const step = { ArrowDown: "nextSibling", ArrowUp: "previousSibling" }[event.key];
    if (step && !$("menu").hidden) { event.preventDefault(); document.activeElement[step]?.focus(); }
  });
  addEventListener("pointerdown", (event) => {
    if (!$("menu").contains(event.target) && !event.target.node) closeMenu();
  });
  show();
  connect();
});
