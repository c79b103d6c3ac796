"""Text tables and NumPy files in many forms."""

import io
from collections.abc import Callable, Iterator

import numpy as np

from faults.variants import COUNT, Variant, clouds


def tables(rng: np.random.Generator) -> Iterator[Variant]:
    forms = {"%.6f": "fixed", "%.9g": "general", "%.18e": "exponent", "%r": "shortest"}
    for kind, points in clouds(rng).items():
        for form, name in forms.items():
            for separator, suffix in (
                (" ", ".xyz"),
                (",", ".csv"),
                (";", ".txt"),
                ("\t", ".txt"),
                ("  ", ".pts"),
                (", ", ".txt"),
            ):
                rows = [[form % value for value in point] for point in points.tolist()]
                expected = np.array(rows, dtype=np.float64)
                if np.ptp(expected, axis=0).max() < 1e-5 and name == "fixed":
                    continue
                text = "".join(separator.join(row) + "\n" for row in rows)
                yield Variant(f"table {kind} {name} {separator!r}", suffix, text.encode(), expected)
    points = clouds(rng)["plain"]
    fields = [[f"{value:.6f}" for value in point] for point in points.tolist()]
    coloured = [[*row, "255", "0", "0"] for row in fields]

    def text(rows: list[list[str]], separator: str = " ", end: str = "\n") -> str:
        return "".join(separator.join(row) + end for row in rows)

    decimal = text([[field.replace(".", ",") for field in row] for row in fields])
    for name, content in {
        "header": "x y z\n" + text(fields),
        "capitals": "X,Y,Z\n" + text(fields, ","),
        "quoted": '"x";"y";"z"\n' + text(fields, ";"),
        "units": "x [m];y (m);z [m]\n" + text(fields, ";"),
        "index": ",x,y,z\n" + text([[str(place), *row] for place, row in enumerate(fields)], ","),
        "other order": "z y x\n" + text([row[::-1] for row in fields]),
        "comment names": "# z y x\n" + text([r[::-1] for r in fields]),
        "colours first": "r;g;b;x;y;z\n" + text([row[3:] + row[:3] for row in coloured], ";"),
        "count": f"{COUNT}\n" + text(fields),
        "CloudCompare": f"//X Y Z R G B\n{COUNT}\n" + text(coloured),
        "comments": "# a\n% b\n\n" + text(fields) + "# end\n",
        "end of Windows": text(fields, end="\r\n"),
        "end of old Macs": text(fields, end="\r"),
        "no last end": text(fields)[:-1],
        "decimal commas": decimal,
        "decimal commas; ": decimal.replace(" ", ";"),
        "decimal commas, tabs": decimal.replace(" ", "\t"),
        "separator at the end": text(fields, ",", ",\n"),
        "indented": text(fields).replace("\n", "\n   "),
        "blank lines": text(fields, end="\n\n"),
        "plus": text([["+" + field if field[0] != "-" else field for field in row] for row in fields]),
        "mark": "\ufeff" + text(fields),
        "mark and header": "\ufeffx y z\n" + text(fields),
        "remarks": text(fields, end=" # ok\n"),
        "quotes": text([[f'"{field}"' for field in row] for row in fields], ","),
    }.items():
        yield Variant(f"table {name}", ".txt", content.encode(), points)
        yield Variant(f"table {name} utf-16", ".csv", content.removeprefix("\ufeff").encode("utf-16"), points)
    yield Variant("table latin-1", ".xyz", "# Höhe\n".encode("latin-1") + text(fields).encode(), points)
    holes = [[*row] for row in fields]
    holes[3][1], holes[9] = "nan", ["NaN", "inf", "-inf"]
    yield Variant("table holes", ".xyz", text(holes).encode(), np.delete(points, (3, 9), axis=0))
    for place in (0, 1, 30, 59):
        for name, separator, row in (
            ("empty field", ",", ["1", "", "3"]),
            ("short row", " ", ["1", "2"]),
            ("long row", " ", ["1", "2", "3", "4"]),
            ("word", " ", ["1", "two", "3"]),
            ("hexadecimal", " ", ["1", "0x10", "3"]),
            ("underscore", " ", ["1", "1_0", "3"]),
            ("true", " ", ["1", "True", "3"]),
            ("two points", " ", ["1", "1.2.3", "3"]),
            ("date", ",", ["1", "2026-01-02", "3"]),
        ):
            rows = [*fields[:place], row, *fields[place:]]
            if len(row) in (2, 4) and place == 0:
                rows = [*rows, ["0", "0", "0"]]
            yield Variant(f"table {name} in row {place}", ".xyz", text(rows, separator).encode(), None)
    lying = {
        "a count too large": f"{COUNT + 1}\n" + text(fields),
        "a count too small": f"{COUNT - 1}\n" + text(fields),
        "other names": "lon lat height\n" + text(fields),
        "names without z": "x y r\n" + text(fields),
        "more names": "x y z r\n" + text(fields),
        "empty": "",
        "blank": "\n\n \n",
        "comments only": "# x y z\n",
        "count only": "60\n",
        "header only": "x y z\n",
        "two columns": text([row[:2] for row in fields]),
        "one column": text([row[:1] for row in fields]),
        "transposed": text(np.array(fields).T.tolist()),
        "all equal": "1 2 3\n" * 50,
        "all holes": "nan nan nan\n" * 50,
        "commas of two kinds": "0,061234,-0,125000,0,0\n" * 3 + "1,061234,-0,125000,0,500000\n",
        "thousands": "5,334,000.5 691,000.2 5.0\n" * 9,
        "two counts": text(fields[:30]) + "30\n" + text(fields[30:]),
        "mixed": text(fields[:30]) + text(fields[30:], ","),
        "binary": "\0\1\2\3" * 40,
        "prose": "There is no point in it.\n" * 9,
        "json": '{"points": [[0, 0, 0]]}\n',
        "elements": "3\nwater\nO 0 0 0\nH 0 0 1\nH 0 1 0\n",
        "lost in float32": "5334000.5 691000.25 520\n5334001 691000.5 520\n5334000.5 691000.75 521\n" * 9,
    }
    for name, content in lying.items():
        yield Variant(f"table {name}", ".txt", content.encode(), None)


def arrays(rng: np.random.Generator) -> Iterator[Variant]:
    def saved(array: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    def archived(pack: Callable, **content: np.ndarray) -> bytes:
        file = io.BytesIO()
        pack(file, **content)
        return file.getvalue()

    points = clouds(rng)["plain"]
    whole = np.rint(points * 50)
    for kind in ("<f2", "<f4", ">f4", "<f8", ">f8", "<i2", ">i4", "<i8"):
        stored = (whole if kind[1] == "i" else points).astype(kind)
        for name, array in {
            "c": stored,
            "fortran": np.asfortranarray(stored),
            "six": np.concatenate([stored, stored], axis=1),
            "map": stored.reshape(6, 10, 3),
        }.items():
            yield Variant(f"npy {kind} {name}", ".npy", saved(array), stored.astype(np.float64))
    for name, pack in (("plain", np.savez), ("packed", np.savez_compressed)):
        yield Variant(f"npz {name}", ".npz", archived(pack, any=points), points)
        yield Variant(
            f"npz {name} of several", ".npz", archived(pack, label=np.arange(9), points=points, z=whole), points
        )
        yield Variant(f"npz {name} one fits", ".npz", archived(pack, label=np.arange(9), cloud=points), points)
        yield Variant(f"npz {name} called npy", ".npy", archived(pack, any=points), points)
        yield Variant(f"npz {name} unclear", ".npz", archived(pack, a=points, b=whole), None)
        yield Variant(f"npz {name} cut", ".npz", archived(pack, any=points)[:-40], None)
        content = archived(pack, any=points)
        content = content[: len(content) // 2] + bytes(8) + content[len(content) // 2 + 8 :]
        yield Variant(f"npz {name} damaged", ".npz", content, None)
    yield Variant("npy called npz", ".npz", saved(points), points)
    records = np.zeros(COUNT, [("i", "u2"), ("z", "f8"), ("Y", "f8"), ("x", "f8")])
    records["x"], records["Y"], records["z"] = points.T
    yield Variant("npy records", ".npy", saved(records), points)
    for name, array in {
        "transposed": points.T,
        "text": points.astype(str),
        "truth": points > 0,
        "complex": points + 0j,
        "flat": points.ravel(),
        "number": np.float64(3),
        "two": points[:, :2],
        "none": points[:0],
        "records without x": records[["i", "z"]],
        "deep": points.reshape(3, 2, 2, 5, 3),
        "equal": points * 0,
        "holes": points * np.nan,
        "far": (points + 5_334_000).astype(np.float32),
        "huge": points * 1e300,
    }.items():
        yield Variant(f"npy {name}", ".npy", saved(array), None)
    file = io.BytesIO()
    np.save(file, np.array([[1, None, 3]], dtype=object), allow_pickle=True)
    yield Variant("npy objects", ".npy", file.getvalue(), None)
    whole_file = saved(points)
    for name, new in (
        ("liar", b"(99999999999, 3)"),
        ("negative", b"(-60, 3)"),
        ("deep", b"((((((((60, 3)"),
        ("call", b"(print(1), 3)"),
    ):
        yield Variant(f"npy {name}", ".npy", whole_file.replace(b"(60, 3)", new, 1), None)
