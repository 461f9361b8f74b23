import {Drawing} from "/drawing.js";
import {colourOf, writeLegend} from "/legend.js";
import {Comparison} from "/compare.js";
import {Words} from "/words.js";

const $ = (id) => document.getElementById(id);
const HINT = "Point at a region, or click it for its heat map.";
const state = {
  choices: null, // of /api/options
  words: null, // what is typed
  image: null, // the name of the image at the server
  file: null, // {blob, name} of an uploaded image, to send it again should the server have forgotten it
  photo: null, // where the picture is
  answer: null,
  drawing: null,
  colours: [],
  heat: null, // the class whose heat map is shown
  asked: 0, // questions so far: of several answers under way, the last question's counts
};

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, options) {
  return (await reply(path, options)).json();
}

async function reply(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("the server does not answer: is `run.py serve` still running?", 0);
  }
  if (!response.ok) throw new Refused((await response.json()).error, response.status);
  return response;
}

function complain(text) {
  document.body.classList.toggle("stale", Boolean(text)); // what is still shown answers an earlier question
  $("message").textContent = text;
  $("message").hidden = !text;
}

// ---- the photo

async function send(blob, name) {
  const limit = state.choices.limits.upload;
  if (blob.size > limit) {
    throw new Refused(`an image file has at most ${Math.round(limit / 2 ** 20)} MB here, but ${name} has ` +
      `${(blob.size / 2 ** 20).toFixed(1)} MB: make it smaller`, 413);
  }
  return call(`/api/images?name=${encodeURIComponent(name)}`, {method: "POST", body: blob});
}

async function takeFile(blob, name) {
  $("status").textContent = "Sending the photo …";
  try {
    const received = await send(blob, name);
    state.file = {blob, name};
    choose(received.image, `/api/images/${received.image}`);
  } catch (error) {
    complain(error.message);
    $("status").textContent = "";
  }
}

function choose(image, photo) {
  Object.assign(state, {image, photo});
  for (const button of $("scenes").children) button.setAttribute("aria-pressed", button.dataset.scene === image);
  complain("");
  $("photo").src = photo; // at once: the answer takes a moment
  $("photo").hidden = false;
  $("hint").hidden = $("canvas").hidden = $("heat").hidden = true;
  if ($("words").value.trim()) ask(0);
  else $("status").textContent = "Now type some words: what do you want to see?";
}

function addScenes(names) {
  for (const name of names) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.scene = name;
    button.setAttribute("aria-pressed", false);
    const image = Object.assign(new Image(), {src: `/api/scenes/${name}.jpg`, alt: `scene ${name}`, loading: "lazy"});
    button.append(image);
    button.addEventListener("click", () => {
      state.file = null;
      choose(name, `/api/scenes/${name}.jpg`);
    });
    $("scenes").append(button);
  }
}

async function openCamera() {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({video: true});
    $("shoot").disabled = true;
    $("video").srcObject = stream;
    $("camera-dialog").showModal();
  } catch (error) {
    complain(`the camera cannot be used (${error.message}): allow it, or choose a file`);
  }
}

function closeCamera() {
  for (const track of $("video").srcObject?.getTracks() ?? []) track.stop();
  $("video").srcObject = null;
}

function shoot() {
  const video = $("video");
  const canvas = Object.assign(document.createElement("canvas"), {width: video.videoWidth, height: video.videoHeight});
  canvas.getContext("2d").drawImage(video, 0, 0);
  $("camera-dialog").close();
  canvas.toBlob((blob) => takeFile(blob, "camera.jpg"), "image/jpeg", 0.95);
}

// ---- question and answer

const READ_BY_CLIP = ["method", "denoising", "smoothing", "windows", "window", "stride", "background", "least", "pamr", "views"];
const comparison = new Comparison($);
const slider = (id) => Number($(id).value) || null; // 0 is off

function question() {
  const windows = $("windows").checked;
  const what = {image: state.image, classes: state.words.text(), model: $("model").value};
  if (state.choices.students[what.model]) return what; // it is read as it was trained
  return {
    ...what,
    method: $("method").value,
    prompt_denoising: slider("denoising"),
    key_smoothing: slider("smoothing"),
    window: windows ? Number($("window").value) : null,
    stride: windows ? Number($("stride").value) : null,
    background: $("background").value,
    background_threshold: slider("least"),
    pamr: Number($("pamr").value),
    flip: $("views").checked,
    scales: $("views").checked ? [0.75, 1, 1.25] : [1],
  };
}

// A student has its own words, and takes no settings.
function changeModel() {
  const model = $("model").value;
  const own = state.choices.students[model];
  for (const id of READ_BY_CLIP) $(id).disabled = Boolean(own);
  const typed = state.words.text().split(/[,;]/).map((word) => word.trim());
  if (own && !typed.every((word) => own.includes(word))) state.words.fillIn(model);
  else ask(0);
}

let timer = null, controller = null;

function ask(delay = 200) {
  clearTimeout(timer);
  timer = setTimeout(askNow, delay);
}

async function askNow(again = true) {
  for (const id of ["denoising", "smoothing", "least"]) $(`${id}-value`).textContent = slider(id)?.toFixed(2) ?? "off";
  if (state.image === null) return;
  const number = ++state.asked;
  controller?.abort();
  controller = new AbortController();
  $("status").textContent = "Looking …";
  const began = performance.now();
  try {
    const asked = question();
    const body = JSON.stringify(asked);
    const headers = {"Content-Type": "application/json"};
    const answer = await call("/api/segment", {method: "POST", body, headers, signal: controller.signal});
    const drawing = await Drawing.load(state.photo, answer.files.shown);
    if (number === state.asked) show(answer, drawing, asked, performance.now() - began);
  } catch (error) {
    if (number !== state.asked || error.name === "AbortError") return;
    if (error.status === 404 && state.file && again) {
      const received = await send(state.file.blob, state.file.name).catch(() => null);
      if (received) {
        Object.assign(state, {image: received.image, photo: `/api/images/${received.image}`});
        return askNow(false);
      }
    }
    complain(error.message);
    $("status").textContent = "";
  }
}

function show(answer, drawing, asked, milliseconds) {
  complain("");
  Object.assign(state, {answer, drawing, question: asked});
  state.colours = answer.classes.map(({color}) => colourOf(color));
  for (const id of ["tools", "legend", "downloads"]) $(id).hidden = false;
  $("photo").hidden = true;
  $("get-labels").href = answer.files.labels;
  $("get-json").href = answer.files.json;
  $("get-overlay").href = answer.files.overlay;
  $("get-export").replaceChildren($("get-export").options[0],
    ...Object.entries(answer.files.exports).map(([form, path]) => new Option(form, path)));
  for (const kind of ["labels", "json", "overlay"]) $(`get-${kind}`).title = answer.names[kind];
  writeLegend($("legend"), $("absent"), answer.classes, {choose: showHeat, point: single});
  const shown = answer.classes.find((entry) => entry.class === state.heat);
  if (shown) showHeat(shown.index);
  else showAll();
  const ms = (seconds) => `${Math.round(1000 * seconds)} ms`;
  const tower = answer.image_tower_ran ? `image ${ms(answer.seconds.image)}` : "image kept";
  $("status").textContent = `${answer.image}, ${answer.width} × ${answer.height}: ${ms(answer.seconds.all)} (words ` +
    `${ms(answer.seconds.words)}, ${tower}, masks ${ms(answer.seconds.masks)}), on screen after ${Math.round(milliseconds)} ms`;
  document.body.dataset.answers = Number(document.body.dataset.answers ?? 0) + 1;
}

// ---- the picture

function paint(only = null) {
  state.drawing?.draw($("canvas"), state.colours, Number($("opacity").value), only);
  if (state.question) comparison.paint(state, Number($("opacity").value));
}

let singled = null;

function single(index) {
  if (index === singled || state.heat !== null) return;
  singled = index;
  paint(index);
  for (const row of $("legend").tBodies[0].rows) row.classList.toggle("on", Number(row.dataset.index) === index);
}

function pointed(event) {
  const box = $("canvas").getBoundingClientRect();
  return state.drawing.at((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
}

function showHeat(index) {
  const entry = state.answer.classes[index];
  state.heat = entry.class;
  const heat = $("heat");
  heat.onload = () => {
    if (state.heat === null) return;
    heat.hidden = false;
    $("canvas").hidden = $("held").hidden = true;
  };
  heat.onerror = () => {
    showAll();
    complain("this heat map cannot be had any more: change something, or load the photo again");
  };
  heat.alt = `heat map of ${entry.class}`;
  heat.src = `${state.answer.files.heat}${index}.png`;
  $("back").hidden = false;
  $("pointed").textContent = `${entry.class} alone: ${(100 * entry.area).toFixed(1)}% of the photo are given to it.`;
}

function showAll() {
  state.heat = singled = null;
  $("heat").hidden = $("back").hidden = true;
  $("canvas").hidden = false;
  $("pointed").textContent = HINT;
  paint();
}

// ---- events

async function getExport() { // not by its address: what a format cannot hold is said
  const {value: path, selectedOptions: [{text: form}]} = $("get-export");
  $("get-export").value = "";
  try {
    const href = URL.createObjectURL(await (await reply(path)).blob());
    const download = state.answer.names.labels.replace(/labels\.png$/, `${form}.zip`);
    Object.assign(document.createElement("a"), {href, download}).click();
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  } catch (error) {
    complain(error.message);
  }
}

function listen() {
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) takeFile(file, file.name);
    $("file").value = ""; // the same file may be chosen again
  });
  $("camera").addEventListener("click", openCamera);
  $("video").addEventListener("loadeddata", () => { $("shoot").disabled = false; });
  $("shoot").addEventListener("click", shoot);
  $("camera-dialog").addEventListener("close", closeCamera);
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (!file) return;
    event.preventDefault();
    takeFile(file, file.name || "pasted.png");
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      const [file] = kind === "drop" ? event.dataTransfer.files : [];
      if (file) takeFile(file, file.name);
    });
  }
  for (const id of ["denoising", "smoothing", "least"]) $(id).addEventListener("input", () => ask(60));
  $("model").addEventListener("change", changeModel);
  for (const id of ["method", "windows", "views"]) $(id).addEventListener("change", () => ask(0));
  for (const id of ["window", "stride"]) $(id).addEventListener("input", () => { if ($("windows").checked) ask(500); });
  for (const id of ["background", "pamr"]) $(id).addEventListener("input", () => ask(500));
  $("hold").addEventListener("click", () => comparison.toggle(state, paint));
  $("split").addEventListener("input", () => comparison.split());
  $("opacity").addEventListener("input", () => paint());
  $("back").addEventListener("click", showAll);
  $("get-export").addEventListener("change", getExport);
  $("canvas").addEventListener("mousemove", (event) => {
    const {label, probability} = pointed(event);
    single(label);
    $("pointed").textContent = `${state.answer.classes[label].class}: probability ${probability.toFixed(2)} here`;
  });
  $("canvas").addEventListener("mouseleave", () => {
    single(null);
    if (state.heat === null) $("pointed").textContent = HINT;
  });
  $("canvas").addEventListener("click", (event) => showHeat(pointed(event).label));
}

async function start() {
  listen();
  try {
    state.choices = await call("/api/options");
  } catch (error) {
    return complain(error.message);
  }
  const option = (name) => new Option(name, name);
  $("model").append(...state.choices.models.map(option));
  $("method").append(...state.choices.methods.map(option));
  const sets = {...state.choices.class_sets, ...state.choices.students};
  state.words = new Words($("words"), $("suggestions"), $("class-set"), sets, ask);
  const own = state.choices.prompt_denoising;
  if (own) $("denoising").title = `recommended for ${state.choices.models[0]}: ${own}`;
  addScenes(state.choices.scenes);
  changeModel();
  document.body.dataset.ready = "yes";
}

start();
