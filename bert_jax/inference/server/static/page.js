// The page at /. It shows predictions as bars, attention as lines, and whether one sentence follows another.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const MASK = "[MASK]";
let attention = null; // {tokens, attention} of the layer that is shown
let chosen = null; // the index of the chosen token
const underway = {}; // the latest request to each route

// A new request cancels the previous request to the same route, because a late response must not replace a newer one.
async function ask(route, body) {
  underway[route]?.abort();
  underway[route] = new AbortController();
  const answer = await fetch(route, {
    method: "POST",
    signal: underway[route].signal,
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error.message);
  return content;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

async function saying(message, work) {
  message.className = "message";
  message.textContent = "…";
  try {
    await work();
    message.textContent = "";
  } catch (error) {
    if (error.name === "AbortError") return; // a newer request reports its own progress
    message.className = "message error";
    message.textContent = error.message;
  }
}

// ── Fill a mask ──

function showFillings(results) {
  const masks = Array.isArray(results[0]) ? results : [results];
  $("fillings").replaceChildren(
    ...masks.map((fillings, mask) => {
      const list = element("ol", { ariaLabel: `Fillings of mask ${mask + 1}` });
      for (const filling of fillings) {
        const bar = element("span", { className: "bar" });
        bar.style.width = `${(100 * filling.score) / fillings[0].score}%`;
        const word = element("span", { textContent: filling.token_str });
        const score = element("span", { className: "score", textContent: filling.score.toFixed(4) });
        const button = element("button", { type: "button", title: `Put “${filling.token_str}” in` }, word, bar, score);
        button.addEventListener("click", () => putIn(mask, filling.token_str));
        list.append(element("li", {}, button));
      }
      return list;
    }),
  );
}

function putIn(mask, word) {
  const parts = $("text").value.split(MASK);
  const before = parts.slice(0, mask + 1).join(MASK);
  // A word piece continues the text before it.
  const joined = word.startsWith("##") ? before.trimEnd() + word.slice(2) : before + word;
  $("text").value = joined + parts.slice(mask + 1).join(MASK);
  $("text").focus();
  fill();
}

function fill() {
  const text = $("text").value;
  return saying($("mask-message"), async () => {
    if (text.includes(MASK)) showFillings((await ask("v1/fill-mask", { inputs: text })).outputs);
    else {
      underway["v1/fill-mask"]?.abort();
      $("fillings").replaceChildren();
    }
    await look(text);
  });
}

// ── Attention ──

async function look(text) {
  attention = await ask("v1/attention", { text, layer: Number($("layer").value) });
  chosen = null;
  const heads = attention.attention.length;
  if ($("head").options.length !== heads + 1) {
    $("head").replaceChildren(
      element("option", { value: "mean", textContent: "mean of all" }),
      ...Array.from({ length: heads }, (_, n) => element("option", { value: n, textContent: n + 1 })),
    );
  }
  $("attention-section").hidden = false;
  draw();
}

function draw() {
  const { tokens, attention: heads } = attention;
  const head = $("head").value;
  const weight = (i, j) =>
    head === "mean" ? heads.reduce((sum, h) => sum + h[i][j], 0) / heads.length : heads[Number(head)][i][j];
  const step = 22, left = 130, right = 290, height = step * tokens.length + 10;
  const picture = drawn("svg", { viewBox: `0 0 420 ${height}`, width: "100%", role: "img",
    "aria-label": `Attention between ${tokens.length} tokens` });
  picture.style.maxWidth = "30rem";
  const y = (n) => step * (n + 0.75);
  tokens.forEach((_, i) => {
    if (chosen !== null && chosen !== i) return;
    tokens.forEach((_, j) => {
      const opacity = weight(i, j);
      if (opacity < 0.02) return;
      picture.append(drawn("line", { x1: left + 6, y1: y(i) - 5, x2: right - 6, y2: y(j) - 5, "stroke-opacity": opacity }));
    });
  });
  tokens.forEach((token, i) => {
    const label = drawn("text", { x: left, y: y(i), "text-anchor": "end", tabindex: 0, role: "button",
      class: `token${chosen === i ? " chosen" : ""}`, "aria-label": `Attention of ${token}`, "aria-pressed": chosen === i }, token);
    const choose = () => { chosen = chosen === i ? null : i; draw(); };
    label.addEventListener("click", choose);
    label.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose();
      $("attention").querySelectorAll(".token")[i].focus();
    });
    picture.append(label, drawn("text", { x: right, y: y(i) }, token));
  });
  $("attention").replaceChildren(picture);
}

// ── Next sentence ──

function judge() {
  $("verdict").textContent = "";
  return saying($("next-message"), async () => {
    const { outputs } = await ask("v1/next-sentence-prediction", { inputs: [[$("first").value, $("second").value]] });
    const { label, score } = outputs[0];
    const words = label === "IsNext" ? "It follows" : "It does not follow";
    $("verdict").textContent = `${words} (${(100 * score).toFixed(1)}%).`;
  });
}

// ── Tabs and startup ──

const tabs = [...document.querySelectorAll("[role=tab]")];

function open(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", other === tab);
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
}

for (const [n, tab] of tabs.entries()) {
  tab.addEventListener("click", () => open(tab));
  tab.addEventListener("keydown", (event) => {
    const to = { ArrowRight: n + 1, ArrowLeft: n - 1 }[event.key];
    if (to === undefined) return;
    const next = tabs.filter((t) => !t.hidden).at(to % tabs.length);
    open(next);
    next.focus();
  });
}
$("panel-mask").addEventListener("submit", (event) => { event.preventDefault(); fill(); });
$("panel-next").addEventListener("submit", (event) => { event.preventDefault(); judge(); });
for (const id of ["text", "first", "second"]) {
  $(id).addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey) return;
    event.preventDefault();
    event.target.form.requestSubmit();
  });
}
$("layer").addEventListener("change", () => saying($("mask-message"), () => look($("text").value)));
$("head").addEventListener("change", draw);

async function begin() {
  const { status, models } = await (await fetch("health")).json();
  const { name, tasks, layers } = models[0];
  $("model").textContent = name;
  $("layer").replaceChildren(
    ...Array.from({ length: layers }, (_, n) => element("option", { value: n, textContent: n + 1 })),
  );
  $("layer").value = layers - 1;
  $("tab-next").hidden = !tasks.includes("next-sentence-prediction");
  $("tab-mask").hidden = $("panel-mask").hidden = !tasks.includes("fill-mask");
  if (status !== "ready") {
    $("mask-message").textContent = "The model is being made ready …";
    setTimeout(begin, 1000);
  } else if (tasks.includes("fill-mask")) fill();
  else if (!$("tab-next").hidden) open($("tab-next"));
}
begin();
