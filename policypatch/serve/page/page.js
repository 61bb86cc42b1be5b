"use strict";

const at = (id) => document.getElementById(id);
const panes = [...document.querySelectorAll("section")].map((section) => ({
  model: section.querySelector(".model"),
  note: section.querySelector(".note"),
  answer: section.querySelector(".answer"),
}));
let running = null;

function headers() {
  const key = at("key").value;
  return key ? { authorization: `Bearer ${key}` } : {};
}

function problem(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

async function refusal(response) {
  if (response.status === 401) at("key-field").hidden = false;
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the server answered ${response.status}`;
}

async function load() {
  const response = await fetch("/patches", { headers: headers() }).catch(() => null);
  if (!response) return problem("the server cannot be reached");
  if (!response.ok) return problem(await refusal(response));
  const told = await response.json();
  at("base").textContent = told.base;
  panes.forEach((pane, side) => {
    pane.model.replaceChildren(...told.models.map((name) => new Option(name, name)));
    pane.model.selectedIndex = side ? told.models.length - 1 : 0;
  });
  problem("");
}

async function ask(pane, signal) {
  const chat = at("mode").value === "chat";
  const prompt = at("prompt").value;
  const body = {
    model: pane.model.value,
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: Number(at("tokens").value),
    temperature: Number(at("temperature").value),
    seed: Number(at("seed").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  pane.answer.textContent = "";
  pane.note.textContent = "waiting";
  const began = performance.now();
  const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw new Error(await refusal(response));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let why = "";
  let tokens = 0;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") continue;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      tokens = piece.usage?.completion_tokens ?? tokens;
      const choice = piece.choices[0];
      why = choice?.finish_reason ?? why;
      pane.answer.append((chat ? choice?.delta.content : choice?.text) ?? "");
      pane.note.textContent = "writing";
    }
  }
  if (!why) throw new Error("the answer was cut off");
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  const ended = { stop: "ended by itself", length: "cut at the limit" }[why] ?? why;
  pane.note.textContent = `${tokens} tokens in ${seconds} s, ${ended}`;
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  if (!panes[0].model.value) await load(); // a key was asked for when the page was opened
  at("go").disabled = true;
  at("stop").disabled = false;
  problem("");
  const { signal } = running;
  const results = await Promise.allSettled(panes.map((pane) => ask(pane, signal)));
  results.forEach((result, side) => {
    if (result.status === "fulfilled") return;
    panes[side].note.textContent = signal.aborted ? "stopped" : "failed";
    if (!signal.aborted) problem(result.reason.message);
  });
  running = null;
  at("go").disabled = false;
  at("stop").disabled = true;
});

at("stop").addEventListener("click", () => running?.abort());
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("ask").requestSubmit();
});
load();
