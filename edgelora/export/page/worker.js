// transformers.js in a thread of its own, so that the page stays awake. Messages: {load: threads} or {inputs, options}, each answered
// with {ready, seconds}, {piece} as text is written, {found, tokens, seconds}, or {failed}.
const here = new URL("./", self.location.href).href;
const json = async (name) => (await fetch(here + name)).json();
let library, pipe;

async function load(threads) {
  try {
    library = await import(`${here}vendor/transformers.min.js`);
  } catch (error) {
    throw new Error(`vendor/transformers.min.js is missing; README.txt in this folder says how to put it there (${error.message})`);
  }
  const { env, pipeline, LogLevel } = library;
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false, useWasmCache: false });
  env.localModelPath = here;
  if (LogLevel) env.logLevel = LogLevel.ERROR;
  Object.assign(env.backends.onnx.wasm, { wasmPaths: `${here}vendor/`, numThreads: threads });
  const started = performance.now();
  const [manifest, config] = await Promise.all([json("edgelora.json"), json("config.json")]);
  pipe = await pipeline(manifest.task, ".", { dtype: config["transformers.js_config"].dtype, device: "wasm" });
  return { ready: true, templated: Boolean(pipe.tokenizer?.chat_template), rate: pipe.processor?.feature_extractor?.config.sampling_rate,
    seconds: (performance.now() - started) / 1000 };
}

async function run(inputs, options, streamed) {
  const started = performance.now();
  let tokens = 0;
  if (streamed) {
    options = { ...options, streamer: new library.TextStreamer(pipe.tokenizer, {
      skip_prompt: true, skip_special_tokens: true,
      callback_function: (piece) => self.postMessage({ piece }),
      token_callback_function: (found) => { tokens += found.length; },
    }) };
  }
  const given = await Promise.all(inputs.map((input) => input instanceof Blob ? library.RawImage.read(input) : input));
  const found = await pipe(...given, options);
  return { found: JSON.parse(JSON.stringify(found)), tokens, seconds: (performance.now() - started) / 1000 };
}

self.onmessage = async ({ data }) => {
  try {
    self.postMessage(data.load ? await load(data.load) : await run(data.inputs, data.options, data.streamed));
  } catch (error) {
    self.postMessage({ failed: String(error?.message ?? error) });
  }
};
