// PCD files of the Point Cloud Library, as s2d3d/datasets/pcd.py reads them: ascii, binary or binary_compressed.
"use strict";

import {FileError, latin, parseRows, quoted} from "./text.js";

const MAX_HEADER = 2 ** 16;
const MAX_EXPANSION = 100;  // above the largest ratio that LZF reaches: 264 bytes from 3
const READERS = {
  I1: "getInt8", I2: "getInt16", I4: "getInt32", I8: "getBigInt64", U1: "getUint8", U2: "getUint16", U4: "getUint32",
  U8: "getBigUint64", F4: "getFloat32", F8: "getFloat64",
};

function readPcd(bytes) {
  const {header, start, line} = readHeader(bytes);
  const broken = new FileError("not a PCD file, or its header is damaged");
  const whole = key => (header[key] || []).map(word => (/^[-+]?\d+$/.test(word) ? Number(word) : NaN));
  if (!["FIELDS", "SIZE", "TYPE"].every(key => header[key])) throw broken;
  const names = header.FIELDS.map(name => name.toLowerCase()), sizes = whole("SIZE");
  const counts = header.COUNT ? whole("COUNT") : names.map(() => 1);
  const kinds = header.TYPE.map((kind, i) => kind.toUpperCase() + sizes[i]);
  const one = key => (header[key] ? whole(key)[0] : null), [width, height, given] = [one("WIDTH"), one("HEIGHT"), one("POINTS")];
  const numbers = [width, height, given].filter(value => value !== null);
  if (!names.length || sizes.length !== names.length || counts.length !== names.length || kinds.length !== names.length
      || header.DATA.length !== 1 || numbers.some(value => !Number.isInteger(value))
      || !counts.every(count => count >= 0 && count <= MAX_HEADER) || !kinds.every(kind => kind in READERS)) throw broken;
  if (["x", "y", "z"].some(axis => names.filter(name => name === axis).length !== 1 || counts[names.indexOf(axis)] !== 1)) {
    throw new FileError(`its fields are ${quoted(names.join(" "))}; x, y and z are needed`);
  }
  const area = width === null ? null : width * (height === null ? 1 : height), points = given === null ? area : given;
  if (points === null || points < 0 || (area !== null && area !== points)) {
    throw new FileError(`announces ${points} points and ${width} x ${height}; is its header damaged?`);
  }
  const axes = ["x", "y", "z"].map(axis => names.indexOf(axis)), form = header.DATA[0];
  if (form === "ascii") return {points: readAscii(bytes, start, line, counts, axes, points), faces: null};
  const offsets = [];
  const record = counts.reduce((sum, count, i) => (offsets.push(sum), sum + count * sizes[i]), 0);
  const wanted = points * record;
  if (form === "binary") {
    checkLength(bytes, wanted, start);
    return {points: columns(bytes, points, axes, kinds, (axis, row) => start + row * record + offsets[axis]), faces: null};
  }
  if (form !== "binary_compressed") throw new FileError(`its data are ${quoted(form, 30)}, must be ascii, binary or binary_compressed`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length), room = Math.max(0, bytes.length - start - 8);
  const [packed, unpacked] = bytes.length >= start + 8 ? [view.getUint32(start, true), view.getUint32(start + 4, true)] : [0, -1];
  if (unpacked !== wanted || packed > room || unpacked > MAX_EXPANSION * packed) {
    throw new FileError(`is cut short or damaged: ${points} points take ${wanted} bytes, ${unpacked} are announced, packed in ${packed} of ${room} bytes`);
  }
  checkLength(bytes, packed + 8, start);
  const flat = unpackLzf(bytes.subarray(start + 8, start + 8 + packed), wanted);
  if (flat === null) throw new FileError("is damaged: its points cannot be unpacked");
  return {points: columns(flat, points, axes, kinds, (axis, row) => points * offsets[axis] + row * sizes[axis]), faces: null};
}

// The words of each line of the header, where the points begin, and the number of that line.
function readHeader(bytes) {
  const text = latin(bytes.subarray(0, 2 * MAX_HEADER)), header = Object.create(null);
  let start = 0, line = 1;
  while (start < Math.min(bytes.length, MAX_HEADER)) {
    const end = text.indexOf("\n", start) + 1 || text.length;
    const [word, ...rest] = text.slice(start, end).split("#", 1)[0].trim().split(/\s+/);
    start = end;
    line++;
    const key = word.toUpperCase();
    if (word && key in header) throw new FileError(`line ${line - 1}: a second ${quoted(word, 20)} in its header; is it damaged?`);
    if (word) header[key] = rest;
    if (key === "DATA") return {header, start, line};
  }
  throw new FileError("holds no points, or is not a .pcd file: its header has no DATA");
}

function readAscii(bytes, start, line, counts, axes, points) {
  const text = latin(bytes.subarray(start)), lines = text.split("\n");
  const room = lines.length - (lines[lines.length - 1] === "" ? 1 : 0);
  if (points > room) throw new FileError(`is cut short: ${points} points are announced, ${room} lines follow the header`);
  const places = [];
  const width = counts.reduce((sum, count) => (places.push(sum), sum + count), 0);
  const found = parseRows(lines, width, axes.map(axis => places[axis]), {first: line});
  if (found.length !== 3 * points) {
    const state = found.length < 3 * points ? "is cut short" : "is damaged";
    throw new FileError(`${state}: ${points} points are announced, ${found.length / 3} rows follow the header`);
  }
  return found;
}

function checkLength(bytes, wanted, start) {
  const there = bytes.length - start;
  if (there < wanted) throw new FileError(`is cut short: its points take ${wanted} bytes, ${there} follow the header`);
  if (latin(bytes.subarray(start + wanted)).replace(/[\0\r\n ]/g, "")) {
    throw new FileError(`holds ${there - wanted} bytes more than its header announces; is it damaged?`);
  }
}

function columns(bytes, points, axes, kinds, place) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length), found = new Float64Array(3 * points);
  axes.forEach((axis, k) => {
    const read = READERS[kinds[axis]];
    for (let row = 0; row < points; row++) found[3 * row + k] = Number(view[read](place(axis, row), true));
  });
  return found;
}

// What liblzf packed into exactly `size` bytes; null if it is damaged.
function unpackLzf(packed, size) {
  const found = new Uint8Array(size);
  let at = 0, filled = 0;
  while (at < packed.length) {
    const control = packed[at++];
    if (control < 32) {  // so many bytes and one as they are
      if (at + control + 1 > packed.length || filled + control + 1 > size) return null;
      found.set(packed.subarray(at, at + control + 1), filled);
      at += control + 1;
      filled += control + 1;
      continue;
    }
    let length = control >> 5;
    if (length === 7) {
      if (at >= packed.length) return null;
      length += packed[at++];
    }
    if (at >= packed.length) return null;
    const distance = (((control & 31) << 8) | packed[at++]) + 1;
    length += 2;
    if (distance > filled || filled + length > size) return null;
    for (let k = 0; k < length; k++, filled++) found[filled] = found[filled - distance];
  }
  return filled === size ? found : null;
}

export {readPcd};
