// transformers.js's side of tools/check_loaders, in headless Chromium: serves the bundle and the npm packages on this machine alone.
import { createReadStream, existsSync, readFileSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { extname, join, normalize } from "node:path";

const modules = join(process.argv[2], "node_modules");
const { chromium } = createRequire(`${modules}/`)("playwright-core");
const request = JSON.parse(readFileSync(0, "utf8"));
const browser = process.env.CHROMIUM ?? ["/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome"].find(existsSync);
if (!browser) throw new Error("no Chromium here: apt-get install chromium, or name one in CHROMIUM");

const TYPES = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };
const PAGE = `<!doctype html><script type="module">
import { env, pipeline, AutoTokenizer, AutoModelForCausalLM, RawImage } from "/npm/@huggingface/transformers/dist/transformers.min.js";
Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false, useWasmCache: false, localModelPath: "/" });
env.backends.onnx.wasm.wasmPaths = location.origin + "/npm/onnxruntime-web/dist/";
const words = (task, found) => {
  const first = Array.isArray(found) ? found[0] : found;
  if (task === "token-classification") return found.map((span) => [span.word, span.entity]);
  if (task === "image-segmentation") {
    const areas = found.map(({ label, mask }) => [label, mask.data.reduce((sum, value) => sum + (value > 0), 0) / mask.data.length]);
    const [label, share] = areas.sort((a, b) => b[1] - a[1])[0];
    return [label, Math.round(share * 100) / 100];
  }
  const said = first.label ?? first.answer ?? first.text ?? first.generated_text ?? first.translation_text;
  return said?.trim();
};
// The pipeline takes the last class for "no object", which RT-DETR and D-FINE do not have: theirs are read by their sigmoids.
const boxes = async ({ model, processor }, given) => {
  const found = await model(await processor(await RawImage.read(given)));
  const names = model.config.id2label;
  const alone = found.logits.dims.at(-1) === Object.keys(names).length;
  return processor.image_processor.post_process_object_detection(found, 0.5, null, alone)[0].classes.map((kind) => names[kind]).sort();
};
window.run = async ({ task, inputs, new_tokens, dtype }) => {
  const options = { dtype, device: "wasm" };
  const said = [];
  if (task === "text-generation") {
    const tokenizer = await AutoTokenizer.from_pretrained("bundle", options);
    const model = await AutoModelForCausalLM.from_pretrained("bundle", options);
    const stop = [model.generation_config.eos_token_id].flat().map(Number);
    for (const content of inputs) {
      const given = tokenizer.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true, return_dict: true });
      const found = await model.generate({ ...given, max_new_tokens: new_tokens, do_sample: false });
      said.push(found.tolist()[0].slice(given.input_ids.dims[1]).map(Number).filter((token) => !stop.includes(token)));
    }
    return said;
  }
  const pipe = await pipeline(task, "bundle", options);
  const writes = ["translation", "summarization", "text2text-generation", "image-to-text"].includes(task);
  const more = writes ? [{ max_new_tokens: new_tokens }] : [];
  for (const given of inputs) {
    if (task === "object-detection") { said.push(await boxes(pipe, given)); continue; }
    const [first, ...others] = given.split("|");
    const parts = task === "question-answering" ? [first, ...others] : task === "zero-shot-image-classification" ? [first, others, { hypothesis_template: "{}" }] : [given, ...more];
    said.push(words(task, await pipe(...parts)));
  }
  return said;
};
window.loaded = true;
</script>`;

const files = request.inputs.map((given) => given.split("|")[0]).filter((given) => existsSync(given));
const server = createServer((asked, answer) => {
  const path = normalize(decodeURIComponent(new URL(asked.url, "http://localhost").pathname));
  answer.setHeader("Cross-Origin-Opener-Policy", "same-origin");
  answer.setHeader("Cross-Origin-Embedder-Policy", "require-corp");
  if (path === "/") { answer.setHeader("Content-Type", "text/html"); answer.end(PAGE); return; }
  const input = path.match(/^\/input\/(\d+)$/);
  const file = input ? files[input[1]] : path.startsWith("/npm/") ? join(modules, path.slice(5)) : path.startsWith("/bundle/") ? join(request.bundle, path.slice(8)) : "";
  if (!file || !existsSync(file) || !statSync(file).isFile()) { answer.statusCode = 404; answer.end(); return; }
  answer.setHeader("Content-Type", TYPES[extname(file)] ?? "application/octet-stream");
  answer.setHeader("Content-Length", statSync(file).size);
  createReadStream(file).pipe(answer);
});
server.listen(0, "127.0.0.1", async () => {
  const window = await chromium.launch({ executablePath: browser, args: ["--no-sandbox"] });
  let code = 0;
  try {
    const page = await window.newPage();
    page.on("pageerror", (error) => console.error(error.message));
    page.setDefaultTimeout(1_700_000);
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    await page.waitForFunction("window.loaded");
    const dtype = JSON.parse(readFileSync(join(request.bundle, "config.json"), "utf8"))["transformers.js_config"].dtype;
    const inputs = request.inputs.map((given) => {
      const [first, ...others] = given.split("|");
      return [existsSync(first) ? `/input/${files.indexOf(first)}` : first, ...others].join("|");
    });
    console.log(JSON.stringify(await page.evaluate((given) => window.run(given), { ...request, inputs, dtype })));
  } catch (error) {
    console.error(String(error.message ?? error).split("\n")[0]);
    code = 1;
  }
  await window.close();
  server.close();
  process.exit(code);
});
