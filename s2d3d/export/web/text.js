// Numbers in text, as s2d3d/datasets/text.py reads them: a line that is no row of numbers is named.
"use strict";

const NUMBER = /^[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$/;
const SPECIAL = /^([-+]?)(nan|inf|infinity)$/i;

// A file that cannot be read: the message is shown as it is.
class FileError extends Error {}

function quoted(text, limit = 60) {
  const escaped = letter => "\\x" + letter.charCodeAt(0).toString(16).padStart(2, "0");
  const plain = text.replace(/[^\x20-\x7e\xa1-\xac\xae-\uffff]/g, escaped);
  return plain.length > limit ? `'${plain.slice(0, limit)}...'` : `'${plain}'`;
}

// A number in so many digits, as `:.3g` of Python writes it.
function general(value, digits = 3) {
  const [mantissa, exponent] = value.toExponential(digits - 1).split("e"), place = Number(exponent);
  if (!Number.isFinite(value) || (place >= -4 && place < digits)) return String(Number(value.toPrecision(digits)));
  return `${Number(mantissa)}e${place < 0 ? "-" : "+"}${String(Math.abs(place)).padStart(2, "0")}`;
}

// One character for each byte, so that places in the text are places in the file.
function latin(bytes) {
  const parts = [];
  for (let at = 0; at < bytes.length; at += 32768) parts.push(String.fromCharCode.apply(null, bytes.subarray(at, at + 32768)));
  return parts.join("");
}

// The text of a file with lines that end in a line feed, without its byte-order mark.
function readText(bytes) {
  if ((bytes[0] === 0xff && bytes[1] === 0xfe) || (bytes[0] === 0xfe && bytes[1] === 0xff)) {
    const text = new TextDecoder(bytes[0] === 0xff ? "utf-16le" : "utf-16be").decode(bytes);
    bytes = new TextEncoder().encode(text);
  }
  if (bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) bytes = bytes.subarray(3);
  if (bytes.subarray(0, 4096).includes(0)) throw new FileError("not a text file, it holds binary data");
  return latin(bytes).replace(/\r\n?/g, "\n");
}

// The letters that the bytes of a text stand for, one character for each byte.
function utf8(text) {
  return new TextDecoder().decode(Uint8Array.from(text, letter => letter.charCodeAt(0)));
}

// A text without the comments that begin with `#`, which is part of no number in `-1.#IND` and `1.#QNAN` of Windows.
function withoutComments(text) {
  return text.replace(/(?<!\d\.)#[^\n]*|(?<=\d\.)#(?!IND|INF|[QS]NAN)[^\n]*/gi, "");
}

// A text without blanks around it; unlike for `trim`, byte 160 is none, which is a part of letters.
function strip(text) {
  return text.replace(/^[ \t\n\r\v\f]+|[ \t\n\r\v\f]+$/g, "");
}

// The number that a field is, undefined if it is none. NaN and infinities are numbers here.
function number(field) {
  if (NUMBER.test(field)) return Number(field);
  const special = SPECIAL.exec(field);
  if (!special) return undefined;
  if (special[2].toLowerCase() === "nan") return NaN;
  return special[1] === "-" ? -Infinity : Infinity;
}

// The fields of a line, without comment, quotes and blanks; one separator at the end is passed over.
function splitFields(line, separator) {
  const text = strip(withoutComments(line));
  if (!text || text.startsWith("//") || text.startsWith("%")) return [];
  if (separator === null) return text.split(/[ \t\n\r\v\f]+/);
  const fields = text.split(separator).map(field => field.replace(/^[ \t"]+|[ \t"]+$/g, ""));
  return fields.length > 1 && !fields[fields.length - 1] ? fields.slice(0, -1) : fields;
}

// The rows of some lines of text: {values, line}. Blank lines and comments are passed over.
function* parseLines(lines, {first = 1, separator = null, decimalComma = false, what = ""} = {}) {
  for (let i = 0; i < lines.length; i++) {
    const fields = splitFields(decimalComma ? lines[i].replaceAll(",", ".") : lines[i], separator);
    if (!fields.length) continue;
    const values = new Float64Array(fields.length);
    for (let k = 0; k < fields.length; k++) {
      const value = number(fields[k]);
      if (value === undefined) {
        if (!fields[k]) throw new FileError(`${what}line ${first + i}: field ${k + 1} is empty; fill it in or remove the line`);
        const shown = quoted(utf8(splitFields(lines[i], separator)[k]), 40);
        throw new FileError(`${what}line ${first + i}: ${shown} is not a number`);
      }
      values[k] = value;
    }
    yield {values, line: first + i};
  }
}

// Some columns of lines that all hold the same count of numbers, row after row.
function parseRows(lines, columns, keep, options = {}) {
  const found = new Float64Array(lines.length * keep.length);
  let filled = 0;
  for (const {values, line} of parseLines(lines, options)) {
    if (values.length !== columns) {
      const text = `line ${line} holds ${values.length} numbers, must be ${columns} as in the others`;
      throw new FileError(`${options.what || ""}${text}`);
    }
    for (const column of keep) found[filled++] = values[column];
  }
  return found.subarray(0, filled);
}

export {
  FileError, general, latin, number, parseLines, parseRows, quoted, readText, splitFields, strip, utf8, withoutComments,
};
