// PLY files, as s2d3d/datasets/ply.py reads them: what a header announces is compared with what is there first.
"use strict";

import {fanTriangles} from "./mesh.js";
import {FileError, latin, parseLines, parseRows, quoted} from "./text.js";

const TYPES = {
  char: "i1", int8: "i1", uchar: "u1", uint8: "u1", short: "i2", int16: "i2", ushort: "u2", uint16: "u2", int: "i4",
  int32: "i4", uint: "u4", uint32: "u4", float: "f4", float32: "f4", double: "f8", float64: "f8",
};
const FORMATS = {ascii: "", binary_little_endian: "<", binary_big_endian: ">"};
const READERS = {
  i1: "getInt8", u1: "getUint8", i2: "getInt16", u2: "getUint16", i4: "getInt32", u4: "getUint32", f4: "getFloat32",
  f8: "getFloat64",
};
const LONGEST_HEADER = 2 ** 20, MAX_HEADER_LINES = 10000;
const sizeOf = type => Number(type[1]);

function readPly(bytes) {
  const {order, elements, start, line} = readHeader(bytes);
  return order ? readBinary(bytes, start, order === "<", elements) : readAscii(bytes, start, line, elements);
}

function readHeader(bytes) {
  const text = latin(bytes.subarray(0, LONGEST_HEADER)), found = /^ply[^\S\r\n]*(\r\n|\n|\r)/.exec(text);
  if (!found) throw new FileError("holds no points, or is not a .ply file: its first line must be ply");
  let order = null, start = found[0].length;
  const elements = [], mark = found[1];
  for (let line = 2; line < MAX_HEADER_LINES; line++) {
    const end = text.indexOf(mark, start);
    if (end < 0) break;
    const words = text.slice(start, end).trim().split(/\s+/);
    start = end + mark.length;
    if (words.length === 1 && words[0] === "end_header") {
      if (order === null || !elements.some(element => element.name === "vertex")) {
        throw new FileError("its header names no format or no vertices; is it damaged?");
      }
      return {order, elements, start, line: line + 1};
    }
    const taken = takeLine(words, order, elements);
    if (taken === undefined) throw new FileError(`line ${line}: ${quoted(words.join(" "))} is no line of a PLY header; is it damaged?`);
    order = taken;
  }
  throw new FileError("is cut short: its header has no end_header");
}

// Take a line of the header in; return the byte order as far as it is known, undefined for a wrong line.
function takeLine(words, order, elements) {
  if (!words[0] || words[0] === "comment" || words[0] === "obj_info") return order;
  if (words[0] === "format") {
    return order === null && words.length === 3 && words[2] === "1.0" && words[1] in FORMATS ? FORMATS[words[1]] : undefined;
  }
  if (words[0] === "element" && words.length === 3 && /^\d+$/.test(words[2])) {
    if (elements.some(element => element.name === words[1])) return undefined;
    elements.push({name: words[1], count: Number(words[2]), properties: []});
    return order;
  }
  if (words[0] !== "property" || !elements.length) return undefined;
  const list = words[1] === "list", properties = elements[elements.length - 1].properties;
  const item = {name: words[words.length - 1], type: TYPES[words[list ? 3 : 1]], counts: list ? TYPES[words[2]] : null};
  if (words.length !== (list ? 5 : 3) || !item.type || item.counts === undefined) return undefined;
  if (properties.some(other => other.name === item.name)) return undefined;
  properties.push(item);
  return order;
}

// Where x, y and z stand, or the corners of faces; X is taken for x where there is no x.
function wantedOf(element) {
  const place = name => {
    const names = element.properties.map(item => item.name);
    return names.includes(name) ? names.indexOf(name) : names.indexOf(name.toUpperCase());
  };
  if (element.name === "vertex") {
    const axes = ["x", "y", "z"].map(place);
    if (axes.some(axis => axis < 0 || element.properties[axis].counts !== null)) {
      throw new FileError("its vertices have no x, y and z; name the properties so");
    }
    return axes;
  }
  const hasCorners = place("vertex_indices") >= 0 || place("vertex_index") >= 0;
  if (element.count && (element.name === "tristrips" || (element.name === "face" && !hasCorners))) {
    throw new FileError(`its ${element.name} cannot be read (no vertex_indices); save triangles`);
  }
  const corners = element.name === "face" ? Math.max(place("vertex_indices"), place("vertex_index")) : -1;
  return corners < 0 ? [] : [corners];
}

function checkProperties(elements) {
  for (const {name, count, properties} of elements) {
    if (count && !properties.length) throw new FileError(`announces ${count} rows of '${name}' without properties`);
  }
}

function readAscii(bytes, start, line, elements) {
  let text = latin(bytes.subarray(start));
  if (!text.includes("\n")) text = text.replaceAll("\r", "\n");
  const lines = text.split("\n"), there = lines.length - (lines[lines.length - 1] === "" ? 1 : 0);
  checkProperties(elements);
  const announced = elements.reduce((sum, element) => sum + element.count, 0);
  if (announced > there) throw new FileError(`is cut short: ${announced} rows are announced, ${there} lines follow the header`);
  let at = 0, points = null, corners = [], counts = [];
  for (const element of elements) {
    const begin = at, wanted = wantedOf(element), options = {first: line + begin};
    for (let left = element.count; left && at < lines.length; at++) {
      if (lines[at].trim()) left--;  // blank lines are passed over
    }
    const part = lines.slice(begin, at);
    if (element.name === "vertex" && element.properties.every(item => item.counts === null)) {
      points = parseRows(part, element.properties.length, wanted, options);
      if (points.length !== 3 * element.count) {
        throw new FileError(`holds ${points.length / 3} of ${element.count} vertices; is it cut short?`);
      }
      continue;
    }
    if (!wanted.length) continue;
    const found = [];
    let rows = 0;
    for (const row of parseLines(part, options)) {
      const places = walk(row.values, element.properties);
      if (!places) throw new FileError(`line ${row.line}: a row of '${element.name}' is cut short or too long`);
      for (const place of wanted) for (let k = places[place][0]; k < places[place][1]; k++) found.push(row.values[k]);
      if (element.name === "face") counts.push(places[wanted[0]][1] - places[wanted[0]][0]);
      rows++;
    }
    if (rows !== element.count) throw new FileError(`holds ${rows} of ${element.count} rows of '${element.name}'; is it cut short?`);
    if (element.name === "vertex") points = Float64Array.from(found);
    else corners = found;
  }
  refuseRest(lines.slice(at).join("\n"));
  return {points, faces: fanTriangles(corners, counts, points)};
}

// Where each property of a row lies among its numbers; null if they are too few or too many.
function walk(values, properties) {
  const places = [];
  let at = 0;
  for (const item of properties) {
    let length = 1;
    if (item.counts !== null) {
      if (at >= values.length || !(values[at] >= 0 && values[at] <= values.length && Number.isInteger(values[at]))) return null;
      length = values[at++];
    }
    places.push([at, at + length]);
    at += length;
  }
  return at === values.length ? places : null;
}

function refuseRest(text) {
  const rest = text.replace(/^[\0\r\n\t ]+|[\0\r\n\t ]+$/g, "");
  if (rest) throw new FileError(`holds ${rest.length} bytes more than its header announces; is it damaged?`);
}

function readBinary(bytes, start, little, elements) {
  checkProperties(elements);
  const least = ({properties}) => properties.reduce((sum, item) => sum + sizeOf(item.counts || item.type), 0);
  const announced = elements.reduce((sum, element) => sum + element.count * least(element), 0);
  if (announced > bytes.length - start) {
    throw new FileError(`is cut short: ${announced} bytes are announced, ${bytes.length - start} follow the header`);
  }
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const take = (type, place) => view[READERS[type]](place, little);
  let points = null, corners = [], counts = [], at = start;
  for (const element of elements) {
    const wanted = wantedOf(element), isVertex = element.name === "vertex";
    if (isVertex) points = new Float64Array(3 * element.count);
    for (let row = 0; row < element.count; row++) {
      element.properties.forEach((item, place) => {
        let size = 1;
        const cut = () => {
          const text = `${element.count} rows of '${element.name}' are announced, ${row} are there`;
          return new FileError(`is cut short or damaged: ${text}`);
        };
        if (item.counts !== null) {
          if (at + sizeOf(item.counts) > bytes.length) throw cut();
          size = take(item.counts, at);
          at += sizeOf(item.counts);
        }
        const step = sizeOf(item.type);
        if (!(size >= 0 && Number.isInteger(size)) || at + size * step > bytes.length) throw cut();
        if (isVertex && wanted.includes(place)) points[3 * row + wanted.indexOf(place)] = take(item.type, at);
        else if (!isVertex && wanted[0] === place) {
          for (let k = 0; k < size; k++) corners.push(take(item.type, at + k * step));
          counts.push(size);
        }
        at += size * step;
      });
    }
  }
  refuseRest(latin(bytes.subarray(at)));
  return {points, faces: fanTriangles(corners, counts, points)};
}

export {readPly};
