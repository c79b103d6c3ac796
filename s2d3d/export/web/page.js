// The page: takes a file, shows its cloud, the classes, and what the answer depends on.
"use strict";

import {SUFFIXES, prepareCloud, turn} from "./cloud.js";
import {Model, ModelError} from "./model.js";
import {FileError} from "./text.js";
import {CloudView} from "./viewer.js";

const SHOWN = 5;  // classes
const LARGEST = 300e6;  // bytes of a file
const COLD = [214, 219, 226], WARM = [194, 65, 12];
const byId = id => document.getElementById(id);
const percent = share => `${(100 * share).toFixed(1)}\u00a0%`;

let model = null, view = null, latest = 0, file = null, matters = null;

function state(name, message = "") {
  document.body.dataset.state = name;
  byId("message").textContent = message;
}

function fail(error, what = "") {
  console.info(error);
  clear();
  const known = error instanceof FileError || error instanceof ModelError;
  state("error", what + (known ? error.message : `cannot be read: ${String(error.message || error).split("\n")[0]}`));
}

function clear() {
  view = matters = null;
  for (const id of ["classes", "notes", "effect"]) byId(id).replaceChildren();
  byId("result").hidden = true;
  byId("coloured").disabled = true;
  byId("coloured").value = "height";
}

function line(text) {
  return Object.assign(document.createElement("p"), {textContent: text});
}

function showClasses(shares) {
  const order = shares.map((_, i) => i).sort((a, b) => shares[b] - shares[a]);
  byId("classes").replaceChildren(...order.slice(0, SHOWN).map(label => {
    const row = document.createElement("li"), name = document.createElement("span"), bar = document.createElement("meter");
    name.textContent = `${model.facts.class_names[label]} ${percent(shares[label])}`;
    bar.value = shares[label];
    row.dataset.name = model.facts.class_names[label];
    row.dataset.share = shares[label];
    row.append(name, bar);
    return row;
  }));
  return order[0];
}

function showEffect(label, share, {owner, falls, left}) {
  const most = falls.indexOf(Math.max(...falls)), name = model.facts.class_names[label];
  const scale = Math.max(falls[most], 0.5);  // a fall that hardly changes the answer stays pale
  matters = owner.map(patch => COLD.map((cold, k) => cold + Math.max(0, falls[patch] / scale) * (WARM[k] - cold)));
  const found = falls[most] > 0 ? `Without the one that matters most, ${name} falls from ${percent(share)} to ${percent(left[most])}.`
    : `Without any one of them, ${name} does not fall.`;
  byId("effect").replaceChildren(line(`The cloud is cut into ${new Set(owner).size} patches. Each is removed in turn: its points `
    + `become copies of the other points, and the model is asked again. ${found}`));
  byId("effect").dataset.left = left[most];
  byId("coloured").disabled = false;
}

async function classify(given) {
  const own = ++latest, stopped = () => own !== latest;
  file = given;
  clear();
  state("working", `${given.name}: reading`);
  try {
    if (given.size > LARGEST) throw new FileError(`${(given.size / 1e6).toFixed(0)} MB are too many for a page; use s2d3d predict`);
    const bytes = new Uint8Array(await given.arrayBuffer());
    if (stopped()) return;
    const {points, notes} = prepareCloud(given.name, bytes, model.facts, byId("up").value);
    state("working", `${given.name}: classifying`);
    await new Promise(resolve => setTimeout(resolve));  // lets the page show that
    const [shares] = await model.classify([points]);
    if (stopped()) return;
    const label = showClasses(shares);
    byId("notes").replaceChildren(...notes.map(line));
    byId("result").hidden = false;
    view = new CloudView(byId("cloud"), turn(points, model.facts.up_axis, "z"));
    state("classified", `${given.name}: looking for the points that matter`);
    const effect = await model.explain(points, label, shares[label], stopped);
    if (stopped()) return;
    showEffect(label, shares[label], effect);
    state("done", given.name);
  } catch (error) {
    if (!stopped()) fail(error, `${given.name}: `);
  }
}

function spin() {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (view && !view.touched && !still) {
    view.azimuth += 0.008;
    view.draw();
  }
  requestAnimationFrame(spin);
}

function listen() {
  byId("file").onchange = event => event.target.files[0] && classify(event.target.files[0]);
  byId("up").onchange = () => file && classify(file);
  byId("coloured").onchange = event => view && view.color(event.target.value === "matters" ? matters : null);
  const body = document.body;
  body.ondragover = event => { event.preventDefault(); body.classList.add("over"); };
  body.ondragleave = () => body.classList.remove("over");
  body.ondrop = event => {
    event.preventDefault();
    body.classList.remove("over");
    const dropped = event.dataTransfer.files;
    if (dropped.length) classify(dropped[0]);
  };
  byId("file").accept = SUFFIXES.join(",");
  byId("kinds").textContent = SUFFIXES.join(", ");
  byId("up").value = model.facts.files_up_axis === "y" ? "y" : "z";
  byId("file").disabled = byId("up").disabled = false;
  spin();
}

state("loading", "loading the model");
Model.open().then(opened => {
  model = opened;
  const {class_names: names, num_points: count, model: name} = model.facts;
  byId("about").textContent = `${name}: ${count} points, ${names.length} classes (${names.slice(0, 12).join(", ")}${names.length > 12 ? ", ..." : ""})`;
  listen();
  state("ready");
}, error => fail(error));
