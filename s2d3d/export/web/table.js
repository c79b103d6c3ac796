// Tables of points, as s2d3d/datasets/tables.py and arrays.py read them: .xyz, .txt, .csv and .pts.
"use strict";

import {FileError, number, parseRows, quoted, readText, splitFields, strip, utf8, withoutComments} from "./text.js";

const SAMPLE = 50;  // rows from which the layout is told
const NUMERIC = /^(?:[ \t\v\f\d+\-.,;eEnaifNAIF"]*\d[ \t\v\f\d+\-.,;eEnaifNAIF"]*|[ \t\v\f,;"]*[-+]?(?:nan|inf)\b.*)$/i;
const DECIMAL = /^(?:[-+]?\d*,\d+(?:[eE][-+]?\d+)?|[-+]?\d+(?:[eE][-+]?\d+)?)$/;
const BOTH_COMMAS = /^[-+]?\d+,\d+(?:,[ \t\v\f]+[-+]?\d+,\d+)+$/;  // commas with blanks behind every second one
const MAX_COLUMNS = 10000;
const WHAT = "cannot be read as a table: ";
const COUNTED = 16;  // rows from which a column is taken to count or number them
const DATE = 1e8, WEEK = [1e5, 7 * 86400];  // where times begin, and seconds of the week
const AXES = ["x", "y", "z"];
const ANNOUNCE = ["columns", "column", "fields", "field", "format", "header", "names", "order"];
const COLUMN_NAMES = new Set([
  ..."xyzrgbaituv", "id", "nx", "ny", "nz", "rgb", "red", "green", "blue", "alpha", "rgba", "normal_x", "normal_y",
  "normal_z", "normalx", "normaly", "normalz", "intensity", "reflectance", "reflectivity", "time", "timestamp",
  "gps_time", "gpstime", "index", "label", "class", "classification", "confidence", "curvature", "ring", "range",
  "scalar", "instance", "segment", "object", "row", "col",
]);  // a comment of other words is a sentence

function readTable(bytes, suffix) {
  const lines = readText(bytes).split("\n");
  const layout = findLayout(lines, suffix);
  const rows = lines.slice(layout.index);
  if (layout.decimalComma) refuseThousands(rows, layout.separator);
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

// Refuse the first of columns without names where it is no x, or where its first number counts the rows.
function refuseCounts(points, layout) {
  const held = layout.columns > 3 ? heldInsteadOfX(points) : "", count = points.length / 3;
  if (held) {
    const advice = "remove it, or name the columns in a first line: index x y z";
    throw new FileError(`its first column ${held}, so it is not taken for x; ${advice}`);
  }
  if (count < COUNTED || points[0] !== count - 1) return;
  for (let i = 3; i < points.length; i += 3) {
    if (Number.isInteger(points[i])) continue;
    throw new FileError(`line ${layout.index + 1} begins with ${count - 1}, and as many rows follow; remove the line if it is their `
      + "number, or name the columns in a first line");
  }
}

// What the first of three columns seems to hold; empty for coordinates.
function heldInsteadOfX(points) {
  const columns = [[], [], []];
  for (let i = 0; i < points.length; i += 3) {
    const row = points.subarray(i, i + 3);
    if (row.every(Number.isFinite)) row.forEach((value, axis) => columns[axis].push(value));
  }
  const [first, ...others] = columns, count = first.length, steps = first.slice(1).map((value, i) => value - first[i]);
  if (count < COUNTED) return "";
  const low = first.reduce((a, b) => Math.min(a, b)), high = first.reduce((a, b) => Math.max(a, b));
  const most = others.flat().reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  const counts = first.map(value => value / steps[0]), isNear = (value, whole) => Math.abs(value - whole) < 0.01;
  if (counts.every((value, i) => isNear(value, Math.round(value)) && (!i || isNear(value - counts[i - 1], 1)))) return "counts the rows";
  const ofWeek = WEEK[0] <= low && high <= WEEK[1] && low > 50 * Math.max(most, high - low);
  const isDate = low >= DATE && (most < DATE || steps.every(step => step > 0));
  if ((ofWeek && steps.every(step => step >= 0)) || isDate) return "seems to hold times";
  if (!first.every(Number.isInteger)) return "";
  const wholes = others.map(column => column.filter(Number.isInteger).length);
  if (Math.max(...wholes) < 0.5 * count) return "holds whole numbers only";
  const [kinds, ...along] = columns.map(column => new Set(column).size);
  if (kinds === count && count ** 2 > 8 * (high - low + 1)) return "seems to number the rows";
  return low >= -1 && high < 1000 && Math.min(...along) >= 20 * kinds ? "seems to hold labels" : "";
}

const isComment = text => /^(?:#|\/\/|%)/.test(text);

// The first lines that are neither blank nor comments: where each stands, and its text.
function sample(lines) {
  const found = [];
  for (let index = 0; index < lines.length && found.length < SAMPLE; index++) {
    const text = strip(withoutComments(lines[index]));
    const isForExcel = index === 0 && /^"?sep=/i.test(text);
    if (text && !isComment(text) && !isForExcel) found.push({index, text});
  }
  return found;
}

function findLayout(lines, suffix) {
  const shown = sample(lines);
  for (const {index, text} of shown) {
    if ([/[ \t\v\f]+/, ",", ";"].some(mark => text.split(mark).length > MAX_COLUMNS)) {
      throw new FileError(`line ${index + 1} has more than 10,000 numbers; a row is one point: x, y, z`);
    }
  }
  let rows = shown.map(({text}) => text).filter(text => NUMERIC.test(text));
  const others = rows.filter(text => !/^\d+$/.test(text));
  rows = others.length ? others : rows;
  if (!shown.length) throw new FileError(`holds no points, or is not a ${suffix} file`);
  if (!rows.length) throw noNumber(shown);
  if (rows.some(row => /"[-+]?\d*,\d+(?:[eE][-+]?\d+)?"/.test(row))) {
    throw new FileError("holds decimal commas in quotes; write decimal points");
  }
  const {separator, decimalComma} = findSeparator(rows);
  let names = null, isHeader = false, count = null, namedIn = 0;
  for (const {index, text} of shown) {
    const fields = splitFields(decimalComma ? text.replaceAll(",", ".") : text, separator);
    const values = fields.map(number);
    if (fields.length === 1 && /^\d+$/.test(fields[0]) && count === null) {
      count = Number(fields[0]);
    } else if (values.every(value => value === undefined) && fields.some(Boolean) && !namedIn) {
      names = separator === null ? words(text) : namedFields(text, separator);
      namedIn = index + 1;
    } else {
      if (!namedIn) [names, isHeader] = commentNames(lines.slice(0, index));
      const axes = findAxes(names, fields.length, namedIn, isHeader);
      if (fields.length < 3) throw new FileError(`line ${index + 1} holds ${fields.length} numbers, must be 3 or more: x, y, z`);
      if (fields.every((field, column) => field === `${column}`) && rows.some(row => row.includes("."))) {
        throw new FileError(`line ${index + 1} numbers the columns, it is no point; remove it`);
      }
      const named = names !== null && names.length === fields.length && isOnce(names);
      return {separator, decimalComma, columns: fields.length, axes, index, count, named};
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
  const split = rows.map(row => splitFields(row, null));
  if (split.every(row => row.length >= 3 && row.every(word => DECIMAL.test(word)))) return {separator: null, decimalComma: true};
  const fields = rows.flatMap(row => splitFields(row, ","));
  const doubtful = fields.some(field => /^(?:-0|[-+]?0\d+)$/.test(field)) || (rows.length >= COUNTED && rows.every(oneDecimal));
  if (rows.every(row => BOTH_COMMAS.test(row)) || (doubtful && fields.every(field => /^[-+]?\d*$/.test(field)))) {
    throw new FileError("commas stand between its numbers and within them; write decimal points");
  }
  return {separator: ",", decimalComma: false};
}

// Whether each second number of a row is a single digit, as where `2,3` stands for 2.3.
function oneDecimal(row) {
  const decimals = splitFields(row, ",").filter((_, i) => i % 2);
  return decimals.length >= 3 && row.split(",").length % 2 === 0 && decimals.every(part => /^\d$/.test(part));
}

// Refuse a column with numbers such as 895 and 1,038, whose comma separates thousands, or else decimals.
function refuseThousands(rows, separator) {
  const doubtful = new Map(), whole = new Set(), decimal = new Set();
  for (const row of rows) {
    splitFields(row, separator).forEach((field, column) => {
      if (/^[-+]?[1-9]\d{0,2},\d{3}$/.test(field)) doubtful.set(column, doubtful.get(column) || field);
      else if (field.includes(",")) decimal.add(column);
      else if (/^[-+]?\d{1,3}$/.test(field)) whole.add(column);
    });
  }
  for (const [column, field] of doubtful) {
    if (!whole.has(column) || decimal.has(column)) continue;
    throw new FileError(`does the comma in ${field} separate thousands or decimals? Write numbers without commas, with `
      + "decimal points");
  }
}

// The words of a comment in front of the table that names x, y and z, and whether they are surely a header.
function commentNames(lines) {
  let found = null;
  for (const line of lines) {
    if (!isComment(strip(line))) continue;
    let names = words(line).map(word => word.replace(/(?<=.)[[(].*$/, ""));
    const announced = names.length > 0 && ANNOUNCE.includes(names[0].replace(/:$/, ""));
    if (announced || (names.length && names[0].endsWith(":"))) names = names.slice(1);
    if (!AXES.every(axis => names.includes(axis))) continue;
    if (announced || names.every(name => COLUMN_NAMES.has(name))) return [names, true];
    found = found || names;
  }
  return [found, false];
}

function words(text) {
  const plain = utf8(text).trim().replace(/^[#/%]+/, "").replace(/^[ \t"]+|[ \t"]+$/g, "");
  return plain.split(/[\s,;"]+/).filter(Boolean).map(word => word.toLowerCase());
}

// The names in a header line, one a field: without quotes and units, as `x [m]` has them.
function namedFields(text, separator) {
  let line = utf8(text).trim().replace(/^[#/%]+/, "");
  if (line.endsWith(separator)) line = line.slice(0, -1);
  const names = line.split(separator).map(field => field.replace(/^[ \t"]+|[ \t"]+$/g, "").replace(/\s*[[(].*[\])]$/, "").toLowerCase());
  return AXES.every(axis => names.includes(axis)) ? names : words(text);
}

const isOnce = names => AXES.every(axis => names.filter(name => name === axis).length === 1);

// Which columns are x, y and z, by their names where there are any.
function findAxes(names, columns, line, isHeader) {
  const unclear = names === null || !isOnce(names);
  if (names === null || (!line && (unclear || AXES.every((axis, i) => names[i] === axis)))) return [0, 1, 2];
  const places = AXES.map(axis => names.indexOf(axis)), shown = quoted(names.join(" "));
  if (!line && (names.length !== columns || !isHeader)) {  // a sentence, as far as one can tell
    const [x, y, z] = places, inAnotherOrder = Math.max(...places) - Math.min(...places) === 2 && !(x < y && y < z);
    if (columns === 3 && !inAnotherOrder) return [0, 1, 2];
    throw new FileError(`which columns are x, y and z? A comment says ${shown}, the rows have ${columns} columns; `
      + "correct it");
  }
  if (unclear) throw new FileError(`line ${line}: ${shown} is neither numbers nor a header with x, y and z; correct it`);
  if (names.length !== columns) throw new FileError(`line ${line} names ${names.length} columns, the rows have ${columns}; correct it`);
  return places;
}

// Name the first word of the first row, which is the first line with a number in it, if there is one.
function noNumber(shown) {
  const split = shown.map(({index, text}) => ({
    index, fields: text.split(/[ \t\v\f,;]+/).filter(Boolean).map(word => word.replace(/^"+|"+$/g, "")),
  }));
  const rows = split.filter(({fields}) => fields.some(word => number(word) !== undefined));
  const {index, fields} = (rows.length ? rows : split)[0];
  const word = fields.find(field => number(field) === undefined) ?? shown[0].text;
  const advice = rows.length > 1 && !/[\d#]/.test(word) ? "; remove this column" : "";
  return new FileError(`${WHAT}line ${index + 1}: ${quoted(utf8(word), 40)} is not a number${advice}`);
}

export {readTable};
