// Runs the stages of an instance, one each time that it is asked, away from the thread that draws the page.
//
//   stage i    the tensors that the stage before left (normalised pixels at first), pixel_threshold
//              -> the next stage's tensors, logits, confidence: the image confidence at that pixel threshold
//   output     logits, and size where labels are upsampled -> labels
//
// Messages are answered in the order in which they come, each with one: what was found, or {error}.

let ort, model, stages, output, size, live, position, last = Promise.resolve();

onmessage = ({ data }) => {
  last = last.then(async () => {
    try {
      const found = await { open, start, advance }[data.what](data);
      postMessage(found, found.pixels ? [found.pixels.buffer] : []);
    } catch (error) {
      postMessage({ error: `The network cannot run here: ${String(error.message ?? error).split("\n")[0]}` });
    }
  });
};

async function open(message) {
  const { precision, gpu, threads } = message.variant;
  ort = await import(gpu ? "./ort/ort.webgpu.min.mjs" : "./ort/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  model = message.model;
  const load = (file, on) => ort.InferenceSession.create(file, { executionProviders: [on], logSeverityLevel: 3 });
  stages = [];
  for (const file of model.graphs[precision]) stages.push(await load(file, gpu ? "webgpu" : "wasm"));
  output = await load(model.output, "wasm");
  return {};
}

// RGBA pixels (height, width, 4) to what the network takes: float32 (1, 3, H, W), (x / 255 - mean) / std, resized where
// the model was trained so, with the last rows and columns repeated up to a multiple of the network's stride.
function start({ pixels, width, height }) {
  const least = model.resize ? Math.min(width, height) : 1;
  const [wide, high] = [width, height].map((side) => Math.floor(side * (model.resize ?? 1) / least));
  const shown = resized(resized(pixels, width, height, 0, wide), wide, height, 1, high);
  const [rows, columns] = [high, wide].map((side) => Math.ceil(side / model.size_multiple) * model.size_multiple);
  const planes = new Float32Array(3 * rows * columns), of = scaled();
  for (let y = 0, to = 0; y < rows; y++) {
    const row = 4 * wide * Math.min(y, high - 1);
    for (let x = 0; x < columns; x++, to++) {
      const from = row + 4 * Math.min(x, wide - 1);
      for (let c = 0; c < 3; c++) planes[c * rows * columns + to] = of[c][shown[from + c]];
    }
  }
  size = { width, height, wide, high, rows, columns };
  live = [new ort.Tensor("float32", planes, [1, 3, rows, columns])];
  position = 0;
  return { area: rows * columns };
}

// RGBA pixels (height, width, 4) with `length` columns (axis 0) or rows (axis 1), as Pillow's bilinear filter has them,
// to the bit: a triangle as wide as the scale, weights of 22 bits, a byte after each axis.
function resized(pixels, width, height, axis, length) {
  const before = axis ? height : width, others = axis ? width : height;
  if (before === length) return pixels;
  const scale = before / length, reach = Math.max(1, scale), found = new Uint8Array(4 * others * length);
  const [step, line, lineFound] = axis ? [4 * width, 4, 4] : [4, 4 * width, 4 * length];
  for (let place = 0; place < length; place++) {
    const centre = (place + 0.5) * scale, first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const count = Math.min(before, Math.trunc(centre + reach + 0.5)) - first;
    const triangle = Array.from({ length: count }, (_, k) => Math.max(0, 1 - Math.abs((first + k - centre + 0.5) * (1 / reach))));
    const sum = triangle.reduce((total, weight) => total + weight, 0);
    const weights = Int32Array.from(triangle, (weight) => weight / sum * 2 ** 22 + 0.5);
    for (let other = 0; other < others; other++) {
      const from = other * line + first * step, to = other * lineFound + place * (axis ? 4 * width : 4);
      for (let c = 0; c < 3; c++) {
        let total = 2 ** 21;
        for (let k = 0; k < count; k++) total += weights[k] * pixels[from + k * step + c];
        found[to + c] = total >> 22;
      }
    }
  }
  return found;
}

// The normalised value of every byte, per channel, with the same roundings to float32 as everywhere else in messnet.
function scaled() {
  const single = Math.fround;
  return model.mean.map((mean, c) => {
    const shift = single(single(mean) * 255), scale = single(single(model.std[c]) * 255);
    return Float32Array.from({ length: 256 }, (_, value) => single(single(value - shift) / scale));
  });
}

// The next exit: its mask in the classes' colours, the share of confident pixels and of each class.
async function advance() {
  const begun = performance.now(), stage = stages[position];
  const feeds = Object.fromEntries(live.map((tensor, k) => [`live${k}`, tensor]));
  feeds.pixel_threshold = new ort.Tensor("float32", [pixelThreshold()], [1]);
  const found = await stage.run(Object.fromEntries(stage.inputNames.map((name) => [name, feeds[name]])));
  if (!found.logits.data.every(Number.isFinite)) throw new Error("it computes NaN or infinite values for this image.");
  const sides = BigInt64Array.of(BigInt(size.rows), BigInt(size.columns));
  const asked = { logits: found.logits, size: new ort.Tensor("int64", sides, [2]) };
  const { labels } = await output.run(Object.fromEntries(output.inputNames.map((name) => [name, asked[name]])));
  const took_ms = performance.now() - begun;
  live = stage.outputNames.filter((name) => name.startsWith("next")).map((name) => found[name]);
  position++;
  return { took_ms, image_confidence: found.confidence.data[0], width: size.width, height: size.height, ...drawn(labels) };
}

// An exit that decides nothing is looked at with the threshold of the last one that does, as in messnet's Result.
function pixelThreshold() {
  const known = model.exits.map((exit) => exit.pixel_threshold).filter((threshold) => threshold !== null);
  return model.exits[position].pixel_threshold ?? known.at(-1) ?? 0.9;
}

function drawn({ data, dims: [, high, wide] }) {
  const { width, height, rows, columns } = size; // of the image; of what the network saw
  const colours = Uint32Array.from(model.palette, ([red, green, blue]) => (0xff000000 | blue << 16 | green << 8 | red) >>> 0);
  const pixels = new Uint32Array(width * height), counts = colours.map(() => 0);
  const across = Int32Array.from({ length: width }, (_, x) => Math.floor((x + 0.5) * size.wide / width) * wide / columns);
  for (let y = 0, to = 0; y < height; y++) {
    const row = wide * Math.floor(Math.floor((y + 0.5) * size.high / height) * high / rows);
    for (let x = 0; x < width; x++, to++) {
      const label = data[row + across[x]];
      pixels[to] = colours[label];
      counts[label]++;
    }
  }
  return { pixels, class_shares: Array.from(counts, (count) => count / pixels.length) };
}
