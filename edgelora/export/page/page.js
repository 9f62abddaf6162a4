// The demo page of a bundle: worker.js runs the model of this folder. Nothing is fetched from elsewhere, and nothing leaves the browser.
const element = (id) => document.getElementById(id);
const make = (name, content = {}) => Object.assign(document.createElement(name), content);
const say = (text, bad = false) => { element("status").textContent = text; element("status").className = bad ? "bad" : ""; };
const here = new URL("./", location.href).href;
const worker = new Worker("worker.js", { type: "module" });
const messages = [];

// Of each task: the fields of its form, the options of transformers.js's pipeline, and how input is read and the answer shown.
const text = { text: "A text" };
const TASKS = {
  "text-generation": { fields: { text: "Write a message" }, answer: chat },
  "text-classification": { fields: { text: "A text to classify" }, options: { top_k: 10 } },
  "token-classification": { fields: text },
  "question-answering": { fields: { text: "A text that holds the answer", question: "A question" } },
  "text2text-generation": { fields: text },
  "image-classification": { fields: { image: "image/*" }, options: { top_k: 10 } },
  "object-detection": { fields: { image: "image/*" }, options: { threshold: 0.5 }, after: boxes },
  "image-to-text": { fields: { image: "image/*" } },
  "automatic-speech-recognition": { fields: { audio: "audio/*" } },
  "audio-classification": { fields: { audio: "audio/*" } },
};

function ask(message, piece = () => {}) {
  return new Promise((resolve, reject) => {
    worker.onerror = (event) => reject(new Error(event.message || "worker.js cannot be loaded"));
    worker.onmessage = ({ data }) => {
      if (data.piece !== undefined) piece(data.piece);
      else if (data.failed) reject(new Error(data.failed));
      else resolve(data);
    };
    worker.postMessage(message);
  });
}

async function isolated() {
  // Threads need an isolated page: the service worker's headers act from the second load on.
  if (window.crossOriginIsolated || !navigator.serviceWorker || !window.isSecureContext || sessionStorage.getItem("isolated")) return true;
  sessionStorage.setItem("isolated", "1");
  await navigator.serviceWorker.register("isolate.js");
  await navigator.serviceWorker.ready;
  location.reload();
  return false;
}

async function start() {
  const manifest = await (await fetch(`${here}edgelora.json`)).json();
  element("title").textContent = document.title = `${(manifest.model?.reference ?? "model").split(/[/:\\]/).pop()} · ${manifest.task}`;
  if (!(await isolated())) return;
  const threads = window.crossOriginIsolated ? navigator.hardwareConcurrency || 1 : 1;
  const loaded = await ask({ load: threads });
  const plural = threads > 1 ? "threads" : "thread";
  element("about").textContent =
    `${manifest.precision}, ${threads} ${plural} of WebAssembly, in this browser alone; ready in ${loaded.seconds.toFixed(1)} s`;
  say("");
  build({ manifest, loaded, options: {}, answer, after: () => {}, ...(TASKS[manifest.task] ?? { fields: text }) });
  window.ready = true;
}

function build(page) {
  const form = element("form");
  const fields = {};
  for (const [name, hint] of Object.entries(page.fields)) {
    const file = name === "image" || name === "audio";
    fields[name] = file ? make("input", { type: "file", accept: hint }) : make(name === "text" ? "textarea" : "input", { placeholder: hint });
    form.append(Object.assign(fields[name], { name, required: true }));
  }
  const button = make("button", { textContent: page.answer === chat ? "Send" : "Run" });
  form.append(button);
  form.hidden = false;
  fields.text?.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    button.disabled = true;
    say("running…");
    try {
      const { found, tokens, seconds } = await page.answer(page, fields);
      say(`${tokens ? `${tokens} tokens, ${(tokens / seconds).toFixed(1)} a second; ` : ""}${seconds.toFixed(2)} s`);
      window.answer = found;
    } catch (error) {
      say(error.message, true);
    }
    button.disabled = false;
  });
}

async function chat(page, fields) {
  const { templated } = page.loaded;
  if (!templated) messages.length = 0;
  messages.push({ role: "user", content: fields.text.value });
  const turn = make("div", { className: "turn model", textContent: "…" });
  element("output").append(make("div", { className: "turn user", textContent: fields.text.value }), turn);
  fields.text.value = "";
  let written = "";
  const show = (piece) => { written += piece; turn.textContent = written.trim(); };
  const options = { max_new_tokens: Math.min(256, page.manifest.max_length), do_sample: false, return_full_text: false };
  const inputs = [templated ? messages : messages[0].content];
  const result = await ask({ inputs, options, streamed: true }, show);
  messages.push({ role: "assistant", content: written });
  return { ...result, found: written };
}

async function answer(page, fields) {
  const result = await ask({ inputs: await read(page, fields), options: page.options });
  page.after(result.found);
  show(result.found);
  return result;
}

async function read(page, fields) {
  const output = element("output");
  if (fields.image) {
    const picture = await createImageBitmap(fields.image.files[0]);
    const canvas = make("canvas", { width: picture.width, height: picture.height });
    canvas.getContext("2d").drawImage(picture, 0, 0);
    output.replaceChildren(canvas);
    return [fields.image.files[0]];
  }
  if (fields.audio) {
    const sound = fields.audio.files[0];
    output.replaceChildren(make("audio", { controls: true, src: URL.createObjectURL(sound) }));
    const decoded = await new AudioContext({ sampleRate: page.loaded.rate }).decodeAudioData(await sound.arrayBuffer());
    const channels = Array.from({ length: decoded.numberOfChannels }, (_, number) => decoded.getChannelData(number));
    return [channels[0].map((_, place) => channels.reduce((sum, channel) => sum + channel[place], 0) / channels.length)];
  }
  output.replaceChildren(make("div", { className: "turn user", textContent: fields.text.value }));
  return fields.question ? [fields.question.value, fields.text.value] : [fields.text.value];
}

function boxes(found) {
  const context = element("output").querySelector("canvas").getContext("2d");
  context.strokeStyle = context.fillStyle = "#e53935";
  for (const { box, label, score } of found) {
    context.strokeRect(box.xmin, box.ymin, box.xmax - box.xmin, box.ymax - box.ymin);
    context.fillText(`${label} ${(score * 100).toFixed(0)}%`, box.xmin + 2, box.ymin + 10);
  }
}

function show(found) {
  const table = make("table");
  for (const entry of [found].flat()) {
    const row = table.insertRow();
    const said = entry.generated_text ?? entry.translation_text ?? entry.text ?? entry.answer ?? entry.word;
    row.insertCell().textContent = said === undefined ? entry.label ?? entry.entity : entry.entity ? `${said}: ${entry.entity}` : said;
    if (entry.score === undefined) continue;
    const bar = Object.assign(row.insertCell(), { className: "bar" }).appendChild(make("i"));
    bar.style.width = `${entry.score * 100}%`;
    Object.assign(row.insertCell(), { className: "number", textContent: `${(entry.score * 100).toFixed(1)}%` });
  }
  element("output").append(table);
}

start().catch((error) => { say(error.message, true); window.failed = error.message; });
