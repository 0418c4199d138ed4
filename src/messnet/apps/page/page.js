// The page: what it shows of an image's way through the exits. Who computes it, the service that the page came from or
// this device, is the source's affair: source.js is service.js there and device.js here.
import * as source from "./source.js";

const $ = (id) => document.getElementById(id);
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
const shareText = (share) => share === 0 ? "0 %" : share < 0.001 ? "< 0.1 %" : percent(share);
let info, waiting, taken, current, running, camera, refinements = [], shown = -1;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function say(headline, detail = "") { $("headline").textContent = headline; $("detail").textContent = detail; }

function complain(text) {
  $("error").hidden = !text;
  $("error").textContent = text;
}

async function start() {
  for (const name of ["threshold", "deadline", "opacity"]) $(name).addEventListener("input", showValues);
  for (const name of ["threshold", "deadline"]) $(name).addEventListener("change", run);
  for (const radio of document.getElementsByName("stop")) radio.addEventListener("change", () => { showValues(); run(); });
  $("file").addEventListener("change", () => { if ($("file").files[0]) take($("file").files[0]); $("file").value = ""; });
  addEventListener("paste", (event) => { const [file] = event.clipboardData.files; if (file) take(file); });
  addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("over"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("over"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) take(file);
  });
  for (const [id, text] of Object.entries(source.texts)) $(id).replaceChildren(...text);
  say("Loading the model …");
  try {
    info = await source.open(() => waiting);
  } catch (error) {
    say("No model");
    complain(error.message);
    return;
  }
  say("No image yet");
  const exits = info.exits.length === 1 ? "one exit" : `${info.exits.length} exits`;
  $("kicker").textContent = `messnet · ${info.instance}, ${exits}, ${info.setting.replace("_", "-")}`;
  document.title = `messnet: ${info.instance}`;
  $("instance-hint").textContent = ownRule();
  const first = info.exits.find((exit) => exit.image_threshold !== null && exit.image_threshold <= 1);
  if (first) $("threshold").value = Math.round(100 * first.image_threshold);
  setDeadlineRange(Math.max(...info.exits.map((exit) => exit.warm_up_latency_ms)));
  reveal(false);
  info.samples.forEach((name, index) => {
    const image = element("img", { src: `/samples/${index}`, alt: `Sample ${name}` });
    const button = element("button", { type: "button", "aria-pressed": "false" }, image);
    button.addEventListener("click", () => take(fetch(`/samples/${index}`).then((response) => response.blob()), button));
    $("samples").append(element("li", {}, button));
  });
  if (info.variants) {
    $("computing").hidden = false;
    $("variant").append(...info.variants.map((name) => element("option", {}, name)));
    $("variant-hint").textContent = info.note;
    $("variant").addEventListener("change", change);
    $("camera").hidden = !navigator.mediaDevices?.getUserMedia;
    $("camera").addEventListener("click", film);
  }
  showValues();
  drawExits();
  drawKeys();
  waiting ??= info.held;
  if (waiting) await take(waiting);
}

// What the instance does of its own, in words.
function ownRule() {
  const last = info.exits[info.exits.length - 1];
  const leaving = info.exits.filter((exit) => exit !== last && exit.image_threshold !== null && exit.image_threshold <= 1);
  if (info.exits.length === 1) return `It has one exit, ${last.exit_index}, and always takes it.`;
  if (!leaving.length) return "It runs all its exits, and keeps the last result.";
  const rules = leaving.map((exit) =>
    `at exit ${exit.exit_index} when ${percent(exit.image_threshold)} of the pixels have a confidence of at least ${exit.pixel_threshold}`);
  return `An image stops ${rules.join(", ")}; otherwise at exit ${last.exit_index}.`;
}

function setDeadlineRange(slowest) {
  const wanted = Math.max(5, Math.ceil(1.2 * slowest));
  if (wanted > Number($("deadline").max) || !current) {
    $("deadline").max = wanted;
    if (!current) $("deadline").value = Math.round(wanted / 2);
  }
}

function stopRule() { return document.querySelector("[name=stop]:checked").value; }

function showValues() {
  for (const name of ["instance", "threshold", "deadline"]) $(`${name}-dial`).hidden = stopRule() !== name;
  const texts = { threshold: `${$("threshold").value} %`, deadline: `${$("deadline").value} ms`, opacity: `${$("opacity").value} %` };
  for (const [name, text] of Object.entries(texts)) {
    $(`${name}-value`).textContent = text;
    $(name).setAttribute("aria-valuetext", text);
  }
  $("mask").style.opacity = $("opacity").value / 100;
}

// To another precision or processor of the device; where that fails, the list shows what still computes.
async function change() {
  let complaint;
  if (running) running.abort();
  complain("");
  say("Loading …");
  try {
    await source.choose($("variant").selectedIndex, current && $("photo"));
    complaint = "";
  } catch (error) {
    $("variant").selectedIndex = source.chosen();
    complaint = error.message;
  }
  say("No image yet");
  setDeadlineRange(Math.max(...info.exits.map((exit) => exit.warm_up_latency_ms)));
  await run();
  complain(complaint);
}

// Frame by frame: the next one is taken when the last one has left its exit.
async function film() {
  taken = undefined; // an image that is still being read comes too late
  if (camera) {
    camera.getTracks().forEach((track) => track.stop());
    camera = null;
    return;
  }
  try {
    camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    complain(`No camera (${error.message}): allow this page to use one, or choose a photograph.`);
    return;
  }
  const video = element("video", { playsinline: "" });
  video.muted = true;
  video.srcObject = camera;
  await video.play();
  filming(true);
  const mine = camera;
  while (camera === mine && mine.active) {
    draw(video, video.videoWidth, video.videoHeight);
    await run();
    await new Promise(requestAnimationFrame);
  }
  filming(false);
}

function filming(begun) {
  $("camera").setAttribute("aria-pressed", String(begun));
  $("camera").textContent = begun ? "Stop the camera" : "Use the camera";
  $("said").setAttribute("aria-live", begun ? "off" : "polite"); // or a screen reader reads out every frame
}

// Of several that are chosen while the first is still being read, the last one counts.
async function take(blob, button = null) {
  if (!info) {
    waiting = blob;
    if ($("error").hidden) say("Loading the model …", "Your image is next."); // and not where it could not be loaded
    return;
  }
  if (camera) await film();
  const mine = taken = {};
  for (const other of $("samples").querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
  let bitmap;
  try {
    blob = await blob;
    // Its own numbers, as files are read everywhere else here: nothing is converted between colour spaces.
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  } catch {
    if (mine !== taken) return;
    if (running) running.abort();
    current = running = undefined;
    reveal(false);
    clear("No result");
    complain(`${blob.name ?? "This"} is no image that the browser can read: expected a JPEG, PNG, WebP or BMP file.`);
    return;
  }
  if (mine !== taken) return;
  if (running) running.abort();
  running = undefined; // what comes of the image before is not shown on this one
  draw(bitmap, bitmap.width, bitmap.height);
  if (current.note) blob = await new Promise((done) => $("photo").toBlob(done, "image/jpeg", 0.92));
  if (mine !== taken) return;
  current.blob = blob;
  await run();
}

function reveal(picture) {
  $("picture").hidden = $("another").hidden = !picture;
  $("invitation").hidden = picture;
  $("no-samples").hidden = picture || info.samples.length > 0;
  $("drop").classList.toggle("full", picture);
}

// The image or frame as it goes to the source: scaled down where it has more pixels than are allowed, or than the
// network knows what to do with.
function draw(image, width, height) {
  const { max_pixels, large = max_pixels } = info.limits;
  const scale = width * height > large ? Math.sqrt(max_pixels / (width * height)) : 1;
  current = { note: scale < 1 ? `scaled down here from ${width} × ${height}` : "" };
  const [columns, rows] = [width, height].map((side) => Math.max(1, Math.floor(side * scale + 1e-6)));
  for (const canvas of [$("photo"), $("mask")]) {
    if (camera && canvas.width === columns && canvas.height === rows) continue; // a frame's mask stays for the next one's
    canvas.width = columns;
    canvas.height = rows;
  }
  const context = $("photo").getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, $("photo").width, $("photo").height);
  reveal(true);
  $("picture").style.width = `min(100%, calc(58vh * ${$("photo").width / $("photo").height}))`;
}

async function run() {
  if (!current) return;
  if (running) running.abort();
  const mine = running = new AbortController();
  if (camera) refinements = []; // the last frame's result stays in sight
  else clear("Computing …");
  shown = -1;
  complain("");
  const rule = {};
  if (stopRule() === "instance") rule.stop = "instance";
  if (stopRule() === "threshold") rule.threshold = $("threshold").value / 100;
  if (stopRule() === "deadline") rule.deadline_ms = Number($("deadline").value);
  try {
    for await (const record of source.refine({ blob: current.blob, canvas: $("photo") }, rule, mine.signal)) {
      if (mine !== running) return;
      if (record.stopped) finish(record.stopped);
      else await receive(record, mine);
    }
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    running = undefined;
    clear("No result");
    complain(error.message);
    $("mask").getContext("2d").clearRect(0, 0, $("mask").width, $("mask").height);
  }
}

// Takes away what was found in an image before.
function clear(headline) {
  refinements = [];
  say(headline);
  drawExits();
  drawKeys();
}

async function receive(record, mine) {
  record.bitmap = await createImageBitmap(record.mask);
  if (mine !== running) return;
  refinements.push(record);
  setDeadlineRange(record.latency_ms);
  drawExits();
  show(refinements.length - 1);
}

function finish(stopped) {
  const last = refinements[refinements.length - 1], left = info.exits.length - refinements.length;
  const why = { last_exit: "the last exit", threshold: "confident enough", deadline: "time is up" }[stopped];
  const saved = left > 0 ? `; ${left} of ${info.exits.length} exits not needed` : "";
  say(`Exit ${last.exit_index} after ${ms(last.latency_ms)}: ${percent(last.image_confidence)} of the pixels are confident`,
    `Stopped: ${why}${stopped === "deadline" && left > 0 ? `, ${left} of ${info.exits.length} exits not run` : saved}. ` +
    `${last.width} × ${last.height} pixels${current.note ? `, ${current.note}` : ""}.`);
  drawExits(true);
}

function show(index) {
  shown = index;
  const record = refinements[index], canvas = $("mask"), context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = false;
  context.drawImage(record.bitmap, 0, 0, canvas.width, canvas.height);
  canvas.setAttribute("aria-label", `Classes at exit ${record.exit_index}`);
  canvas.classList.remove("arriving");
  void canvas.offsetWidth; // restarts the animation
  canvas.classList.toggle("arriving", !camera);
  for (const button of $("exits").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.index === String(index)));
  }
  drawKeys(record.class_shares);
}

function drawExits(ended = false) {
  const focused = document.activeElement?.dataset?.index;
  $("exits").replaceChildren(...info.exits.map((exit, position) => {
    const record = refinements[position];
    const thumb = element("span", { class: "thumb" }), button = element("button", { type: "button" }, thumb);
    button.append(element("b", {}, `Exit ${exit.exit_index}`));
    const cost = exit.share_of_original === undefined ? "" : `${percent(exit.share_of_original, 0)} of the whole model’s work`;
    if (record) {
      thumb.append(thumbnail(record));
      button.dataset.index = position;
      button.setAttribute("aria-pressed", String(position === shown));
      const bar = element("i");
      bar.style.width = `${100 * record.image_confidence}%`;
      button.append(element("span", { class: "bar" }, bar));
      button.append(element("small", {}, `${percent(record.image_confidence)} confident`));
      const before = refinements[position - 1]?.latency_ms ?? 0;
      button.append(element("small", {}, `${ms(record.latency_ms - before)}${position ? `, ${ms(record.latency_ms)} in all` : ""}`));
      button.addEventListener("click", () => show(position));
    } else {
      button.disabled = true;
      const next = running && position === refinements.length ? "computing …" : "";
      thumb.append(ended ? "not run" : next);
    }
    if (cost) button.append(element("small", {}, cost));
    return element("li", {}, button);
  }));
  if (focused !== undefined) $("exits").querySelector(`[data-index="${focused}"]`)?.focus();
}

function thumbnail(record) {
  const canvas = element("canvas"), width = 320;
  canvas.width = width;
  canvas.height = Math.max(1, Math.round(width * record.height / record.width));
  const context = canvas.getContext("2d");
  if (!$("picture").hidden) context.drawImage($("photo"), 0, 0, canvas.width, canvas.height);
  context.globalAlpha = 0.72;
  context.drawImage(record.bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}

function drawKeys(shares = null) {
  $("keys").replaceChildren(...info.class_names.map((name, index) => {
    const key = element("i");
    key.style.background = `rgb(${info.palette[index].join(" ")})`;
    const item = element("li", {}, key, name);
    if (shares) {
      item.append(element("span", { class: "muted" }, ` ${shareText(shares[index])}`));
      item.classList.toggle("absent", shares[index] === 0);
    }
    return item;
  }));
}

start();
