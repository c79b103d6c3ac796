// The model: its facts from model.json, its answers by ONNX Runtime, and the parts of a cloud that matter for an answer.
"use strict";

import * as ort from "./runtime/ort.js";
import {farthestPoints} from "./cloud.js";

const PATCHES = 32;
const AT_ONCE = 8;  // clouds of one run
const LEAST_PATCH = 8;  // points of a patch, on average

class ModelError extends Error {}

async function load(address, what) {
  let answer;
  try {
    answer = await fetch(address);
  } catch {
    throw new ModelError(`${what} cannot be loaded; is the server still there?`);
  }
  if (!answer.ok) throw new ModelError(`${what} is missing beside this page (${answer.status}); export the page again`);
  return answer;
}

function checkFacts(facts) {
  const whole = value => Number.isInteger(value) && value >= 1, names = facts.class_names;
  if (facts.channels !== "xyz") {
    throw new ModelError(`the model takes the channels ${facts.channels}; this page reads x, y and z only`);
  }
  if (!whole(facts.num_points) || !whole(facts.min_points) || !Array.isArray(facts.free_dimensions)
      || !Array.isArray(names) || !names.length || !["y", "z"].includes(facts.up_axis)
      || !["unit_sphere", "none"].includes(facts.normalize) || !facts.mesh_generator) {
    throw new ModelError("model.json is damaged; export the page again");
  }
}

class Model {
  static async open() {
    const facts = await (await load("model.json", "model.json")).json().catch(() => {
      throw new ModelError("model.json is damaged; export the page again");
    });
    checkFacts(facts);
    const file = await (await load(facts.file, facts.file)).arrayBuffer();
    const place = name => new URL(`runtime/${name}`, import.meta.url).href;
    ort.env.wasm.wasmPaths = {mjs: place("ort-wasm.js"), wasm: place("ort-wasm.wasm")};
    ort.env.wasm.numThreads = 1;  // more need headers that a plain server does not send
    const session = await ort.InferenceSession.create(file, {executionProviders: ["wasm"]}).catch(error => {
      throw new ModelError(`${facts.file} cannot be run (${String(error.message || error).split("\n")[0]}); export the page again`);
    });
    return new Model(facts, session);
  }

  constructor(facts, session) {
    this.facts = facts;
    this.session = session;
  }

  // Probabilities of the classes for clouds of equally many points.
  async classify(clouds) {
    const flat = new Float32Array(clouds.reduce((sum, cloud) => sum + cloud.length, 0));
    clouds.forEach((cloud, i) => flat.set(cloud, i * cloud.length));
    const tensor = new ort.Tensor("float32", flat, [clouds.length, clouds[0].length / 3, 3]);
    const {logits} = await this.session.run({points: tensor});
    const classes = logits.data.length / clouds.length;
    return clouds.map((_, i) => softmax(Array.from(logits.data.subarray(i * classes, (i + 1) * classes))));
  }

  // What the answer depends on: the cloud is cut into patches around farthest points. Each patch is removed in turn: its
  // points become copies of other points, so that their number stays. Returns the patch of each point, and for each patch
  // how far the log-odds of the class fall without it, and the probability that is left.
  async explain(cloud, label, probability, stopped) {
    const count = cloud.length / 3, patches = Math.max(2, Math.min(PATCHES, Math.floor(count / LEAST_PATCH)));
    const owner = nearest(cloud, farthestPoints(cloud, Math.min(patches, count)));
    const numbers = Array.from(new Set(owner)), falls = new Float64Array(patches), left = new Float64Array(patches).fill(probability);
    for (let first = 0; first < numbers.length; first += AT_ONCE) {
      const part = numbers.slice(first, first + AT_ONCE), shares = await this.classify(part.map(patch => without(cloud, owner, patch)));
      part.forEach((patch, i) => {
        left[patch] = shares[i][label];
        falls[patch] = logOdds(probability) - logOdds(shares[i][label]);
      });
      await new Promise(resolve => setTimeout(resolve));  // lets the page answer between the runs
      if (stopped()) return null;
    }
    return {owner, falls, left};
  }
}

function softmax(logits) {
  if (!logits.every(Number.isFinite)) throw new ModelError("the model's output is not finite; export it again");
  const largest = Math.max(...logits), shares = logits.map(value => Math.exp(value - largest));
  const sum = shares.reduce((a, b) => a + b, 0);
  return shares.map(value => value / sum);
}

function logOdds(share) {
  const bounded = Math.min(1 - 1e-9, Math.max(1e-9, share));
  return Math.log(bounded / (1 - bounded));
}

// For each point, the number of the centre that is nearest.
function nearest(cloud, centres) {
  return Array.from({length: cloud.length / 3}, (_, i) => {
    let best = 0, least = Infinity;
    centres.forEach((centre, number) => {
      const squared = [0, 1, 2].reduce((sum, k) => sum + (cloud[3 * i + k] - cloud[3 * centre + k]) ** 2, 0);
      if (squared < least) [best, least] = [number, squared];
    });
    return best;
  });
}

function without(cloud, owner, patch) {
  const kept = owner.flatMap((own, i) => (own === patch ? [] : [i])), changed = cloud.slice();
  if (!kept.length) return changed;
  let next = 0;
  owner.forEach((own, i) => {
    if (own !== patch) return;
    const other = kept[next++ % kept.length];
    changed.set(cloud.subarray(3 * other, 3 * other + 3), 3 * i);
  });
  return changed;
}

export {Model, ModelError};
