// Refinements as this device computes them, in a worker that runs the bundle's graphs with onnxruntime-web.

export const texts = {
  privacy: ["It stays on this device."],
  "no-samples": ["Once loaded, the page works without a network too."],
  footer: ["Milliseconds are this device’s: each stage of the network, its decision and its labels."],
};

const HELD = "messnet held"; // the cache for an image while the page loads once more
const PIXELS_EQUAL = 0.999; // of another processor than WebAssembly's, at every exit
let model, variants, computing, info;

// The model as the service's /v1/info describes it; it is loaded, and has run once. `waiting` returns the image that was
// chosen meanwhile, if any: should the page load once more, it is `held` of what the next call returns.
export async function open(waiting) {
  if (typeof WebAssembly !== "object") throw new Error("This browser has no WebAssembly, which runs the network: use a current one.");
  const offline = await keepOffline(waiting), held = await takeHeld();
  try {
    model = await (await fetch("model.json")).json();
  } catch {
    throw new Error("The page’s model.json cannot be read: serve the whole folder that `messnet export --web` wrote.");
  }
  // Half of the processors, as onnxruntime-web takes by itself: threads wait by spinning, and more of them than there are
  // free processors take longer than one.
  const asked = Number(new URLSearchParams(location.search).get("threads"));
  const threads = self.crossOriginIsolated ? asked || Math.min(4, Math.ceil(navigator.hardwareConcurrency / 2)) : 1;
  const counted = threads === 1 ? "1 thread" : `${threads} threads`;
  variants = Object.keys(model.graphs).map((precision) => ({ precision, threads, name: `${precision}, WebAssembly, ${counted}` }));
  if (model.graphs.f32 && await navigator.gpu?.requestAdapter()) variants.push({ precision: "f32", threads, gpu: true, name: "f32, WebGPU" });
  info = {
    ...model,
    held,
    variants: variants.map((variant) => variant.name),
    note: [
      self.crossOriginIsolated ? "" : "One thread, for the browser gives WebAssembly more only over HTTPS or from localhost.",
      offline ? "" : "Without a network the page will not load again: the browser keeps no pages from this address.",
    ].join(" ").trim(),
  };
  await choose(0);
  return info;
}

// Computes with the variant at `index` from now on. Raises Error, and stays as it was, where that cannot be loaded or
// disagrees with WebAssembly about the picture of a canvas.
export async function choose(index, canvas = null) {
  const next = new Computing(variants[index]);
  try {
    await next.open();
    if (variants[index].gpu && canvas) await expectAgreement(next, canvas);
  } catch (error) {
    next.end();
    throw error;
  }
  computing?.end();
  computing = next;
}

export function chosen() {
  return variants.indexOf(computing.variant);
}

export async function* refine({ canvas }, rule, signal) {
  const mine = computing;
  await mine.start(canvas);
  if (signal.aborted) return; // or the next exit of the picture that came since would be taken for this one's
  let latency_ms = 0;
  for (const [position, exit] of model.exits.entries()) {
    if (position && rule.deadline_ms !== undefined && latency_ms + mine.times[position] * mine.pixels > rule.deadline_ms) {
      yield { stopped: "deadline" };
      return;
    }
    const found = await mine.advance();
    if (signal.aborted) return;
    latency_ms += found.took_ms;
    const mask = new ImageData(new Uint8ClampedArray(found.pixels.buffer), found.width, found.height);
    yield { ...found, mask, exit_index: exit.exit_index, latency_ms };
    const threshold = rule.threshold ?? (rule.stop === "instance" ? exit.image_threshold : null);
    if (position < model.exits.length - 1 && threshold !== null && found.image_confidence >= threshold) {
      yield { stopped: "threshold" };
      return;
    }
  }
  yield { stopped: "last_exit" };
}

// A worker with the graphs of a variant. It takes an image, and computes one exit each time that it is asked to.
class Computing {
  constructor(variant) {
    this.variant = variant;
    this.times = []; // of each stage, milliseconds a pixel that it saw, as it last took
    this.worker = new Worker("worker.js", { type: "module" });
    this.waiting = [];
    this.worker.onmessage = ({ data }) => {
      const { done, failed } = this.waiting.shift();
      if (data.error === undefined) done(data);
      else failed(new Error(data.error));
    };
    this.worker.onerror = (event) => {
      for (const { failed } of this.waiting.splice(0)) failed(new Error(`The network cannot be loaded (${event.message ?? "no reason given"}).`));
    };
  }

  ask(message, transfer = []) {
    return new Promise((done, failed) => {
      this.waiting.push({ done, failed });
      this.worker.postMessage(message, transfer);
    });
  }

  async open() {
    await this.ask({ what: "open", model, variant: this.variant });
    const [height, width] = model.input_size, canvas = new OffscreenCanvas(width, height);
    let latency_ms = 0;
    await this.start(canvas);
    for (const exit of info.exits) {
      latency_ms += (await this.advance()).took_ms;
      exit.warm_up_latency_ms = latency_ms;
    }
  }

  async start(canvas) {
    const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    this.position = 0;
    this.pixels = (await this.ask({ what: "start", pixels: data, width, height }, [data.buffer])).area;
  }

  async advance() {
    const found = await this.ask({ what: "advance" });
    this.times[this.position++] = found.took_ms / this.pixels;
    return found;
  }

  end() {
    this.worker.terminate();
  }
}

async function expectAgreement(next, canvas) {
  await Promise.all([computing.start(canvas), next.start(canvas)]);
  for (const exit of model.exits) {
    const [ours, theirs] = await Promise.all([computing.advance(), next.advance()]);
    const equal = ours.pixels.filter((colour, place) => colour === theirs.pixels[place]).length / ours.pixels.length;
    const decisions = [ours, theirs].map((one) => exit.image_threshold !== null && one.image_confidence >= exit.image_threshold);
    if (equal < PIXELS_EQUAL || decisions[0] !== decisions[1]) {
      throw new Error(`${next.variant.name} disagrees with WebAssembly here (${(100 * equal).toFixed(2)} % of the pixels equal at exit ${exit.exit_index}): not used.`);
    }
  }
}

// Lets offline.js answer for this folder: it keeps what it has seen, and isolates the page, which threads need. A page
// that is not isolated yet loads once more. Returns whether the browser takes part.
async function keepOffline(waiting) {
  const container = navigator.serviceWorker;
  if (!container) return false; // neither HTTPS nor localhost
  const tooLate = new Promise((done) => setTimeout(done, 5000)); // it may fail without a word
  await Promise.race([controlled(container), tooLate]);
  if (container.controller && !self.crossOriginIsolated && !sessionStorage.getItem("messnet-isolating")) {
    sessionStorage.setItem("messnet-isolating", "once");
    if (waiting()) await (await caches.open(HELD)).put("image", new Response(waiting()));
    location.reload();
    await new Promise(() => {});
  }
  sessionStorage.removeItem("messnet-isolating");
  return Boolean(container.controller);
}

async function takeHeld() {
  if (!self.caches) return; // as with service workers: nothing was held
  const held = await caches.match("image", { cacheName: HELD });
  await caches.delete(HELD);
  return held?.blob();
}

async function controlled(container) {
  const change = new Promise((done) => container.addEventListener("controllerchange", done, { once: true }));
  try {
    await container.register("offline.js");
  } catch {
    return; // such as in a private window
  }
  await container.ready;
  // After a forced reload a worker that is there already takes control of nothing.
  if (!container.controller) await Promise.race([change, new Promise((done) => setTimeout(done, 1000))]);
}
