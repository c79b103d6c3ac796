// Tables of points, as s2d3d/datasets/tables.py reads them: .xyz, .txt, .csv and .pts.
"use strict";

import {FileError, number, parseRows, quoted, readText, splitFields} from "./text.js";

const SAMPLE = 50;  // rows from which the layout is told
const NUMERIC = /^(?:[\s\d+\-.,;eEnaifNAIF"]*\d[\s\d+\-.,;eEnaifNAIF"]*|[\s,;"]*[-+]?(?:nan|inf)\b.*)$/i;
const DECIMAL = /^(?:[-+]?\d*,\d+(?:[eE][-+]?\d+)?|[-+]?\d+(?:[eE][-+]?\d+)?)$/;
const WHAT = "cannot be read as a table: ";
const COUNTED = 16;  // rows from which a column is taken to count them

function readTable(bytes) {
  const lines = readText(bytes).split("\n");
  const layout = findLayout(lines);
  const rows = lines.slice(layout.index);
  const points = parseRows(rows, layout.columns, layout.axes, {...layout, first: layout.index + 1, what: WHAT});
  const count = points.length / 3;
  if (layout.count !== null && layout.count !== count) {
    throw new FileError(`announces ${layout.count} points and holds ${count}; is it cut short?`);
  }
  if ((count < 10 && layout.columns > 100) || (count === 3 && layout.columns !== 3 && layout.columns > 3)) {
    throw new FileError(`holds numbers of shape (${count}, ${layout.columns}); are points its columns? Transpose it: a row is a point`);
  }
  if (!layout.named) refuseCounts(points, layout);
  return {points, faces: null};
}

// Refuse the first of columns without names where it counts the rows, or its first number does.
function refuseCounts(points, layout) {
  const first = points.filter((_, i) => i % 3 === 0), count = first.length, step = first[1] - first[0], whole = Number.isInteger;
  if (count < COUNTED) return;
  if (layout.columns > 3 && step && whole(step) && whole(first[0]) && first.every((value, i) => !i || value - first[i - 1] === step)) {
    throw new FileError("its first column counts the rows; remove it, or name the columns in a first line: index x y z");
  }
  if (first[0] === count - 1 && !first.slice(1).every(whole)) {
    throw new FileError(`line ${layout.index + 1} begins with ${count - 1}, and as many rows follow; remove the line if it is their `
      + "number, or name the columns in a first line");
  }
}

// The first lines that are neither blank nor comments: where each stands, and its text.
function sample(lines) {
  const found = [];
  for (let index = 0; index < lines.length && found.length < SAMPLE; index++) {
    const text = lines[index].split("#", 1)[0].trim();
    if (text && !text.startsWith("//") && !text.startsWith("%")) found.push({index, text});
  }
  return found;
}

function findLayout(lines) {
  const shown = sample(lines);
  let rows = shown.map(({text}) => text).filter(text => NUMERIC.test(text));
  const others = rows.filter(text => !/^\d+$/.test(text));
  rows = others.length ? others : rows;
  if (!shown.length) throw new FileError("holds no points, or is not a table");
  if (!rows.length) {
    const word = shown[0].text.split(/\s+/)[0];
    throw new FileError(`${WHAT}line ${shown[0].index + 1}: ${quoted(word, 40)} is not a number`);
  }
  const {separator, decimalComma} = findSeparator(rows);
  let names = commentNames(lines), count = null, namedIn = 0;
  for (const {index, text} of shown) {
    const fields = splitFields(decimalComma ? text.replaceAll(",", ".") : text, separator);
    const values = fields.map(number);
    if (fields.length === 1 && /^\d+$/.test(fields[0]) && count === null) {
      count = Number(fields[0]);
    } else if (values.every(value => value === undefined) && fields.some(Boolean) && !namedIn) {
      names = separator === null ? words(text) : namedFields(text, separator);
      namedIn = index + 1;
    } else {
      const axes = findAxes(names, fields.length, namedIn);
      if (fields.length < 3) throw new FileError(`line ${index + 1} holds ${fields.length} numbers, must be 3 or more: x, y, z`);
      return {separator, decimalComma, columns: fields.length, axes, index, count, named: names !== null};
    }
  }
  throw new FileError("holds no points, its lines are a header and a count at most");
}

function findSeparator(rows) {
  for (const separator of [";", "\t"]) {
    if (!rows.every(row => row.includes(separator))) continue;
    const fields = rows.flatMap(row => splitFields(row, separator));
    if (fields.some(field => field.includes(" "))) continue;  // tabs among blanks
    return {separator, decimalComma: fields.some(field => field.includes(","))};
  }
  if (!rows.some(row => row.includes(","))) return {separator: null, decimalComma: false};
  const split = rows.map(row => row.trim().split(/\s+/));
  if (split.every(row => row.length >= 3 && row.every(word => DECIMAL.test(word)))) return {separator: null, decimalComma: true};
  const fields = rows.flatMap(row => splitFields(row, ","));
  if (fields.every(field => /^[-+]?\d*$/.test(field)) && fields.some(field => /^(?:-0|[-+]?0\d+)$/.test(field))) {
    throw new FileError("commas stand between its numbers and within them; write decimal points");
  }
  return {separator: ",", decimalComma: false};
}

// The words of a comment in front of the table that names x, y and z.
function commentNames(lines) {
  let place = 0;
  for (const line of lines) {
    place += line.length + 1;
    const text = line.trim();
    if (place > 4096 || (text && !/^(#|\/\/|%)/.test(text))) return null;
    const found = words(text);
    if (["x", "y", "z"].every(axis => found.includes(axis))) return found;
  }
  return null;
}

function words(text) {
  return text.trim().replace(/^[#/%]+/, "").split(/[\s,;"]+/).map(word => word.toLowerCase()).filter(Boolean);
}

// The names in a header line, one a field: without quotes and units, as `x [m]` has them.
function namedFields(text, separator) {
  let line = text.trim().replace(/^[#/%]+/, "");
  if (line.endsWith(separator)) line = line.slice(0, -1);
  const names = line.split(separator).map(field => field.replace(/^[ \t"]+|[ \t"]+$/g, "").replace(/\s*[[(].*[\])]$/, "").toLowerCase());
  return ["x", "y", "z"].every(axis => names.includes(axis)) ? names : words(text);
}

// Which columns are x, y and z, by their names where there are any.
function findAxes(names, columns, line) {
  const unclear = names === null || ["x", "y", "z"].some(axis => names.filter(name => name === axis).length !== 1);
  if (names === null || (!line && (unclear || names.length !== columns))) return [0, 1, 2];
  if (unclear) throw new FileError(`line ${line}: ${quoted(names.join(" "))} is neither numbers nor a header with x, y and z; correct it`);
  if (names.length !== columns) throw new FileError(`line ${line} names ${names.length} columns, the rows have ${columns}; correct it`);
  return ["x", "y", "z"].map(axis => names.indexOf(axis));
}

export {readTable};
