// The page: a conversation through /v1/chat/completions.

import { getJson, postJson, stream } from "./api.js";
import { Attachments, contentOf } from "./attachments.js";
import { draw, shapesOf } from "./drawing.js";

const $ = (id) => document.getElementById(id);
const messages = []; // of the conversation, as the API takes them
let images = []; // of the conversation: {bitmap, canvas}
let running = null; // the AbortController of the answer
let counting = null; // that of the counts
let settings = null; // of the server

const attachments = new Attachments($("attachments"), count);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

async function attempt(action) {
  notice("");
  try {
    await action();
  } catch (error) {
    if (error.name !== "AbortError") notice(error.message);
  }
}

// --- requests ---

function body(conversation) {
  const system = $("system").value.trim();
  const asked = {
    model: $("model").value,
    messages: system ? [{ role: "system", content: system }, ...conversation] : conversation,
    temperature: Number($("temperature").value),
    top_p: Number($("top_p").value),
    seed: Number($("seed").value) || 0,
    max_tokens: Math.max(1, Number($("max_tokens").value) || 1),
    n: Number($("n").value),
    max_tiles: Number($("max_tiles").value),
  };
  if ($("delta").value) asked.delta = $("delta").value;
  if ($("thinking").checked) asked.thinking = true;
  return asked;
}

async function count() {
  counting?.abort();
  $("counts").hidden = true;
  const items = attachments.items;
  if (!items.length && !messages.length) return;
  const controller = (counting = new AbortController());
  await attempt(async () => {
    const text = $("question").value.trim() || "?";
    const next = { role: "user", content: contentOf(items, text) };
    const asked = body([...messages, next]);
    const counts = await postJson("v1/internvl/count", asked, $("key").value, controller.signal);
    // Images beside a video or a PDF have no grid of their own.
    const grids = items.every((item) => item.bitmap) ? counts.images.slice(-items.length) : null;
    attachments.show($("show_tiles").checked && items.length ? grids : null);
    showCounts(counts);
  });
}

function showCounts({ tiles, prompt_tokens: tokens, positions }) {
  const table = $("counts");
  const heads = ["tiles", "tokens", ...positions.map(({ delta }) => `positions at delta ${delta}`)];
  const row = (tag, cells) => {
    const made = element("tr");
    made.append(...cells.map((cell) => element(tag, "", String(cell))));
    return made;
  };
  const values = [tiles, tokens, ...positions.map(({ last }) => last)];
  table.replaceChildren(row("th", heads), row("td", values));
  const chosen = positions.findIndex(({ chosen: isChosen }) => isChosen);
  if (chosen >= 0) {
    for (const line of table.rows) line.cells[chosen + 2].className = "chosen";
  }
  table.hidden = false;
}

// --- answers ---

function addMessage(kind, items = []) {
  $("welcome").hidden = true;
  const message = element("div", `message ${kind}`);
  if (items.length) {
    const row = element("div", "images");
    for (const item of items) {
      if (!item.bitmap) {
        row.append(element("span", "note", item.name));
        continue;
      }
      const canvas = element("canvas");
      draw(canvas, item.bitmap);
      row.append(canvas);
      images.push({ bitmap: item.bitmap, canvas });
    }
    message.append(row);
  }
  const bubble = element("div", "bubble");
  message.append(bubble);
  $("conversation").append(message);
  bubble.scrollIntoView({ block: "end" });
  return { message, bubble };
}

class AnswerView {
  constructor(index) {
    const { message, bubble } = addMessage("answer");
    Object.assign(this, { index, message, bubble, text: "", reasoning: "", finish: null });
  }

  add({ content = "", reasoning_content: reasoning = "" }) {
    this.reasoning += reasoning;
    this.text += content;
    if (this.reasoning && !this.thought) {
      this.thought = element("details");
      this.thought.append(element("summary", "note", "reasoning"), element("div", "reasoning"));
      this.bubble.before(this.thought);
    }
    if (this.thought) this.thought.lastChild.textContent = this.reasoning;
    this.bubble.textContent = this.text;
    this.bubble.scrollIntoView({ block: "end" });
  }

  note(text) {
    this.message.append(element("p", "note", text));
  }
}

function drawBoxes(text) {
  const shapes = shapesOf(text);
  const last = images.at(-1);
  if (!shapes.length || !last) return;
  draw(last.canvas, last.bitmap, { shapes });
  last.canvas.dataset.shapes = shapes.length;
}

async function answer(asked) {
  const views = new Map();
  const view = (index) => {
    if (!views.has(index)) views.set(index, new AnswerView(index));
    return views.get(index);
  };
  const began = performance.now();
  let first = 0;
  let usage = null;
  const options = { ...asked, stream_options: { include_usage: true } };
  try {
    const chunks = stream("v1/chat/completions", options, $("key").value, running.signal);
    for await (const chunk of chunks) {
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        if (choice.delta.content) first ||= performance.now();
        view(choice.index).add(choice.delta);
        if (choice.finish_reason) view(choice.index).finish = choice.finish_reason;
      }
    }
  } finally {
    for (const one of views.values()) {
      if (!one.finish) one.note("stopped");
      if (one.finish === "length") one.note("cut off at the longest answer");
    }
  }
  if (usage) {
    const seconds = (performance.now() - began) / 1000;
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    view(views.size - 1).note(
      `${usage.prompt_tokens} prompt tokens (${cached} from the cache), ` +
        `${usage.completion_tokens} new ones in ${seconds.toFixed(2)} s, first after ` +
        `${(((first || performance.now()) - began) / 1000).toFixed(2)} s`,
    );
  }
  return view(0).text;
}

async function bestOf(asked) {
  const path = "v1/internvl/best_of";
  const choice = await postJson(path, asked, $("key").value, running.signal);
  choice.candidates.forEach((candidate, index) => {
    const view = new AnswerView(index);
    view.add({ content: candidate.text });
    if (index === choice.best) view.message.classList.add("best");
    view.note(`score ${candidate.score.toFixed(3)}${index === choice.best ? ", chosen" : ""}`);
    const table = element("table", "steps");
    candidate.steps.forEach((step, number) => {
      const row = element("tr");
      row.append(element("td", "", candidate.scores[number].toFixed(3)), element("td", "", step));
      table.append(row);
    });
    view.message.append(table);
  });
  return choice.candidates[choice.best].text;
}

async function ask(question) {
  const items = attachments.take();
  $("counts").hidden = true;
  addMessage("user", items).bubble.textContent = question;
  const asked = [...messages, { role: "user", content: contentOf(items, question) }];
  running = new AbortController();
  busy(true);
  try {
    const request = body(asked);
    const chooses = $("best_of").checked && request.n > 1;
    const text = chooses ? await bestOf(request) : await answer(request);
    messages.splice(0, messages.length, ...asked, { role: "assistant", content: text });
    drawBoxes(text);
  } finally {
    running = null;
    busy(false);
  }
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("question").focus();
}

function clear() {
  running?.abort();
  messages.length = 0;
  images = [];
  attachments.take();
  for (const message of document.querySelectorAll(".message")) message.remove();
  $("welcome").hidden = false;
  $("counts").hidden = true;
  notice("");
}

// --- the page ---

async function showExamples() {
  for (const { image, question } of settings.examples) {
    const button = element("button");
    button.type = "button";
    const preview = element("img");
    preview.src = image;
    preview.alt = "";
    button.append(preview, element("span", "", question));
    button.onclick = () =>
      attempt(async () => {
        const blob = await (await fetch(image)).blob();
        await attachments.add([new File([blob], image.split("/").pop(), { type: blob.type })]);
        $("question").value = question;
        $("question").focus();
      });
    $("examples").append(button);
  }
}

async function start() {
  settings = await getJson("page/settings.json");
  for (const name of settings.models) $("model").append(new Option(name, name));
  $("delta").append(new Option(`the model's own (${settings.delta})`, ""));
  for (const delta of settings.deltas) $("delta").append(new Option(delta, delta));
  $("max_tiles").value = settings.max_tiles;
  $("max_tokens").value = settings.max_new_tokens;
  $("n").max = settings.max_n;
  $("critic_row").hidden = !settings.has_critic;
  await showExamples();
}

for (const input of document.querySelectorAll('input[type="range"]')) {
  const show = () => (input.parentElement.querySelector("output").textContent = input.value);
  input.addEventListener("input", show);
  new MutationObserver(show).observe(input, { attributes: true });
}
$("settings").addEventListener("change", (event) => {
  if (["max_tiles", "delta", "show_tiles", "model"].includes(event.target.id)) count();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("files").addEventListener("change", () =>
  attempt(async () => {
    await attachments.add($("files").files);
    $("files").value = "";
  }),
);
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question || running) return;
  $("question").value = "";
  attempt(() => ask(question));
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", clear);
const main = document.querySelector("main");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  main.classList.add("drop");
});
document.addEventListener("dragleave", () => main.classList.remove("drop"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  main.classList.remove("drop");
  attempt(() => attachments.add(event.dataTransfer.files));
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) attempt(() => attachments.add(event.clipboardData.files));
});
attempt(start).then(() => {
  for (const input of document.querySelectorAll('input[type="range"]')) {
    input.dispatchEvent(new Event("input"));
  }
});
