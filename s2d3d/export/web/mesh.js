// Meshes: OFF and OBJ files, polygons cut into triangles, and points drawn from a surface, as s2d3d/datasets/mesh.py.
"use strict";

import {FileError, general, number, parseLines, quoted, readText, strip, withoutComments} from "./text.js";

// As in s2d3d/datasets/polygons.py.
const FOLDED = 1e-4, FLAT = 0.05, ROUNDED = 1e-5, NEGLIGIBLE = 1e-3;

// (F, 3) corners of triangles, one after the other, from polygons: their corners and how many each has.
function fanTriangles(corners, counts, points) {
  if (!counts.length) return null;
  const short = counts.findIndex(count => count < 3), numVertices = points.length / 3;
  if (short >= 0) throw new FileError(`face ${short} has ${counts[short]} corners, must have 3 or more`);
  const faces = new Int32Array(3 * counts.reduce((sum, count) => sum + count - 2, 0));
  let start = 0, filled = 0, crossing = 0, worst = [0, 0];
  counts.forEach((count, face) => {
    const polygon = corners.slice(start, start + count);
    if (!polygon.every(corner => Number.isInteger(corner) && corner >= 0 && corner < numVertices)) {
      throw new FileError(`a face names a vertex outside the ${numVertices} of the file (face ${face})`);
    }
    let fits = count === 3 || !isFolded(polygon, points);
    if (!fits) {
      polygon.push(polygon.shift());
      fits = !isFolded(polygon, points) || (count === 4 && !isFlat(polygon, points));
    }
    if (!fits) {
      const area = fanOf(polygon, points).reduce((sum, one) => sum + Math.hypot(...one), 0);
      crossing += area;
      if (area > worst[0]) worst = [area, face];
    }
    for (let k = 1; k < count - 1; k++) {
      faces[filled++] = polygon[0];
      faces[filled++] = polygon[k];
      faces[filled++] = polygon[k + 1];
    }
    start += count;
  });
  let total = 0;
  for (let t = 0; crossing && t < filled; t += 3) total += Math.hypot(...normalOf(points, ...faces.subarray(t, t + 3)));
  if (crossing > NEGLIGIBLE * total) {
    throw new FileError(`face ${worst[1]} is not convex, and this page cuts no such polygons; save triangles`);
  }
  return faces;
}

// Twice the area of a triangle, along its normal.
function normalOf(points, a, b, c) {
  const side = corner => [0, 1, 2].map(k => points[3 * corner + k] - points[3 * a + k]), p = side(b), q = side(c);
  return [p[1] * q[2] - p[2] * q[1], p[2] * q[0] - p[0] * q[2], p[0] * q[1] - p[1] * q[0]];
}

function fanOf(polygon, points) {
  return polygon.slice(1, -1).map((corner, k) => normalOf(points, polygon[0], corner, polygon[k + 2]));
}

function isFlat(polygon, points) {
  const normal = fanOf(polygon, points).reduce((most, one) => Math.hypot(...one) > Math.hypot(...most) ? one : most);
  const sides = polygon.map(corner => [0, 1, 2].map(k => points[3 * corner + k] - points[3 * polygon[0] + k]));
  const size = Math.max(...sides.flat().map(Math.abs));
  const far = Math.max(...polygon.flatMap(corner => [0, 1, 2].map(k => Math.abs(points[3 * corner + k]))));
  const off = Math.max(...sides.map(side => Math.abs(side[0] * normal[0] + side[1] * normal[1] + side[2] * normal[2])));
  return size > ROUNDED * far && off <= FLAT * size * Math.hypot(...normal);
}

// Whether a triangle of the fan of a polygon is turned over.
function isFolded(polygon, points) {
  const normals = fanOf(polygon, points);
  const normal = [0, 1, 2].map(k => normals.reduce((sum, one) => sum + one[k], 0));
  const dot = one => one[0] * normal[0] + one[1] * normal[1] + one[2] * normal[2], square = dot(normal);
  const area = normals.reduce((sum, one) => sum + Math.hypot(...one), 0);
  return normals.some(one => dot(one) < -FOLDED * square) || square < (FOLDED * area) ** 2;
}

const OFF = /^\s*((ST)?(C)?(N)?(4)?n?OFF)(\s+BINARY)?/i;

function readOff(bytes) {
  let text = readText(bytes);
  const headless = /^\s*(#[^\n]*\n\s*)*\d/.test(text);
  if (!OFF.test(text) && !headless && !OFF.test(withoutComments(text.slice(0, 10000)))) {
    throw new FileError("not an OFF file, its first word must be OFF");
  }
  text = withoutComments(text);
  const head = OFF.exec(text);
  if (head && (head[5] || head[6] || head[1].includes("nOFF"))) {  // with capitals otherwise, n is a dimension
    const kind = head[6] ? "binary" : "of four or n dimensions";
    throw new FileError(`an OFF file that is ${kind}, which is not read; write it as text in three dimensions`);
  }
  const start = head ? head[0].length : 0, rest = text.slice(start);
  const found = /^\s*(\d+)[^\S\n]+(\d+)(?:[^\S\n]+\d+(?=\s|$))?(?=\s|$)/.exec(rest) || /^\s*(\d+)\s+(\d+)\s+\d+(?=\s|$)/.exec(rest);
  if (!found) {
    const shown = quoted(rest.slice(0, 60).trim().split("\n")[0], 40);
    throw new FileError(`not an OFF file, ${shown} is not its numbers of vertices, faces and edges`);
  }
  const numVertices = Number(found[1]), numFaces = Number(found[2]), body = start + found[0].length;
  const first = text.slice(0, body).split("\n").length;
  const rows = [...parseLines(text.slice(body).split("\n"), {first, what: "not an OFF file: "})];
  const mesh = offLines(rows, numVertices, numFaces) || offStream(rows, head, numVertices, numFaces);
  if (mesh) return {points: mesh.points, faces: fanTriangles(mesh.corners, mesh.counts, mesh.points)};
  if (!head) throw new FileError("not an OFF file, its first word must be OFF, and its numbers fit no mesh");
  throw offError(rows, numVertices, numFaces);
}

// Each vertex and each face has its line.
function offLines(rows, numVertices, numFaces) {
  if (rows.length !== numVertices + numFaces) return null;
  const points = new Float64Array(3 * numVertices), corners = [], counts = [];
  for (let row = 0; row < rows.length; row++) {
    const {values} = rows[row];
    if (wrongRow(values, row < numVertices)) return null;
    if (row < numVertices) points.set(values.subarray(0, 3), 3 * row);
    else {
      counts.push(values[0]);
      for (let k = 1; k <= values[0]; k++) corners.push(values[k]);
    }
  }
  return {points, corners, counts};
}

function wrongRow(values, isVertex) {
  if (isVertex) return values.length < 3;
  return !(values[0] >= 3 && values[0] <= values.length - 1 && Number.isInteger(values[0]));
}

// A stream of numbers without additions that holds nothing more.
function offStream(rows, head, numVertices, numFaces) {
  const flat = Float64Array.from(rows.flatMap(({values}) => Array.from(values)));
  const width = 3 + 4 * Boolean(head && head[3]) + 3 * Boolean(head && head[4]) + 2 * Boolean(head && head[2]);
  let at = numVertices * width;
  if (at + 4 * numFaces > flat.length) return null;
  const points = new Float64Array(3 * numVertices), corners = [], counts = [];
  for (let row = 0; row < numVertices; row++) points.set(flat.subarray(row * width, row * width + 3), 3 * row);
  for (let face = 0; face < numFaces; face++) {
    if (!(flat[at] >= 3 && flat[at] <= flat.length && Number.isInteger(flat[at]))) return null;
    counts.push(flat[at]);
    for (let k = 1; k <= flat[at]; k++) corners.push(flat[at + k]);
    at += 1 + flat[at];
  }
  return at === flat.length ? {points, corners, counts} : null;
}

function offError(rows, numVertices, numFaces) {
  const announced = `${numVertices} vertices and ${numFaces} faces are announced`;
  if (rows.length < numVertices + numFaces) return new FileError(`is cut short: ${rows.length} lines follow, ${announced}`);
  const place = rows.findIndex(({values}, row) => row >= numVertices + numFaces || wrongRow(values, row < numVertices));
  if (place >= numVertices + numFaces) {
    const what = `${rows.length - place} lines more than ${numVertices} vertices and ${numFaces} faces take`;
    return new FileError(`not an OFF file: line ${rows[place].line} begins ${what}`);
  }
  const what = place < numVertices ? "vertex" : "face";
  const shown = quoted(Array.from(rows[place].values, value => general(value, 9)).join(" "));
  return new FileError(`not an OFF file: line ${rows[place].line} is no ${what}: ${what} ${shown}`);
}

function readObj(bytes) {
  const vertices = [], corners = [], counts = [];
  let pending = "";
  readText(bytes).split("\n").forEach((raw, index) => {
    let text = pending + strip(withoutComments(raw));
    pending = "";
    if (text.endsWith("\\")) {
      pending = text.slice(0, -1) + " ";
      return;
    }
    const [name, ...rest] = strip(text).split(/[ \t\n\r\v\f]+/), word = name.toLowerCase();
    if (word === "v") {
      const values = rest.slice(0, 3).map(number);
      if (values.length !== 3 || values.includes(undefined)) throw new FileError(`not an OBJ file: line ${index + 1} is no vertex: ${quoted(text)}`);
      if (rest.length === 4 && ![0, 1].includes(number(rest[3]))) {
        throw new FileError(`line ${index + 1}: a fourth number other than 1 is a weight: write three numbers`);
      }
      vertices.push(...values);
    } else if (word === "f" || word === "fo") {  // corners such as 3, 3/1/2 or -1, which counts from the last vertex so far
      const found = rest.map(corner => /^[-+]?\d+$/.test(corner.split("/", 1)[0]) ? Number(corner.split("/", 1)[0]) : 0);
      const soFar = vertices.length / 3;
      if (found.length < 3 || found.includes(0)) throw new FileError(`not an OBJ file: line ${index + 1} is no face: ${quoted(text)}`);
      if (Math.min(...found) < -soFar) throw new FileError(`line ${index + 1}: a face names a vertex outside the ${soFar} so far`);
      for (const corner of found) corners.push(corner > 0 ? corner - 1 : soFar + corner);
      counts.push(found.length);
    } else if (["surf", "curv", "curv2", "cstype"].includes(word)) {
      throw new FileError(`line ${index + 1}: free-form curves and surfaces are not read; convert it to a mesh`);
    }
  });
  if (strip(pending)) throw new FileError("is cut short: its last line goes on after a backslash");
  const points = Float64Array.from(vertices);
  return {points, faces: fanTriangles(corners, counts, points)};
}

// The random numbers of numpy.random.default_rng, from the state that model.json holds: PCG64, XSL-RR.
class Generator {
  constructor({state, increment}) {
    this.state = BigInt(state);
    this.increment = BigInt(increment);
  }

  random() {
    const mask = (1n << 128n) - 1n;
    this.state = (this.state * 47026247687942121848144207491837523525n + this.increment) & mask;
    const folded = (this.state >> 64n) ^ (this.state & 0xffffffffffffffffn), turn = this.state >> 122n;
    const bits = ((folded >> turn) | (folded << (64n - turn))) & 0xffffffffffffffffn;
    return Number(bits >> 11n) / 9007199254740992;
  }
}

// Points drawn evenly from a surface: those that `s2d3d predict` draws with --seed 0, up to rounding.
function sampleMesh(points, faces, count, generator) {
  const triangles = faces.length / 3, cumulative = new Float64Array(triangles);
  const corner = (triangle, which) => points.subarray(3 * faces[3 * triangle + which], 3 * faces[3 * triangle + which] + 3);
  let total = 0;
  for (let t = 0; t < triangles; t++) {
    const [a, b, c] = [corner(t, 0), corner(t, 1), corner(t, 2)];
    for (const vertex of [a, b, c]) {
      if (!vertex.every(Number.isFinite)) throw new FileError("a vertex of a face is not three finite numbers; correct it");
    }
    const [x, y, z] = normalOf(points, ...faces.subarray(3 * t, 3 * t + 3));
    total += Math.sqrt(x * x + y * y + z * z);
    cumulative[t] = total;
  }
  if (!total) throw new FileError("all triangles have area 0");
  const chosen = Array.from({length: count}, () => {
    const place = generator.random() * total;
    let low = 0, high = triangles - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (cumulative[middle] > place) high = middle;
      else low = middle + 1;
    }
    return low;
  });
  const us = chosen.map(() => generator.random()), vs = chosen.map(() => generator.random());
  const drawn = new Float64Array(3 * count);
  chosen.forEach((triangle, i) => {
    const [a, b, c] = [corner(triangle, 0), corner(triangle, 1), corner(triangle, 2)], fold = us[i] + vs[i] > 1;
    const [u, v] = fold ? [1 - us[i], 1 - vs[i]] : [us[i], vs[i]];
    for (let k = 0; k < 3; k++) drawn[3 * i + k] = a[k] + u * (b[k] - a[k]) + v * (c[k] - a[k]);
  });
  return drawn;
}

export {Generator, fanTriangles, readObj, readOff, sampleMesh};
