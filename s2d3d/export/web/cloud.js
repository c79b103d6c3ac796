// From the points of a file to the cloud that the model sees, as s2d3d/datasets/files.py and precision.py do it.
"use strict";

import {Generator, readObj, readOff, sampleMesh} from "./mesh.js";
import {readPcd} from "./pcd.js";
import {readPly} from "./ply.js";
import {readTable} from "./table.js";
import {FileError, general} from "./text.js";

const READERS = {
  ".ply": readPly, ".pcd": readPcd, ".off": readOff, ".obj": readObj, ".xyz": readTable, ".txt": readTable,
  ".csv": readTable, ".pts": readTable,
};
const SUFFIXES = Object.keys(READERS);
const FEW_STEPS = 32;  // a cloud that spans at most so many steps of its numbers has lost its shape
const FAR_RADII = 64;  // from so many radii off the origin on, a cloud is centred in float64
const MAX_COORDINATE = 1e18;
const SURFACE_POINTS = 2;  // drawn from a mesh for each one that is wanted
const MOST_POINTS = 65536;  // a larger cloud is first thinned to this, evenly in the order of its points
const MIN_EXTENT = 1 / MAX_COORDINATE;
const TINY = 1.1754943508222875e-38;

// The points of a file, (N, 3) float64 one after the other, and what to tell about them.
function readPoints(name, bytes, facts) {
  const suffix = name.includes(".") ? name.slice(name.lastIndexOf(".")).toLowerCase() : "", notes = [];
  if (!(suffix in READERS)) throw new FileError(`unknown kind of file (known here: ${SUFFIXES.join(", ")})`);
  const {points, faces} = READERS[suffix](bytes, suffix);
  if (!points.length) throw new FileError(`holds no points, or is not a ${suffix} file`);
  if (faces && faces.length) {
    const used = usedVertices(points, faces), unused = (points.length - used.length) / 3;
    if (2 * used.length < points.length) {
      throw new FileError(`${unused} of its ${points.length / 3} vertices are corners of no face, and points are drawn `
        + "from faces alone; remove these vertices, or the faces if it is a cloud");
    }
    if (used.every(Number.isFinite)) checkExtent(used, "");
    const count = SURFACE_POINTS * facts.num_points;
    notes.push(`a mesh: ${count} points are drawn from its surface`);
    return {points: sampleMesh(points, faces, count, new Generator(facts.mesh_generator)), notes};
  }
  const kept = finitePoints(points), missing = (points.length - kept.length) / 3;
  if (!kept.length) throw new FileError(`none of its ${missing} points is three finite numbers`);
  if (missing) notes.push(`${missing} of ${points.length / 3} points are not finite and left out`);
  checkExtent(kept, "");
  return {points: kept, notes};
}

function usedVertices(points, faces) {
  const used = Array.from(new Set(faces)), found = new Float64Array(3 * used.length);
  used.forEach((vertex, i) => found.set(points.subarray(3 * vertex, 3 * vertex + 3), 3 * i));
  return found;
}

function finitePoints(points) {
  const kept = new Float64Array(points.length);
  let filled = 0;
  for (let i = 0; i < points.length; i += 3) {
    if (Number.isFinite(points[i]) && Number.isFinite(points[i + 1]) && Number.isFinite(points[i + 2])) {
      kept.set(points.subarray(i, i + 3), filled);
      filled += 3;
    }
  }
  return kept.subarray(0, filled);
}

// Whether every number is one of float32, as in files of that type and texts written from it.
function isSingle(points) {
  return points.every(value => Math.fround(value) === value);
}

// The step from a number to the next one of its type.
function spacing(value, single) {
  const exponent = value === 0 ? -2000 : Math.floor(Math.log2(value));
  const [bits, least] = single ? [23, -126] : [52, -1022];
  let step = Math.max(exponent, least);
  if (2 ** step > value && step > least) step -= 1;  // log2 may round up
  if (2 ** (step + 1) <= value) step += 1;
  return 2 ** (step - bits);
}

function bounds(points) {
  const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
  for (let i = 0; i < points.length; i++) {
    if (points[i] < low[i % 3]) low[i % 3] = points[i];
    if (points[i] > high[i % 3]) high[i % 3] = points[i];
  }
  return {low, high};
}

// Refuse a cloud whose points are equal, or so far from the origin that its numbers cannot tell them apart.
function checkExtent(points, what) {
  const {low, high} = bounds(points);
  const extent = Math.max(...high.map((value, i) => value - low[i])), offset = Math.max(...high, ...low.map(value => -value));
  if (offset > MAX_COORDINATE) throw new FileError(`${what}holds coordinates above 1e+18; scale it down`);
  if (extent === 0) throw new FileError(`${what}all ${points.length / 3} points are equal, a cloud without extent`);
  if (extent < MIN_EXTENT) throw new FileError(`${what}spans ${general(extent)}, must be at least 1e-18; scale it up`);
  const lost = single => extent <= FEW_STEPS * spacing(single ? Math.fround(offset) : offset, single);
  if (lost(true) && (isSingle(points) || lost(false))) {
    throw new FileError(`${what}spans ${general(extent)} at a distance of ${general(offset)} from the origin, a few `
      + "steps of the numbers it is stored in, so its shape is lost; move it to the origin before storing it");
  }
}

function centred(points) {
  const sum = [0, 0, 0], count = points.length / 3;
  for (let i = 0; i < points.length; i++) sum[i % 3] += points[i];
  return points.map((value, i) => value - sum[i % 3] / count);
}

// Move the mean to the origin and scale the farthest point to distance 1, in float32.
function normalizeSphere(points) {
  const count = points.length / 3, sum = [0, 0, 0];
  for (let i = 0; i < points.length; i++) sum[i % 3] += points[i];
  const center = sum.map(value => Math.fround(value / count)), moved = points.map((value, i) => value - center[i % 3]);
  let radius = 0;
  for (let i = 0; i < moved.length; i += 3) radius = Math.max(radius, Math.hypot(moved[i], moved[i + 1], moved[i + 2]));
  radius = Math.max(Math.fround(radius), TINY);
  if (Math.hypot(...center) > FAR_RADII * radius) return normalizeSphere(Float32Array.from(centred(Float64Array.from(points))));
  return moved.map(value => value / radius);
}

// Indices of points, each as far as possible from those before; the first is 0.
function farthestPoints(points, count) {
  const total = points.length / 3, distance = new Float32Array(total).fill(Infinity), chosen = [0], fround = Math.fround;
  while (chosen.length < count) {
    const last = 3 * chosen[chosen.length - 1], x = points[last], y = points[last + 1], z = points[last + 2];
    let best = 0;
    for (let i = 0; i < total; i++) {
      const dx = fround(points[3 * i] - x), dy = fround(points[3 * i + 1] - y), dz = fround(points[3 * i + 2] - z);
      const squared = fround(fround(fround(dx * dx) + fround(dy * dy)) + fround(dz * dz));
      if (squared < distance[i]) distance[i] = squared;
      if (distance[i] > distance[best]) best = i;
    }
    chosen.push(best);
  }
  return chosen;
}

function takePoints(points, chosen) {
  const taken = new Float32Array(3 * chosen.length);
  chosen.forEach((index, i) => taken.set(points.subarray(3 * index, 3 * index + 3), 3 * i));
  return taken;
}

// The cloud that the model sees: {points: (N, 3) float32, notes}. `upAxis` is the vertical of the file.
function prepareCloud(name, bytes, facts, upAxis) {
  let {points, notes} = readPoints(name, bytes, facts);
  const count = points.length / 3, wanted = facts.num_points;
  const least = Math.min(facts.min_points, wanted), free = facts.free_dimensions.includes("points");
  if (count < least || (count < wanted && !free)) {
    throw new FileError(`${count} points are fewer than the ${free ? least : wanted} that the model needs`);
  }
  if (count < wanted) notes.push(`holds ${count} points, the model takes ${wanted}; all are used`);
  if (facts.normalize === "unit_sphere" && !isSingle(points)) points = centred(points);
  else if (facts.normalize !== "unit_sphere") checkExtent(Float64Array.from(Float32Array.from(points)), "not normalised: ");
  let cloud = turn(Float32Array.from(points), upAxis, facts.up_axis);
  if (facts.normalize === "unit_sphere") cloud = normalizeSphere(cloud);
  if (count > wanted) {
    const most = Math.max(MOST_POINTS, SURFACE_POINTS * wanted);
    if (count > most) cloud = takePoints(cloud, Array.from({length: most}, (_, i) => Math.floor(i * count / most)));
    cloud = takePoints(cloud, farthestPoints(cloud, wanted));
    notes.push(`${wanted} of ${count} points, chosen by farthest point sampling`);
  }
  return {points: cloud, notes};
}

// Turn a cloud so that what pointed along one axis points along the other; nothing is mirrored.
function turn(points, source, target) {
  if (source === target) return points;
  const turned = new Float32Array(points.length);
  for (let i = 0; i < points.length; i += 3) {
    const [x, y, z] = [points[i], points[i + 1], points[i + 2]];
    turned.set(source === "y" ? [x, -z, y] : [x, z, -y], i);
  }
  return turned;
}

export {SUFFIXES, farthestPoints, prepareCloud, readPoints, turn};
